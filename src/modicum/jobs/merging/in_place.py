"""A merge whose result goes straight into a loaded model: nothing is written, and only what changes is made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from modicum.architectures import unfused
from modicum.errors import UnsupportedError
from modicum.layout import is_recomputed
from modicum.weights.adapter import name_in
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.merge import run_step, survey
from modicum.weights.stream import names_by_size, run_all

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modicum.weights.plan import Plan, Source, Step

Place = tuple[str, tuple[int | tuple[int, int], ...]]


class InPlace:
    """A model whose weights are those of a merge.

    Args:
        model: Of the merge's architecture; its own weights are overwritten.
        plan: Its steps give the names; knobs may differ from plan to plan.

    Raises:
        UnsupportedError: The model's class has no place for a tensor.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        kind = str(model.config.model_type)
        table: dict[str, Place] = {name: (name, ()) for name in self._tensors}
        for name, tensor in self._tensors.items():
            table |= {own: (name, part) for own, part in unfused(name, tensor.shape, kind).items()}
        called = name_in(table)
        self._places: dict[str, Place] = {}
        for step in plan.steps:
            place = table.get(called(step.name))
            if place is not None:
                self._places[step.name] = place
            elif not is_recomputed(step.name, step.spec.shape):
                raise UnsupportedError(
                    f"{type(model).__name__} has no place for {step.name!r}, so that the merge cannot be measured "
                    "without writing it. Merge with single values, and evaluate each."
                )
        self._made: set[str] = set()

    def merge(self, plan: Plan) -> None:
        """Put a merge's result in place."""
        steps = {step.name: step for step in plan.steps if step.name in self._places}
        todo = {name: step for name, step in steps.items() if name not in self._made or moves(step)}
        found = survey(plan)

        def one(name: str) -> Tensor:
            tensor, _ = run_step(todo[name], seed=plan.seed, device=plan.device, found=found.get(name, {}))
            self._at(name).copy_(tensor)
            return tensor.new_empty(0)

        for name, _ in run_all(one, names_by_size({n: step.spec for n, step in todo.items()}), workers=plan.workers):
            self._made.add(name)

    def _at(self, name: str) -> Tensor:
        own, part = self._places[name]
        tensor = self._tensors[own].detach()
        for axis in part:
            tensor = tensor[axis] if isinstance(axis, int) else tensor[axis[0] : axis[1]]
        return tensor


def moves(step: Step) -> bool:
    """Whether a step's result may depend on its knobs: not where all experts are adapters that leave it as it is."""
    base = step.base
    if base is None or "zero_delta" not in step.entry.facts.laws:
        return True
    return any(_differs(base, expert) for expert in step.experts)


def _differs(base: Source, expert: Source) -> bool:
    origin, tensors = base.tensors, expert.tensors
    if not isinstance(tensors, Checkpoint) or tensors.adapter is None:
        return True
    if not isinstance(origin, Checkpoint) or origin.adapter or origin.folder.resolve() != tensors.base.folder.resolve():
        return True
    return expert.name != base.name or expert.name in {*tensors.adapter.factors, *tensors.adapter.replaced}
