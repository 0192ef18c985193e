"""Compiled passes give the bits of the torch path: every method, dtype and number of experts, and borders of blocks."""

from __future__ import annotations

import subprocess
import sys
from itertools import cycle, product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modicum.random import generator
from modicum.weights import methods
from modicum.weights.kernels import fused, selection
from modicum.weights.kernels.draws import LEVELS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ELECTIONS = [{"elect": elect, "normalize": normalize} for elect in ("none", "ties") for normalize in (True, False)]
KNOBS = {
    "linear": [{}, {"weights": True}],
    "task_arithmetic": [{"scale": 0.7}, {"weights": True}],
    "ties": [{"density": d, "normalize": z, "scale": 1.3} for d, z in product((0.2, 0.7, 1.0), (True, False))]
    + [{"density": 0.4, "weights": True}],
    "breadcrumbs": [{"density": d, "gamma": g, **e} for (d, g), e in product(((0.5, 0.1), (0.9, 0.3)), ELECTIONS)],
    "dare": [
        {"density": d, "rescale": r, **e}
        for d, r, e in product((0.37, 0.5), ("expectation", "l1", "none"), ELECTIONS)
    ]
    + [{"density": 1.0}, {"density": 0.6, "weights": True}],
    "della": [{"density": 0.5, "rescale": r, **e} for r, e in product(("probability", "l1", "none"), ELECTIONS[1:3])],
    "sce": [{"select": s} for s in (1.0, 0.6, 0.1)],
    "model_stock": [{}],
    "consensus": [{}],
}  # fmt: skip
CASES = [(name, knobs) for name, several in KNOBS.items() for knobs in several]
WEIGHTS = [0.5, -0.3, 1.5, 0.25, 2.0]


@pytest.fixture
def both(monkeypatch):
    """Merge on the torch path, then on the compiled one."""
    pytest.importorskip("numba")
    monkeypatch.setattr(selection, "SMALL", 8)

    def run(method, knobs, base, experts):
        given = {**knobs, "weights": WEIGHTS[: len(experts)]} if knobs.get("weights") else knobs
        results = []
        for least in (1 << 60, 0):
            monkeypatch.setattr(fused, "LEAST", least)
            drawn = {"generator": generator(0, "x")} if method in ("dare", "della") else {}
            with np.errstate(all="ignore"):
                results.append(getattr(methods, method)(base, experts, **given, **drawn))
        return results

    return run


def bits(tensor):
    """The bit patterns; one for all NaN, whose signs and payloads mean nothing."""
    words = tensor.reshape(-1).view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])
    return torch.where(tensor.reshape(-1).isnan(), -1, words)


def models(n, size, kind, dtypes=(BF16, BF16), seed=0):
    rng = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(size, generator=rng)
    experts = [base + 0.002 * torch.randn(size, generator=rng) for _ in range(n)]
    if kind == "equal magnitudes":
        base = (50 * base).round()
        experts = [base + torch.randint(-2, 3, (size,), generator=rng) for _ in range(n)]
    if kind == "zeros":
        signed = [torch.where(torch.rand(size, generator=rng) < 0.4, 0.0, t) for t in (base, *experts)]
        base, *experts = (torch.where(torch.rand(size, generator=rng) < 0.5, -t, t) for t in signed)
    factor = {"tiny": 1e-6, "subnormal": 1e-37, "huge": 1e6}.get(kind, 1.0)
    return (factor * base).to(dtypes[0]), [(factor * expert).to(dtypes[1]) for expert in experts]


@pytest.mark.parametrize("kind", ["plain", "equal magnitudes", "zeros", "tiny", "subnormal", "huge"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F32, F32), (F32, BF16)], ids=str)
def test_the_bits_are_those_of_the_torch_path(both, kind, dtypes):
    for (i, (method, knobs)), n, size in zip(
        enumerate(CASES), cycle((3, 2, 5)), cycle((5003, 2048, 1, 2049, 7, 6144, 3000))
    ):
        base, experts = models(n, size, kind, dtypes, seed=i)
        if size % 4 == 0:
            base, experts = base.view(4, -1), [expert.view(4, -1) for expert in experts]
        expected, found = both(method, knobs, base, experts)
        assert torch.equal(bits(expected), bits(found)), (method, knobs, n, size)


