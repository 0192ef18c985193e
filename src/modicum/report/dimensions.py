"""Scores of a grid over several dimensions: methods, experts and base, averaged over seeds and paired by them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from modicum.errors import ModicumError
from modicum.evaluate.dimensions import (
    alignment_conflict,
    collaboration,
    hypervolume,
    normalised,
    pareto_front,
    rank_correlation,
)
from modicum.evaluate.intervals import Estimate, mean
from modicum.report.text import is_number

RESAMPLES = 1000
SHARE = "share"
BASE, EXPERT, MERGE, MIXTURE, CONTINUAL = "base", "expert", "merge", "mixture", "continual"


@dataclass(frozen=True)
class Arm:
    """A method, whatever its seed.

    Attributes:
        name: Of the grid.
        role: What made it: ``base``, ``expert``, ``merge``, ``mixture``, ``continual``, ``control`` or any word.
        dimension: Of which it is the expert.
        scores: Higher is better: by seed and dimension.
        intervals: Over items, by seed and dimension.
        units: Of each dimension; a share lies between 0 and 1.
    """

    name: str
    role: str
    dimension: str | None = None
    scores: dict[Any, dict[str, float]] = field(default_factory=dict)
    intervals: dict[Any, dict[str, tuple[float, float]]] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)

    def score(self, dimension: str) -> Estimate | None:
        """Return the mean over seeds, with Student's interval over seeds, or over items where there is one seed."""
        values = [row[dimension] for row in self.scores.values() if dimension in row]
        if not values:
            return None
        if len({*values}) > 1:
            found = mean(values)
            if self.units.get(dimension) != SHARE or found.low is None or found.high is None:
                return found
            return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0))
        # Of one seed, or of seeds that all came to the same, the interval over items says more.
        ends = [row[dimension] for row in self.intervals.values() if dimension in row]
        low, high = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else (None, None)
        return Estimate(values[0], low, high, len(values))


@dataclass(frozen=True)
class Table:
    """All methods of a grid on all dimensions."""

    dimensions: list[str]
    arms: list[Arm]
    words: dict[tuple[str, str], float]
    units: Mapping[str, str]

    def of_role(self, *roles: str) -> list[Arm]:
        """Return the methods of some roles."""
        return [arm for arm in self.arms if arm.role in roles]

    def expert(self, dimension: str) -> Arm | None:
        """Return the expert of a dimension."""
        return next((arm for arm in self.arms if arm.role == EXPERT and arm.dimension == dimension), None)

    @property
    def base(self) -> Arm | None:
        """The model from which all started."""
        return next(iter(self.of_role(BASE)), None)

    @property
    def own(self) -> list[str]:
        """The dimensions that have an expert of their own; the others are measured beside them."""
        return [name for name in self.dimensions if self.expert(name) is not None]

    def shares(self, arm: Arm) -> dict[Any, list[float]]:
        """Return the share of the own expert's score in each dimension that has one, by seed, where nothing lacks."""
        found = {}
        for seed, row in arm.scores.items():
            own = [_at(self.expert(name), seed, name) for name in self.own]
            scores = [row.get(name) for name in self.own]
            if not own or any(value is None for value in (*own, *scores)):
                continue
            shares = normalised(scores, own)  # type: ignore[arg-type]
            if all(share is not None for share in shares):
                found[seed] = [float(share) for share in shares if share is not None]
        return found

    def average(self, arm: Arm) -> Estimate | None:
        """Return the normalised average over dimensions."""
        return _over_seeds([math.fsum(row) / len(row) for row in self.shares(arm).values()])

    def worst(self, arm: Arm) -> Estimate | None:
        """Return the lowest normalised score of any dimension."""
        return _over_seeds([min(row) for row in self.shares(arm).values()])

    def difference(self, a: Arm, b: Arm) -> Estimate | None:
        """Return the difference of normalised averages, paired by seed."""
        one, other = self.shares(a), self.shares(b)
        return _over_seeds([(math.fsum(one[s]) - math.fsum(other[s])) / len(one[s]) for s in one if s in other])

    def matrix(self) -> tuple[list[str], list[list[float | None]], list[float]] | None:
        """Return the dimensions that have experts, the collaboration of these, and how much each harms the others."""
        names = self.own
        if self.base is None or len(names) < 2:
            return None
        base = [self.base.score(name) for name in names]
        rows = [[self._expert_score(name, other) for other in names] for name in names]
        if any(value is None for value in (*base, *(x for row in rows for x in row))):
            return None
        before = [value.value for value in base if value is not None]
        scores = [[value.value for value in row if value is not None] for row in rows]
        unsure = [not self._gains(name) for name in names]
        return names, collaboration(before, scores, undetermined=unsure), alignment_conflict(before, scores)

    def _expert_score(self, name: str, other: str) -> Estimate | None:
        expert = self.expert(name)
        return None if expert is None else expert.score(other)

    def _gains(self, name: str) -> bool:
        """Whether an expert gains in its own dimension, told from nothing; a loss would turn the signs of all."""
        expert, base = self.expert(name), self.base
        if expert is None or base is None:
            return False
        gains = []
        for seed in expert.scores:
            own, before = _at(expert, seed, name), _at(base, seed, name)
            if own is not None and before is not None:
                gains.append(own - before)
        if len(gains) > 1:
            found = mean(gains)
            return found.low is not None and found.low > 0
        after, first = expert.score(name), base.score(name)
        if after is None or first is None or None in (after.low, after.high, first.low, first.high):
            return bool(gains) and gains[0] > 0
        # Without seeds, two intervals over items that do not touch.
        return bool(after.low > first.high)  # type: ignore[operator]

    def front(self, names: Sequence[str] | None = None) -> tuple[list[Arm], float | None]:
        """Return the methods that no other beats in all dimensions, and the volume above the base's scores."""
        names = list(names or self.dimensions)
        full = [(arm, [arm.score(name) for name in names]) for arm in self.arms if arm.role != EXPERT]
        known = [(arm, [s.value for s in scores if s is not None]) for arm, scores in full if None not in scores]
        if not known:
            return [], None
        points = [point for _, point in known]
        start = None if self.base is None else [self.base.score(name) for name in names]
        volume = None
        if start is not None and None not in start:
            volume = hypervolume(points, [s.value for s in start if s is not None])
        return [known[place][0] for place in pareto_front(points)], volume

    def correlations(self) -> list[tuple[str, str, float, float | None, float | None]]:
        """Return rank correlations of two dimensions over all methods and seeds, with bootstrap intervals."""
        cells = [row for arm in self.arms for row in arm.scores.values() if {*self.dimensions} <= {*row}]
        found = []
        for i, a in enumerate(self.dimensions):
            for b in self.dimensions[i + 1 :]:
                pairs = [(row[a], row[b]) for row in cells]
                if len(pairs) > 3 and (value := rank_correlation(*zip(*pairs, strict=True))) is not None:
                    found.append((a, b, value, *_bootstrapped(pairs)))
        return found


