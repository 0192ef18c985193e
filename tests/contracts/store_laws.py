"""Laws of expert stores, over shapes and knobs: what is told before is what is written, and what is read back."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from laws import Draw, knobs, law
from torch import Tensor

from modicum.registry import Entry, expert_store
from modicum.weights.stores.magnitude import Magnitude
from modicum.weights.stores.reading import Reader, reader_of
from modicum.weights.stores.whole import Whole

SHAPES = ((1,), (7,), (5, 9), (33, 40), (2, 6, 8), (3, 5, 7))


class TellsLess(Whole):
    """A store that announces half of what it writes."""

    @property
    def specs(self) -> dict[str, Any]:
        """One entry too few."""
        spec = super().specs["delta"]
        return {"delta": type(spec)((self.numel - 1,), spec.dtype)}


class ForgetsItsSeed(Magnitude):
    """A store whose bytes differ from call to call."""

    calls = 0

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:
        """Add a number that grows."""
        type(self).calls += 1
        return super().encode(dense, expert + type(self).calls * torch.arange(expert.numel()).view(expert.shape))


class Diverges(Whole):
    """A store from which nothing that is a number comes back."""

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:
        """Return no number."""
        return {"delta": torch.full((self.numel,), torch.nan)}


def drawn(entry: Entry[Any], draw: Draw) -> tuple[Any, Tensor, Tensor, dict[str, Any]]:
    """Return a store, a dense tensor, an expert, and the knobs that a reader needs."""
    shape = draw(st.sampled_from(SHAPES if not entry.facts.factors else SHAPES[2:4]))
    given, key = knobs(entry, draw), draw(st.integers(0, 2**62))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    dense, expert = (torch.randn(shape, generator=rng).to(torch.bfloat16).float() for _ in range(2))
    store = entry.function(shape, **given, key=key)
    if entry.facts.factors:
        store.with_factors(torch.randn(3, shape[1], generator=rng), torch.randn(shape[0], 3, generator=rng), 0.5)
    return store, dense, expert, {"key": key, "density": given.get("density")}


def reading(store: Any, dense: Tensor, expert: Tensor, places: dict[str, Any]) -> Reader:
    """Return what reads the store's parts."""
    return reader_of(store.encode(dense, expert), store.shape, **places)


@law(expert_store, "what is written has the shapes, dtypes and bytes that were told before", broken=TellsLess)
def told_before(entry: Entry[Any], draw: Draw) -> None:
    store, dense, expert, _ = drawn(entry, draw)
    parts = store.encode(dense, expert)
    assert {n: (tuple(p.shape), p.dtype) for n, p in parts.items()} == {
        n: (s.shape, s.dtype) for n, s in store.specs.items()
    }
    assert sum(part.nbytes for part in parts.values()) == store.nbytes


@law(expert_store, "the same key and weights give the same bytes", broken=ForgetsItsSeed)
def repeatable(entry: Entry[Any], draw: Draw) -> None:
    store, dense, expert, _ = drawn(entry, draw)
    one, other = store.encode(dense, expert), store.encode(dense.clone(), expert.clone())
    assert all(torch.equal(one[name], other[name]) for name in one)


@law(expert_store, "a block is read as it stands in the whole, and a factor multiplies it", broken=Diverges)
def blocks(entry: Entry[Any], draw: Draw) -> None:
    store, dense, expert, places = drawn(entry, draw)
    reader = reading(store, dense, expert, places)
    whole = reader.dense()
    assert whole.shape == dense.shape and bool(torch.isfinite(whole).all())
    fresh = reading(store, dense, expert, places)
    small = fresh.frame.columns * 8
    if not hasattr(fresh, "firsts"):  # a bit mask counts its values by the blocks that it was opened with
        out = torch.zeros(dense.numel())
        for start in range(0, dense.numel(), small):
            fresh.add_(out[start : start + small], start, -0.5)
        assert torch.allclose(out.view(dense.shape), -0.5 * whole, rtol=1e-5, atol=1e-6)
    again = dense.flatten().clone()
    for start in range(0, dense.numel(), fresh.block):
        fresh.add_(again[start : start + fresh.block], start, 2.0)
    assert torch.allclose(again.view(dense.shape), dense + 2 * whole, rtol=1e-5, atol=1e-5)
