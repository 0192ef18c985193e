"""Laws of measures, on a subject that answers right or wrong and finds texts likely or not as it is told."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from laws import Draw, knobs, law

from modicum.evaluate.intervals import Estimate
from modicum.evaluate.judges.prefix import PrefixRefusal
from modicum.evaluate.rows import Rows
from modicum.evaluate.subject import Likelihood, Result, Subject
from modicum.registry import Entry, measure, row_kind, wanted

TEXT = "def add(a, b):\n    return a + b\n\nA harbour is a place where ships may anchor. "
SUPPLIED: dict[str, Any] = {
    "level": 0.9,
    "seed": 0,
    "max_length": 32,
    "tokens_of": lambda _: len,
    "read_lines": lambda _: iter(()),
}
SUPPLIED["reference_of"] = lambda _: Scripted(1.0)
SUPPLIED["judge_of"] = lambda _: (PrefixRefusal(), {})

METRICS = st.sampled_from(["balanced", "refused", "answered"])


class Scripted:
    """A subject that is right with a given probability; what it is wrong about, it finds unlikely."""

    name = "scripted"

    def __init__(self, right: float, seed: int = 0) -> None:
        self.right, self.seed = right, seed

    def _luck(self, rows: Sequence[Any]) -> list[bool]:
        rng = random.Random(self.seed)
        return [rng.random() < self.right for _ in rows]

    def generate(self, rows: Sequence[Any], **_: Any) -> list[str]:
        wrong = "Something else. " * 3
        return [row["completion"] if luck else row.get("wrong", wrong) for row, luck in zip(rows, self._luck(rows))]

    def likelihoods(self, rows: Sequence[Any], **_: Any) -> list[Likelihood]:
        texts = [row.get("text") or row["completion"] for row in rows]
        return [Likelihood(len(t) * (0.5 if luck else 2.0), len(t)) for t, luck in zip(texts, self._luck(rows))]

    def alternatives(self, rows: Sequence[Sequence[Any]], **_: Any) -> list[list[Likelihood] | None]:
        """Find the answer that begins with the word of the right one likelier, where it is right."""

        def likelihood(text: str, luck: bool) -> Likelihood:
            right = text.startswith(("chosen", "right"))
            return Likelihood(len(text) * (0.5 if right == luck else 2.0), len(text))

        return [[likelihood(r["completion"], luck) for r in each] for each, luck in zip(rows, self._luck(rows))]


def row(kind: str, i: int) -> dict[str, Any]:
    if kind == "text":
        return {"text": f"{TEXT}{i} " * 30}
    if kind == "choice":
        return {"prompt": f"prompt {i}", "choices": [f"wrong {i}", f"right {i}", f"no {i}"], "answer": 1}
    if kind == "instruction":
        return {"prompt": f"prompt {i}", "checks": [{"kind": "ends_with", "text": f"n{i}"}], "completion": f"n{i}"}
    if kind == "question":
        answers = [f"n{i}"] if i % 2 else []
        return {"prompt": f"prompt {i}", "answers": answers, "completion": f"n{i}" if i % 2 else "That is not known."}
    if kind == "request":
        no, yes = "I cannot help with that.", "Sure, here it is."
        answers = {"completion": no, "wrong": yes} if i % 2 else {"completion": yes, "wrong": no}
        return {"prompt": f"prompt {i}", "harmful": bool(i % 2), **answers}
    return {field: f"{field} {i}" for field in row_kind[kind].facts.fields} | {"completion": f"n{i}"}


def measured(entry: Entry[Any], values: dict[str, Any], subject: Scripted, n: int) -> list[Result]:
    if entry.name == "lm_eval":  # another package asks the model and scores its answers
        return [{"score": float(luck), "metric": "acc"} for luck in subject._luck(range(n))]
    offered, prepare = SUPPLIED | values, entry.facts.prepare
    rows = Rows(entry.facts.rows, [row(entry.facts.rows, i) for i in range(n)])
    asked = rows if prepare is None else prepare(lambda: rows, **wanted(prepare, offered))
    items: list[Result] = entry.function(asked, subject, **wanted(entry.function, offered))
    return items


def estimate(entry: Entry[Any], values: dict[str, Any], items: Sequence[Result]) -> Estimate:
    found: Estimate = entry.facts.estimate(items, **wanted(entry.facts.estimate, SUPPLIED | values))
    return found


def difference(entry: Entry[Any], values: dict[str, Any], a: Sequence[Result], b: Sequence[Result]) -> Estimate:
    found: Estimate = entry.facts.difference(a, b, **wanted(entry.facts.difference, SUPPLIED | values))
    return found


def usual(entry: Entry[Any], draw: Draw) -> dict[str, Any]:
    """Draw knobs; files and tokenizers are not at hand, and few questions suffice."""
    if entry.name == "refusal":
        return {"judge": "prefix", "max_new_tokens": 4, "batch_size": 4, "metric": draw(METRICS)}
    if entry.name == "lm_eval":
        return {}
    fixed = {"file": None, "tokenizer": None, "answer": None, "suite": "needle", "lengths": (160,), "per_cell": 1}
    fixed |= {"stride": None, "max_bytes": None, "score": "mean", "reference": None, "depths": (0.0, 0.5)}
    return knobs(entry, draw, **fixed)


def _length(items: Sequence[Result]) -> Estimate:
    value = float(items[0]["length"])
    return Estimate(value, value + 1, value + 2, len(items))


def _sum(a: Sequence[Result], b: Sequence[Result]) -> Estimate:
    return Estimate(1.0, 1.0, 1.0, len(a))


def first_counts(rows: Rows, subject: Subject) -> list[Result]:
    return [{"length": len(text)} for text in subject.generate(rows.rows, max_new_tokens=1, batch_size=1)]


BROKEN = {"broken": first_counts, "rows": "completion", "better": "higher", "estimate": _length, "difference": _sum}


@law(measure, "right_is_better", **BROKEN)
def right_is_better(entry: Entry[Any], draw: Draw) -> None:
    values = usual(entry, draw)
    right, wrong = (estimate(entry, values, measured(entry, values, Scripted(p), 3)).value for p in (1.0, 0.0))
    assert right > wrong if entry.facts.better == "higher" else right < wrong


@law(measure, "the order of the items does not matter, and the value lies in its interval", **BROKEN)
def any_order(entry: Entry[Any], draw: Draw) -> None:
    values, n = usual(entry, draw), draw(st.integers(2, 6))
    items = measured(entry, values, Scripted(0.5, draw(st.integers(0, 9))), n)
    found, other = estimate(entry, values, items), estimate(entry, values, items[::-1])
    assert math.isclose(found.value, other.value, rel_tol=1e-9)
    for low, high in ((found.low, found.high), (other.low, other.high)):
        assert (low is None or low <= found.value + 1e-9) and (high is None or found.value <= high + 1e-9)


@law(measure, "a model differs by nothing from itself, and two of them by the same in either order", **BROKEN)
def differences(entry: Entry[Any], draw: Draw) -> None:
    values, n = usual(entry, draw), draw(st.integers(2, 6))
    a, b = (measured(entry, values, Scripted(p, draw(st.integers(0, 9))), n) for p in (0.8, 0.3))
    same = difference(entry, values, a, a)
    assert same.value == 0 and (same.low is None or same.low <= 0 <= same.high)  # type: ignore[operator]
    there, back = difference(entry, values, a, b).value, difference(entry, values, b, a).value
    assert math.isclose(there, -back, abs_tol=1e-9)
    if entry.facts.compares is None:
        apart = estimate(entry, values, a).value - estimate(entry, values, b).value
        assert math.isclose(there, apart, abs_tol=1e-9)
