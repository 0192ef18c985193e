"""Suites of facts hidden in a context, and the questions that ask for them.

Facts are invented and hidden in the user's own text, so that no model knows them and nothing is downloaded. Names that
training data is made of (``split="train"``) never occur in test items, whatever the seeds.

==================  ==============================================================================================
``needle``          one fact in a haystack, by depth and length
``multi_key``       the same among facts of the same form about others
``multi_needle``    several facts in a haystack, all asked for
``documents``       question over documents, the right one at a given position (lost in the middle)
``variables``       which variables hold a value, through chains of assignments
==================  ==============================================================================================
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from modicum.errors import RecipeError, did_you_mean, listed
from modicum.evaluate.measures.exact_match import normalize
from modicum.random import derive_seed
from modicum.types import NonNegativeInt, PositiveInt, UnitInterval

Split: TypeAlias = Literal["train", "test"]
Count: TypeAlias = Callable[[str], int]
ONSETS = ("b", "br", "c", "d", "dr", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u", "ai", "eo")
ATTRIBUTES = ("access code", "locker number", "ticket number", "room number", "order number", "file number")


@dataclass(frozen=True)
class Item:
    """One question over a context.

    Args:
        task: Suite that it belongs to.
        prompt: Context and question.
        answers: The facts to be found.
        expected: An answer as a model should give it, for fine-tuning.
        depth: Where the (first) fact stands in the context, from 0 to 1.
        length: Budget of tokens that the prompt keeps.
        match: Every answer counts its share, or any one will do.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    expected: str
    depth: float
    length: int
    match: Literal["all", "any"] = "all"


@runtime_checkable
class Suite(Protocol):
    """A function that makes one item."""

    def __call__(self, text: Haystack, rng: random.Random, *, depth: float, length: int, split: Split) -> Item: ...


class Haystack:
    """Local text, cut into sentences whose tokens are counted once.

    Args:
        text: Any prose or documentation.
        count: Tokens of a piece of text under the model's tokenizer.
    """

    def __init__(self, text: str, count: Count) -> None:
        pieces = (re.sub(r"\s+", " ", piece).strip() for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
        self.sentences = [piece for piece in pieces if 20 <= len(piece) <= 400]
        if not self.sentences:
            raise RecipeError("The haystack's text holds no sentences of 20 to 400 characters. Give it more prose.")
        self.count = count
        self._sizes: dict[int, int] = {}

    def window(self, rng: random.Random, tokens: int) -> list[str]:
        """Return consecutive sentences of at most ``tokens`` tokens, from a random place on and around the end."""
        start, found, used = rng.randrange(len(self.sentences)), [], 0
        for step in range(max(tokens, 0)):  # a sentence has at least one token
            index = (start + step) % len(self.sentences)
            if index not in self._sizes:
                self._sizes[index] = self.count(self.sentences[index] + " ")
            used += self._sizes[index]
            if used > tokens:
                break
            found.append(self.sentences[index])
        return found


def name(rng: random.Random, split: Split) -> str:
    """Return an invented name; the sets of names of the two splits are disjoint.

    Example:
        >>> name(random.Random(0), "train") != name(random.Random(0), "test")
        True
    """
    while True:
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(3)).capitalize()
        if derive_seed(0, "split", word) % 2 == (split == "test"):
            return word


def needle(text: Haystack, rng: random.Random, *, depth: UnitInterval, length: PositiveInt, split: Split) -> Item:
    """Hide one fact at ``depth`` of a haystack and ask for it."""
    return _facts("needle", text, rng, depth=depth, length=length, split=split, others=0)


def multi_key(
    text: Haystack, rng: random.Random, *, depth: UnitInterval, length: PositiveInt, split: Split, others: int = 3
) -> Item:
    """Hide one fact at ``depth`` among ``others`` of the same form, and ask for the one."""
    return _facts("multi_key", text, rng, depth=depth, length=length, split=split, others=others)


def multi_needle(
    text: Haystack, rng: random.Random, *, depth: UnitInterval, length: PositiveInt, split: Split, needles: int = 3
) -> Item:
    """Hide several facts, the first at ``depth`` and the rest anywhere, and ask for all."""
    attribute = rng.choice(ATTRIBUTES)
    facts = _distinct(rng, split, needles)
    names = ", ".join(facts)
    question = f"\n\nWhat are the {attribute}s of {names}? Answer with the numbers only, in this order.\nAnswer:"
    placed = [(depth if not i else rng.random(), _fact(attribute, *pair)) for i, pair in enumerate(facts.items())]
    prompt = _hide(text, rng, placed, question, length)
    values = tuple(facts.values())
    return Item("multi_needle", prompt, values, " " + ", ".join(values), depth, length)


