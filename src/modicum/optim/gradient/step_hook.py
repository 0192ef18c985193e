"""Run something before and after every step of an optimiser, in anyone's loop."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import MutableMapping
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modicum.errors import UnsupportedError

# What is attached to each optimiser that is still in use.
_attached: MutableMapping[torch.optim.Optimizer, list[StepHook]] = WeakKeyDictionary()


class StepHook:
    """Base of ``NormClipper`` and ``TensorHook``: hooks before and after every step of an optimiser.

    Args:
        params: The tensors that the hooks work on, by name.
    """

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.params = params
        self._handles: list[Any] = []
        self._looked = False

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the gradients before the optimiser reads them."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights that the optimiser wrote."""

    def attach(self, optimizer: torch.optim.Optimizer) -> Self:
        """Run both hooks at every ``optimizer.step()`` from now on.

        It works with any optimiser of ``torch.optim`` or derived from it, fused or not, wrapped by Accelerate or not.
        With ``GradScaler``, a step that overflowed is not seen, because the scaler does not call the optimiser.

        A warning tells of another one on the same optimiser and parameters, and at the first step of a ``Trainer`` that
        clips by itself: gradients would be clipped twice.

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
        others = _attached.setdefault(inner, [])
        mine = {id(param) for param in self.params.values()}
        for other in others:
            if not mine.isdisjoint(id(param) for param in other.params.values()):
                warnings.warn(
                    f"A {type(other).__name__} is attached to this optimiser already, so gradients are changed twice: "
                    f"by it, then by this {type(self).__name__}. Detach one of them.",
                    stacklevel=2,
                )
        others.append(self)
        self._looked = False
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
        for hooks in _attached.values():
            hooks[:] = [hook for hook in hooks if hook is not self]

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
        if not self._looked:
            self._looked = True
            limit = _limit_of_trainer()
            if limit:
                warnings.warn(
                    f"The Trainer's max_grad_norm is {limit} and a {type(self).__name__} is attached to its optimiser, "
                    "so gradients are clipped twice. Set max_grad_norm=0.",
                    stacklevel=2,
                )
        self.before_step(optimizer)


def _limit_of_trainer() -> float:
    """Return ``max_grad_norm`` of the ``transformers.Trainer`` whose loop takes this step; 0 in other loops.

    An optimiser does not know its Trainer: it is found among the callers, once for each hook.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        limit = getattr(getattr(caller, "args", None), "max_grad_norm", None)
        if limit is not None and hasattr(caller, "callback_handler"):
            return float(limit)
        frame = frame.f_back
    return 0.0
