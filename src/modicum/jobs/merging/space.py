"""The space of a merge's knobs: points of the unit cube, as the knobs of every tensor's step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from modicum.errors import RecipeError, did_you_mean
from modicum.layout import comes_first, layer_of, stacks
from modicum.recipe import Section
from modicum.registry import merge_method
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.weights.plan import Plan, Step


class Span(Section):
    """The values that a knob may take."""

    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(default=False, description="search it by its logarithm")
    each: bool = Field(default=False, description="a value of its own for each expert")
    layers: PositiveInt = Field(
        default=1, description="values at so many depths, on a straight line between; 1: the same for all layers"
    )

    @model_validator(mode="after")
    def _check(self) -> Span:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low is {self.low} and high {self.high}, expected two finite numbers, low below high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, and log needs numbers above 0")
        return self

    def at(self, share: float) -> float:
        """Return the value at a share of the way from low to high.

        Example:
            >>> Span(low=1, high=100, log=True).at(0.5)
            10.0
        """
        share = min(1.0, max(0.0, share))
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return float(f"{value:.6g}")  # as a recipe would say it

    def share(self, value: float) -> float:
        """Return where a value lies between low and high."""
        if self.log:
            found = (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            found = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, found))


class Space:
    """What is searched: a coordinate for each knob, expert and depth that has a value of its own.

    Args:
        plan: Of the merge as the recipe gives it.
        spans: By the names of knobs.

    Raises:
        RecipeError: A step's method has no such knob, or it is no number.
    """

    def __init__(self, plan: Plan, spans: Mapping[str, Span]) -> None:
        self.plan, self.spans = plan, dict(spans)
        floats = [step for step in plan.steps if step.spec.dtype.is_floating_point]
        # What stays as it is in the base passes through, whose factor is none of the merge's knobs.
        floats = [step for step in floats if step.method != "passthrough"] or floats
        self.searched = {step.name for step in floats if any(name in step.knobs for name in spans)}
        if not self.searched:
            method = floats[0].method
            wrong, known = next(iter(spans)), merge_method[method].schema.model_fields
            raise RecipeError(f"knobs: {method} has no knob {wrong!r}. {did_you_mean(wrong, known)}")
        for name in spans:
            if not any(name in step.knobs for step in floats):
                other = sorted({knob for step in floats for knob in step.knobs})
                raise RecipeError(f"knobs: the merge has no knob {name!r}. {did_you_mean(name, other)}")
        self.experts = max(len(step.experts) for step in floats)
        self._depths = stacks(step.name for step in plan.steps)
        self.names = [label for name, span in self.spans.items() for label in self._labels(name, span)]
        for shares in ([0.0] * len(self.names), [1.0] * len(self.names)):
            self.plan_at(shares)  # what a method refuses at an end is refused before anything is measured

    def _labels(self, name: str, span: Span) -> Iterator[str]:
        for expert in range(self.experts if span.each else 1):
            for depth in range(span.layers):
                yield name + (f"[{expert}]" if span.each else "") + (f"@{depth}" if span.layers > 1 else "")

    @property
    def start(self) -> list[float]:
        """The recipe's own values, and the middle where it has none."""
        step = next(step for step in self.plan.steps if step.name in self.searched)
        shares: list[float] = []
        for name, span in self.spans.items():
            given = step.knobs.get(name)
            for expert in range(self.experts if span.each else 1):
                own = given[expert] if isinstance(given, Sequence) and len(given) > expert else given
                shares += [span.share(own) if isinstance(own, int | float) else 0.5] * span.layers
        return shares

    def values(self, shares: Sequence[float]) -> dict[str, float]:
        """Return a point's values by the names of its coordinates."""
        found: dict[str, float] = {}
        rest, names = iter(shares), iter(self.names)
        for span in self.spans.values():
            for _ in range((self.experts if span.each else 1) * span.layers):
                found[next(names)] = span.at(next(rest))
        return found

    def plan_at(self, shares: Sequence[float]) -> Plan:
        """Return the merge at a point.

        Raises:
            RecipeError: The method refuses a value.
        """
        values = list(self.values(shares).values())
        return replace(self.plan, steps=[self._step(step, values) for step in self.plan.steps])

    def _step(self, step: Step, values: Sequence[float]) -> Step:
        if step.name not in self.searched:
            return step
        place, knobs = 0, dict(step.knobs)
        for name, span in self.spans.items():
            count = self.experts if span.each else 1
            own = [
                _between(values[place + i * span.layers : place + (i + 1) * span.layers], self._depth(step.name))
                for i in range(count)
            ]
            place += count * span.layers
            if name in knobs:
                knobs[name] = own[: len(step.experts)] if span.each else own[0]
        return replace(step, knobs=merge_method[step.method].knobs(knobs))

    def _depth(self, name: str) -> float:
        layer = layer_of(name)
        if layer is None:
            return 0.0 if comes_first(name) else 1.0
        return layer.number / max(1, self._depths[layer.stack] - 1)


def _between(values: Sequence[float], depth: float) -> float:
    """Return the value at a depth, on a straight line between those beside it.

    Example:
        >>> _between([0.0, 1.0, 3.0], 0.75)
        2.0
    """
    at = depth * (len(values) - 1)
    below = min(int(at), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    value: float = values[below] + (at - below) * (values[above] - values[below])
    return value


def described(values: Mapping[str, Any]) -> str:
    """Return a point in words.

    Example:
        >>> described({"scale": 0.5, "weights[0]": 1.25})
        'scale 0.5, weights[0] 1.25'
    """
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
