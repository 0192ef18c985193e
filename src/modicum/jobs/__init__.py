"""Jobs: the only place that knows Trainer, data sets, files and the network.

A job is a function ``(recipe, run)`` in the file of its name; the annotation of ``recipe`` is the schema. Modules here
import their engine when they run, so that listing and checking stay instant.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from modicum import lock, registry
from modicum.durable import commit, full_disks_told
from modicum.errors import CheckpointError
from modicum.recipe import Recipe, dump, inputs_of, parse
from modicum.record import OnChange, Run
from modicum.stored import damage, stored_recipe


def execute(recipe: Recipe, folder: str | Path, *, quiet: bool = False, on_change: OnChange = "refuse") -> Run:
    """Run ``recipe`` in ``folder``, or return at once when that very run finished there before.

    Args:
        recipe: A checked recipe; see :func:`modicum.recipe.parse`.
        folder: The run folder.
        quiet: Print nothing.
        on_change: What to do when the folder holds the run of another recipe: refuse; replace it, once this one is
            done; or keep what is there. Jobs that work incrementally always keep.

    Raises:
        ModicumError: The user's input is wrong; nothing half-written stays.

    Example:
        >>> from modicum.recipe import parse, read
        >>> run = execute(parse(read("quickstart")), "runs/quickstart")  # doctest: +SKIP
    """
    run = open_run(recipe, folder, quiet=quiet, on_change="keep" if on_change == "replace" else on_change)
    if run.done and not damage(run.folder, run.record):
        run.say(f"{run.folder} is finished already: nothing to do.")
        return run
    if run.foreign and on_change == "replace":
        return _replace(recipe, run)
    if on_change == "replace" and run.main:
        shutil.rmtree(_beside(run.folder), ignore_errors=True)  # of a recipe that was changed back
    with run, full_disks_told(run.folder):
        registry.job[recipe.job].function(recipe, run)
    return run


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.next")


def _replace(recipe: Recipe, other: Run) -> Run:
    """Run ``recipe`` beside the run of another one, whose place it takes once it is done."""
    folder, quiet = other.folder, other.quiet
    beside = _beside(folder)
    run = open_run(recipe, beside, quiet=quiet, on_change="replace", home=folder)
    if not run.done or damage(beside, run.record):
        with run, full_disks_told(run.folder):
            registry.job[recipe.job].function(recipe, run)
    if run.main:
        with lock.hold(folder / lock.NAME, folder):
            commit(beside, folder)
    return open_run(recipe, folder, quiet=quiet, on_change="keep")


def open_run(recipe: Recipe, folder: str | Path, *, quiet: bool, on_change: OnChange, home: Path | None = None) -> Run:
    """Return the run of ``recipe`` in ``folder``, without starting it.

    Raises:
        CheckpointError: The folder holds something that this run must not touch.
    """
    goes_on = registry.job[recipe.job].facts.incremental
    if goes_on is not None:
        on_change = "keep"
        if (stored := stored_recipe(folder)) is not None and not goes_on(stored, recipe):
            raise CheckpointError(
                f"{folder} holds the run of another recipe (job {stored.get('job')}), which a {recipe.job} does not "
                "overwrite. Choose another --out, or delete the folder."
            )
    return Run(
        folder,
        job=recipe.job,
        recipe=dump(recipe),
        inputs=inputs_of(recipe),
        quiet=quiet,
        on_change=on_change,
        complete=lambda data: dump(parse(data)),
        home=home,
    )


def plan(recipe: Recipe) -> list[str]:
    """Return what running ``recipe`` would read, compute and write, a line each; runs nothing."""
    describe = registry.job[recipe.job].facts.plan
    return describe(recipe) if describe else []
