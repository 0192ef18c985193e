r"""MA-OSEA: MA-OSMA in the geometry of entropy, a multiplicative step in closed form instead of a projection.

A little uniform probability is mixed in, so that no action is lost for good. It wants steps 10 to 30 times those of
MA-OSMA.
"""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import known
from modicum.registry import policy
from modicum.submodular.communication import Weights
from modicum.submodular.geometry import kl_capped_simplex_step, mix_uniform
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.gossip import Shared
from modicum.submodular.policies.ma_osma import MAOSMA
from modicum.types import Decay, Positive


@policy("ma_osea", paper="arXiv:2502.05028", supplied={"W", "seed"}, step="eta", hints="rounds")
class MAOSEA(MAOSMA):
    r"""Mix a little in, average with neighbours, climb by a multiplicative step.

    .. math::
        \hat x_i = (1 - \gamma) x_i + \gamma u, \qquad y_i = \sum_j w_{ij} \hat x_j, \qquad
        s_a = [y_i]_a e^{\eta \hat g_a}, \quad [x_i]_{V_i} \leftarrow s / \max(1, \textstyle\sum s)

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        W: Doubly stochastic weights of the averages, (N, N), a function from the round to them, or a
            :class:`~modicum.submodular.communication.Communication`.
        eta: The step; it scales with one over the objective.
        gamma: Share of the uniform distribution, in [0, 1).
        mix: ``per_block`` mixes in a uniform choice of every agent, ``global`` 1/n for every action.
        allow_zero_mixing: Allow ``gamma=0``, with which an action that reached probability 0 never comes back.
        **shared: See :class:`~modicum.submodular.policies.gossip.Settings`.

    Raises:
        RecipeError: Blocks, weights or a knob do not fit, or ``gamma`` is 0 without ``allow_zero_mixing``.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> policy = MAOSEA([2], [[1.0]], eta=0.5, gamma=0.0, allow_zero_mixing=True, c=0.0)
        >>> policy.update(FacilityLocation([[1.0, 0.0], [0.0, 0.5]]))
        >>> round(float(policy.probabilities()[0]), 6)
        0.562177

    Cost:
        As MA-OSMA.

    Deviates:
        As MA-OSMA. The share that the authors mix in is not known; 0.001 to 0.03 worked.

    Reference:
        Zhang, Wan, Yang, Shen and Tao, "Near-Optimal Online Learning for Multi-Agent Submodular Coordination: Tight
        Approximation and Communication Efficiency", ICLR 2025, arXiv:2502.05028, Algorithm 2.
    """

    def __init__(
        self,
        blocks: Blocks,
        W: Weights,
        *,
        eta: Positive | tuple[Positive, ...],
        gamma: Decay = 0.01,
        mix: Literal["per_block", "global"] = "per_block",
        allow_zero_mixing: bool = False,
        **shared: Unpack[Shared],
    ) -> None:
        if gamma == 0 and not allow_zero_mixing:
            raise RecipeError(
                "gamma is 0: an action that reaches probability 0 would never come back. Take a small share such as "
                "0.01, or say allow_zero_mixing=True."
            )
        self.gamma, self.mix = gamma, mix
        super().__init__(blocks, W, eta=eta, **known(MAOSEA, shared))

    def _message(self, x: Tensor) -> Tensor:
        if not self.gamma:
            return x
        uniform = self._uniform_share if self.mix == "per_block" else torch.tensor(1 / self.n, dtype=torch.float64)
        return mix_uniform(x, uniform.to(x.device), gamma=self.gamma)

    def _step(self, own: Tensor, gradient: Tensor) -> Tensor:
        return kl_capped_simplex_step(own, gradient, eta=self._eta)
