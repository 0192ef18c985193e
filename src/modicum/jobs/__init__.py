"""Jobs: the only place that knows Trainer, data sets, files and the network.

A job is a function ``(recipe, run)`` in the file of its name; the annotation of ``recipe`` is the schema. Modules here
import their engine when they run, so that listing and checking stay instant.
"""

from __future__ import annotations

from pathlib import Path

from modicum import registry
from modicum.recipe import Recipe, dump, fingerprints, parse
from modicum.record import OnChange, Run


def execute(recipe: Recipe, folder: str | Path, *, quiet: bool = False, on_change: OnChange = "refuse") -> Run:
    """Run ``recipe`` in ``folder``, or return at once when that very run finished there before.

    Args:
        recipe: A checked recipe; see :func:`modicum.recipe.parse`.
        folder: The run folder.
        quiet: Print nothing.
        on_change: See :class:`modicum.record.Run`; jobs that work incrementally always keep.

    Raises:
        ModicumError: The user's input is wrong; nothing half-written stays.

    Example:
        >>> from modicum.recipe import parse, read
        >>> run = execute(parse(read("quickstart")), "runs/quickstart")  # doctest: +SKIP
    """
    run = open_run(recipe, folder, quiet=quiet, on_change=on_change)
    if run.done:
        run.say(f"{run.folder} is finished already: nothing to do.")
        return run
    with run:
        registry.job[recipe.job].function(recipe, run)
    return run


def open_run(recipe: Recipe, folder: str | Path, *, quiet: bool, on_change: OnChange) -> Run:
    """Return the run of ``recipe`` in ``folder``, without starting it."""
    if registry.job[recipe.job].facts.incremental:
        on_change = "keep"
    return Run(
        folder,
        job=recipe.job,
        recipe=dump(recipe),
        inputs=fingerprints(recipe),
        quiet=quiet,
        on_change=on_change,
        complete=lambda data: dump(parse(data)),
    )


def plan(recipe: Recipe) -> list[str]:
    """Return what running ``recipe`` would read, compute and write, a line each; runs nothing."""
    describe = registry.job[recipe.job].facts.plan
    return describe(recipe) if describe else []
