r"""The mean of adapters of one base as an adapter: of their products, not the product of their means.

.. math::
    \sum_i c_i s_i B_i A_i = \begin{pmatrix} c_1 s_1 B_1 & \dots & c_n s_n B_n \end{pmatrix}
    \begin{pmatrix} A_1 \\ \vdots \\ A_n \end{pmatrix}

has rank :math:`\sum r_i`, exactly. A smaller rank takes the nearest adapter of that rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError
from modicum.layout import ADAPTER_PREFIX
from modicum.weights.adapter import LowRank
from modicum.weights.averageable import check_apart
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.kernels.compare import refuse_non_finite, refuse_overflow
from modicum.weights.lora import check_lora, write_adapter
from modicum.weights.plan import parse_dtype
from modicum.weights.stream import cores, run_all


@dataclass(frozen=True)
class LoraMean:
    """Adapters that fit together, and the share of each.

    Args:
        base: What they are of.
        models: Those with a coefficient.
        coefficients: One for each.
        modules: The changes of each weight, in the order of the models.
        rank: The result's highest rank; the sum of theirs, which is exact, when not given.
    """

    base: Checkpoint
    models: Sequence[Checkpoint]
    coefficients: Sequence[float]
    modules: Mapping[str, Sequence[LowRank | None]]
    rank: int | None = None

    def rank_of(self, name: str) -> int:
        """Return the rank of a module of the result."""
        known = [change for change in self.modules[name] if change is not None]
        full = sum(change.A.shape[0] for change in known)
        return full if self.rank is None or self.rank >= full else min(self.rank, *known[0].shape)

    def describe(self) -> list[str]:
        """Return the plan in words, a line each."""
        most = max(self.rank_of(name) for name in self.modules)
        whole = max(sum(c.A.shape[0] for c in changes if c is not None) for changes in self.modules.values())
        return [
            f"{len(self.modules)} modules from {len(self.models)} adapters of {self.base.name}",
            f"writes an adapter of rank {most}, "
            + ("the exact mean" if most == whole else f"the nearest to the mean, whose rank is {whole}"),
        ]


def plan_lora_mean(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], *, rank: int | None = None
) -> LoraMean:
    """Check that checkpoints are adapters of one base, whose mean is an adapter.

    Args:
        checkpoints: Oldest first.
        coefficients: One for each; adapters of coefficient zero are only checked.
        rank: Highest rank of the result.

    Raises:
        CheckpointError: One is no adapter, or there twice, or stores tensors whole, or their bases differ.
        RecipeError: There is none.
    """
    if not checkpoints:
        raise RecipeError("There are no checkpoints to average. List at least one.")
    check_apart(checkpoints)
    for checkpoint in checkpoints:
        if checkpoint.adapter is None:
            raise CheckpointError(
                f"{checkpoint.name} is a full model, and output: lora averages adapters. Set output: model."
            )
    for checkpoint in checkpoints:
        check_lora(checkpoint, checkpoints[-1].base)
    used = [(c, w) for c, w in zip(checkpoints, coefficients, strict=True) if w]
    factors = [c.adapter.factors for c, _ in used if c.adapter is not None]
    names = sorted({name for found in factors for name in found})
    modules = {name: [found.get(name) for found in factors] for name in names}
    return LoraMean(checkpoints[-1].base, [c for c, _ in used], [w for _, w in used], modules, rank)


def run_lora_mean(
    plan: LoraMean,
    out: Path,
    *,
    dtype: str | torch.dtype | None = None,
    progress: bool = True,
    replace: bool = False,
) -> None:
    """Carry out ``plan`` and write the adapter.

    Args:
        plan: What to do.
        out: Folder to write; it must not hold anything yet.
        dtype: Of the factors; float32 when not given.
        progress: Show a bar when standard error is a terminal.
        replace: See :func:`~.stream.map_tensors`.

    Raises:
        CheckpointError: A factor is not finite, or the adapter cannot be written.
    """
    made = dict(run_all(lambda name: _mean(plan, name), list(plan.modules), workers=cores()))
    kind, tensors, ranks = parse_dtype(dtype) or torch.float32, {}, {}
    for name in plan.modules:
        module = name.removesuffix(".weight")
        for side, factor in zip("AB", made[name]):
            key = f"{ADAPTER_PREFIX}{module}.lora_{side}.weight"
            tensors[key] = factor.to(kind).contiguous()
            refuse_overflow(key, tensors[key], method="the mean")
        ranks[module] = made[name][0].shape[0]
    write_adapter(out, tensors, ranks, plan.base, [], progress, read=plan.models, replace=replace)


def _mean(plan: LoraMean, name: str) -> tuple[Tensor, Tensor]:
    pairs = [(c, w, m) for c, w, m in zip(plan.modules[name], plan.coefficients, plan.models) if c is not None]
    for change, _, model in pairs:
        refuse_non_finite(name, [change.A, change.B], [model.name] * 2)
    if len(pairs) == 1 and plan.rank is None:
        change, weight, _ = pairs[0]
        return change.A.float(), change.B.float() * (weight * change.scale)
    A = torch.cat([change.A.double() for change, _, _ in pairs])
    B = torch.cat([(weight * change.scale) * change.B.double() for change, weight, _ in pairs], 1)
    rank = plan.rank_of(name)
    if rank < A.shape[0]:
        left, right = torch.linalg.qr(B), torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(left.R @ right.R.T)
        root = S[:rank].sqrt()
        A, B = root[:, None] * (Vh[:rank] @ right.Q.T), (left.Q @ U[:, :rank]) * root
    return A.float(), B.float()
