"""A looped model leaves as a plain one."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from models.zero_token.support_zero import ALL_HOSTS, looped, tokens
from modicum.errors import UnsupportedError
from modicum.jobs import execute
from modicum.jobs.loading.models import load_tokenizer
from modicum.models.zero_token.export import column_cache, unroll, zero_columns
from modicum.recipe import parse

KNOBS = {
    "cycles": {},
    "low-rank terms": {"lora_rank": 2},
    "sequence": {"order": "sequence"},
    "explicit": {"order": [0, 1, 2, 1, 2, 2, 3]},
    "eager": {},
}


@pytest.mark.parametrize("host", ALL_HOSTS)
@pytest.mark.parametrize("name", ["cycles", "low-rank terms"])
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


LOADS = """import sys, torch
from transformers import AutoModelForCausalLM
assert "modicum" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.tensor([[3, 4, 5]])).logits, sys.argv[2])
"""


def test_the_job_writes_what_stock_transformers_loads(tmp_path):
    model = looped("llama", host_overrides={"vocab_size": 264}, zero_token=False)
    model.save_pretrained(tmp_path / "looped")
    load_tokenizer("builtin:byte-llama").save_pretrained(tmp_path / "looped")
    recipe = parse({"job": "export", "model": str(tmp_path / "looped"), "format": "unrolled"})
    execute(recipe, str(tmp_path / "run"), quiet=True)
    folder = tmp_path / "run" / "model"
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), LlamaForCausalLM)
    assert "modicum" not in (folder / "config.json").read_text()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 8
    subprocess.run([sys.executable, "-c", LOADS, str(folder), str(tmp_path / "logits.pt")], check=True)
    want = model(torch.tensor([[3, 4, 5]])).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, atol=2e-4, rtol=0)


def test_the_job_refuses_a_plain_model(tmp_path, tiny_model):
    recipe = parse({"job": "export", "model": str(tiny_model)})
    with pytest.raises(UnsupportedError, match="no looped model"):
        execute(recipe, str(tmp_path / "run"), quiet=True)
