"""Checkpoints from which a run goes on exactly: whole, with all that the parts remember, and the newest only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import processes
from modicum.durable import follow_umask
from modicum.errors import CheckpointError, RecipeError
from modicum.jobs.training.parts import Build, Part
from modicum.registry import training_part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.jobs.training.recipe import TrainRecipe

INEXACT = {
    "save_only_model": "its checkpoints hold no optimizer, from which a killed run cannot go on",
    "ignore_data_skip": "a resumed run would see the first rows of the epoch again",
}


@training_part("checkpoint", order=110)
class Checkpoint(Part):
    """Complete each checkpoint, seal it with a manifest, and delete old ones beyond ``trainer.save_total_limit``.

    It comes last, so that nothing is written to a checkpoint after its manifest. The Trainer's own rotation takes every
    name that begins like a checkpoint for one: it deletes a user's ``checkpoint-10-backup``, or counts it as the newest
    and deletes the only checkpoint of the run.
    """

    def __init__(self, name: str, recipe: TrainRecipe, section: None = None) -> None:
        super().__init__(name, recipe, section)
        self.limit: int | None = recipe.trainer.get("save_total_limit", 2)
        self.resumed: int | None = None  # the step from which the run went on
        self.ended = False  # whether the epoch, or the last part of one, had ended when it was saved
        self.draws: dict[str, Tensor] = {}  # the state of torch's generator when the epoch began, and at the save

    def arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Turn the Trainer's own rotation off."""
        return fields | {"save_total_limit": None}

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse checkpoints from which a run does not go on exactly."""
        for key, why in INEXACT.items():
            if getattr(arguments, key):
                raise RecipeError(f"trainer.{key}: {why}. Leave it out; trainer.save_total_limit saves space.")
        optimizer = str(getattr(arguments.optim, "value", arguments.optim))
        if "layerwise" in optimizer or optimizer == "adalomo":
            raise RecipeError(
                f"trainer.optim: {optimizer} keeps its state where no checkpoint holds it, so a killed run could not "
                "go on. Take one that is not layer-wise."
            )

    def trainer(self, build: Build) -> None:
        """Add the callback."""
        import torch
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState

        from modicum.jobs.training.checkpoints import MEMORY, WRITER, begin_manifest, rotate, write_manifest

        part, parts, rank = self, build.parts, processes.rank()

        class CheckpointCallback(TrainerCallback, ExportableState):  # its name is WRITER
            postponed = False

            def state(self) -> dict[str, Any]:
                """Return nothing of its own: its name says that a manifest is going to follow."""
                return {"args": {}, "attributes": {}}

            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step:
                    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                    file = folder / MEMORY.format(rank=rank)
                    if WRITER in state.stateful_callbacks and not file.exists():
                        raise CheckpointError(f"{file} is missing. Copy the checkpoint to this machine, whole.")
                    remembered = _read(file)
                    part.resumed, args.eval_on_start = state.global_step, False
                    state.stateful_callbacks.setdefault(WRITER, {})
                    best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
                    if best.is_dir():  # the state names it by the path that the run had then
                        state.best_model_checkpoint = str(best)
                    for other in parts:
                        other.recall(remembered.get(other.name, {}))
                if state.global_step >= state.max_steps:
                    control.should_training_stop = True

            def on_epoch_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
                if state.global_step == part.resumed:
                    part.go_on(between=float(state.epoch).is_integer())
                part.draws["begin"] = torch.get_rng_state()

            def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
                part.ended = False
                # What an epoch ends with, such as an evaluation, is in the checkpoint of its last step too.
                if control.should_save and float(state.epoch).is_integer():
                    control.should_save, self.postponed = False, True

            def on_epoch_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
                if part.ended and state.global_step == part.resumed:  # all this was done before the run went on
                    control.should_save = control.should_log = control.should_evaluate = False
                control.should_save = control.should_save or self.postponed
                part.ended, self.postponed = True, False

            def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                if args.should_save:
                    begin_manifest(folder)
                _write(folder / MEMORY.format(rank=rank), {other.name: other.remember() for other in parts})
                processes.wait()  # until all have written their files
                if not args.should_save:
                    return
                follow_umask(folder)
                write_manifest(folder, processes=processes.world())
                if part.limit is not None and part.limit > 0:
                    rotate(args.output_dir, part.limit, best=state.best_model_checkpoint)

        build.add_callback(CheckpointCallback())

    def go_on(self, *, between: bool) -> None:
        """Let the order of the rows be drawn from where it was, where it is drawn from torch's own generator.

        Args:
            between: The run goes on between two epochs.
        """
        import torch

        if self.draws:
            torch.set_rng_state(self.draws["end" if between else "begin"])

    def remember(self) -> dict[str, Tensor]:
        """Return whether the epoch has ended, and the draws."""
        import torch

        return self.draws | {"end": torch.get_rng_state(), "ended": torch.tensor(self.ended)}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`remember`."""
        if state:
            self.draws = {key: state[key] for key in ("begin", "end")}
            self.ended = bool(state["ended"])


def _write(file: Path, remembered: Mapping[str, Mapping[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    save_file(
        {
            f"{name}/{key}": tensor.detach().cpu().contiguous()
            for name, tensors in remembered.items()
            for key, tensor in tensors.items()
        },
        file,
    )


def _read(file: Path) -> dict[str, dict[str, Tensor]]:
    """Return what each part remembers; nothing where the checkpoint is of an earlier version."""
    from safetensors.torch import load_file

    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in (load_file(file) if file.exists() else {}).items():
        part, _, key = name.partition("/")
        found.setdefault(part, {})[key] = tensor
    return found
