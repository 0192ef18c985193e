"""Train or fine-tune a causal language model with ``transformers.Trainer``, wholly or through a LoRA adapter.

Everything under ``trainer:`` goes to ``TrainingArguments`` verbatim. Run it on several processes with
``accelerate launch -m modicum run recipe.yaml``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from modicum import processes
from modicum.borders import MALFORMED
from modicum.durable import whole_folder
from modicum.errors import CheckpointError, RecipeError, UnsupportedError, did_you_mean, first_line
from modicum.jobs.data.rows import DataSection, collate, load_rows, tokenize
from modicum.jobs.data.trial import check_tokens, try_rows
from modicum.jobs.loading.models import (
    fresh_model,
    load_model,
    load_tokenizer,
    model_shape,
    native_bfloat16,
    rehearse_model,
)
from modicum.jobs.loading.references import resolve_model
from modicum.jobs.training.batches import Batches, optimizer_steps
from modicum.jobs.training.checkpoints import checkpoints, last_checkpoint, read_manifest, set_aside
from modicum.jobs.training.parts import Build, Data, Part, parts_of
from modicum.jobs.training.positions import within_positions
from modicum.jobs.training.recipe import TrainRecipe
from modicum.jobs.training.rehearsal import refuse_arguments
from modicum.record import Run
from modicum.registry import job

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

    from modicum.jobs.training.trainer import PartsTrainer


def plan(recipe: TrainRecipe) -> list[str]:
    """Describe the training that would run, after checks of the trainer's arguments and the rows."""
    notes: list[str] = []
    recipe = within_positions(recipe, notes.append)
    parts = parts_of(recipe)
    arguments = training_arguments(recipe, parts, Path("unused"))
    weights = sum(file.stat().st_size for file in resolve_model(recipe.model.path).glob("*.safetensors"))
    read = {name: _data(recipe, section, parts, notes.append, scored=False) for name, section in _sections(recipe)}
    rows = {name: len(data.rows) for name, data in read.items()}
    model = None
    if recipe.model.scratch is None:
        model = rehearse_model(recipe.model.path, **_loading(recipe))
        _refuse_untrainable(model, recipe)
    tokenizer = load_tokenizer(recipe.model.path, remote_code=recipe.model.remote_code)
    for data in read.values():
        try_rows(data.rows, tokenizer, data.section, notes.append, model=model, encode=data.encode)
    for part in parts:
        part.foresee(notes.append, model, tokenizer)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    what = next((part.trains for part in parts if part.trains), "all weights")
    start = f"{weights / 1e6:.0f} MB of weights" if recipe.model.scratch is None else "random weights"
    return [
        f"train {what} of {recipe.model.path} ({start})",
        f"on {rows['train_dataset']} rows of {recipe.data.path}",
        f"{_steps(arguments, rows['train_dataset'], parts)} optimiser steps of {batch} rows on each device",
        *(f"note: {note}" for note in dict.fromkeys(notes)),
    ]


def makes_like(recipe: TrainRecipe) -> str | None:
    """Return the model whose shape the result has, where training does not change it."""
    changed = recipe.model.convert is not None or recipe.model.scratch is not None
    return None if changed else recipe.model.path


def outputs(recipe: TrainRecipe) -> list[str]:
    """Return the names of what is saved: the result, the averages beside it, and the checkpoints."""
    parts = parts_of(recipe)
    result = next((part.output for part in parts if part.output), "model")
    return [result, *(name for part in parts for name in part.variant_names()), "checkpoints"]


