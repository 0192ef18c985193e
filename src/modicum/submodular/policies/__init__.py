"""Policies of agents that choose together, one file each."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.submodular.policies.base import Policy
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

__all__ = [
    "BSG",
    "MAOSEA",
    "MAOSMA",
    "MASPL",
    "ODM",
    "OSG",
    "RAG",
    "BestResponse",
    "Fixed",
    "Hedge",
    "LastGreedy",
    "NoCommunication",
    "OracleGreedy",
    "Policy",
    "Random",
]

face(__name__)
