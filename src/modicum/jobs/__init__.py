"""Jobs: the only place that knows Trainer, data sets, files and the network.

A job is a function ``(recipe, run)`` in the file of its name; the annotation of ``recipe`` is the schema. Modules here
import their engine when they run, so that listing and checking stay instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modicum import lock, processes, registry
from modicum.borders import expanded
from modicum.content import MODELS
from modicum.durable import commit, full_disks_told, remove, restore
from modicum.errors import CheckpointError, RecipeError
from modicum.inputs import check_readable
from modicum.recipe import Recipe, Section, dump, inputs_of, parse
from modicum.record import OnChange, Run
from modicum.shortage import shortage_told
from modicum.stored import damage, stored_recipe


def execute(
    recipe: Recipe,
    folder: str | Path,
    *,
    quiet: bool = False,
    on_change: OnChange = "refuse",
    on: str | None = None,
    workers: int | None = None,
) -> Run:
    """Run ``recipe`` in ``folder``, or return at once when that very run finished there before.

    Args:
        recipe: A checked recipe; see :func:`modicum.recipe.parse`.
        folder: The run folder.
        quiet: Print nothing.
        on_change: What to do when the folder holds the run of another recipe: refuse; replace it, once this one is
            done; or keep what is there. Jobs that work incrementally always keep.
        on: Executor of the stages of a pipeline or grid; see :mod:`modicum.jobs.executors`.
        workers: How many stages run at a time.

    Raises:
        ModicumError: The user's input is wrong; nothing half-written stays.

    Example:
        >>> from modicum.recipe import parse, read
        >>> run = execute(parse(read("quickstart")), "runs/quickstart")  # doctest: +SKIP
    """
    facts = registry.job[recipe.job].facts
    if not facts.spreads and (on is not None or workers is not None):
        raise RecipeError(f"--on and --workers spread the stages of a pipeline or grid; a {recipe.job} has none.")
    if on_change == "replace":
        restore(Path(folder))  # a kill while another run took the place of this one; each process must see the same
    run = open_run(recipe, folder, quiet=quiet, on_change="keep" if on_change == "replace" else on_change)
    run.on, run.workers = on, workers
    if on_change == "replace" and not run.foreign:
        settle(run.folder)
    if run.done and not damage(run.folder, run.record):
        run.tidy()
        run.say(f"{run.folder} is finished already: nothing to do.")
        return run
    check_devices(recipe)
    if run.foreign and on_change == "replace":
        return _replace(recipe, run)
    with run, full_disks_told(run.folder), shortage_told(facts.lighter):
        registry.job[recipe.job].function(recipe, run)
    if not run.helps:
        return run
    # The first process sums up what all have done; should it have died, this one does.
    lock.wait_until_free(run.folder / lock.NAME)
    return execute(recipe, folder, quiet=quiet, on_change=on_change, on=on, workers=workers)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.next")


def settle(folder: Path) -> None:
    """Remove what lies beside the run that belongs in ``folder``: of a recipe that was changed back, or replaced."""
    if processes.main():
        restore(folder)
        remove(_beside(folder))


def _replace(recipe: Recipe, other: Run) -> Run:
    """Run ``recipe`` beside the run of another one, whose place it takes once it is done."""
    folder, quiet = other.folder, other.quiet
    beside = _beside(folder)
    run = open_run(recipe, beside, quiet=quiet, on_change="replace", home=folder)
    if not run.done or damage(beside, run.record):
        with run, full_disks_told(run.folder), shortage_told(registry.job[recipe.job].facts.lighter):
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
    facts = registry.job[recipe.job].facts
    goes_on = facts.incremental
    _keep_apart(recipe, home or Path(folder))
    run = Run(
        folder,
        job=recipe.job,
        recipe=dump(recipe),
        inputs=inputs_of(recipe),
        quiet=quiet,
        on_change="keep" if goes_on is not None else on_change,
        complete=lambda data: dump(parse(data)),
        home=home,
        shared=facts.shared,
    )
    # A run that was stopped before it wrote its recipe is known by its record.
    if goes_on is not None and run.foreign:
        stored = stored_recipe(folder)
        if stored is not None and not goes_on(stored, recipe):
            raise CheckpointError(
                f"{folder} holds the run of another recipe (job {stored.get('job')}), which a {recipe.job} does not "
                "overwrite. Choose another --out, or delete the folder."
            )
    return run


def _keep_apart(recipe: Recipe, folder: Path) -> None:
    """Refuse a run in a folder of its own data, which it would change and read; and an input that the run holds.

    Raises:
        CheckpointError: They are not apart.
    """
    try:
        place = folder.resolve()
        paths = {name: expanded(name) for name in recipe.inputs()}
        found = {name: path.resolve() for name, path in paths.items() if path.exists()}
    except (OSError, ValueError, RuntimeError):
        return  # a name that no file can have; whoever reads it says so
    holds = registry.job[recipe.job].facts.incremental is None
    for name, path in found.items():
        if holds and path.is_relative_to(place) and path != place:
            raise CheckpointError(
                f"The input {name} lies in {folder}, which this run would write. Choose another --out, or move it."
            )
        inside = place != path and place.is_relative_to(path) and path.is_dir()
        if inside and not any((path / config).is_file() for config in MODELS):
            raise CheckpointError(
                f"{folder} lies in {name}, whose files are all read: what the run writes there would change its own "
                "input. Choose another --out."
            )


def check_devices(recipe: Section) -> None:
    """Refuse a recipe that computes on a device which cannot be used here; look into its sections, too.

    Raises:
        RecipeError: There is no such device on this machine.
    """
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if name == "device" and value not in ("cpu", "auto"):
            from modicum.jobs.loading.models import usable

            usable("auto", value)
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else (value,)
        for section in items:
            if isinstance(section, Section):
                check_devices(section)


def plan(recipe: Recipe, folder: Path | None = None) -> list[str]:
    """Return what running ``recipe`` would read, compute and write, a line each; runs nothing.

    Args:
        recipe: A checked recipe.
        folder: Where it would run; what is finished there is no work any more.

    Raises:
        ModicumError: It would be refused.
    """
    check_devices(recipe)
    check_readable(recipe.inputs())  # a run begins by reading them
    if folder is not None:
        _keep_apart(recipe, folder)
    facts = registry.job[recipe.job].facts
    if facts.plan is None:
        return []
    return facts.plan(recipe, folder) if facts.spreads else facts.plan(recipe)
