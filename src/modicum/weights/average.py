"""Averaging the checkpoints of one run: an averager gives each a coefficient, one streamed pass makes the mean."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError
from modicum.random import generator
from modicum.registry import averager
from modicum.weights.averageable import State, check_factors, check_one_dtype, check_unused, parts_of
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import Tensors, check_tensors
from modicum.weights.merge import open_checkpoint, run_plan, run_step
from modicum.weights.mergekit.tokenizers import notes_on_tokenizers
from modicum.weights.motion import latest
from modicum.weights.plan import Plan, Source, Step, kept, plan_merge
from modicum.weights.search import Landscape, Loss
from modicum.weights.stream import check_vacant, cores, run_all

Fallback: TypeAlias = bool | Literal["tuned"]


@dataclass(frozen=True)
class Choice:
    """Coefficients of the checkpoints, and how they came about.

    Attributes:
        coefficients: Oldest checkpoint first.
        scores: The held-out losses that they were judged by, if they were.
        note: Why they are not what the averager chose.
        trace: What the averager reports of its search.
        passes: How many values and gradients of the loss were asked for, a batch each.
    """

    coefficients: list[float]
    scores: dict[str, float] = field(default_factory=dict)
    note: str | None = None
    trace: dict[str, Any] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)


def average(
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    method: str = "uniform",
    dtype: str | torch.dtype | None = None,
    loss: Loss | None = None,
    batches: Sequence[Any] | None = None,
    held_out: Sequence[Any] | None = None,
    fallback: Fallback = True,
    exclude: str | None = None,
    buffers: Collection[str] = (),
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    progress: bool = True,
    **knobs: Any,
) -> list[float]:
    """Average checkpoints on disk into one model.

    What is no weight, and the configuration and tokenizer, are those of the newest checkpoint that counts: integers,
    running statistics of normalisation layers, and ``buffers``.

    Args:
        checkpoints: Folders or opened checkpoints, oldest first.
        out: Folder to write; it must not hold anything yet.
        method: Name of an averager; see ``modicum list averagers``.
        dtype: Of the result; that of the checkpoints when not given, which then must have one.
        loss: For averagers that learn: from the floating-point weights of a mean, in float32 and by name, and a batch
            to its loss, of which *lower is better*: return minus a reward or an accuracy. A tensor that is
            differentiable in the weights for averagers that follow gradients, any number for the others. Rules do not
            ask for it.
        batches: What that loss is measured on; step i of a search sees batch i, from the start again after the last.
        held_out: What a learnt choice is judged by; ``batches`` when not given.
        fallback: Take the plain mean of as many of the latest checkpoints where a learnt choice is worse; with
            ``"tuned"`` that of the latest 1, 2, 4, … or all, whichever is best.
        exclude: Regular expression of names of tensors that stay as they are in the last checkpoint, with those that
            are tied to them.
        buffers: Names of floating-point tensors that are no weights, such as those of ``model.named_buffers()``.
        seed: For averagers that draw random numbers.
        device: Where the arithmetic happens.
        allow_pickle: Allow ``pytorch_model.bin``, loaded with ``weights_only=True``.
        progress: Show a bar when standard error is a terminal.
        **knobs: The averager's.

    Returns:
        The coefficient of each checkpoint.

    Raises:
        ModicumError: The checkpoints do not fit together, a knob is wrong, or the result cannot be written.
    """
    opened = [open_checkpoint(checkpoint, allow_pickle=allow_pickle) for checkpoint in checkpoints]
    for checkpoint in opened:
        checkpoint.buffers |= set(buffers)
    landscape = _landscape(method, opened, loss, batches, held_out, exclude, device)
    if landscape is not None:  # what would be refused when it is written is refused before the search
        plan_average(opened, [1 / len(opened)] * len(opened), dtype=dtype, exclude=exclude, device=device)
        check_vacant(Path(out))
    choice = choose(opened, method=method, landscape=landscape, fallback=fallback, seed=seed, **knobs)
    plan = plan_average(opened, choice.coefficients, dtype=dtype, exclude=exclude, device=device)
    if landscape is None:  # a search has looked at all
        check_unused(opened, choice.coefficients)
    run_plan(plan, Path(out), progress=progress)
    return choice.coefficients


def average_state_dicts(
    state_dicts: Sequence[Tensors],
    *,
    method: str,
    loss: Loss | None = None,
    batches: Sequence[Any] | None = None,
    held_out: Sequence[Any] | None = None,
    fallback: Fallback = True,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    exclude: str | None = None,
    buffers: Collection[str] = (),
    device: str = "cpu",
    **knobs: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Average checkpoints in memory into one; see :func:`average` for what is not said here.

    Integer tensors, running statistics of normalisation layers and ``buffers`` are those of the newest checkpoint that
    counts: :func:`~modicum.weights.normalisation.refresh_batch_norm` takes the statistics anew. Names that share a
    tensor in every checkpoint share one in the result. Factors of adapters are refused: save the adapters and average
    the folders, which averages their products.

    Args:
        state_dicts: Oldest first; they are not changed.
        method: Name of an averager.
        loss: For averagers that learn; lower is better.
        batches: What that loss is measured on.
        held_out: What a learnt choice is judged by.
        fallback: Whether it may give way to the latest; see :func:`average`.
        seed: For averagers that draw random numbers.
        dtype: Of the result.
        exclude: Regular expression of names of tensors that stay as they are in the last checkpoint.
        buffers: Names of floating-point tensors that are no weights; snapshots of
            :class:`~modicum.weights.snapshots.Snapshots` know theirs.
        device: Where the arithmetic happens.
        **knobs: The averager's.

    Returns:
        The averaged tensors, on the devices that the newest has them on, and the coefficient of each checkpoint.

    Raises:
        ModicumError: The checkpoints do not fit together, or a knob is wrong.

    Example:
        >>> known = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 2.0)]
        >>> average_state_dicts(known, method="lawa", last=2)
        ({'w': tensor([1.5000])}, [0.0, 0.5, 0.5])
    """
    known = [_detached(state, f"checkpoints[{i}]", buffers) for i, state in enumerate(state_dicts)]
    landscape = _landscape(method, known, loss, batches, held_out, exclude, device)
    if landscape is not None:  # what would be refused afterwards is refused before the search
        plan_average(known, [0.0] * (len(known) - 1) + [1.0], dtype=dtype, exclude=exclude, device=device)
    choice = choose(known, method=method, landscape=landscape, fallback=fallback, seed=seed, **knobs)
    if landscape is None:  # a search has looked at all
        check_unused(known, choice.coefficients)
    mean = weighted_mean(known, choice.coefficients, dtype=dtype, exclude=exclude, device=device)
    return mean, choice.coefficients


