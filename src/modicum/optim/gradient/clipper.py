"""The one adapter between gradient rules of norms and optimisers.

A rule is a pure function ``(norms, state, *, knobs) -> (factors, state)`` on a vector with one entry for each tensor
(or group of tensors). Three conventions make it safe in any loop:

* ``state`` is a frozen dataclass, or ``None`` before the first step; fields marked :data:`PER_UNIT` have one entry for
  each norm and are saved under the parameters' names.
* A norm that is not finite was not observed: the tensor has no gradient in this step, or an overflow. The rule leaves
  its state alone and answers with the factor 0.
* A factor of 0 erases the gradient, infinities included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.errors import CheckpointError, UnsupportedError
from modicum.optim.gradient.gradients import gradients, named_tensors, scale_, tensor_norms
from modicum.optim.gradient.step_hook import StepHook
from modicum.patterns import Pattern

Granularity: TypeAlias = Literal["tensor", "shard", "global"]
Nonfinite: TypeAlias = Literal["zero", "skip", "raise"]

PER_UNIT = MappingProxyType({"per_unit": True})


class Clipped(NamedTuple):
    """The result of one call of ``clip_``: tensors on the gradients' device, one entry for each unit of the clipper."""

    norms: Float[Tensor, " u"]  # not finite where there was no gradient
    factors: Float[Tensor, " u"]
    thresholds: Float[Tensor, " u"] | None = None  # those of this step, for rules that have them


