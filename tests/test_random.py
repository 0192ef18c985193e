import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.random import derive_seed, generator

names = st.lists(st.one_of(st.text(max_size=8), st.integers(-5, 5)), max_size=3)


@given(st.integers(0, 2**31), names, names)
def test_different_names_give_different_seeds(seed, first, second):
    assert (derive_seed(seed, *first) == derive_seed(seed, *second)) == (
        [(type(n), n) for n in first] == [(type(n), n) for n in second]
    )


def test_names_are_not_joined_ambiguously():
    assert (
        len(
            {derive_seed(0, "ab", "c"), derive_seed(0, "a", "bc"), derive_seed(0, "abc"), derive_seed(0, "a", "b", "c")}
        )
        == 4
    )


def test_a_draw_does_not_depend_on_global_state():
    torch.manual_seed(1)
    first = torch.randn(4, generator=generator(3, "x", 1))
    torch.manual_seed(2)
    torch.randn(100)
    assert torch.equal(first, torch.randn(4, generator=generator(3, "x", 1)))


def test_seeds_are_pinned_because_saved_runs_depend_on_them():
    assert derive_seed(0, "dare", 1, "lm_head.weight") == 5503279584715074516
