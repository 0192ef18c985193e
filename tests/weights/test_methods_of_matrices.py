"""Methods that decompose matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_methods import EXACT, draw, low_rank, to_numpy
from torch import Tensor

from modicum.errors import RecipeError
from modicum.linalg import SVD, inv_sqrt_polar, mixed_svd, truncated_svd
from modicum.registry import merge_method
from modicum.weights import merge_state_dicts
from modicum.weights.kernels.matrices import merge_matrices
from modicum.weights.methods import (
    dare,
    emr,
    fisher,
    iso_c,
    iso_cts,
    karcher,
    knots,
    model_stock,
    opcm,
    regmean,
    resm,
    svc,
    task_arithmetic,
    tsv,
    wudi,
)
from modicum.weights.methods.resm import occupancy, outlier_weights, rank_plan
from modicum.weights.methods.tsv import combine, task_interference
from oracles import merge as oracle


@pytest.mark.parametrize("shape", [(4, 6), (5,), (2, 3, 3)])
def test_what_no_expert_has_changed_is_decomposed_by_none(shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    base.view(-1)[0] = -0.0
    merged = merge_matrices(base, [base.clone(), base.clone()], lambda _: pytest.fail("decomposed"))
    assert torch.equal(merged.view(torch.int16), base.view(torch.int16)) and merged.data_ptr() != base.data_ptr()


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("solver", ["gram", "svd"])
def test_tsv_equals_the_published_procedure(shape: tuple[int, int], solver: str) -> None:
    base, experts = draw(*shape)
    ours = tsv(base, experts, solver=solver, whiten_rtol=0)
    expected = oracle.tsv(*to_numpy(base, experts), rank=min(shape) // 3)
    np.testing.assert_allclose(ours.numpy(), expected, **EXACT)
    single = tsv(base.float(), [e.float() for e in experts], solver=solver, whiten_rtol=0)
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_tsv_of_one_expert_is_that_expert() -> None:
    base, (expert, *_) = draw(5, 8)
    torch.testing.assert_close(tsv(base, [expert]), expert, **EXACT)


def test_tsv_keeps_the_experts_singular_values_and_never_grows() -> None:
    base, experts = draw(9, 14)
    merged = tsv(base, experts, whiten_rtol=1e-9) - base
    kept = torch.cat([torch.linalg.svdvals(e - base)[:3] for e in experts]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(merged)[:9], kept, **EXACT)
    largest = max(float(torch.linalg.matrix_norm(e - base, 2)) for e in experts)
    assert float(torch.linalg.matrix_norm(merged, 2)) <= largest * (1 + 1e-9)


def test_tsv_of_orthogonal_experts_is_their_sum() -> None:
    base = torch.zeros(8, 10, dtype=torch.float64)
    Q, R = (torch.linalg.qr(low_rank(n, n, n, seed)).Q for n, seed in ((8, 1), (10, 2)))
    experts = [Q[:, 2 * t : 2 * t + 2] @ torch.diag(torch.tensor([3.0, 1.0 + t]).double()) @ R[:, 2 * t : 2 * t + 2].T
               for t in range(3)]  # fmt: skip
    torch.testing.assert_close(tsv(base, experts), sum(experts), **EXACT)


@given(st.integers(0, 50))
def test_tsv_moves_with_rotations_transposition_and_scale(seed: int) -> None:
    base = torch.zeros(9, 20, dtype=torch.float64)
    # Of rank 3 exactly, so that no truncation hangs on the gap between two singular values.
    experts = [low_rank(9, 20, 3, 2 * seed + t) for t in range(2)]
    merged = tsv(base, experts, whiten_rtol=1e-9)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(tsv(base.T, [e.T for e in experts], whiten_rtol=1e-9), merged.T, **close)
    torch.testing.assert_close(tsv(base, experts[::-1], whiten_rtol=1e-9), merged, **close)
    torch.testing.assert_close(tsv(base, [3 * e for e in experts], whiten_rtol=1e-9), 3 * merged, **close)
    Q, R = (torch.linalg.qr(low_rank(n, n, n, seed + n)).Q for n in (9, 20))
    torch.testing.assert_close(tsv(base, [Q @ e @ R for e in experts], whiten_rtol=1e-9), Q @ merged @ R, **close)


def test_signs_of_singular_pairs_do_not_matter() -> None:
    _, deltas = draw(9, 20)
    parts = [truncated_svd(delta, 3) for delta in deltas]
    signs = torch.tensor([1.0, -1.0, -1.0]).double()
    flipped = [SVD(part.U * signs, part.S, part.V * signs) for part in parts]
    expected = combine(parts, whiten_rtol=1e-4)
    torch.testing.assert_close(combine(flipped, whiten_rtol=1e-4), expected, **EXACT)


def test_tsv_of_two_directions_in_the_plane() -> None:
    base = torch.zeros(2, 2, dtype=torch.float64)
    experts = [torch.tensor(rows, dtype=torch.float64) for rows in ([[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.6], [0.0, 0.8]])]
    # The closest orthonormal pair to (1, 0) and (0.6, 0.8), which enclose an angle of 2a with sin 2a = 0.8.
    c, s = 3 / 10**0.5, 1 / 10**0.5
    torch.testing.assert_close(tsv(base, experts), torch.tensor([[2 * c, s], [-2 * s, c]], dtype=base.dtype), **EXACT)
    assert task_arithmetic(base, experts).tolist() == [[2.0, 0.6], [0.0, 0.8]]


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_an_expert_give_its_truncation(copies: int) -> None:
    base = torch.zeros(12, 18, dtype=torch.float64)
    _, (delta, *_) = draw(12, 18)
    part = truncated_svd(delta, 12 // copies)
    expected = (part.U * part.S) @ part.V.T
    torch.testing.assert_close(tsv(base, [delta] * copies), expected, **EXACT)


def test_the_published_procedure_fails_on_copies_and_says_so() -> None:
    _, (delta, *_) = draw(12, 18)
    part = truncated_svd(delta, 6)
    with pytest.warns(RuntimeWarning, match="depend on each other"):
        merged = tsv(torch.zeros_like(delta), [delta, delta], whiten_rtol=0)
    grown = merged.norm() / part.S.norm()
    assert float(grown) == pytest.approx(2**0.5, rel=1e-6)


def test_interference_is_zero_for_orthogonal_experts_and_not_for_copies() -> None:
    Q = torch.linalg.qr(low_rank(8, 8, 8, 1)).Q
    apart = [Q[:, :2] @ Q[:, :2].T, Q[:, 2:4] @ Q[:, 2:4].T]
    assert task_interference(apart, rank=2) == pytest.approx(0, abs=1e-10)
    assert task_interference([apart[0], apart[0]], rank=2) == pytest.approx(4, abs=1e-6)


def test_near_parallel_experts_need_a_larger_cut_off() -> None:
    rng = torch.Generator().manual_seed(0)
    delta = torch.randn(24, 36, generator=rng, dtype=torch.float64)
    near = delta + 0.1 * torch.randn(24, 36, generator=rng, dtype=torch.float64)
    part = truncated_svd((delta + near) / 2, 12)
    target = (part.U * part.S) @ part.V.T
    base = torch.zeros_like(delta)
    errors = [float((tsv(base, [delta, near], whiten_rtol=r) - target).norm() / target.norm()) for r in (1e-4, 5e-2)]
    assert errors[0] > 0.5
    assert errors[1] < 0.2


@pytest.mark.parametrize("spread", [0.0, -3.0, -6.0])
@pytest.mark.parametrize("cutoff", [1e-12, 1e-4, 1e-2])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_float32_deltas_merge_as_well_as_float64_ones(shape: tuple[int, int], cutoff: float, spread: float) -> None:
    """Of one size, which float32 is trusted with, just within its limit, and far beyond it."""
    strengths = torch.logspace(0, spread, min(shape))
    experts = [(d.float() * strengths if d.shape[1] == 24 else strengths[:, None] * d.float()) for d in draw(*shape)[1]]
    merged = tsv(torch.zeros(shape), experts, whiten_rtol=cutoff)
    exact = tsv(torch.zeros(shape).double(), [e.double() for e in experts], whiten_rtol=cutoff)
    assert float((merged - exact).norm() / exact.norm()) < 5e-5


def test_float32_is_not_trusted_with_a_wide_spectrum() -> None:
    wide = torch.diag(torch.tensor([1.0, 0.5, 1e-2]))
    assert mixed_svd(wide, 2).S.dtype == torch.float32
    assert mixed_svd(wide, 3).S.dtype == torch.float64


def test_the_default_cut_off_cures_copies_and_experts_a_hundredth_apart() -> None:
    """Gaussian matrices of full rank, 24 x 36: the near-parallel study."""
    rng = torch.Generator().manual_seed(0)
    delta, other = torch.randn(2, 24, 36, generator=rng, dtype=torch.float64)
    for noise in (0.0, 1e-3, 1e-2):
        near = delta + noise * other
        part = truncated_svd((delta + near) / 2, 12)
        target = (part.U * part.S) @ part.V.T
        assert float((tsv(torch.zeros_like(delta), [delta, near]) - target).norm() / target.norm()) < 0.01
    with pytest.warns(RuntimeWarning, match="depend on each other"):
        assert float((tsv(torch.zeros_like(delta), [delta, delta], whiten_rtol=0.0) - target).norm()) > target.norm()


def test_the_polar_factor_is_orthonormal() -> None:
    stack = low_rank(20, 6, 6, 0)
    for rtol in (0, 1e-10):
        factor = inv_sqrt_polar(stack, rtol=rtol)
        torch.testing.assert_close(factor.T @ factor, torch.eye(6).double(), rtol=1e-8, atol=1e-8)


def test_randomized_decompositions_are_as_good_when_the_rank_is_low() -> None:
    matrix = low_rank(200, 300, 5, 1)
    part = truncated_svd(matrix, 5, solver="randomized")
    torch.testing.assert_close((part.U * part.S) @ part.V.T, matrix, rtol=1e-6, atol=1e-6)


def test_resm_without_its_additions_is_tsv_bit_for_bit() -> None:
    base, experts = draw(8, 11)
    plain = resm(base, experts, outliers="none", ranks="uniform", whiten_rtol=1e-4)
    assert torch.equal(plain, tsv(base, experts, whiten_rtol=1e-4))


@given(st.integers(0, 50), st.sampled_from(["mass", "ratio", "count"]))
def test_outlier_weights_are_bounded_and_average_one(seed: int, mode: str) -> None:
    _, deltas = draw(12, 12, seed=seed)
    weights = outlier_weights(deltas, mode=mode, alpha=2.0)
    assert min(weights) > 0
    assert sum(weights) / 3 == pytest.approx(1)


def test_equal_outliers_and_a_uniform_rank_are_tsv_bit_for_bit() -> None:
    base, (delta, *_) = draw(12, 15)
    rng = torch.Generator().manual_seed(3)
    signs = [torch.randint(0, 2, delta.shape, generator=rng).double() * 2 - 1 for _ in range(3)]
    experts = [delta * sign for sign in signs]
    origin = torch.zeros_like(base)
    assert outlier_weights(experts) == [1.0, 1.0, 1.0]
    merged = resm(origin, experts, ranks="uniform", whiten_rtol=1e-4)
    assert torch.equal(merged, tsv(origin, experts, whiten_rtol=1e-4))


def test_scale_moves_masses_but_not_ratios() -> None:
    _, deltas = draw(30, 30)
    louder = [5 * deltas[0], *deltas[1:]]
    for mode, same in (("mass", False), ("ratio", True), ("count", True)):
        before = outlier_weights(deltas, mode=mode, alpha=1.0, clip=None)
        after = outlier_weights(louder, mode=mode, alpha=1.0, clip=None)
        assert (before == pytest.approx(after)) is same


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(1, 40), st.sampled_from(["sparsity", "per_task"]))
def test_ranks_fit_into_the_short_side(shares: list[float], short: int, rule: str) -> None:
    plan = rank_plan(shares, short, rule=rule, reference=1.0)
    assert min(plan) >= 1
    assert sum(plan) <= max(short, len(shares))


def test_zeroing_entries_never_raises_a_rank_for_a_fixed_eps() -> None:
    base = {"a": torch.zeros(12, 12), "b": torch.zeros(12, 12)}
    delta = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    sparser = delta.clone()
    sparser[:4] = 0
    assert occupancy(sparser, eps=0.1) <= occupancy(delta, eps=0.1)
    merged = merge_state_dicts(base, [{"a": delta, "b": sparser}], method="resm", eps=0.1)
    assert torch.linalg.matrix_rank(merged["b"]) < torch.linalg.matrix_rank(merged["a"])


def test_relative_to_the_mean_a_layer_may_look_denser_for_losing_a_large_entry() -> None:
    delta = torch.full((10, 10), 0.1)
    delta[0, 0] = 100.0
    assert occupancy(delta) == pytest.approx(0.01)
    delta[0, 0] = 0.0
    assert occupancy(delta) == pytest.approx(0.99)


def test_an_expert_that_changed_nothing_contributes_nothing() -> None:
    base, (expert, *_) = draw(8, 8)
    assert outlier_weights([expert - base, torch.zeros(8, 8)], alpha=1.0, clip=None) == [2.0, 0.0]
    assert outlier_weights([torch.zeros(8, 8)] * 2) == [1.0, 1.0]
    for method in (tsv, resm):
        merged = method(base, [expert, base.clone()])
        assert torch.isfinite(merged).all()
        assert torch.linalg.matrix_rank(merged - base) <= 4


def test_iso_c_makes_all_directions_equal() -> None:
    base, experts = draw(6, 9)
    values = torch.linalg.svdvals(iso_c(base, experts) - base)
    mean = torch.linalg.svdvals(sum(e - base for e in experts)).mean()
    torch.testing.assert_close(values, mean.expand(6), rtol=1e-7, atol=1e-7)
    spread = torch.linalg.svdvals(iso_cts(base, experts, common=0.5) - base)
    torch.testing.assert_close(spread, spread.mean().expand(6), rtol=1e-6, atol=1e-6)


def test_wudi_solves_what_adam_descends_to() -> None:
    base, experts = draw(6, 5)
    exact = wudi(base, experts, ridge=1e-10)
    near = wudi(base, experts, solver="adam", steps=2000, lr=3e-3)
    deltas = [e - base for e in experts]

    def loss(tau: Tensor) -> float:
        return sum(float(((tau - d) @ d.T).square().sum() / d.square().sum()) for d in deltas)

    start, best, reached = loss(sum(deltas)), loss(exact - base), loss(near - base)
    assert best <= reached < best + 0.05 * (start - best)
    noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert best < loss(exact - base + 1e-3 * noise)


def test_knots_that_only_adds_is_the_sum() -> None:
    base, experts = draw(6, 9)
    merged = knots(base, experts, inner="task_arithmetic")
    torch.testing.assert_close(merged, task_arithmetic(base, experts), **EXACT)


def test_opcm_keeps_the_mean_norm() -> None:
    base, experts = draw(7, 7)
    merged = opcm(base, experts)
    mean = torch.stack([(e - base).norm() for e in experts]).mean()
    torch.testing.assert_close((merged - base).norm(), mean, rtol=1e-8, atol=1e-8)


def test_svc_leaves_orthogonal_experts_alone_and_calms_copies() -> None:
    base = torch.zeros(4, 4, dtype=torch.float64)
    a, b = torch.diag(torch.tensor([3.0, 2, 0, 0]).double()), torch.diag(torch.tensor([0.0, 0, 1, 4]).double())
    torch.testing.assert_close(svc(base, [a, b]), a + b, **EXACT)
    torch.testing.assert_close(svc(base, [a, a, a]), a, **EXACT)


def test_emr_gives_each_expert_its_norm_back() -> None:
    base, experts = draw(5, 5)
    for t, expert in enumerate(experts):
        own = emr(base, experts, expert=t)
        torch.testing.assert_close((own - base).abs().sum(), (expert - base).abs().sum(), **EXACT)
        assert (((own - base) * (expert - base)) >= 0).all()


# Statistics


def test_fisher_and_regmean_weigh_by_statistics() -> None:
    _, (a, b, _) = draw(3, 2)
    certain = [torch.full((3, 2), 1e9), torch.full((3, 2), 1e-9)]
    torch.testing.assert_close(fisher(None, [a, b], statistics=certain), a, rtol=1e-6, atol=1e-6)
    grams = [low_rank(2, 2, 2, s) for s in (1, 2)]
    grams = [g @ g.T for g in grams]
    merged = regmean(None, [a, b], statistics=grams, shrink=1.0)
    torch.testing.assert_close(
        merged, (a @ grams[0] + b @ grams[1]) @ torch.linalg.inv(sum(grams)), rtol=1e-7, atol=1e-7
    )


def test_statistics_travel_through_a_merge() -> None:
    a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    found = [{"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}]
    merged = merge_state_dicts(None, [a, b], method="fisher", statistics=found)
    assert merged["w"].tolist() == [0.25, 0.75]
    with pytest.raises(RecipeError, match="uses no statistics"):
        merge_state_dicts(None, [a, b], method="linear", statistics=found)
    with pytest.raises(RecipeError, match="1 statistics for 2 experts"):
        merge_state_dicts(None, [a, b], method="fisher", statistics=found[:1])


@pytest.mark.parametrize("clamp", [True, False])
def test_model_stock_of_scalars_that_move_apart_is_the_base(clamp: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    for base, up, down in torch.rand(100, 3, 1, generator=rng):
        assert torch.equal(model_stock(base, [base + up, base - down], clamp=clamp), base)


@pytest.mark.parametrize("weights", [[0.1, 0.2, -0.3], [1.0, 1e-9, -1.0]])
@pytest.mark.parametrize("method", ["linear", "dare", "breadcrumbs", "multislerp", "karcher"])
def test_weights_that_sum_to_zero_but_for_rounding_are_refused(method: str, weights: list[float]) -> None:
    entry = merge_method[method]
    experts = [torch.rand(4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    asked = {"weights": weights, "normalize": True, "normalize_weights": True, "density": 0.5}
    knobs = {name: value for name, value in asked.items() if name in entry.schema.model_fields}
    with pytest.raises(RecipeError, match="sum to 0"):
        entry.function(torch.zeros(4) if entry.facts.base else None, experts, **knobs)


@pytest.mark.parametrize("seed", range(20))
def test_karcher_of_nearly_opposite_tensors_has_their_mean_length(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 7, generator=rng)
    for noise in (0.0, 1e-6, 1e-4, 3e-4):
        models = [one, -0.7 * (one + noise * other)]
        length = sum(float(model.norm()) for model in models) / 2
        assert float(karcher(None, models).norm()) == pytest.approx(length, rel=0.05)


def test_a_sum_of_magnitudes_is_not_restored_from_next_to_nothing() -> None:
    delta = torch.tensor([[1e9, 1e9, 1e-40, 1e-40]])
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        assert dare(torch.zeros(1, 4), [delta], density=0.5, rescale="l1", generator=rng).isfinite().all()


@pytest.mark.parametrize("method", [n for n, entry in merge_method.items() if entry.facts.matrix and entry.facts.base])
@pytest.mark.parametrize("name", ["final_logits_bias", "model.layers.0.mlp.experts.gate_up_proj_bias"])
def test_biases_that_stand_in_a_matrix_are_averaged(method: str, name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    base, *experts = ({name: torch.randn(3, 8, generator=rng)} for _ in range(3))
    found = merge_state_dicts(base, experts, method=method)[name]
    torch.testing.assert_close(found, (experts[0][name] + experts[1][name]) / 2)
