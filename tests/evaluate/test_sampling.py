import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.evaluate.generation import _batches, generate, sample
from support import tiny_llama

KNOBS = {"max_new_tokens": 12, "stop": [2], "pad": 0}
PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [40, 41, 42, 43, 44, 45], [7]]


@pytest.fixture(scope="module")
def model():
    model = tiny_llama(seed=3).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(12)  # far from uniform
    return model


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_sample_depends_on_its_prompt_and_seed_alone(model, temperature):
    seeds = [[1, 2, 3], [1], [9, 8], [4, 1]]
    together = sample(model, PROMPTS, seeds, temperature=temperature, **KNOBS)
    for size in (1, 2, 5):
        assert sample(model, PROMPTS, seeds, temperature=temperature, batch_size=size, **KNOBS) == together
    turned = sample(model, PROMPTS[::-1], seeds[::-1], temperature=temperature, **KNOBS)
    assert turned[::-1] == together
    for prompt, names, found in zip(PROMPTS, seeds, together):
        for seed, one in zip(names, found):
            assert sample(model, [prompt], [[seed]], temperature=temperature, **KNOBS) == [[one]]


def test_greedy_sampling_is_generation_and_seeds_differ(model):
    greedy = sample(model, PROMPTS, [[0], [5], [6], [7]], temperature=0.0, **KNOBS)
    assert [row[0].tokens for row in greedy] == generate(model, PROMPTS, **KNOBS)
    many = sample(model, [PROMPTS[0]], [range(20)], **KNOBS)[0]
    assert len({tuple(one.tokens) for one in many}) > 10
    with torch.inference_mode():
        ids = torch.tensor([PROMPTS[2]])
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert greedy[2][0].tokens[:3] == ids[0, 6:].tolist()


def test_first_tokens_follow_the_model(model):
    n = 4000
    found = sample(model, [PROMPTS[0]], [range(n)], batch_size=500, **KNOBS | {"max_new_tokens": 1, "stop": []})[0]
    drawn = torch.bincount(torch.tensor([one.tokens[0] for one in found]), minlength=264) / n
    shares = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    assert (drawn - shares).abs().sum() < 4 * math.sqrt(264 / n) and (drawn - shares).abs().max() < 0.04


def test_nucleus_keeps_the_likeliest_and_never_nothing(model):
    shares = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    ordered, order = shares.sort(descending=True)
    kept = order[: int((ordered.cumsum(0) < 0.9).sum()) + 1].tolist()
    knobs = KNOBS | {"max_new_tokens": 1, "stop": []}
    drawn = {one.tokens[0] for one in sample(model, [PROMPTS[0]], [range(300)], top_p=0.9, **knobs)[0]}
    assert drawn <= set(kept) and len(drawn) > 1
    (only,) = sample(model, [PROMPTS[0]], [range(50)], top_p=1e-9, **knobs)
    assert {one.tokens[0] for one in only} == {int(order[0])}


def test_how_a_sample_ended_and_what_was_likely(model):
    endless = sample(model, PROMPTS, [[1]] * 4, **KNOBS | {"stop": []})
    assert all(not one.ended and len(one.tokens) == 12 for (one,) in endless)
    stop = endless[0][0].tokens[4]
    (cut,) = sample(model, [PROMPTS[0]], [[1]], logprobs=3, **KNOBS | {"stop": [stop]})[0]
    assert cut.ended and cut.tokens == endless[0][0].tokens[: endless[0][0].tokens.index(stop)]
    assert len(cut.logprobs) == len(cut.tokens) + 1 and all(len(position) == 3 for position in cut.logprobs)
    first = model(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
    assert max(cut.logprobs[0].values()) == pytest.approx(first.max().item(), abs=1e-5)


def test_batches_shrink_without_a_change(model):
    """Most samples end at once, so that the batch is compacted; the others go on as they would alone."""
    first = model(torch.tensor([PROMPTS[0]])).logits[0, -1].topk(2).indices.tolist()
    knobs = KNOBS | {"stop": first, "max_new_tokens": 20}
    many = sample(model, [PROMPTS[0]] * 2, [range(16), range(16, 32)], **knobs)
    alone = [sample(model, [PROMPTS[0]], [[seed]], **knobs)[0][0] for seed in range(32)]
    assert [one for row in many for one in row] == alone and 8 < sum(len(one.tokens) == 0 for one in alone) < 32


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=8), st.integers(1, 8))
@settings(deadline=None)
def test_every_seed_is_in_one_batch_and_batches_are_no_larger(sizes, size):
    prompts, seeds = [[1] * length for length, _ in sizes], [list(range(count)) for _, count in sizes]
    batches = list(_batches(prompts, seeds, size))
    found = [[] for _ in prompts]
    for batch in batches:
        assert 0 < sum(len(part) for _, part in batch) <= size
        assert len({index for index, _ in batch}) == len(batch)
        for index, part in batch:
            found[index] += part
    assert found == seeds


@pytest.mark.parametrize(
    ("seeds", "knobs"),
    [([[1]], {}), ([[], [1], [1], [1]], {}), ([[1]] * 4, {"temperature": -1.0}), ([[1]] * 4, {"top_p": 0.0}),
     ([[1]] * 4, {"temperature": math.inf}), ([[1]] * 4, {"max_new_tokens": 10_000})],
)  # fmt: skip
def test_what_cannot_be_sampled_is_refused(model, seeds, knobs):
    with pytest.raises(ValueError):
        sample(model, PROMPTS, seeds, **KNOBS | knobs)
