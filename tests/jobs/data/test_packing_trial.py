"""`modicum check` finds out whether packed samples are kept apart before weights are read, and says what a run says."""

import json
import shutil

import pytest
from test_packing import BY_MASK, BY_POSITION, REFUSED, SIZES, made

from modicum.errors import UnsupportedError
from modicum.jobs import plan
from modicum.jobs.data.packing_trial import LATER, few_layers, foresee
from modicum.recipe import parse
from support import byte_tokenizer

QUICK = ["llama", "gpt2", "gpt_oss", "mamba", "jamba", "qwen3_next"]
ALL = {**BY_POSITION, **BY_MASK, **REFUSED}


@pytest.fixture
def folder(tmp_path):
    def make(kind, **fields):
        made(kind, ALL[kind] | {"vocab_size": 264} | fields).save_pretrained(tmp_path / kind)
        byte_tokenizer().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


def assert_as_in_a_run(kind, path):
    if kind in REFUSED:
        with pytest.raises(UnsupportedError, match=f"with {kind} .* Set packing: false"):
            foresee(str(path), max_length=20)
    else:
        assert foresee(str(path), max_length=20) is None


@pytest.mark.parametrize("kind", QUICK)
def test_the_trial_says_what_the_run_says(folder, kind):
    assert_as_in_a_run(kind, folder(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in QUICK])
def test_the_trial_says_what_the_run_says_of_every_architecture(folder, kind):
    assert_as_in_a_run(kind, folder(kind))


def test_one_layer_of_each_kind_is_left():
    from transformers import AutoConfig

    plain = AutoConfig.for_model("llama", **SIZES | {"num_hidden_layers": 30})
    assert few_layers(plain).num_hidden_layers == 2
    sparse = AutoConfig.for_model("jamba", **SIZES | {"num_hidden_layers": 32})
    assert few_layers(sparse).num_hidden_layers == 8  # attention at each eighth layer
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    mixed = AutoConfig.for_model("qwen3_next", **SIZES | {"num_hidden_layers": 12, "layer_types": kinds * 3})
    assert few_layers(mixed).layer_types == kinds


def twin(path):
    return str(shutil.copytree(path, path.with_name(f"{path.name}-2"), dirs_exist_ok=True))


@pytest.mark.parametrize("job", ["train", "statistics", "average"])
def test_check_refuses_for_every_job_that_packs(folder, tmp_path, job):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}", "completion": "ab"}) + "\n" for n in range(12)))
    data = {"path": str(rows), "max_length": 40, "packing": True}
    recipes = {
        "train": lambda path: {"model": str(path), "trainer": {"max_steps": 1}},
        "statistics": lambda path: {"model": str(path), "kind": "fisher"},
        "average": lambda path: {"checkpoints": [str(path), twin(path)], "method": "greedy"},
    }
    leaking, apart = folder("bloom", hidden_size=32), folder("llama")
    with pytest.raises(UnsupportedError, match="with bloom .* Set packing: false"):
        plan(parse({"job": job, "data": data} | recipes[job](leaking)))
    assert not any(LATER in line for line in plan(parse({"job": job, "data": data} | recipes[job](apart))))


def test_a_model_too_large_for_a_trial_is_left_to_the_run(folder, monkeypatch):
    monkeypatch.setattr("modicum.jobs.data.packing_trial.LARGEST", 1000)
    assert foresee(str(folder("llama")), max_length=20) == LATER
