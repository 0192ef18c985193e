"""Look at how models see prompts from inside: do harmful requests in wrappers lie among the harmful or the harmless?

A target is a cell: hidden states of plain and wrapped prompts after one block, their two principal components, and the
numbers of :mod:`modicum.evaluate.representation`. Components and probes are fitted on plain prompts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from modicum.cells import Document, fill
from modicum.errors import RecipeError
from modicum.jobs import attack_data
from modicum.jobs.chat.targets import JudgeSection, Target
from modicum.jobs.safety.suites import GoalSection, Suite
from modicum.recipe import Recipe
from modicum.record import Run
from modicum.registry import job
from modicum.types import Fraction, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.evaluate.chat import AttackedPrompt
    from modicum.jobs.chat.local import LocalHF

    Prompts = dict[str, tuple[list[AttackedPrompt], list[AttackedPrompt]]]

Cell = dict[str, Any]


class RepresentRecipe(Recipe):
    """Which models, which prompts, and after which block."""

    acts_with: ClassVar[Mapping[str, str]] = {"max_new_tokens": "judge"}
    job: Literal["represent"] = "represent"
    targets: dict[str, Target] = Field(min_length=1, description="name: folder, Hub id or builtin")
    suites: dict[str, Suite] = Field(
        default={"base64": Suite(attack="base64")}, min_length=1, description="wrappers beside the plain prompts"
    )
    goals: GoalSection = Field(default=GoalSection(path="strongreject", size=24), description="harmful requests")
    benign: GoalSection = Field(default=GoalSection(path="benign_edgy", size=24), description="harmless requests")
    depth: Fraction = Field(default=0.6, description="share of the blocks after which the states are read")
    position: Literal["prompt_end", "think_first"] = Field(
        default="prompt_end", description="the last token of the prompt, or the first one that is generated"
    )
    folds: PositiveInt = Field(default=5, description="parts that are held out in turn")
    judge: JudgeSection | None = Field(
        default=None, description="judges greedy answers, to see how much of the outcome is settled at the position"
    )
    max_new_tokens: PositiveInt = Field(default=64, description="limit on these answers")

    @model_validator(mode="after")
    def _fits(self) -> RepresentRecipe:
        if remote := [name for name, target in self.targets.items() if target.model is None]:
            raise ValueError(f"target {remote[0]!r} is an endpoint, whose hidden states cannot be read; name a model")
        if other := [name for name, target in self.targets.items() if target.thinking != "own"]:
            raise ValueError(f"target {other[0]!r} is to think {self.targets[other[0]].thinking}, which no state shows")
        if waiting := [name for name, suite in self.suites.items() if suite.needs_model]:
            raise ValueError(f"suite {waiting[0]!r} needs a model that words goals anew; use job: attack for it")
        fewest = min(self.goals.size or self.folds, self.benign.size or self.folds)
        if not 2 <= self.folds <= fewest:
            raise ValueError(f"folds is {self.folds}, expected 2 to {fewest}, the prompts of a kind")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield models and files."""
        for target in self.targets.values():
            yield from target.inputs()
        for section in (self.goals, self.benign):
            yield from section.inputs()
        if self.judge is not None:
            yield from self.judge.inputs()


def plan(recipe: RepresentRecipe) -> list[str]:
    """Say how many prompts would be read; reads prompts, but no model."""
    from modicum.jobs.loading.models import load_tokenizer, rehearse_model

    goals, benign = _goals(recipe)
    for target in recipe.targets.values():
        options: dict[str, Any] = {"remote_code": target.remote_code}
        reference = target.model or ""
        known = rehearse_model(reference, **options), load_tokenizer(reference, **options)
        _try_prompts(recipe, *known, [*goals, *benign], target.system)
    prompts = (len(goals) + len(benign)) * (1 + len(recipe.suites))
    answers = f", and as many greedy answers judged by {recipe.judge.name}" if recipe.judge else ""
    return [
        f"{len(recipe.targets)} targets × {prompts} prompts, read after {recipe.depth:.0%} of the blocks at "
        f"{recipe.position}{answers}"
    ]


