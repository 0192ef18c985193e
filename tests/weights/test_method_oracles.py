"""Every deterministic method beside its transcription in NumPy, at ordinary sizes and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.random import generator
from modicum.registry import merge_method
from modicum.weights import merge_state_dicts
from modicum.weights.methods.resm import outlier_weights
from modicum.weights.methods.tsv import task_interference
from oracles import merge as oracle
from oracles import merge_matrices

Array: TypeAlias = oracle.Array
Ours: TypeAlias = Callable[[Tensor, list[Tensor]], Tensor]
Theirs: TypeAlias = Callable[[Array, list[Array]], Array]

SHAPES = [(), (1,), (7,), (1, 1), (1, 5), (5, 1), (4, 6), (6, 4), (9, 9), (2, 4, 7)]
DOUBLE, SINGLE = (torch.float64, 1e-10), (torch.float32, 1e-4)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yield what can happen: several experts, two, one, one that changed nothing, none that changed anything."""
    rng = torch.Generator().manual_seed(len(shape) + math.prod(shape))
    base, *experts = (torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for _ in range(4))
    yield "three", base, experts
    yield "two", base, experts[:2]
    yield "one", base, experts[:1]
    yield "one unchanged", base, [experts[0], base.clone(), experts[2]]
    partly = experts[1].clone()
    partly.view(-1)[::2] = experts[0].reshape(-1)[::2]
    yield "partly equal", base, [experts[0], partly]
    yield "all unchanged", base, [base.clone(), base.clone()]


def weights(experts: Sequence[object]) -> list[float]:
    return [1.0, 0.5, 2.0][: len(experts)]


def ours(name: str, **knobs: Any) -> Ours:
    """Call a method as it is, its weights cut to the number of experts."""

    def call(base: Tensor, experts: list[Tensor]) -> Tensor:
        entry = merge_method[name]
        given = {k: v(experts) if callable(v) else v for k, v in knobs.items()}
        return entry.function(None if name in ("karcher", "fisher", "regmean", "linear") else base, experts, **given)

    return call


def matrix(merge: Callable[[list[Array]], Array]) -> Theirs:
    return lambda base, experts: oracle.by_matrix(base, experts, merge)


