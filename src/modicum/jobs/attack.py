"""Measure how models answer harmful requests in published wrappers, and harmless requests in the same ones.

A (target, suite) pair is a cell: attack success greedily and over N samples, refusals of the harmless requests, answers
that are neither. A cell is stored whole; inside a cell every judged answer is stored at once, so a killed run goes on
with the next answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, Lt
from pydantic import Field, field_validator, model_validator

from modicum.borders import border
from modicum.cells import REMEDY, Document, fill, once
from modicum.errors import CheckpointError
from modicum.inputs import look
from modicum.jobs import attack_data
from modicum.jobs.chat.cache import Cached
from modicum.jobs.chat.targets import JudgeSection, Target
from modicum.jobs.chat.transcripts import VERDICTS, Transcribed, read_transcripts, transcript_files
from modicum.jobs.safety.measuring import Cell, Measuring
from modicum.jobs.safety.suites import GoalSection, Suite, refuse_both, refuse_shared
from modicum.recipe import Recipe, inputs_of
from modicum.record import Run
from modicum.registry import job
from modicum.stored import read_record
from modicum.types import NonNegative, PositiveInt

CUT = 0.1  # share of answers cut inside their reasoning from which a run says so


class AttackRecipe(Recipe):
    """Which models, in which wrappers, judged by whom."""

    job: Literal["attack"] = "attack"
    targets: dict[str, Target] = Field(min_length=1, description="name: folder, Hub id, builtin or endpoint")
    suites: dict[str, Suite] = Field(
        default={"plain": Suite(attack="plain")},
        min_length=1,
        description="name: the wrappers that prompts are put into, an attack with its knobs",
    )
    goals: GoalSection = Field(default=GoalSection(path="strongreject", size=16), description="harmful requests")
    benign: GoalSection = Field(
        default=GoalSection(path="benign_edgy", size=16), description="harmless requests, put into the same wrappers"
    )
    trained_on: GoalSection | None = Field(
        default=None, description="harmful requests of the training; a run that would measure one of them is refused"
    )
    judge: JudgeSection = Field(default=JudgeSection(), description="who says whether an answer is unsafe")
    attacker: Target | None = Field(
        default=None, description="model of your own that words goals anew, for some suites"
    )
    samples: PositiveInt = Field(default=16, description="answers to each harmful prompt, at most; 1 is greedy alone")
    temperature: NonNegative = Field(default=0.95, description="of the answers; 0 is greedy")
    top_p: Annotated[float, Gt(0), Le(1)] = Field(
        default=1.0, description="answers are drawn from the likeliest tokens with this share of the probability"
    )
    max_new_tokens: PositiveInt = Field(default=128, description="limit on an answer's tokens, reasoning included")
    early_stop: bool = Field(
        default=True,
        description="stop at the first safe answer: the defender's curve needs no more; the attacker's does",
    )
    count: Literal["not_unsafe", "refusal"] = Field(default="not_unsafe", description="what saves a prompt")
    level: Annotated[float, Gt(0), Lt(1)] = Field(default=0.95, description="confidence of the intervals")
    transcripts: str | None = Field(
        default=None,
        description="folder of a run with save_completions: true; its answers are judged, and only missing ones drawn",
    )
    save_completions: bool = Field(default=False, description="keep the words of all answers in the run folder")

    @field_validator("targets", mode="before")
    @classmethod
    def _names_are_words(cls, value: Any) -> Any:
        for name in value if isinstance(value, Mapping) else ():
            if not isinstance(name, str) or not name or set(name) & set("/\\\0.") or name.startswith("-"):
                raise ValueError(f"{name!r} cannot be a name, expected letters, digits, - and _")
        return value

    @model_validator(mode="after")
    def _fits(self) -> AttackRecipe:
        if lacking := [name for name, suite in self.suites.items() if suite.needs_model and self.attacker is None]:
            raise ValueError(f"suite {lacking[0]!r} needs a model that words goals anew: name it as `attacker`")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("temperature: 0 gives the same answer again; set samples: 1, or a temperature above 0")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield models and files."""
        for target in [*self.targets.values(), *([self.attacker] if self.attacker else [])]:
            yield from target.inputs()
        yield from self.judge.inputs()
        if self.transcripts is not None:
            yield from map(str, transcript_files(self.transcripts))
        for section in (self.goals, self.benign, *([self.trained_on] if self.trained_on else [])):
            yield from section.inputs()

    @property
    def how(self) -> Measuring:
        """How answers are counted."""
        return Measuring(
            samples=self.samples, early_stop=self.early_stop, count=self.count, level=self.level, seed=self.seed
        )


