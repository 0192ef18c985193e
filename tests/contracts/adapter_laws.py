"""Laws of adapter initialisations, over shapes, ranks and knobs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from laws import Draw, default_knobs, knobs, law
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from modicum.adapters.core import train_core
from modicum.adapters.hrp import Factors
from modicum.adapters.layers import lora_layers
from modicum.random import generator
from modicum.registry import Entry, adapter_init
from modicum.types import PositiveInt
from support import checked


@dataclass(frozen=True)
class Start:
    """What an initialisation is given, and what it makes of it."""

    entry: Entry[Any]
    data: dict[str, Tensor]
    given: dict[str, Any]

    def factors(self, **changed: Tensor) -> Factors:
        rng = {"rng": generator(0, "laws")} if "rng" in self._parameters else {}
        data = self.data | changed
        made: Factors = checked(self.entry.function)(*(data[n] for n in self.entry.parameters[0]), **self.given, **rng)
        return made

    @property
    def _parameters(self) -> set[str]:
        return set(inspect.signature(self.entry.function).parameters)

    def target(self) -> Tensor:
        """The matrix that a method of best approximation approximates."""
        return self.data["weight"] if "weight" in self.entry.parameters[0] else self.data["B"] @ self.data["A"]


def start(entry: Entry[Any], draw: Draw, *, chosen: dict[str, Any] | None = None) -> Start:
    out, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rank = draw(st.integers(1, min(out, width)))
    high = draw(st.integers(rank, 8))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    inputs = torch.randn(width + 4, width, generator=rng)
    data = {
        "weight": torch.randn(out, width, generator=rng),
        "gradient": torch.randn(out, width, generator=rng),
        "moment": inputs.T @ inputs,
        "A": torch.randn(high, width, generator=rng),
        "B": torch.randn(out, high, generator=rng),
    }
    takes = inspect.signature(entry.function).parameters
    drawn = knobs(entry, draw) if chosen is None else chosen
    supplied = {"rank": rank, "scaling": draw(st.sampled_from([0.5, 1.0, 2.0])), "train_factors": "both"}
    return Start(entry, data, {name: value for name, value in (drawn | supplied).items() if name in takes})


def starts_with_ones(weight: Tensor, *, rank: PositiveInt) -> Factors:
    return torch.ones(rank, weight.shape[1]), torch.ones(len(weight), rank)


def reads_values(weight: Tensor, *, rank: PositiveInt) -> Factors:
    return weight.sum() * torch.ones(rank, weight.shape[1]), torch.zeros(len(weight), rank)


def swaps(weight: Tensor, *, rank: PositiveInt) -> Factors:
    return torch.zeros(len(weight), rank), torch.zeros(rank, weight.shape[1])


def draws_globally(weight: Tensor, *, rank: PositiveInt) -> Factors:
    return torch.randn(rank, weight.shape[1]), torch.zeros(len(weight), rank)


@law(adapter_init, "zero_product", broken=starts_with_ones, supplied={"rank"})
def zero_product(entry: Entry[Any], draw: Draw) -> None:
    drawn = start(entry, draw, chosen=default_knobs(entry))
    A, B = drawn.factors()
    if entry.facts.core:  # B is a frame, and what stands between the two must be nothing
        linear = nn.Linear(A.shape[1], len(B), bias=False)
        model = get_peft_model(nn.Sequential(linear), LoraConfig(r=len(A), target_modules=["0"]))
        (name,) = lora_layers(model)
        train_core(model, {name: B})
        B = lora_layers(model)[name].lora_B["default"].weight.detach()
    assert (B @ A).abs().max() < 1e-6


@law(adapter_init, "orthogonal_rows", broken=starts_with_ones, supplied={"rank"})
def orthogonal_rows(entry: Entry[Any], draw: Draw) -> None:
    A, _ = start(entry, draw).factors()
    gram = A.double() @ A.double().T
    assert (gram - gram.diagonal().diag()).abs().max() <= 1e-5 * gram.diagonal().max()


@law(adapter_init, "best_rank", broken=starts_with_ones, supplied={"rank"})
def best_rank(entry: Entry[Any], draw: Draw) -> None:
    drawn = start(entry, draw, chosen=default_knobs(entry))
    A, B = drawn.factors()
    target = drawn.target().double().numpy()
    U, S, Vh = np.linalg.svd(target, full_matrices=False)
    best = (U[:, : len(A)] * S[: len(A)]) @ Vh[: len(A)]
    found = drawn.given.get("scaling", 1.0) * (B.double() @ A.double()).numpy()
    # Another matrix of this rank may be as close where singular values are equal.
    assert np.linalg.norm(target - found) <= np.linalg.norm(target - best) + 1e-4 * S[0]
    assert np.linalg.matrix_rank(found, tol=1e-4 * S[0]) <= len(A)


@law(adapter_init, "factors fit the weight and are finite", broken=swaps, supplied={"rank"})
def fits(entry: Entry[Any], draw: Draw) -> None:
    drawn = start(entry, draw)
    A, B = drawn.factors()
    out, width = drawn.data["weight"].shape
    assert (A.shape, B.shape) == ((drawn.given["rank"], width), (out, drawn.given["rank"]))
    assert A.dtype == B.dtype == torch.float32 and A.isfinite().all() and B.isfinite().all()


@law(adapter_init, "results repeat, inputs are left alone", broken=draws_globally, supplied={"rank"})
def repeats(entry: Entry[Any], draw: Draw) -> None:
    drawn = start(entry, draw)
    before = {name: value.clone() for name, value in drawn.data.items()}
    state = torch.get_rng_state()
    first, second = drawn.factors(), drawn.factors()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(value, drawn.data[name]) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)


@law(
    adapter_init,
    "one of shapes alone does not look at weights",
    broken=reads_values,
    supplied={"rank"},
    shape_only=True,
)
def shapes_alone(entry: Entry[Any], draw: Draw) -> None:
    drawn = start(entry, draw)
    if entry.facts.shape_only:
        other = drawn.factors(weight=torch.full_like(drawn.data["weight"], torch.nan))
        assert all(torch.equal(a, b) for a, b in zip(drawn.factors(), other))
