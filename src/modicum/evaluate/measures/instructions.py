"""Whether answers keep instructions that a program can check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modicum.evaluate.checks import kept
from modicum.evaluate.intervals import Estimate, paired_proportions, wilson
from modicum.evaluate.measures.exact_match import answer_work
from modicum.evaluate.rows import Rows
from modicum.evaluate.subject import Result, Subject
from modicum.registry import measure
from modicum.types import PositiveInt


def _share(items: Sequence[Result], *, level: float) -> Estimate:
    return wilson(sum(item["correct"] for item in items), len(items), level=level)


def _difference(a: Sequence[Result], b: Sequence[Result], *, level: float) -> Estimate:
    return paired_proportions(*([bool(item["correct"]) for item in items] for items in (a, b)), level=level)


def _details(items: Sequence[Result]) -> dict[str, Any]:
    """Return the share that is kept of each kind, and of all single instructions."""
    kinds: dict[str, list[bool]] = {}
    for item in items:
        for kind, done in item["kept"]:
            kinds.setdefault(kind, []).append(done)
    every = [done for found in kinds.values() for done in found]
    single = round(sum(every) / len(every), 6)
    return {
        "beside": {"single instructions kept": single},
        "kinds": {kind: round(sum(found) / len(found), 6) for kind, found in sorted(kinds.items())},
        "single": single,
        "words": round(sum(len(item["text"].split()) for item in items) / len(items), 3),
    }


@measure(
    "instructions",
    laws={"right_is_better"},
    rows="instruction",
    metric="kept",
    better="higher",
    unit="share",
    data={"path": "task:instructions", "split": "test", "size": 50},
    estimate=_share,
    difference=_difference,
    details=_details,
    work=answer_work,
)
def instructions(
    rows: Rows, subject: Subject, *, max_new_tokens: PositiveInt = 64, batch_size: PositiveInt = 16
) -> list[Result]:
    """Generate an answer to each prompt; the share of answers that keep all instructions of theirs.

    Args:
        rows: Prompts with checks; see :func:`modicum.evaluate.checks.kept`.
        subject: The model.
        max_new_tokens: Limit on an answer.
        batch_size: Prompts at a time.

    Returns:
        For each row the text, the kind of each instruction with whether it is kept, and whether all are.

    Example:
        >>> from types import SimpleNamespace
        >>> rows = Rows("instruction", [{"prompt": "Two words.", "checks": [{"kind": "words", "count": 2}]}])
        >>> brief = SimpleNamespace(generate=lambda rows, **_: ["Good morning."])
        >>> [item["correct"] for item in instructions(rows, brief)]
        [True]

    Cost:
        One generation a row.

    Deviates:
        The kinds of instructions are ours, after the published ones.

    Reference:
        J. Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023, arXiv:2311.07911; strict
        accuracy by prompt.
    """
    texts = subject.generate(rows.rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    items: list[Result] = []
    for index, (row, text) in enumerate(zip(rows.rows, texts, strict=True)):
        found = [[check["kind"], kept(check, text)] for check in row["checks"]]
        items.append({"index": index, "text": text, "kept": found, "correct": all(done for _, done in found)})
    return items
