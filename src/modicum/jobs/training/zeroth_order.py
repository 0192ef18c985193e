"""Zeroth-order training inside ``transformers.Trainer``: the training step alone is another one.

Everything else is the Trainer's: accumulation (micro-batches of a step see one direction), evaluation, schedules,
checkpoints, resuming, and several processes, which tell each other a few numbers a step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.zeroth_order_arguments import check_arguments
from modicum.layout import ADAPTER_PREFIX, ADAPTER_WEIGHTS
from modicum.registry import zeroth_order
from modicum.types import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainerCallback

    from modicum.jobs.training.trainer import PartsTrainer
    from modicum.optim.zeroth_order.step import ZerothOrder

BY_NAME = frozenset({"include", "exclude", "dense"})  # knobs that pick parameters by their names
PAIRED = "engine='paired' computes the model's own loss. Use engine='adapter' for this one."


def check_knobs(name: str, knobs: Mapping[str, Any]) -> None:
    """Refuse knobs that exclude each other, before there is a model: a small one stands in for it.

    Args:
        name: Of the optimizer.
        knobs: Its knobs. Those that pick parameters by name are left out: only the real model has these names.

    Raises:
        ModicumError: The optimizer cannot be made with these knobs.
    """
    import torch

    parameters = [
        ("layer.weight", torch.nn.Parameter(torch.zeros(64, 64))),
        ("norm.weight", torch.nn.Parameter(torch.zeros(64))),
    ]
    kept = {key: value for key, value in knobs.items() if key not in BY_NAME}
    zeroth_order[name].function(parameters, **kept)


def check_selection(name: str, knobs: Mapping[str, Any], model: Any) -> None:
    """Refuse knobs under which no parameter of a model would be trained; its numbers are not needed.

    Raises:
        RecipeError: None is left.
    """
    from modicum.optim.zeroth_order.leaves import NONE_LEFT, is_moved

    chosen = zeroth_order[name].knobs(knobs)
    picked = {"vectors": "dense"} | {key: chosen[key] for key in ("include", "exclude", "vectors") if key in chosen}
    if not any(is_moved(key, part, **picked) for key, part in model.named_parameters()):
        raise RecipeError(NONE_LEFT)


def attach_optimizer(
    name: str,
    knobs: Mapping[str, Any],
    model: Any,
    *,
    seed: int = 0,
    note: Callable[[str], object] = warnings.warn,
) -> ZerothOrder:
    """Return a zeroth-order optimizer of all trainable parameters, and put its hooks on the model.

    Args:
        name: Of the optimizer.
        knobs: Its knobs.
        model: Goes into evaluation mode, in which it stays: both points of a probe must see the same function.
        seed: Seed of the draws, where the knobs leave it at 0.
        note: Is told that the model's dropout is off, if it has any.
    """
    from modicum.optim.zeroth_order.engines import dropouts

    given = dict(knobs)
    if "seed" in given and not given["seed"]:
        given["seed"] = seed
    optimizer: ZerothOrder = zeroth_order[name].function(model.named_parameters(), **given)
    if found := dropouts(model):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        note(
            f"Dropout is off in zeroth-order training, where two losses are compared ({found[0]}{more} would drop): "
            "the model stays in evaluation mode."
        )
    model.eval()
    optimizer.attach(model)
    return optimizer


def zeroth_order_trainer(name: str, knobs: Mapping[str, Any], *, seed: int = 0, **arguments: Any) -> PartsTrainer:
    """Return a Trainer that fine-tunes with forward passes only.

    Args:
        name: A zeroth-order optimizer, such as ``tezo``.
        knobs: Its knobs.
        seed: Seed of its draws, where the knobs leave it at 0.
        arguments: Arguments of ``transformers.Trainer``, ``model`` and ``args`` among them. ``args.learning_rate`` is
            not read: the learning rate is the optimizer's knob, and the schedule multiplies it.

    Raises:
        UnsupportedError: An argument asks for something that has no effect here, such as ``weight_decay``, or the model
            draws at random in evaluation mode.
    """
    from modicum.jobs.training.trainer import PartsTrainer

    check_arguments(arguments["args"])
    optimizer = attach_optimizer(name, knobs, arguments["model"], seed=seed)
    callbacks = [zeroth_order_callback(optimizer), *(arguments.pop("callbacks", None) or ())]
    step = ZerothOrderStep(optimizer)
    return PartsTrainer(own_step=step, optimizers=(optimizer, None), callbacks=callbacks, **arguments)


@dataclass(frozen=True)
class ZerothOrderStep:
    """Evaluate a micro-batch at the step's points; ``optimizer.step()`` of the training loop then moves the weights.

    Args:
        optimizer: The one that probes. Accelerate wraps the one that the Trainer knows.
    """

    optimizer: ZerothOrder

    def __call__(self, trainer: PartsTrainer, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return by how much the micro-batch changes the step's mean loss, which is 0 before the first."""
        model.eval()
        branches = self.optimizer.branches

        def loss() -> Tensor:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, dict(inputs))

        def losses() -> Tensor:
            with trainer.compute_loss_context_manager():
                if trainer.own_loss is not None:
                    return trainer.own_loss(model, inputs, branches=branches)[0]
                return paired_losses(model, inputs, branches)

        paired = self.optimizer.settings.engine == "paired"
        before = self.optimizer.mean_loss()
        if paired and (trainer.compute_loss_func is not None or trainer.label_smoother is not None):
            raise UnsupportedError(PAIRED)
        self.optimizer.probe(losses if paired else loss, weight=_targets(inputs))
        # The Trainer adds up what it gets. With differences of the mean so far, the sum is the step's mean loss,
        # however it is cut into micro-batches and shared among processes.
        now = self.optimizer.mean_loss(whole=trainer.accelerator.sync_gradients)
        return now.float() - before.float()


