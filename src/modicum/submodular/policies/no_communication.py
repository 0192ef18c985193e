"""No communication: every agent learns as if it were alone. A negative control."""

from __future__ import annotations

from typing import Unpack

import torch

from modicum.knobs import known
from modicum.registry import policy
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.gossip import Shared
from modicum.submodular.policies.ma_osma import MAOSMA
from modicum.types import Positive


@policy("no_communication", supplied={"seed"}, step="eta", hints="rounds")
class NoCommunication(MAOSMA):
    r"""Run MA-OSMA with :math:`W = I`: nobody hears of anybody.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        eta: The step; it scales with one over the objective.
        **shared: See :class:`~modicum.submodular.policies.gossip.Settings`.

    Raises:
        RecipeError: Blocks or a knob do not fit.

    Example:
        >>> policy = NoCommunication([2, 2], eta=0.1)
        >>> policy.x[0].tolist()
        [0.5, 0.5, 0.0, 0.0]

    Cost:
        As MA-OSMA, without messages.

    Reference:
        None: the control of every policy that communicates.
    """

    def __init__(self, blocks: Blocks, *, eta: Positive | tuple[Positive, ...], **shared: Unpack[Shared]) -> None:
        alone = torch.eye(len(list(blocks)), dtype=torch.float64)
        super().__init__(blocks, alone, eta=eta, **known(NoCommunication, shared))
