"""Train a LoRA adapter instead of all weights: the recipe's ``adapter``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modicum import registry
from modicum.borders import expanded, loads
from modicum.durable import whole_folder, write_atomic
from modicum.errors import CheckpointError, RecipeError, UnsupportedError, did_you_mean
from modicum.jobs.loading.folders import try_patterns
from modicum.jobs.training.parts import Build, Part
from modicum.layout import ADAPTER_CONFIG
from modicum.recipe import Choice, Section, choice
from modicum.references import CONVERTED as BASE
from modicum.registry import training_part
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.facts import AdapterFacts
    from modicum.jobs.training.adapter import Started
    from modicum.jobs.training.adapter_geometry import Change
    from modicum.jobs.training.batches import Batches
    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.trainer import PartsTrainer


CACHE = "adapter_start.safetensors"  # the factors that training started from, in the run's folder
START = "start"  # their hash, among what a checkpoint remembers


class AdapterSection(Section):
    """A LoRA adapter; the fields under ``config`` go to ``peft.LoraConfig`` verbatim."""

    rank: PositiveInt = Field(default=8, description="of the adapter")
    init: choice(registry.adapter_init) | None = Field(  # type: ignore[valid-type]
        default=None, description="how it starts; PEFT's default when not given"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="further fields of peft.LoraConfig")
    compare: str | None = Field(
        default=None, description="a full fine-tune of the same base, to whose change the report measures the angles"
    )


@training_part("adapter", section=AdapterSection, description="train a LoRA adapter instead of all weights", order=10)
class Adapter(Part):
    """Surround the model with a LoRA adapter, started by a method of ``modicum list adapter_inits``."""

    section: AdapterSection
    keeps_dtype = True
    output = "adapter"
    started: Started | None = None
    change: Change | None = None

    def __init__(self, name: str, recipe: TrainRecipe, section: AdapterSection) -> None:
        super().__init__(name, recipe, section)
        self.trains = f"a LoRA adapter of rank {section.rank}"
        self.init: Choice = section.init or Choice(name="default")
        if recipe.model.scratch is not None:
            raise RecipeError("adapter and model.scratch came together: random weights are no base. Drop one.")
        if self.init.knobs.get("reuse_data") == "continue":
            raise RecipeError(
                "adapter.init.reuse_data: continue is for loops of your own; the trainer draws its rows anew."
            )
        self.facts = registry.adapter_init[self.init.name].facts
        if section.init is not None:
            refuse_contradictions(self.init.name, self.facts, section.config)
        if section.compare is not None:
            if section.init is None:
                raise RecipeError("adapter.compare needs a start that is known. Set adapter.init, such as `default`.")
            if self.facts.stock:
                raise RecipeError(f"adapter.compare: the start of {self.init.name} is PEFT's own. Take another init.")
            if recipe.model.convert is not None:
                raise RecipeError("adapter.compare and model.convert came together: their weights differ. Drop one.")
        if self.facts.optimizer is not None:
            self.brings = ("optimizer",)
        if self.facts.after_backward is not None:
            self.needs_gradients = "adapter.init"

    def inputs(self) -> Iterator[str]:
        """Yield the full fine-tune that the adapter is compared to."""
        if self.section.compare is not None:
            yield self.section.compare

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse a configuration that PEFT does not take, or that does not fit the length of the run."""
        config = self._config(self.adapter({}, None))
        if self.facts.schedule is not None and arguments.max_steps > 0:
            self.facts.schedule(config, self.init.knobs, total_steps=arguments.max_steps)

    def foresee(self, _note: Callable[[str], None], model: Any, _tokenizer: Any) -> None:
        """Refuse what PEFT refuses on a model without numbers, such as modules that are not there."""
        from modicum.jobs.loading.models import rehearse_model

        section = self.recipe.model
        if model is None or section.convert is not None:
            return
        own = rehearse_model(section.path, allow_pickle=section.allow_pickle, remote_code=section.remote_code)
        with suppress(RuntimeError):  # a start of PEFT's that computes with the weights, such as PiSSA's
            self.wrap(own, self.adapter({}, own))

    def adapter(self, fields: dict[str, Any], model: Any) -> dict[str, Any]:
        """Return the recipe's fields over a few defaults."""
        from peft import LoraConfig

        known = LoraConfig.__dataclass_fields__
        for key in self.section.config:
            if key not in known or key == "r":
                hint = "Use adapter.rank." if key == "r" else did_you_mean(key, known)
                raise RecipeError(f"adapter.config: peft.LoraConfig has no {key!r} here. {hint}")
        defaults = {
            "target_modules": "all-linear",
            "lora_alpha": 2 * self.section.rank,
            "task_type": "CAUSAL_LM",
        }
        made = defaults | fields | self.section.config
        if made.get("layers_to_transform") is not None and made["target_modules"] == "all-linear":
            # PEFT takes layers only beside a list of names.
            made["target_modules"] = ["all-linear"] if model is None else _linear_names(model)
        return made

    def wrap(self, model: Any, fields: Mapping[str, Any]) -> Any:
        """Return the model inside a new adapter."""
        import torch
        from peft import get_peft_model

        from modicum.jobs.training.comparison import refuse_other_shapes
        from modicum.random import derive_seed

        base = self._base(model)
        try_patterns(fields, model, "adapter.config")
        config = self._config(fields)
        try:
            # PEFT draws the first factors from the global generator; the fork keeps that to these lines.
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(self.recipe.seed, "adapter"))
                wrapped = get_peft_model(model, config)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"adapter.config: {error}") from None
        if (name := _doubly_adapted(wrapped)) is not None:
            raise UnsupportedError(
                f"adapter.config: {name} is to be trained, and the objective trains the row of its mask token there. "
                "PEFT cannot do both. Take it out of target_modules and modules_to_save."
            )
        wrapped.peft_config["default"].base_model_name_or_path = base
        if self.section.compare is not None:
            refuse_other_shapes(self.recipe.model, self.section.compare, wrapped)
        return wrapped

    def start(self, model: Any, batches: Batches) -> None:
        """Initialise the adapter by the recipe's method, from the first batches of the training data."""
        if self.section.init is None:
            return
        from modicum.jobs.training.adapter import initialize
        from modicum.jobs.training.comparison import full_change

        self.started = initialize(
            model,
            self.init.name,
            self.init.knobs,
            batches=batches,
            lr=batches.arguments.learning_rate,
            seed=self.recipe.seed,
            total_steps=batches.steps,
            accumulation=batches.arguments.gradient_accumulation_steps,
            cache=self.run.folder / CACHE,
        )
        for note in self.started.notes:
            self.run.note(note)
        if self.section.compare is not None:
            self.change = full_change(self.recipe.model, self.section.compare, model)

    def trainer(self, build: Build) -> None:
        """Add the optimiser and the callback that the method brings along."""
        if self.section.init is None:
            return
        from modicum.jobs.training.adapter import make_optimizer, step_callback

        lr, decay = build.args.learning_rate, build.args.weight_decay
        own = make_optimizer(build.model, self.init.name, self.init.knobs, lr=lr, weight_decay=decay)
        if own is not None:
            build.optimizer = own
        if (callback := step_callback(self.init.name, resumes=True)) is not None:
            build.add_callback(callback)
        self.model_in_training = build.model

    def remember(self) -> dict[str, Tensor]:
        """Return what the method remembers, and the hash of the factors that training started from."""
        kept = {} if self.facts.memory is None else self.facts.memory(self.model_in_training)
        return kept | ({} if self.started is None else {START: self.started.digest})

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what the method remembers, from the same start.

        Raises:
            CheckpointError: The checkpoint is of an earlier version, or belongs to another start.
        """
        known = dict(state)
        start = known.pop(START, None)
        if self.started is not None and start is not None and not start.equal(self.started.digest):
            raise CheckpointError(
                f"The start of the adapter in {self.run.folder / CACHE} is not the one that the checkpoint was trained "
                "from. Choose another --out."
            )
        if self.facts.recall is not None:
            if start is None:
                raise CheckpointError(
                    f"The checkpoint is of an earlier version, which did not keep what {self.init.name} remembers of "
                    "the gradients. Choose another --out."
                )
            self.facts.recall(self.model_in_training, known)

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Make the trained parts plain weights again."""
        if self.started is not None:
            self.started.prepare(trainer.model)
        return {}

    def save(self, folder: Path) -> None:
        """Make the saved adapter one for the base that the user knows."""
        _tidy_config(folder / ADAPTER_CONFIG, **self._base_for_users())
        if self.started is not None:
            self.started.finish(folder, change=self.change)

    def _config(self, fields: Mapping[str, Any]) -> Any:
        from modicum.jobs.training.adapter import peft_config

        try:
            return peft_config(self.init.name, self.init.knobs, rank=self.section.rank, **fields)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"adapter.config: {error}") from None

    def _base_for_users(self) -> dict[str, str | None]:
        """Return where stock PEFT finds the base from any folder: its Hub id and revision, or an absolute path."""
        from modicum.jobs.loading.references import resolve_model

        section = self.recipe.model
        if section.convert is not None:
            return {"base": str((self.run.home / BASE).resolve()), "revision": None}
        if (found := hub_id(section.path)) is not None:
            return {"base": found[0], "revision": found[1]}
        return {"base": str(resolve_model(section.path).resolve()), "revision": None}

    def _base(self, model: Any) -> str:
        """Return the folder of the base; a converted one is written, or nobody could load the adapter again."""
        from modicum.jobs.loading.models import load_tokenizer
        from modicum.jobs.loading.references import resolve_model

        section = self.recipe.model
        if section.convert is None:
            # While it trains a folder: PEFT looks there whether the vocabulary changed, and knows no builtin models.
            return str(resolve_model(section.path, allow_pickle=section.allow_pickle, remote_code=section.remote_code))
        target = self.run.folder / BASE
        if self.run.main and not target.is_dir():
            with whole_folder(target) as folder:
                model.save_pretrained(folder)
                load_tokenizer(section.path, remote_code=section.remote_code).save_pretrained(folder)
        return str(target.absolute())


