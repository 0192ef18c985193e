"""Train or fine-tune a causal language model with ``transformers.Trainer``, wholly or through a LoRA adapter.

Everything under ``trainer:`` goes to ``TrainingArguments`` verbatim. Run it on several processes with
``accelerate launch -m modicum run recipe.yaml``.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.errors import RecipeError, UnsupportedError, did_you_mean
from modicum.jobs.data.rows import DataSection, LabelledLogits, collate, load_rows, tokenize
from modicum.jobs.loading.models import (
    fresh_model,
    load_model,
    load_tokenizer,
    model_shape,
    native_bfloat16,
)
from modicum.jobs.loading.references import resolve_model
from modicum.jobs.training.adapter import Started, initialize, make_optimizer, peft_config, step_callback
from modicum.jobs.training.adapter_geometry import change_between
from modicum.jobs.training.answers import answer_rows, judges_answers, use_answers
from modicum.jobs.training.extra_modules import additions, spare_additions
from modicum.jobs.training.gradient import check_arguments, gradient_callback
from modicum.jobs.training.objective import complete_knobs, finish_model, lora_options, use_objective
from modicum.jobs.training.recipe import AdapterSection, ModelSection, TrainRecipe
from modicum.jobs.training.zeroth_order import zeroth_order_trainer
from modicum.record import Run, whole_folder, write_atomic
from modicum.registry import job

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from modicum.jobs.training.adapter_geometry import Change

BASE = "base"  # the converted model under an adapter

ANSWER_METRICS = ("eval_loss", "eval_accuracy", "eval_reward")


def plan(recipe: TrainRecipe) -> list[str]:
    """Say what would be trained; checks the trainer's arguments."""
    arguments = training_arguments(recipe, Path("unused"))
    weights = sum(file.stat().st_size for file in resolve_model(recipe.model.path).glob("*.safetensors"))
    rows = len(load_rows(recipe.data, seed=recipe.seed))
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    how = f"a LoRA adapter of rank {recipe.adapter.rank}" if recipe.adapter else "all weights"
    start = f"{weights / 1e6:.0f} MB of weights" if recipe.model.scratch is None else "random weights"
    return [
        f"train {how} of {recipe.model.path} ({start})",
        f"on {rows} rows of {recipe.data.path}",
        f"{_steps(arguments, rows)} optimiser steps of {batch} rows on each device",
    ]


@job("train", plan=plan, distributed=True)
def train(recipe: TrainRecipe, run: Run) -> None:
    """Fine-tune a model, saving checkpoints on the way and resuming from the last one.

    Args:
        recipe: Model, data, adapter, objective and the trainer's arguments.
        run: Where checkpoints and the result go: ``adapter/`` with an adapter, else ``model/``. The base of an adapter
            on a converted model is written to ``base/``.
    """
    arguments = training_arguments(recipe, run.folder / "checkpoints")
    tokenizer = load_tokenizer(recipe.model.path, remote_code=recipe.model.remote_code)
    datasets = {
        name: _dataset(recipe, section, tokenizer, run, training=section is recipe.data)
        for name, section in (("train_dataset", recipe.data), ("eval_dataset", recipe.eval_data))
        if section is not None
    }
    model = _model(recipe, run, arguments.device)
    rows = model.get_input_embeddings().weight.shape[0]
    mask = _mask_token(recipe, tokenizer, model)
    if recipe.adapter is not None:
        # While it trains a folder: PEFT looks there whether the vocabulary was changed, and knows no builtin models.
        base = _keep_base(model, recipe, run) if recipe.model.convert is not None else str(_folder(recipe.model))
        model = _with_adapter(model, recipe.adapter, base, lora_options({"mask_token_id": mask}), recipe.seed)
    collator = collate(tokenizer)
    started = _start_adapter(
        recipe, model, partial(_tokens, recipe, recipe.data, tokenizer, run), collator, arguments, run
    )
    change = _full_change(recipe, model, started)
    trainer = _trainer(recipe, model, arguments, run, tokenizer, collator, datasets)
    checkpoint = _last_checkpoint(Path(arguments.output_dir), delete_broken=run.main)
    if checkpoint:
        run.say(f"resuming from {checkpoint.name}")
    result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    run.record["metrics"] = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if started is not None:
        started.prepare(trainer.model)
    if recipe.optimizer is not None:
        kept = sum(p.nbytes for p in model.parameters())
        run.record["metrics"]["zeroth_order"] = {"model_bytes": kept, **trainer.zeroth_order.report()}
    if recipe.eval_data is not None and _judges_answers(recipe):
        run.record["metrics"] |= {k: v for k, v in trainer.evaluate().items() if k in ANSWER_METRICS}
    if mask is not None:
        finish_model(trainer.model, mask_token_id=mask, rows=rows)
    _save(recipe, trainer, started, change, run)


