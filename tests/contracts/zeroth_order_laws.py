"""Laws of zeroth-order optimisers, on a quadratic with matrices of one shape, a vector and a number."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import torch
from hypothesis import strategies as st
from laws import Draw, default_knobs, knobs, law
from torch import Tensor, nn

from modicum.registry import Entry, zeroth_order

SHAPES = {"up": (4, 3), "down": (4, 3), "bias": (5,), "gain": (5,), "gate": ()}


class Bowl(nn.Module):
    """Half the squared distance to a point, counted by how often it was asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(1 + torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)))
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self) -> Tensor:
        self.seen.append(self.weights())
        return torch.stack([p.detach().double().square().sum() / 2 for p in self.parameters()]).sum()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def train(
    entry: Entry[Any], values: dict[str, Any], steps: int, dtype: torch.dtype = torch.float32
) -> tuple[Bowl, Any]:
    bowl = Bowl(dtype)
    optimizer = entry.function(list(bowl.named_parameters()), **values)
    for _ in range(steps):
        optimizer.step(bowl)
    return bowl, optimizer


def settled(bowl: Bowl, optimizer: Any) -> dict[str, Tensor]:
    if hasattr(optimizer, "settle_"):
        optimizer.settle_()
    return bowl.weights()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in expected.items())


def usual(entry: Entry[Any], draw: Draw, **fixed: Any) -> dict[str, Any]:
    """Draw knobs; engines that need hooks in a model have tests of their own."""
    given = {"engine": "mutate", "eps": 1e-3, "weight_decay": 0.0, "parallel": "data", "vectors": "dense"} | fixed
    given |= {"include": None, "exclude": (), "seed": 0}
    return knobs(entry, draw, **{name: value for name, value in given.items() if name in entry.parameters[1]} | fixed)


class NeverMoves(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


class Drifts(NeverMoves):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.data += 1e-3
        return closure()


class DrawsGlobally(NeverMoves):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.data += torch.randn(param.shape)
        return closure()


class OneDirection(NeverMoves):
    """Draws from one seed for every tensor, and counts where no state sees it."""

    calls = 0

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            for number, param in enumerate(group["params"]):
                param.data += torch.randn(param.shape, generator=torch.Generator().manual_seed(self.calls))
                param.data += number * (self.calls > 1)
        return closure()


@law(
    zeroth_order,
    "with a learning rate every tensor moves, and the loss falls",
    broken=NeverMoves,
    examples=8,
)
def learns(entry: Entry[Any], draw: Draw) -> None:
    # Numbers keep their defaults: an angle or a memory at the end of its range may stand still.
    variants = {
        name: draw(st.sampled_from(get_args(field.annotation)))
        for name, field in entry.schema.model_fields.items()
        if get_origin(field.annotation) is Literal
    }
    values = default_knobs(entry, **variants | {"lr": 0.0, "engine": "mutate", "parallel": "data", "vectors": "dense"})
    start = Bowl()
    for lr in (1e-1, 1e-2, 1e-3):
        bowl, optimizer = train(entry, values | {"lr": lr}, 40)
        now = settled(bowl, optimizer)
        if bowl() < 0.97 * start():
            assert not any(torch.equal(now[name], before) for name, before in start.weights().items())
            return
    raise AssertionError(f"no learning rate lowers the loss: {values}")


@law(zeroth_order, "without a learning rate the weights come back", broken=Drifts)
def comes_back(entry: Entry[Any], draw: Draw) -> None:
    values = usual(entry, draw, lr=0.0)
    bowl, optimizer = train(entry, values, 4)
    for name, value in settled(bowl, optimizer).items():
        # Steps of 1e-3 there and back leave their rounding.
        torch.testing.assert_close(value, Bowl().weights()[name], rtol=0, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):  # where it would add up to something
        assert same(settled(*train(entry, values, 8, dtype)), Bowl(dtype).weights())


@law(zeroth_order, "one seed gives the same bytes, another others", broken=DrawsGlobally)
def repeats(entry: Entry[Any], draw: Draw) -> None:
    values, state = usual(entry, draw, lr=1e-2), torch.get_rng_state()
    first = settled(*train(entry, values, 3))
    assert same(first, settled(*train(entry, values, 3)))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, settled(*train(entry, values | {"seed": 1}, 3)))


@law(zeroth_order, "tensors of one shape move in different directions", broken=OneDirection)
def own_directions(entry: Entry[Any], draw: Draw) -> None:
    bowl, _ = train(entry, usual(entry, draw, lr=0.0), 2)
    start = Bowl().weights()
    for seen in bowl.seen:
        moved = {name: value - start[name] for name, value in seen.items()}
        for one, other in (("up", "down"), ("bias", "gain")):
            a, b = moved[one].flatten(), moved[other].flatten()
            if a.abs().max() > 1e-5 and b.abs().max() > 1e-5:
                assert abs(torch.cosine_similarity(a, b, dim=0)) < 0.9999, (one, other)


@law(zeroth_order, "a run goes on from its state as if it had not stopped", broken=OneDirection)
def resumes(entry: Entry[Any], draw: Draw) -> None:
    values = usual(entry, draw, lr=1e-2, passes=3)
    if values.get("rank") == "auto":  # ranks follow the weights of the moment at which an optimiser is built
        values["rank"] = 2
    whole = settled(*train(entry, values, 5))
    bowl, optimizer = train(entry, values, 2)
    state = optimizer.state_dict()
    fresh = entry.function(list(bowl.named_parameters()), **values)
    fresh.load_state_dict(state)
    for _ in range(3):
        fresh.step(bowl)
    assert same(settled(bowl, fresh), whole)
