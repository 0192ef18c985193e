"""Arguments of the Trainer that a zeroth-order training does not honour: one table, which every entry point asks.

An argument that changes nothing is refused where it is set away from its default, and in a recipe where it is set at
all, unless it is off.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NamedTuple

from modicum.errors import UnsupportedError


class Ignored(NamedTuple):
    """Why an argument has no effect and what to do instead, and values that ask for nothing."""

    why: str
    off: tuple[Any, ...] = (None, False)


_KNOB = "The optimizer has knobs of its own: set"
_BACKWARD = "There is no backward pass"
_SHARDED = (
    "Zeroth-order training in the Trainer runs on one process or with DDP; there are no gradients or optimizer copies "
    "to shard. Remove it."
)

IGNORED = MappingProxyType(
    {
        "optim": Ignored("The zeroth-order method is the optimizer. Remove it.", ()),
        "optim_args": Ignored("The zeroth-order method is the optimizer. Remove it.", (None, "")),
        "optim_target_modules": Ignored(f"{_KNOB} optimizer.include and optimizer.exclude."),
        "learning_rate": Ignored(f"{_KNOB} optimizer.lr, which the schedule multiplies.", ()),
        "weight_decay": Ignored(f"{_KNOB} optimizer.weight_decay.", (0,)),
        "adam_beta1": Ignored(f"{_KNOB} optimizer.betas.", ()),
        "adam_beta2": Ignored(f"{_KNOB} optimizer.betas.", ()),
        "adam_epsilon": Ignored(f"{_KNOB} optimizer.adam_eps.", ()),
        "max_grad_norm": Ignored("There are no gradients to clip. Set it to 0, or lower optimizer.lr.", (None, 0)),
        "neftune_noise_alpha": Ignored(
            "It draws noise in training mode; a probe compares two losses without any. Remove it.", (None, 0)
        ),
        "activation_checkpointing": Ignored(f"{_BACKWARD} for which activations are kept. Remove it."),
        "activation_checkpointing_kwargs": Ignored(f"{_BACKWARD} for which activations are kept. Remove it."),
        "gradient_checkpointing": Ignored(f"{_BACKWARD} for which activations are kept. Remove it."),
        "gradient_checkpointing_kwargs": Ignored(f"{_BACKWARD} for which activations are kept. Remove it."),
        "fp16": Ignored(
            "Its scaler scales gradients, and there are none. Use bf16, or load the model in float16 (model.dtype)."
        ),
        "average_tokens_across_devices": Ignored(
            "Processes are always weighted by their numbers of targets. Remove it.", (True,)
        ),
        "torch_empty_cache_steps": Ignored("The step of the Trainer that empties the cache is not run. Remove it."),
        "ddp_find_unused_parameters": Ignored(f"{_BACKWARD} that waits for gradients. Remove it."),
        "ddp_bucket_cap_mb": Ignored(f"{_BACKWARD} whose gradients are sent in buckets. Remove it."),
        "ddp_static_graph": Ignored(f"{_BACKWARD} whose graph could be static. Remove it."),
        "fsdp": Ignored(_SHARDED, (None, False, "", [])),
        "fsdp_config": Ignored(_SHARDED, (None, {})),
        "deepspeed": Ignored(_SHARDED),
        "parallelism_config": Ignored(_SHARDED),
    }
)


def check_arguments(args: Any, *, given: Collection[str] = ()) -> None:
    """Refuse arguments that a zeroth-order training would not honour.

    Args:
        args: ``TrainingArguments``.
        given: Names that the user has set, whatever their values.

    Raises:
        UnsupportedError: One of them asks for something.
    """
    from transformers import TrainingArguments

    defaults = {field.name: field.default for field in fields(TrainingArguments)}
    for name, ignored in IGNORED.items():
        value = getattr(args, name, None)
        fine = ignored.off if name in given else (*ignored.off, defaults.get(name))
        if name in defaults and value not in fine:
            shown = getattr(value, "value", value)
            raise UnsupportedError(
                f"trainer.{name} is {shown!r}, which zeroth-order training would ignore. {ignored.why}"
            )
