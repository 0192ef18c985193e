r"""AdaLoRA: PEFT's adapter in the form of a singular value decomposition, made plain LoRA when it is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from modicum.adapters.drawn import default
from modicum.adapters.hrp import Factors
from modicum.adapters.serving import alpha_for, uniform
from modicum.errors import ModicumError
from modicum.registry import adapter_init
from modicum.types import NonNegative, PositiveInt, UnitInterval


def _config(knobs: Mapping[str, Any], *, rank: int, **fields: Any) -> Any:
    from peft import AdaLoraConfig

    first = round(knobs["spare"] * rank)
    # PEFT's layer knows no rsLoRA: the same scaling by another alpha.
    alpha = fields.get("lora_alpha", 2 * rank) * (math.sqrt(rank) if fields.pop("use_rslora", False) else 1)
    # PEFT divides alpha by the rank to begin with. The length of the run is not known yet.
    fields["lora_alpha"] = alpha * first / rank
    return AdaLoraConfig(
        init_r=first,
        target_r=rank,
        orth_reg_weight=knobs["orthogonality"],
        deltaT=knobs["interval"],
        total_step=1,
        **fields,
    )


def _schedule(config: Any, knobs: Mapping[str, Any], *, total_steps: int | None) -> None:
    if total_steps is None:
        raise ModicumError("adalora plans its ranks over the whole run. Pass total_steps.")
    # The last step at least: without it PEFT ends before the budget is reached.
    warmup, settled = int(knobs["warmup"] * total_steps), max(1, int(knobs["settled"] * total_steps))
    if warmup + settled >= total_steps - 1:
        raise ModicumError(
            f"adalora has no step left to drop ranks in: warmup {knobs['warmup']} and settled {knobs['settled']} of "
            f"{total_steps} steps. Lower them, or train longer."
        )
    config.total_step, config.tinit, config.tfinal = total_steps, warmup, settled


AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's names of what it remembers of each weight's gradients


def _allocate(peft_model: Any, step: int) -> None:
    """Let PEFT measure the importance of the ranks by the gradients, and drop those beyond the budget."""
    model = peft_model.base_model
    config = peft_model.peft_config[model.trainable_adapter_name]
    # With a pattern in the configuration PEFT would save the ranks alone that are left, modules without any as empty
    # tensors, and could not read them into a model that still has all. Between two steps the pattern stands elsewhere.
    config.rank_pattern = getattr(model.rankallocator, "pattern", None)
    try:
        model.update_and_allocate(step)
    finally:
        model.rankallocator.pattern, config.rank_pattern = config.rank_pattern, None


def _memory(peft_model: Any) -> dict[str, Tensor]:
    """Return what PEFT remembers of the gradients, and which ranks are left."""
    allocator = peft_model.base_model.rankallocator
    kept = {f"{key}/{name}": t for key in AVERAGES for name, t in getattr(allocator, key).items()}
    ranks = getattr(allocator, "pattern", None) or {}
    return kept | {f"pattern/{name}": torch.tensor(left) for name, left in ranks.items()}


def _recall(peft_model: Any, memory: Mapping[str, Tensor]) -> None:
    """See :func:`_memory`."""
    allocator, weights = peft_model.base_model.rankallocator, dict(peft_model.base_model.model.named_parameters())
    for key in AVERAGES:
        own = {name.removeprefix(f"{key}/"): t for name, t in memory.items() if name.startswith(f"{key}/")}
        setattr(allocator, key, {name: t.to(weights[name].device) for name, t in own.items()})
    ranks = {name.removeprefix("pattern/"): t.tolist() for name, t in memory.items() if name.startswith("pattern/")}
    allocator.pattern = ranks or None


def _plain(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Put the singular values into B, and give every module the largest rank."""
    from peft import LoraConfig

    # PEFT adds 1e-5 to the rank that it divides by.
    scaling = config["lora_alpha"] / (config["init_r"] + 1e-5)
    names = [key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]
    own = {}
    for name in names:
        A, E, B = (tensors[f"{name}.lora_{part}"] for part in "AEB")
        if not len(E):  # read back from a checkpoint, from which PEFT leaves dropped ranks out
            A, E, B = A.new_zeros(1, A.shape[1]), E.new_zeros(1, 1), B.new_zeros(B.shape[0], 1)
        left = E[:, 0] != 0
        left[0] |= ~left.any()  # a module that lost every rank keeps one, of value zero
        own[name] = (A[left], (B * E.T)[:, left], scaling)
    kept = {key: value for key, value in tensors.items() if not key.endswith((".lora_A", ".lora_B", ".lora_E"))}
    for name, (A, B) in uniform(own, scaling=scaling).items():
        kept |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
    widest = max(len(A) for A, _, _ in own.values())
    known = LoraConfig.__dataclass_fields__
    return kept, {key: value for key, value in config.items() if key in known} | {
        "peft_type": "LORA",
        "r": widest,
        "lora_alpha": alpha_for(scaling, widest),
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }


@adapter_init(
    "adalora",
    paper="arXiv:2303.10512",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    stock=True,
    config=_config,
    schedule=_schedule,
    after_backward=_allocate,
    memory=_memory,
    recall=_recall,
    plain=_plain,
)
def adalora(
    weight: Float[Tensor, "out in"],
    *,
    rank: PositiveInt,
    spare: Annotated[float, Ge(1)] = 1.5,
    warmup: UnitInterval = 0.1,
    settled: UnitInterval = 0.3,
    interval: PositiveInt = 1,
    orthogonality: NonNegative = 0.5,
    rng: torch.Generator | None = None,
) -> Factors:
    r"""Train in the form of a singular value decomposition, and drop the triplets that matter least, over all modules.

    .. math::
        \Delta W = s\, P \Lambda Q, \qquad L' = L + \gamma\, (\lVert P^T P - I \rVert_F + \lVert Q Q^T - I \rVert_F)

    with the norms averaged over the modules. The budget falls from ``spare`` times the rank to the rank as a cubic
    between the warm-up and the settled end of the run. What is saved is plain LoRA of the largest rank that a module
    kept.

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Mean rank of a module in the end.
        spare: Ranks to begin with, as a multiple of it.
        warmup: Share of the run before the budget falls.
        settled: Share of the run after it has fallen.
        interval: Optimiser steps between two looks at the budget.
        orthogonality: Weight gamma of the penalty.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank) of ``default``: P, Q and the zero singular values are PEFT's.

    Example:
        >>> adalora(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        Three running averages of each adapter weight, and a Gram matrix of each factor at every step.

    Deviates:
        The layer and the allocation are PEFT's, whose defaults for the schedule are no warm-up and no settled end; the
        shares here are ours. The scaling stays alpha over ``rank``, where PEFT divides by the first rank.

    Reference:
        Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (AdaLoRA), ICLR 2023,
        arXiv:2303.10512, equations 3-6 and algorithm 1.
    """
    del spare, warmup, settled, interval, orthogonality  # read by the configuration
    return default(weight, rank=rank, rng=rng)
