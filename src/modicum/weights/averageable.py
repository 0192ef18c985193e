"""What of checkpoints a mean is of: their weights, and not their statistics, counters, packed numbers or factors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modicum.borders import expanded
from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.layout import is_running_statistic
from modicum.weights.checkpoint import PACKED, Checkpoint
from modicum.weights.compatibility import (
    Tensors,
    check_agreement,
    check_remaining,
    check_tensors,
    excluded,
    is_weight,
    label,
    spec_of,
)
from modicum.weights.kernels.compare import refuse_non_finite

_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")
# A counter is a number alone or of 64 bits; other integers that differ between checkpoints are packed weights.
_COUNTERS = (torch.int64, torch.bool)


class State(dict[str, Tensor]):
    """A model's tensors by name, and which of them are buffers: no weights, so that no mean of them is right."""

    buffers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], buffers: Collection[str]) -> State:
        """Return the tensors with the names of their buffers."""
        state = cls(tensors)
        state.buffers = frozenset(buffers)
        return state


@dataclass(frozen=True)
class Parts:
    """How the tensors of checkpoints take part in a mean.

    Attributes:
        labels: What to call the checkpoints.
        names: The tensors that all of them have.
        ties: Names of tensors that are, in every checkpoint, those of an earlier name.
        stay: Tensors that stay as they are in the newest checkpoint, with those that are tied to them.
        statistics: Tensors that are no weights: those of the newest checkpoint that counts.
    """

    labels: list[str]
    names: list[str]
    ties: dict[str, str]
    stay: frozenset[str]
    statistics: frozenset[str]


def parts_of(checkpoints: Sequence[Tensors], exclude: str | None = None) -> Parts:
    """Return how the tensors take part in a mean, having checked that there is one.

    Args:
        checkpoints: Oldest first.
        exclude: Regular expression of names of tensors that stay as they are in the newest.

    Raises:
        CheckpointError: They do not fit together, one is there twice, or holds what is no tensor.
        UnsupportedError: Their weights are packed.
        RecipeError: ``exclude`` is malformed, or finds nothing.
    """
    labels = [_label(checkpoints, i) for i in range(len(checkpoints))]
    check_apart(checkpoints)
    for model, name in zip(checkpoints, labels):
        check_tensors(model, name)
    newest, *others = list(checkpoints)[::-1]
    names = check_agreement(newest, others, names=labels[::-1])
    _check_packed(newest, others, labels[::-1], names)
    ties = aliases(checkpoints)
    found = excluded([newest], exclude)
    roots = {ties.get(name, name) for name in found}
    known = {name for model in checkpoints for name in getattr(model, "buffers", ())}
    stay = frozenset(name for name in names if ties.get(name, name) in roots)
    statistics = frozenset(name for name in names if name in known or is_running_statistic(name))
    check_remaining([name for name in names if name not in stay | statistics and is_weight(newest, name)], exclude)
    return Parts(labels, names, ties, stay, statistics)


def aliases(models: Sequence[Tensors]) -> dict[str, str]:
    """Return names whose tensors are, in every model, those of an earlier name: weights that are tied in memory."""
    maps: list[Callable[[str], object]] = []
    for model in models:
        if not isinstance(model, dict):
            return {}
        maps.append(lambda name, model=model: _place(model, name))  # type: ignore[misc]
    first: dict[object, str] = {}
    return {
        name: known for name in models[0] if (known := first.setdefault(tuple(at(name) for at in maps), name)) != name
    }


def check_one_dtype(checkpoints: Sequence[Tensors], parts: Parts) -> None:
    """Refuse checkpoints of several dtypes where the result's is not given: which of them is meant is not known.

    Raises:
        RecipeError: One differs from the newest.
    """
    *others, newest = checkpoints
    for name in parts.names:
        expected = spec_of(newest, name).dtype
        for model, owner in zip(others, parts.labels):
            if (found := spec_of(model, name).dtype) != expected:
                raise RecipeError(
                    f"{owner}: tensor {name!r} is {found}, {parts.labels[-1]} has {expected}. Set dtype to that of the "
                    "result, such as float32."
                )


def check_factors(names: Collection[str], coefficients: Sequence[float]) -> None:
    """Refuse the mean of several adapters' factors: the product of two means is not the mean of the products.

    Raises:
        UnsupportedError: A tensor is such a factor, and more than one checkpoint counts.
    """
    if sum(value != 0 for value in coefficients) < 2:
        return
    if factor := next((name for name in names if _FACTOR.search(name)), None):
        raise UnsupportedError(
            f"tensor {factor!r} is a factor of an adapter, and the product of mean factors is not the mean of the "
            "products. Save the adapters with save_pretrained and average the folders (job: average, output: lora)."
        )


def check_unused(checkpoints: Sequence[Tensors], coefficients: Sequence[float]) -> None:
    """Refuse numbers that are not finite in checkpoints that do not count; the others are looked at when averaged.

    Raises:
        CheckpointError: One holds NaN or infinity.
    """
    unused = [i for i, value in enumerate(coefficients) if not value]
    for i in unused:
        model, owner = checkpoints[i], _label(checkpoints, i)
        adapter = model.adapter if isinstance(model, Checkpoint) else None
        factors = {} if adapter is None else adapter.factors
        for name in model if adapter is None else {*factors, *adapter.replaced}:  # the rest is the base's
            change = factors.get(name)
            tensors = [model[name]] if change is None else [change.A, change.B]
            if tensors[0].is_floating_point():
                refuse_non_finite(name, tensors, [owner] * len(tensors))


def _label(checkpoints: Sequence[Tensors], i: int) -> str:
    return label(checkpoints[i], f"checkpoints[{i}]")


def check_apart(checkpoints: Sequence[Tensors]) -> None:
    """Refuse a checkpoint that is listed twice: a record of shares by name could not tell them apart.

    Raises:
        CheckpointError: Two are one folder or file.
    """
    seen: set[Path] = set()
    for model in checkpoints:
        if not isinstance(model, Checkpoint):
            continue
        file = expanded(model.name)
        place = (file if file.is_file() else model.folder).resolve()
        if place in seen:
            raise CheckpointError(f"{model.name} is among the checkpoints twice. List each once.")
        seen.add(place)


def _check_packed(newest: Tensors, others: Sequence[Tensors], labels: Sequence[str], names: Sequence[str]) -> None:
    for name in names:
        spec = spec_of(newest, name)
        float8 = spec.dtype.is_floating_point and spec.dtype.itemsize == 1
        if float8 or PACKED.search(name):
            what = f"is {spec.dtype}" if float8 else "belongs to quantised weights"
        else:
            number = spec.dtype.is_floating_point or spec.dtype in _COUNTERS or spec.numel < 2
            if number or all(torch.equal(newest[name], other[name]) for other in others):
                continue
            what = f"is {spec.dtype} and differs between checkpoints"
        raise UnsupportedError(
            f"{labels[0]}: tensor {name!r} {what}: such numbers cannot be averaged. Dequantise or cast the model first."
        )


def _place(model: Mapping[str, Tensor], name: str) -> object:
    tensor = model.get(name)
    if tensor is None or not tensor.numel():
        return name
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
