"""Averages of weights while a Trainer trains: a callback that updates, evaluates and remembers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modicum import processes
from modicum.errors import RecipeError, UnsupportedError
from modicum.layout import unwrapped
from modicum.weights.average import choose, weighted_mean
from modicum.weights.moving import Factors, Places
from modicum.weights.snapshots import Snapshots


def lora_factors(model: Any) -> dict[str, Factors]:
    """Return the factors of a PEFT model's layers, by the layers' names; none for any other model.

    Raises:
        UnsupportedError: A layer's change is more than the product of two factors.
    """
    found = {}
    for name, layer in model.named_modules():
        adapters = getattr(layer, "lora_A", None)
        if not isinstance(adapters, torch.nn.ModuleDict):
            continue
        for key, inner in adapters.items():
            A, B = getattr(inner, "weight", None), getattr(layer.lora_B[key], "weight", None)
            if A is None or B is None or A.ndim != 2 or layer.lora_magnitude_vector or layer.lora_embedding_A:
                raise UnsupportedError(
                    f"average: the adapter of {name} is more than a product of two factors, which is all that can be "
                    "averaged. Average its checkpoints by the job average instead."
                )
            if A.requires_grad or B.requires_grad:
                found[f"{unwrapped(name)}.{key}"] = Factors(A, B, float(layer.scaling[key]))
    return found


class Ring:
    """Snapshots of the trained weights, and their mean by a rule.

    Args:
        model: Whose weights are taken.
        factors: Of an adapter; their products are averaged.
        keep: How many snapshots.
        method: A rule.
        knobs: Its knobs, and the seed of its draws.
    """

    def __init__(
        self, model: Any, factors: Mapping[str, Factors], *, keep: int, method: str, knobs: Mapping[str, Any]
    ) -> None:
        self.places, self.method, self.knobs = Places(model, factors), method, knobs
        self.snapshots = Snapshots(model, keep=keep, trained=True)
        names = {id(p): unwrapped(name) for name, p in model.named_parameters()}
        self._parts = {name: (names[id(f.A)], names[id(f.B)], f.scale) for name, f in factors.items()}

    @property
    def ready(self) -> bool:
        """Whether there are as many snapshots as the rule asks for."""
        try:
            return bool(choose(range(len(self.snapshots)), method=self.method, **self.knobs))
        except RecipeError:
            return False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the mean of the snapshots in the weights' place while the block runs."""
        states = self.snapshots.states()
        whole = [{name: state[name] for name in self.places.own} for state in states]
        shares = choose(states, method=self.method, **self.knobs).coefficients
        mean = weighted_mean(whole, shares) if self.places.own else {}
        used = [(w, state) for w, state in zip(shares, states) if w]
        deltas = {}
        for name, (A, B, scale) in self._parts.items():
            left = torch.cat([(w * scale) * state[B].float() for w, state in used], 1)
            deltas[name] = left @ torch.cat([state[A].float() for _, state in used])
        with self.places.replaced(mean, deltas):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Return steps and snapshots as tensors by name."""
        tensors = {
            f"{step}/{name}": tensor
            for step, state in zip(self.snapshots.steps, self.snapshots.states())
            for name, tensor in state.items()
        }
        return {"steps": torch.tensor(self.snapshots.steps, dtype=torch.int64)} | tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned."""
        steps = state["steps"].tolist()
        states = [_under(f"{step}/", state) for step in steps]
        self.snapshots.load_state_dict({"steps": steps, "states": states})


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def evaluate(model: Any, batches: Any, loss: Callable[[Any, Mapping[str, Any]], Tensor], device: Any) -> float:
    """Return the mean loss over the rows of all processes, in evaluation mode."""
    was, sums, rows = model.training, torch.zeros(1, dtype=torch.float64), 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                given = {key: v.to(device) if torch.is_tensor(v) else v for key, v in batch.items()}
                count = len(next(v for v in given.values() if torch.is_tensor(v)))
                sums += count * float(loss(model, given))
                rows += count
    finally:
        model.train(was)
    return float(processes.mean(sums.to(torch.float32), float(rows)))