def _try_prompts(recipe: RepresentRecipe, model: Any, tokenizer: Any, goals: Sequence[Any], system: str | None) -> None:
    """Refuse prompts that a model cannot read; nothing of it is asked but its configuration."""
    from modicum.evaluate.chat import ChatRequest
    from modicum.evaluate.representation import check_prompt
    from modicum.jobs.chat.local import LocalHF

    local = LocalHF(model, tokenizer)
    for suite in (Suite(attack="plain"), *recipe.suites.values()):
        for prompt in suite.wrap(suite.attack.name, goals, None):
            read = local.tokens(ChatRequest(prompt.messages).under(system))
            check_prompt(model, len(read) + (recipe.position == "think_first"))


def _goals(recipe: RepresentRecipe) -> tuple[list[Any], list[Any]]:
    """Return harmful and harmless requests, after a look at all that will be used."""
    from modicum.evaluate.chat import GenParams
    from modicum.jobs.chat.targets import look_at_all
    from modicum.jobs.safety.suites import refuse_both

    goals, benign = recipe.goals.load(harmful=True), recipe.benign.load(harmful=False)
    refuse_both(goals, benign)
    params = GenParams(max_tokens=recipe.max_new_tokens) if recipe.judge else None
    look_at_all(recipe.suites.values(), (goals, benign), recipe.targets.values(), recipe.judge, params=params)
    return goals, benign


@job("represent", plan=plan, outputs=lambda _: (), foreseeable=lambda _: True)
def represent(recipe: RepresentRecipe, run: Run) -> None:
    """Read hidden states of plain and wrapped prompts, and compare them.

    Args:
        recipe: Targets, prompts, and where to read.
        run: ``record.json`` gets a cell for each target: coordinates on two components, and for each suite distance,
            gap and transfer.
    """
    from modicum.jobs.chat.targets import open_target

    goals, benign = _goals(recipe)
    prompts = {
        name: (suite.wrap(name, goals, None), suite.wrap(name, benign, None))
        for name, suite in {"plain": Suite(attack="plain"), **recipe.suites}.items()
    }
    cells = Document(run.folder / "cells.json", {"hash": run.hash})

    def measure(name: str) -> Cell:
        target = open_target(recipe.targets[name])
        run.inputs.check()
        return {"target": name} | _compared(recipe, target, _under(recipe.targets[name].system, prompts))

    def tell(name: str, cell: Cell) -> None:
        for suite, found in cell["suites"].items():
            run.say(f"{name} in {suite}: gap {found['gap']:+.2f}, a probe of plain prompts {found['auroc']:.2f}")

    wanted = {name: lambda name=name: measure(name) for name in recipe.targets}
    fill(cells, wanted, tell=tell, check=run.inputs.check_mapped)
    used = [section.path for section in (recipe.goals, recipe.benign) if section.path in attack_data.GOALS]
    used += [suite.packaged for suite in recipe.suites.values() if suite.packaged is not None]
    run.record["metrics"] = {
        "representation": {
            "cells": [cells[name] for name in recipe.targets],
            "position": recipe.position,
            "data": attack_data.provenance(*dict.fromkeys(used)),
        }
    }


def _under(system: str | None, prompts: Prompts) -> Prompts:
    """Return the prompts below a target's guidelines, where it has some."""
    from modicum.evaluate.chat import ChatRequest

    def below(part: list[AttackedPrompt]) -> list[AttackedPrompt]:
        return [replace(prompt, messages=ChatRequest(prompt.messages).under(system).messages) for prompt in part]

    return {name: (below(bad), below(good)) for name, (bad, good) in prompts.items()}


def _compared(recipe: RepresentRecipe, target: Any, prompts: Prompts) -> Cell:
    from modicum.evaluate.representation import centroid_gap, fit_pca, probe_transfer, project, proxy_a_distance
    from modicum.random import generator

    layer = max(1, round(recipe.depth * target.model.config.num_hidden_layers))
    states = {name: tuple(_states(recipe, target, part, layer) for part in pair) for name, pair in prompts.items()}
    harmful, helpful = states["plain"]
    pca = fit_pca(harmful, helpful)

    def distance(a: Tensor, b: Tensor) -> float:
        return proxy_a_distance(a, b, folds=recipe.folds, generator=generator(recipe.seed, "folds"))

    cell: Cell = {"layer": layer, "distance": distance(harmful, helpful), "suites": {}, "points": {}}
    for name, (bad, good) in states.items():
        points = {"harmful": project(bad, pca), "harmless": project(good, pca)}
        cell["points"][name] = {
            kind: [[round(x, 4) for x in row] for row in at.tolist()] for kind, at in points.items()
        }
        if name == "plain":
            continue
        transfer = probe_transfer(harmful, helpful, bad, good)
        cell["suites"][name] = {
            "gap": centroid_gap(harmful, helpful, bad),
            "from_harmful": distance(bad, harmful),
            "from_harmless": distance(bad, helpful),
            "apart": distance(bad, good),
            **transfer._asdict(),
        }
    if recipe.judge is not None:
        cell["outcome"] = _settled(recipe, target, prompts, states)
    return cell


