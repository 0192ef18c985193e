"""What can be coordinated: moving targets, data selection, objectives of a file. Sections of the job ``coordinate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from modicum.errors import RecipeError
from modicum.recipe import Section
from modicum.types import NonNegative, Positive, PositiveInt, UnitInterval


class Tracking(Section):
    """Agents that follow moving targets in a disk."""

    acts_with: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("step", "max_gap", "start", "duration", "incomplete"), "tracks"
    )
    acts_without: ClassVar[Mapping[str, str]] = dict.fromkeys(("targets", "mixture"), "tracks")
    name: Literal["tracking"] = Field(default="tracking", description="the application")
    agents: PositiveInt = Field(default=20, description="number of agents")
    targets: PositiveInt = Field(default=30, description="number of simulated targets; a file of tracks brings its own")
    mixture: tuple[NonNegative, NonNegative, NonNegative] = Field(
        default=(8, 1, 1), description="shares of targets that turn at random, flee, and keep a course"
    )
    preset: Literal["disk", "osg"] = Field(
        default="disk",
        description="moves of an agent: disk has 8 directions and 3 speeds; osg has 4, is slower, and may rest",
    )
    radius: Positive = Field(default=20.0, description="of the disk")
    epsilon: Positive | None = Field(default=None, description="added to distances; the preset's when not given")
    tracks: str | None = Field(default=None, description="CSV of time, id, and x, y or lat, lon")
    step: Positive = Field(default=10.0, description="seconds between two rounds of the tracks")
    max_gap: Positive = Field(default=600.0, description="seconds without a report that a track may have")
    start: NonNegative | None = Field(default=None, description="seconds after the first report at which rounds begin")
    duration: Positive | None = Field(default=None, description="seconds of the tracks that are used")
    incomplete: Literal["refuse", "leave_out"] = Field(
        default="refuse", description="what is done with a track that has a gap, or misses some of the rounds"
    )

    def world(self) -> Callable[[Sequence[int]], Any]:
        """Return what makes the worlds of some seeds."""
        from modicum.submodular.tracking import TrackingWorld
        from modicum.submodular.tracks import read_tracks

        tracks = None
        if self.tracks is not None:
            tracks = read_tracks(
                self.tracks, fit=self.radius, step=self.step, max_gap=self.max_gap, start=self.start,
                duration=self.duration, incomplete=self.incomplete,
            )  # fmt: skip
        return lambda seeds: TrackingWorld(
            self.agents, self.targets, mixture=self.mixture, preset=self.preset, radius=self.radius,
            epsilon=self.epsilon, tracks=tracks, seed=seeds,
        )  # fmt: skip


class Selection(Section):
    """Workers that choose domains to train on, with needs that follow a simple rule in place of a training."""

    name: Literal["selection"] = Field(default="selection", description="the application")
    workers: PositiveInt = Field(default=4, description="how many workers choose a domain in each round")
    similarity: list[list[UnitInterval]] | None = Field(
        default=None, description="how well each domain serves each probe, a row a probe"
    )
    packages: list[str] | None = Field(
        default=None, description="packages of the standard library as domains, in place of a similarity"
    )
    utility: Literal["coverage", "facility", "loss"] = Field(
        default="coverage",
        description="a second worker on a domain still helps, does not, or domains count by their own needs alone",
    )
    learn: UnitInterval = Field(
        default=0.3, description="share of a probe's need that one round of full service takes away"
    )
    drift: UnitInterval = Field(default=0.05, description="how fast needs return to 1 of themselves")

    @model_validator(mode="after")
    def _one_source(self) -> Selection:
        if (self.similarity is None) == (self.packages is None):
            raise ValueError("give either similarity or packages.")
        return self

    def world(self) -> Callable[[Sequence[int]], Any]:
        """Return what makes the worlds of some seeds."""
        from modicum.submodular.data_selection import SelectionWorld, counted, similarities

        table: Any = self.similarity
        if self.packages is not None:
            train, held_out = zip(*(_package(name) for name in self.packages))
            vectors = counted([*train, *held_out])
            table = similarities(vectors[: len(train)], vectors[len(train) :])
        return lambda seeds: SelectionWorld(
            table, workers=self.workers, utility=self.utility, learn=self.learn, drift=self.drift, seed=seeds
        )


def _package(name: str) -> tuple[str, str]:
    """Return the text of a package of the standard library, every second file apart."""
    import sysconfig

    folder = Path(sysconfig.get_path("stdlib")) / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() and "/" not in name and name != ".." else []
    if len(files) < 2:
        raise RecipeError(f"packages: {name!r} is no package of the standard library with two files or more.")
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return "\n".join(texts[::2]), "\n".join(texts[1::2])


class ObjectiveFile(Section):
    """Facility location whose values stand in a file."""

    name: Literal["objective"] = Field(default="objective", description="the application")
    path: str = Field(description="safetensors with V (rows, elements), or (rounds, rows, elements)")
    blocks: list[PositiveInt] = Field(description="number of actions of each agent, in the order of the elements")

    def world(self) -> Callable[[Sequence[int]], Any]:
        """Return what makes the worlds of some seeds."""
        from modicum.submodular.file_world import FileWorld

        made = FileWorld(self.path, self.blocks)
        return made.of


APPLICATIONS: Mapping[str, type[Section]] = {"tracking": Tracking, "selection": Selection, "objective": ObjectiveFile}


def read_application(value: object) -> object:
    if isinstance(value, Section):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or value.get("name") not in APPLICATIONS:
        raise ValueError(f"expected one of {', '.join(APPLICATIONS)}, or {{name: …, key: value}}")
    return APPLICATIONS[value["name"]].model_validate(dict(value))
