"""Pairs of answers that are made from a seed: instructions whose keeping can be checked, and questions without answer.

The chosen and the rejected answer differ in the one thing that is asked for, so a pair teaches that thing alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from modicum.random import derive_seed

ADJECTIVES = "quiet old bright small heavy green patient careful early narrow gentle distant".split()  # noqa: SIM905
NOUNS = "river baker window garden teacher train letter mountain clock sailor market bridge".split()  # noqa: SIM905
VERBS = "follows paints remembers crosses finds repairs watches carries".split()  # noqa: SIM905
NAMES = "Ada Boris Chen Dara Emil Fatima Goran Hana Ivo Jun Kofi Lena Mila Nils Olga Priya".split()  # noqa: SIM905
RECORD = {
    "city": ("Oslo", "Lima", "Kyoto", "Accra", "Porto", "Quito", "Turku", "Galway"),
    "age": tuple(map(str, range(21, 69))),
    "job": ("baker", "pilot", "nurse", "carpenter", "librarian", "welder", "teacher", "gardener"),
    "pet": ("a parrot", "two cats", "a tortoise", "a beagle", "no pet", "a goldfish"),
    "instrument": ("the cello", "the drums", "the flute", "the piano", "the accordion"),
    "colour": ("green", "blue", "orange", "violet", "grey"),
}
ASKED = {  # by split: the wording of the test is not that of the training
    "train": (
        "What is {name}'s {field}?",
        "Tell me {name}'s {field}.",
        "According to the record, what {field} has {name}?",
    ),
    "test": ("Which {field} does the record give for {name}?", "{name}: {field}?", "Look up the {field} of {name}."),
}
DECLINED = "That is not in the record."


class Draws:
    """A stream of choices named by seed, split and row."""

    def __init__(self, *names: str | int, seed: int) -> None:
        self._rng = Random(derive_seed(seed, "pairs", *names))  # noqa: S311  # no secret, and no torch to import

    def below(self, limit: int) -> int:
        """Return a number from 0 to ``limit - 1``."""
        return self._rng.randrange(limit)

    def one(self, items: Sequence[str]) -> str:
        """Return one of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[str], count: int) -> list[str]:
        """Return different items."""
        return self._rng.sample(list(items), count)


@dataclass(frozen=True)
class Task:
    """An instruction, an answer that keeps it, one that does not, and the check that tells them apart."""

    instruction: str
    kept: str
    broken: str
    check: Callable[[str], bool]


def sentence(draws: Draws) -> str:
    """Return a sentence of seven words and a full stop."""
    a, b = draws.some(ADJECTIVES, 2)
    x, y = draws.some(NOUNS, 2)
    return f"The {a} {x} {draws.one(VERBS)} the {b} {y}."


def _words(draws: Draws) -> Task:
    count = 4 + draws.below(9)
    words = draws.some([*ADJECTIVES, *NOUNS], count + 1)
    return Task(
        f"Answer with exactly {count} words.",
        " ".join(words[:count]),
        " ".join(words),
        lambda x: len(x.split()) == count,
    )


def _lower(draws: Draws) -> Task:
    said = sentence(draws)
    return Task("Write one sentence in lower case only.", said.lower(), said, lambda x: x == x.lower())


def _upper(draws: Draws) -> Task:
    said = sentence(draws)
    return Task("Write one sentence in capital letters only.", said.upper(), said, lambda x: x == x.upper())


def _no_comma(draws: Draws) -> Task:
    a, b, c = draws.some(NOUNS, 3)
    kept = f"I saw a {a} and a {b} and a {c}."
    return Task(
        "List three things that you saw, without a comma.",
        kept,
        f"I saw a {a}, a {b} and a {c}.",
        lambda x: "," not in x,
    )


def _ending(draws: Draws) -> Task:
    said, word = sentence(draws), draws.one(NOUNS)
    kept = f"{said} Now comes the {word}"
    return Task(f"End your answer with the word {word}.", kept, f"{kept} again", lambda x: x.split()[-1] == word)


