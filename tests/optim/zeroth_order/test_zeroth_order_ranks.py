import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import RecipeError
from modicum.optim.zeroth_order.ranks import numerical_rank, select_ranks, singular_values

VALUES = torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("criterion", "threshold", "expected"),
    [
        ("ratio", 0.25, 3),
        ("energy", 0.95, 3),
        ("nuclear", 0.5, 2),
        ("stable", 0.5, 2),
        ("ratio", 0.05, 5),
        ("ratio", 0.5, 2),
    ],
)
def test_the_rank_of_a_known_spectrum(criterion, threshold, expected):
    assert numerical_rank(VALUES, criterion=criterion, threshold=threshold) == expected


def test_a_zero_matrix_has_rank_one():
    assert numerical_rank(torch.zeros(3)) == 1


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 50))
def test_singular_values_are_those_of_the_decomposition(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(singular_values(matrix), torch.linalg.svdvals(matrix), rtol=1e-6, atol=1e-6)


def test_the_minimum_is_taken_inside_a_block_and_capped():
    flat, steep = torch.ones(80), torch.tensor([1.0, 0.9, 0.1])
    spectra = {"h.0.a": flat, "h.0.b": steep, "h.1.a": flat, "head": flat}
    assert select_ranks(spectra) == {"h.0.a": 2, "h.0.b": 2, "h.1.a": 64, "head": 64}
    assert select_ranks(spectra, scope="layer") == {"h.0.a": 64, "h.0.b": 2, "h.1.a": 64, "head": 64}
    assert select_ranks(spectra, scope="suffix")["h.0.a"] == 2
    assert select_ranks(spectra, smallest=5)["h.0.b"] == 3


def test_an_orthogonal_matrix_gets_the_largest_rank():
    basis = torch.linalg.qr(torch.randn(70, 70, generator=torch.Generator().manual_seed(0))).Q
    assert select_ranks({"w": singular_values(basis)}) == {"w": 64}


@pytest.mark.parametrize("criterion", ["ratio", "energy", "nuclear"])
def test_a_mean_rank_can_be_asked_for(criterion):
    rng = torch.Generator().manual_seed(0)
    spectra = {f"h.{i}.w": torch.rand(200, generator=rng).sort(descending=True).values for i in range(12)}
    ranks = select_ranks(spectra, criterion=criterion, target_mean_rank=20.0)
    assert sum(ranks.values()) / 12 == pytest.approx(20, abs=2)


def test_thresholds_out_of_range_are_refused():
    with pytest.raises(RecipeError, match=r"rank_threshold is 1\.0"):
        numerical_rank(VALUES, threshold=1.0)
    with pytest.raises(RecipeError, match="criterion with a threshold"):
        select_ranks({"w": VALUES}, criterion="stable", target_mean_rank=2.0)
