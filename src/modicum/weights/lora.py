"""Low-rank adapters as weights: written for PEFT, and several merged without leaving their factors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError
from modicum.layout import ADAPTER_CONFIG, ADAPTER_PREFIX, is_linear_map
from modicum.linalg import truncated_svd
from modicum.registry import merge_method
from modicum.weights.adapter import LowRank
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import check_remaining, excluded
from modicum.weights.files import Spec
from modicum.weights.kernels.compare import compare, refuse_non_finite, refuse_overflow
from modicum.weights.merge import open_checkpoint
from modicum.weights.plan import check_count, identity_of, parse_dtype
from modicum.weights.rehearsal import rehearse_method
from modicum.weights.stream import cores, map_tensors, run_all


def write_adapter(
    out: Path,
    tensors: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    base: Checkpoint,
    whole: Sequence[str],
    progress: bool,
    *,
    read: Sequence[Checkpoint],
    replace: bool = False,
    companions: Mapping[str, bytes] = MappingProxyType({}),
    turned: bool = False,
    biases: bool = False,
) -> None:
    """Write a PEFT adapter.

    Args:
        out: The folder.
        tensors: By their names in the file.
        ranks: Of each module.
        base: What the adapter is of.
        whole: Modules that are stored whole.
        progress: Show a bar when standard error is a terminal.
        read: The checkpoints that were read, which must not have changed meanwhile.
        replace: See :func:`~.stream.map_tensors`.
        companions: Other files of the folder.
        turned: The modules' weights are stored as (inputs, outputs).
        biases: Layers with factors have other biases too.
    """

    def check() -> None:
        for model in read:
            model.check()

    r = max(ranks.values(), default=1)
    different = {module: rank for module, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": different,
        "alpha_pattern": different,
        "target_modules": sorted(ranks),
        "modules_to_save": list(whole) or None,
        "ensure_weight_tying": bool(base.tied) and f"{base.tied}".removesuffix(".weight") in whole,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
    }
    map_tensors(
        lambda name: (tensors[name], {}),
        {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        out,
        identity=[config, identity_of(tensors)],  # they are in memory: their very bytes tell what they depend on
        companions={**companions, ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()},
        shard_bytes=1 << 62,
        stem="adapter_model",
        progress=progress,
        replace=replace,
        check=check,
    )


def merge_factors(
    experts: Sequence[LowRank | None], *, method: str = "tsv", device: str = "cpu", **knobs: Any
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    r"""Merge low-rank deltas without forming a matrix of the weight's size.

    With orthonormal bases :math:`Q_B` of the experts' outputs and :math:`Q_A` of their inputs, each delta is
    :math:`Q_B C_t Q_A^T` with a small core :math:`C_t`, and a method that does not care in which orthonormal bases a
    matrix is written merges the cores instead.

    Args:
        experts: The deltas; ``None`` for an expert that does not change this weight.
        method: A merge method that works on factors; see :func:`merge_loras`.
        device: Where the arithmetic happens.
        **knobs: The method's.

    Returns:
        Factors ``A (k, in)`` and ``B (out, k)`` with ``B @ A`` the merged delta, and what was measured: norms and
        cosines of the deltas, and what the method reports.
    """
    entry = merge_method[method]
    known = [expert for expert in experts if expert is not None]
    rows, columns = known[0].shape
    outputs = [expert.B.to(device).double() for expert in known]
    inputs = [expert.scale * expert.A.to(device).double() for expert in known]
    # Zeros around the cores leave as much room for each expert's rank as the whole matrix would.
    most = len(experts) * max(expert.A.shape[0] for expert in known)
    left = _basis(outputs, min(rows, most))
    right = _basis([a.T for a in inputs], min(columns, most)) if entry.facts.factors == "both" else None
    parts = iter(zip(outputs, inputs))
    small = []
    for expert in experts:
        if expert is None:
            small.append(left.new_zeros(left.shape[1], columns if right is None else right.shape[1]))
        else:
            b, a = next(parts)
            small.append((left.T @ b) @ (a if right is None else a @ right))
    zero = torch.zeros_like(small[0])
    measured = compare(zero, small)
    del measured["conflict"]  # signs of the entries mean nothing in another basis
    reports: list[dict[str, Any]] = []
    supplied = {"report": reports} if "report" in entry.asks else {}
    merged = entry.function(zero, small, **entry.knobs(knobs), **supplied)
    U, S, V = truncated_svd(merged, min(merged.shape))
    k = max(1, int(S.gt(1e-6 * S.max()).sum()))
    root = S[:k].sqrt()
    B, A = left @ (U[:, :k] * root), root[:, None] * V[:, :k].T
    A = A if right is None else A @ right.T
    return A.float().cpu(), B.float().cpu(), measured | (reports[0] if reports else {})


def _basis(columns: Sequence[Tensor], size: int) -> Tensor:
    """Return an orthonormal basis of what the columns span, with columns of zeros up to ``size``."""
    Q = torch.linalg.qr(torch.cat(list(columns), 1)).Q
    return torch.nn.functional.pad(Q, (0, size - Q.shape[1]))


@dataclass(frozen=True)
class LoraPlan:
    """LoRA experts of one base that fit together, and the method to merge them by."""

    base: Checkpoint
    models: Sequence[Checkpoint]
    modules: Mapping[str, Sequence[LowRank | None]]
    method: str
    knobs: Mapping[str, Any]

    def of(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """Return method and knobs for a module: the mean where rows of tokens have no singular directions."""
        if merge_method[self.method].facts.matrix and not is_linear_map(name):
            return "task_arithmetic", {"scale": 1 / len(self.models)}
        return self.method, self.knobs

    def describe(self) -> list[str]:
        """Return the plan in words, a line each."""
        ranks = [sum(f.A.shape[0] for f in factors if f is not None) for factors in self.modules.values()]
        return [
            f"{len(self.modules)} modules from {len(self.models)} adapters of {self.base.name}",
            f"writes an adapter of rank {max(ranks)} at most",
        ]


def plan_loras(
    adapters: Sequence[str | Path | Checkpoint],
    *,
    method: str = "tsv",
    knobs: Mapping[str, Any],
    base: Checkpoint | None = None,
    exclude: str | None = None,
) -> LoraPlan:
    """Check that adapters can be merged into one.

    Args:
        adapters: PEFT adapter folders of one base.
        method: See :func:`merge_loras`.
        knobs: The method's.
        base: What the adapters should be of, when that is known.
        exclude: Regular expression of names of tensors that stay as they are in the base.

    Raises:
        ModicumError: One is not an adapter, their bases differ, or the method needs whole matrices.
    """
    entry = merge_method[method]
    if not entry.facts.factors:
        able = ", ".join(name for name, other in merge_method.items() if other.facts.factors)
        raise RecipeError(
            f"{method} needs whole matrices, so its result is no LoRA. Choose one of {able}, or make a model and "
            "extract a LoRA from it."
        )
    check_count(entry, len(adapters))
    opened = [open_checkpoint(adapter) for adapter in adapters]
    base = base or opened[0].base
    for checkpoint in opened:
        check_lora(checkpoint, base)
    loras = [checkpoint.adapter.factors for checkpoint in opened if checkpoint.adapter]
    names = sorted({name for factors in loras for name in factors})
    untouched = excluded([names], exclude)
    names = [name for name in names if name not in untouched]
    check_remaining(names, exclude)
    modules = {name: [factors.get(name) for factors in loras] for name in names}
    checked = entry.knobs(knobs)
    rehearse_method(method, len(opened), checked)
    return LoraPlan(base, opened, modules, method, checked)


def check_lora(checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Refuse what is no plain LoRA adapter of ``base``."""
    adapter = checkpoint.adapter
    if adapter is None:
        raise CheckpointError(f"{checkpoint.name} is a full model, expected a LoRA adapter. Use merge instead.")
    if adapter.replaced:
        name = next(iter(adapter.replaced))
        raise CheckpointError(f"{checkpoint.name} also stores {name!r} whole. Use merge, which makes a full model.")
    for name, factors in adapter.factors.items():
        if factors.start:
            raise CheckpointError(
                f"{checkpoint.name} is added to what {factors.start} left of its base, not to the base itself. "
                "Use merge, which makes a full model."
            )
        if factors.parameter:
            raise CheckpointError(
                f"{checkpoint.name} changes {name!r}, a parameter that is no module of its own. "
                "Use merge, which makes a full model."
            )
        if factors.transposed:
            raise CheckpointError(
                f"{checkpoint.name} changes {name!r}, an embedding or a transposed layer. "
                "Use merge, which makes a full model."
            )
    if checkpoint.base.folder.resolve() != base.folder.resolve():
        raise CheckpointError(f"{checkpoint.name} is an adapter of {checkpoint.base.name}, expected {base.name}.")


