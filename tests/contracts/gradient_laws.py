"""Laws of gradient rules, watched on a run of AdamW: what came to the rule in each step, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from laws import Draw, knobs, law
from torch import Tensor, nn

from modicum.optim.gradient.make import make_clipper
from modicum.registry import Entry, gradient_rule

SHAPES: list[tuple[int, ...]] = [(), (1,), (5,), (3, 4), (2, 3, 2)]
STEPS = 6


@dataclass
class Seen:
    """What passed in a step, tensor by tensor: gradients that came and went on, updates planned and made."""

    gradient: dict[str, Tensor] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)
    planned: dict[str, Tensor] = field(default_factory=dict)
    update: dict[str, Tensor] = field(default_factory=dict)

    def outcome(self, name: str) -> tuple[Tensor, Tensor]:
        return self.clipped[name], self.update[name]


@dataclass(frozen=True)
class Run:
    """Weights, and their gradients in each step; the first two steps are quiet, then some leap."""

    weights: dict[str, Tensor]
    series: list[dict[str, Tensor]]

    def only(self, names: Sequence[str]) -> Run:
        return Run({n: self.weights[n] for n in names}, [{n: step[n] for n in names} for step in self.series])

    def times(self, factor: float) -> Run:
        return Run(self.weights, [{n: factor * g for n, g in step.items()} for step in self.series])

    def watch(self, entry: Entry[Any], values: dict[str, Any], *, resume_at: int | None = None) -> list[Seen]:
        """Return what the rule did; ``resume_at`` saves, builds and loads everything before that step."""
        seen, state = [], None
        weights = {name: weight.clone() for name, weight in self.weights.items()}
        for start, end in [(0, resume_at), (resume_at, None)] if resume_at else [(0, None)]:
            part = _Watched(entry, weights, values, state)
            seen += [part.step(gradients) for gradients in self.series[start:end]]
            state, weights = part.state(), {name: p.detach().clone() for name, p in part.params.items()}
        return seen


class _Watched:
    """AdamW with the rule attached, and hooks before and after it."""

    def __init__(self, entry: Entry[Any], weights: dict[str, Tensor], values: dict[str, Any], state: Any) -> None:
        self.params = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.05, weight_decay=0.1)
        self.seen = Seen()
        self.before = weights
        self.optimizer.register_step_pre_hook(lambda *_: self._keep(self.seen.gradient))
        self.optimizer.register_step_post_hook(lambda *_: self._moved(self.seen.planned))
        self.rule = make_clipper(entry.name, self.params.items(), **values).attach(self.optimizer)
        self.optimizer.register_step_pre_hook(lambda *_: self._keep(self.seen.clipped))
        if state:
            self.optimizer.load_state_dict(state[0])
            self.rule.load_state_dict(state[1])

    def step(self, gradients: dict[str, Tensor]) -> Seen:
        self.seen, self.before = Seen(), {name: p.detach().clone() for name, p in self.params.items()}
        for name, param in self.params.items():
            param.grad = gradients[name].clone()
        self.optimizer.step()
        self._moved(self.seen.update)
        return self.seen

    def state(self) -> Any:
        return self.optimizer.state_dict(), self.rule.state_dict()

    def _keep(self, into: dict[str, Tensor]) -> None:
        into.update({name: p.grad.clone() for name, p in self.params.items() if p.grad is not None})

    def _moved(self, into: dict[str, Tensor]) -> None:
        into.update({name: p.detach() - self.before[name] for name, p in self.params.items()})


def run(draw: Draw) -> Run:
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=4))
    zero = draw(st.booleans())
    weights = {f"w{i}": torch.randn(shape, generator=rng) for i, shape in enumerate(shapes)}
    series = []
    for step in range(STEPS):
        leap = 10.0 ** draw(st.integers(-2, 2)) if step > 1 else 1.0
        series.append({name: leap * torch.randn(w.shape, generator=rng) for name, w in weights.items()})
        if zero and step % 2:
            series[-1]["w0"].zero_()
    return Run(weights, series)


def quick(entry: Entry[Any], draw: Draw, **fixed: Any) -> dict[str, Any]:
    """Draw knobs with which a rule has something to do within a few steps."""
    for name, values in {
        "warmup": [1, 2],
        "quiet": [0, 1],
        "minimum": [2, 3],
        "window": [3, 4],
        "steps": [6, 20],
    }.items():
        if name in entry.parameters[1]:
            fixed.setdefault(name, draw(st.sampled_from(values)))
    return knobs(entry, draw, **fixed)


def same(found: Sequence[Seen], expected: Sequence[Seen], names: Sequence[str], *, times: float = 1.0) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in names:
            for a, b in zip(one.outcome(name), other.outcome(name)):
                torch.testing.assert_close(a, times * b, rtol=2e-4, atol=1e-6 * times)


def doubles(norms: Tensor, state: None) -> tuple[Tensor, None]:
    return torch.full_like(norms, 2.0), state


def by_total(norms: Tensor, state: None) -> tuple[Tensor, None]:
    return torch.ones_like(norms) / (1 + norms.norm()), state


def first_alone(norms: Tensor, state: None) -> tuple[Tensor, None]:
    return (torch.arange(len(norms)) == 0).to(norms), state


def to_nan(norms: Tensor, state: None) -> tuple[Tensor, None]:
    return norms / norms, state


_calls = []


def counts_calls(norms: Tensor, state: None) -> tuple[Tensor, None]:
    """Remember outside the state."""
    _calls.append(1)
    return torch.full_like(norms, 1 / len(_calls)), state


@law(gradient_rule, "factor_at_most_one", broken=doubles)
def factor_at_most_one(entry: Entry[Any], draw: Draw) -> None:
    for step in run(draw).watch(entry, quick(entry, draw)):
        for came, went in ((step.gradient, step.clipped), (step.planned, step.update)):
            for name in came:
                assert (went[name].abs() <= came[name].abs() * (1 + 1e-5) + 1e-6).all()


@law(gradient_rule, "local", broken=by_total)
def local(entry: Entry[Any], draw: Draw) -> None:
    drawn, values = run(draw), quick(entry, draw, warmup=0, granularity="tensor")
    same(drawn.only(["w0"]).watch(entry, values), drawn.watch(entry, values), ["w0"])


@law(gradient_rule, "permutation", broken=first_alone)
def permutation(entry: Entry[Any], draw: Draw) -> None:
    drawn, values = run(draw), quick(entry, draw)
    names = list(drawn.weights)
    same(drawn.only(names[::-1]).watch(entry, values), drawn.watch(entry, values), names)


@law(gradient_rule, "scale", broken=by_total)
def scale(entry: Entry[Any], draw: Draw) -> None:
    drawn, values = run(draw), quick(entry, draw, warmup=0, eps=1e-8)
    for one, other in zip(drawn.times(64.0).watch(entry, values), drawn.watch(entry, values)):
        for name in drawn.weights:
            torch.testing.assert_close(one.clipped[name], 64 * other.clipped[name], rtol=1e-3, atol=1e-3)


@law(gradient_rule, "what is finite stays finite, and zero stays zero", broken=to_nan)
def finite(entry: Entry[Any], draw: Draw) -> None:
    for step in run(draw).watch(entry, quick(entry, draw)):
        for name, came in step.gradient.items():
            assert step.clipped[name].isfinite().all() and step.update[name].isfinite().all()
            assert step.clipped[name][came == 0].count_nonzero() == 0


@law(gradient_rule, "a run goes on from its state as if it had not stopped", broken=counts_calls)
def resumes(entry: Entry[Any], draw: Draw) -> None:
    drawn, values = run(draw), quick(entry, draw)
    whole = drawn.watch(entry, values)
    again = drawn.watch(entry, values, resume_at=draw(st.integers(1, STEPS - 1)))
    for one, other in zip(whole, again, strict=True):
        for name in drawn.weights:
            assert all(torch.equal(a, b) for a, b in zip(one.outcome(name), other.outcome(name)))
