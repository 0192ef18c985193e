import json
import shutil

import pytest
import torch

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.data.rows import DataSection, LabelledLogits, collate, load_rows, tokenize
from modicum.recipe import parse
from modicum.record import read_log, read_record
from support import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [{"prompt": f"say {i % 7}", "completion": "abc"[: 1 + i % 3]} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def recipe(model, rows, /, **changes):
    trainer = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 2}
    if "optimizer" in changes:  # it has a rate of its own
        del trainer["learning_rate"]
    data = {
        "job": "train",
        "model": str(model),
        "data": {"path": str(rows), "max_length": 64},
        "adapter": {"rank": 2},
        "trainer": trainer | changes.pop("trainer", {}),
    }
    return parse(data | changes)


def weights(run, name="adapter"):
    return next((run.folder / name).glob("*.safetensors")).read_bytes()


def test_an_adapter_is_trained_and_loads_in_stock_peft(tiny_model, rows, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = execute(
        recipe(tiny_model, rows, trainer={"max_steps": 30, "learning_rate": 5e-2}, adapter={"rank": 8}),
        tmp_path / "r",
        quiet=True,
    )
    losses = [line["loss"] for line in read_log(run.folder, "train")]
    assert losses[-1] < losses[0] - 0.1
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run.folder / "adapter")
    assert all(p.abs().sum() > 0 for n, p in loaded.named_parameters() if "lora_B" in n)
    assert {p.suffix for p in (run.folder / "adapter").iterdir()} <= {".safetensors", ".json", ".jinja"}
    assert run.record["metrics"]["steps"] == 30 and run.record["outputs"]["adapter"] == "adapter"


def test_all_weights_are_trained_without_an_adapter(tiny_model, rows, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = execute(recipe(tiny_model, rows, adapter=None), tmp_path / "r", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    before = tiny_llama(seed=0)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    prompt = AutoTokenizer.from_pretrained(run.folder / "model")("say 1", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2).shape[1] == prompt["input_ids"].shape[1] + 2
    assert any("float32" in note for note in run.record["notes"])


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_does_not(tiny_model, rows, tmp_path):
    first = execute(recipe(tiny_model, rows), tmp_path / "a", quiet=True)
    second = execute(recipe(tiny_model, rows), tmp_path / "b", quiet=True)
    other = execute(recipe(tiny_model, rows, seed=1), tmp_path / "c", quiet=True)
    assert weights(first) == weights(second) != weights(other)


@pytest.mark.parametrize("extra", [{}, {"gradient": {"name": "adagc", "warmup": 2}}, {"objective": {"name": "meap"}}])
def test_a_run_interrupted_at_any_step_ends_with_the_same_bytes(tiny_model, rows, tmp_path, monkeypatch, extra):
    from transformers import Trainer

    whole = execute(recipe(tiny_model, rows, trainer={"save_steps": 2}, **extra), tmp_path / "whole", quiet=True)
    step = Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    broken = recipe(tiny_model, rows, trainer={"save_steps": 2}, **extra)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "training_step", interrupted)
        execute(broken, tmp_path / "broken", quiet=True)
    assert read_record(tmp_path / "broken")["status"] == "interrupted"
    # A checkpoint cut short by the interruption is passed over.
    half = tmp_path / "broken" / "checkpoints" / "checkpoint-5"
    half.mkdir()
    # A user's copies stay, whatever they are called.
    kept = [half.with_name(name) for name in ("checkpoint-1-backup", "checkpoint-99-old")]
    for copy in kept:
        shutil.copytree(half.with_name("checkpoint-2"), copy)
    (half / "trainer_state.json").write_text("{")
    resumed = execute(broken, tmp_path / "broken", quiet=True)
    assert weights(resumed) == weights(whole) and all(copy.is_dir() for copy in kept)
    assert {path.name for path in half.parent.iterdir()} - {copy.name for copy in kept} == {
        "checkpoint-4",
        "checkpoint-5.aside",
        "checkpoint-6",
    }
    notes = [note for note in resumed.record["notes"] if "checkpoint-5 is not whole" in note]
    assert len(notes) == 1 and "kept as checkpoint-5.aside" in notes[0]


@pytest.mark.parametrize("init", [{"name": "hrp", "preheat_steps": 2}, "pissa", {"name": "lora_plus", "ratio": 4.0}])
def test_an_initialisation_starts_an_ordinary_adapter(tiny_model, rows, tmp_path, init):
    run = execute(recipe(tiny_model, rows, adapter={"rank": 2, "init": init}), tmp_path / "r", quiet=True)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    plain = execute(recipe(tiny_model, rows), tmp_path / "plain", quiet=True)
    assert weights(run) != weights(plain)


def test_a_zeroth_order_optimizer_trains_without_gradients(tiny_model, rows, tmp_path):
    from transformers import AutoModelForCausalLM

    method = {"name": "mezo", "lr": 1e-3}
    run = execute(recipe(tiny_model, rows, adapter=None, optimizer=method), tmp_path / "r", quiet=True)
    trained = AutoModelForCausalLM.from_pretrained(run.folder / "model").state_dict()
    before = tiny_llama(seed=0).state_dict()
    assert all(not torch.equal(trained[name], before[name]) for name in before)


@pytest.mark.parametrize("adapter", [None, {"rank": 2}])
def test_an_objective_leaves_no_trace_of_its_mask_token(tiny_model, rows, tmp_path, adapter):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from modicum.jobs.loading.models import load_model

    run = execute(recipe(tiny_model, rows, adapter=adapter, objective="meap"), tmp_path / "r", quiet=True)
    folder = run.folder / ("model" if adapter is None else "adapter")
    assert load_model(folder).get_input_embeddings().weight.shape[0] == 264
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(tiny_model))
    if adapter is None:  # the mask has a row that the vocabulary held anyway: only generation must not write it
        assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == [259]
    else:  # an adapter with the row of a token would not fit the base
        assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"] is None
        assert not [name for name in load_file(folder / "adapter_model.safetensors") if "lora_" not in name]


