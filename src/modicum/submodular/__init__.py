"""Agents that choose together, each from actions of its own, and talk only to neighbours.

``functions`` holds objectives, ``policies`` the policies (one file each), ``graphs`` who talks to whom, ``simulation``
runs them, ``tracking`` and ``data_selection`` are two applications.
"""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.submodular.communication import PointToPoint, Simulated
    from modicum.submodular.data_selection import DomainScheduler, Needs, SelectionWorld, similarities
    from modicum.submodular.functions.axioms import check_axioms
    from modicum.submodular.functions.combine import Mixture, from_callable
    from modicum.submodular.functions.concave import ConcaveOverModular
    from modicum.submodular.functions.coverage import ProbabilisticCoverage, WeightedCover
    from modicum.submodular.functions.facility import FacilityLocation
    from modicum.submodular.functions.greedy import greedy, sequential_greedy
    from modicum.submodular.geometry import (
        bregman_step,
        kl_capped_simplex_step,
        mix_uniform,
        project_capped_simplex,
        sample_actions,
    )
    from modicum.submodular.graphs import (
        complete,
        consensus,
        erdos_renyi,
        grid,
        lazy_weights,
        max_degree_weights,
        metropolis_weights,
        path,
        ring,
        second_modulus,
        star,
        theory_step,
    )
    from modicum.submodular.policies.best_response import BestResponse
    from modicum.submodular.policies.bsg import BSG
    from modicum.submodular.policies.fixed import Fixed
    from modicum.submodular.policies.hedge import Hedge
    from modicum.submodular.policies.last_greedy import LastGreedy
    from modicum.submodular.policies.ma_osea import MAOSEA
    from modicum.submodular.policies.ma_osma import MAOSMA
    from modicum.submodular.policies.ma_spl import MASPL
    from modicum.submodular.policies.no_communication import NoCommunication
    from modicum.submodular.policies.odm import ODM
    from modicum.submodular.policies.oracle_greedy import OracleGreedy
    from modicum.submodular.policies.osg import OSG
    from modicum.submodular.policies.rag import RAG
    from modicum.submodular.policies.random import Random
    from modicum.submodular.relaxation import (
        policy_surrogate_grad,
        policy_surrogate_grad_exact,
        sample_scale,
        surrogate_grad,
        surrogate_grad_exact,
        surrogate_ratio,
    )
    from modicum.submodular.simulation import Trace, simulate
    from modicum.submodular.tracking import TrackingWorld

__all__ = [
    "BSG",
    "MAOSEA",
    "MAOSMA",
    "MASPL",
    "ODM",
    "OSG",
    "RAG",
    "BestResponse",
    "ConcaveOverModular",
    "DomainScheduler",
    "FacilityLocation",
    "Fixed",
    "Hedge",
    "LastGreedy",
    "Mixture",
    "Needs",
    "NoCommunication",
    "OracleGreedy",
    "PointToPoint",
    "ProbabilisticCoverage",
    "Random",
    "SelectionWorld",
    "Simulated",
    "Trace",
    "TrackingWorld",
    "WeightedCover",
    "bregman_step",
    "check_axioms",
    "complete",
    "consensus",
    "erdos_renyi",
    "from_callable",
    "greedy",
    "grid",
    "kl_capped_simplex_step",
    "lazy_weights",
    "max_degree_weights",
    "metropolis_weights",
    "mix_uniform",
    "path",
    "policy_surrogate_grad",
    "policy_surrogate_grad_exact",
    "project_capped_simplex",
    "ring",
    "sample_actions",
    "sample_scale",
    "second_modulus",
    "sequential_greedy",
    "similarities",
    "simulate",
    "star",
    "surrogate_grad",
    "surrogate_grad_exact",
    "surrogate_ratio",
    "theory_step",
]

face(__name__)
