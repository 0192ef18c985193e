"""Whether an objective is what the policies need: normalised, monotone and submodular."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.submodular.functions.base import Objective, members_of
from modicum.types import PositiveInt

SLACK = 1e-9  # of a difference, relative to the values


@dataclass(frozen=True)
class Axioms:
    """What a check found; true where all three hold on the sets that were tried.

    Attributes:
        normalised: The empty set has the value 0.
        monotone: No element lowered the value of a set.
        submodular: No element added more to a larger set than to a smaller one.
        violations: A sentence for each set that breaks one, with the set.
    """

    normalised: bool = True
    monotone: bool = True
    submodular: bool = True
    violations: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.normalised and self.monotone and self.submodular

    def require(self) -> None:
        """Raise where one of them does not hold.

        Raises:
            RecipeError: It names the first set that breaks an axiom.
        """
        if not self:
            raise RecipeError(f"The objective is not what the policies need: {self.violations[0]}")


@guarded
def check_axioms(f: Objective, *, samples: PositiveInt = 200, rng: torch.Generator | int = 0) -> Axioms:
    r"""Try the axioms on random pairs of sets :math:`A \subseteq B` and elements outside ``B``.

    Args:
        f: The objective.
        samples: How many pairs are tried; all elements outside are tried with each.
        rng: A generator that draws the sets, or its seed.

    Returns:
        What holds, and the sets that break an axiom. A check that finds nothing is no proof.

    Example:
        >>> from modicum.submodular.functions import from_callable
        >>> found = check_axioms(from_callable(lambda mask: float(mask.sum()) ** 2, 3))
        >>> found.monotone, found.submodular, found.violations[0]
        (True, False, 'element 0 adds 3 to {2} and more, 5, to {1, 2}, a larger set: not submodular.')

    Cost:
        ``samples`` times 2n gains and two values.
    """
    rng = torch.Generator().manual_seed(rng) if isinstance(rng, int) else rng
    n, found = f.n, []
    normalised = monotone = submodular = True
    empty = float(f.value(torch.zeros(n, dtype=torch.bool)))
    if abs(empty) > SLACK:
        normalised = False
        found.append(f"f of the empty set is {empty:g}, expected 0: not normalised. Shift it by {-empty:g}.")
    everything = torch.arange(n)
    for _ in range(samples):
        share = torch.rand((), generator=rng)
        large = torch.rand(n, generator=rng) < share
        small = large & (torch.rand(n, generator=rng) < torch.rand((), generator=rng))
        for mask in (small, large):
            gains = torch.as_tensor(f.gains(mask, everything)).double()
            slack = SLACK * (1 + abs(float(f.value(mask))))
            bad = (gains < -slack) | gains.isnan()
            if bool(bad.any()):
                element = int(bad.nonzero()[0])
                monotone = False
                rest = mask.clone()
                rest[element] = False
                found.append(f"element {element} adds {gains[element]:g} to {members_of(rest)}: not monotone.")
        outside = (~large).nonzero().flatten()
        if not len(outside):
            continue
        less, more = (torch.as_tensor(f.gains(mask, outside)).double() for mask in (small, large))
        bad = more > less + SLACK * (1 + abs(float(f.value(large))))
        if bool(bad.any()):
            place = int(bad.nonzero()[0])
            submodular = False
            found.append(
                f"element {int(outside[place])} adds {less[place]:g} to {members_of(small)} and more, {more[place]:g}, "
                f"to {members_of(large)}, a larger set: not submodular."
            )
    return Axioms(normalised, monotone, submodular, list(dict.fromkeys(found)))
