r"""A loss along checkpoints: what an averager that learns is told, and the only place that makes means for it.

With a mean of checkpoints :math:`\bar\theta(c) = \sum_i c_i \theta_i`, whose coefficients sum to 1, one backward
pass at :math:`\bar\theta` and n inner products give the slope in the coefficients:

.. math::
    \partial F / \partial c_i = \langle \nabla F(\bar\theta), \theta_i - \theta_n \rangle + \text{const}

The constant is the same for all i and does not matter where the coefficients sum to 1. Differences to the newest
checkpoint keep float32 exact enough: checkpoints of one run share almost all of their weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.weights.compatibility import Tensors, check_agreement, label, spec_of
from modicum.weights.kernels.blocks import delta_blocks, weighted_sum

Loss: TypeAlias = Callable[[dict[str, Tensor], Any], Tensor | float]
"""From the floating-point weights of a mean, by name, and a batch to the mean loss of the batch."""


@dataclass(frozen=True)
class Landscape:
    """The loss of a mean of checkpoints, as a function of their coefficients.

    One mean exists at a time, with its gradient: checkpoints are read from their files tensor by tensor, and nothing
    has the size of all of them.

    Args:
        function: The loss of a mean on a batch.
        checkpoints: Oldest first.
        batches: What the search may look at.
        held_out: What a choice is judged by; ``batches`` when there is none.
        exclude: Regular expression of names of tensors that stay as they are in the newest checkpoint.
        device: Where the means go.

    Raises:
        RecipeError: There are no batches.
        CheckpointError: The checkpoints do not fit together.

    Example:
        >>> zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> landscape = Landscape(lambda weights, target: (weights["w"] - target).square().sum(), [zero, one], [0.25])
        >>> landscape.loss([0.5, 0.5]), landscape.slope([0.5, 0.5])
        (0.0625, (0.0625, tensor([-0.5000,  0.0000], dtype=torch.float64)))
    """

    function: Loss
    checkpoints: Sequence[Tensors]
    batches: Sequence[Any]
    held_out: Sequence[Any] | None = None
    exclude: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not len(self.batches) or (self.held_out is not None and not len(self.held_out)):
            raise RecipeError("A loss along checkpoints needs at least one batch of data. Give more data.")
        names = [label(model, f"checkpoints[{i}]") for i, model in enumerate(self.checkpoints)]
        check_agreement(self.checkpoints[0], self.checkpoints[1:], names=names)

    def loss(self, weights: Sequence[float], *, step: int | None = None) -> float:
        """Return the loss of the mean with coefficients ``weights``.

        Args:
            weights: One for each checkpoint.
            step: Look at one batch, the one whose turn it is in this step; at all of them when not given.
        """
        return self._value(weights, self._turn(step))

    def score(self, weights: Sequence[float]) -> float:
        """Return the loss on the held-out batches, by which a choice is judged."""
        return self._value(weights, self.batches if self.held_out is None else self.held_out)

    def slope(self, weights: Sequence[float], *, step: int | None = None) -> tuple[float, Tensor]:
        """Return the loss, and its slope in each coefficient up to a constant: ``(n,)`` in float64 on the CPU.

        Args:
            weights: One for each checkpoint.
            step: As in :meth:`loss`.
        """
        mean = self._mean(weights)
        moving = {name: tensor.requires_grad_() for name, tensor in mean.items() if not self._stays(name)}
        batches, total = self._turn(step), 0.0
        with torch.enable_grad():
            for batch in batches:
                value = torch.as_tensor(self.function(mean, batch)) / len(batches)
                value.backward()  # type: ignore[no-untyped-call]
                total += float(value.detach())
        del mean
        slope = torch.zeros(len(self.checkpoints), dtype=torch.float64)
        *others, newest = self.checkpoints
        for name, tensor in moving.items():
            if tensor.grad is None:  # the loss does not look at it
                continue
            gradient = tensor.grad.cpu().reshape(-1)
            tensor.grad = None
            for where, _, deltas in delta_blocks(newest[name], [model[name] for model in others]):
                slope[:-1] += torch.mv(deltas, gradient[where].to(deltas.dtype)).double()
        return total, slope

    def _turn(self, step: int | None) -> Sequence[Any]:
        return self.batches if step is None else [self.batches[step % len(self.batches)]]

    def _stays(self, name: str) -> bool:
        return self.exclude is not None and re.search(self.exclude, name) is not None

    def _value(self, weights: Sequence[float], batches: Sequence[Any]) -> float:
        with torch.no_grad():
            mean = self._mean(weights)
            return sum(float(self.function(mean, batch)) for batch in batches) / len(batches)

    def _mean(self, weights: Sequence[float]) -> dict[str, Tensor]:
        if len(weights) != len(self.checkpoints):
            raise ValueError(f"got {len(weights)} coefficients for {len(self.checkpoints)} checkpoints")
        used = [(model, float(w)) for model, w in zip(self.checkpoints, weights) if w][::-1]
        factors = torch.tensor([w for _, w in used], dtype=torch.float64)
        newest, mean = self.checkpoints[-1], {}
        for name in newest:
            dtype = spec_of(newest, name).dtype
            if not dtype.is_floating_point:
                continue
            dtype = torch.promote_types(dtype, torch.float32)
            if self._stays(name):
                made = newest[name].to(dtype)
            else:
                # The newest of them comes first: the others enter by their differences from it.
                first, *others = (model[name] for model, _ in used)
                made = weighted_sum(None, [first.to(dtype), *others], factors)
            mean[name] = made.to(self.device)
        return mean
