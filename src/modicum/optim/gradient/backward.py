"""Step each parameter as soon as its gradient is there, inside ``backward()``.

A global norm forbids this, because no parameter may move before the last gradient is known. A local rule allows it
after its warm-up: gradients are freed layer by layer, and never all exist at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from modicum.errors import UnsupportedError
from modicum.optim.gradient.adagc import AdaGC
from modicum.optim.gradient.gradients import gradients, is_sharded, scale_, tensor_norms


class BackwardStep:
    """Clip and step inside ``backward()``, once the warm-up of the clipper is over.

    Every backward pass is a step, so gradients cannot be accumulated; a second pass before :meth:`step` gives a
    warning. A parameter must receive its gradient once in a pass; PyTorch adds up the parts of a tied one first.

    Args:
        clipper: An AdaGC on single tensors, without groups.
        make_optimizer: Called with a list of one parameter, returns its optimiser.

    Raises:
        UnsupportedError: The clipper needs more than each tensor alone, or parameters are sharded.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> stepper = BackwardStep(AdaGC(model.parameters(), warmup=0), lambda params: torch.optim.SGD(params, lr=0.1))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad is None
        True
        >>> stepper.step()
    """

    def __init__(self, clipper: AdaGC, make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        if clipper.units != list(clipper.params) or clipper.granularity == "global":
            raise UnsupportedError(
                "A step inside backward() sees each tensor alone: use granularity 'tensor' and no groups."
            )
        if clipper.nonfinite != "zero":
            raise UnsupportedError(
                f"A step inside backward() erases gradients that are not finite; nonfinite is {clipper.nonfinite!r}. "
                "Use 'zero', or attach()."
            )
        if any(is_sharded(param) for param in clipper.params.values()):
            raise UnsupportedError("A step inside backward() of sharded parameters is not supported. Use attach().")
        self.clipper = clipper
        self._seen: set[int] = set()
        self._warned = False
        self.optimizers = [make_optimizer([param]) for param in clipper.params.values()]
        self._handles = [
            param.register_post_accumulate_grad_hook(self._hook(place, name))  # type: ignore[no-untyped-call]
            for place, (name, param) in enumerate(clipper.params.items())
        ]

    def step(self) -> None:
        """End the step: during the warm-up clip and step everything, afterwards only count."""
        clipper = self.clipper
        self._seen.clear()
        if not clipper.warming_up:
            if clipper.state is not None:
                clipper.state = replace(clipper.state, step=clipper.state.step + 1)
            return
        clipper.clip_()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def detach(self) -> None:
        """Leave the parameters as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, place: int, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def now(param: Tensor) -> None:
            if place in self._seen and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{name} got a second gradient before step(): after the warm-up each is clipped and stepped by "
                    "itself, so nothing accumulates. Call step() after every backward(), or attach() the clipper to an "
                    "optimiser.",
                    stacklevel=2,
                )
            self._seen.add(place)
            if self.clipper.warming_up:
                return
            grads = [grad for grad in gradients([(name, param)]) if grad is not None]
            factors, after = self.clipper.rule(tensor_norms(grads), self._part(place), **self.clipper.knobs)
            scale_(grads, factors)
            self._keep(place, after)
            self.optimizers[place].step()
            self.optimizers[place].zero_grad()

        return now

    def _part(self, place: int) -> Any:
        state = self.clipper.state
        if state is None:
            return None
        parts = {f.name: getattr(state, f.name) for f in fields(state) if f.metadata.get("per_unit")}
        return replace(state, **{name: value[place : place + 1] for name, value in parts.items() if value is not None})

    def _keep(self, place: int, after: Any) -> None:
        clipper = self.clipper
        if clipper.state is None:
            # The first gradient of a run without warm-up: nothing has been observed of the others.
            blank = torch.full((len(clipper.units),), torch.nan, device=after.gamma.device)
            clipper.state = replace(after, gamma=blank, step=after.step - 1)
        clipper.state.gamma[place : place + 1] = after.gamma
