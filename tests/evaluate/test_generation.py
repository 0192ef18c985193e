from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import UnsupportedError
from modicum.evaluate import generate, stop_tokens
from modicum.evaluate.generation import _alike
from support import byte_tokenizer, tiny_llama

PROMPTS = st.lists(st.lists(st.integers(3, 263), min_size=1, max_size=12), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=3, initializer_range=0.3).eval()


@torch.no_grad()
def one_by_one(model, prompt, limit, stop):
    ids = list(prompt)
    for _ in range(limit):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@given(PROMPTS, st.integers(1, 7))
def test_batches_give_what_each_prompt_gives_alone_without_a_cache(model, prompts, batch_size):
    stop = set(range(0, 264, 5))  # ends some answers early
    found = generate(model, prompts, max_new_tokens=6, stop=stop, pad=0, batch_size=batch_size)
    assert found == [one_by_one(model, prompt, 6, stop) for prompt in prompts]


@given(st.lists(st.integers(3, 263), max_size=20), PROMPTS)
def test_what_prompts_share_is_read_once_and_changes_no_answer(model, prefix, endings):
    prompts = [prefix + ending for ending in endings] + [[*prefix, 9]] * 2
    found = generate(model, prompts, max_new_tokens=5, stop=(), pad=0, batch_size=4)
    assert found == [one_by_one(model, prompt, 5, ()) for prompt in prompts]


def test_a_shared_beginning_is_computed_once(model, monkeypatch):
    seen = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: (seen.append(tuple(k["input_ids"].shape)), forward(*a, **k))[1]
    )
    monkeypatch.setattr("modicum.evaluate.generation._arguments", lambda _: ("logits_to_keep",))
    generate(model, [[7] * 30 + [i] for i in range(8)], max_new_tokens=2, stop=(), pad=0)
    assert seen == [(1, 30), (8, 1), (8, 1)]


def test_prompts_in_one_wrapper_are_read_apart_from_those_in_another(model, monkeypatch):
    """Of three wrappers with four requests each a little more than the wrappers is read, and no answer changes."""
    wrappers = [[3, 7, *range(10 + i, 60)] for i in range(3)]
    prompts = [[*wrapper, 70 + goal, goal + 1] for goal in range(4) for wrapper in wrappers] + [[3, 9], [5] * 40]
    alone = [generate(model, [prompt], max_new_tokens=4, stop=(), pad=0)[0] for prompt in prompts]
    read, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (read.append(k["input_ids"].numel()), forward(*a, **k))[1])
    assert generate(model, prompts, max_new_tokens=4, stop=(), pad=0) == alone
    written = 3 * len(prompts)
    assert sum(read) - written <= sum(map(len, wrappers)) + 3 * 4 * 2 + 2 * 40
    # Where an answer is long, a batch of its own costs more than it saves.
    read.clear()
    generate(model, prompts[:6], max_new_tokens=60, stop=(), pad=0)
    assert max(read) >= 6 * 20


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=60), max_size=12), st.integers(0, 60))
def test_every_prompt_is_in_one_group(prompts, cost):
    groups = list(_alike(prompts, range(len(prompts)), cost))
    assert sorted(i for group in groups for i in group) == list(range(len(prompts)))


def test_no_stop_token_means_the_limit_ends_every_answer(model):
    found = generate(model, [[5, 6], [7]], max_new_tokens=4, stop=(), pad=0)
    assert [len(answer) for answer in found] == [4, 4]


def test_progress_adds_up_to_the_prompts(model):
    seen: list[int] = []
    generate(model, [[5]] * 7, max_new_tokens=1, stop=(), pad=0, batch_size=3, progress=seen.append)
    assert seen == [3, 3, 1]


def test_no_prompts_give_no_answers(model):
    assert generate(model, [], max_new_tokens=3, stop=(), pad=0) == []


def test_the_models_sampling_defaults_do_not_make_greedy_answers_random():
    model = tiny_llama(seed=3, initializer_range=0.3).eval()
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    plain = tiny_llama(seed=3, initializer_range=0.3).eval()
    arguments = {"max_new_tokens": 8, "stop": (), "pad": 0}
    assert generate(model, [[9, 8, 7]], **arguments) == generate(plain, [[9, 8, 7]], **arguments)


def test_a_prompt_without_room_for_an_answer_is_refused(model):
    with pytest.raises(UnsupportedError, match="Lower max_new_tokens"):
        generate(model, [[1] * 250], max_new_tokens=10, stop=(), pad=0)


@pytest.mark.parametrize(("own", "expected"), [(None, {2}), (7, {2, 7}), ([7, 8], {2, 7, 8})])
def test_both_the_model_and_the_tokenizer_say_where_an_answer_ends(own, expected):
    model = tiny_llama()
    model.generation_config.eos_token_id = own
    assert stop_tokens(model, byte_tokenizer()) == expected
