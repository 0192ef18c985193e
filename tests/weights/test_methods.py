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
from modicum.random import generator
from modicum.weights import merge_state_dicts
from modicum.weights.kernels.draws import draw_mask
from modicum.weights.methods import (
    breadcrumbs,
    dare,
    della,
    linear,
    magmax,
    model_stock,
    multislerp,
    nuslerp,
    ram,
    sce,
    slerp,
    task_arithmetic,
    ties,
)
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
    runs = torch.stack([dare(base, [expert], density=0.3, generator=generator(seed)) for seed in range(300)])
    # The mean of 60 000 draws of 0 or 1/0.3 has a standard deviation of 0.0062.
    assert abs(float(runs.mean()) - 1) < 0.03
    assert torch.equal(runs[7], dare(base, [expert], density=0.3, generator=generator(7)))
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
    merged = dare(torch.zeros(1 << 18), [torch.ones(1 << 18)], density=1e-7, generator=generator(0))
    assert set(merged.unique().tolist()) == {0.0, 65536.0}
    assert 0 < int((merged != 0).sum()) < 14  # four are expected


def test_dare_in_a_merge_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("modicum.weights.plan")
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
    l1, plain = (della(0 * base, experts[:1], rescale=how, generator=generator(1), **knobs) for how in ("l1", "none"))
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
