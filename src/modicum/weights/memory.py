"""How much memory the making of a tensor takes: anonymous memory, not the pages of files that are read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.layout import is_vocabulary
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import spec_of
from modicum.weights.mergekit.vocabulary import Vocabulary
from modicum.weights.stream import MAPPED

if TYPE_CHECKING:
    from modicum.weights.plan import Step

BLOCKS = 12 << 20  # bytes that a method takes that works block by block


def needed(step: Step) -> int:
    """Return how many bytes making the tensor of a step takes at most."""
    n, floats = len(step.experts), step.entry.facts.floats
    matrix = (step.entry.facts.matrix and not step.averaged) or step.diagnosed
    known = 0.0 if step.averaged else floats(n, step.knobs) if callable(floats) else floats
    # Deltas of matrices, their factors and the stacks of both, in float64 where they are decomposed.
    held = max(4 * known, 24.0 * (n + 1) if matrix else 0.0)
    # Selection buffers: threshold candidates, or one mask bit per entry and expert.
    held += n / 4 if "density" in step.knobs else 0
    if matrix or not _in_place(step):
        held += 4 + step.spec.dtype.itemsize
    return int(held * step.spec.numel) + _folded(step) + _remade(step) + BLOCKS


def _in_place(step: Step) -> bool:
    """Whether the result is written straight into the pages of its file, which are no memory of ours."""
    first = step.models[0]
    return MAPPED and spec_of(first.tensors, first.name).dtype == step.spec.dtype


def _folded(step: Step) -> int:
    """Bytes of weights into which an adapter is folded; where its start is found again, of a decomposition too."""
    total = 0
    for source in step.sources:
        adapter = source.tensors.adapter if isinstance(source.tensors, Checkpoint) else None
        change = adapter.factors.get(source.name) if adapter else None
        total += 4 * step.spec.numel * (0 if change is None else 7 if change.start else 2)
    return total


def _remade(step: Step) -> int:
    """Bytes of embedding tables that are put together from rows of several models."""
    return sum(
        source.tensors.spec(source.name).nbytes
        for source in step.sources
        if isinstance(source.tensors, Vocabulary) and is_vocabulary(source.name)
    )
