"""What a grid is made of: stages of the template, cells, and choices among cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from modicum.jobs.grids.axes import SEED
from modicum.recipe import Data, job_schema

At: TypeAlias = dict[str, str | int]


@dataclass(frozen=True)
class Template:
    """A stage as the recipe has it."""

    name: str
    over: tuple[str, ...]
    recipe: Data
    seeded: bool
    role: str | None = None
    start: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def keys(self) -> frozenset[str]:
        """Keys that its recipe has or could have."""
        return frozenset((*self.recipe, *job_schema(str(self.recipe.get("job"))).model_fields))


@dataclass(frozen=True)
class Cell:
    """One run of a stage.

    Attributes:
        name: Of its folder: the stage and the hash of the recipe, references to other cells included.
        at: The value of each axis; ``AXIS.tune`` names a variant among which the grid chooses.
        recipe: With references to cells and choices by their names.
    """

    name: str
    stage: str
    at: At
    recipe: Data
    role: str | None
    resources: Mapping[str, float]

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.stage} {label(self.at)}".strip() + (f" seed {self.at[SEED]}" if SEED in self.at else "")


@dataclass(frozen=True)
class Choice:
    """Stands for the best of several cells, by what other cells measured.

    Attributes:
        candidates: Names of the cells.
        judges: For each candidate the cells whose scores are averaged.
        at: Coordinates that the candidates share.
        key: The coordinate that is chosen.
    """

    name: str
    axis: str
    key: str
    at: At
    candidates: tuple[str, ...]
    judges: tuple[tuple[str, ...], ...]


def label(at: Mapping[str, Any], *, tuned: bool = True) -> str:
    """Return coordinates but for the seed as words."""
    return " ".join(str(value) for key, value in at.items() if key != SEED and (tuned or not key.endswith(".tune")))
