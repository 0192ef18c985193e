"""What each method promises by itself: exact cases, limits, and equality with the oracles."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import RecipeError
from modicum.linalg import SVD, inv_sqrt_polar, mixed_svd, truncated_svd
from modicum.random import generator
from modicum.registry import merge_method
from modicum.weights import merge_state_dicts
from modicum.weights.kernels.draws import draw_mask
from modicum.weights.methods import (
    breadcrumbs,
    dare,
    della,
    emr,
    fisher,
    iso_c,
    iso_cts,
    karcher,
    knots,
    linear,
    magmax,
    model_stock,
    multislerp,
    nuslerp,
    opcm,
    ram,
    regmean,
    resm,
    sce,
    slerp,
    svc,
    task_arithmetic,
    ties,
    tsv,
    wudi,
)
from modicum.weights.methods.resm import occupancy, outlier_weights, rank_plan
from modicum.weights.methods.tsv import combine, task_interference
from oracles import merge as oracle

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def draw(*shape: int, seed: int = 0, n: int = 3) -> tuple[Tensor, list[Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(n + 1)]
    return tensors[0], tensors[1:]


def to_numpy(base: Tensor, experts: list[Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    return base.numpy(), [e.numpy() for e in experts]


def low_rank(m: int, n: int, rank: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, rank, generator=rng, dtype=torch.float64) for side in (m, n))
    return left @ right.T


# Sums and averages


@given(st.integers(0, 99), st.lists(st.floats(0.1, 2), min_size=3, max_size=3), st.booleans())
def test_linear_equals_the_oracle(seed: int, weights: list[float], normalize: bool) -> None:
    _, experts = draw(4, 5, seed=seed)
    ours = linear(None, experts, weights=weights, normalize=normalize)
    expected = oracle.linear([e.numpy() for e in experts], weights, normalize)
    np.testing.assert_allclose(ours.numpy(), expected, **EXACT)


def test_unnormalized_weights_of_one_model_scale_it() -> None:
    _, (model, _, _) = draw(7)
    scaled = linear(None, [model, model], weights=[0.1, 1.0], normalize=False)
    torch.testing.assert_close(scaled, 1.1 * model, **EXACT)


@given(st.integers(0, 99), st.floats(-1, 2))
def test_task_arithmetic_equals_the_oracle(seed: int, scale: float) -> None:
    base, experts = draw(4, 5, seed=seed)
    ours = task_arithmetic(base, experts, scale=scale, weights=[1.0, 0.5, -0.3])
    expected = oracle.task_arithmetic(*to_numpy(base, experts), scale, [1.0, 0.5, -0.3])
    np.testing.assert_allclose(ours.numpy(), expected, **EXACT)


def test_task_arithmetic_at_one_over_n_is_the_average() -> None:
    base, experts = draw(6, 6)
    torch.testing.assert_close(task_arithmetic(base, experts, scale=1 / 3), torch.stack(experts).mean(0), **EXACT)


# Sparse methods


@given(
    st.integers(0, 99),
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
    st.lists(st.sampled_from([1.0, 0.5, -0.5, 2.0]), min_size=3, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_ties_equals_the_oracle(
    seed: int, density: list[float], weights: list[float], normalize: bool, coarse: bool
) -> None:
    base, experts = draw(5, 7, seed=seed)
    if coarse:  # many equal magnitudes and exact zeros of the sum
        base, experts = base.round(), [e.round() for e in experts]
    ours = ties(base, experts, density=density, weights=weights, normalize=normalize, scale=0.7)
    expected = oracle.ties(*to_numpy(base, experts), density, 0.7, weights, normalize)
    np.testing.assert_allclose(ours.numpy(), expected, **EXACT)


def test_an_election_in_which_only_weight_zero_agrees_changes_nothing() -> None:
    experts = [torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0.0, 3.0, -1.0]), torch.tensor([0.0, 1.0, -1.0])]
    merged = ties(torch.zeros(3), experts, density=1.0, weights=[0.0, 1.0, 0.5])
    torch.testing.assert_close(merged, torch.tensor([0.0, 3.5 / 1.5, -1.0]))


@pytest.mark.parametrize("n", [255, 256, 257])
def test_as_many_experts_as_a_byte_counts_agree(n: int) -> None:
    merged = ties(torch.zeros(2), [torch.tensor([1.0, -3.0])] * n, density=1.0)
    torch.testing.assert_close(merged, torch.tensor([1.0, -3.0]))


def test_weights_that_sum_to_zero_are_refused_and_to_one_are_not() -> None:
    base, experts = torch.zeros(2), [torch.ones(2), torch.tensor([2.0, 0.0])]
    with pytest.raises(RecipeError, match="sum to 0 and cannot be normalized"):
        dare(base, experts, density=1.0, weights=[1.0, -1.0], normalize=True)
    with pytest.raises(RecipeError, match="linear: the weights"):
        linear(None, experts, weights=[1.0, -1.0])
    torch.testing.assert_close(linear(None, experts, weights=[1.0, -2.0]), torch.tensor([3.0, -1.0]))
    merged = dare(base, experts, density=1.0, weights=[3.0, -2.0], normalize=True)
    torch.testing.assert_close(merged, torch.tensor([-1.0, 3.0]))


def test_ties_that_keeps_all_of_agreeing_experts_is_their_mean() -> None:
    base, (a, b, _) = draw(5, 7)
    a, b = base + (a - base).abs(), base + (b - base).abs()
    torch.testing.assert_close(ties(base, [a, b], density=1.0), (a + b) / 2, **EXACT)


def test_a_sum_of_zero_elects_plus() -> None:
    base = torch.zeros(2)
    assert ties(base, [torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])], density=1.0).tolist() == [1.0, 2.0]


def test_ties_trims_over_the_whole_model_when_asked() -> None:
    base = {"small": torch.zeros(6), "large": torch.zeros(3, 2)}
    expert = {"small": torch.tensor([1.0, 2, 3, 4, 5, 6]) / 100, "large": torch.arange(1.0, 7).view(3, 2)}
    merged = merge_state_dicts(base, [expert], method="ties", density=0.5, trim_scope="model")
    assert torch.equal(merged["large"], expert["large"])
    assert not merged["small"].any()
    within = merge_state_dicts(base, [expert], method="ties", density=0.5)
    assert int(within["small"].count_nonzero()) == 3


@given(st.integers(0, 30), st.floats(0.1, 0.9))
def test_a_model_wide_trim_finds_the_exact_threshold(seed: int, density: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    expert = {f"{i}": torch.randn(17, generator=rng) for i in range(3)}
    base = {name: torch.zeros(17) for name in expert}
    merged = merge_state_dicts(base, [expert], method="ties", density=density, trim_scope="model")
    expected = oracle.trim(torch.cat(list(expert.values())).double().numpy(), max(1, int(density * 51)))
    np.testing.assert_allclose(torch.cat(list(merged.values())).numpy(), expected, rtol=1e-6)


def test_dare_that_keeps_all_is_task_arithmetic() -> None:
    base, experts = draw(9, 5)
    torch.testing.assert_close(dare(base, experts, density=1.0), task_arithmetic(base, experts), **EXACT)


def test_dare_is_unbiased_over_seeds_and_repeats_for_one() -> None:
    base, expert = torch.zeros(200), torch.ones(200)
    runs = torch.stack([dare(base, [expert], density=0.3, rng=generator(seed)) for seed in range(300)])
    # The mean of 60 000 draws of 0 or 1/0.3 has a standard deviation of 0.0062.
    assert abs(float(runs.mean()) - 1) < 0.03
    assert torch.equal(runs[7], dare(base, [expert], density=0.3, rng=generator(7)))
    assert not torch.equal(runs[7], runs[8])


def test_dare_can_keep_the_sum_of_magnitudes_exactly() -> None:
    base, (expert, *_) = draw(1000)
    merged = dare(base, [expert], density=0.5, rescale="l1")
    torch.testing.assert_close((merged - base).abs().sum(), (expert - base).abs().sum())


@pytest.mark.parametrize("method", [dare, della])
def test_dropping_without_rescaling_keeps_entries_as_they_are(method: Any) -> None:
    knobs = {"density": 0.5, "rescale": "none", "elect": "none", "normalize": False}
    merged = method(torch.zeros(20, 50), [torch.full((20, 50), 3.0)], **knobs)
    assert set(merged.unique().tolist()) == {0.0, 3.0}
    assert 0.4 < float((merged != 0).float().mean()) < 0.6


def test_dare_drops_at_most_all_but_one_of_65536() -> None:
    merged = dare(torch.zeros(1 << 18), [torch.ones(1 << 18)], density=1e-7, rng=generator(0))
    assert set(merged.unique().tolist()) == {0.0, 65536.0}
    assert 0 < int((merged != 0).sum()) < 14  # four are expected


def test_dare_in_a_merge_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("modicum.weights.merge")
    base = {str(i): torch.zeros(40, 3) for i in range(5)}
    expert = {name: torch.ones(40, 3) for name in base}
    results = []
    for cores in (1, 3):
        monkeypatch.setattr(module, "cores", lambda cores=cores: cores)
        results.append(merge_state_dicts(base, [expert], method="dare", density=0.5, seed=3))
    assert all(torch.equal(results[0][name], results[1][name]) for name in base)
    assert not torch.equal(results[0]["0"], results[0]["1"])


def test_della_without_a_window_drops_like_dare() -> None:
    base, expert = torch.zeros(100, 50), torch.ones(100, 50)
    kept = della(base, [expert], density=0.4, epsilon=0.0) != 0
    # 5000 draws: standard deviation 0.007.
    assert abs(float(kept.double().mean()) - 0.4) < 0.035


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
def test_della_keeps_large_entries_more_often(rescale: str) -> None:
    expert = torch.arange(1.0, 11).repeat(4000, 1)
    merged = della(torch.zeros(4000, 10), [expert], density=0.5, epsilon=0.3, rescale=rescale)
    expected = 0.2 + 0.6 * torch.arange(10) / 9
    # 4000 draws of each: standard deviation 0.008.
    torch.testing.assert_close((merged != 0).double().mean(0), expected.double(), rtol=0, atol=0.04)


@pytest.mark.parametrize("rescale", ["probability", "l1"])
def test_della_takes_rows_of_one_entry(rescale: str) -> None:
    merged = della(torch.zeros(500, 1), [torch.ones(500, 1)], density=0.5, epsilon=0.2, rescale=rescale)
    kept = merged != 0
    assert abs(float(kept.double().mean()) - 0.5) < 0.1  # standard deviation 0.022
    larger = 2.0 if rescale == "probability" else float(1 / kept.double().mean())
    assert merged[kept].unique().tolist() == pytest.approx([larger])


def test_della_gives_equal_magnitudes_their_mean_probability() -> None:
    expert = torch.tensor([1.0, -1.0, 1.0, 1.0, 5.0]).repeat(4000, 1)
    for rescale in ("l1", "probability", "none"):
        kept = della(torch.zeros(4000, 5), [expert], density=0.5, epsilon=0.4, rescale=rescale) != 0
        # Ranks 0 to 3 are shared: 0.1 + 0.8 · 1.5/4; standard deviation 0.008.
        expected = torch.tensor([0.4, 0.4, 0.4, 0.4, 0.9], dtype=torch.float64)
        torch.testing.assert_close(kept.double().mean(0), expected, rtol=0, atol=0.04)


@pytest.mark.parametrize("n", [600, 20_000])  # a row's columns share 32 bits with magnitudes, or 64
def test_della_divides_by_the_probability_of_its_rank(n: int) -> None:
    delta = torch.randn(12_000 // n + 1, n, generator=generator(0), dtype=torch.float64)
    merged = della(torch.zeros_like(delta), [delta], density=0.5, epsilon=0.3, normalize=False)
    kept = merged != 0
    assert 0.45 < kept.double().mean() < 0.55
    rank = delta.abs().argsort(1).argsort(1)
    expected = 0.2 + 0.6 * rank[kept].double() / (n - 1)
    # Neighbours that agree to ten binary digits may change places: of 600 hardly any, of 20,000 none with 64 bits.
    torch.testing.assert_close((delta / merged)[kept], expected, rtol=0, atol=2 / n + 1 / 65536)


def test_della_drops_the_same_entries_whether_or_not_it_makes_up_for_them() -> None:
    base, experts = draw(300, 700)  # more than one block of rows
    knobs = {"density": 0.4, "epsilon": 0.3, "elect": "none", "normalize": False}
    l1, plain = (della(0 * base, experts[:1], rescale=how, rng=generator(1), **knobs) for how in ("l1", "none"))
    assert torch.equal(l1 != 0, plain != 0)
    torch.testing.assert_close(l1.abs().sum(), experts[0].abs().sum(), rtol=1e-6, atol=0)


def test_masks_have_their_probability_to_the_last_bit() -> None:
    for level in (1, 255, 256, 300, 32768, 65535, 65536):
        mean = draw_mask(1 << 20, level, np.random.default_rng(level)).mean()
        share = level / 65536
        assert abs(mean - share) <= 5 * (share * (1 - share) / (1 << 20)) ** 0.5


@pytest.mark.parametrize("rescale", ["probability", "l1"])
@pytest.mark.parametrize(("density", "epsilon"), [(1e-7, 0.0), (1 - 1e-7, 0.0), (0.5, 0.4999999)])
def test_della_takes_probabilities_next_to_0_and_1(density: float, epsilon: float, rescale: str) -> None:
    expert = torch.arange(1.0, 101).repeat(100, 1)
    merged = della(torch.zeros(100, 100), [expert], density=density, epsilon=epsilon, rescale=rescale)
    assert abs(float((merged != 0).double().mean()) - density) < 0.02  # standard deviation at most 0.004


def test_della_refuses_a_window_that_leaves_the_unit_interval() -> None:
    with pytest.raises(RecipeError, match="leaves"):
        della(torch.zeros(2), [torch.ones(2)], density=0.95, epsilon=0.1)
    with pytest.raises(RecipeError, match="leaves"):
        della(torch.zeros(2), [torch.ones(2)], density=0.1, epsilon=0.1)


def test_sce_selects_in_large_tensors_as_in_small_ones() -> None:
    base, experts = draw(500, 400)  # a sample finds the threshold, in two blocks
    for expert in experts:
        expert[:100] = base[:100]  # where none differs nothing is kept
    expected = oracle.sce(*to_numpy(base, experts), 0.4)
    np.testing.assert_allclose(sce(base, experts, select=0.4).numpy(), expected, rtol=1e-10, atol=1e-10)


def test_breadcrumbs_without_outliers_is_magnitude_pruning() -> None:
    base, (expert, *_) = draw(8, 8)
    pruned = base + torch.from_numpy(oracle.trim((expert - base).numpy(), 19))
    torch.testing.assert_close(breadcrumbs(base, [expert], density=0.3, gamma=0.0), pruned, **EXACT)


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.2), (0.9, 0.3), (1.0, 0.5)])
def test_tiny_tensor_keeps_its_share(density: float, gamma: float) -> None:
    base, (expert, *_) = draw(64)
    kept = (breadcrumbs(base, [expert], density=density, gamma=gamma) != base).sum()
    assert int(kept) == int(density * 64)


def test_breadcrumbs_leaves_out_the_largest() -> None:
    expert = torch.tensor([5.0, 1.0, -4.0, 3.0, 2.0])
    assert breadcrumbs(torch.zeros(5), [expert], density=0.4, gamma=0.2).tolist() == [0, 0, -4, 3, 0]


def test_magmax_prefers_the_later_of_equals() -> None:
    assert magmax(torch.zeros(1), [torch.tensor([1.0]), torch.tensor([-1.0])]).item() == -1


def test_ram_keeps_what_is_unique() -> None:
    a, b = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([4.0, 0.0, 0.0])
    assert ram(torch.zeros(3), [a, b]).tolist() == [3, 2, 0]
    stronger = ram(torch.zeros(3), [a, b], r=0.5, alpha=1.0)  # a shares one entry and has one of its own
    assert stronger.tolist() == pytest.approx([3, 3, 0])


# Geometry


def test_model_stock_follows_agreement() -> None:
    base = torch.zeros(2, dtype=torch.float64)
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    torch.testing.assert_close(model_stock(base, [a, a]), a, **EXACT)
    assert torch.equal(model_stock(base, [a, b]), base)
    assert torch.equal(model_stock(base, [a, -a]), base)


def test_slerp_meets_its_ends_and_keeps_equal_norms() -> None:
    a, (b, *_) = draw(3, 4)
    b = b / b.norm() * a.norm()
    assert torch.equal(slerp(a, [b], t=0), a)
    assert torch.equal(slerp(a, [b], t=1), b)
    torch.testing.assert_close(slerp(a, [b], t=0.3).norm(), a.norm(), **EXACT)
    torch.testing.assert_close(slerp(a, [a.clone()], t=0.3), a, **EXACT)
    with pytest.warns(RuntimeWarning, match="opposite directions"):
        assert torch.isfinite(slerp(a, [-a], t=0.5)).all()
    with pytest.raises(RecipeError, match="goes between two models"):
        slerp(a, [b, b], t=0.5)


def test_the_spherical_averages_agree_for_two() -> None:
    _, (a, b, _) = draw(3, 4)
    b = b / b.norm() * a.norm()
    middle = slerp(None, [a, b], t=0.5)
    torch.testing.assert_close(nuslerp(None, [a, b]), middle, **EXACT)
    torch.testing.assert_close(multislerp(None, [a, b]), middle, rtol=1e-9, atol=1e-9)


# Matrices


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
    weights = outlier_weights(deltas, mode=mode, sigmas=2.0)
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
        before = outlier_weights(deltas, mode=mode, sigmas=1.0, bounds=None)
        after = outlier_weights(louder, mode=mode, sigmas=1.0, bounds=None)
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
    assert outlier_weights([expert - base, torch.zeros(8, 8)], sigmas=1.0, bounds=None) == [2.0, 0.0]
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
        assert dare(torch.zeros(1, 4), [delta], density=0.5, rescale="l1", rng=rng).isfinite().all()