def training_arguments(recipe: TrainRecipe, folder: Path) -> TrainingArguments:
    """Build ``TrainingArguments`` from the recipe, with modicum's few defaults where the recipe says nothing."""
    import torch
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    for key in recipe.trainer:
        if key not in known:
            raise RecipeError(f"trainer: transformers.TrainingArguments has no {key!r}. {did_you_mean(key, known)}")
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 10,
        "save_total_limit": 2,
        "disable_tqdm": not sys.stderr.isatty(),
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    if recipe.gradient is not None:
        defaults["max_grad_norm"] = 0.0
    seeds = {"seed": recipe.seed, "data_seed": recipe.seed}
    try:
        arguments = TrainingArguments(**defaults | recipe.trainer | seeds, output_dir=str(folder))
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"trainer: {error}") from None
    if arguments.eval_strategy != "no" and recipe.eval_data is None:
        raise RecipeError("trainer.eval_strategy asks for evaluations on the way, but there is no eval_data. Set it.")
    if recipe.gradient is not None:
        check_arguments(arguments, recipe.gradient.name, recipe.gradient.knobs)
    return arguments


def _judges_answers(recipe: TrainRecipe) -> bool:
    return recipe.objective is not None and judges_answers(recipe.objective.name)


def _dataset(recipe: TrainRecipe, section: DataSection, tokenizer: Any, run: Run, *, training: bool) -> Any:
    if recipe.objective is None or not _judges_answers(recipe):
        return _tokens(recipe, section, tokenizer, run)
    name, rows = recipe.objective.name, load_rows(section, seed=recipe.seed)
    knobs = registry.objective[name].knobs(recipe.objective.knobs)
    return answer_rows(rows, tokenizer, section, name, knobs, training=training, note=run.note)


def _tokens(recipe: TrainRecipe, section: DataSection, tokenizer: Any, run: Run) -> Any:
    return tokenize(load_rows(section, seed=recipe.seed), tokenizer, section, note=run.note)


def _model(recipe: TrainRecipe, run: Run, device: torch.device) -> PreTrainedModel:
    section = recipe.model
    shared: dict[str, Any] = {
        "dtype": _dtype(recipe, run, device),
        "attention": section.attention,
        "remote_code": section.remote_code,
    }
    if section.scratch is None:
        model = load_model(section.path, allow_pickle=section.allow_pickle, **shared)
    else:
        shape = model_shape(section.path, section.scratch, remote_code=section.remote_code)
        model = fresh_model(shape, seed=recipe.seed, **shared)
    if section.convert is not None:
        model = registry.model[section.convert.name].function(model, **section.convert.knobs)
        if section.scratch is not None:
            # A converted shape draws its own weights: one with more visits may want smaller ones.
            model = fresh_model(model.config, seed=recipe.seed, **shared)
    return model


def _folder(section: ModelSection) -> Path:
    return resolve_model(section.path, allow_pickle=section.allow_pickle, remote_code=section.remote_code)


def _keep_base(model: PreTrainedModel, recipe: TrainRecipe, run: Run) -> str:
    """Write the converted model, without which an adapter on it could not be loaded again; return its folder."""
    target = run.folder / BASE
    if run.main and not target.is_dir():
        with whole_folder(target) as folder:
            model.save_pretrained(folder)
            load_tokenizer(recipe.model.path, remote_code=recipe.model.remote_code).save_pretrained(folder)
    return str(target.absolute())


def _mask_token(recipe: TrainRecipe, tokenizer: Any, model: PreTrainedModel) -> int | None:
    """Return the mask token of the objective, made where there was none, before an adapter surrounds the embedding."""
    if recipe.objective is None:
        return None
    knobs = complete_knobs(recipe.objective.name, recipe.objective.knobs, tokenizer=tokenizer, model=model)
    mask: int | None = knobs.get("mask_token_id")
    return mask


