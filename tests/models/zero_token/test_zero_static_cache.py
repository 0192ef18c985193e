"""A looped model with a static cache: the same text, by one graph."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DynamicCache, StaticCache

from models.zero_token.support_zero import base_model, looped, tokens
from modicum.errors import UnsupportedError
from modicum.models.zero_token.cache import without_trace

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LEAVES = {"exit_threshold": 0.15}


def padded(left=3):
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :left] = 0
    return {"input_ids": tokens(3), "attention_mask": mask}


@pytest.mark.parametrize("host", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    "knobs",
    [
        {"zero_token": False},
        {"order": "sequence"},
        LEAVES,
        {"cache_policy": "share_first"} | LEAVES,
        {"cache_policy": "propagate"} | LEAVES,
        {"exit_criterion": "confidence", "exit_threshold": 0.3},
    ],
)
def test_a_static_cache_changes_no_text(host, knobs):
    model = looped(host, **knobs)
    for inputs in (padded(), {"input_ids": tokens(1, 1)}):
        want = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        got = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, cache_implementation="static")
        assert isinstance(got.cache, StaticCache) and torch.equal(got.sequences, want.sequences)
        assert (got.spent.tokens, got.spent.visits) == (want.spent.tokens, want.spent.visits)


@pytest.mark.parametrize("way", [{"num_beams": 2}, {"assistant_early_exit": 1}, {"prefill_chunk_size": 3}])
def test_other_ways_of_generating_take_a_static_cache(way):
    model = looped()
    want = model.generate(tokens(1), **GREEDY, **way)
    assert torch.equal(model.generate(tokens(1), **GREEDY, **way, cache_implementation="static"), want)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_padding_is_known_from_a_mask_that_was_made_beforehand(backend):
    model = looped(**LEAVES)
    model.set_attn_implementation(backend)
    out = model.generate(**padded(), **GREEDY, return_dict_in_generate=True, cache_implementation="static")
    assert out.spent.tokens == 3 * 7 - 3 + 3 * 7


def test_a_cache_of_other_sizes_says_how_to_make_one():
    static = StaticCache(config=base_model().config, max_cache_len=9)
    with pytest.raises(UnsupportedError, match=r"physical.*StaticCache\(config=model.config"):
        looped()(tokens(), cache=static)


@pytest.mark.parametrize("host", ["llama", "mistral"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("before", [0, 2, 6])
def test_a_pass_without_trace_leaves_the_cache_as_it_was(host, kind, before):
    model = looped(host)
    room = {"max_cache_len": 9} if kind is StaticCache else {}
    cache = kind(config=model.config, **room)
    with torch.no_grad():
        if before:
            model(tokens()[:, :before], cache=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        with without_trace(cache):
            model(tokens(seed=1)[:, :3], cache=cache, use_cache=True)
        got, want = (model(tokens()[:, before:], cache=c, use_cache=True).logits for c in (cache, twin))
    assert torch.equal(got, want)


def test_a_pass_without_trace_takes_out_the_slots_that_it_made():
    cache = DynamicCache()
    with torch.no_grad(), without_trace(cache):
        looped()(tokens(), cache=cache, use_cache=True)
    assert not cache.layers


@pytest.mark.slow
@pytest.mark.parametrize("host", ["llama", "gpt2"])
@pytest.mark.parametrize("knobs", [{}, {"zero_token": False}])
def test_decoding_compiles_as_one_graph_for_all_steps(host, knobs):
    model, ids = looped(host, **knobs), tokens(2, 8)
    counter, cache, found = CompileCounter(), StaticCache(config=model.config, max_cache_len=10), []
    torch._dynamo.reset()
    step = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        model(ids[:, :3], cache=cache, use_cache=True)
        for i in range(3, 8):
            inputs = model.prepare_inputs_for_generation(
                ids[:, : i + 1],
                next_sequence_length=1,
                cache=cache,
                attention_mask=torch.ones(2, i + 1, dtype=torch.long),
                position_ids=torch.full((2, 1), i),
                use_cache=True,
            )
            found.append(step(**inputs, return_dict=True).logits)
        want = model(ids, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(torch.cat(found, 1), want, atol=1e-4, rtol=0)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_generation_compiles_and_exits_are_kept_out_of_the_graph():
    model = looped(host_overrides={"num_hidden_layers": 3})
    want = {asked: model.generate(**padded(), **GREEDY, exit_threshold=asked) for asked in (None, 0.15)}
    for asked, whole in ((None, True), (0.15, False)):
        torch._dynamo.reset()
        compiled = CompileConfig(backend="eager", mode=None, fullgraph=whole)
        compiled._compile_all_devices = True
        knobs = {"cache_implementation": "static", "compile_config": compiled, "exit_threshold": asked}
        assert torch.equal(model.generate(**padded(), **GREEDY, **knobs), want[asked])
    compiled.fullgraph = True
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave early compiles to no single graph"):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens(), exit_threshold=0.15)
    torch._dynamo.reset()
