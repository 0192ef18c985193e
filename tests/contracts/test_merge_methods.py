"""What every merge method must obey, whatever it computes; the table of methods drives it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.random import generator
from modicum.registry import Entry, merge_method
from support import checked, measured

# Knobs that have no default; everything else runs as a user would first run it.
REQUIRED: Mapping[str, dict[str, Any]] = {
    name: {"density": 0.4} for name in ("ties", "dare", "della", "breadcrumbs")
} | {"slerp": {"t": 0.3}}
NAMES = list(merge_method)


def run(entry: Entry, base: Tensor, experts: list[Tensor], **more: Any) -> Tensor:
    knobs = entry.knobs(REQUIRED.get(entry.name, {}) | more)
    supplied: dict[str, Any] = {}
    if "rng" in inspect.signature(entry.function).parameters:
        supplied["rng"] = generator(0, "test")
    if entry.facts.statistics:
        found = measured(entry.name, [{"w": expert} for expert in experts])
        supplied["statistics"] = [one.get("w", expert) for one, expert in zip(found, experts)]
    return checked(entry.function)(base, experts, **knobs, **supplied)


def experts_for(entry: Entry, shape: tuple[int, ...], n: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(7)
    n = 1 if entry.facts.two else min(n, entry.facts.most or n)
    return [torch.randn(shape, generator=rng).to(dtype) for _ in range(n)]


def base_for(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=NAMES)
def entry(request: pytest.FixtureRequest) -> Entry:
    return merge_method[request.param]


@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 5), (5, 1), (6, 4), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_the_base_s_and_all_is_finite(
    entry: Entry, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    merged = run(entry, base_for(shape, dtype), experts_for(entry, shape, dtype=dtype))
    assert merged.shape == shape
    assert merged.dtype == dtype
    assert torch.isfinite(merged).all()


def test_inputs_are_left_alone_and_results_repeat(entry: Entry) -> None:
    base, experts = base_for((6, 4)), experts_for(entry, (6, 4))
    before = [t.clone() for t in (base, *experts)]
    first, second = run(entry, base, experts), run(entry, base, experts)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *experts)))


def test_global_random_numbers_are_not_drawn(entry: Entry) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(entry, base_for((6, 4)), experts_for(entry, (6, 4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_layout_in_memory_does_not_matter(entry: Entry) -> None:
    base, experts = base_for((6, 4)), experts_for(entry, (6, 4))
    strided = [t.T.contiguous().T for t in (base, *experts)]
    torch.testing.assert_close(run(entry, strided[0], strided[1:]), run(entry, base, experts))


@pytest.mark.parametrize("shape", [(8,), (6, 4)])
def test_experts_equal_to_the_base_change_nothing(entry: Entry, shape: tuple[int, ...]) -> None:
    base = base_for(shape)
    n = len(experts_for(entry, shape))
    torch.testing.assert_close(run(entry, base, [base.clone() for _ in range(n)]), base, rtol=1e-6, atol=1e-6)


def test_all_zero_tensors_stay_zero(entry: Entry) -> None:
    zero = torch.zeros(5, 4)
    n = len(experts_for(entry, (5, 4)))
    assert torch.equal(run(entry, zero, [zero.clone() for _ in range(n)]), zero)


def test_laws(entry: Entry) -> None:
    base, experts = base_for((6, 9)).double(), [e.double() for e in experts_for(entry, (6, 9))]
    result = run(entry, base, experts)
    close = {"rtol": 1e-7, "atol": 1e-9}
    known = {"permutation", "zero_delta", "scale", "shift", "copies", "transpose"}
    assert set(entry.laws) <= known
    if "permutation" in entry.laws:
        torch.testing.assert_close(run(entry, base, experts[::-1]), result, **close)
    if "scale" in entry.laws:  # the merged delta is proportional to the deltas
        doubled = [base + 2 * (e - base) for e in experts]
        torch.testing.assert_close(run(entry, base, doubled) - base, 2 * (result - base), **close)
    if "shift" in entry.laws:  # only differences matter
        moved = run(entry, base + 3, [e + 3 for e in experts])
        torch.testing.assert_close(moved, result + 3, rtol=1e-6, atol=1e-6)
    if "copies" in entry.laws:  # copies of one expert, all of it kept, are that expert
        more = {"density": 1.0} if "density" in entry.parameters[1] else {}
        torch.testing.assert_close(run(entry, base, [experts[0]] * len(experts), **more), experts[0], **close)
    if "zero_delta" in entry.laws:
        torch.testing.assert_close(run(entry, base, [base] * len(experts)), base, **close)
    if "transpose" in entry.laws:
        torch.testing.assert_close(run(entry, base.T, [e.T for e in experts]), result.T, rtol=1e-6, atol=1e-8)


def test_unknown_knobs_are_refused(entry: Entry) -> None:
    with pytest.raises(RecipeError, match="unknown key 'no_such_knob'"):
        entry.knobs(REQUIRED.get(entry.name, {}) | {"no_such_knob": 1})


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01])
def test_density_outside_its_range_is_refused(entry: Entry, density: float) -> None:
    if "density" not in entry.parameters[1]:
        pytest.skip("has no density")
    with pytest.raises(RecipeError, match="density"):
        entry.knobs({"density": density})


def test_docstrings_say_what_a_user_must_know(entry: Entry) -> None:
    text = inspect.getdoc(entry.function) or ""
    for section in ("Args:", "Returns:", "Example:", "Cost:", "Deviates:", "Reference:", ".. math::"):
        assert section in text, section
    for knob in entry.parameters[1]:
        assert f"    {knob}:" in text, knob
    module = inspect.getmodule(entry.function)
    assert module is not None
    assert len(inspect.getdoc(module) or "") > 60