def _beginning(draws: Draws) -> Task:
    said, word = sentence(draws), draws.one(ADJECTIVES).capitalize()
    kept = f"{word} it is. {said}"
    return Task(f"Begin your answer with the word {word}.", kept, f"So {kept}", lambda x: x.split()[0] == word)


def _json(draws: Draws) -> Task:
    key, value = draws.some(NOUNS, 2)
    kept = json.dumps({key: value})
    return Task(f"Answer as JSON with one key, {key}.", kept, f"{key}: {value}", _is_json)


def _sentences(draws: Draws) -> Task:
    count = 2 + draws.below(2)
    said = [sentence(draws) for _ in range(count + 1)]
    kept = " ".join(said[:count])
    return Task(f"Answer in exactly {count} sentences.", kept, " ".join(said), lambda x: x.count(".") == count)


def _repeated(draws: Draws) -> Task:
    word, count = draws.one(NOUNS), 2 + draws.below(3)
    kept = " and ".join([f"a {word}"] * count)
    wanted = f"Mention the word {word} exactly {count} times."
    return Task(wanted, f"I see {kept}.", f"I see {kept} and another {word}.", lambda x: x.count(word) == count)


def _list(draws: Draws) -> Task:
    count = 3 + draws.below(3)
    items = draws.some(NOUNS, count)
    kept = "\n".join(f"- {item}" for item in items)
    wanted = f"Make a list of {count} lines, each of which begins with a hyphen."
    return Task(wanted, kept, ", ".join(items), lambda x: [line[:2] for line in x.split("\n")] == ["- "] * count)


KINDS = (_words, _lower, _upper, _no_comma, _ending, _beginning, _json, _sentences, _repeated, _list)


def instructions(split: str, size: int, seed: int) -> list[dict[str, str]]:
    """Return pairs for ten kinds of instructions in turn, as rows of preferences.

    Example:
        >>> instructions("train", 1, 0)[0]["prompt"].startswith("Answer with exactly")
        True
    """
    found = []
    for number in range(size):
        draws = Draws("instructions", split, number, seed=seed)
        task = KINDS[number % len(KINDS)](draws)
        subject = f"Topic: the {draws.one(ADJECTIVES)} {draws.one(NOUNS)} number {number} of {split}."
        found.append({"prompt": f"{task.instruction} {subject}", "chosen": task.kept, "rejected": task.broken})
    return found


def unanswerable(split: str, size: int, seed: int) -> list[dict[str, str]]:
    """Return pairs on made-up records; to every other question the record has no answer, and declining is chosen.

    Example:
        >>> [row["chosen"] == "That is not in the record." for row in unanswerable("train", 4, 0)]
        [False, True, False, True]
    """
    wordings = ASKED["train" if split == "train" else "test"]
    found = []
    for number in range(size):
        draws = Draws("unanswerable", split, number, seed=seed)
        name = f"{draws.one(NAMES)} {draws.one(NAMES)}son"
        fields = draws.some(list(RECORD), 4)
        known = {field: draws.one(RECORD[field]) for field in fields[:3]}
        record = f"Record {number} ({split}). Name: {name}. " + " ".join(
            f"{k.capitalize()}: {v}." for k, v in known.items()
        )
        field = fields[3] if number % 2 else fields[0]
        value = draws.one(RECORD[field]) if number % 2 else known[field]
        told = f"{name}'s {field} is {value}."
        chosen, rejected = (DECLINED, told) if number % 2 else (told, DECLINED)
        question = draws.one(wordings).format(name=name, field=field)
        found.append({"prompt": f"{record}\n{question}", "chosen": chosen, "rejected": rejected})
    return found


MADE: Mapping[str, Callable[[str, int, int], list[dict[str, str]]]] = {
    "instructions": instructions,
    "unanswerable": unanswerable,
}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