def documents(
    text: Haystack, rng: random.Random, *, depth: UnitInterval, length: PositiveInt, split: Split, total: int = 10
) -> Item:
    """Ask about one of ``total`` documents; the right one stands at ``depth`` of the list."""
    attribute = rng.choice(ATTRIBUTES)
    facts = _distinct(rng, split, total)
    gold = round(depth * (total - 1))
    asked = list(facts)[gold]
    head = "Write a short answer to the question, using only the documents.\n\n"
    question = f"\n\nQuestion: What is the {attribute} of {asked}?\nAnswer:"

    def write(filler: int) -> str:
        return "\n".join(
            f"Document [{i + 1}] (Title: {who}) {' '.join([_fact(attribute, who, value), *text.window(rng, filler)])}"
            for i, (who, value) in enumerate(facts.items())
        )

    body = write(0)
    spare = length - text.count(head + body + question)
    if spare >= 0:
        # A tenth is left for tokens that join differently than they were counted.
        body = write(int(0.9 * spare / total))
    prompt = head + body + question
    _check_length(text, prompt, length)
    return Item("documents", prompt, (facts[asked],), f" {facts[asked]}", depth, length, "any")


def variables(
    text: Haystack, rng: random.Random, *, depth: UnitInterval, length: PositiveInt, split: Split, hops: int = 3
) -> Item:
    """Scatter two chains of assignments, the asked one from ``depth`` on, and ask for all variables of a value."""
    values = list(_distinct(rng, split, 2).values())
    used: set[str] = set()
    chains = []
    for _ in values:
        chain: list[str] = []
        while len(chain) <= hops:
            word = name(rng, split).upper()
            if word not in used:
                used.add(word)
                chain.append(word)
        chains.append(chain)
    placed = []
    for chain, value, begin in zip(chains, values, (depth, rng.random())):
        steps = [f"Let {chain[0]} = {value}."] + [f"Let {b} = {a}." for a, b in itertools.pairwise(chain)]
        at = sorted(begin + (1 - begin) * rng.random() for _ in steps[1:])
        placed += list(zip([begin, *at], steps))
    question = f"\n\nWhich variables hold the value {values[0]}? Name all {hops + 1} of them.\nAnswer:"
    prompt = _hide(text, rng, placed, question, length)
    return Item("variables", prompt, tuple(chains[0]), " " + ", ".join(chains[0]), depth, length)


SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "needle": needle,
        "multi_key": multi_key,
        "multi_needle": multi_needle,
        "documents": documents,
        "variables": variables,
    }
)


def make_items(
    task: str,
    text: Haystack,
    *,
    lengths: Sequence[PositiveInt],
    depths: Sequence[UnitInterval] = (0.0, 0.25, 0.5, 0.75, 1.0),
    per_cell: PositiveInt = 4,
    seed: NonNegativeInt = 0,
    split: Split = "test",
) -> list[Item]:
    """Return ``per_cell`` items for every length and depth; each depends on its own place and the seed alone.

    Example:
        >>> text = Haystack("This is a sentence about nothing. " * 20, count=lambda s: len(s.split()))
        >>> items = make_items("needle", text, lengths=[60, 90], depths=[0.0, 1.0], per_cell=2)
        >>> len(items), all(text.count(item.prompt) <= item.length for item in items)
        (8, True)
    """
    if task not in SUITES:
        raise RecipeError(f"There is no retrieval suite {task!r}. {did_you_mean(task, SUITES)}")
    return [
        SUITES[task](
            text,
            random.Random(derive_seed(seed, "retrieval", split, task, length, repr(float(depth)), number)),  # noqa: S311
            depth=depth,
            length=length,
            split=split,
        )
        for length in lengths
        for depth in depths
        for number in range(per_cell)
    ]


def score(answer: str, item: Item) -> float:
    """Return the share of the item's answers that occur in ``answer`` as whole words, or 1 if any does.

    Words are those of SQuAD's normalisation, as lost-in-the-middle defines its score.

    Example:
        >>> item = Item("multi_needle", "…", ("41", "Bravo"), "", 0.0, 100)
        >>> score("They are 41 and 410.", item)
        0.5
    """
    given, *sought = (f" {normalize(text, normalization='squad')} " for text in (answer, *item.answers))
    found = [expected in given for expected in sought]
    return float(any(found)) if item.match == "any" else sum(found) / len(found)


