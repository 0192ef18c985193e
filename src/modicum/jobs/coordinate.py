"""Compare policies of agents that choose together: on moving targets, on data selection, or on objectives of a file."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from modicum.borders import border
from modicum.errors import RecipeError
from modicum.jobs.applications import ObjectiveFile, Selection, Tracking, read_application
from modicum.recipe import Choice, Recipe, choice
from modicum.record import Run, write_atomic
from modicum.registry import job, policy
from modicum.types import NonNegativeInt, Positive, PositiveInt, UnitInterval

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.cells import Cell
    from modicum.submodular.comparison import Variant

FRAMES = "frames.json"
RESULTS = "results.json"


class CoordinateRecipe(Recipe):
    """What is coordinated, by which policies, over which graphs."""

    job: Literal["coordinate"] = "coordinate"
    application: Annotated[Tracking | Selection | ObjectiveFile, BeforeValidator(read_application)] = Field(
        default=Tracking(), description="what is coordinated: tracking, selection or objective, with its keys"
    )
    policies: list[choice(policy, complete=False)] = Field(  # type: ignore[valid-type]
        min_length=1, description="the policies; one whose step is not set here is tuned"
    )
    graphs: list[Literal["complete", "ring", "random", "path", "star"]] = Field(
        default=["complete"], min_length=1, description="who talks to whom; all policies are played on each"
    )
    degree: Positive = Field(default=4.0, description="neighbours of an agent of the random graph, on average")
    drop: UnitInterval = Field(default=0.0, description="probability that a message is lost")
    delay: NonNegativeInt = Field(default=0, description="rounds by which messages come late")
    rounds: Annotated[int, Field(ge=2)] = Field(default=300, description="rounds to play")
    seeds: PositiveInt = Field(default=3, description="number of worlds that results are reported on")
    tune_seeds: PositiveInt = Field(default=1, description="number of further worlds that steps are chosen on")
    steps: list[Positive] = Field(default=[1, 10, 100, 1000], min_length=1, description="grid of every policy's step")
    hints: list[NonNegativeInt] = Field(default=[0], min_length=1, description="rounds played on a prediction; 0: none")
    optimum: bool = Field(
        default=True,
        description="compare with each round's best move: of all where they are few, else of a greedy that sees it",
    )
    frames: NonNegativeInt = Field(default=120, description="pictures of the animation; 0: none")

    @field_validator("policies")
    @classmethod
    def _complete(cls, chosen: list[Choice]) -> list[Choice]:
        for number, one in enumerate(chosen):
            entry = policy[one.name]
            entry.knobs({entry.facts.step: 1.0, **one.knobs} if entry.facts.step else one.knobs)
            if any((one.name, one.knobs) == (other.name, other.knobs) for other in chosen[:number]):
                raise RecipeError(f"policies: {one.name} stands twice with the same knobs. Drop one, or change a knob.")
        return chosen

    def inputs(self) -> Iterator[str]:
        """Yield the files that are read, and the version of Python where its own sources are."""
        if getattr(self.application, "packages", None) is not None:
            yield f"python=={platform.python_version()}"
        for path in (getattr(self.application, "tracks", None), getattr(self.application, "path", None)):
            if path is not None:
                yield path


class Comparison:
    """The cells of a recipe: what is tuned, what is played."""

    def __init__(self, recipe: CoordinateRecipe) -> None:
        from modicum.submodular.comparison import variants

        self.recipe = recipe
        self.world = recipe.application.world()
        first = self.world([0])
        self.blocks = list(first.blocks)
        self.predicts = hasattr(first, "predict")
        hints = recipe.hints if self.predicts else [0]
        self.variants = variants([(one.name, one.knobs) for one in recipe.policies], hints)
        base = recipe.seed * 1000
        self.seeds = [base + i for i in range(recipe.seeds)]
        self.tune_seeds = [base + 500 + i for i in range(recipe.tune_seeds)]
        most = getattr(first, "rounds", None)
        if most is not None and recipe.rounds > most:
            raise RecipeError(f"rounds is {recipe.rounds}, but the file has enough for {most}. Lower rounds.")
        self._try()

    def _try(self) -> None:
        """Make every policy once, so that what does not fit together is refused before anything is played."""
        from modicum.submodular.policies.make import make_policy

        for graph, variant in self.pairs():
            knobs = dict(variant.knobs)
            if variant.step is not None:
                knobs[variant.step] = variant.grid(self.recipe.steps, self.blocks)[0]
            make_policy(variant.name, self.blocks, W=self.network(graph), horizon=self.recipe.rounds, knobs=knobs)

    @cached_property
    def adjacency(self) -> dict[str, Tensor]:
        """The graphs by name."""
        from modicum.submodular import graphs

        n = len(self.blocks)
        made: dict[str, Callable[[], Tensor]] = {
            "random": lambda: graphs.erdos_renyi(n, degree=self.recipe.degree, seed=self.recipe.seed),
            **{name: partial(getattr(graphs, name), n) for name in ("complete", "ring", "path", "star")},
        }
        return {name: made[name]() for name in self.recipe.graphs}

    @property
    def domains(self) -> list[str]:
        """Names of what every agent chooses among, where that is the same."""
        application = self.recipe.application
        if not isinstance(application, Selection):
            return []
        return application.packages or [str(domain) for domain in range(self.blocks[0])]

    def network(self, graph: str) -> Any:
        """Return a fresh network of a graph."""
        from modicum.submodular.communication import Simulated
        from modicum.submodular.graphs import metropolis_weights

        weights = metropolis_weights(self.adjacency[graph])
        return Simulated(weights, drop=self.recipe.drop, delay=self.recipe.delay, seed=self.recipe.seed)

    def pairs(self) -> list[tuple[str, Variant]]:
        """Return graphs with variants; what does not depend on the graph is played once, on the first."""
        return [
            (graph, variant)
            for graph in self.recipe.graphs
            for variant in self.variants
            if variant.local or graph == self.recipe.graphs[0]
        ]

    def tune(self, graph: str, variant: Variant) -> Cell:
        """Measure every step of a variant."""
        from modicum.submodular.comparison import tune

        utility = tune(
            variant, self.world, self.network(graph), seeds=self.tune_seeds, rounds=self.recipe.rounds,
            steps=self.recipe.steps,
        )  # fmt: skip
        return {"utility": utility}

    def play(self, graph: str, variant: Variant, tuned: Cell | None) -> Cell:
        """Play a variant with its best step."""
        from modicum.submodular.comparison import best_step, choices, play, summary

        step = None if tuned is None else best_step(tuned["utility"])
        made = self.world(self.seeds)
        film = Film(made, self.recipe.rounds, self.recipe.frames)
        trace = play(
            variant, self.world, self.network(graph), seeds=self.seeds, rounds=self.recipe.rounds,
            steps=None if step is None else [step], optimum=self.recipe.optimum, watch=film.take, made=made,
        )  # fmt: skip
        cell = {"graph": graph, "label": variant.label, "policy": variant.name, "step": step, "knob": variant.step,
                "hint": variant.hint, **summary(trace), "frames": film.frames}  # fmt: skip
        return cell | ({"choices": choices(trace)} if self.domains else {})


class Film:
    """Pictures of the first world of a tracking scene."""

    def __init__(self, world: Any, rounds: int, count: int) -> None:
        self.world = world if hasattr(world, "target_positions") and count else None
        self.at = {round(i * (rounds - 1) / max(1, count - 1)) for i in range(count)}
        self.frames: list[dict[str, Any]] = []

    def take(self, number: int, actions: Tensor, objective: object) -> None:  # noqa: ARG002
        """Keep where everybody is, and who watches whom, after the moves of a round."""
        if self.world is None or number not in self.at:
            return
        world = self.world
        moved = world.positions + world.moves[actions.clamp(min=0)] * (actions >= 0)[..., None]
        targets = world.target_positions[0]
        import torch

        watching = torch.cdist(targets[None], moved[:1])[0].argmin(-1)
        places = {"agents": moved[0], "targets": targets}
        shown = {name: [[round(float(x), 2) for x in row] for row in part] for name, part in places.items()}
        self.frames.append({"round": number, **shown, "watched_by": watching.tolist()})


def plan(recipe: CoordinateRecipe) -> list[str]:
    """Say what would be played, and what it takes."""
    from modicum.submodular.graphs import metropolis_weights, second_modulus

    found = Comparison(recipe)
    n, agents = sum(found.blocks), len(found.blocks)
    tuned = [variant for _, variant in found.pairs() if variant.step is not None]
    tried = [len(variant.grid(recipe.steps, found.blocks)) * recipe.tune_seeds for variant in tuned]
    worlds = sum(tried) + len(found.pairs()) * recipe.seeds
    most = max(*tried, recipe.seeds, 1)
    lines = [
        f"{agents} agents with {n} actions, {recipe.rounds} rounds, {recipe.seeds} worlds",
        f"{len(found.pairs())} variants; {len(tuned)} of them tuned on {recipe.tune_seeds} further worlds",
        f"{worlds * recipe.rounds:,} rounds in all, of up to {2 * n} evaluations and {(agents + 1) * n * 8 / 1e3:.0f} "
        f"kB of copies each; about {3 * most * agents * n * 8 / 1e6:.0f} MB at a time",
    ]
    if longest := max(variant.hint for _, variant in found.pairs()):
        lines.append(
            f"rounds with a hint play up to {longest} more, {2 * n * (longest + 1):,} evaluations and messages of "
            f"{longest + 1} rounds in all"
        )
    for graph, links in found.adjacency.items():
        beta = second_modulus(metropolis_weights(links))
        sent = int(links.sum()) * n * 8
        lines.append(f"graph {graph}: {int(links.sum()) // 2} links, β = {beta:.3f}, {sent / 1e3:.1f} kB a round")
    return lines


@job("coordinate", plan=plan, outputs=lambda _: ["results", "frames", "animation"])
def coordinate(recipe: CoordinateRecipe, run: Run) -> None:
    """Play policies on the same worlds and compare them.

    Args:
        recipe: What is coordinated, by which policies, over which graphs.
        run: Gets ``results.json`` with utilities by world and round, ``frames.json`` and ``animation.gif``; cells that
            are finished are not played again.
    """
    from modicum.cells import REMEDY, Folder, fill
    from modicum.submodular.comparison import best_step

    found = Comparison(recipe)
    run.inputs.check()
    store = Folder(run.folder / "cells")
    if not found.predicts and any(recipe.hints):
        run.note("The application has no prediction: hints are left out.")
    tuning = {
        f"tune {graph} {variant.label}": partial(found.tune, graph, variant)
        for graph, variant in found.pairs()
        if variant.step is not None
    }

    def tuned(graph: str, variant: Variant) -> Cell | None:
        if variant.step is None:
            return None
        cell = store[f"tune {graph} {variant.label}"]
        with border(run.folder / "cells", REMEDY):
            best_step(cell["utility"])
        return cell

    playing = {
        f"play {graph} {variant.label}": partial(_late, found.play, graph, variant, tuned)
        for graph, variant in found.pairs()
    }
    with _bar(len(tuning) + len(playing), quiet=run.quiet) as on:
        on(sum(key in store for key in (*tuning, *playing)))
        fill(store, tuning, tell=lambda *_: on(1), check=run.inputs.check_mapped)

        def tell(key: str, cell: Cell) -> None:
            on(1)
            run.say(f"{key}: {_mean(cell):.4g}")

        fill(store, playing, tell=tell, check=run.inputs.check_mapped)
    with border(run.folder / "cells", REMEDY):
        results, frames = _results(found, {key: store[key] for key in playing}, {key: store[key] for key in tuning})
    write_atomic(run.folder / RESULTS, json.dumps(results, indent=1) + "\n")
    kept = {"application": recipe.application.name, "rounds": recipe.rounds, "worlds": recipe.seeds}
    lean = [
        {key: value for key, value in cell.items() if key not in ("course", "choices")} for cell in results["cells"]
    ]
    run.record["metrics"] = {"coordination": {**kept, "cells": lean, "differences": results["differences"]}}
    run.output("results", run.folder / RESULTS)
    if any(one["frames"] for one in frames):
        scene = {"radius": recipe.application.radius, "films": frames}  # type: ignore[union-attr]
        write_atomic(run.folder / FRAMES, json.dumps(scene, separators=(",", ":")) + "\n")
        run.output("frames", run.folder / FRAMES)
        _gif(run, scene, results["graphs"])


def _results(
    found: Comparison, playing: Mapping[str, Cell], tuning: Mapping[str, Cell]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what came of all cells, and the pictures of each."""
    from modicum.submodular.graphs import metropolis_weights, second_modulus

    cells = [dict(cell) for cell in playing.values()]
    frames = [{"graph": c["graph"], "label": c["label"], "frames": c.pop("frames")} for c in cells]
    for frame in (frame for one in frames for frame in one["frames"]):
        _ = [float(part) for place in (*frame["agents"], *frame["targets"]) for part in place]  # as they will be drawn
    for cell in cells:
        cell.pop("seconds", None)
        if (tuned := tuning.get(f"tune {cell['graph']} {cell['label']}")) is not None:
            cell["tuning"] = tuned["utility"]
    graphs = {
        name: {"links": links.nonzero().tolist(), "beta": second_modulus(metropolis_weights(links))}
        for name, links in found.adjacency.items()
    }
    results = {"cells": cells, "graphs": graphs, "differences": differences(cells), "blocks": found.blocks}
    return results | ({"domains": found.domains} if found.domains else {}), frames


