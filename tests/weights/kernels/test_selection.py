from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.weights.kernels import selection
from modicum.weights.kernels.blocks import delta_blocks
from modicum.weights.kernels.selection import find_cuts
from oracles.merge import trim


def trimmed(delta: torch.Tensor, keep: int) -> torch.Tensor:
    ((cut,),) = find_cuts(torch.zeros_like(delta), [delta], [[keep]])
    parts = [cut.trim_(d[0]).clone() for _, _, d in delta_blocks(torch.zeros_like(delta), [delta])]
    return torch.cat(parts)


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5]), min_size=1, max_size=40), st.data())
def test_exactly_k_are_kept_and_the_first_of_equals(values: list[float], data: st.DataObject) -> None:
    delta = torch.tensor(values)
    keep = data.draw(st.integers(1, len(values)))
    assert torch.equal(trimmed(delta, keep), torch.from_numpy(trim(delta.double().numpy(), keep)).float())


def test_large_tensors_are_selected_exactly_too() -> None:
    rng = torch.Generator().manual_seed(0)
    smooth = torch.randn(300_000, generator=rng)
    coarse = (4 * smooth).round() / 4  # many equal magnitudes, as differences of bfloat16 weights have
    sparse = smooth * (torch.rand(300_000, generator=rng) < 0.1)
    for delta in (smooth, coarse, sparse):
        for keep in (1, 3, 29_999, 60_000, 150_000, 299_999, 300_000):
            expected = torch.from_numpy(trim(delta.double().numpy(), keep)).float()
            assert torch.equal(trimmed(delta, keep), expected), keep


def test_a_sample_that_misses_costs_time_but_not_exactness(monkeypatch: object) -> None:
    monkeypatch.setattr(selection, "_brackets", lambda *_: [(10.0, 11.0)])  # type: ignore[attr-defined]
    delta = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(trim(delta.double().numpy(), 777)).float()
    assert torch.equal(trimmed(delta, 777), expected)


def test_the_cuts_of_many_experts_are_not_looked_for_in_all_the_others(monkeypatch: object) -> None:
    seen: list[int] = []

    def counted(base: torch.Tensor, experts: list[torch.Tensor], **options: int) -> object:
        seen.append(len(experts))
        return delta_blocks(base, experts, **options)

    base = torch.randn(20, generator=torch.Generator().manual_seed(0))
    experts = list(torch.randn(30, 20, generator=torch.Generator().manual_seed(1)))
    whole = find_cuts(base, experts, [[5]] * 30)
    monkeypatch.setattr(selection, "delta_blocks", counted)  # type: ignore[attr-defined]
    assert find_cuts(base, experts, [[5]] * 30) == whole == [find_cuts(base, [one], [[5]])[0] for one in experts]
    assert set(seen) == {1}
