"""What the items of a measure sum up to, and how two models differ on the same items."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.registry import measure, wanted

ANSWERS = st.sampled_from([0.0, 0.5, 1.0]).map(lambda score: {"score": score, "correct": score == 1.0})
# Bytes belong to the document and are the same for both models; tokens are a tokenizer's own.
ITEMS = {
    "exact_match": st.tuples(ANSWERS, ANSWERS),
    "retrieval": st.tuples(ANSWERS, ANSWERS),
    "perplexity": st.builds(
        lambda size, nats, tokens: tuple({"bytes": size, "nats": n, "tokens": t} for n, t in zip(nats, tokens)),
        st.integers(1, 50),
        st.tuples(*[st.floats(0.1, 90)] * 2),
        st.tuples(*[st.integers(1, 50)] * 2),
    ),
}


@pytest.mark.parametrize("name", ITEMS)
def test_a_difference_is_that_of_the_two_estimates(name):
    facts = measure[name].facts
    knobs = {"level": 0.9, "metric": facts.compares}

    @given(st.lists(ITEMS[name], min_size=1, max_size=12))
    def agree(pairs):
        a, b = zip(*pairs, strict=True)
        one, other = (facts.estimate(items, **wanted(facts.estimate, knobs)) for items in (a, b))
        found = facts.difference(a, b, level=0.9)
        assert found.value == pytest.approx(one.value - other.value, abs=1e-9) and found.n == len(pairs)
        assert facts.difference(b, a, level=0.9).value == pytest.approx(-found.value, abs=1e-9)
        assert found.low is None or found.low <= found.value <= found.high

    agree()


@given(st.lists(ANSWERS, min_size=2, max_size=12))
def test_recall_has_wilsons_interval_only_where_every_answer_is_whole(items):
    found = measure["retrieval"].facts.estimate(items, level=0.95)
    scores = [item["score"] for item in items]
    # Student's interval of a mean is symmetric, Wilson's of a share is not but at one half.
    whole = {*scores} <= {0.0, 1.0}
    symmetric = found.value - found.low == pytest.approx(found.high - found.value)
    assert symmetric == (not whole or found.value == 0.5) and found.value == pytest.approx(sum(scores) / len(scores))
