"""Whether stages that evaluate ask what the models behind them have learned in stages before."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from modicum.errors import ModicumError
from modicum.jobs.data.overlap import check_apart
from modicum.jobs.data.rows import load_rows
from modicum.jobs.stages.references import PREFIX, names_in
from modicum.recipe import parse
from modicum.record import digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.evaluate.rows import Rows
    from modicum.jobs.stages.running import Stage


def refuse_taught(stages: Sequence[Stage], *, finished: Collection[str] = ()) -> None:
    """Refuse an evaluation whose questions a training behind one of its models teaches.

    Args:
        stages: Of a grid.
        finished: Stages that are not looked at again.

    Raises:
        RecipeError: A question stands in both; the stages and both rows are shown.

    Cost:
        Each data set is read once, however many stages use it; what no file holds yet is left to its own stage.
    """
    by_name = {stage.name: stage for stage in stages}
    read = _Reader()
    compared: set[tuple[str, str]] = set()
    for stage in stages:
        if stage.recipe.get("job") != "evaluate" or stage.name in finished:
            continue
        asked = read.tasks(stage)
        for training in dict.fromkeys(_trainings(names_in(stage.recipe.get("models")), by_name)):
            key, taught = read.training(by_name[training])
            for name, (task, rows) in asked.items():
                if taught is None or rows is None or (key, task) in compared:
                    continue
                compared.add((key, task))
                names = (f"the data of {by_name[training].title!r}", f"tasks.{name} of {stage.title!r}")
                check_apart(taught, rows, names=names)


def _trainings(names: Sequence[str], stages: Mapping[str, Stage]) -> Iterator[str]:
    """Yield the trainings behind some models, whatever merges and choices lie between."""
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or stages[name].recipe.get("job") == "evaluate":  # a choice waits for its judges as well
            continue
        seen.add(name)
        waiting += stages[name].needs
        if stages[name].recipe.get("job") == "train":
            yield name


class _Reader:
    """Rows of stages, each set read once."""

    def __init__(self) -> None:
        self._rows: dict[str, Rows | None] = {}
        self._asked: dict[str, dict[str, tuple[str, Rows | None]]] = {}
        self._learned: dict[str, tuple[str, Rows | None]] = {}

    def tasks(self, stage: Stage) -> dict[str, tuple[str, Rows | None]]:
        """Return the rows of each task, and what the rows are known by."""
        key = digest([stage.recipe.get("tasks"), stage.recipe.get("seed")])
        if key not in self._asked:
            recipe: Any = parse(dict(stage.recipe), stage.title)
            self._asked[key] = {
                name: self._once(
                    [task.kind, task.model_dump(), recipe.seed], partial(task.rows, recipe.seed), task.data
                )
                for name, task in recipe.tasks.items()
            }
        return self._asked[key]

    def training(self, stage: Stage) -> tuple[str, Rows | None]:
        """Return the rows that a training learns from; those of a filter by a model before it is asked."""
        if stage.name not in self._learned:
            recipe: Any = parse(dict(stage.recipe), stage.title)
            section = recipe.data.unscored(lambda _: None)
            load = partial(load_rows, section, seed=recipe.seed)
            self._learned[stage.name] = self._once([section.model_dump(), recipe.seed], load, section)
        return self._learned[stage.name]

    def _once(self, what: Any, load: Callable[[], Rows], section: Any) -> tuple[str, Rows | None]:
        key = digest(what)
        if key not in self._rows:
            try:
                self._rows[key] = None if section.path.startswith(PREFIX) else load()
            except ModicumError:  # the stage itself says so
                self._rows[key] = None
        return key, self._rows[key]
