"""The adapter for rules that look into one gradient at a time, or at one tensor's update.

Such a rule is a pure function. Its positional parameters name what it is given of each tensor:
``gradient``, ``weight`` (before the step), ``update`` (what the step added to the weight), ``lr``, ``second_moment``
(Adam's, as it is stored), ``debiased_second_moment``, ``age`` (steps since the moments were last reset) and ``state``,
its own memory.

Rules that act ``before`` the step return the new gradient; those that act ``after`` it return a factor on the update.
With ``state`` among the parameters they return a pair.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from modicum.errors import CheckpointError, UnsupportedError
from modicum.optim.gradient.gradients import gradients, is_sharded, named_tensors
from modicum.optim.gradient.step_hook import StepHook


class TensorHook(StepHook):
    """Apply a rule to every tensor, before or after each step of the optimiser.

    Args:
        params: Tensors, or pairs of a name and a tensor.
        rule: The rule; see above.
        acts: Whether it acts ``before`` the step, on gradients, or ``after`` it, on updates.
        state_type: The dataclass of the rule's memory of one tensor.
        knobs: Keyword arguments of ``rule``.
        period: Forget the optimiser's moments every so many steps; 0 for never.
        rewarm: Steps after each reset in which the learning rate rises again from a hundredth.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Callable[..., Any],
        *,
        acts: Literal["before", "after"],
        state_type: type | None = None,
        knobs: Mapping[str, Any] | None = None,
        period: int = 0,
        rewarm: int = 0,
    ) -> None:
        super().__init__(named_tensors(params))
        if any(is_sharded(param) for param in self.params.values()):
            raise UnsupportedError(
                f"{rule.__name__} looks into whole tensors and cannot work on sharded ones. "
                "Use a rule of norms, such as adagc or zclip, or DDP."
            )
        self.rule, self.acts, self.state_type, self.knobs = rule, acts, state_type, dict(knobs or {})
        self.period, self.rewarm = period, rewarm
        self.wants = [
            name for name, p in inspect.signature(rule).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        self.step = 0
        self.states: dict[str, Any] = {}
        self._before_step: dict[str, Tensor] = {}
        self._rates: list[Any] = []

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Reset the moments when their time has come, then rewrite the gradients or remember the weights."""
        if self.period and self.step and self.step % self.period == 0:
            for state in optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq", "step"):
                    if isinstance(state.get(name), Tensor):
                        state[name].zero_()
        age = self.step % self.period if self.period else self.step
        if self.rewarm and self.step >= self.period and age < self.rewarm:
            rise = 1 - 0.99 * (1 + math.cos(math.pi * age / self.rewarm)) / 2
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * rise
        every = gradients(self.params.items())
        if self.acts == "after":
            self._before_step = {
                name: param.clone() for (name, param), grad in zip(self.params.items(), every) if grad is not None
            }
            return
        for (name, param), grad in zip(self.params.items(), every):
            if grad is not None:
                grad.copy_(self._apply(optimizer, name, param, {"gradient": grad, "weight": param, "age": age}))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the updates, and give the learning rate back."""
        for name, before in self._before_step.items():
            param = self.params[name]
            known = {"gradient": param.grad, "weight": before, "update": param - before}
            factor = self._apply(optimizer, name, param, known)
            param.copy_(before.lerp(param, factor.to(param.dtype)))
        self._before_step = {}
        for group, rate in zip(optimizer.param_groups, self._rates):
            group["lr"] = rate
        self._rates = []
        self.step += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors: ``field.parameter name``, and ``step``."""
        found = {"step": torch.tensor(self.step)}
        for name, state in self.states.items():
            for item in fields(state):
                value = getattr(state, item.name)
                found[f"{item.name}.{name}"] = value.clone() if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Raises:
            CheckpointError: The state belongs to other parameters or another rule. Nothing has been changed then.
        """
        rest = dict(state)
        step = int(rest.pop("step", torch.tensor(0)))
        names = [item.name for item in fields(self.state_type)] if self.state_type else []
        states = {}
        for name, param in self.params.items():
            values = {key: rest.pop(f"{key}.{name}") for key in names if f"{key}.{name}" in rest}
            if values and self.state_type is not None:
                if len(values) < len(names):
                    raise CheckpointError(f"The state of {name!r} is incomplete: {sorted(values)}. Start without it.")
                states[name] = self.state_type(
                    **{
                        key: value.to(param.device).clone() if value.is_floating_point() else int(value)
                        for key, value in values.items()
                    }
                )
        if rest:
            raise CheckpointError(
                f"The state holds {next(iter(rest))!r}, which this rule does not know. "
                "Build it with the same parameters and rule."
            )
        self.step, self.states = step, states

    def _apply(self, optimizer: torch.optim.Optimizer, name: str, param: Tensor, known: dict[str, Any]) -> Tensor:
        if not {"lr", "second_moment", "debiased_second_moment"}.isdisjoint(self.wants):
            known |= _of_optimizer(optimizer, param, name, self.wants)
        known["state"] = self.states.get(name)
        result = self.rule(*(known[want] for want in self.wants), **self.knobs)
        if "state" not in self.wants:
            value: Tensor = result
            return value
        value, state = result
        if state is not None:
            self.states[name] = state
        return value


def _of_optimizer(optimizer: torch.optim.Optimizer, param: Tensor, name: str, wants: list[str]) -> dict[str, Any]:
    group = next((g for g in optimizer.param_groups if any(p is param for p in g["params"])), None)
    if group is None:
        raise UnsupportedError(f"The optimiser does not hold {name!r}. Make both from the same model.")
    state = optimizer.state.get(param, {})
    moment = state.get("exp_avg_sq")
    known = {"lr": group["lr"], "second_moment": moment, "debiased_second_moment": None}
    if moment is not None and "betas" in group:
        known["debiased_second_moment"] = moment / (1 - group["betas"][1] ** state["step"]).to(moment.device)
    elif state and not {"second_moment", "debiased_second_moment"}.isdisjoint(wants):
        raise UnsupportedError(
            f"This rule needs Adam's second moment, which {type(optimizer).__name__} does not keep. Use AdamW or Adam."
        )
    return known
