import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.philox import row_keys, words
from oracles import meap as oracle

KNOWN = [  # known answers that come with Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_oracle_gives_the_published_answers(counter, key, expected):
    assert oracle.philox4x32(counter, key) == expected


@given(key=st.integers(0, 2**63 - 1), count=st.integers(1, 13), stream=st.integers(0, 5))
def test_words_equal_the_oracle(key, count, stream):
    got = words(torch.tensor([key]), count, stream=stream)[0].tolist()
    assert got == [oracle.word(key, place, stream) for place in range(count)]


@pytest.mark.parametrize(("count", "stream"), [(1, 0), (8, 0), (13, 5)])
def test_words_are_the_same_from_arrays_and_from_tensors(count, stream):
    keys = torch.tensor([0, 1, 2**32, 2**63 - 1])
    compiled = torch.compile(words, fullgraph=True, backend="eager")
    assert torch.equal(compiled(keys, count, stream=stream), words(keys, count, stream=stream))


def test_a_row_does_not_depend_on_its_neighbors_or_the_count():
    keys = row_keys(range(5), seed=3, method="m")
    assert torch.equal(words(keys, 40)[2, :7], words(keys[2:3], 7)[0])


def test_keys_differ_by_each_part_of_the_name():
    keys = [
        int(row_keys([name], seed=seed, method=method, epoch=epoch)[0])
        for name in ("a", "b", 1)
        for seed in (0, 1)
        for method in ("m", "n")
        for epoch in (0, 1)
    ]
    assert len(set(keys)) == len(keys)


def test_words_are_uniform():
    word = words(row_keys(range(64), seed=0, method="m"), 1024).double() / 2**32
    counts = torch.histc(word, bins=64, min=0, max=1)
    chi2 = float(((counts - 1024) ** 2 / 1024).sum())
    assert 63 - 5 * (2 * 63) ** 0.5 < chi2 < 63 + 5 * (2 * 63) ** 0.5
    assert abs(float(torch.corrcoef(word[:2])[0, 1])) < 0.15