def read_lost_in_the_middle(rows: Iterable[Mapping[str, Any]], *, total: int | None = None) -> Iterator[Item]:
    """Yield items from the public files of multi-document QA over NQ-open.

    Args:
        rows: Objects with ``question``, ``answers`` and ``ctxs`` of ``title``, ``text`` and ``isgold``.
        total: Documents to keep, the right one among them; all when not given.
    """
    for number, row in enumerate(rows):
        try:
            contexts, question, answers = row["ctxs"][:total], row["question"], tuple(row["answers"])
            gold = next(i for i, context in enumerate(contexts) if context.get("isgold"))
            body = "\n".join(f"Document [{i + 1}] (Title: {c['title']}) {c['text']}" for i, c in enumerate(contexts))
        except (KeyError, TypeError, StopIteration) as error:
            raise RecipeError(
                f"row {number}: expected question, answers and ctxs with one isgold among the first "
                f"{total or 'documents'}, got {listed(row)} ({type(error).__name__})."
            ) from None
        head = "Write a short answer to the question, using only the documents; some of them do not bear on it.\n\n"
        depth = gold / max(len(contexts) - 1, 1)
        prompt = f"{head}{body}\n\nQuestion: {question}\nAnswer:"
        yield Item("lost_in_the_middle", prompt, answers, f" {answers[0]}", depth, len(contexts), "any")


def read_ruler(rows: Iterable[Mapping[str, Any]], *, task: str = "ruler") -> Iterator[Item]:
    """Yield items from RULER's files: objects with ``input``, ``outputs`` and ``length``.

    RULER does not say where the facts stand, so every item has depth 0.
    """
    for number, row in enumerate(rows):
        try:
            prompt = row["input"] + row.get("answer_prefix", "")
            outputs = tuple(map(str, row["outputs"]))
            length = int(row["length"])
        except (KeyError, TypeError, ValueError):
            raise RecipeError(f"row {number}: expected input, outputs and length, got {listed(row)}.") from None
        yield Item(task, prompt, outputs, " " + ", ".join(outputs), 0.0, length)


def _facts(
    task: str, text: Haystack, rng: random.Random, *, depth: float, length: int, split: Split, others: int
) -> Item:
    attribute = rng.choice(ATTRIBUTES)
    facts = _distinct(rng, split, 1 + others)
    asked, value = next(iter(facts.items()))
    question = f"\n\nWhat is the {attribute} of {asked}? Answer with the number only.\nAnswer:"
    placed = [(depth if who == asked else rng.random(), _fact(attribute, who, fact)) for who, fact in facts.items()]
    prompt = _hide(text, rng, placed, question, length)
    return Item(task, prompt, (value,), f" {value}", depth, length, "any")


def _fact(attribute: str, who: str, value: str) -> str:
    return f"The {attribute} of {who} is {value}."


def _distinct(rng: random.Random, split: Split, count: int) -> dict[str, str]:
    """Return facts about ``count`` different names, with different values."""
    found: dict[str, str] = {}
    while len(found) < count:
        value = str(rng.randrange(10_000, 100_000))
        if value not in found.values():
            found.setdefault(name(rng, split), value)
    return found


def _hide(text: Haystack, rng: random.Random, placed: Sequence[tuple[float, str]], question: str, length: int) -> str:
    """Return facts in a haystack, each after its share of the sentences, and the question behind."""
    head = "Read the text and answer the question below it.\n\n"
    fixed = text.count(head + " ".join(fact for _, fact in placed) + question)
    hay = text.window(rng, length - fixed)
    while True:
        lines: list[tuple[int, int, str]] = [(i, 1, sentence) for i, sentence in enumerate(hay)]
        lines += [(round(depth * len(hay)), 0, fact) for depth, fact in placed]
        prompt = head + " ".join(line for _, _, line in sorted(lines, key=lambda line: line[:2])) + question
        if not hay or text.count(prompt) <= length:
            break
        hay = hay[:-1]
    _check_length(text, prompt, length)
    return prompt


def _check_length(text: Haystack, prompt: str, length: int) -> None:
    if (needed := text.count(prompt)) > length:
        raise RecipeError(
            f"length {length} is too short: facts and question alone take {needed} tokens. Raise it, or ask for fewer."
        )
