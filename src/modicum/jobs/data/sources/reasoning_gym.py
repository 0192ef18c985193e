"""Procedural tasks of the package ``reasoning-gym``, with the task's own scorer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from modicum.errors import CheckpointError, MissingExtraError, RecipeError, did_you_mean
from modicum.evaluate.rows import Rows
from modicum.jobs.data.section import DataSection
from modicum.registry import source

SIZE = 500  # rows when the recipe does not say
SEEDS = 1 << 31  # the generators take 32-bit seeds: train has the lower half, every other split the upper


def _version(_section: DataSection, _name: str) -> Iterator[str]:
    """Yield the version of the package, which may ask other questions in another one."""
    with suppress(PackageNotFoundError):
        yield f"reasoning-gym=={version('reasoning-gym')}"


@source("reasoning-gym", open_config=True, inputs=_version)
def reasoning_gym(section: DataSection, name: str, *, seed: int) -> Rows:
    """Generate a reasoning-gym task: questions, answers and the task's own scorer.

    Train and the other splits draw from disjoint halves of the seeds. ``config`` holds the task's own knobs.

    Args:
        section: ``split``, ``size`` and ``config`` are read.
        name: Name of the task.
        seed: Seed of the choice.

    Raises:
        MissingExtraError: The package is not installed.
        CheckpointError: There is no such task.
        RecipeError: The task refuses ``config``.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> len(reasoning_gym(DataSection(path="reasoning-gym:chain_sum", size=2), "chain_sum", seed=0))
        2

    Cost:
        A question is made in well under a millisecond for most tasks.
    """
    try:
        import reasoning_gym as package
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise MissingExtraError("reasoning-gym", "demo") from None
    from modicum.jobs.data.kinds.completion import prompted
    from modicum.random import derive_seed

    if name not in DATASETS:
        raise CheckpointError(f"There is no reasoning-gym task {name!r}. {did_you_mean(name, DATASETS)}")
    size = section.size or SIZE
    # A task draws row i with seed + i, so the start leaves room for all rows within its half.
    start = derive_seed(seed, "reasoning-gym", name, section.split) % (SEEDS - size)
    start += 0 if section.split == "train" else SEEDS
    try:
        generated = package.create_dataset(name, seed=start, size=size, **section.config)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"{section.path}: config {section.config} is refused: {error}") from None
    entries = [generated[index] for index in range(size)]

    def score(index: int, answer: str) -> float:
        return float(generated.score_answer(answer, entries[index]))

    return Rows("completion", [prompted(section, entry["question"], entry["answer"]) for entry in entries], score)