def _dtype(recipe: TrainRecipe, run: Run, device: torch.device) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    if recipe.adapter is None and recipe.optimizer is None:
        # A small learning rate moves bfloat16 weights by less than their last digit: most updates would be lost.
        run.note("All weights are trained, in float32; model.dtype chooses another, trainer.bf16 turns on autocast.")
        return "float32"
    if not native_bfloat16(device):
        run.note(f"This {device.type} has no bfloat16 instructions: computing in float32. model.dtype forces another.")
        return "float32"
    return "auto"


def _with_adapter(
    model: PreTrainedModel, section: AdapterSection, base: str, extra: Mapping[str, Any], seed: int
) -> PreTrainedModel:
    import torch
    from peft import LoraConfig, get_peft_model

    from modicum.random import derive_seed

    if hasattr(model, "peft_config"):
        raise UnsupportedError(f"{base} is an adapter already. Merge it into its base first (job: merge).")
    known = LoraConfig.__dataclass_fields__
    for key in section.config:
        if key not in known or key == "r":
            hint = "Use adapter.rank." if key == "r" else did_you_mean(key, known)
            raise RecipeError(f"adapter.config: peft.LoraConfig has no {key!r} here. {hint}")
    defaults: dict[str, Any] = {
        "target_modules": "all-linear",
        "lora_alpha": 2 * section.rank,
        "task_type": "CAUSAL_LM",
    }
    fields = defaults | dict(extra) | section.config
    if added := additions(model):
        fields["modules_to_save"] = sorted({*(fields.get("modules_to_save") or ()), *added})
    try:
        name, knobs = (section.init.name, section.init.knobs) if section.init else ("default", {})
        config = peft_config(name, knobs, rank=section.rank, **fields)
        # PEFT draws the first factors from the global generator; the fork keeps that to these lines.
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "adapter"))
            wrapped = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"adapter.config: {error}") from None
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def _start_adapter(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    tokens: Callable[[], Any],
    collator: Any,
    arguments: TrainingArguments,
    run: Run,
) -> Started | None:
    """Initialise the adapter by the recipe's method, from the first batches of the training data."""
    if recipe.adapter is None or recipe.adapter.init is None:
        return None
    from torch.utils.data import DataLoader

    from modicum.random import generator

    dataset = tokens()  # whatever the objective, the adapter starts from plain rows

    def batches() -> Any:
        order = generator(recipe.seed, "adapter", "batches", arguments.process_index)
        size = arguments.per_device_train_batch_size
        return DataLoader(dataset, batch_size=size, shuffle=True, generator=order, collate_fn=collator)

    started = initialize(
        model,
        recipe.adapter.init.name,
        recipe.adapter.init.knobs,
        batches=batches,
        lr=arguments.learning_rate,
        seed=recipe.seed,
        total_steps=_steps(arguments, len(dataset)),
        accumulation=arguments.gradient_accumulation_steps,
        cache=run.folder / "adapter_start.safetensors",
    )
    for note in started.notes:
        run.note(note)
    return started


def _full_change(recipe: TrainRecipe, model: Any, started: Started | None) -> Change | None:
    """Open the full fine-tune that the adapter is to be compared to: before training, which a wrong one would spoil."""
    if started is None or recipe.adapter is None or recipe.adapter.compare is None:
        return None
    from modicum.weights.checkpoint import Checkpoint

    if not started.start:
        raise RecipeError(f"adapter.compare: the start of {started.origin['name']} is PEFT's own. Take another init.")
    base, full = (
        Checkpoint(name, allow_pickle=recipe.model.allow_pickle) for name in (recipe.model.path, recipe.adapter.compare)
    )
    return change_between(base, full, started.start, transposed=bool(model.peft_config["default"].fan_in_fan_out))


