"""What transformers' own tests of generation ask of a model, of the routed one beside hosts of the same weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from models.routed.support_routed import host, prompts, routed, weights_of
from modicum.errors import RecipeError
from modicum.models.routed import route_experts
from modicum.models.routed.mixed import Cost
from modicum.models.routed.requests import groups_of
from modicum.weights.expert_plan import Experts
from modicum.weights.experts import ExpertSet

HOSTS = ["llama", "gpt2"]
WEIGHTS = [0.25, 0.75, 0.0]
NEW = {"max_new_tokens": 6, "pad_token_id": 0}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.8},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beams, sampled": {"do_sample": True, "num_beams": 2, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "look-up": {"do_sample": False, "prompt_lookup_num_tokens": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


def plain(model, weights, kind):
    other = host(kind)
    other.load_state_dict(model.experts.state_dict(weights), strict=False)
    return other


def answered(model, ids, **knobs):
    torch.manual_seed(0)
    return model.generate(ids, **NEW, **knobs)


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_generate_is_the_host_s(kind, mode):
    model = routed(kind, router=False)
    ids = prompts(1 if mode == "look-up" else 3)
    want = answered(plain(model, WEIGHTS, kind), ids, **MODES[mode])
    assert torch.equal(answered(model, ids, weights=WEIGHTS, **MODES[mode]), want)


@pytest.mark.parametrize("kind", HOSTS)
def test_scores_states_and_attentions_are_the_host_s(kind):
    model, ids = routed(kind, router=False), prompts(2)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": False}
    asked |= {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    other = plain(model, WEIGHTS, kind)
    other.set_attn_implementation("eager")
    got, want = answered(model, ids, weights=WEIGHTS, **asked), answered(other, ids, **asked)
    assert torch.equal(got.sequences, want.sequences)
    for key in ("scores", "logits"):
        for a, b in zip(got[key], want[key], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    for key in ("hidden_states", "attentions"):
        for step, other_step in zip(got[key], want[key], strict=True):
            for a, b in zip(step, other_step, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", HOSTS)
def test_left_padding_and_embeddings_in_place_of_tokens(kind):
    model, ids = routed(kind, router=False), prompts(3)
    other = plain(model, WEIGHTS, kind)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
    mask = (torch.arange(7) >= 2).long().expand(3, 7)
    given = {"attention_mask": mask, "do_sample": False}
    got = answered(model, padded, weights=WEIGHTS, **given)
    assert torch.equal(got, answered(other, padded, **given))
    assert torch.equal(got[:, 2:], answered(model, ids, weights=WEIGHTS, do_sample=False))
    embeds = {"inputs_embeds": model.get_input_embeddings()(ids), "do_sample": False}
    assert torch.equal(answered(model, None, weights=WEIGHTS, **embeds), answered(other, None, **embeds))


def test_a_static_cache_gives_the_same_answer():
    model, ids = routed(router=False), prompts(1)
    want = answered(model, ids, weights=WEIGHTS, do_sample=False)
    cache = StaticCache(config=model.host.config, max_cache_len=16)
    assert torch.equal(model.generate(ids, weights=WEIGHTS, cache=cache, do_sample=False, **NEW), want)


def lora_experts(kind):
    """Three experts that are factors of every matrix of the blocks, and the plain weights of each."""
    base = weights_of(host(kind))
    rng = torch.Generator().manual_seed(3)
    layers = sorted({name.rpartition(".")[0].rsplit(".", 2)[0] for name in base if ".0." in name and "attn" in name})
    parts, wholes = {}, [dict(base) for _ in range(3)]
    for name, tensor in base.items():
        if tensor.ndim == 2 and any(place in name for place in (".h.", ".layers.")):
            for t in range(3):
                a, b = (torch.randn(s, generator=rng) * 0.3 for s in ((2, tensor.shape[1]), (tensor.shape[0], 2)))
                parts |= {f"{t}.{name}.A": a, f"{t}.{name}.B": b, f"{t}.{name}.scale": torch.tensor([0.5])}
                wholes[t][name] = tensor + 0.5 * b @ a
    return ExpertSet(Experts(["a", "b", "c"], layers, dense="base", store="lora"), base, parts), wholes


@pytest.mark.parametrize("kind", HOSTS)
def test_factors_beside_the_weights_are_the_whole_experts(kind):
    built, wholes = lora_experts(kind)
    model, ids = route_experts(host(kind), built), prompts(3)
    assert model.side is not None
    rows = torch.eye(3)
    logits, together = model(ids, weights=rows).logits, answered(model, ids, weights=rows, do_sample=False)
    beams = {"num_beams": 2, "do_sample": False}
    searched = answered(model, ids, weights=rows, **beams)
    for i, state in enumerate(wholes):
        other = host(kind)
        other.load_state_dict(state, strict=False)
        torch.testing.assert_close(logits[i], other(ids[i : i + 1]).logits[0], atol=1e-4, rtol=1e-4)
        for got, more in ((together, {"do_sample": False}), (searched, beams)):
            alone = answered(other, ids[i : i + 1], **more)[0]
            assert torch.equal(got[i, : len(alone)], alone)
    assert not model.host._forward_hooks  # what runs beside the weights is gone when nothing asks for it
    assert not any(module._forward_hooks for module in model.host.modules())


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_both_ways_of_a_mixed_batch_say_the_same_and_the_one_that_costs_less_is_taken(mode):
    built, _ = lora_experts("llama")
    model, ids, rows = route_experts(host(), built), prompts(6), torch.eye(3).repeat(2, 1)
    knobs = MODES[mode]
    found = {}
    for way in ("beside", "grouped", "measured"):
        model.mixed.way = way
        before = model.working.written
        found[way] = answered(model, ids, weights=rows, **knobs)
        assert way != "grouped" or model.working.written >= before + 2
    assert torch.equal(found["beside"], found["grouped"]) and torch.equal(found["measured"], found["beside"])
    assert len(model.mixed.costs) == 1
    [(shape, (beside, grouped))] = model.mixed.costs.items()
    assert all(cost.start > 0 and cost.step > 0 for cost in (beside, grouped))
    # What was measured once decides until the shape changes, by the length of the answer.
    cheap, dear = Cost(1.0, 0.0), Cost(0.0, 1.0)
    for costs, tokens, want in (((cheap, dear), 6, True), ((dear, cheap), 6, False), ((dear, cheap), 0, True)):
        model.mixed.costs[shape] = costs
        each = 1 if mode == "greedy" else 3
        assert model.mixed.beside(model, ids, rows, groups_of(rows), tokens=tokens, each=each) is want
    assert list(model.mixed.costs) == [shape]


def test_blends_are_the_same_ones_either_way():
    built, _ = lora_experts("llama")
    model, ids = route_experts(host(), built), prompts(3)
    rows = torch.tensor([[0.33349, 0.66651, 0.0], [0.0, 0.49951, 0.50049], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    logits = {}
    for way in ("beside", "grouped"):
        model.mixed.way = way
        logits[way] = model(ids, weights=rows, use_cache=False).logits
    torch.testing.assert_close(logits["beside"], logits["grouped"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["beside", "grouped"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0, 0, 0], [0, 1.0, 0]], r"weights are \[2, 3\], expected \(3\) for all requests or one row for each"),
        ([[1.0, 0], [0, 1.0], [1.0, 0]], "expected 3 that are not negative"),
        ([[1.0, 0, 0], [2.0, -1.0, 0], [0, 0, 1.0]], "expected 3 that are not negative"),
        ([[1.0, 0, 0], [0.5, 0, 0], [0, 0, 1.0]], "sum to 1"),
        ([float("nan"), 0, 1.0], "not negative"),
    ],
)
def test_what_are_no_weights_is_refused_either_way(way, weights, message):
    built, _ = lora_experts("llama")
    model = route_experts(host(), built)
    model.mixed.way = way
    for ask in (model, lambda *a, **k: model.generate(*a, **k, **NEW)):
        with pytest.raises(RecipeError, match=message):
            ask(prompts(3), weights=weights)


def test_what_rows_share_is_given_whatever_costs_less():
    built, _ = lora_experts("llama")
    model, ids, rows = route_experts(host(), built), prompts(3), torch.eye(3)
    model.mixed.way = "grouped"
    cached = model(ids, weights=rows)
    assert any(cached.get(name) is not None for name in ("cache", "past_key_values"))
    assert model.generate(ids, weights=rows, return_dict_in_generate=True, **NEW).sequences.shape == (3, 11)
    grouped = model(ids, weights=rows, use_cache=False).logits
    model.mixed.way = "beside"
    torch.testing.assert_close(grouped, model(ids, weights=rows, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(RecipeError, match="way 'fast' is not known"):
        model.mixed.way = "fast"


def test_a_loaded_folder_generates_through_the_auto_class(tmp_path):
    model, ids = routed(), prompts(4)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(answered(found, ids, do_sample=False), answered(model, ids, do_sample=False))