@job(
    "train",
    plan=plan,
    distributed=True,
    makes_like=makes_like,
    outputs=outputs,
    needs_whole=lambda recipe: [recipe.model.path],
    foreseeable=lambda _: True,
    lighter="Halve trainer.per_device_train_batch_size and double trainer.gradient_accumulation_steps, lower "
    "data.max_length, or set trainer.gradient_checkpointing: true.",
)
def train(recipe: TrainRecipe, run: Run) -> None:
    """Fine-tune a model, saving checkpoints on the way and resuming from the last one.

    Args:
        recipe: Model, data, adapter, objective and the trainer's arguments.
        run: Where checkpoints and the result go: ``adapter/`` with an adapter, else ``model/``. The base of an adapter
            on a converted model is written to ``base/``.
    """
    recipe = within_positions(recipe, run.note)
    parts = parts_of(recipe)
    for part in parts:
        part.begin(run)
    arguments = training_arguments(recipe, parts, run.folder / "checkpoints")
    if arguments.fsdp and arguments.world_size == 1:  # a check may well be made by one process
        raise RecipeError(
            "trainer.fsdp shards a model over several processes, and this is one. Start them by torchrun, or "
            "leave it out."
        )
    tokenizer = load_tokenizer(recipe.model.path, remote_code=recipe.model.remote_code)
    datasets = {name: _dataset(recipe, section, parts, tokenizer, run) for name, section in _sections(recipe)}
    _steps(arguments, len(datasets["train_dataset"]), parts)
    model = _model(recipe, parts, run, arguments.device)
    run.inputs.check()
    for data in datasets.values():
        check_tokens(model, data)
    for part in parts:
        model = part.model(model, tokenizer)
    fields: dict[str, Any] = {}
    for part in parts:
        fields = part.adapter(fields, model)
    for part in parts:
        model = part.wrap(model, fields)
    collator = collate(tokenizer)
    batches = Batches(partial(_plain, recipe, parts, tokenizer, run), collator, arguments, recipe.seed)
    for part in parts:
        part.start(model, batches)
    build = Build(model, arguments, tokenizer, collator, **datasets, parts=parts)
    for part in parts:
        part.trainer(build)
    trainer = _trained(build, parts, run)
    run.record["metrics"] = {
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    for part in parts:
        run.record["metrics"] |= part.finish(trainer)
    _save(recipe, parts, trainer, run)


def training_arguments(recipe: TrainRecipe, parts: Sequence[Part], folder: Path) -> TrainingArguments:
    """Build ``TrainingArguments`` from the recipe, with modicum's few defaults where the recipe says nothing."""
    import torch
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    for key in recipe.trainer:
        if key not in known:
            raise RecipeError(f"trainer: transformers.TrainingArguments has no {key!r}. {did_you_mean(key, known)}")
    _check_types(recipe.trainer)
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": not sys.stderr.isatty(),
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    fields = recipe.trainer
    for part in parts:
        fields = part.arguments(fields)
    seeds = {"seed": recipe.seed, "data_seed": recipe.seed}
    try:
        arguments = TrainingArguments(**defaults | fields | seeds, output_dir=str(folder))
    except (*MALFORMED, ImportError, OSError) as error:
        raise RecipeError(f"trainer: {first_line(error)}") from None
    if arguments.eval_strategy != "no" and recipe.eval_data is None:
        raise RecipeError("trainer.eval_strategy asks for evaluations on the way, but there is no eval_data. Set it.")
    for part in parts:
        part.check(arguments)
        if "loss" in part.brings and arguments.label_smoothing_factor:
            raise UnsupportedError(
                f"trainer.label_smoothing_factor smooths the model's own loss, and {part.section.name} brings another. "
                "Drop one."
            )
    return arguments


def _check_types(fields: Mapping[str, Any]) -> None:
    """Refuse values of other types than transformers says, which it would stumble over much later.

    Raises:
        RecipeError: One is of another type.
    """
    from pydantic import TypeAdapter, ValidationError
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    for key, value in fields.items():
        try:
            TypeAdapter(hints[key], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            told = error.errors(include_url=False)[0]["msg"]
            raise RecipeError(f"trainer.{key} is {value!r:.60}: {told[0].lower()}{told[1:]}.") from None


def _steps(arguments: TrainingArguments, rows: int, parts: Sequence[Part]) -> int:
    """Return the number of optimiser steps, and refuse a run of none, and one whose Trainer cannot be made."""
    brought = {element for part in parts for element in part.brings}
    refuse_arguments(arguments, rows=rows, own_optimizer="optimizer" in brought, own_metrics="loss" in brought)
    steps = optimizer_steps(arguments, rows)
    if steps < 1:
        raise RecipeError(
            f"trainer.num_train_epochs {arguments.num_train_epochs:g} makes no optimiser step of {rows} rows. "
            "Raise it, or set trainer.max_steps."
        )
    return steps


def _sections(recipe: TrainRecipe) -> list[tuple[str, DataSection]]:
    """Return the recipe's data under the names that the Trainer gives to its data sets."""
    named = (("train_dataset", recipe.data), ("eval_dataset", recipe.eval_data))
    return [(name, section) for name, section in named if section is not None]


def _data(
    recipe: TrainRecipe,
    section: DataSection,
    parts: Sequence[Part],
    note: Callable[[str], None],
    *,
    scored: bool = True,
) -> Data:
    """Return the rows of a section; without ``scored`` those too that a model would have to score first."""
    source = section if scored else section.unscored(note)
    if source is not section:
        from modicum.jobs.data.mixture import rehearse_filter

        rehearse_filter(section, seed=recipe.seed)
    data = Data(load_rows(source, seed=recipe.seed, note=note), section, training=section is recipe.data)
    for part in parts:
        data = part.data(data)
    return data


def _dataset(recipe: TrainRecipe, section: DataSection, parts: Sequence[Part], tokenizer: Any, run: Run) -> Any:
    data = _data(recipe, section, parts, run.note)
    return data.encode(data.rows, tokenizer, data.section, note=run.note)


def _plain(recipe: TrainRecipe, parts: Sequence[Part], tokenizer: Any, run: Run) -> Any:
    """Return the training rows as plain tokens, whatever the parts make of them in training."""
    return tokenize(_data(recipe, recipe.data, parts, run.note).rows, tokenizer, recipe.data, note=run.note)


def _model(recipe: TrainRecipe, parts: Sequence[Part], run: Run, device: torch.device) -> PreTrainedModel:
    section = recipe.model
    dtype = _dtype(recipe, parts, run, device)
    if section.scratch is None:
        model = load_model(section.path, dtype=dtype, **_loading(recipe))
        _refuse_untrainable(model, recipe)
        return model
    shape = model_shape(section.path, section.scratch, remote_code=section.remote_code)
    return fresh_model(
        shape, seed=recipe.seed, dtype=dtype, attention=section.attention, remote_code=section.remote_code
    )


def _loading(recipe: TrainRecipe) -> dict[str, Any]:
    section = recipe.model
    return {
        "attention": section.attention,
        "allow_pickle": section.allow_pickle,
        "remote_code": section.remote_code,
    }


def _refuse_untrainable(model: PreTrainedModel, recipe: TrainRecipe) -> None:
    """Refuse a model whose weights a training leaves as they are."""
    if hasattr(model, "peft_config"):
        raise UnsupportedError(
            f"{recipe.model.path} is an adapter already. Merge it into its base first (job: merge), and train the "
            "result, with a new adapter if you like."
        )
    if recipe.section("adapter") is None and not any(weight.requires_grad for weight in model.parameters()):
        raise UnsupportedError(
            f"{recipe.model.path} is a {model.config.model_type} model, whose weights stay as they are. Train the "
            "models that it was made of, and make it anew."
        )


def _dtype(recipe: TrainRecipe, parts: Sequence[Part], run: Run, device: torch.device) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    if not any(part.keeps_dtype for part in parts):
        # A small learning rate moves bfloat16 weights by less than their last digit: most updates would be lost.
        run.note("All weights are trained, in float32; model.dtype chooses another, trainer.bf16 turns on autocast.")
        return "float32"
    if not native_bfloat16(device):
        run.note(f"This {device.type} has no bfloat16 instructions: computing in float32. model.dtype forces another.")
        return "float32"
    return "auto"


def _trained(build: Build, parts: Sequence[Part], run: Run) -> PartsTrainer:
    """Make the Trainer and let it train, from the last checkpoint where there is one."""
    from modicum.jobs.training.trainer import build_trainer

    trainer = build_trainer(build)
    checkpoint = _checkpoint(Path(build.args.output_dir), run, best=build.args.load_best_model_at_end)
    if checkpoint:
        run.say(f"resuming from {checkpoint.name}")
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.around())
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def _checkpoint(folder: Path, run: Run, *, best: bool) -> Path | None:
    """Return the newest whole checkpoint, as the first process finds it, and put aside those that are not whole."""
    found = None
    if run.main:
        passed: list[tuple[Path, str]] = []
        found = last_checkpoint(folder, best=best, passed=lambda path, why: passed.append((path, why)))
        for path, why in passed:
            run.note(set_aside(path, why))
    name = processes.broadcast_object(found and found.name)
    if name is None:
        return None
    made_by = (read_manifest(folder / name) or {}).get("processes") or processes.world()
    if made_by != processes.world():
        raise CheckpointError(
            f"{name} was saved by {made_by} processes, and {processes.world()} would go on with other batches than the "
            f"run was begun with. Start {made_by}, or choose another --out."
        )
    return folder / name


def _save(recipe: TrainRecipe, parts: Sequence[Part], trainer: PartsTrainer, run: Run) -> None:
    """Save the model, and beside it what the parts put in its place."""
    name = next((part.output for part in parts if part.output), "model")
    _save_as(name, recipe, parts, trainer, run)
    for part in parts:
        for other, in_place in part.variants().items():
            with in_place:
                _save_as(other, recipe, parts, trainer, run, verify=False)  # other weights than those remembered
    if run.main and checkpoints(run.folder / "checkpoints"):
        run.output("checkpoints", run.folder / "checkpoints", kept=False)  # whoever needs the space removes them


def _save_as(
    name: str, recipe: TrainRecipe, parts: Sequence[Part], trainer: PartsTrainer, run: Run, *, verify: bool = True
) -> None:
    target = run.folder / name
    # Every process takes part in gathering sharded weights; only the first one writes.
    run.inputs.check_mapped()
    with whole_folder(target) if run.main else nullcontext(target) as folder:
        trainer.save_model(str(folder))
        if run.main:
            for unwanted in ("training_args.bin", "README.md"):  # a pickle, and an empty card
                (folder / unwanted).unlink(missing_ok=True)
            # Read again: a part may have added a token to the tokenizer in use.
            load_tokenizer(recipe.model.path, remote_code=recipe.model.remote_code).save_pretrained(folder)
            for part in parts:
                part.save(folder)
            for part in parts if verify else ():
                part.verify(folder, parts)
    if run.main:
        run.output(name, target)