def merge_loras(
    adapters: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    method: str = "tsv",
    exclude: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    progress: bool = True,
    **knobs: Any,
) -> dict[str, dict[str, Any]]:
    """Merge LoRA experts of one base into one LoRA, without leaving their factors.

    Args:
        adapters: PEFT adapter folders of one base.
        out: Folder to write; it must not hold anything yet.
        method: A merge method whose result does not depend on the bases in which matrices are written: ``tsv``,
            ``knots``, ``svc``, ``opcm`` or ``task_arithmetic``. Others need whole matrices and are refused.
        exclude: Regular expression of names of tensors that stay as they are in the base.
        dtype: Of the factors; float32 when not given.
        device: Where the arithmetic happens.
        progress: Show a bar when standard error is a terminal.
        **knobs: The method's, as in :func:`modicum.weights.merge.merge`.

    Returns:
        For each module that was merged what was measured: norms and cosines of the deltas, and what the method reports.
        Its rank is at most the sum of the experts'.

    Raises:
        ModicumError: One is not an adapter, their bases differ, or the method needs whole matrices.
    """
    plan = plan_loras(adapters, method=method, knobs=knobs, exclude=exclude)
    return run_loras(plan, Path(out), dtype=dtype, device=device, progress=progress)


def run_loras(
    plan: LoraPlan,
    out: Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    progress: bool = True,
    replace: bool = False,
    companions: Mapping[str, bytes] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Carry out ``plan`` and write the adapter beside its ``companions``; see :func:`merge_loras`.

    ``replace`` is that of :func:`~.stream.map_tensors`.
    """

    def one(name: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
        method, knobs = plan.of(name)
        for model, factors in zip(plan.models, plan.modules[name]):
            if factors is not None:
                refuse_non_finite(name, [factors.A, factors.B], [model.name] * 2)
        return merge_factors(plan.modules[name], method=method, device=device, **knobs)

    merged = dict(run_all(one, list(plan.modules), workers=cores()))
    kind = parse_dtype(dtype) or torch.float32
    tensors, ranks = {}, {}
    for name in plan.modules:
        A, B, _ = merged[name]
        module = name.removesuffix(".weight")
        tensors[f"{ADAPTER_PREFIX}{module}.lora_A.weight"] = A.to(kind).contiguous()
        tensors[f"{ADAPTER_PREFIX}{module}.lora_B.weight"] = B.to(kind).contiguous()
        ranks[module] = A.shape[0]
        for key in list(tensors)[-2:]:
            refuse_overflow(key, tensors[key], method=plan.method)
    write_adapter(
        out, tensors, ranks, plan.base, [], progress, read=plan.models, replace=replace, companions=companions
    )
    return {name: merged[name][2] | {"rank": merged[name][0].shape[0]} for name in plan.modules}
