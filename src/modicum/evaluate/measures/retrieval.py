"""Retrieval: does the model find a fact in its context, wherever the fact stands?

The suites are those of :mod:`modicum.evaluate.hidden_facts`, made in the user's own text, or the public files of
lost-in-the-middle and RULER where the user has them. Items are the same for every model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from modicum.errors import RecipeError
from modicum.evaluate.hidden_facts import Haystack, Item, make_items, read_lost_in_the_middle, read_ruler, score
from modicum.evaluate.intervals import Estimate, mean, mean_score
from modicum.evaluate.measures.exact_match import answer_work, check_pattern, exact_match_measure
from modicum.evaluate.rows import Rows
from modicum.evaluate.subject import Result, Subject
from modicum.registry import measure
from modicum.types import PositiveInt, UnitInterval

__all__ = ["Grid", "Haystack", "Item", "grids", "make_items", "read_lost_in_the_middle", "read_ruler", "score"]

Reader: TypeAlias = Callable[[Iterator[Mapping[str, Any]]], Iterator[Item]]
FROM_FILES: Mapping[str, Reader] = MappingProxyType(
    {"lost_in_the_middle": read_lost_in_the_middle, "ruler": read_ruler}
)


def _check(*, suite: str, file: str | None, answer: str | None) -> None:
    if (suite in FROM_FILES) != (file is not None):
        raise RecipeError("set file for the suites lost_in_the_middle and ruler, and for no other")
    check_pattern(answer=answer)


def _questions(
    load: Callable[[], Rows],
    *,
    suite: Literal["needle", "multi_key", "multi_needle", "documents", "variables", "lost_in_the_middle", "ruler"],
    file: str | None = None,
    lengths: tuple[PositiveInt, ...] = (256, 512),
    depths: tuple[UnitInterval, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    per_cell: PositiveInt = 4,
    tokenizer: str | None = None,
    seed: int,
    tokens_of: Callable[[str], Callable[[str], int]],
    read_lines: Callable[[str], Iterator[Mapping[str, Any]]],
) -> Rows:
    """Return prompts with their answers, depth and length, and a scorer of answers."""
    if file is not None:
        items = list(FROM_FILES[suite](read_lines(file)))
    else:
        text = "\n\n".join(row["text"] for row in load().rows)
        # Without a tokenizer a token is taken to be four characters.
        count = tokens_of(tokenizer) if tokenizer is not None else (lambda text: (len(text) + 3) // 4)
        items = make_items(suite, Haystack(text, count), lengths=lengths, depths=depths, per_cell=per_cell, seed=seed)
    rows = [
        {"prompt": i.prompt, "completion": i.expected.strip(), "depth": round(i.depth, 4), "length": i.length}
        for i in items
    ]
    return Rows("completion", rows, lambda index, answer: score(answer, items[index]))


def _recall(items: Sequence[Result], *, level: float) -> Estimate:
    return mean_score([float(item["score"]) for item in items], level=level)


def _difference(a: Sequence[Result], b: Sequence[Result], *, level: float) -> Estimate:
    return mean([x["score"] - y["score"] for x, y in zip(a, b, strict=True)], level=level)


def _by_place(items: Sequence[Result]) -> dict[str, Any]:
    """Return mean scores by depth (rows) and length (columns), as the report draws them."""
    [grid] = grids([_Place(item["depth"], item["length"]) for item in items], [item["score"] for item in items])
    return {"grid": {"depths": grid.depths, "lengths": grid.lengths, "values": grid.values, "counts": grid.counts}}


@measure(
    "retrieval",
    laws={"right_is_better"},
    rows="text",
    data={"path": "builtin:python-stdlib", "split": "test"},
    metric="recall",
    better="higher",
    unit="share",
    prepare=_questions,
    estimate=_recall,
    difference=_difference,
    details=_by_place,
    work=answer_work,
    check=_check,
    reads=("file", "tokenizer"),
)
def retrieval(
    rows: Rows,
    subject: Subject,
    *,
    max_new_tokens: PositiveInt = 48,
    batch_size: PositiveInt = 4,
    answer: str | None = None,
) -> list[Result]:
    r"""Hide facts in a context and ask for them; the share of answers that are found, by depth and length.

    .. math:: \text{recall} = \frac{1}{n} \sum_i \frac{|\text{answers found}_i|}{|\text{answers}_i|}

    Args:
        rows: Questions.
        subject: The model.
        max_new_tokens: Limit on an answer.
        batch_size: Questions at a time.
        answer: Regular expression whose group is the answer; the last match counts.
        suite: Which suite of questions.
        file: A ``jsonl`` or ``jsonl.gz`` file, for ``lost_in_the_middle`` and ``ruler``.
        lengths: Tokens that context and question may take.
        depths: Where in the context the fact stands, from 0, the beginning, to 1.
        per_cell: Questions for each length and depth.
        tokenizer: Model whose tokens ``lengths`` count; four characters make a token when not given.

    Example:
        >>> from modicum.registry import measure
        >>> measure["retrieval"].facts.unit
        'share'

    Cost:
        One generation for each of ``len(lengths) * len(depths) * per_cell`` questions.

    Deviates:
        The suites are made in local text after the forms of the published ones, whose files can be read instead.

    Reference:
        N. F. Liu et al., "Lost in the Middle", arXiv:2307.03172; C.-P. Hsieh et al., "RULER", arXiv:2404.06654.
    """
    found = exact_match_measure(rows, subject, max_new_tokens=max_new_tokens, batch_size=batch_size, answer=answer)
    return [item | {key: rows.rows[item["index"]][key] for key in ("depth", "length")} for item in found]


@dataclass(frozen=True)
class Grid:
    """Mean scores of one task by depth (rows) and length (columns); ``None`` where nothing was asked."""

    task: str
    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]
    counts: tuple[tuple[int, ...], ...]


@runtime_checkable
class Placed(Protocol):
    """Anything with a place in a grid."""

    @property
    def task(self) -> str: ...
    @property
    def depth(self) -> float: ...
    @property
    def length(self) -> int: ...


def grids(items: Sequence[Placed], scores: Sequence[float]) -> list[Grid]:
    """Return the mean score of each task, depth and length.

    Example:
        >>> items = [Item("needle", "", ("1",), "", depth, 64) for depth in (0.0, 0.0, 1.0)]
        >>> grids(items, [1.0, 0.0, 1.0])[0].values
        ((0.5,), (1.0,))
    """
    if len(items) != len(scores):
        raise RecipeError(f"{len(scores)} scores for {len(items)} items: expected one each.")
    found = []
    for task in dict.fromkeys(item.task for item in items):
        own = [(item, s) for item, s in zip(items, scores) if item.task == task]
        depths = tuple(sorted({item.depth for item, _ in own}))
        lengths = tuple(sorted({item.length for item, _ in own}))
        cells = [[[s for i, s in own if (i.depth, i.length) == (d, n)] for n in lengths] for d in depths]
        values = tuple(tuple(sum(cell) / len(cell) if cell else None for cell in row) for row in cells)
        found.append(Grid(task, depths, lengths, values, tuple(tuple(map(len, row)) for row in cells)))
    return found


class _Place(NamedTuple):
    depth: float
    length: int
    task: str = ""