def room(taus: Sequence[Array]) -> int:
    return max(1, min(taus[0].shape) // len(taus))


def tsv(taus: list[Array], rtol: float = 1e-2, rank: int = 99) -> Array:
    return merge_matrices.tsv_delta(taus, [min(rank, room(taus))] * len(taus), [1.0] * len(taus), rtol)


def resm(taus: list[Array], mode: str, normalize: str = "mean1", reference: float | None = None) -> Array:
    share = np.mean([merge_matrices.dense_share(tau, 0.1, None) for tau in taus])
    rank = min(room(taus), max(1, int(room(taus) * share / reference + 1e-9))) if reference else room(taus)
    found = merge_matrices.outlier_weights(taus, mode, 1.0, (0.5, 2.0), normalize)
    return merge_matrices.tsv_delta(taus, [rank] * len(taus), found, 1e-2)


def spread(experts: Sequence[Any], rounds: int) -> Array:
    w = np.array(weights(experts)) / sum(weights(experts))
    return oracle.spherical_mean(experts, list(w), rounds)


def information(experts: Sequence[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.rand(e.shape, generator=rng, dtype=torch.float64) for e in experts]


def grams(experts: Sequence[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    width = experts[0].shape[-1] if experts[0].ndim else 1
    data = [torch.randn(width + 2, width, generator=rng, dtype=torch.float64) for _ in experts]
    return [x.T @ x for x in data]


def regmean(experts: list[Array]) -> Array:
    if experts[0].ndim != 2:
        return np.mean(np.stack(experts), 0)
    return oracle.regmean(experts, [g.numpy() for g in grams([torch.from_numpy(e) for e in experts])], 0.9)


CASES: dict[str, tuple[Ours, Theirs]] = {
    "linear": (ours("linear", weights=weights), lambda b, e: oracle.linear(e, weights(e))),
    "task_arithmetic": (
        ours("task_arithmetic", scale=0.3, weights=weights),
        lambda b, e: oracle.task_arithmetic(b, e, 0.3, weights(e)),
    ),
    "ties": (
        ours("ties", density=0.4, weights=weights, scale=0.7),
        lambda b, e: oracle.ties(b, e, [0.4] * len(e), 0.7, weights(e)),
    ),
    "breadcrumbs": (
        ours("breadcrumbs", density=0.5, gamma=0.2, scale=0.7, weights=weights),
        lambda b, e: oracle.breadcrumbs(b, e, 0.5, 0.2, scale=0.7, weights=weights(e)),
    ),
    "breadcrumbs, elected": (
        ours("breadcrumbs", density=0.5, gamma=0.2, elect="ties", normalize=True),
        lambda b, e: oracle.breadcrumbs(b, e, 0.5, 0.2, how="ties", normalize=True),
    ),
    "model_stock": (ours("model_stock"), oracle.model_stock),
    "model_stock, unclamped": (ours("model_stock", clamp=False), partial(oracle.model_stock, clamp=False)),
    "model_stock, rows": (ours("model_stock", filter_wise=True), oracle.model_stock_rows),
    "nearswap": (ours("nearswap", t=0.4), lambda b, e: oracle.nearswap(b, e[0], 0.4)),
    "nearswap, still": (ours("nearswap", t=0.0), lambda b, e: b),
    "arcee_fusion": (ours("arcee_fusion"), lambda b, e: oracle.arcee_fusion(b, e[0])),
    "slerp": (ours("slerp", t=0.3), lambda b, e: oracle.slerp(b, e[0], 0.3)),
    "nuslerp": (
        ours("nuslerp", weights=weights),
        lambda b, e: oracle.nuslerp(b, e, weights(e), flatten=True, row_wise=False),
    ),
    "nuslerp, rows": (
        ours("nuslerp", weights=weights, flatten=False, row_wise=True),
        lambda b, e: oracle.nuslerp(b, e, weights(e), flatten=False, row_wise=True),
    ),
    "nuslerp, columns": (
        ours("nuslerp", weights=weights, flatten=False),
        lambda b, e: oracle.nuslerp(b, e, weights(e), flatten=False, row_wise=False),
    ),
    "multislerp": (
        ours("multislerp", weights=weights),
        lambda b, e: b + spread([x - b for x in e], rounds=1),
    ),
    "multislerp, no step": (
        ours("multislerp", weights=weights, steps=0),
        lambda b, e: b + spread([x - b for x in e], rounds=0),
    ),
    "karcher": (
        ours("karcher", weights=weights, iterations=60, tolerance=1e-15),
        lambda b, e: spread(e, rounds=60),
    ),
    "consensus": (ours("consensus", threshold=0.4, scale=0.7), lambda b, e: oracle.consensus(b, e, 0.4, 2, 0.7)),
    "pcb": (ours("pcb", ratio=0.3), lambda b, e: oracle.pcb(b, e, 0.3, 1.2)),
    "emr": (ours("emr"), lambda b, e: oracle.emr(b, e, None)),
    "emr, one": (ours("emr", expert=0), lambda b, e: oracle.emr(b, e, 0)),
    "magmax": (ours("magmax", scale=0.5), lambda b, e: oracle.magmax(b, e, 0.5)),
    "sce": (ours("sce"), lambda b, e: oracle.sce(b, e, 1.0)),
    "sce, selected": (ours("sce", select=0.4), lambda b, e: oracle.sce(b, e, 0.4)),
    "ram": (ours("ram", eps=0.8), lambda b, e: oracle.ram(b, e, 0.8, 0.0, 0.2)),
    "ram, plus": (ours("ram", eps=0.8, r=0.5, alpha=0.9), lambda b, e: oracle.ram(b, e, 0.8, 0.5, 0.9)),
    "fisher": (
        ours("fisher", weights=weights, statistics=information, floor=0.1),
        lambda b, e: oracle.fisher(
            e, [f.numpy() for f in information([torch.from_numpy(x) for x in e])], weights(e), 0.1
        ),
    ),
    "regmean": (ours("regmean", statistics=grams), lambda b, e: regmean(e)),
    "passthrough": (ours("passthrough", scale=0.5), lambda b, e: 0.5 * e[0]),
    "tsv": (ours("tsv"), matrix(tsv)),
    "tsv, svd": (ours("tsv", solver="svd", rank=2), matrix(partial(tsv, rank=2))),
    "resm, mass": (ours("resm", sigmas=1.0), matrix(partial(resm, mode="mass"))),
    "resm, ratio, sparsity": (
        ours("resm", outliers="ratio", sigmas=1.0, reference=1.0),
        matrix(partial(resm, mode="ratio", reference=1.0)),
    ),
    "resm, count, softmax": (
        ours("resm", outliers="count", sigmas=1.0, normalize="softmax"),
        matrix(partial(resm, mode="count", normalize="softmax")),
    ),
    "resm, sum1": (ours("resm", sigmas=1.0, normalize="sum1"), matrix(partial(resm, mode="mass", normalize="sum1"))),
    "iso_c": (ours("iso_c", scale=1.3), matrix(lambda taus: merge_matrices.iso_c_delta(sum(taus), 1.3))),
    "iso_cts": (ours("iso_cts", common=0.5), matrix(lambda taus: merge_matrices.iso_cts_delta(taus, 1.0, 0.5))),
    "iso_cts, nothing in common": (
        ours("iso_cts", common=0.0),
        matrix(lambda taus: merge_matrices.iso_cts_delta(taus, 1.0, 0.0)),
    ),
    "wudi": (ours("wudi", ridge=1e-3), matrix(lambda taus: merge_matrices.wudi_delta(taus, 1e-3))),
    "opcm": (ours("opcm", alpha=0.5, scale=0.7), matrix(lambda taus: merge_matrices.opcm_delta(taus, 0.5, 0.7))),
    "svc": (ours("svc", alpha=0.5, scale=0.7), matrix(lambda taus: merge_matrices.svc_delta(taus, 0.5, 0.7))),
    "knots": (
        ours("knots", density=0.5, scale=0.7),
        matrix(lambda taus: merge_matrices.knots_delta(taus, "ties", 0.5, 0.7, [1.0] * len(taus))),
    ),
}


@pytest.mark.oracle("merge_methods", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [DOUBLE, SINGLE], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_a_method_equals_its_oracle(case: str, dtype: torch.dtype, tolerance: float) -> None:
    method, transcription = CASES[case]
    entry = merge_method[case.partition(",")[0]]
    least, most = entry.facts.experts, 1 if entry.facts.two else entry.facts.most or 99
    compared = 0
    for shape in SHAPES:
        for label, base, experts in inputs(shape, dtype):
            if not least <= len(experts) <= most:
                continue
            expected = transcription(base.double().numpy(), [e.double().numpy() for e in experts])
            found = method(base, experts)
            assert found.dtype == dtype
            np.testing.assert_allclose(
                found.double().numpy(), expected, rtol=tolerance, atol=tolerance, err_msg=f"{label}, {shape}"
            )
            compared += 1
    assert compared >= len(SHAPES)


@pytest.mark.oracle("merge_methods", "dare", "della")
@pytest.mark.parametrize(("dtype", "tolerance"), [DOUBLE, SINGLE], ids=["float64", "float32"])
@pytest.mark.parametrize("elect", ["none", "ties"])
@pytest.mark.parametrize(
    ("method", "rescale"),
    [("dare", "expectation"), ("dare", "l1"), ("dare", "none"), ("della", "probability"), ("della", "l1"),
     ("della", "none")],
)  # fmt: skip
def test_a_random_method_equals_its_oracle_given_its_masks(
    method: str, rescale: str, elect: str, dtype: torch.dtype, tolerance: float
) -> None:
    function = merge_method[method].function
    drop: dict[str, Any] = {"density": 0.5} | ({"epsilon": 0.2} if method == "della" else {})
    if method == "della":
        tolerance = max(tolerance, 4e-5)  # its probabilities are multiples of 1/65536
    for shape in SHAPES:
        for label, base, experts in inputs(shape, dtype):
            taus = [e - base for e in experts]
            # One expert at a time on a base of zero shows its mask; where the delta is zero, the mask has no effect.
            masks = []
            for t, tau in enumerate(taus):
                alone = [tau if u == t else torch.zeros_like(tau) for u in range(len(taus))]
                plain = {"rescale": rescale, "elect": "none", "normalize": False, "generator": generator(5)}
                masks.append((function(torch.zeros_like(base), alone, **drop, **plain) != 0).double().numpy())
            knobs = {"rescale": rescale, "scale": 0.7, "weights": weights(taus), "normalize": elect == "ties"}
            found = function(base, experts, **drop, **knobs, elect=elect, generator=generator(5))
            expected = getattr(oracle, method)(
                base.double().numpy(), [e.double().numpy() for e in experts], masks, **drop, **knobs, how=elect
            )
            np.testing.assert_allclose(
                found.double().numpy(), expected, rtol=tolerance, atol=tolerance, err_msg=f"{label}, {shape}"
            )


def test_ranks_of_a_model_follow_its_densest_layer() -> None:
    rng = torch.Generator().manual_seed(0)
    base = {name: torch.zeros(12, 16, dtype=torch.float64) for name in ("dense", "sparse")}
    experts = []
    for _ in range(2):
        tensors = {name: torch.randn(12, 16, generator=rng, dtype=torch.float64) for name in base}
        tensors["sparse"] *= torch.rand(12, 16, generator=rng) < 0.5
        experts.append(tensors)
    merged = merge_state_dicts(base, experts, method="resm", sigmas=1.0)
    shares = {
        name: np.mean([merge_matrices.dense_share(e[name].float().numpy(), 0.1, None) for e in experts])
        for name in base
    }
    assert shares["sparse"] < 0.7 * shares["dense"]
    for name in base:
        taus = [e[name].numpy() for e in experts]
        expected = resm(taus, "mass", reference=max(shares.values()))
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["mass", "ratio", "count"])
@pytest.mark.parametrize("bounds", [None, (0.5, 2.0)])
@pytest.mark.parametrize("normalize", ["mean1", "sum1", "softmax"])
def test_outlier_weights_equal_the_oracle(mode: Any, bounds: tuple[float, float] | None, normalize: str) -> None:
    for shape in [(1, 1), (6, 9), (1, 30)]:
        for _, base, experts in inputs(shape, torch.float64):
            taus = [e - base for e in experts]
            found = outlier_weights(taus, mode=mode, alpha=1.5, clip=bounds, normalize=normalize)
            expected = merge_matrices.outlier_weights([t.numpy() for t in taus], mode, 1.5, bounds, normalize)
            np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3])
def test_interference_equals_the_oracle(rank: int) -> None:
    for _, base, experts in inputs((9, 14), torch.float64):
        taus = [e - base for e in experts if not torch.equal(e, base)]
        if taus:
            expected = merge_matrices.interference([t.numpy() for t in taus], rank)
            assert task_interference(taus, rank=rank) == pytest.approx(expected, rel=1e-9, abs=1e-9)