def _late(play: Callable[..., Cell], graph: str, variant: Variant, tuned: Callable[..., Cell | None]) -> Cell:
    # The tuning of a variant is known only once its cell has been measured.
    return play(graph, variant, tuned(graph, variant))


def _mean(cell: Cell) -> float:
    return float(sum(cell["utility"]) / len(cell["utility"]))


def differences(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the paired difference of every cell from the first, world by world, with 95 % intervals."""
    from modicum.evaluate.intervals import mean

    first, found = cells[0], []
    for cell in cells[1:]:
        pairs = [a - b for a, b in zip(cell["utility"], first["utility"])]
        estimate = mean(pairs)._asdict()
        found.append({"graph": cell["graph"], "label": cell["label"], "from": first["label"], **estimate})
    return found


def _gif(run: Run, scene: Mapping[str, Any], graphs: Mapping[str, Any]) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        run.note("animation.gif is left out: pillow is not installed. pip install 'modicum[tracking]' brings it.")
        return
    from modicum.report.film import write_gif

    film = next(one for one in scene["films"] if one["frames"])
    path = run.folder / "animation.gif"
    write_gif(path, film["frames"], radius=scene["radius"], links=graphs[film["graph"]]["links"])
    run.output("animation", path)


class _bar:  # noqa: N801 - used as a function
    """A progress bar with the time that is left."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self.total, self.quiet = total, quiet or not sys.stderr.isatty()

    def __enter__(self) -> Callable[[int], None]:
        if self.quiet:
            return lambda _: None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("coordinate"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()
        task = self._progress.add_task("", total=self.total)
        return lambda count: self._progress.advance(task, count)

    def __exit__(self, *_: object) -> None:
        if not self.quiet:
            self._progress.stop()


__all__ = ["CoordinateRecipe", "coordinate", "differences", "plan"]
