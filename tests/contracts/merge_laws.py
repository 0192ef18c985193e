"""Laws of merge methods, over shapes, dtypes, numbers of experts and knobs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from laws import CLOSE, Draw, default_knobs, knobs, law
from torch import Tensor

from modicum.random import generator
from modicum.registry import SUPPLIED, Entry, merge_method
from support import checked

SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (1, 5), (5, 1), (6, 4), (4, 6), (2, 3, 4)]
WIDE = (torch.float64, torch.float32)
ALL = (*WIDE, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Models to merge, and how."""

    entry: Entry[Any]
    base: Tensor | None
    experts: list[Tensor]
    knobs: dict[str, Any]
    statistics: list[Tensor] | None

    @property
    def like(self) -> Tensor:
        return self.experts[0] if self.base is None else self.base

    def merged(self, **changes: Any) -> Tensor:
        """Merge, the method being held to its annotations."""
        case, function = replace(self, **changes), self.entry.function
        supplied: dict[str, Any] = {} if case.statistics is None else {"statistics": case.statistics}
        supplied |= {draws: generator(0, "laws") for draws in SUPPLIED & inspect.signature(function).parameters.keys()}
        result: Tensor = checked(function)(case.base, case.experts, **case.knobs, **supplied)
        return result

    def close(self, found: Tensor, expected: Tensor, *, times: float = 1.0) -> None:
        tolerance = times * CLOSE[expected.dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def case(
    entry: Entry[Any],
    draw: Draw,
    *,
    dtypes: Sequence[torch.dtype] = ALL,
    base: bool = True,
    chosen: dict[str, Any] | None = None,
) -> Case:
    """Draw models, some of whose deltas are zero here and there or everywhere, and knobs unless they are chosen."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(dtypes))
    with_base = entry.facts.base or (base and draw(st.booleans()))
    two, most = entry.facts.two, entry.facts.most or 4
    n = (1 if with_base else 2) if two else draw(st.integers(max(1, entry.facts.experts), most))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    start, *deltas = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(n + 1))
    kept = draw(st.sampled_from([1.0, 1.0, 0.5]))
    if kept < 1:
        deltas = [delta * (torch.rand(shape, generator=rng) < kept) for delta in deltas]
    if n > 1 and draw(st.booleans()):
        deltas[draw(st.integers(0, n - 1))].zero_()
    statistics = [_statistics(entry, start, rng) for _ in deltas] if entry.facts.statistics else None
    values = knobs(entry, draw, clamp=True) if chosen is None else chosen  # unclamped, model_stock has a pole
    return Case(entry, start if with_base else None, [start + delta for delta in deltas], values, statistics)


def _statistics(entry: Entry[Any], like: Tensor, rng: torch.Generator) -> Tensor:
    if entry.facts.measure != "gram":
        return torch.rand(like.shape, generator=rng) + 0.1
    width = like.shape[-1] if like.ndim else 1
    inputs = torch.randn(width + 2, width, generator=rng)
    return inputs.T @ inputs


def first_expert_only(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return experts[0].clone()


def base_and_one(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return base + 1


def squares(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return base + sum((expert - base) ** 2 for expert in experts)


def from_the_base(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return base * base + sum(expert - base for expert in experts)


def adds_the_base_in_bfloat16(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return base + experts[0].bfloat16()


def in_place(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return experts[0].add_(1)


def draws_globally(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return base + torch.rand(())


def by_memory(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    flat = torch.as_strided(experts[0], (experts[0].numel(),), (1,))
    return base + flat.reshape(base.shape)


def sorts_rows(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return experts[0].sort(-1).values if base.ndim else experts[0].clone()


@law(merge_method, "zero_delta", broken=base_and_one)
def zero_delta(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw)
    drawn.close(drawn.merged(experts=[drawn.like] * len(drawn.experts)), drawn.like)


@law(merge_method, "copies", broken=squares)
def copies(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw, chosen=default_knobs(entry, density=1.0))
    drawn.close(drawn.merged(experts=[drawn.experts[0]] * len(drawn.experts)), drawn.experts[0])


@law(merge_method, "permutation", broken=first_expert_only)
def permutation(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw)
    order = draw(st.permutations(range(len(drawn.experts))))
    if "weights" in drawn.knobs and draw(st.booleans()):
        drawn.knobs["weights"] = [1.0 + t / 2 for t in range(len(order))]
    moved = {name: [value[t] for t in order] if isinstance(value, list) else value
             for name, value in drawn.knobs.items()}  # fmt: skip
    statistics = drawn.statistics and [drawn.statistics[t] for t in order]
    found = drawn.merged(experts=[drawn.experts[t] for t in order], knobs=moved, statistics=statistics)
    drawn.close(found, drawn.merged())


def largest(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return torch.stack([expert.nan_to_num() for expert in experts]).amax(0)


@law(merge_method, "propagates", broken=largest)
def propagates(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw)
    for name in {"weights", "scale"} & drawn.knobs.keys():
        value = drawn.knobs[name]
        drawn.knobs[name] = [w or 1.0 for w in value] if isinstance(value, list) else 1.0 if value == 0 else value
    models = [tensor.clone() for tensor in ([] if drawn.base is None else [drawn.base]) + drawn.experts]
    first = int(drawn.base is not None and not entry.facts.base)  # such a base gives its dtype alone
    spoiled = models[draw(st.integers(first, len(models) - 1))].view(-1)
    spoiled[draw(st.integers(0, len(spoiled) - 1))] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    base, experts = (None, models) if drawn.base is None else (models[0], models[1:])
    assert not drawn.merged(base=base, experts=experts).isfinite().all()


@law(merge_method, "scale", broken=squares)
def scale(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw, dtypes=WIDE)
    assert drawn.base is not None
    factor = draw(st.sampled_from([0.5, 2.0, 4.0]))
    grown = [drawn.base + factor * (expert - drawn.base) for expert in drawn.experts]
    delta = drawn.merged() - drawn.base
    drawn.close(drawn.merged(experts=grown) - drawn.base, factor * delta, times=4)
    if "scale" in drawn.knobs and not (entry.facts.matrix and drawn.base.ndim < 2):  # these get the mean of the deltas
        larger = drawn.knobs | {"scale": factor * drawn.knobs["scale"]}
        drawn.close(drawn.merged(knobs=larger) - drawn.base, factor * delta, times=4)


@law(merge_method, "shift", broken=from_the_base)
def shift(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw, dtypes=WIDE)
    assert drawn.base is not None
    added = torch.randn(drawn.base.shape, generator=generator(0, "shift"), dtype=torch.float64).to(drawn.base.dtype)
    moved = [expert + added for expert in drawn.experts]
    # What equals the base must do so after rounding too.
    moved = [torch.where(e == drawn.base, drawn.base + added, m) for e, m in zip(drawn.experts, moved)]
    drawn.close(drawn.merged(base=drawn.base + added, experts=moved), drawn.merged() + added, times=4)


@law(merge_method, "transpose", broken=sorts_rows)
def transpose(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw, dtypes=WIDE)
    if drawn.like.ndim >= 2:
        axis = {"axis": {"row": "column", "column": "row"}.get(drawn.knobs.get("axis", ""), "matrix")}
        turned = drawn.merged(base=drawn.base.mT if drawn.base is not None else None,
                              experts=[expert.mT for expert in drawn.experts],
                              knobs=drawn.knobs | (axis if "axis" in drawn.knobs else {}))  # fmt: skip
        drawn.close(turned, drawn.merged().mT)


def next_to(entry: Entry[Any], draw: Draw) -> list[Tensor]:
    """Draw deltas next to each other's opposites or copies, next to nothing, or far larger than others."""
    facts = entry.facts
    n = 2 if facts.two else draw(st.integers(max(1, facts.experts), facts.most or 4))
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(WIDE))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    first, *others = (torch.randn(shape, generator=rng, dtype=dtype) for _ in range(n))
    if draw(st.booleans()):
        first *= 10 ** (8 * torch.randn(shape, generator=rng, dtype=dtype)).clamp_max(9)
    near = [first]
    for other in others:
        size = draw(st.sampled_from([-1.0, -0.7, -1.0, 0.0, 1.0, 1e-18, -1e-9, 1e9]))
        noise = draw(st.sampled_from([0.0, 1e-8, 1e-6, 3e-4, 1e-2, 0.05, 1.0]))
        near.append(size * (first + noise * other))
    return [near[i] for i in draw(st.permutations(range(n)))]


