"""Checkpoints of one architecture under the names of the first: with or without a prefix, experts fused or apart.

GPT-2 is published as ``h.0.…`` and as ``transformer.h.0.…``, and the experts of a layer as one tensor or as one for
each expert. What is the same but for its name is merged, and the result keeps the first model's names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from modicum.architectures import unfused
from modicum.layout import is_recomputed, layer_of
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import Tensors, spec_of
from modicum.weights.files import Spec

AnyTensors = TypeVar("AnyTensors", bound=Tensors)


@dataclass(frozen=True)
class Piece:
    """Where a tensor is found: a tensor of a checkpoint, or a part of it."""

    name: str
    part: tuple[int | tuple[int, int], ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part, without copying."""
        for axis in self.part:
            tensor = tensor[axis] if isinstance(axis, int) else tensor[axis[0] : axis[1]]
        return tensor


class Renamed(Checkpoint):
    """A checkpoint whose tensors, or parts of them, have other names.

    Args:
        model: The checkpoint.
        pieces: By the new names, where each is found.
    """

    def __init__(self, model: Checkpoint, pieces: Mapping[str, Piece]) -> None:
        self.__dict__.update(model.__dict__)
        self.__dict__.pop("identity", None)
        self.model, self.pieces = model, pieces

    def spec(self, name: str) -> Spec:
        """Return shape and dtype of a tensor, without reading it."""
        piece = self.pieces[name]
        spec = self.model.spec(piece.name)
        return Spec(tuple(piece.of(torch.empty(spec.shape, device="meta")).shape), spec.dtype)

    def __getitem__(self, name: str) -> Tensor:
        piece = self.pieces[name]
        return piece.of(self.model[piece.name])

    def __contains__(self, name: object) -> bool:
        return name in self.pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def identity(self) -> list[list[object]]:
        """What its tensors depend on; see :attr:`modicum.weights.checkpoint.Checkpoint.identity`."""
        return [*self.model.identity, [[name, piece.name, piece.part] for name, piece in sorted(self.pieces.items())]]


def aligned(models: Sequence[AnyTensors]) -> list[AnyTensors]:
    """Return the models by the names of the first one, as far as only names tell them apart.

    A model that is no more alike under other names stays as it is: that it does not fit is said elsewhere.
    """
    named = [_names(model) for model in models]
    if all(names == named[0] for names in named[1:]):
        return list(models)
    split = [apart(model) for model in models]
    # Experts are taken apart where one of the models has them apart.
    whole = [model for model, other in zip(models, split) if other is model]
    made = split if whole and len(whole) < len(models) else list(models)
    return [made[0], *(_prefixed(model, made[0]) for model in made[1:])]


def _names(model: Tensors) -> set[str]:
    return {name for name in model if not is_recomputed(name, spec_of(model, name).shape)}


def apart(model: AnyTensors) -> AnyTensors:
    """Return a checkpoint with a tensor for each expert; the same one where no experts are fused."""
    if not isinstance(model, Checkpoint):
        return model
    kind = str(model.config.get("model_type") or "")
    pieces: dict[str, Piece] = {}
    for name in model:
        found = unfused(name, model.spec(name).shape, kind)
        pieces |= {new: Piece(name, part) for new, part in found.items()}
    return model if all(new == piece.name for new, piece in pieces.items()) else Renamed(model, pieces)  # type: ignore[return-value]


def _prefixed(model: AnyTensors, first: Tensors) -> AnyTensors:
    """Return a checkpoint with the prefix that the names of the first one have, or without it."""
    if not isinstance(model, Checkpoint):
        return model
    wanted = _names(first)
    ours, theirs = (next(iter(sorted(_stacks(names))), None) for names in (wanted, model))
    if ours is None or theirs is None or ours == theirs:
        return model
    more, less = ours.removesuffix(theirs), theirs.removesuffix(ours)

    def renamed(name: str) -> str:
        other = more + name if ours.endswith(theirs) else name.removeprefix(less)
        return other if other in wanted or name not in wanted else name

    if not (ours.endswith(theirs) or theirs.endswith(ours)):
        return model
    pieces = {renamed(name): Piece(name) for name in model}
    # What still differs is said elsewhere, or left out by whoever asked for that.
    better = len(pieces) == len(model) and len(wanted & pieces.keys()) > len(wanted & {*model})
    return Renamed(model, pieces) if better else model  # type: ignore[return-value]


def _stacks(names: Sequence[str] | set[str] | Tensors) -> set[str]:
    return {layer.stack for name in names if (layer := layer_of(name))}
