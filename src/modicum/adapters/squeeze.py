"""LoRA-Squeeze: train at a high rank and compress to a low one, once or step by step, keeping what was learned.

Compression is the best rank-r approximation of the product, computed from the factors. Doing it once and training on
is what HRP's ``init_factor="balanced"`` does; :func:`squeeze` does it to the adapter in training, and
:func:`rank_schedule` says when. Published as LoRA-Squeeze, 2026, arXiv:2602.10993.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from modicum.adapters.hrp import Factors, Preheat, factor_svd, factors_from_svd, hrp_factors
from modicum.adapters.layers import factors_of, lora_layers, store_factors, whole
from modicum.adapters.ranks import change_ranks
from modicum.adapters.serving import alpha_for
from modicum.errors import ModicumError
from modicum.registry import adapter_init
from modicum.types import PositiveInt


@adapter_init(
    "lora_squeeze",
    most_rank=min,
    paper="arXiv:2602.10993",
    laws={"best_rank"},
    supplied={"rank"},
    gather=Preheat,
    preheated={"init_factor": "balanced"},
)
def lora_squeeze(A: Float[Tensor, "R in"], B: Float[Tensor, "out R"], *, rank: PositiveInt) -> Factors:
    r"""Train a LoRA of higher rank first, compress it to the wanted one, and go on from there.

    .. math::
        B A = U \operatorname{diag}(S) V^T, \qquad A_0 = S_{1:r}^{1/2} V_{1:r}^T, \quad B_0 = U_{1:r} S_{1:r}^{1/2}

    Args:
        A: ``lora_A`` of the higher rank, trained.
        B: ``lora_B`` of the higher rank, trained.
        rank: Rank r of the adapter to go on with.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), in the dtypes of A and B.

    Raises:
        ModicumError: Shapes do not fit, rank exceeds R, a factor is not finite, or the product is zero.

    Example:
        >>> import torch
        >>> A, B = lora_squeeze(torch.diag(torch.tensor([1.0, 4.0])), torch.eye(2), rank=1)
        >>> B @ A
        tensor([[0., 0.],
                [0., 4.]])

    Cost:
        That of ``hrp``.

    Deviates:
        The first stage has HRP's knobs and its short default length; the published method trains it much longer: set
        ``preheat_steps``. :func:`squeeze` with :func:`rank_schedule` compresses step by step instead.

    Reference:
        "LoRA-Squeeze", 2026, arXiv:2602.10993.
    """
    return hrp_factors(A, B, rank=rank, init_factor="balanced")


def rank_schedule(start: int, end: int, *, steps: int, stages: int = 4) -> dict[int, int]:
    """Return the rank to squeeze to by optimiser step: geometric from ``start`` to ``end``, done at half of the run.

    Args:
        start: Rank to begin with.
        end: Rank to end with, at most ``start``.
        steps: Length of the run.
        stages: Number of compressions.

    Raises:
        ModicumError: The ranks rise, or the stages do not fit into half of the steps.

    Example:
        >>> rank_schedule(64, 4, steps=80, stages=4)
        {10: 32, 20: 16, 30: 8, 40: 4}
    """
    if not 1 <= end <= start:
        raise ModicumError(f"rank_schedule goes from {start} to {end}, expected start >= end >= 1.")
    if not 1 <= stages <= steps // 2:
        raise ModicumError(f"{stages} stages do not fit into the first half of {steps} steps. Use fewer.")
    ratio = (end / start) ** (1 / stages)
    return {steps * stage // (2 * stages): round(start * ratio**stage) for stage in range(1, stages + 1)}


def squeeze(peft_model: Any, rank: int, *, adapter: str = "default") -> None:
    """Compress an adapter to ``rank``, in place and with an unchanged scaling; rebuild the optimiser afterwards.

    Args:
        peft_model: The model, whose adapter has at least this rank everywhere.
        rank: The new rank.
        adapter: The adapter to compress.

    Raises:
        ModicumError: A module's rank is lower already.
    """
    layers = lora_layers(peft_model, adapter)
    low = next((name for name, layer in layers.items() if layer.r[adapter] < rank), None)
    if low is not None:
        raise ModicumError(f"{low} has rank {layers[low].r[adapter]}, cannot squeeze it to {rank}. Choose a lower one.")
    compressed = {}
    for name, layer in layers.items():
        A, B = (whole(factor, name) for factor in factors_of(layer, adapter))
        svd = factor_svd(A, B)
        if svd.S[0] > 0:
            compressed[name] = factors_from_svd(svd, rank=rank, init_factor="balanced")
    change_ranks(peft_model, dict.fromkeys(layers, rank), adapter=adapter)
    for name, factors in compressed.items():
        store_factors(layers[name], adapter, factors, name)
    config, scalings = peft_model.peft_config[adapter], {layer.scaling[adapter] for layer in layers.values()}
    config.r = rank
    if len(scalings) == 1:  # then the patterns say nothing that the two numbers do not
        config.lora_alpha = alpha_for(scalings.pop(), rank, rslora=config.use_rslora)
        config.rank_pattern, config.alpha_pattern = {}, {}
