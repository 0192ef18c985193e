"""Tensor names sorted into layers and kinds of module, so that a value per tensor becomes a picture of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from modicum.layout import layer_of
from modicum.report.charts import finite

MOST_KINDS = 20  # rows of a picture; beyond that numbered parts, such as a mixture's experts, are taken together

Combine = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def norm(values: Sequence[float]) -> float:
    """Norm of tensors taken together, from the norm of each."""
    return float(sum(value * value for value in values) ** 0.5)


@dataclass(frozen=True)
class LayerMap:
    """Where each tensor of a model stands."""

    names: Sequence[str]

    @cached_property
    def places(self) -> list[tuple[int, str] | None]:
        """Layer and kind of each tensor; nothing for tensors outside the layers."""
        raw = [(layer.number, _kind(layer.rest)) if (layer := layer_of(name)) else None for name in self.names]
        if len({place[1] for place in raw if place}) > MOST_KINDS:
            raw = [(place[0], re.sub(r"\d+", "*", place[1])) if place else None for place in raw]
        return raw

    @cached_property
    def layers(self) -> list[int]:
        """Numbers of the layers."""
        return sorted({place[0] for place in self.places if place})

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of module in the order of the model."""
        return list(dict.fromkeys(place[1] for place in self.places if place))

    @cached_property
    def labels(self) -> list[str]:
        """Kinds without their parents where that stays unambiguous."""
        short = [kind.rpartition(".")[2] for kind in self.kinds]
        return [s if short.count(s) == 1 else kind for s, kind in zip(short, self.kinds, strict=True)]

    @property
    def outside(self) -> list[int]:
        """Positions of the tensors outside the layers, such as embeddings."""
        return [i for i, place in enumerate(self.places) if place is None]

    def matrix(self, values: Sequence[object], combine: Combine) -> list[list[float | None]]:
        """Arrange a value per tensor as kinds × layers."""
        cells: dict[tuple[int, str], list[float]] = {}
        for place, value in zip(self.places, values, strict=False):
            if place and (known := finite(value)) is not None:
                cells.setdefault(place, []).append(known)
        return [
            [combine(cells[layer, kind]) if (layer, kind) in cells else None for layer in self.layers]
            for kind in self.kinds
        ]

    def by_layer(self, values: Sequence[object], combine: Combine) -> list[float | None]:
        """Arrange a value per tensor as one value per layer."""
        columns = zip(*self.matrix(values, combine), strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        return [combine(column) if column else None for column in known]


def _kind(rest: str) -> str:
    return rest.removesuffix(".weight")