def _linear_names(model: Any) -> list[str]:
    """Return the last parts of the names of all linear modules but the head, which PEFT calls ``all-linear``."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return sorted({name.rpartition(".")[2] for name, module in modules if module is not head})


def _doubly_adapted(wrapped: Any) -> str | None:
    """Return the embedding or head whose rows are trained one by one and as a whole at once, if there is one."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from torch import nn

    for name, module in wrapped.named_modules():
        if isinstance(module, TrainableTokensLayer) and not isinstance(module.base_layer, (nn.Embedding, nn.Linear)):
            return name.removesuffix(".token_adapter").rpartition(".")[2]
    return None


def hub_id(reference: str) -> tuple[str, str | None] | None:
    """Return a Hub id and its revision; ``None`` for a folder or a builtin model.

    Example:
        >>> hub_id("org/name@v2"), hub_id("builtin:byte-llama")
        (('org/name', 'v2'), None)
    """
    if ":" in reference or expanded(reference).exists():
        return None
    name, _, revision = reference.partition("@")
    return name, revision or None


def refuse_contradictions(name: str, facts: AdapterFacts, config: Mapping[str, Any]) -> None:
    """Refuse fields of ``LoraConfig`` that would start another adapter than the method does, or that it cannot start.

    Raises:
        RecipeError: A field says otherwise than the method.
        UnsupportedError: The method starts plain LoRA alone.
    """
    own = {"init_lora_weights": True} | (dict(facts.config) if isinstance(facts.config, Mapping) else {})
    for key, value in own.items():
        # A mapping holds further settings, which may be changed.
        if not isinstance(value, Mapping) and config.get(key, value) != value:
            raise RecipeError(
                f"adapter.init is {name}, which needs {key}: {json.dumps(value)}, and adapter.config sets "
                f"{key}: {json.dumps(config[key])}. Drop one."
            )
    for key in () if facts.stock else ("use_dora", "lora_bias"):
        if config.get(key):
            raise UnsupportedError(f"adapter.init: {name} starts plain LoRA, adapter.config.{key} is more. Drop one.")


def _tidy_config(path: Path, *, base: str | None, revision: str | None) -> None:
    """Put the module names in order, since PEFT writes a set, and name the base as whoever loads the adapter will."""
    config = loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": revision}
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