class NormClipper(StepHook):
    """Scale each gradient by what a rule says about its norm.

    Args:
        params: Tensors, or pairs of a name and a tensor. A tied parameter counts once.
        rule: Pure function ``(norms, state, **knobs) -> (factors, state)``.
        state_type: The dataclass of the rule's state; ``None`` for a rule without memory.
        knobs: Keyword arguments of ``rule``.
        granularity: ``tensor`` measures whole tensors. ``shard`` lets each rank treat its own part as a tensor.
            ``global`` makes all tensors one unit.
        groups: Regular expression → replacement, applied to names; tensors whose names become equal share one entry.
            ``{"[qkv]_proj": "qkv_proj"}`` treats three projections like the fused matrix of that name.
        nonfinite: ``zero`` erases a gradient that is not finite, ``skip`` passes it on as it is, ``raise`` stops, at
            the price of reading the norms back in every step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Callable[..., tuple[Tensor, Any]],
        *,
        state_type: type | None = None,
        knobs: Mapping[str, Any] | None = None,
        granularity: Granularity = "tensor",
        groups: Mapping[str, str] | None = None,
        nonfinite: Nonfinite = "zero",
    ) -> None:
        super().__init__(named_tensors(params))
        self.rule, self.state_type, self.knobs = rule, state_type, dict(knobs or {})
        self.granularity, self.nonfinite = granularity, nonfinite
        self.state: Any = None
        self.observer: Callable[[Clipped], None] | None = None
        names = ["all" if granularity == "global" else _renamed(name, groups or {}) for name in self.params]
        self.units = list(dict.fromkeys(names))
        place = {unit: i for i, unit in enumerate(self.units)}
        self._unit_of = [place[name] for name in names]
        self._layout = _Layout(self._unit_of, len(self.units), (), torch.device("cpu"))

    @torch.no_grad()
    def clip_(self) -> Clipped:
        """Scale the gradients in place, as they are now, and advance the rule by one step.

        Returns:
            Norms and factors by unit, in the order of ``units``. Without any gradient nothing happens.

        Raises:
            UnsupportedError: A gradient is sparse or complex, or not finite under ``nonfinite="raise"``.
        """
        every = gradients(self.params.items())
        present = tuple(grad is not None for grad in every)
        grads = [grad for grad in every if grad is not None]
        if not grads:
            return Clipped(torch.full((len(self.units),), torch.nan), torch.ones(len(self.units)))
        norms = tensor_norms(grads, shards=self.granularity == "shard")
        layout = self._laid_out(present, norms.device)
        units, thresholds = layout.pooled(norms), self.thresholds()
        factors, self.state = self.rule(units, self.state, **self._total(grads), **self.knobs)
        factors = self._without_nonfinite(units, factors, layout.here)
        scale_(grads, layout.spread(factors))
        result = Clipped(units, factors, thresholds)
        if self.observer is not None:
            self.observer(result)
        return result

    @property
    def warming_up(self) -> bool:
        """Whether the next step needs the norm of all gradients together, beyond those of the units."""
        return False

    def thresholds(self) -> Tensor | None:
        """Return the norm above which each unit is clipped next, if the rule has such a number."""
        return None

    def before_step(self, _: torch.optim.Optimizer) -> None:
        """Clip; this is what :meth:`attach` makes the optimiser do first."""
        self.clip_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors: ``field.parameter name`` for what each tensor has, ``field`` for the rest.

        It can be written with safetensors as it is. Before the first step it is empty.
        """
        found: dict[str, Tensor] = {}
        if self.state is None:
            return found
        for item in fields(self.state):
            value = getattr(self.state, item.name)
            if value is None:
                continue
            if item.metadata.get("per_unit"):
                for unit, part in zip(self.units, value.unbind()):
                    found[f"{item.name}.{unit}"] = part.clone()
            else:
                found[item.name] = value.clone() if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            CheckpointError: The state belongs to other parameters or another rule, or its values make no sense.
                Nothing has been changed then.
        """
        self.state = self._read(state)

    def _read(self, state: Mapping[str, Tensor]) -> Any:
        if not state:
            return None
        if self.state_type is None:
            raise CheckpointError(f"Got a state with {len(state)} entries for a rule that keeps none. Leave it out.")
        rest, values = dict(state), {}
        device = next(iter(self.params.values())).device
        for item in fields(self.state_type):
            keys = [f"{item.name}.{unit}" for unit in self.units] if item.metadata.get("per_unit") else [item.name]
            found = [rest.pop(key) for key in keys if key in rest]
            if not found and item.default is None:
                continue
            if len(found) < len(keys):
                missing = next(key for key in keys if key not in state)
                raise CheckpointError(
                    f"The state holds no {missing!r}: it was saved for other parameters, groups or another rule. "
                    "Build the clipper with the same ones, or start without a state."
                )
            values[item.name] = _value(item, dict(zip(keys, found)), device)
        if rest:
            raise CheckpointError(
                f"The state holds {next(iter(rest))!r}, which this clipper does not know "
                f"({len(rest)} such entries). Build the clipper with the same parameters and rule."
            )
        return self.state_type(**values)

    def _total(self, grads: list[Tensor]) -> dict[str, Tensor]:
        # Only where each rank measures its own part does the vector of norms not hold the total.
        if self.granularity != "shard" or not self.warming_up:
            return {}
        whole = tensor_norms(grads)
        return {"total": torch.linalg.vector_norm(whole.where(whole.isfinite(), 0))}

    def _without_nonfinite(self, norms: Tensor, factors: Tensor, here: list[int]) -> Tensor:
        if self.nonfinite == "skip":
            return torch.where(norms.isfinite(), factors, 1)
        if self.nonfinite == "raise":
            values = norms.tolist()
            bad = [self.units[i] for i in dict.fromkeys(here) if not math.isfinite(values[i])]
            if bad:
                raise UnsupportedError(
                    f"The gradient of {bad[0]!r} is not finite ({len(bad)} in all). Lower the learning rate, "
                    "or set nonfinite to 'zero'."
                )
        return factors

    def _laid_out(self, present: tuple[bool, ...], device: torch.device) -> _Layout:
        # Which parameters have a gradient changes rarely; the index is moved to the device only then.
        if self._layout.present != present:
            self._layout = _Layout(self._unit_of, len(self.units), present, device)
        return self._layout


class _Layout:
    """Where each present tensor stands among the units."""

    def __init__(self, unit_of: list[int], units: int, present: tuple[bool, ...], device: torch.device) -> None:
        self.present = present
        self.here = [unit for unit, there in zip(unit_of, present) if there]
        self.identity = self.here == list(range(units))
        self.index = torch.tensor(self.here, dtype=torch.long, device=device)
        # An absent unit starts from infinity and stays there: the mark of a norm that was not observed.
        self.start = torch.full((units,), torch.inf, device=device).index_fill_(0, self.index, 0)

    def pooled(self, norms: Tensor) -> Tensor:
        if self.identity:
            return norms
        return self.start.to(norms.dtype).index_add(0, self.index, norms.square()).sqrt()

    def spread(self, factors: Tensor) -> Tensor:
        return factors if self.identity else factors[self.index]


def _renamed(name: str, groups: Mapping[str, str]) -> str:
    for pattern, replacement in groups.items():
        name = Pattern(pattern, "groups").replaced(replacement, name)
    return name


def _value(item: Field[Any], found: Mapping[str, Tensor], device: torch.device) -> Any:
    """Return one field of a state from its saved parts, or refuse them."""
    per_unit, count = bool(item.metadata.get("per_unit")), item.type == "int"
    for key, value in found.items():
        if not isinstance(value, Tensor) or ((per_unit or count) and value.dim() != 0):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"The state's {key!r} is {shape}, expected a tensor without dimensions.")
        if count and value.is_floating_point():
            raise CheckpointError(f"The state's {key!r} is {value.item()}, expected a whole number of steps.")
        if bool((value < 0).any()) or bool(value.isinf().any()):
            raise CheckpointError(f"The state's {key!r} is {value.flatten()[0].item()}, expected 0 or more.")
    if per_unit:
        return torch.stack([value.to(device) for value in found.values()])
    value = next(iter(found.values()))
    return int(value) if count else value.to(device).clone()