def _states(recipe: RepresentRecipe, target: LocalHF, prompts: Sequence[AttackedPrompt], layer: int) -> Tensor:
    """Return the states of prompts, (n, width), a few at a time."""
    import torch

    from modicum.evaluate.chat import ChatRequest
    from modicum.evaluate.generation import generate
    from modicum.evaluate.likelihood import right_padded
    from modicum.evaluate.representation import hidden_states

    ids = [target.tokens(ChatRequest(prompt.messages)) for prompt in prompts]
    if recipe.position == "think_first":
        first = generate(target.model, ids, max_new_tokens=1, stop=(), pad=0, batch_size=8)
        ids = [row + said for row, said in zip(ids, first, strict=True)]
    # Of similar length together, so that little is padding.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), 8):
        part = order[start : start + 8]
        rows, mask = right_padded([ids[i] for i in part], 0, target.model.device)
        read = hidden_states(target.model, rows, mask, position=recipe.position, layers=[layer])[0].cpu()
        found |= dict(zip(part, read.unbind(), strict=True))
    return torch.stack([found[i] for i in range(len(ids))])


def _settled(recipe: RepresentRecipe, target: Any, prompts: Any, states: Any) -> Cell | None:
    """Return how well the states foretell which harmful prompts get an unsafe answer; nothing where hardly any do.

    One request stands there plain and in every wrapper: it is held out in all of them at once. Suites differ in how
    many answers are unsafe, which a probe could go by, so each has an area of its own, too.
    """
    import torch

    from modicum.evaluate.chat import ChatRequest, GenParams, item
    from modicum.evaluate.logistic import auroc
    from modicum.evaluate.representation import first_token_predictability, foretold
    from modicum.jobs.chat.targets import open_judge
    from modicum.random import generator

    asked = [prompt for bad, _ in prompts.values() for prompt in bad]
    params = GenParams(temperature=0.0, max_tokens=recipe.max_new_tokens)
    results = target.generate([ChatRequest(prompt.messages, params) for prompt in asked])
    judge, _ = open_judge(recipe.judge or JudgeSection())
    read = [i for i, result in enumerate(results) if result.choices]
    verdicts = judge.judge([item(asked[i], results[i].choices[0]) for i in read])
    known = [(i, said.unsafe) for i, said in zip(read, verdicts, strict=True) if said.unsafe is not None]
    unsafe = torch.tensor([bool(said) for _, said in known])
    fewest = min(int(unsafe.sum()), int((~unsafe).sum())) if known else 0
    if fewest < recipe.folds:
        return {"unsafe": float(unsafe.double().mean()) if known else None, "n": len(known)}
    h = torch.cat([bad for bad, _ in states.values()])[[i for i, _ in known]]
    goals = [asked[i].goal.id for i, _ in known]

    def foretell(how: Callable[..., Any]) -> Any:
        return how(h, unsafe, folds=recipe.folds, generator=generator(recipe.seed, "folds"), groups=goals)

    cell = {"unsafe": float(unsafe.double().mean()), "n": len(known)}
    try:
        found, said = foretell(first_token_predictability), foretell(foretold)
    except RecipeError as error:  # of one outcome too few requests
        return {**cell, "why": str(error)}
    areas: dict[str, float | None] = {}
    for name in prompts:
        own = torch.tensor([asked[i].family == name for i, _ in known])
        both = 0 < int(unsafe[own].sum()) < int(own.sum())
        areas[name] = auroc(said[own], unsafe[own]) if both else None
    return {**cell, **found._asdict(), "suites": areas}
