"""Looped models through the jobs: from scratch, by conversion, with an adapter, and with exits chosen on text."""

import json
from pathlib import Path

import pytest
import torch

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.loading.models import load_model
from modicum.jobs.training.extra_modules import additions
from modicum.models import ZeroTokenForCausalLM, convert_to_zero_token
from modicum.recipe import parse, read
from modicum.record import read_log, read_record
from support import tiny_llama

LOOP = {"name": "zero_token", "n_head": 0, "n_tail": 1, "n_cycles": 2, "zero_key_init_std": 1.0}
TRAINER = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} is less than {i + 1}; " * 4}) + "\n" for i in range(12)))
    return {"path": str(path), "max_length": 32, "packing": True}


def train(folder, model, text, **changes):
    recipe = {"job": "train", "model": model, "data": text, "trainer": TRAINER | changes.pop("trainer", {})}
    return execute(parse(recipe | changes), folder, quiet=True)


def loss(model):
    ids = torch.arange(3, 35)[None]
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss.detach())


def test_random_weights_depend_on_the_seed_and_on_the_fields_that_were_changed(text, tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = {"path": "builtin:byte-llama", "scratch": shape, "convert": LOOP | {"n_head": 1}}
    still = {"max_steps": 1, "learning_rate": 0.0}
    runs = [train(tmp_path / str(i), model, text, seed=seed, trainer=still) for i, seed in enumerate((0, 0, 1))]
    a, b, c = (load_model(run.folder / "model") for run in runs)
    assert a.config.hidden_size == 16 and a.config.host.num_hidden_layers == 3 and a.config.depth == 2
    assert a.config.host.head_dim == 8
    assert loss(a) == loss(b) != loss(c)
    assert "random weights" in plan(runs_recipe(model, text))[0]


def runs_recipe(model, text):
    return parse({"job": "train", "model": model, "data": text, "trainer": TRAINER})


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"scratch": {"hiden_size": 4}}, {}, "hidden_size"),
        ({"scratch": {"hidden_size": 30}}, {}, "scratch"),
        ({"scratch": {}}, {"adapter": {"rank": 2}}, "random weights"),
    ],
)
def test_shapes_that_cannot_be_made_are_refused(text, tmp_path, model, changes, message):
    with pytest.raises(RecipeError, match=message):
        train(tmp_path / "r", {"path": "builtin:byte-llama"} | model, text, **changes)


def test_the_builtin_shape_has_no_weights_to_load():
    with pytest.raises(CheckpointError, match="no weights"):
        load_model("builtin:byte-llama")


@pytest.fixture(scope="module")
def adapted(tiny_model, text, tmp_path_factory):
    model = {"path": str(tiny_model), "convert": LOOP}
    config = {"target_modules": ["q_proj"]}
    return train(tmp_path_factory.mktemp("adapted"), model, text, adapter={"rank": 2, "config": config}).folder


