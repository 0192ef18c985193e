"""Monotone submodular set functions: values and gains of many sets at once, exact extensions where they exist."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.submodular.functions.axioms import Axioms, check_axioms
    from modicum.submodular.functions.base import Objective, SetFunction
    from modicum.submodular.functions.combine import Mixture, from_callable
    from modicum.submodular.functions.concave import ConcaveOverModular
    from modicum.submodular.functions.coverage import ProbabilisticCoverage, WeightedCover
    from modicum.submodular.functions.facility import FacilityLocation
    from modicum.submodular.functions.greedy import Selection, greedy, sequential_greedy

__all__ = [
    "Axioms",
    "ConcaveOverModular",
    "FacilityLocation",
    "Mixture",
    "Objective",
    "ProbabilisticCoverage",
    "Selection",
    "SetFunction",
    "WeightedCover",
    "check_axioms",
    "from_callable",
    "greedy",
    "sequential_greedy",
]

face(__name__)
