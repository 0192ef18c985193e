"""A job that waits, for tests of what runs jobs; processes that a test starts know it, too."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from modicum import registry
from modicum.job_facts import JobFacts
from modicum.recipe import Recipe
from modicum.record import Run
from modicum.registry import Entry

HERE = str(Path(__file__).parent)


class WaitRecipe(Recipe):
    """How long to wait, and what goes wrong."""

    job: Literal["wait"] = "wait"
    log: str
    seconds: float = 0.0
    hold: str | None = None  # it waits while there is such a file
    value: float = 0.0
    after: list[str] = Field(default=[])
    kill: str | None = None  # the first process that finds no such file makes it and is killed
    refuse: bool = False


def work(recipe: WaitRecipe, run: Run) -> None:
    """Note that the work began and ended, and wait in between."""
    note(recipe, "begins")
    if recipe.kill is not None and not Path(recipe.kill).exists():
        with suppress(OSError):
            Path(recipe.kill).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if recipe.refuse:
        from modicum.errors import RecipeError

        raise RecipeError("told to refuse.")
    time.sleep(recipe.seconds)
    while recipe.hold is not None and Path(recipe.hold).exists():
        time.sleep(0.02)
    (run.folder / "made").write_text(f"{recipe.value} {recipe.seed} {len(recipe.after)}")
    run.record["metrics"] = {"value": recipe.value, "seed": recipe.seed}
    run.output("made", run.folder / "made")
    note(recipe, "ends")


def note(recipe: WaitRecipe, what: str) -> None:
    """Append a line, in one write."""
    with Path(recipe.log).open("a") as file:
        file.write(f"{what} {recipe.value:g}/{recipe.seed} {os.getpid()}\n")


def lines(log: Path) -> list[tuple[str, str, str]]:
    """Return what was noted: begins or ends, which cell, which process."""
    return [tuple(line.split(" ")) for line in log.read_text().splitlines()]  # type: ignore[misc]


def together(log: Path) -> int:
    """Return how many cells were at work at the same time, at most."""
    now = most = 0
    for what, _, _ in lines(log):
        now += 1 if what == "begins" else -1
        most = max(most, now)
    return most


def know_the_job(folder: Path) -> dict[str, str]:
    """Return an environment in which every Python process knows the job."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text("import waiting\n\nwaiting.register()\n")
    path = os.pathsep.join(filter(None, (str(folder), HERE, os.environ.get("PYTHONPATH"), *_sources())))
    return {"PYTHONPATH": path}


def _sources() -> list[str]:
    import modicum

    return [str(Path(modicum.__file__).parents[1])]


ENTRY = Entry("job", "wait", work, JobFacts())


def register() -> None:
    """Make the job known in this process."""
    registry.job._entries["wait"] = ENTRY