def test_an_adapter_on_a_converted_model_trains_and_saves_the_zero_tokens(adapted):
    from peft import PeftModel

    config = json.loads((adapted / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["zero_token"] and Path(config["base_model_name_or_path"]).is_absolute()
    base, whole = load_model(adapted / "base"), load_model(adapted / "adapter")
    assert base.config.n_cycles == 2
    assert not torch.equal(whole.base_model.model.zero_token()["zero_key"], base.zero_token.zero_key)
    assert loss(whole) != loss(base)
    assert loss(PeftModel.from_pretrained(base, adapted / "adapter").eval()) == loss(whole)


def test_a_users_own_modules_are_saved_beside_the_zero_tokens(tiny_model, text, tmp_path):
    config = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    model = {"path": str(tiny_model), "convert": LOOP}
    run = train(tmp_path / "r", model, text, adapter={"rank": 2, "config": config}, trainer={"max_steps": 1})
    found = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert found["modules_to_save"] == ["norm", "zero_token"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_weight_decay_leaves_the_zero_tokens_alone(wrapped, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from modicum.jobs.training.trainer import PartsTrainer

    model = convert_to_zero_token(tiny_llama(), n_head=0, cycle_gate="rezero", cycle_embedding="add")
    if wrapped:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=list(additions(model)))
        model = get_peft_model(model, config)
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True)
    added = {"zero_key", "cycle_gate", "cycle_embedding"}
    trainer = PartsTrainer(model=model, args=arguments)
    for each in (Trainer(model, arguments), trainer):
        decayed = {name.rpartition(".")[2] for name in each.get_decay_parameter_names(model)}
        assert decayed and not decayed & added
    groups = trainer.create_optimizer().param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    undecayed = {names[id(p)].rpartition(".")[2] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {"zero_key", "cycle_gate", "cycle_embedding"} <= undecayed
    assert any("q_proj" in names[id(p)] for g in groups if g["weight_decay"] for p in g["params"])


@pytest.mark.parametrize("adapter", [None, {"rank": 2}])
def test_a_model_that_grows_learns_the_step_from_the_trainer(tiny_model, text, tmp_path, adapter, monkeypatch):
    told = []
    tell = ZeroTokenForCausalLM.set_training_step
    monkeypatch.setattr(
        ZeroTokenForCausalLM, "set_training_step", lambda self, *step: told.append(step) or tell(self, *step)
    )
    model = {"path": str(tiny_model), "convert": LOOP | {"train_cycles": "grow"}}
    train(tmp_path / "r", model, text, adapter=adapter)
    assert told == [(0, 2), (1, 2)]


def test_exits_are_chosen_on_text_and_the_model_leaves_by_them(adapted, text, tmp_path):
    recipe = {"job": "calibrate", "model": str(adapted / "adapter"), "data": text, "candidates": 3}
    run = execute(parse(recipe | {"max_loss_increase": 100.0}), tmp_path / "r", quiet=True)
    metrics = read_record(run.folder)["metrics"]
    chosen = metrics["criteria"]["zero_attention"]
    assert chosen["visits"] == min(found["visits"] for found in metrics["criteria"].values())
    assert metrics["best"] in ("zero_attention", "gate", "latent", "random")  # the others run the tail for each cycle
    assert metrics["criteria"]["confidence"]["visits"] > chosen["visits"]
    assert chosen["mean_cycles"] == 1.0 and chosen["loss"] == pytest.approx(metrics["loss_by_cycles"][0], abs=1e-5)
    assert chosen["full_loss"] == pytest.approx(metrics["loss_by_cycles"][1], abs=1e-5)
    assert len(read_log(run.folder, "exit")) == 5 * 4 + 2  # of two cycles, entropy and prediction cannot be compared
    model = load_model(run.folder / "model")
    assert model.config.exit_criterion == metrics["best"] and model.config.exit_scope == "token"
    assert model.config.exit_threshold == metrics["criteria"][metrics["best"]]["threshold"]
    assert "exit_threshold" not in (run.folder / "model/config.json").read_text()
    scores = {
        "job": "evaluate",
        "model": str(run.folder / "model"),
        "tasks": {"t": {"kind": "perplexity", "data": text}},
    }
    (cell,) = execute(parse(scores), tmp_path / "e", quiet=True).record["metrics"]["cells"]
    assert cell["spent"]["mean_cycles"] < 2 and cell["spent"]["visits_saved"] > 0 and cell["spent"]["tokens"] > 0
    out = model(torch.arange(3, 35)[None])
    assert out.layer_calls < model.config.num_hidden_layers


def test_a_loop_that_may_cost_nothing_stays_as_it_is_or_gets_better(adapted, text, tmp_path):
    recipe = {"job": "calibrate", "model": str(adapted / "adapter"), "data": text, "candidates": 3}
    run = execute(parse(recipe | {"max_loss_increase": 0.0, "criteria": ["random"]}), tmp_path / "r", quiet=True)
    chosen = read_record(run.folder)["metrics"]["criteria"]["random"]
    assert chosen["loss"] <= chosen["full_loss"]


def test_visits_that_matter_least_are_left_out(adapted, text, tmp_path):
    recipe = {"job": "calibrate", "model": str(adapted / "adapter"), "data": text, "candidates": 1}
    recipe |= {"criteria": ["random"], "importance": True}
    run = execute(parse(recipe), tmp_path / "r", quiet=True)
    found = read_record(run.folder)["metrics"]["importance"]
    assert {(v["layer"], v["cycle"]) for v in found["visits"]} == {(0, 0), (0, 1)}
    with pytest.raises(RecipeError, match="only 0 can be"):  # the one visit of a cycle stays
        execute(parse(recipe | {"prune": 1}), tmp_path / "p", quiet=True)
    assert "skip each visit" in plan(parse(recipe))[0]


def test_a_plain_model_has_no_exits_to_choose(tiny_model, text, tmp_path):
    recipe = {"job": "calibrate", "model": str(tiny_model), "data": text}
    for ask in (plan, lambda recipe: execute(recipe, tmp_path / "r", quiet=True)):
        with pytest.raises(UnsupportedError, match="Convert one first"):
            ask(parse(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero-token-pretrain", "zero-token-convert"])
def test_the_shipped_recipes_run(name, tmp_path):
    recipe = read(name)
    for stage in recipe["stages"]:
        if stage["job"] == "train":
            stage["trainer"] |= {"max_steps": 2, "warmup_steps": 0, "save_strategy": "no"}
            stage["data"] |= {"size": 2, "max_length": 32}
        elif stage["job"] == "calibrate":
            stage["candidates"] = 1
            stage["data"] |= {"size": 1, "max_length": 32, "packing": False}
        else:
            stage["tasks"]["code"] |= {"max_bytes": 50}
            stage["tasks"]["code"]["data"] |= {"size": 2, "max_length": 32}
    run = execute(parse(recipe), tmp_path / "run", quiet=True)
    scores = run.record["metrics"]["scores"]["cells"]
    assert {cell["model"] for cell in scores} >= {"plain", "looped", "looped with exits"}
    assert all(cell["value"] > 0 for cell in scores)