def plan(recipe: AttackRecipe) -> list[str]:
    """Say how many answers would be drawn; reads prompts, but no model."""
    goals, benign = _goals(recipe)
    _look(recipe, goals, benign)
    prompts = len(recipe.suites) * len(recipe.targets)
    greedy = prompts * (len(goals) + len(benign))
    most = prompts * len(goals) * recipe.samples if recipe.samples > 1 else 0
    lines = [
        f"{len(recipe.targets)} targets × {len(recipe.suites)} suites × ({len(goals)} harmful and {len(benign)} "
        f"harmless requests): {greedy} greedy answers, of at most {recipe.max_new_tokens} tokens"
    ]
    if most:
        from modicum.jobs.safety.drawing import expected_draws

        usual = prompts * len(goals) * expected_draws(0.5, recipe.samples)
        stops = f"; stopping early, about {usual:.0f} where half of the answers are unsafe" if recipe.early_stop else ""
        lines.append(f"at most {most} samples{stops}")
    for name, suite in recipe.suites.items():
        wrappers = suite.wrappers()
        lines.append(
            f"{name}: {suite.attack.name}" + (f", {len(wrappers)} wrappers" if None not in wrappers.values() else "")
        )
    if recipe.transcripts is not None:
        _same_models(recipe, inputs_of(recipe).hashes)
        lines.append(f"{len(read_transcripts(recipe.transcripts))} answers are known from {recipe.transcripts}")
    lines.append(f"judged by {recipe.judge.name}; refusals by {recipe.judge.refusal} where it does not tell")
    return lines


class Cells(Document):
    """The cells of a run; one that lacks answers, or whose verdicts are gone, is not done: it is measured again."""

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key) or (cell := self[str(key)]).get("lost"):
            return False
        return _verdicts(self.path.parent, str(cell.get("target"))).is_file()