def magnifies(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    return base + 1e3 * sum(expert - base for expert in experts)


@law(merge_method, "bounded", broken=magnifies, examples=40)
def bounded(entry: Entry[Any], draw: Draw) -> None:
    deltas = next_to(entry, draw)
    at = draw(st.sampled_from([0.0, 0.0, 1.0]))  # at a base of zero nothing is lost to its size
    start = at * torch.randn(deltas[0].shape, generator=generator(0, "bounded"), dtype=torch.float64).to(
        deltas[0].dtype
    )
    fields = entry.schema.model_fields
    fixed = {"scale": 1.0, "weights": None, "r": 0.0}  # factors that the user chooses
    fixed |= {name: fields[name].default for name in ("alpha", "epsilon", "tolerance") if name in fields}
    values = knobs(entry, draw, **fixed)
    base = start if entry.facts.base else None
    rng = torch.Generator().manual_seed(0)
    statistics = [_statistics(entry, start, rng) for _ in deltas] if entry.facts.statistics else None
    drawn = Case(entry, base, [start + delta for delta in deltas], values, statistics)
    merged = drawn.merged().double()
    origin = torch.zeros_like(merged) if base is None else base.double()
    most = entry.facts.bound / (values.get("density", 1.0) - values.get("epsilon", 0.0))
    for p in (1, 2):
        length = float((merged - origin).norm(p))
        together = sum(float((expert.double() - origin).norm(p)) for expert in drawn.experts)
        rounding = 1e-5 * (together + float(origin.norm(p)))
        if length <= most * together * 1.001 + rounding:
            return
    raise AssertionError(f"{length} is more than {most} times {together}")


# The solution of least squares may be as long as the root of its system's condition, which the ridge bounds.
UNBOUNDED = {"wudi", "regmean"}


@law(
    merge_method,
    "all but least squares is bounded",
    broken=magnifies,
    examples=1,
)
def is_bounded(entry: Entry[Any], draw: Draw) -> None:
    stated, listed = "bounded" in entry.laws, entry.name in UNBOUNDED
    assert stated != listed, "State the law `bounded`, or list the method in UNBOUNDED with the reason."


@law(merge_method, "shape and dtype are the base's, all is finite", broken=adds_the_base_in_bfloat16, examples=24)
def fits(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw)
    merged = drawn.merged()
    assert (merged.shape, merged.dtype) == (drawn.like.shape, drawn.like.dtype)
    assert torch.isfinite(merged).all()


@law(merge_method, "models that are all equal are that model", broken=base_and_one)
def all_equal(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw, chosen=default_knobs(entry))
    same = drawn.like * draw(st.sampled_from([0.0, 1.0]))
    base = None if drawn.base is None else same
    found = drawn.merged(base=base, experts=[same.clone() for _ in drawn.experts])
    torch.testing.assert_close(found, same, rtol=1e-6, atol=1e-6 if same.any() else 0)


@law(merge_method, "inputs are left alone and results repeat", broken=in_place)
def leaves_alone(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw)
    models = [*drawn.experts, *([] if drawn.base is None else [drawn.base]), *(drawn.statistics or [])]
    before = [model.clone() for model in models]
    first, second = drawn.merged(), drawn.merged()
    assert torch.equal(first, second)
    assert all(torch.equal(model, kept) for model, kept in zip(models, before))


@law(merge_method, "global random numbers are not drawn", broken=draws_globally, examples=4)
def no_global_draws(entry: Entry[Any], draw: Draw) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    case(entry, draw).merged()
    assert torch.equal(torch.get_rng_state(), before)


@law(merge_method, "the layout in memory does not matter", broken=by_memory)
def any_layout(entry: Entry[Any], draw: Draw) -> None:
    drawn = case(entry, draw, dtypes=WIDE)
    if drawn.like.ndim >= 2:
        strided = [expert.mT.contiguous().mT for expert in drawn.experts]
        base = None if drawn.base is None else drawn.base.mT.contiguous().mT
        drawn.close(drawn.merged(base=base, experts=strided), drawn.merged())
