"""Questions on made-up records, half of which hold no answer."""

from __future__ import annotations

from modicum.evaluate.rows import Row
from modicum.jobs.data.made.words import Draws

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


def unanswerable(split: str, size: int, seed: int) -> list[Row]:
    """Return pairs on made-up records; to every other question the record has no answer, and declining is chosen.

    ``answers`` holds what is right; nothing where the record has no answer.

    Example:
        >>> [row["chosen"] == "That is not in the record." for row in unanswerable("train", 4, 0)]
        [False, True, False, True]
    """
    wordings = ASKED["train" if split == "train" else "test"]
    found: list[Row] = []
    for number in range(size):
        draws = Draws("unanswerable", split, number, seed=seed)
        name = f"{draws.one(NAMES)} {draws.one(NAMES)}son"
        fields = draws.some(list(RECORD), 4)
        known = {field: draws.one(RECORD[field]) for field in fields[:3]}
        record = f"Record {number} ({split}). Name: {name}. " + " ".join(
            f"{k.capitalize()}: {v}." for k, v in known.items()
        )
        field = fields[3] if number % 2 else draws.one(fields[:3])
        value = draws.one(RECORD[field]) if number % 2 else known[field]
        told = f"{name}'s {field} is {value}."
        chosen, rejected = (DECLINED, told) if number % 2 else (told, DECLINED)
        question = draws.one(wordings).format(name=name, field=field)
        row = {"prompt": f"{record}\n{question}", "chosen": chosen, "rejected": rejected}
        found.append(row | {"answers": [] if number % 2 else [value]})
    return found