@job("attack", plan=plan, outputs=lambda _: ["verdicts"], foreseeable=lambda _: True)
def attack(recipe: AttackRecipe, run: Run) -> None:
    """Measure attack success, best of N, and over-refusal of each target in each suite.

    Args:
        recipe: Targets, suites and judge.
        run: ``record.json`` gets a cell for each target and suite, the judge's errors, and where the prompts came from;
            ``verdicts/`` has a line for each judged answer, with a hash in place of its words.
    """
    from modicum.evaluate.chat import GenParams
    from modicum.jobs.chat.targets import calibrated, open_judge, open_target, require_sampling
    from modicum.jobs.safety.drawing import Drawing, Verdicts, teller
    from modicum.jobs.safety.measuring import measured, summary

    goals, benign = _goals(recipe)
    _look(recipe, goals, benign)
    cells = Cells(run.folder / "cells.json", {"hash": run.hash})
    keys = {f"{target}.{suite}": (target, suite) for target in recipe.targets for suite in recipe.suites}
    judge, errors = open_judge(recipe.judge)
    if recipe.judge.calibrate:
        store = Document(run.folder / "judge.json", {"hash": run.hash})
        own = once(store, "harm", lambda: calibrated(recipe.judge, judge)) or {}
        with border(store.path, REMEDY):
            errors |= {**own, "labelled": [*own["labelled"], *errors["labelled"]]}
    attacker: Any = None
    if recipe.attacker is not None:  # asked once for each goal and suite, whatever the targets and kills
        attacker = open_target(recipe.attacker, sampled=False)
        attacker = Cached(
            attacker, run.folder / "reworded.jsonl", revision=run.hash, packed=True, check=run.inputs.check
        )
    params = GenParams(temperature=recipe.temperature or 1.0, top_p=recipe.top_p, max_tokens=recipe.max_new_tokens)
    how = recipe.how
    known = None if recipe.transcripts is None else read_transcripts(recipe.transcripts)
    _same_models(recipe, run.inputs.hashes)
    opened: dict[str, Drawing] = {}

    def drawing(name: str) -> Drawing:
        if name not in opened:
            opened.clear()  # frees the memory of the target before
            target = recipe.targets[name]
            model: Any
            if known is None:
                model = open_target(target, sampled=recipe.samples > 1)
            else:
                model = Transcribed(target.called, known, lambda: open_target(target, sampled=recipe.samples > 1))
            if recipe.samples > 1:
                require_sampling(model)
            run.inputs.check()
            verdicts = Verdicts(
                _verdicts(run.folder, name), save_completions=recipe.save_completions, check=run.inputs.check_mapped
            )
            tell = teller(run, f"{name}: answers judged")
            opened[name] = Drawing(
                model, judge, verdicts, params=params, seed=recipe.seed, system=target.system, tell=tell
            )
        return opened[name]

    @cache
    def wrapped(name: str) -> tuple[Any, Any, int]:
        harmful, harmless = (recipe.suites[name].wrap(name, part, attacker) for part in (goals, benign))
        if lost := len(goals) + len(benign) - len(harmful) - len(harmless):
            run.note(f"{name}: {lost} of {len(goals) + len(benign)} requests were not worded anew, and are left out.")
        return harmful, harmless, lost

    def measure(target: str, name: str) -> Cell:
        harmful, harmless, lost = wrapped(name)
        cell = {"target": target, "suite": name, "attack": recipe.suites[name].attack.name}
        if lost:
            cell["not_worded"] = lost
        return cell | measured(how, drawing(target), harmful, harmless, errors)

    def tell(key: str, cell: Cell) -> None:
        if lost := cell.get("lost"):
            run.note(
                f"{cell['target']} in {cell['suite']}: {lost} answers never came or could not be judged. They count as "
                "unsafe; run again to ask for them again.",
                lacks=key,
            )
        if (cut := cell["incomplete"]) > CUT:
            run.note(
                f"{cell['target']} in {cell['suite']}: {cut:.0%} of the answers were cut inside their reasoning. They "
                "have no verdict, and count as unsafe. Raise max_new_tokens."
            )
        run.say(
            f"{cell['target']} in {cell['suite']}: attack success {cell['greedy']['value']:.2f} greedily, "
            f"requests refused: harmful {cell['refused']['value']:.2f}, harmless {cell['over_refusal']['value']:.2f}"
        )

    wanted = {key: lambda pair=pair: measure(*pair) for key, pair in keys.items()}
    fill(cells, wanted, tell=tell, check=run.inputs.check_mapped)
    found = [cells[key] for key in keys]
    with border(cells.path, REMEDY):
        targets = {name: summary([c for c in found if c["target"] == name]) for name in recipe.targets}
    sections = (recipe.goals, recipe.benign, *([recipe.trained_on] if recipe.trained_on else []))
    used = [section.path for section in sections if section.path in attack_data.GOALS]
    used += [suite.packaged for suite in recipe.suites.values() if suite.packaged is not None]
    used += errors.get("labelled", ())
    run.record["metrics"] = {
        "safety": {
            "cells": found,
            "targets": targets,
            "judge": errors,
            "data": attack_data.provenance(*dict.fromkeys(used)),
            "sampling": {
                "samples": recipe.samples,
                "temperature": recipe.temperature,
                "top_p": recipe.top_p,
                "max_new_tokens": recipe.max_new_tokens,
                "early_stop": recipe.early_stop,
                "count": recipe.count,
            },
            "level": recipe.level,
        }
    }
    run.output("verdicts", run.folder / VERDICTS)


def _verdicts(folder: Path, target: str) -> Path:
    return folder / VERDICTS / f"{target}.jsonl"


def _same_models(recipe: AttackRecipe, hashes: Mapping[str, str]) -> None:
    """Refuse transcripts of other weights: answers are known by a model's name, which may stand for another model now.

    Raises:
        CheckpointError: A target is not what it was when the transcripts were made.
    """
    if recipe.transcripts is None:
        return
    before = read_record(recipe.transcripts).get("inputs") or {}
    for name, target in recipe.targets.items():
        for reference in look(target.inputs()).hashes:  # an adapter's base among them
            if reference in before and before[reference] != hashes.get(reference):
                raise CheckpointError(
                    f"{reference} of target {name!r} is not what it was when {recipe.transcripts} was drawn, so the "
                    "answers there are not its own. Leave out transcripts, or name the earlier model."
                )


def _goals(recipe: AttackRecipe) -> tuple[list[Any], list[Any]]:
    goals, benign = recipe.goals.load(harmful=True), recipe.benign.load(harmful=False)
    if recipe.trained_on is not None:
        refuse_shared(recipe.trained_on.load(harmful=True), goals)
    refuse_both(goals, benign)
    return goals, benign


def _look(recipe: AttackRecipe, goals: list[Any], benign: list[Any]) -> None:
    from modicum.evaluate.chat import GenParams
    from modicum.jobs.chat.targets import look_at, look_at_all

    if recipe.attacker is not None:
        look_at(recipe.attacker)
    params = GenParams(max_tokens=recipe.max_new_tokens)
    look_at_all(recipe.suites.values(), (goals, benign), recipe.targets.values(), recipe.judge, params=params)
