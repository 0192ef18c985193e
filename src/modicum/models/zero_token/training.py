"""What any trainer needs for a looped model: who decays, and which step it is."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from modicum.knobs import guarded
from modicum.models.zero_token.pool import ZeroTokenPool
from modicum.types import NonNegative


class TrainingStep(TrainerCallback):
    """Tells a looped model the step of training, by which it draws or grows its number of cycles.

    ``train_cycles="grow"`` and ``cycle_onset`` need it; ``"random"`` is exact without it as well, unless an adapter
    is saved without ``zero_token``. Give it to any Trainer: ``Trainer(…, callbacks=[TrainingStep()])``.
    """

    def on_step_begin(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        """Name the step; models that do not ask for it are left alone."""
        name = getattr(model, "set_training_step", None)
        if name is not None:
            name(state.global_step, state.max_steps)


@guarded
def parameter_groups(model: nn.Module, *, weight_decay: NonNegative) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups for an optimiser: with weight decay, and without.

    Matrices decay; vectors (norms, biases) and what looping added do not.

    Args:
        model: A model, looped or not, wrapped or not.
        weight_decay: The first group's weight decay.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2), weight_decay=0.1)]
        [1, 1]
    """
    pools = [module for module in model.modules() if isinstance(module, ZeroTokenPool)]
    spared = {id(parameter) for pool in pools for parameter in pool.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in trained if p.dim() > 1 and id(p) not in spared]
    kept = {id(p) for p in decays}
    rest = [p for p in trained if id(p) not in kept]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
