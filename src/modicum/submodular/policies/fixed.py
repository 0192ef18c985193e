"""Fixed weights, which nobody learns: even ones, those of a user, or the best that give one action a larger share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import policy
from modicum.submodular.draws import several
from modicum.submodular.functions.base import Objective
from modicum.submodular.geometry import array, sample_actions
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.base import Policy
from modicum.types import UnitInterval


def favourites(sizes: Sequence[int]) -> list[int]:
    """Return the favourites that the best fixed weights are looked for among: none, and each position.

    Example:
        >>> favourites([2, 3])
        [-1, 0, 1, 2]
    """
    return list(range(-1, max(sizes)))


@policy("fixed", supplied={"seed"}, step="favourite", grid=favourites)
class Fixed(Policy):
    r"""Draw every agent's action from weights that never change, position by position of its block.

    .. math::
        p_k = s \text{ for the favourite } k, \qquad p_l = (1 - s) \frac{w_l}{\sum_{m \ne k} w_m} \text{ for others}

    The *best fixed* weights are those of the favourite that a trial of each finds best; ``job: coordinate`` tries them
    where ``favourite`` is not given.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        weights: A weight for each position; even where not given. Shorter blocks lack the last positions.
        favourite: The position that gets ``share``, or -1 for none; one for each world where several are given.
        share: Its share.
        seed: Seed of all draws; several for as many worlds.

    Raises:
        RecipeError: Weights, favourite or share do not fit.

    Example:
        >>> Fixed([4], favourite=1, share=0.4).probabilities().tolist()
        [0.19999999999999998, 0.4, 0.19999999999999998, 0.19999999999999998]

    Cost:
        None.

    Reference:
        None: a baseline.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        weights: tuple[float, ...] | None = None,
        favourite: Annotated[int, Ge(-1)] | tuple[Annotated[int, Ge(-1)], ...] = -1,
        share: UnitInterval = 0.4,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(blocks, seed=seed)
        widest = self.partition.widest
        given = array([1.0] * widest if weights is None else weights, "weights").double()
        if given.shape != (widest,) or not bool(((given >= 0) & given.isfinite()).all()):
            raise RecipeError(f"weights are {given.tolist()}, expected {widest} finite numbers of at least 0.")
        found = several(favourite)
        chosen = torch.tensor(found if isinstance(found, tuple) else [found]).double()
        if isinstance(found, tuple) and (not self.worlds or len(found) != len(self._seeds)):
            raise RecipeError(f"favourite has {len(found)} positions, which needs as many seeds, one for each world.")
        if bool(((chosen != chosen.round()) | (chosen < -1) | (chosen >= widest)).any()):
            raise RecipeError(f"favourite is {favourite}, expected -1 for none, or a position from 0 to {widest - 1}.")
        own = given * self.partition.valid  # (N, widest)
        if not bool((own.sum(-1) > 0).all()):
            raise RecipeError(f"weights are {given.tolist()}: an agent has no action of a weight above 0.")
        first = (torch.arange(widest) == chosen.view(-1, 1, 1)) & self.partition.valid
        rest = torch.where(first, 0, own)
        # Who lacks the favourite, or has nothing else, draws by the weights of what is there.
        plain = ~first.any(-1, keepdim=True) | (rest.sum(-1, keepdim=True) == 0)
        shared = torch.where(first, share, (1 - share) * rest / rest.sum(-1, keepdim=True))
        drawn = torch.where(plain, own / own.sum(-1, keepdim=True), shared)
        self._p = drawn.expand(*self.worlds, -1, -1) if self.worlds else drawn[0]

    def _shares(self) -> Tensor:
        return self._p

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:  # noqa: ARG002
        return sample_actions(self._p, self._uniform("act", self.acts, 1)[..., 0])
