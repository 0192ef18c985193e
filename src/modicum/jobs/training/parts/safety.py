"""Learn to reason about safety, or turn away from harmful answers: the recipe's ``objective`` where it does that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.parts import Build, Data, Part
from modicum.recipe import Choice
from modicum.registry import training_part

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from modicum.jobs.training.recipe import TrainRecipe


@training_part("safety", order=20)
class Safety(Part):
    """Serve the objectives that read the reasoning of a row, or the answer that its request must not get."""

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether the objective is one of these."""
        chosen: Choice | None = recipe.section("objective")
        return chosen is not None and registry.objective[chosen.name].facts.acts_on in ("reasoning", "contrasts")

    def __init__(self, name: str, recipe: TrainRecipe, _section: None = None) -> None:
        super().__init__(name, recipe, recipe.section("objective"))
        self.method = self.section.name
        self.sets: list[list[dict[str, Any]]] = []
        if self.method != "derta":
            self.brings = ("loss",)
        for section in (recipe.data, recipe.eval_data):
            if section is not None and section.packing:
                raise RecipeError(f"{self.method} reads whole rows: leave out data.packing.")
            if section is not None and not section.completion_only:
                raise RecipeError(f"{self.method} learns answers alone: leave out data.completion_only.")
        if self.method in ("circuit_breakers", "latent_adversarial"):
            adapter: Any = recipe.section("adapter")
            if adapter is None:
                raise RecipeError(
                    f"{self.method} compares the model with itself without its adapter. Set adapter: {{rank: 16}}."
                )
            if adapter.init is not None and registry.adapter_init[adapter.init.name].facts.shifts_base:
                raise RecipeError(
                    f"{self.method} compares with the base, and adapter.init {adapter.init.name} shifts it. Choose "
                    "another init."
                )

    def fit(self, parts: Sequence[Part]) -> None:
        """Refuse a training step without gradients where a search needs them."""
        if self.method == "latent_adversarial" and any("training step" in part.brings for part in parts):
            raise RecipeError("latent_adversarial searches by gradients, which a zeroth-order optimizer has none of.")

    def inputs(self) -> Iterator[str]:
        """Yield the guidelines and the teacher."""
        for key in ("guidelines", "teacher"):
            if (value := self.section.knobs.get(key)) is not None:
                yield value

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse what would cut a batch, or run a search in several processes."""
        if arguments.n_gpu > 1:
            raise UnsupportedError(
                f"{self.method} does not run under DataParallel, which would cut its batches. Start one process for "
                "each GPU: accelerate launch -m modicum run …"
            )
        if self.method == "latent_adversarial" and arguments.world_size > 1:
            raise UnsupportedError("latent_adversarial runs in one process, whose search owns the gradients.")

    def data(self, data: Data) -> Data:
        """Encode the rows with what the objective reads of them."""

        def reasoning(rows: Any, tokenizer: Any, section: Any, *, note: Any) -> Any:
            from modicum.jobs.training.reasoning import encode_reasoning

            found = encode_reasoning(rows, tokenizer, section, self.section.knobs, seed=self.recipe.seed, note=note)
            self.sets.append(found)
            return found

        def contrasts(rows: Any, tokenizer: Any, section: Any, *, note: Any) -> Any:
            from modicum.jobs.training.contrasts import decoupled, encode_contrasts

            found = encode_contrasts(rows, tokenizer, section, note=note)
            if self.method != "derta":
                return found
            return decoupled(found, self.section.knobs, seed=self.recipe.seed)

        of_reasoning = registry.objective[self.method].facts.acts_on == "reasoning"
        return replace(data, encode=reasoning if of_reasoning else contrasts)

    def model(self, model: Any, tokenizer: Any) -> Any:
        """Ask the teacher, which is the model before an adapter surrounds it unless another one is named."""
        knobs = self.section.knobs
        if knobs.get("distill") == "soft":
            from modicum.jobs.safety.prompts import load_guidelines, shown
            from modicum.jobs.training.reasoning import add_teacher

            teacher = model if knobs["teacher"] is None else self._teacher(tokenizer, model)
            guidelines = shown(load_guidelines(knobs["guidelines"]), knobs["guideline_set"])
            for examples in self.sets:
                add_teacher(examples, teacher, tokenizer, guidelines, top_k=knobs["top_k"])
            self.run.note(f"The teacher's {knobs['top_k']} likeliest tokens are learned at each position.")
        return model

    def trainer(self, build: Build) -> None:
        """Replace collator and loss."""
        knobs = self.section.knobs
        if self.method == "safety_reasoning":
            from modicum.jobs.training.reasoning import ReasoningLoss, SRGDataCollator

            build.data_collator = SRGDataCollator(build.processing_class)
            build.own_loss = ReasoningLoss(
                loss_norm=knobs["loss_norm"], reasoning_loss_weight=knobs["reasoning_loss_weight"]
            )
        elif self.method != "derta":
            from modicum.jobs.data.collators import pad_id
            from modicum.jobs.training.contrasts import BreakerLoss, ContrastCollator, LatentLoss, schedule_callback

            build.data_collator = ContrastCollator(pad_id(build.processing_class))
            if self.method == "circuit_breakers":
                build.own_loss = loss = BreakerLoss(knobs)
                build.add_callback(schedule_callback(loss))
            else:
                build.own_loss = LatentLoss(knobs, build.model)

    def _teacher(self, tokenizer: Any, student: Any) -> Any:
        from modicum.jobs.loading.models import load_model, load_tokenizer

        reference = self.section.knobs["teacher"]
        if load_tokenizer(reference).get_vocab() != tokenizer.get_vocab():
            raise RecipeError(
                f"distill: soft compares distributions over tokens, and {reference} has another tokenizer. Take a "
                "teacher of the same family, or distill: hard."
            )
        return load_model(reference, dtype=str(student.dtype).removeprefix("torch.")).to(student.device)