def test_a_model_is_converted_before_it_is_trained(tiny_model, rows, tmp_path):
    from modicum.jobs.loading.models import load_model

    looped = {"path": str(tiny_model), "convert": {"name": "zero_token", "n_head": 0, "n_tail": 0, "n_cycles": 2}}
    run = execute(recipe(tiny_model, rows, model=looped, adapter=None), tmp_path / "r", quiet=True)
    assert load_model(run.folder / "model").config.n_cycles == 2


def test_logits_are_computed_where_labels_follow_and_the_loss_is_the_same(tiny_model, rows):
    section = DataSection(path=str(rows), max_length=64)
    tokenizer = byte_tokenizer()
    examples = list(tokenize(load_rows(section), tokenizer, section))[:5]
    plain, sparse = collate(tokenizer)(examples), LabelledLogits(collate(tokenizer))(examples)
    model = tiny_llama()
    expected, got = model(**plain), model(**sparse)
    assert torch.allclose(expected.loss, got.loss, rtol=1e-6)
    assert got.logits.shape[1] < expected.logits.shape[1] / 2


def test_an_evaluation_set_is_measured_on_the_way(tiny_model, rows, tmp_path):
    evaluated = recipe(
        tiny_model,
        rows,
        eval_data={"path": str(rows), "size": 8, "max_length": 64},
        trainer={"eval_strategy": "steps", "eval_steps": 3},
    )
    run = execute(evaluated, tmp_path / "r", quiet=True)
    assert [line["step"] for line in read_log(run.folder, "eval")] == [3, 6]


def test_the_plan_counts_rows_and_steps(tiny_model, rows):
    text = "\n".join(plan(recipe(tiny_model, rows)))
    assert "40 rows" in text and "6 optimiser steps of 4 rows" in text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trainer": {"learning_rat": 1}}, RecipeError, "no 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"trainer": {"eval_strategy": "steps"}}, RecipeError, "eval"),
        ({"adapter": {"rank": 2, "config": {"lora_alfa": 1}}}, RecipeError, "Did you mean 'lora_alpha'?"),
        ({"adapter": {"rank": 2, "config": {"r": 1}}}, RecipeError, "Use adapter.rank."),
        ({"adapter": {"rank": 2, "config": {"target_modules": ["nope"]}}}, RecipeError, "nope"),
        ({"model": "nowhere/at/all"}, CheckpointError, "nowhere/at/all"),
        (
            {"adapter": {"rank": 2, "init": {"name": "hrp", "reuse_data": "continue"}}},
            RecipeError,
            "draws its rows anew",
        ),
        ({"gradient": "adagc", "optimizer": {"name": "mezo", "lr": 1e-3}}, RecipeError, "Drop one"),
        ({"gradient": "adagc", "trainer": {"max_grad_norm": 1.0}}, UnsupportedError, "max_grad_norm"),
    ],
)
def test_wrong_input_is_one_clear_error_and_leaves_nothing(tiny_model, rows, tmp_path, changes, error, message):
    with pytest.raises(error) as caught:
        execute(recipe(tiny_model, rows, **changes), tmp_path / "r", quiet=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("key", ["output_dir", "seed", "resume_from_checkpoint"])
def test_what_the_run_decides_is_refused_with_the_right_place(tiny_model, rows, key):
    with pytest.raises(RecipeError, match=f"trainer.{key} is set by the run"):
        recipe(tiny_model, rows, trainer={key: "x"})


def test_chat_data_needs_a_chat_template(tmp_path):
    model = tmp_path / "model"
    tiny_llama().save_pretrained(model)
    byte_tokenizer(chat=False).save_pretrained(model)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    with pytest.raises(CheckpointError, match="no chat template"):
        execute(recipe(model, chats), tmp_path / "r", quiet=True)


def test_an_empty_data_set_is_refused(tiny_model, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(CheckpointError, match="has no rows"):
        execute(recipe(tiny_model, empty), tmp_path / "r", quiet=True)