def _detached(state: Tensors, owner: str, buffers: Collection[str]) -> State:
    check_tensors(state, owner)
    known = {*buffers, *getattr(state, "buffers", ())}
    return State.of({name: tensor.detach() for name, tensor in state.items()}, known)


def weighted_mean(
    state_dicts: Sequence[Tensors],
    coefficients: Sequence[float],
    *,
    dtype: str | torch.dtype | None = None,
    exclude: str | None = None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Return the mean of checkpoints in memory with given coefficients; see :func:`average_state_dicts`.

    Args:
        state_dicts: Oldest first.
        coefficients: One for each.
        dtype: Of the result.
        exclude: Regular expression of names of tensors that stay as they are in the last checkpoint.
        device: Where the arithmetic happens.
    """
    plan = plan_average(state_dicts, coefficients, dtype=dtype, exclude=exclude, device=device)
    steps, newest = {step.name: step for step in plan.steps}, state_dicts[-1]
    shared = parts_of(state_dicts).ties

    def one(name: str) -> Tensor:
        tensor = run_step(steps[name], device=device)[0].to(newest[name].device)
        # Where nothing was computed, the step has handed on the tensor of a checkpoint.
        return tensor.clone() if any(tensor.data_ptr() == model[name].data_ptr() for model in state_dicts) else tensor

    with torch.no_grad():
        made = dict(run_all(one, [name for name in steps if name not in shared], workers=cores()))
    return {name: made[shared.get(name, name)].detach() for name in steps}


def _landscape(
    method: str,
    checkpoints: Sequence[Tensors],
    loss: Loss | None,
    batches: Sequence[Any] | None,
    held_out: Sequence[Any] | None,
    exclude: str | None,
    device: str,
) -> Landscape | None:
    check_request(len(checkpoints), method, learning=loss is not None)
    if loss is None or not averager[method].facts.learns:
        return None
    return Landscape(loss, checkpoints, () if batches is None else batches, held_out, exclude, device)


def choose(
    checkpoints: Sequence[object],
    *,
    method: str,
    landscape: Landscape | None = None,
    fallback: Fallback = True,
    seed: int = 0,
    **knobs: Any,
) -> Choice:
    """Ask the averager called ``method`` for the coefficients.

    Args:
        checkpoints: Oldest first.
        method: Name of an averager.
        landscape: The loss along the checkpoints, for averagers that learn.
        fallback: Keep what was learnt only if its held-out loss is not above that of the plain mean of as many of the
            latest checkpoints, or with ``"tuned"`` of that of the latest 1, 2, 4, … and all.
        seed: For averagers that draw random numbers.
        **knobs: The averager's.

    Raises:
        RecipeError: There is no checkpoint, a knob is wrong, or a loss is missing.
        CheckpointError: The averager's answer is no mean.
    """
    check_request(len(checkpoints), method, learning=landscape is not None)
    if not (isinstance(fallback, bool) or fallback == "tuned"):
        raise RecipeError(f"fallback is {fallback!r}, expected true, false or 'tuned'.")
    entry = averager[method]
    checked: dict[str, Any] = entry.knobs(knobs)
    asked, reports = entry.asks, list[dict[str, Any]]()
    if "rng" in asked:
        checked["rng"] = generator(seed, method)
    if "report" in asked:
        checked["report"] = reports
    learning = landscape if entry.facts.learns else None
    before = dict(learning.counts) if learning is not None else {}
    if learning is not None:
        learning.begin()
        learning.check_finite()
    told = () if learning is None else (learning,)
    found = [float(value) for value in entry.function(*told, checkpoints, **checked)]
    if len(found) != len(checkpoints) or not math.isclose(sum(found), 1, abs_tol=1e-6):
        raise CheckpointError(
            f"{method} answered with the coefficients {found} for {len(checkpoints)} checkpoints, which should be one "
            "for each and sum to 1. Its search went astray: lower its rate, or choose another averager."
        )
    trace = reports[0] if reports else {}
    if learning is None:
        return Choice(found, trace=trace)
    learning.check_followed()
    choice = guard(method, found, learning, tuned=fallback == "tuned") if fallback else Choice(found)
    passes = {kind: count - before[kind] for kind, count in learning.counts.items()}
    return replace(choice, trace=trace, passes=passes)


def guard(method: str, found: list[float], landscape: Landscape, *, tuned: bool = False) -> Choice:
    """Return what was learnt, or a plain mean of the latest checkpoints where that has a lower loss.

    Args:
        method: What learnt it.
        found: The coefficients.
        landscape: Whose held-out data judges.
        tuned: Judge the means of the latest 1, 2, 4, … and all beside that of as many as were chosen.

    Raises:
        CheckpointError: None has a finite loss.
    """
    n, count = len(found), sum(value != 0 for value in found)
    lengths = {count, n, *(1 << i for i in range(n.bit_length()) if 1 << i <= n)} if tuned else {count}
    means = {f"mean of the last {k}": [0.0] * (n - k) + [1 / k] * k for k in sorted(lengths)}
    plain = {name: mean for name, mean in means.items() if mean != found}
    if not plain:
        return Choice(found)
    scores = {method: landscape.score(found)} | {name: landscape.score(mean) for name, mean in plain.items()}
    best = min(plain, key=lambda name: scores[name])
    if not math.isfinite(min(scores[method], scores[best])):
        raise CheckpointError(
            f"Neither what {method} chose nor the plain {best} checkpoints has a finite loss on the data that judges, "
            "although each checkpoint has: they lie in different regions. Leave out those before the break."
        )
    if scores[method] <= scores[best]:
        return Choice(found, scores)
    judged = "held-out data" if landscape.held_out is not None else "the data it learnt from"
    told = f"{method} lost on {judged} to the plain {best} checkpoints, which is taken instead"
    return Choice(plain[best], scores, told)


def check_request(checkpoints: int, method: str, *, learning: bool) -> None:
    """Refuse what cannot be averaged, before anything is read.

    Args:
        checkpoints: How many there are.
        method: Name of an averager.
        learning: Whether there is a loss to learn from.

    Raises:
        RecipeError: There is no checkpoint, or a loss is missing.
    """
    if not checkpoints:
        raise RecipeError("There are no checkpoints to average. List at least one.")
    learns = averager[method].facts.learns
    if learns and not learning:
        raise RecipeError(
            f"{method} learns its coefficients from a loss on data, and none is given. Give data: in a recipe, loss "
            "and batches in Python."
        )


def plan_average(
    checkpoints: Sequence[Tensors],
    coefficients: Sequence[float],
    *,
    dtype: str | torch.dtype | None = None,
    exclude: str | None = None,
    device: str = "cpu",
) -> Plan:
    """Return the plan of a weighted average; checkpoints of coefficient zero are not read.

    What is no weight, and the companions of the weights, are those of the newest checkpoint that counts.

    Args:
        checkpoints: Oldest first.
        coefficients: One for each; they are normalised to sum to 1.
        dtype: Of the result; that of the checkpoints when not given, which then must have one.
        exclude: Regular expression of names of tensors that stay as they are in the last checkpoint.
        device: Where the arithmetic happens.

    Raises:
        ModicumError: The checkpoints do not fit together.
    """
    parts = parts_of(checkpoints, exclude)
    check_factors(parts.names, coefficients)
    if dtype is None:
        check_one_dtype(checkpoints, parts)
    if told := notes_on_tokenizers(dict(zip(parts.labels, checkpoints))):
        raise CheckpointError(f"{told[0].partition(', and they')[0]}. Average checkpoints of one tokenizer.")
    # The first one gives the result what comes with the weights.
    used = [i for i, w in enumerate(coefficients) if w][::-1]
    knobs = {"weights": [coefficients[i] for i in used]}
    plan = plan_merge(None, [checkpoints[i] for i in used], method="linear", knobs=knobs, dtype=dtype, device=device)

    def settle(step: Step) -> Step:
        """Take from one checkpoint what is no weight."""
        stays = step.name in parts.stay
        if step.spec.dtype.is_floating_point and not stays and step.name not in parts.statistics:
            named = tuple(replace(source, model=parts.labels[i]) for i, source in zip(used, step.experts))
            return replace(step, experts=named, compared=False)  # to compare twenty takes as long as their mean
        place = -1 if stays else latest(coefficients)
        return kept(step.spec, Source(parts.labels[place], checkpoints[place], step.name))

    return replace(plan, steps=[settle(step) for step in plan.steps])
