"""Passes that end at a block of a model, or begin there with states that are known.

The blocks that are left out stay in their model: modules that stand for them take their places while the pass lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from modicum.errors import UnsupportedError
from modicum.evaluate.answer_states import states_entering
from modicum.layout import layer_of, stacks


def begun(model: Any, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Return the context in which a pass over a batch begins with its ``states``, where it has any.

    Args:
        model: The model, in its adapter or not.
        batch: Of :class:`~modicum.jobs.data.pairs.PairCollator`; ``states`` are those that enter block ``below``.
    """
    if "states" not in batch:
        return nullcontext()
    blocks = blocks_of(model, batch["below"])
    states = batch["states"].to(next(blocks[batch["below"]].parameters()).device)
    return _replaced(blocks, {number: lambda *_, **__: states for number in range(batch["below"])})


def states_below(model: Any, batch: Mapping[str, Any], below: int) -> Tensor:
    """Return the states that enter block ``below``, (rows, tokens, hidden size); no block from there on computes."""
    read = {key: batch[key].to(model.device) for key in ("input_ids", "position_ids", "attention_mask")}
    return states_entering(blocks_of(model, below)[below], lambda: model(**read, use_cache=False))


def blocks_of(model: Any, below: int) -> nn.ModuleList:
    """Return a model's blocks.

    Raises:
        UnsupportedError: It has not one stack of more than ``below`` blocks.
    """
    base = base_of(model)
    found = stacks(name for name, _ in base.named_parameters())
    blocks = base.get_submodule(next(iter(found))) if len(found) == 1 else None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) <= below:
        told = ", ".join(f"{count} blocks in {name}" for name, count in found.items()) or "no blocks"
        raise UnsupportedError(f"the model has {told}, expected one stack of more than {below}")
    return blocks


def base_of(model: Any) -> Any:
    """Return the model inside the wrappers of several processes and of an adapter."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def is_above(name: str, below: int) -> bool:
    """Whether a tensor belongs to block ``below`` or to a later one.

    Example:
        >>> [is_above(f"model.layers.{number}.mlp.up_proj.weight", 20) for number in (3, 20)]
        [False, True]
    """
    layer = layer_of(name)
    return layer is not None and layer.number >= below


class _InPlaceOf(nn.Module):
    """Stands for a block, whose attributes it has: some models read there what kind of block it is."""

    def __init__(self, block: nn.Module, act: Callable[..., Tensor]) -> None:
        super().__init__()
        self._known = (block, act)  # in a tuple, so that the block's weights are not this module's

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return self._known[1](*given, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_known"][0], name)


@contextmanager
def _replaced(blocks: nn.ModuleList, acts: Mapping[int, Callable[..., Tensor]]) -> Iterator[None]:
    own = {number: blocks[number] for number in acts}
    try:
        for number, act in acts.items():
            blocks[number] = _InPlaceOf(own[number], act)
        yield
    finally:
        for number, block in own.items():
            blocks[number] = block