def read(folder: Path) -> Table | None:
    """Return the scores of a grid's ``grid.json``; nothing where there are none over dimensions."""
    try:
        found = json.loads((folder / "grid.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    scores = found.get("scores") if isinstance(found, Mapping) else None
    rows = [row for row in scores if _is_score(row)] if isinstance(scores, list) else []
    judges = {pick.get("by") for pick in found.get("chosen") or () if isinstance(pick, Mapping)} if rows else set()
    rows = [row for row in rows if row.get("stage") not in judges] or rows
    try:
        table = _table(rows, found.get("cells") if isinstance(found, Mapping) else None)
    except ModicumError:
        return None
    return table if len(table.dimensions) > 1 and any(arm.role != BASE for arm in table.arms) else None


def _is_score(row: Any) -> bool:
    return (
        isinstance(row, Mapping)
        and isinstance(row.get("of"), Mapping)
        and is_number(row.get("value"))
        and (row.get("better") == "higher" or row.get("unit") == SHARE)
    )


def _table(rows: Sequence[Mapping[str, Any]], cells: Any) -> Table:
    dimensions = list(dict.fromkeys(str(row.get("task")) for row in rows))
    units = {str(row.get("task")): str(row.get("unit")) for row in rows}
    arms: dict[str, Arm] = {}
    lengths: dict[tuple[str, str], list[float]] = {}
    details = {
        (cell.get("cell"), one.get("model"), one.get("task")): one
        for cell in (cells if isinstance(cells, list) else ())
        if isinstance(cell, Mapping)
        for one in (cell.get("metrics") or {}).get("cells") or ()
        if isinstance(one, Mapping)
    }
    for row in rows:
        of, task, name = row["of"], str(row.get("task")), str(row.get("arm") or row.get("model"))
        at: Any = of.get("axes") if isinstance(of.get("axes"), Mapping) else {}
        role = str(of.get("role") or row.get("model"))
        own = next((str(value) for value in at.values() if str(value) in dimensions), None)
        arm = arms.setdefault(name, Arm(name, role, own if role == EXPERT else None, units=units))
        here: Any = row.get("axes") if isinstance(row.get("axes"), Mapping) else {}
        seed = at.get("seed", here.get("seed"))
        down = row.get("better") == "lower"
        value, low, high = (_up(row.get(key), down) for key in ("value", "low", "high"))
        arm.scores.setdefault(seed, {})[task] = float(value)  # type: ignore[arg-type]
        if low is not None and high is not None:
            arm.intervals.setdefault(seed, {})[task] = (min(low, high), max(low, high))
        more = details.get((row.get("cell"), row.get("model"), task), {})
        if is_number(more.get("words")):
            lengths.setdefault((name, task), []).append(float(more["words"]))
    words = {key: math.fsum(v) / len(v) for key, v in lengths.items()}
    return Table(dimensions, list(arms.values()), words, units)


def _up(value: Any, down: bool) -> float | None:
    if not is_number(value):
        return None
    return 1.0 - float(value) if down else float(value)


def _at(arm: Arm | None, seed: Any, dimension: str) -> float | None:
    """Return a score at a seed; that of a model which has one for all seeds, such as the base, where it has none."""
    if arm is None:
        return None
    row = arm.scores.get(seed)
    if row is None and len(arm.scores) == 1:
        row = next(iter(arm.scores.values()))
    return None if row is None else row.get(dimension)


def _over_seeds(values: Sequence[float]) -> Estimate | None:
    return mean(values) if values else None


def _bootstrapped(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    rng = Random(0)  # noqa: S311  # no secret
    found = []
    for _ in range(RESAMPLES):
        sample = [pairs[rng.randrange(len(pairs))] for _ in pairs]
        value = rank_correlation(*zip(*sample, strict=True))
        if value is not None:
            found.append(value)
    if len(found) < RESAMPLES / 2:
        return None, None
    found.sort()
    return found[round(0.025 * (len(found) - 1))], found[round(0.975 * (len(found) - 1))]
