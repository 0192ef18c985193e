"""Goals of an evaluation, harmful and harmless, and the wrappers around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from modicum import registry
from modicum.errors import RecipeError
from modicum.evaluate.attacks.reworded import NotWordedError
from modicum.evaluate.chat import AttackedPrompt, ChatModel, ChatRequest, GenParams, Goal, user
from modicum.jobs import attack_data
from modicum.jobs.safety.filters import normal
from modicum.random import generator
from modicum.recipe import Choice, Section, choice
from modicum.registry import wanted
from modicum.types import NonNegativeInt, PositiveInt


class GoalSection(Section):
    """Some goals of a packaged set, or of a file with a `prompt` in each row."""

    alone: ClassVar[str | None] = "path"
    path: str = Field(
        description="a packaged set, such as strongreject or benign_edgy, or a file of rows with `prompt`"
    )
    size: PositiveInt | None = Field(default=None, description="how many, drawn by the seed; all when not given")
    skip: NonNegativeInt = Field(
        default=0, description="how many of the drawn order belong to somebody else, as training"
    )
    seed: NonNegativeInt = Field(default=0, description="of the drawn order")

    def inputs(self) -> Iterator[str]:
        """Yield the file, where it is one."""
        if self.path not in attack_data.GOALS:
            from modicum.jobs.data.section import DataSection

            yield from DataSection(path=self.path).inputs()

    def load(self, *, harmful: bool) -> list[Goal]:
        """Return the goals, in drawn order.

        Raises:
            ModicumError: There is no such set, it holds goals of the other kind, or too few of them.
        """
        import torch

        found = self._all(harmful)
        if wrong := next((goal for goal in found if goal.harmful is not harmful), None):
            kinds = ("harmful", "harmless") if harmful else ("harmless", "harmful")
            raise RecipeError(f"{self.path} holds {kinds[1]} requests ({wrong.id}), expected {kinds[0]} ones.")
        order = torch.randperm(len(found), generator=generator(self.seed, "goals", self.path)).tolist()
        chosen = order[self.skip : None if self.size is None else self.skip + self.size]
        if not chosen or (self.size is not None and len(chosen) < self.size):
            raise RecipeError(
                f"{self.path} has {len(found)} requests, which leaves {len(chosen)} after {self.skip}, expected "
                f"{self.size or 1}. Ask for fewer."
            )
        return [found[index] for index in chosen]

    def pairs(self) -> list[Goal | dict[str, str]]:
        """Return harmless goals; those of a file come with their answers, where the rows have a ``completion``."""
        goals = self.load(harmful=False)
        if self.path in attack_data.GOALS:
            return list(goals)
        from modicum.jobs.data.rows import load_rows
        from modicum.jobs.data.section import DataSection

        try:
            load_rows(DataSection(path=self.path, format="completion", size=1), seed=self.seed)
        except RecipeError:
            return list(goals)  # prompts alone
        rows = load_rows(DataSection(path=self.path, format="completion"), seed=self.seed).rows
        answers = {f"{Path(self.path).stem}-{index}": row["completion"] for index, row in enumerate(rows)}
        return [{"id": goal.id, "prompt": goal.text, "completion": answers[goal.id]} for goal in goals]

    def _all(self, harmful: bool) -> list[Goal]:
        if self.path in attack_data.GOALS:
            return attack_data.goals(self.path)
        from modicum.jobs.data.rows import load_rows
        from modicum.jobs.data.section import DataSection, Fields

        if "/" not in self.path and not Path(self.path).exists():
            return attack_data.goals(self.path)  # says which sets there are
        rows = load_rows(DataSection(path=self.path, format="text", fields=Fields(text="prompt")), seed=self.seed)
        if empty := [index for index, row in enumerate(rows.rows) if not row["text"].strip()]:
            raise RecipeError(f"{self.path}, row {empty[0]}: the prompt is empty, expected words.")
        return [
            Goal(f"{Path(self.path).stem}-{index}", row["text"], harmful, source=self.path)
            for index, row in enumerate(rows.rows)
        ]


class Suite(Section):
    """An attack, with the wrappers that it uses."""

    alone: ClassVar[str | None] = "attack"
    attack: choice(registry.attack, complete=False) = Field(description="the attack: its name, or with its knobs")  # type: ignore[valid-type]
    family: str | None = Field(
        default=None, description="wrappers of an installed package; the attack's own by default"
    )
    count: PositiveInt = Field(default=4, description="how many wrappers of the family, drawn by the seed")
    seed: NonNegativeInt = Field(default=0, description="of the draw of wrappers")

    @field_validator("attack")
    @classmethod
    def _knobs_fit(cls, value: Choice) -> Choice:
        facts = registry.attack[value.name].facts
        own = dict(value.knobs)
        if facts.wrappers and "template" not in own:
            own["template"] = (
                "{{ prompt }}" if value.name == "template" else "{{ wrapped_input }}"
            )  # its family has others
        registry.attack[value.name].knobs(own)
        return value

    @model_validator(mode="after")
    def _family_is_used(self) -> Suite:
        if self.family is not None and self.packaged is None:
            raise ValueError(
                f"attack {self.attack.name!r} takes no wrappers of a package here; leave out family {self.family!r}"
            )
        return self

    @property
    def packaged(self) -> str | None:
        """The family of an installed package from which the wrappers come; none where the recipe has its own."""
        wrappers = registry.attack[self.attack.name].facts.wrappers
        return None if wrappers is None or "template" in self.attack.knobs else self.family or wrappers

    @property
    def needs_model(self) -> bool:
        """Whether a model of the user's own words the prompts."""
        return registry.attack[self.attack.name].facts.needs_model

    def wrappers(self) -> dict[str, str | None]:
        """Return the wrappers by name; one without a name where the attack has none.

        Raises:
            ModicumError: The family is unknown, or its package is missing.
        """
        import torch

        if self.packaged is None:
            return {"": None}
        found = attack_data.templates(self.packaged)
        names = sorted(found)
        if "count" in self.model_fields_set and self.count > len(names):
            raise RecipeError(
                f"Family {self.packaged!r} has {len(names)} wrappers, and count is {self.count}. Lower it."
            )
        order = torch.randperm(len(names), generator=generator(self.seed, "wrappers", self.family or "")).tolist()
        return {names[index]: found[names[index]] for index in order[: self.count]}

    def wrap(self, name: str, goals: Sequence[Goal], model: ChatModel | None) -> list[AttackedPrompt]:
        """Return every goal in one of the wrappers, which take turns; without those that the model does not word.

        Raises:
            RecipeError: The model is missing, fails, or words none of the goals; or the attack has no words for them.
        """
        entry = registry.attack[self.attack.name]
        wrappers = list(self.wrappers().items())

        def ask(question: str) -> str:
            if model is None:
                raise RecipeError(f"Suite {name!r} needs a model that words goals anew. Name it as `attacker`.")
            (result,) = model.generate([ChatRequest(user(question), GenParams(temperature=0.0, max_tokens=256))])
            if result.error is not None or not result.choices:
                raise RecipeError(
                    f"{model.name} words no goal anew: {result.error or 'no answer'}. Run again to go on."
                )
            return result.choices[0].text

        made, why = [], ""
        for index, goal in enumerate(goals):
            template, text = wrappers[index % len(wrappers)]
            knobs = entry.knobs(self.attack.knobs if text is None else {**self.attack.knobs, "template": text})
            try:
                prompt = entry.function(goal.text, **knobs, **wanted(entry.function, {"ask": ask}))
            except NotWordedError as error:
                why = str(error)
                continue
            made.append(AttackedPrompt(goal, user(prompt), name, template))
        if goals and not made:
            raise RecipeError(f"Suite {name!r} words none of {len(goals)} goals: {why}")
        return made


def refuse_shared(training: Sequence[Goal], test: Sequence[Goal]) -> None:
    """Refuse goals of an evaluation that were trained on.

    Raises:
        RecipeError: Two goals have the same words, but for case, punctuation and white space.
    """
    for goal, other in _same_words(test, training):
        raise RecipeError(
            f"Goal {goal.id} of the evaluation is goal {other.id} of the training data. Set `skip` or another set, "
            "so that they are different."
        )


def refuse_both(harmful: Sequence[Goal], harmless: Sequence[Goal]) -> None:
    """Refuse a request that is harmful and harmless at once.

    Raises:
        RecipeError: Two requests have the same words, but for case, punctuation and white space.
    """
    for goal, other in _same_words(harmless, harmful):
        raise RecipeError(f"Request {goal.id} is harmless, and harmful as {other.id}. Take it out of one of the sets.")


def _same_words(goals: Sequence[Goal], others: Sequence[Goal]) -> Iterator[tuple[Goal, Goal]]:
    known = {normal(goal.text): goal for goal in others}
    return ((goal, known[words]) for goal in goals if (words := normal(goal.text)) in known)
