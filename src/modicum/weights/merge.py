"""Merging: one step for each tensor of the result, on checkpoints or in memory, with the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import CheckpointError, first_line
from modicum.knobs import guarded
from modicum.random import generator
from modicum.registry import SUPPLIED
from modicum.types import PositiveInt
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import Tensors, check_tensors, refuse_packed
from modicum.weights.kernels import fused
from modicum.weights.kernels.accelerator import own_stream, placed
from modicum.weights.kernels.blocks import brought_back, fold, working_dtype
from modicum.weights.kernels.compare import compare, refuse_non_finite, refuse_overflow
from modicum.weights.plan import Plan, Step, plan_merge
from modicum.weights.stream import SHARD_BYTES, map_tensors, names_by_size, run_all

Look = Callable[[Tensor, Sequence[Tensor]], Any]


def run_step(
    step: Step, *, seed: int = 0, device: str = "cpu", found: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Tensor, dict[str, Any]]:
    """Make one tensor of the result.

    Args:
        step: What to make.
        seed: For methods that draw random numbers.
        device: Where the arithmetic happens.
        found: What a survey of the whole model found for this step.

    Returns:
        The tensor, in memory, and what was measured about its experts.

    Raises:
        CheckpointError: An input or the result holds NaN or infinity, or a non-floating tensor differs between models.
    """
    tensors = [source.read() for source in step.models]
    if not tensors[0].is_floating_point():
        return _same(step, tensors), {}
    with own_stream(device):
        made, measured = _run_there(step, [placed(tensor, device) for tensor in tensors], seed, device, found)
        return made if made.device.type == "cpu" else brought_back(made), measured


def _propagates(step: Step) -> bool:
    """Whether a NaN or an infinity in any of the models is one in the result, so that looking there is enough."""
    if step.base is not None and not step.entry.facts.base:
        return False  # such a base gives its dtype alone
    factors = [*(step.knobs.get("weights") or []), step.knobs.get("scale", 1)]
    return step.averaged or ("propagates" in step.entry.facts.laws and all(factors))


def _run_there(
    step: Step, tensors: Sequence[Tensor], seed: int, device: str, found: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    origin, experts = tensors[0], tensors[1:] if step.base else tensors
    models = [source.model for source in step.models]
    if not _propagates(step):  # else the result tells, which is one pass in place of one for each model
        refuse_non_finite(step.name, tensors, models)
    measured = compare(origin, experts) if step.compared else {}
    if origin.dtype != step.spec.dtype or step.diagnosed:
        # The method answers in the dtype of its base: in float32 first, then one cast.
        origin = origin.to(working_dtype(origin))
        experts = [origin, *experts[1:]] if step.base is None else experts
    reports: list[dict[str, Any]] = []
    if step.averaged:
        merged = fold(origin, experts, lambda deltas: deltas.mean(0))
    else:
        supplied: dict[str, Any] = dict(found)
        asked = step.entry.asks
        supplied |= {draws: generator(seed, step.method, step.name) for draws in SUPPLIED & asked}
        if "report" in asked:
            supplied["report"] = reports
        if step.statistics:
            supplied["statistics"] = [placed(source.read(), device) for source in step.statistics]
            refuse_non_finite(step.name, supplied["statistics"], [source.model for source in step.statistics])
        try:
            with np.errstate(all="ignore"):  # what overflows is refused below, by name
                merged = step.entry.function(origin if step.base else None, experts, **step.knobs, **supplied)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # finite numbers whose squares are not
            raise CheckpointError(
                f"tensor {step.name!r}: {step.method} cannot decompose it ({first_line(error)}). Its numbers are too "
                "large: use an earlier checkpoint, or exclude the tensor."
            ) from None
    stored = merged.to(step.spec.dtype)
    try:
        refuse_overflow(step.name, stored, method=step.method, made=merged if merged is not stored else None)
    except CheckpointError:
        refuse_non_finite(step.name, tensors, models)  # whose fault it is, where it is an input's
        raise
    if reports:  # of a stack of matrices, the one whose result is least certain speaks
        measured |= min(reports, key=lambda report: report["weakest"])
    if step.diagnosed:
        from modicum.weights.kernels.diagnose import diagnose  # brings all methods along

        directions = step.is_linear_map and len(step.spec.shape) == 2
        measured |= diagnose(tensors[0], experts, merged, stored, directions=directions)
    return stored, measured


def survey(plan: Plan, *, workers: int | None = None) -> dict[str, Mapping[str, Any]]:
    """Ask the methods that look at the whole model first; return what they found for each step, by name."""
    found: dict[str, Mapping[str, Any]] = {}
    groups: dict[str, list[Step]] = {}
    for step in plan.steps:
        if step.entry.facts.survey and step.spec.dtype.is_floating_point and not step.averaged:
            groups.setdefault(repr((step.method, sorted(step.knobs.items()))), []).append(step)
    for steps in groups.values():
        table = {step.name: step for step in steps}

        def each(look: Look, table: Mapping[str, Step] = table) -> dict[str, Any]:
            def one(name: str) -> Any:
                models = table[name].models
                with own_stream(plan.device):
                    tensors = [placed(source.read(), plan.device) for source in models]
                    refuse_non_finite(name, tensors, [source.model for source in models])
                    return look(tensors[0], tensors[1:])

            order = names_by_size({name: step.spec for name, step in table.items()})
            seen = dict(run_all(one, order, workers=workers or plan.workers))
            return {name: seen[name] for name in table}

        survey = steps[0].entry.facts.survey
        if survey is not None:
            found |= survey(each, **steps[0].knobs)
    return found


def _same(step: Step, tensors: Sequence[Tensor]) -> Tensor:
    first, *others = step.models
    for source, tensor in zip(others, tensors[1:]):
        if not torch.equal(tensor, tensors[0]):
            raise CheckpointError(
                f"{source.model}: tensor {source.name!r} is {tensor.dtype} and differs from {first.model}'s. "
                "Only floating-point tensors can be merged: make them equal."
            )
    return tensors[0]


def merge_state_dicts(
    base: Tensors | None,
    experts: Sequence[Tensors],
    *,
    method: str,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
    statistics: Sequence[Tensors] = (),
    exclude: str | None = None,
    **knobs: Any,
) -> dict[str, Tensor]:
    """Merge dictionaries of tensors in memory.

    Args:
        base: What the experts were trained from; ``None`` for methods that need none.
        experts: The models to merge.
        method: Name of a merge method; see ``modicum list``.
        dtype: Of the result; that of the base when not given.
        seed: For methods that draw random numbers.
        device: Where the arithmetic happens.
        statistics: For methods that weigh by data: of each expert, tensors by the names of its own.
        exclude: Regular expression of names of tensors that stay as they are in the base.
        **knobs: The method's.

    Returns:
        The merged tensors, on the CPU.

    Raises:
        ModicumError: The models do not fit together, or a knob is wrong.

    Example:
        >>> one = torch.ones(2)
        >>> merge_state_dicts({"w": 0 * one}, [{"w": one}, {"w": 3 * one}], method="task_arithmetic", scale=0.5)
        {'w': tensor([2., 2.])}
    """
    owners = [] if base is None else ["base"]
    owners += [f"experts[{i}]" for i in range(len(experts))]
    for model, owner in zip([*([] if base is None else [base]), *experts], owners):
        check_tensors(model, owner)
        refuse_packed(model, owner)
    plan = plan_merge(
        base,
        experts,
        method=method,
        knobs=knobs,
        dtype=dtype,
        statistics=statistics,
        exclude=exclude,
        seed=seed,
        device=device,
    )
    steps = {step.name: step for step in plan.steps}
    found = survey(plan)

    def one(name: str) -> Tensor:
        tensor, _ = run_step(steps[name], seed=seed, device=device, found=found.get(name, {}))
        return tensor if tensor.is_floating_point() else tensor.clone()

    merged = dict(run_all(one, names_by_size({name: step.spec for name, step in steps.items()}), workers=plan.workers))
    return {name: merged[name] for name in steps}


@guarded
def merge(
    base: str | Path | Checkpoint | None,
    experts: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    method: str,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
    shard_bytes: PositiveInt = SHARD_BYTES,
    workers: PositiveInt | None = None,
    progress: bool = True,
    statistics: Sequence[str | Path | Checkpoint] = (),
    exclude: str | None = None,
    base_fingerprint: str | None = None,
    diagnostics: bool = False,
    tokenizer: str | Mapping[str, Any] | None = None,
    **knobs: Any,
) -> dict[str, dict[str, Any]]:
    """Merge checkpoints on disk, a tensor at a time.

    Args:
        base: Folder, Hub id or checkpoint that the experts were trained from; ``None`` for methods that need none.
        experts: The models to merge; adapters are folded in.
        out: Folder to write; it must not hold anything yet.
        method: Name of a merge method; see ``modicum list``.
        dtype: Of the result; that of the base when not given.
        seed: For methods that draw random numbers.
        device: Where the arithmetic happens.
        shard_bytes: Largest weight file.
        workers: Threads; one for each core when not given.
        progress: Show a bar when standard error is a terminal.
        statistics: For methods that weigh by data: a checkpoint of each expert's, by the names of its tensors.
        exclude: Regular expression of names of tensors that stay as they are in the base.
        base_fingerprint: Refuse another base than this one, as :func:`modicum.content.fingerprint` and the records of
            training runs name it.
        diagnostics: Also measure what :func:`modicum.weights.kernels.diagnose.diagnose` tells; takes longer.
        tokenizer: Bring the models' vocabularies together: ``union``, ``base``, a model whose tokenizer the result
            gets, or a mapping as in mergekit files.
        **knobs: The method's.

    Returns:
        For each tensor what was measured: norms and cosines of the deltas, share of conflicting signs, and what the
        method reports.

    Raises:
        ModicumError: The models do not fit together, a knob is wrong, or the result cannot be written.
    """
    opened = [open_checkpoint(model) for model in experts]
    plan = plan_merge(
        None if base is None else open_checkpoint(base),
        opened,
        method=method,
        knobs=knobs,
        dtype=dtype,
        statistics=[open_checkpoint(model) for model in statistics],
        exclude=exclude,
        base_fingerprint=base_fingerprint,
        seed=seed,
        device=device,
        tokenizer=tokenizer,
    )
    return run_plan(
        plan.diagnosed() if diagnostics else plan,
        Path(out),
        shard_bytes=shard_bytes,
        workers=workers,
        progress=progress,
    )


def run_plan(
    plan: Plan,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    fork: bool = False,
    progress: bool = True,
    replace: bool = False,
) -> dict[str, dict[str, Any]]:
    """Carry out ``plan`` and write the checkpoint; see :func:`merge`, and :func:`~.stream.map_tensors` for the rest."""
    steps = {step.name: step for step in plan.steps}
    fused.prepare(max((step.spec.numel for step in plan.steps), default=0))
    workers = workers or plan.workers
    found = survey(plan, workers=workers)
    return map_tensors(
        lambda name: run_step(steps[name], seed=plan.seed, device=plan.device, found=found.get(name, {})),
        {name: step.spec for name, step in steps.items()},
        out,
        identity=plan.identity,
        companions=plan.companions,
        shard_bytes=shard_bytes,
        workers=workers,
        fork=fork,
        progress=progress,
        replace=replace,
        check=plan.check,
    )


def open_checkpoint(model: str | Path | Checkpoint, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a model, unless it is open already."""
    return model if isinstance(model, Checkpoint) else Checkpoint(model, allow_pickle=allow_pickle)
