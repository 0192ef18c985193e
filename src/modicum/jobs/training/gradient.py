"""Gradient rules, their log, and faults on purpose, as callbacks of ``transformers.Trainer``."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modicum.errors import CheckpointError, UnsupportedError
from modicum.optim.gradient.clipping_log import LOG, ClippingLog
from modicum.random import derive_seed
from modicum.registry import gradient_rule

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback


def gradient_callback(
    name: str,
    knobs: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    every: int = 10,
    note: Callable[[str], object] = warnings.warn,
) -> TrainerCallback:
    """Return a callback that applies a gradient rule at every optimiser step and keeps its state in checkpoints.

    A run that is stopped and resumed with ``trainer.train(resume_from_checkpoint=…)`` ends with the same bits.

    Args:
        name: A gradient rule; see ``modicum list gradient_rules``.
        knobs: Its knobs.
        folder: Where ``clipping.jsonl`` grows; ``None`` writes no log.
        every: Steps between two lines of the log.
        note: Called with advice about the knobs, if there is any.

    Raises:
        RecipeError: There is no such rule, or a knob is wrong.
        UnsupportedError: Later, when the trainer is made: it clips by itself too, or runs under DeepSpeed or FSDP 1.
    """
    entry = gradient_rule[name]
    checked = entry.knobs(knobs or {})
    heavy = entry.facts.weight_sized_state
    if heavy and checked[heavy]:
        raise UnsupportedError(
            f"{name} with {heavy} {checked[heavy]} remembers a number for each weight, which a trainer's checkpoint "
            f"cannot hold. Set {heavy}: 0, or use make_clipper() in a loop of your own."
        )
    made: TrainerCallback = _gradient_callback_class()(name, checked, folder=folder and str(folder), every=every)
    made.note = note
    return made


@cache
def _gradient_callback_class() -> Any:
    # Made on demand: importing transformers takes seconds, and this module is imported to list what there is.
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    class GradientCallback(TrainerCallback, ExportableState):
        """See :func:`gradient_callback`. Its arguments are plain data, so that a trainer can make it again."""

        def __init__(self, name: str, knobs: dict[str, Any], folder: str | None = None, every: int = 10) -> None:
            self.name, self.knobs, self.folder, self.every = name, knobs, folder, every
            self.note: Callable[[str], object] = warnings.warn
            self.clipper: Any = None
            self.log: ClippingLog | None = None
            self.saved = ""

        def on_init_end(self, args: Any, _state: Any, _control: Any, **_: Any) -> None:
            check_arguments(args, self.name, self.knobs)

        def on_train_begin(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
            from modicum.optim.gradient.clipper import NormClipper
            from modicum.optim.gradient.make import make_clipper

            check_arguments(args, self.name, self.knobs)
            model = given["model"]
            _refuse_flat_parameters(model)
            params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
            self.clipper = make_clipper(self.name, params, **self.knobs)
            if state.global_step > 0:
                self.clipper.load_state_dict(_unpacked(_saved_state(state, self), state.global_step))
            self.clipper.attach(given["optimizer"])
            advise = gradient_rule[self.name].facts.advice
            for advice in advise(self.knobs, steps=state.max_steps) if advise is not None else ():
                self.note(advice)
            if self.folder and state.is_world_process_zero and isinstance(self.clipper, NormClipper):
                self.log = ClippingLog(Path(self.folder) / LOG, self.clipper, every=self.every, after=state.global_step)

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            if self.log is not None and (control.should_log or control.should_save):
                self.log.flush()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.log is not None:
                self.log.flush()
            self.clipper.detach()

        def state(self) -> dict[str, Any]:
            """Return what a checkpoint keeps: how to make this callback again, and the rule's state."""
            arguments = {"name": self.name, "knobs": self.knobs, "folder": self.folder, "every": self.every}
            return {"args": arguments, "attributes": {"saved": _packed(self.clipper)}}

    return GradientCallback