def _trainer(
    recipe: TrainRecipe,
    model: PreTrainedModel,
    arguments: TrainingArguments,
    run: Run,
    tokenizer: Any,
    collator: Any,
    datasets: Mapping[str, Any],
) -> Trainer:
    from transformers import PrinterCallback, Trainer

    callbacks = [_log_callback(run)]
    if recipe.gradient is not None:
        callbacks.append(
            gradient_callback(recipe.gradient.name, recipe.gradient.knobs, folder=run.folder, note=run.note)
        )
    make: Callable[..., Trainer] = Trainer
    if recipe.adapter is not None and recipe.adapter.init is not None:
        init, decay = recipe.adapter.init, arguments.weight_decay
        own = make_optimizer(model, init.name, init.knobs, lr=arguments.learning_rate, weight_decay=decay)
        make = partial(Trainer, optimizers=(own, None))
        if (callback := step_callback(init.name)) is not None:
            callbacks.append(callback)
    if recipe.optimizer is not None:
        make = partial(zeroth_order_trainer, recipe.optimizer.name, recipe.optimizer.knobs, seed=recipe.seed)
    trainer = make(
        model=model,
        args=arguments,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=callbacks,
        **datasets,
    )
    spare_additions(trainer)
    trainer.remove_callback(PrinterCallback)  # ours prints one line for each log
    if recipe.objective is not None and _judges_answers(recipe):
        use_answers(
            trainer, recipe.objective.name, registry.objective[recipe.objective.name].knobs(recipe.objective.knobs)
        )
        return trainer
    if recipe.objective is not None:
        use_objective(trainer, recipe.objective.name, seed=recipe.seed, **recipe.objective.knobs)
    if recipe.data.completion_only and _takes_positions(model, trainer):
        trainer.data_collator = LabelledLogits(trainer.data_collator)
    return trainer


def _takes_positions(model: PreTrainedModel, trainer: Trainer) -> bool:
    """Whether the model can be asked for some logits only, and nothing needs the others."""
    forward = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    # Label smoothing and losses of one's own read whole logits, and DataParallel would split the list of positions.
    needed = trainer.args.label_smoothing_factor or trainer.compute_loss_func is not None or trainer.args.n_gpu > 1
    return "logits_to_keep" in forward and not needed


def _steps(arguments: TrainingArguments, rows: int) -> int:
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    epochs = arguments.num_train_epochs
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(math.ceil(rows / batch) * epochs)


def _log_callback(run: Run) -> Any:
    from transformers import TrainerCallback

    class LogCallback(TrainerCallback):
        """Write the trainer's logs to the run, and tell models that go by the step which step it is."""

        def on_step_begin(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
            if hasattr(model, "set_training_step"):
                model.set_training_step(state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            event = "eval" if "eval_loss" in logs else "train"
            if event == "train" and "loss" not in logs:
                return
            run.log(event, step=state.global_step, **logs)
            if args.disable_tqdm:
                shown = " ".join(f"{key} {value:.4g}" for key, value in logs.items() if isinstance(value, float))
                run.say(f"step {state.global_step}/{state.max_steps} {shown}")

    return LogCallback()


def _last_checkpoint(folder: Path, *, delete_broken: bool) -> Path | None:
    """Return the newest whole checkpoint; the trainer writes ``trainer_state.json`` last."""
    steps = {int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            if delete_broken:
                shutil.rmtree(path)
            continue
        return path
    return None


def _save(recipe: TrainRecipe, trainer: Trainer, started: Started | None, change: Change | None, run: Run) -> None:
    name = "model" if recipe.adapter is None else "adapter"
    target = run.folder / name
    # Every process takes part in gathering sharded weights; only the first one writes.
    with whole_folder(target) if run.main else nullcontext(target) as folder:
        trainer.save_model(str(folder))
        if run.main:
            for unwanted in ("training_args.bin", "README.md"):  # a pickle, and an empty card
                (folder / unwanted).unlink(missing_ok=True)
            # Read again: an objective may have added its mask token to the one in use.
            load_tokenizer(recipe.model.path, remote_code=recipe.model.remote_code).save_pretrained(folder)
            if recipe.adapter is not None:
                base = recipe.model.path if recipe.model.convert is None else f"../{BASE}"
                _tidy_config(folder / "adapter_config.json", base=base)
            if started is not None:
                started.finish(folder, change=change)
    if run.main:
        run.output(name, target)
        if any((run.folder / "checkpoints").glob("checkpoint-*")):
            run.output("checkpoints", run.folder / "checkpoints")


def _tidy_config(path: Path, *, base: str) -> None:
    """Put the module names in order, since PEFT writes a set, and name the base as whoever loads the adapter will."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
