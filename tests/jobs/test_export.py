"""A looped model leaves as a plain one."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from models.zero_token.support_zero import ALL_HOSTS, looped, tokens
from modicum.errors import UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.loading.models import load_tokenizer
from modicum.models.zero_token.export import column_cache, hold, unroll, zero_columns
from modicum.recipe import parse

KNOBS = {
    "cycles": {},
    "low-rank terms": {"lora_rank": 2},
    "sequence": {"order": "sequence"},
    "explicit": {"order": [0, 1, 2, 1, 2, 2, 3]},
    "eager": {},
}


@pytest.mark.parametrize("host", ALL_HOSTS)
@pytest.mark.parametrize("name", ["low-rank terms"])  # without them in the guide's table of hosts
def test_an_unrolled_model_is_a_plain_one_with_the_same_logits(host, name):
    model = looped(host, zero_token=False, **KNOBS[name])
    plain = unroll(model)
    assert type(plain).__module__.startswith("transformers.") and plain.config.num_hidden_layers == 8
    torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["sequence", "explicit"])
def test_other_orders_and_fewer_cycles_unroll_too(name):
    model = looped(zero_token=False, **KNOBS[name])
    torch.testing.assert_close(unroll(model)(tokens()).logits, model(tokens()).logits, atol=2e-4, rtol=0)
    model = looped(zero_token=False)
    fewer = model(tokens(), n_cycles=2).logits
    torch.testing.assert_close(unroll(model, n_cycles=2)(tokens()).logits, fewer, atol=2e-4, rtol=0)


@pytest.mark.parametrize("host", ["llama", "qwen3", "gpt2", "olmo2"])
def test_zero_tokens_in_all_layers_are_a_column_of_the_cache(host):
    model = looped(host, zero_layers="all")
    plain = unroll(model)
    cache = column_cache(plain, zero_columns(model), 2)
    positions, mask = torch.arange(7)[None].expand(2, -1), torch.ones(2, 8, dtype=torch.long)
    got = plain(tokens(), cache=cache, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(got, model(tokens()).logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "knobs",
    [
        {"cycle_gate": "rezero"},
        {"cycle_embedding": "add"},
        {"loop_connection": "anchor"},
        {"ffn_gate": "zero_attention"},
        {"zero_bias": True},
        {"cache_policy": "share_first"},
    ],
)
def test_what_no_plain_layer_does_is_refused_by_name(knobs):
    with pytest.raises(UnsupportedError, match=next(iter(knobs))):
        unroll(looped(**knobs))
    with pytest.raises(UnsupportedError, match="all layers or in none"):
        zero_columns(looped())


@pytest.mark.parametrize(
    ("host", "knobs", "said"),
    [
        ("llama", {}, "all layers or in none"),
        ("mistral", {"zero_layers": "all"}, "window"),
        ("gemma3_text", {"zero_layers": "all"}, "window"),
        ("llama", {"zero_layers": "all", "zero_kind": "sink"}, "no key"),
    ],
)
def test_zero_tokens_that_no_column_holds_are_refused_before_the_work(host, knobs, said, tmp_path):
    model = looped(host, **knobs)
    with pytest.raises(UnsupportedError, match=said):
        unroll(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=said):
        plan(parse({"job": "export", "model": str(tmp_path)}))


def test_a_host_whose_layers_depend_on_their_place_is_not_unrolled(monkeypatch):
    scaled = looped("gpt2", host_overrides={"scale_attn_by_inverse_layer_idx": True}, zero_token=False)
    with pytest.raises(UnsupportedError, match="number of its layer"):
        unroll(scaled)
    monkeypatch.setattr("modicum.models.zero_token.export.check_unrollable", lambda _: None)
    with pytest.raises(UnsupportedError, match="depend on their place"):
        unroll(scaled)


LOADS = """import sys, torch
from transformers import AutoModelForCausalLM
assert "modicum" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.tensor([[3, 4, 5]])).logits, sys.argv[2])
"""


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_job_writes_what_stock_transformers_loads(alone, tmp_path):
    model = looped("llama", host_overrides={"vocab_size": 264}, zero_token=False)
    model.save_pretrained(tmp_path / "looped")
    load_tokenizer("builtin:byte-llama").save_pretrained(tmp_path / "looped")
    recipe = parse({"job": "export", "model": str(tmp_path / "looped"), "format": "unrolled"})
    execute(recipe, str(tmp_path / "run"), quiet=True)
    folder = tmp_path / "run" / "model"
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), LlamaForCausalLM)
    assert "modicum" not in (folder / "config.json").read_text()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 8
    if alone:
        subprocess.run([sys.executable, "-c", LOADS, str(folder), str(tmp_path / "logits.pt")], check=True)
        want = model(torch.tensor([[3, 4, 5]])).logits
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, atol=2e-4, rtol=0)


# Loads a folder where none of our packages is, uses it, saves it again and loads that.
ALONE = """import importlib.abc, pickle, sys, torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modicum", "jaxtyping", "annotated_types"):
            raise ImportError(name + " is absent")

sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM
folder, found = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor([[3, 4, 5, 6]])
knobs = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
new, drafted = model.generate(ids, **knobs), model.generate(ids, assistant_early_exit=1, **knobs)
assert torch.equal(new, drafted)
model.save_pretrained(found + "-again")
again = AutoModelForCausalLM.from_pretrained(found + "-again", trust_remote_code=True).eval()
assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-6)
assert torch.allclose(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits, atol=1e-6)
torch.save({"logits": model(ids).logits.detach(), "new": new, "cycles": model(ids).cycles}, found)
model.train()(ids, labels=ids).loss.backward()
"""


@pytest.mark.parametrize(
    ("host", "knobs"),
    [
        ("llama", {"exit_threshold": 0.12}),
        pytest.param("gpt2", {"lora_rank": 2, "ffn_gate": "zero_attention"}, marks=pytest.mark.slow),
        pytest.param("gemma3_text", {"zero_key_rope": "relative"}, marks=pytest.mark.slow),
    ],
)
def test_a_model_with_its_code_runs_where_modicum_is_not(host, knobs, tmp_path):
    model = looped(host, host_overrides={"vocab_size": 264}, **knobs)
    model.save_pretrained(tmp_path / "looped")
    load_tokenizer("builtin:byte-llama").save_pretrained(tmp_path / "looped")
    recipe = parse({"job": "export", "model": str(tmp_path / "looped"), "format": "remote-code"})
    assert "code" in plan(recipe)[0]
    execute(recipe, str(tmp_path / "run"), quiet=True)
    found = tmp_path / "found"
    place = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    place["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "run/model"), str(found)], check=True, env=place)
    got, ids = torch.load(found), torch.tensor([[3, 4, 5, 6]])
    torch.testing.assert_close(got["logits"], model(ids).logits, atol=1e-5, rtol=0)
    assert torch.equal(got["cycles"], model(ids).cycles)
    assert torch.equal(got["new"], model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_a_plain_model_that_is_another_one_is_refused():
    model = looped(zero_layers="all", exit_threshold=0.12)
    plain, columns = unroll(model), zero_columns(model)
    assert hold(plain, model) < 1e-5 > hold(plain, model, columns=columns)
    columns["zero_key.2"] = columns["zero_key.2"] + 1
    with pytest.raises(UnsupportedError, match="differs"):
        hold(plain, model, columns=columns)
    plain.lm_head.weight.data[0] += 1
    with pytest.raises(UnsupportedError, match="differs"):
        hold(plain, model)


def test_cycles_to_unroll_and_code_do_not_go_together(tmp_path):
    looped().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="n_cycles"):
        plan(parse({"job": "export", "model": str(tmp_path), "format": "remote-code", "n_cycles": 2}))


def test_the_job_refuses_a_plain_model(tmp_path, tiny_model):
    recipe = parse({"job": "export", "model": str(tiny_model)})
    with pytest.raises(UnsupportedError, match="no looped model"):
        execute(recipe, str(tmp_path / "run"), quiet=True)
