"""Check recipes inside a recipe as far as can be told before any of them has run.

A stage that uses what an earlier one makes is checked on a stand-in: a model of the same shape that is there already,
which is the one that the earlier stage starts from. So whatever such a stage reads from elsewhere, its data and other
models, is looked at before hours of work, and not after.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.errors import CheckpointError, ModicumError, UnsupportedError
from modicum.jobs import plan as plan_job
from modicum.jobs.stages.references import PREFIX, named, names_in, references, stage_of
from modicum.recipe import Recipe, parse
from modicum.record import digest, read_record
from modicum.report.text import duration

if TYPE_CHECKING:
    from modicum.jobs.stages.running import Stage


def foresee(stages: Sequence[Stage], *, detailed: bool = True) -> list[str]:
    """Describe each stage, and refuse what running it would refuse.

    Args:
        stages: In an order in which each could run.
        detailed: With what each stage would do, where it depends on no other.

    Raises:
        ModicumError: A stage cannot run; it is named.
    """
    stand_ins: dict[str, str | None] = {}
    known: dict[str, list[str]] = {}
    adapters: set[str] = set()
    lines = []
    for stage in ordered(stages):
        if stage.pick is not None:
            stand_ins[stage.name] = stand_ins.get(stage.after[0])
            continue
        inner = parse(dict(stage.recipe), stage.title)
        uses = sorted({reference.removeprefix(PREFIX) for reference in references(stage.recipe)})
        shown = f"{', '.join(uses)}" if detailed else ", ".join(_titles(stage, stages))
        lines.append(f"{stage.title}: {inner.job}" + (f" after {shown}" if uses else ""))
        _refuse_adapters(stage, inner, adapters)
        try:
            told = _foreseen(stage, inner, stand_ins, known)
        except ModicumError as error:
            raise named(stage.title, error) from None
        if detailed and not uses:
            lines += [f"  {line}" for line in told]
        makes = registry.job[inner.job].facts.makes_like
        found = makes(inner) if makes else None
        if found is not None and found.startswith(PREFIX):
            found = stand_ins.get(stage_of(found))
        stand_ins[stage.name] = found
        if (registry.job[inner.job].facts.outputs(inner) or ("",))[0] == "adapter":
            adapters.add(stage.name)
    return lines


def _refuse_adapters(stage: Stage, recipe: Recipe, adapters: Collection[str]) -> None:
    """Refuse a stage that needs a whole model where an earlier one makes an adapter."""
    for reference in registry.job[recipe.job].facts.needs_whole(recipe):
        name, _, output = reference.removeprefix(PREFIX).partition("/")
        if reference.startswith(PREFIX) and name in adapters and output in ("", "adapter"):
            raise UnsupportedError(
                f"{stage.title}: {reference} is an adapter, and {recipe.job} needs a whole model. Merge it into its "
                "base first, in a stage between (job: merge)."
            )


def _foreseen(
    stage: Stage, inner: Recipe, stand_ins: Mapping[str, str | None], known: dict[str, list[str]]
) -> list[str]:
    uses = {name: stand_ins.get(name) for name in names_in(stage.recipe)}
    foreseeable = registry.job[inner.job].facts.foreseeable
    if uses and not (all(uses.values()) and foreseeable is not None and foreseeable(inner)):
        check_inputs(inner)
        return []
    recipe = _on(stage.recipe, uses)
    # Cells of a grid that differ in the seed alone, or in models of one shape, are looked at once.
    key = digest({name: value for name, value in recipe.items() if name != "seed"})
    if key not in known:
        known[key] = plan_job(parse(recipe, stage.title))
    return known[key]


def _on(value: Any, stand_ins: Mapping[str, str | None]) -> Any:
    """Put stand-ins in the place of references."""
    if isinstance(value, Mapping):
        return {key: _on(item, stand_ins) for key, item in value.items()}
    if isinstance(value, list):
        return [_on(item, stand_ins) for item in value]
    return stand_ins[stage_of(value)] if isinstance(value, str) and value.startswith(PREFIX) else value


def check_inputs(recipe: Recipe) -> None:
    """Refuse a recipe of which an input cannot be read; references to stages are left out.

    Raises:
        ModicumError: A file is missing, a package is not installed, or a name stands for nothing.
    """
    from modicum.inputs import check_readable

    check_readable(name for name in recipe.inputs() if not name.startswith(PREFIX))


def ordered(stages: Sequence[Stage]) -> list[Stage]:
    """Return stages so that each comes after those that it needs; otherwise in the order given."""
    left = {stage.name: stage for stage in stages}
    found: list[Stage] = []
    done: set[str] = set()
    while left:
        ready = [stage for stage in left.values() if done.issuperset(stage.needs)]
        if not ready:
            raise CheckpointError(f"stages {', '.join(left)} wait for each other.")
        for stage in ready:
            found.append(left.pop(stage.name))
            done.add(stage.name)
    return found


def _titles(stage: Stage, stages: Sequence[Stage]) -> Iterator[str]:
    titles = {one.name: one.title for one in stages}
    yield from (titles[name] for name in stage.needs)


def finished_in(folder: Path, names: Iterable[str]) -> dict[str, float]:
    """Return the seconds that each finished stage in a folder took."""
    took: dict[str, float] = {}
    for name in names:
        place = folder / "stages" / name
        if (place / "record.json").is_file():
            record = read_record(place)
            if record.get("status") == "done":
                took[name] = float(record.get("seconds") or 0.0)
    return took


def predicted(kinds: Mapping[str, str], folder: Path | None) -> list[str]:
    """Say how many stages are finished in a folder, and how long the others take by the pace of their kind.

    Args:
        kinds: For each stage what kind it is of: those of one kind take alike.
        folder: Of the run; ``None`` where it is not known.
    """
    took = {} if folder is None else finished_in(folder, kinds)
    left = [kind for name, kind in kinds.items() if name not in took]
    if not left:
        return [f"all {len(kinds)} are finished"]
    if not took:
        return ["no cell is finished yet, so no time can be predicted"]
    pace = {kind: [took[name] for name in took if kinds[name] == kind] for kind in kinds.values()}
    known = [statistics.median(pace[kind]) for kind in left if pace[kind]]
    unknown = sum(not pace[kind] for kind in left)
    more = f", and {unknown} of a kind that has not been run yet" if unknown else ""
    return [
        f"{len(took)} finished; the other {len(left)} take about {duration(sum(known))} of one worker{more}",
    ]