def check_arguments(args: Any, name: str, knobs: Mapping[str, Any]) -> None:
    """Refuse a trainer whose arguments and a gradient rule would get into each other's way.

    Raises:
        UnsupportedError: The trainer clips too, or runs under DeepSpeed, or the rule's state differs between ranks.
    """
    if getattr(args, "deepspeed", None):
        raise UnsupportedError(
            f"gradient: {name} cannot work under DeepSpeed, which keeps the gradients to itself. "
            "Use DDP (accelerate launch without a DeepSpeed file) or FSDP2 (fsdp_config: {fsdp_version: 2})."
        )
    if args.max_grad_norm:
        raise UnsupportedError(
            f"trainer.max_grad_norm is {args.max_grad_norm} and gradient: {name} is active, so gradients would be "
            "clipped twice. Set trainer.max_grad_norm: 0, or drop gradient."
        )
    if knobs.get("granularity") == "shard" and args.world_size > 1:
        raise UnsupportedError(
            "granularity: shard keeps another state on each process, which a trainer's checkpoint cannot hold. "
            "Use granularity: tensor."
        )


def fault_callback(
    kind: Literal["tensor_noise", "loss_burst"],
    *,
    seed: int = 0,
    probability: float = 0.02,
    scale: float | None = None,
    first: int = 0,
) -> TrainerCallback:
    """Return a callback that damages gradients before the optimiser, and any gradient rule, sees them.

    Args:
        kind: ``tensor_noise`` adds noise to one random gradient, ``loss_burst`` multiplies all of them.
        seed: Seed of the faults; which steps are hit depends on nothing else.
        probability: Share of steps that are hit.
        scale: Size of the fault; ``None`` for 1000 deviations of noise, or a loss 100 times too large.
        first: First optimiser step that may be hit.
    """
    from transformers import TrainerCallback

    from modicum.optim.gradient.faults import loss_burst_, tensor_noise_

    faults: dict[str, Callable[..., object]] = {"tensor_noise": tensor_noise_, "loss_burst": loss_burst_}
    if kind not in faults:
        raise UnsupportedError(f"There is no fault {kind!r}. Known: tensor_noise, loss_burst; bad_batches() for data.")
    size = {} if scale is None else {"scale": scale}

    class FaultCallback(TrainerCallback):
        def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, **given: Any) -> None:
            if state.global_step >= first:
                grads = [p.grad for p in given["model"].parameters() if p.grad is not None]
                faults[kind](grads, step=state.global_step, seed=seed, probability=probability, **size)

    return FaultCallback()


def bad_batches(
    collator: Callable[[Sequence[Any]], dict[str, Any]], *, vocabulary: int, seed: int = 0, probability: float = 0.02
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return ``collator`` with some batches replaced by random tokens; labels stay.

    A batch is hit or not by its own content, so loader processes and resuming make no difference.
    """
    from modicum.optim.gradient.faults import bad_batch

    def collate(rows: Sequence[Any]) -> dict[str, Any]:
        batch = collator(rows)
        ids = batch["input_ids"]
        content = derive_seed(seed, ids.cpu().numpy().tobytes().hex())
        hit = bad_batch(ids, vocabulary=vocabulary, step=content, seed=seed, probability=probability)
        return {**batch, "input_ids": hit}

    return collate


def _refuse_flat_parameters(model: torch.nn.Module) -> None:
    from torch.distributed import is_available

    if not is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedError(
            "FSDP version 1 flattens the tensors that a gradient rule must see apart. "
            "Set fsdp_config: {fsdp_version: 2}."
        )


def _packed(clipper: Any) -> str:
    from safetensors.torch import save

    state = {} if clipper is None else {key: value.contiguous() for key, value in clipper.state_dict().items()}
    return base64.b64encode(save(state)).decode() if state else ""


def _unpacked(saved: str | None, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    if saved is None:
        raise CheckpointError(
            f"The checkpoint of step {step} holds no state of a gradient rule, so it was made without one. "
            "Start afresh, or go on without gradient."
        )
    return load(base64.b64decode(saved)) if saved else {}


def _saved_state(state: Any, callback: Any) -> str | None:
    """Return the rule's packed state from the checkpoint, where the trainer keeps it in its own state."""
    found = state.stateful_callbacks.get(type(callback).__name__)
    if isinstance(found, list):
        found = found[0] if found else None
    if not isinstance(found, Mapping) or "attributes" not in found:
        return callback.saved or None
    rule = found["args"]["name"]
    if rule != callback.name:
        raise CheckpointError(
            f"The checkpoint was made with gradient: {rule}, and the run now asks for {callback.name}. "
            "Start afresh, or keep the rule."
        )
    saved: str = found["attributes"]["saved"]
    return saved
