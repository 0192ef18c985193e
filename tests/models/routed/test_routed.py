"""A routed model beside plain models of the same weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from models.routed.support_routed import HOSTS, experts_of, host, prompts, routed
from modicum.errors import CheckpointError, ModicumError, RecipeError, UnsupportedError
from modicum.models import RoutedConfig, RoutedForCausalLM
from modicum.models.routed import route_experts
from modicum.models.routed.requests import groups_of
from modicum.weights.expert_plan import Experts
from modicum.weights.mediator import build_experts

ONE_HOT = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def plain(model, weights, kind="llama"):
    """A host of its own that holds the mixture."""
    other = host(kind)
    other.load_state_dict(model.experts.state_dict(weights), strict=False)
    return other


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("weights", [[1.0, 0, 0], [0.2, 0.3, 0.5], [1 / 3] * 3])
def test_the_host_computes_with_the_mixture(kind, weights):
    model, ids = routed(kind), prompts()
    other = plain(model, weights, kind)
    assert torch.equal(model(ids, weights=weights).logits, other(ids).logits)
    assert torch.equal(model.generate(ids, weights=weights, **GREEDY), other.generate(ids, **GREEDY))
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, weights=weights, **beams), other.generate(ids, **beams))


@pytest.mark.parametrize("store", ["sign", "random_rescaled", "magnitude", "low_rank", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_switch_and_back_restores_every_bit_in_the_same_memory(store, dtype):
    model = routed(sparsifier=store, router=False)
    model.host.to(dtype)
    places = {name: p.data_ptr() for name, p in model.host.named_parameters()}

    def bits():
        return {name: p.detach().clone() for name, p in model.host.named_parameters()}

    model.working.current = ()
    model.materialise([1 / 3] * 3)
    dense = bits()
    for weights in ([1, 0, 0], [0.25, 0.75, 0]):
        model.materialise(weights)
        first = bits()
        for other in ONE_HOT:
            model.materialise(other)
        model.materialise(weights)
        assert all(torch.equal(a, first[name]) for name, a in bits().items())
        model.working.dense()
        assert all(torch.equal(a, dense[name]) for name, a in bits().items())
    assert places == {name: p.data_ptr() for name, p in model.host.named_parameters()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_reach_a_cuda_device_as_they_are_made(dtype):
    model, plain_one = routed(router=False), routed(router=False)
    plain_one.to(dtype)
    model.to("cuda", dtype)
    for weights in (*ONE_HOT, [0.5, 0.25, 0.25], [1 / 3] * 3, ONE_HOT[0]):
        model.materialise(weights)
        plain_one.materialise(weights)
        got = {name: target.cpu() for name, target in model.working.targets.items()}
        assert all(torch.equal(got[name], target) for name, target in plain_one.working.targets.items())


def test_mixtures_used_before_are_copied_within_the_memory_that_is_given():
    base, experts = experts_of()
    built = build_experts(base, experts, ["model.layers.0"], sparsifier="sign")
    size = route_experts(host(), built).working.size
    model = route_experts(host(), built, memory_bytes=2 * size)
    first = {}
    for t in (0, 1, 0, 1, 2, 0):
        model.materialise(ONE_HOT[t])
        now = torch.cat([x.flatten() for x in model.working.targets.values()])
        assert torch.equal(now, first.setdefault(t, now.clone()))
    assert model.working.written == 4  # 0, 1, 2, and 0 again, which had to make room
    assert len(model.working._copies) == 2


def test_each_prompt_gets_its_own_expert_whatever_the_company_and_the_padding():
    model, ids = routed(), prompts(6)
    routes = model.route(ids)
    assert routes.weights.argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
    together = model.generate(ids, **GREEDY)
    for i, row in enumerate(ids):
        alone = model.generate(row[None], **GREEDY)
        assert torch.equal(alone[0], together[i, : alone.shape[1]])
        torch.testing.assert_close(model.route(row[None]).weights[0], routes.weights[i])
    padded = torch.cat([torch.zeros(6, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(8) >= 3).long().expand(6, 8)
    torch.testing.assert_close(model.route(padded, mask).weights, routes.weights, atol=1e-6, rtol=0)
    left = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(left[:, 3:], together[:, : left.shape[1] - 3])


def test_padding_changes_no_route_of_a_host_with_absolute_positions():
    model, ids = routed("gpt2", layers=slice(1, None)), prompts(3)
    model.config.routing = {**model.config.routing, "tap": 1}
    padded = torch.cat([torch.zeros(3, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(8) >= 3).long().expand(3, 8)
    torch.testing.assert_close(model.features(padded, mask), model.features(ids), atol=1e-6, rtol=1e-5)


def test_a_batch_of_several_experts_is_answered_as_one_by_one():
    model, ids = routed(), prompts(4)
    rows = torch.tensor([*ONE_HOT, [1 / 3] * 3])
    whole = model(ids, weights=rows).logits
    for i in range(4):
        torch.testing.assert_close(whole[i : i + 1], model(ids[i : i + 1], weights=rows[i]).logits)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 2, 1]])
def test_what_is_asked_of_a_batch_is_given_for_the_rows_of_every_expert(order):
    model, ids = routed(), prompts(4)
    model.config._attn_implementation = "eager"  # which gives its weights; set on the outer configuration alone
    model.config.output_hidden_states = True
    rows = torch.tensor([*ONE_HOT, [1 / 3] * 3])[order]
    whole = model(ids, weights=rows, output_attentions=True)
    assert len(whole.hidden_states) == 4 and len(whole.attentions) == 3
    for i in range(4):
        alone = model(ids[i : i + 1], weights=rows[i], output_attentions=True)
        for name in ("logits", "hidden_states", "attentions"):
            got = whole[name] if name == "logits" else torch.stack(whole[name], 1)
            want = alone[name] if name == "logits" else torch.stack(alone[name], 1)
            torch.testing.assert_close(got[i : i + 1], want)
    assert isinstance(model(ids, weights=rows, return_dict=False), tuple)


def test_a_folder_goes_by_transformers_name_and_attention_is_chosen_in_both_configurations(tmp_path):
    model = routed()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(pretrained_model_name_or_path=tmp_path, attn_implementation="eager")
    assert again.config._attn_implementation == again.host.config._attn_implementation == "eager"


def test_near_mixtures_are_one_and_many_experts_weigh_alike():
    rows = torch.tensor([[1 / 6] * 6, [0.1667, 0.1667, 0.1667, 0.1667, 0.1666, 0.1666], [1.0, 0, 0, 0, 0, 0]])
    groups = groups_of(rows.double())
    assert list(groups.values()) == [[0, 1], [2]]
    about = Experts([f"e{i}" for i in range(6)], [])
    assert all(len(about.coefficients(weights)) == 6 for weights in groups)
    assert about.coefficients(next(iter(groups))) == [0.0] * 6


def test_a_cache_keeps_the_weights_that_filled_it():
    model, ids = routed(), prompts(1)
    first = model(ids, use_cache=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    chosen = model.route(ids).weights[0].tolist()
    key = "cache" if hasattr(first, "cache") else "past_key_values"
    model.materialise([0, 0, 1.0])  # another request in between
    following = model(torch.tensor([[30]]), **{key: cache}).logits
    whole = plain(model, chosen)(torch.cat([ids, torch.tensor([[30]])], 1)).logits
    torch.testing.assert_close(following[:, -1], whole[:, -1], atol=1e-5, rtol=1e-5)
    with pytest.raises(RecipeError, match="weights changed within a request"):
        model(torch.tensor([[31]]), weights=[0, 0, 1.0], **{key: cache})


def test_rows_that_ended_leave_a_cache():
    model, ids = routed(), prompts(1).repeat(3, 1)
    first = model(ids, weights=ONE_HOT[0], use_cache=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    cache.batch_select_indices(torch.tensor([0]))
    key = "cache" if hasattr(first, "cache") else "past_key_values"
    assert model(torch.tensor([[30]]), weights=ONE_HOT[0], **{key: cache}).logits.shape[0] == 1


def test_a_model_that_moves_takes_its_mixtures_along():
    model, ids = routed(), prompts(1)
    model.to(torch.float64)
    got = model(ids, weights=ONE_HOT[1]).logits
    other = plain(model, ONE_HOT[1]).double()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, other(ids).logits, atol=1e-5, rtol=1e-4)


def test_generation_goes_on_from_a_cache_with_its_weights():
    model, ids = routed(), prompts(1)
    cache = DynamicCache(config=model.host.config)
    first = model.generate(ids, cache=cache, return_dict_in_generate=True, **GREEDY)
    more = torch.cat([first.sequences, torch.tensor([[35, 36, 37]])], 1)  # words of another task
    chosen = model.route(ids).weights[0].tolist()
    got = model.generate(more, cache=cache, **GREEDY)
    assert torch.equal(got, plain(model, chosen).generate(more, **GREEDY))


def test_a_saved_model_is_loaded_bit_for_bit_in_another_process(tmp_path):
    model, ids = routed(), prompts(3)
    model.materialise(ONE_HOT[1])  # what is in use does not count
    model.save_pretrained(tmp_path / "one")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert isinstance(found, RoutedForCausalLM)
    assert torch.equal(found.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    found.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "experts.safetensors", "router.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    code = (
        "import sys, torch, modicum.models; from transformers import AutoModelForCausalLM as A;"
        f"print(A.from_pretrained(sys.argv[1]).generate(torch.tensor({ids.tolist()}), max_new_tokens=6,"
        " do_sample=False).tolist())"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "two")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == model.generate(ids, **GREEDY).tolist()
    sizes = sum(t.nbytes for t in load_file(tmp_path / "one" / "experts.safetensors").values())
    assert sizes == model.experts.nbytes


def saved(tmp_path):
    routed().save_pretrained(tmp_path)
    return tmp_path


def changed(path, **fields):
    config = json.loads((path / "config.json").read_text())
    config.update(fields)
    (path / "config.json").write_text(json.dumps(config))


def test_a_damaged_folder_is_refused_by_name(tmp_path):
    path = saved(tmp_path)
    parts = load_file(path / "experts.safetensors")
    parts[next(name for name in parts if name.endswith("alpha"))] += 1
    save_file(parts, path / "experts.safetensors")
    with pytest.raises(CheckpointError, match="experts.safetensors has another checksum"):
        RoutedForCausalLM.from_pretrained(path)


def test_a_folder_with_a_file_missing_is_refused_by_name(tmp_path):
    path = saved(tmp_path)
    (path / "router.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks router.safetensors"):
        RoutedForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_filled_up_as_the_host_does(kind):
    """Of a host without a token for padding, prompts of several experts end early and late."""
    model, ids = routed(kind, router=False), prompts(6)
    model.generation_config.pad_token_id = model.host.config.pad_token_id = None
    rows = torch.tensor(ONE_HOT * 2)
    alone = [
        plain(model, rows[i].tolist(), kind).generate(
            ids[i : i + 1], max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        for i in range(6)
    ]
    # A token that some answers reach early ends them, and nothing else does.
    ends = int(alone[0][0, 6])
    options = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=[ends, 38])
    for more in ({"generation_config": options}, {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ends}):
        got = model.generate(ids, weights=rows, **more)
        assert len({int((row == ends).sum()) for row in got}) > 1
        for i in range(6):
            want = plain(model, rows[i].tolist(), kind)
            want.generation_config.pad_token_id = None
            answer = want.generate(ids[i : i + 1], **more)[0]
            assert torch.equal(got[i, : len(answer)], answer) and (got[i, len(answer) :] == ends).all()


def test_only_what_has_a_row_for_each_prompt_is_split_by_prompts():
    model, ids = routed(router=False), prompts(3)
    rows = torch.tensor(ONE_HOT)
    given = {"eos_token_id": torch.tensor([36, 37, 38]), "max_new_tokens": 8, "do_sample": False}
    got = model.generate(ids, weights=rows, **given)
    for i in range(3):
        alone = plain(model, ONE_HOT[i]).generate(ids[i : i + 1], **given)[0]
        assert torch.equal(got[i, : len(alone)], alone)
    kept = torch.tensor([0, 2, 4])  # places whose logits are wanted: as many as rows, and no rows
    logits = model(ids, weights=rows, logits_to_keep=kept).logits
    for i in range(3):
        whole = model(ids[i : i + 1], weights=rows[i]).logits
        torch.testing.assert_close(logits[i], whole[0, kept])


def test_experts_of_another_generator_or_host_are_refused(tmp_path):
    path = saved(tmp_path)
    about = json.loads((path / "config.json").read_text())["experts"]
    changed(path, experts={**about, "generator": 99})
    with pytest.raises(CheckpointError, match="version 99 of the generator"):
        RoutedForCausalLM.from_pretrained(path)
    model = routed(router=False)
    with pytest.raises(CheckpointError, match="built for another"):
        RoutedForCausalLM(RoutedConfig(host=host("gpt2").config), host=host("gpt2"), experts=model.experts)


def test_a_router_that_says_nothing_leaves_the_dense_model():
    model, ids = routed(), prompts(2)
    bias = model.router.tensors["bias"] * torch.nan
    model.router = type(model.router)("linear", 3, {**model.router.tensors, "bias": bias})
    with pytest.warns(RuntimeWarning, match="not finite"):
        routes, answers = model.route(ids), model.generate(ids, **GREEDY)
    assert routes.dense.all()
    assert torch.equal(answers, plain(model, [1 / 3] * 3).generate(ids, **GREEDY))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.generate(x, weights=[1.0, 0]), "expected 3"),
        (lambda m, x: m.materialise([0.5, 0.6, 0.7]), "sum to 1"),
        (lambda m, x: m.resize_token_embeddings(50), "vocabulary of a routed model"),
        (lambda m, x: m.generate(x, return_dict_in_generate=True, max_new_tokens=1), "no common output object"),
        (lambda m, x: m(x, labels=x), "no cache and no loss"),
        (lambda m, x: RoutedConfig(routing={"temperature": 0}), "temperature is 0"),
        (lambda m, x: RoutedConfig(routing={"selection": "best"}), "selection 'best'"),
        (lambda m, x: RoutedConfig(routing={"pool": "mean"}), "no field 'pool'"),
        (lambda m, x: RoutedForCausalLM.from_pretrained("/nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ModicumError, match=message) as caught:
        call(routed(), prompts(3))
    assert "\n" not in str(caught.value)


def test_packed_weights_are_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="packed numbers"):
        RoutedForCausalLM.from_pretrained(tmp_path, quantization_config={"load_in_4bit": True})


def test_a_fresh_routed_model_is_its_host():
    model = RoutedForCausalLM(RoutedConfig(host=host().config))
    ids = prompts()
    assert torch.equal(model(ids).logits, model.host(ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY), model.host.generate(ids, **GREEDY))
