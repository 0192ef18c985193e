"""Direction and unit of a metric, as the record states them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

Better: TypeAlias = Literal["higher", "lower"]
Unit: TypeAlias = Literal["share", "number"]


class Metric(NamedTuple):
    """A metric as a record describes it.

    Attributes:
        name: Its name.
        better: Which values are better; ``None`` where nothing says so, and then no value is called the best.
        unit: ``share`` of one, written as a percentage, or any ``number``.
    """

    name: str
    better: Better | None = None
    unit: Unit = "number"


def metric_of(raw: Mapping[str, Any]) -> Metric:
    """Return the metric of a cell or difference of a record.

    Example:
        >>> metric_of({"metric": "over_refusal", "better": "lower", "unit": "share"})
        Metric(name='over_refusal', better='lower', unit='share')
        >>> metric_of({"metric": "bits_per_byte"})
        Metric(name='bits_per_byte', better='lower', unit='number')
    """
    name = str(raw.get("metric", "value"))
    match raw.get("better"), raw.get("unit"):
        case ("higher" | "lower") as better, ("share" | "number") as unit:
            return Metric(name, better, unit)
    # Records of version 0.1.0 name the metric only; the facts of its measure say the rest.
    return _known().get(name, Metric(name))


@cache
def _known() -> Mapping[str, Metric]:
    from modicum.registry import measure

    found: dict[str, Metric] = {}
    for entry in measure.values():
        facts, knob = entry.facts, entry.parameters[1].get("metric")
        names = [facts.metric or entry.name, facts.compares, *(get_args(knob.annotation) if knob else ())]
        found |= {name: Metric(name, facts.better, facts.unit) for name in names if name}
    return MappingProxyType(found)