def zeroth_order_callback(optimizer: ZerothOrder) -> TrainerCallback:
    """Return the callback that settles the weights before evaluations, checkpoints and the end, and logs the costs."""
    from transformers import TrainerCallback

    class ZerothOrderCallback(TrainerCallback):
        def on_init_end(self, args: Any, _state: Any, _control: Any, **_: Any) -> None:
            check_arguments(args)

        def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            check_arguments(args)  # anybody may have changed them
            spent = max((line["seconds"] for line in state.log_history if "seconds" in line), default=0.0)
            self.begun = time.monotonic() - spent  # a resumed run goes on counting

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            if control.should_evaluate or control.should_save:
                optimizer.settle_()
            if control.should_save:
                optimizer.fold_()

        on_epoch_end = on_step_end

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            costs = {"forwards": optimizer.forwards, "seconds": round(time.monotonic() - self.begun, 3)}
            costs |= {"skipped_steps": optimizer.skipped} if optimizer.skipped else {}
            # The history has its copy already; the callbacks after this one read `logs`.
            logs.update(costs)
            state.log_history[-1].update(costs)

        def on_train_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            if args.load_best_model_at_end and state.best_model_checkpoint:
                optimizer.discard_()  # the weights are those of a checkpoint
            optimizer.settle_()
            optimizer.detach()

    return ZerothOrderCallback()


def paired_losses(model: nn.Module, inputs: Mapping[str, Any], branches: int) -> Tensor:
    """Return the model's loss at each of several points from one forward pass."""
    import torch

    from modicum.optim.zeroth_order.engines import expand_batch

    targets = {key: inputs[key] for key in ("labels", "shift_labels") if key in inputs}
    kept = {key: inputs[key] for key in ("logits_to_keep",) if key in inputs}
    rows = {key: value for key, value in inputs.items() if key not in targets and key not in kept}
    logits = model(**expand_batch(rows, branches), **kept).logits
    inner: Any = getattr(model, "module", model)
    size = inner.config.vocab_size
    return torch.stack(
        [inner.loss_function(logits=part, vocab_size=size, **targets) for part in logits.chunk(branches)]
    )


def export_lora(optimizer: ZerothOrder, folder: Path, *, base: str) -> None:
    """Write what an adapter engine learned as a PEFT LoRA, which reproduces it without changing the base.

    Args:
        optimizer: An optimizer with ``engine="adapter"`` or ``"paired"``.
        folder: Where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        base: Name of the base model in the adapter's configuration.

    Raises:
        UnsupportedError: Something was learned that a LoRA on linear layers cannot hold.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    if optimizer.position is None or optimizer.settings.lift is None or optimizer._hooks is None:
        raise UnsupportedError(
            "Only a run with engine='adapter' or 'paired' can be exported. Save the weights instead."
        )
    tensors, ranks = {}, {}
    names = {module: name for name, module in optimizer._hooks.model.named_modules()}
    for leaf, places in optimizer._hooks.owners.items():
        linear = len(places) == 1 and hasattr(places[0][0], "in_features")
        if not leaf.rank or not linear:
            raise UnsupportedError(
                f"{leaf.name} is not the weight of one linear layer, which is all that this LoRA can hold. Train with "
                "vectors='freeze' and exclude embeddings and heads, or fold the result into the weights."
            )
        left, right = leaf.factors(optimizer.settings.lift, optimizer.position)
        name = names[places[0][0]]
        tensors[f"{ADAPTER_PREFIX}{name}.lora_A.weight"] = right.mT.to(left.dtype).contiguous()
        tensors[f"{ADAPTER_PREFIX}{name}.lora_B.weight"] = left.contiguous()
        ranks[name] = leaf.rank
    top = max(ranks.values())
    config = LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != top},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != top},
        target_modules=sorted(ranks),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    config.save_pretrained(str(folder))


def _targets(inputs: Mapping[str, Any]) -> float:
    """Return the number of predictions in a micro-batch, by which its mean loss is weighted in the step."""
    if "shift_labels" not in inputs and "labels" not in inputs:
        return float(len(next(iter(inputs.values()))))
    if inputs.get("shift_labels", inputs["labels"]).dim() == 1:
        return float(len(inputs["labels"]))  # an answer for each example
    targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
    return max(1.0, float((targets != IGNORED).sum()))
