"""Ten kinds of instructions whose keeping can be checked, each with an answer that keeps it and one that does not."""

from __future__ import annotations

import json
from dataclasses import dataclass

from modicum.evaluate.rows import Row
from modicum.jobs.data.made.words import ADJECTIVES, NOUNS, Draws, sentence


@dataclass(frozen=True)
class Task:
    """An instruction, an answer that keeps it, one that does not, and the check that tells them apart."""

    instruction: str
    kept: str
    broken: str
    check: Row


def _words(draws: Draws) -> Task:
    count = 4 + draws.below(9)
    words = draws.some([*ADJECTIVES, *NOUNS], count + 1)
    return Task(
        f"Answer with exactly {count} words.",
        " ".join(words[:count]),
        " ".join(words),
        {"kind": "words", "count": count},
    )


def _lower(draws: Draws) -> Task:
    said = sentence(draws)
    return Task("Write one sentence in lower case only.", said.lower(), said, {"kind": "lower_case"})


def _upper(draws: Draws) -> Task:
    said = sentence(draws)
    return Task("Write one sentence in capital letters only.", said.upper(), said, {"kind": "upper_case"})


def _no_comma(draws: Draws) -> Task:
    a, b, c = draws.some(NOUNS, 3)
    kept = f"I saw a {a} and a {b} and a {c}."
    return Task(
        "List three things that you saw, without a comma.",
        kept,
        f"I saw a {a}, a {b} and a {c}.",
        {"kind": "without", "text": ","},
    )


def _ending(draws: Draws) -> Task:
    said, word = sentence(draws), draws.one(NOUNS)
    kept = f"{said} Now comes the {word}"
    return Task(f"End your answer with the word {word}.", kept, f"{kept} again", {"kind": "ends_with", "text": word})


def _beginning(draws: Draws) -> Task:
    said, word = sentence(draws), draws.one(ADJECTIVES).capitalize()
    kept = f"{word} it is. {said}"
    return Task(f"Begin your answer with the word {word}.", kept, f"So {kept}", {"kind": "begins_with", "text": word})


def _json(draws: Draws) -> Task:
    key, value = draws.some(NOUNS, 2)
    kept = json.dumps({key: value})
    return Task(f"Answer as JSON with one key, {key}.", kept, f"{key}: {value}", {"kind": "json", "keys": [key]})


def _sentences(draws: Draws) -> Task:
    count = 2 + draws.below(2)
    said = [sentence(draws) for _ in range(count + 1)]
    kept = " ".join(said[:count])
    return Task(f"Answer in exactly {count} sentences.", kept, " ".join(said), {"kind": "sentences", "count": count})


def _repeated(draws: Draws) -> Task:
    word, count = draws.one(NOUNS), 2 + draws.below(3)
    kept = " and ".join([f"a {word}"] * count)
    wanted = f"Mention the word {word} exactly {count} times."
    return Task(
        wanted,
        f"I see {kept}.",
        f"I see {kept} and another {word}.",
        {"kind": "mentions", "text": word, "count": count},
    )


def _list(draws: Draws) -> Task:
    count = 3 + draws.below(3)
    items = draws.some(NOUNS, count)
    kept = "\n".join(f"- {item}" for item in items)
    wanted = f"Make a list of {count} lines, each of which begins with a hyphen."
    return Task(wanted, kept, ", ".join(items), {"kind": "lines", "count": count, "prefix": "-"})


KINDS = (_words, _lower, _upper, _no_comma, _ending, _beginning, _json, _sentences, _repeated, _list)


def instructions(split: str, size: int, seed: int) -> list[Row]:
    """Return pairs for ten kinds of instructions in turn, with what :mod:`modicum.evaluate.checks` asks of an answer.

    Example:
        >>> instructions("train", 1, 0)[0]["prompt"].startswith("Answer with exactly")
        True
    """
    found: list[Row] = []
    for number in range(size):
        draws = Draws("instructions", split, number, seed=seed)
        task = KINDS[number % len(KINDS)](draws)
        subject = f"Topic: the {draws.one(ADJECTIVES)} {draws.one(NOUNS)} number {number} of {split}."
        row = {"prompt": f"{task.instruction} {subject}", "chosen": task.kept, "rejected": task.broken}
        found.append(row | {"checks": [task.check]})
    return found