@pytest.mark.parametrize("method", ["ties", "dare", "breadcrumbs", "della", "sce"])
def test_blocks_meet_without_a_seam(both, method):
    base, experts = models(3, (1 << 17) + 77, "equal magnitudes")
    expected, found = both(method, KNOBS[method][-1], base, experts)
    assert torch.equal(bits(expected), bits(found))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_come_out_as_on_the_torch_path(both, bad):
    base, experts = models(3, 100, "plain")
    experts[1][40] = bad
    for method, knobs in CASES:
        if method not in ("della", "sce", "model_stock"):
            expected, found = both(method, knobs, base, experts)
            assert torch.equal(bits(expected), bits(found)), (method, knobs)


@given(st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=1, max_size=30), st.sampled_from([BF16, F16]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_two_bytes_are_a_number_that_is_read_and_judged_alike(monkeypatch, patterns, dtype):
    pytest.importorskip("numba")
    tensor = torch.tensor(patterns, dtype=torch.int16).view(dtype)
    monkeypatch.setattr(fused, "LEAST", 0)
    assert fused.is_finite(tensor) == bool(tensor.isfinite().all())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_number_of_two_bytes_is_read_and_rounded_exactly(monkeypatch, dtype):
    pytest.importorskip("numba")
    monkeypatch.setattr(fused, "LEAST", 0)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    zero, out = torch.zeros(LEVELS, dtype=F32), torch.empty(LEVELS, dtype=F32)
    fused.fold(zero, [every], fused.Parts(torch.ones(1)), out, share=1.0, sizes=[])
    assert torch.equal(bits(out), bits(every.float() + 0.0))
    # Numbers between two of them, at the middle and beside it, and beyond the largest.
    steps = (0.0, 0.25, 0.5, 0.75)
    wide = torch.cat([every.float().view(torch.int32) + round(s * (1 << (16 if dtype == BF16 else 13))) for s in steps])
    numbers, narrow = wide.view(F32), torch.empty(len(wide), dtype=dtype)
    fused.fold(torch.zeros_like(numbers), [numbers], fused.Parts(torch.ones(1)), narrow, share=1.0, sizes=[])
    assert torch.equal(bits(narrow), bits((numbers + 0.0).to(dtype)))


def test_small_tensors_and_other_kinds_do_not_import_the_compiler():
    code = (
        "import sys, torch; from modicum.weights.methods.ties import ties; from modicum.weights.kernels import fused\n"
        "w = torch.zeros(fused.LEAST // 2)\n"
        "ties(w, [w, w], density=0.5); ties(w.double().repeat(4), 2 * [w.double().repeat(4)], density=0.5)\n"
        "print('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("size", [1, 2047, 2048, 70_001])
def test_inner_products_keep_the_differences(dtype, size):
    """Checkpoints that share almost all of their weights: the products of what they differ by are exact to float32."""
    pytest.importorskip("numba")
    rng = torch.Generator().manual_seed(size)
    base = (0.05 * torch.randn(size, generator=rng)).to(dtype)
    others = [(base + 1e-3 * torch.randn(size, generator=rng)).to(dtype) for _ in range(4)]
    gradient = torch.randn(size, generator=rng)
    exact = [gradient.double() @ (other.double() - base.double()) for other in others] + [
        gradient.double() @ base.double()
    ]
    terms = [gradient.double().abs() @ (o.double() - base.double()).abs() for o in others]
    found = fused.products(base, others, gradient)
    for t, (value, true) in enumerate(zip(found.tolist(), exact)):
        assert abs(value - true) <= 1e-6 * (terms[t] if t < 4 else gradient.double().abs() @ base.double().abs())


def test_what_processes_will_need_is_imported_before_they_are_forked():
    pytest.importorskip("numba")
    code = (
        "import sys; from modicum.weights.kernels import fused\n"
        "fused.prepare(fused.LEAST - 1); print('numba' in sys.modules)\n"
        "fused.prepare(fused.LEAST); print('modicum.weights.kernels.compiled' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert told == ["False", "True"]
