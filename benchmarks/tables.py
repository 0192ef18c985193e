"""Tables of the studies for the guide, from the result files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

RESULTS = Path(__file__).parent / "results"
GUIDE = Path(__file__).parents[1] / "docs" / "guide"


def load(name: str) -> dict[str, Any]:
    """Return a result file; empty when nothing was measured yet."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Write mean and half width of the 95 % Student-t interval; nothing where a value is not a number."""
    if not values or any(map(math.isnan, values)):
        return "–"
    mean, half = spread(values)
    return f"{mean:.{digits}f} (one seed)" if math.isinf(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % Student-t interval; of one value the width is infinite."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, float(student.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def side(differences: Sequence[float]) -> str:
    """Say on which side of zero paired differences lie, beyond their interval."""
    mean, half = spread(differences)
    if not any(differences):
        return "equal"
    return "above" if mean - half > 0 else "below" if mean + half < 0 else "not apart"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table; a line that says so when it has no rows."""
    body = ["| " + " | ".join(row) + " |" for row in rows]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body] if body else ["Not measured yet."]
    return "\n".join(lines) + "\n"


def write(name: str, script: str, parts: Iterable[str]) -> None:
    """Write a file that a page of the guide includes."""
    note = f"<!-- Written by {script} from benchmarks/results; do not edit. -->"
    (GUIDE / name).write_text("\n".join([note, *parts]).rstrip() + "\n", encoding="utf-8")
