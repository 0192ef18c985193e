"""Key-value cache of a looped model: a slot for each visit of a layer, the zero key waiting in column 0.

A slot's buffers are allocated a little ahead and written in place, so that most decoding steps copy one token and
nothing else. The zero key never counts: lengths, masks and positions are those of the real tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from modicum.errors import UnsupportedError
from modicum.models.zero_token.schedule import VisitId

_MAKE = "DynamicCache(config=model.config)", "StaticCache(config=model.config, max_cache_len=…)"
_AHEAD = 16  # a buffer grows by its length over this: memory stays within 7 % of what the tokens take


class SlotLayer(DynamicLayer):
    """Keys and values of one visit, in buffers with some room; ``lead`` columns in front hold the zero token."""

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._length = self._lead = 0
        # Score of each token by which it stayed or left, NaN where it did not run; only the prefix scope needs it.
        self.scores: Tensor | None = None
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """Keys of the real tokens (b, g, s, k)."""
        return self._view(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._drop(value)

    @property
    def values(self) -> Tensor | None:
        """Values of the real tokens (b, g, s, k)."""
        return self._view(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._drop(value)

    def _view(self, which: int) -> Tensor | None:
        if self._buffers is None:
            return None
        return self._buffers[which][:, :, self._lead : self._lead + self._length]

    def _drop(self, value: Tensor | None) -> None:
        if value is not None:
            raise UnsupportedError("Keys and values of a slot cannot be replaced. Use update, crop or reorder_cache.")
        self._buffers, self._length, self.scores = None, 0, None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        """Note where the keys live; the buffers come with the first update."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, zero_key: Tensor | None = None, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them, with the zero token in front when there is a ``zero_key``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        if self._buffers is None:
            self._lead = 0 if zero_key is None else 1
        # Autograd may still need what lies in the buffers: then they are replaced rather than written into.
        in_place = not (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad))
        if not in_place or self._buffers is None or self._lead + end > self._buffers[0].shape[-2]:
            room = end // _AHEAD if in_place else 0
            front = None if zero_key is None else zero_key.to(key_states.dtype)[None, :, None]
            self._buffers = self._grow(key_states, 0, room, front), self._grow(value_states, 1, room, None)
        else:
            for buffer, states in zip(self._buffers, (key_states, value_states)):
                buffer[:, :, self._lead + self._length : self._lead + end] = states
        self._length = end
        keys, values = self._buffers
        return keys[:, :, : self._lead + end], values[:, :, : self._lead + end]

    def _grow(self, states: Tensor, which: int, room: int, front: Tensor | None) -> Tensor:
        b, g, _, k = states.shape
        if self._buffers is not None:
            old = self._buffers[which][:, :, : self._lead + self._length]
        elif front is not None:
            old = front.expand(b, g, 1, k)
        else:
            old = states.new_zeros(b, g, self._lead, k)
        parts = [old, states] + ([states.new_empty(b, g, room, k)] if room else [])
        return torch.cat(parts, dim=-2)

    def get_seq_length(self) -> int:
        """Return the number of real tokens."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise UnsupportedError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}.")
        self._length = max(0, self._length + tokens_to_remove)
        if self.scores is not None:
            self.scores = self.scores[:, : self.scores.shape[1] + tokens_to_remove]

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._buffers is not None:
            self._buffers = function(self._buffers[0]), function(self._buffers[1])
        if self.scores is not None:
            self.scores = function(self.scores)

    def reset(self) -> None:
        """Forget everything."""
        self._drop(None)
        self.is_initialized = False

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back to the device of the keys."""
        if self.is_initialized:
            self._map(lambda x: x.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the beams ``beam_idx``."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._map(lambda x: x[indices])


def prepare_cache(cache: Cache, schedule: list[VisitId]) -> Cache:
    """Check that ``cache`` has a slot for every visit, and give a fresh one slots that are written in place.

    Raises:
        UnsupportedError: The cache was sized for another number of layer visits.
    """
    layers = cache.layers
    if not layers:
        layers.extend(SlotLayer() for _ in schedule)
    if len(layers) != len(schedule):
        physical = len({layer for layer, _ in schedule})
        hint = " It was sized for the physical layers." if len(layers) == physical else ""
        raise UnsupportedError(
            f"The cache has {len(layers)} slots for {len(schedule)} layer visits.{hint} "
            f"Build it with {_MAKE[isinstance(cache, StaticCache)]}."
        )
    for slot, layer in enumerate(layers):
        if getattr(cache, "offloading", False):
            break  # its own layers come and go between devices
        if type(layer) is DynamicLayer and not layer.is_initialized:
            layers[slot] = SlotLayer()
    return cache


@contextmanager
def without_trace(cache: Cache | None, slots: Iterable[int] | None = None) -> Iterator[None]:
    """Let the passes within write into slots of ``cache``, or into all, and take out again what they wrote."""
    if cache is None:
        yield
        return
    made = len(cache.layers)
    layers: dict[int, Any] = {slot: cache.layers[slot] for slot in (range(made) if slots is None else slots)}
    # What is appended to a growing slot lies beyond its length, or in other tensors; a static one is written in place.
    held = {slot: copy.copy(layer) for slot, layer in layers.items()}
    static = {slot: _written(layer) for slot, layer in layers.items() if isinstance(layer, StaticLayer)}
    try:
        yield
    finally:
        del cache.layers[made:]
        for slot, layer in layers.items():
            cache.layers[slot] = held[slot] if slot not in static else layer
        for slot, tensors in static.items():
            if hasattr(held[slot], "cumulative_length_int"):
                layers[slot].cumulative_length_int = held[slot].cumulative_length_int
            for name, tensor in tensors.items():
                getattr(layers[slot], name).copy_(tensor)


def _written(layer: StaticLayer) -> dict[str, Tensor]:
    """Return copies of what a pass overwrites: the length, and the tokens of a window, which go on."""
    names = ["cumulative_length"] + (["keys", "values"] if layer.is_sliding and layer.is_initialized else [])
    return {name: getattr(layer, name).clone() for name in names}
