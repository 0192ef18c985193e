"""Run something before and after every step of an optimiser, in anyone's loop."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from modicum.errors import UnsupportedError


class StepHook:
    """Base of ``NormClipper`` and ``TensorHook``: hooks before and after every step of an optimiser.

    Args:
        params: The tensors that the hooks work on, by name.
    """

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.params = params
        self._handles: list[Any] = []

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the gradients before the optimiser reads them."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights that the optimiser wrote."""

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Run both hooks at every ``optimizer.step()`` from now on.

        It works with any optimiser of ``torch.optim`` or derived from it, fused or not, wrapped by Accelerate or not.
        With ``GradScaler``, a step that overflowed is not seen, because the scaler does not call the optimiser.

        Raises:
            UnsupportedError: It is attached already, or the optimiser holds none of its parameters.
        """
        if self._handles:
            raise UnsupportedError(
                f"This {type(self).__name__} is attached already. Make one for each optimiser, "
                "or call clip_() once before all of their steps."
            )
        # Accelerate's wrapper passes its steps on to the optimiser inside.
        inner = getattr(optimizer, "optimizer", optimizer)
        held = {id(param) for group in inner.param_groups for param in group["params"]}
        if not any(id(param) in held for param in self.params.values()):
            raise UnsupportedError(
                f"The optimiser holds none of the {len(self.params)} parameters. Make both from the same model."
            )
        self._handles = [
            inner.register_step_pre_hook(self._before),
            inner.register_step_post_hook(lambda optimizer, *_: self.after_step(optimizer)),
        ]
        return self

    def detach(self) -> None:
        """Leave the optimiser as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UnsupportedError(
                "The gradients of this fused optimiser are still multiplied by the loss scale. "
                "Call scaler.unscale_(optimizer) before scaler.step(optimizer)."
            )
        # args[0] is the optimiser itself; what follows is what the user gave to step().
        if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
            raise UnsupportedError(
                "step(closure) computes the gradients after they could be clipped. "
                "Call loss.backward() first, then step() without a closure."
            )
        self.before_step(optimizer)
