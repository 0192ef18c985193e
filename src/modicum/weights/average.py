"""Averaging the checkpoints of one run: an averager gives each a coefficient, one streamed pass makes the mean."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modicum.errors import CheckpointError, RecipeError
from modicum.random import generator
from modicum.registry import averager
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import Tensors, check_agreement, label
from modicum.weights.merge import open_checkpoint, run_plan
from modicum.weights.plan import Plan, Source, excluded, kept, plan_merge
from modicum.weights.search import Landscape, Loss


@dataclass(frozen=True)
class Choice:
    """Coefficients, oldest checkpoint first, and the held-out losses that they were judged by, if they were."""

    coefficients: list[float]
    scores: dict[str, float] = field(default_factory=dict)
    note: str | None = None


def average(
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    method: str = "uniform",
    dtype: str | torch.dtype | None = None,
    loss: Loss | None = None,
    batches: Sequence[Any] | None = None,
    held_out: Sequence[Any] | None = None,
    fallback: bool = True,
    exclude: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    allow_pickle: bool = False,
    progress: bool = True,
    **knobs: Any,
) -> list[float]:
    """Average checkpoints on disk into one model.

    Args:
        checkpoints: Folders or opened checkpoints, oldest first.
        out: Folder to write; it must not hold anything yet.
        method: Name of an averager; see ``modicum list averagers``.
        dtype: Of the result; that of the checkpoints when not given.
        loss: For averagers that learn: from the floating-point weights of a mean, by name, and a batch to its loss,
            differentiable in the weights.
        batches: What that loss is measured on.
        held_out: What a learnt choice is judged by; ``batches`` when not given.
        fallback: Take the plain mean of as many of the latest checkpoints where a learnt choice is no better.
        exclude: Regular expression of names of tensors that stay as they are in the last checkpoint.
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
    landscape = None
    if loss is not None:
        landscape = Landscape(loss, opened, batches or (), held_out, exclude, device)
    choice = choose(opened, method=method, landscape=landscape, fallback=fallback, seed=seed, **knobs)
    plan = plan_average(opened, choice.coefficients, dtype=dtype, exclude=exclude, device=device)
    run_plan(plan, Path(out), progress=progress)
    return choice.coefficients


def choose(
    checkpoints: Sequence[object],
    *,
    method: str,
    landscape: Landscape | None = None,
    fallback: bool = True,
    seed: int = 0,
    **knobs: Any,
) -> Choice:
    """Ask the averager called ``method`` for the coefficients.

    Args:
        checkpoints: Oldest first.
        method: Name of an averager.
        landscape: The loss along the checkpoints, for averagers that learn.
        fallback: Keep what was learnt only if its held-out loss is not above that of the plain mean of as many of the
            latest checkpoints.
        seed: For averagers that draw random numbers.
        **knobs: The averager's.

    Raises:
        RecipeError: There is no checkpoint, a knob is wrong, or a loss is missing or not used.
        CheckpointError: The averager's answer is no mean.
    """
    check_request(len(checkpoints), method, learning=landscape is not None)
    entry = averager[method]
    checked: dict[str, Any] = entry.knobs(knobs)
    if "rng" in inspect.signature(entry.function).parameters:
        checked["rng"] = generator(seed, method)
    told = () if landscape is None else (landscape,)
    found = [float(value) for value in entry.function(*told, checkpoints, **checked)]
    if len(found) != len(checkpoints) or not math.isclose(sum(found), 1, abs_tol=1e-6):
        raise CheckpointError(
            f"{method} answered with the coefficients {found} for {len(checkpoints)} checkpoints, which should be one "
            "for each and sum to 1. Its search went astray: lower its rate, or choose another averager."
        )
    if landscape is None or not fallback:
        return Choice(found)
    count = sum(value != 0 for value in found)
    latest = [0.0] * (len(found) - count) + [1 / count] * count
    scores = {method: landscape.score(found), f"mean of the last {count}": landscape.score(latest)}
    latest_score = scores[f"mean of the last {count}"]
    if scores[method] <= latest_score or math.isnan(latest_score):
        return Choice(found, scores)
    judged = "held-out data" if landscape.held_out is not None else "the data it learnt from"
    note = f"{method} lost on {judged} to the plain mean of the last {count} checkpoints, which is taken instead"
    return Choice(latest, scores, note)


def check_request(checkpoints: int, method: str, *, learning: bool) -> None:
    """Refuse what cannot be averaged, before anything is read.

    Args:
        checkpoints: How many there are.
        method: Name of an averager.
        learning: Whether there is a loss to learn from.

    Raises:
        RecipeError: There is no checkpoint, or a loss is missing or not used.
    """
    if not checkpoints:
        raise RecipeError("There are no checkpoints to average. List at least one.")
    learns = averager[method].facts.learns
    if learns and not learning:
        raise RecipeError(
            f"{method} learns its coefficients from a loss on data, and none is given. Give data: in a recipe, loss "
            "and batches in Python."
        )
    if learning and not learns:
        raise RecipeError(f"{method} looks at no data. Remove the data, or choose an averager that learns.")


def plan_average(
    checkpoints: Sequence[Tensors],
    coefficients: Sequence[float],
    *,
    dtype: str | torch.dtype | None = None,
    exclude: str | None = None,
    device: str = "cpu",
) -> Plan:
    """Return the plan of a weighted average; checkpoints of coefficient zero are not read.

    Args:
        checkpoints: Oldest first.
        coefficients: One for each; they are normalised to sum to 1.
        dtype: Of the result; that of the checkpoints when not given.
        exclude: Regular expression of names of tensors that stay as they are in the last checkpoint.
        device: Where the arithmetic happens.
    """
    used = [(c, w) for c, w in zip(checkpoints, coefficients, strict=True) if w]
    knobs = {"weights": [w for _, w in used]}
    plan = plan_merge(None, [c for c, _ in used], method="linear", knobs=knobs, dtype=dtype, device=device)
    newest = checkpoints[-1]
    stay, name = excluded(newest, exclude), label(newest, "the last checkpoint")
    if stay:
        check_agreement(newest, [used[0][0]], names=[name, label(used[0][0], "the first checkpoint")])
    steps = [kept(s.spec, Source(name, newest, s.name)) if s.name in stay else s for s in plan.steps]
    return replace(plan, steps=steps)
