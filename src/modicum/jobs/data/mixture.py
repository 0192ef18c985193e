"""Rows of several dimensions in one set: by ratios, filtered by what scorers say of both answers, shuffled.

The same section and seed give the same rows everywhere. Each row carries the name of its dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.rows import Row, Rows
from modicum.jobs.data.rows import load_rows
from modicum.jobs.data.scoring import open_scorer, rehearse_scorer, score_pairs
from modicum.jobs.data.section import DataSection, Filter, Mix
from modicum.objectives.mixing import agreeing_pairs, drawn, largest_total, split_by_ratio


def mixed_rows(section: DataSection, mix: Mix, *, seed: int, note: Callable[[str], None]) -> Rows:
    """Return the rows of a mixture.

    Args:
        section: ``size`` and ``on_bad_row`` are read.
        mix: The parts and how they are mixed.
        seed: Names the draws.
        note: Told how many rows each part gives, and what a filter left of it.

    Raises:
        ModicumError: A part has no rows, too few of them or rows of another kind, or a scorer fails.
    """
    kind, rows = _read(section, mix, seed, note)
    if mix.filter is not None:
        rows = _filtered(rows, mix.filter, seed, note)
    sizes = [len(part) for part in rows.values()]
    ratios = mix.shares
    total = section.size
    if total is None:
        total = sum(sizes) if mix.repeat else largest_total(sizes, ratios)
    counts = split_by_ratio(total, ratios)
    for name, count, size in zip(rows, counts, sizes):
        if count > size and not mix.repeat:
            raise RecipeError(
                f"mix: {name} has {size} rows, and its share of {total} is {count}. Lower size, change ratios, or set "
                "repeat: true."
            )
    chosen = [
        row | {"dimension": name}
        for (name, own), count in zip(rows.items(), counts)
        for row in (own[place] for place in drawn(len(own), count, seed, name))
    ]
    if not chosen:
        raise CheckpointError(f"{section.path}: the mixture has no rows, expected at least one. Raise size.")
    note(
        f"{section.path}: "
        + ", ".join(f"{count} of {size} rows of {name}" for name, count, size in zip(rows, counts, sizes))
    )
    order = drawn(len(chosen), len(chosen), seed, "mixture")
    return Rows(kind, [chosen[place] for place in order])


def rehearse_filter(section: DataSection, *, seed: int) -> None:
    """Refuse what a filter would refuse before its model has read an answer.

    Args:
        section: Of a mixture, or of other rows, of which nothing is asked.
        seed: Names the draws.

    Raises:
        ModicumError: The parts are no pairs, or the scorer cannot read them.
    """
    mix = section.mix
    if mix is None or mix.filter is None:
        return
    _, rows = _read(section, mix, seed, lambda _: None)
    rehearse_scorer(mix.filter.scorer, rows, seed=seed)


def _read(
    section: DataSection, mix: Mix, seed: int, note: Callable[[str], None]
) -> tuple[str, Mapping[str, Sequence[Row]]]:
    """Return the kind of all rows, and those of each part."""
    parts = {name: load_rows(mix.part(name, section), seed=seed, note=note) for name in mix.parts}
    kinds = {name: part.kind for name, part in parts.items()}
    if len({*kinds.values()}) > 1:
        told = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise RecipeError(f"mix: all parts must hold rows of one kind, got {told}.")
    kind = next(iter(kinds.values()))
    if mix.filter is not None and kind != "preference":
        raise RecipeError(
            f"mix: filter compares two answers, and the parts hold {kind} rows. Give pairs, or leave it out."
        )
    return kind, {name: part.rows for name, part in parts.items()}


def _filtered(
    rows: Mapping[str, Sequence[Row]], settings: Filter, seed: int, note: Callable[[str], object]
) -> dict[str, list[Row]]:
    """Return the pairs of each part that the scorer's heads agree on, or rank highest."""
    scorer, rest = open_scorer(settings.scorer, rows, seed=seed, note=note)
    kept: dict[str, list[Row]] = {}
    for name, part in rest.items():
        margins, gates = score_pairs(part, scorer, heads=settings.heads, where=f"mix: {name}")
        if settings.weights is not None:
            gates = [settings.weights] * len(margins)
        try:
            chosen = agreeing_pairs(margins, rank=settings.rank, keep=settings.keep, gates=gates)
        except RecipeError as error:
            raise RecipeError(f"mix: {name}: {error}") from None
        if not chosen:
            raise RecipeError(
                f"mix: the filter keeps none of the {len(part)} pairs of {name}: on each, some head of the scorer "
                "finds the rejected answer as good. Use rank: mean with keep, or another scorer."
            )
        note(f"mix: the filter keeps {len(chosen)} of {len(part)} pairs of {name} (rank: {settings.rank}).")
        kept[name] = [part[place] for place in chosen]
    return kept
