"""Rows and tables of positions: a model that looks positions up is given none that it does not have."""

import json

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from support import byte_tokenizer, tiny_llama

PAIRS = {"objective": "dpo"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), byte_tokenizer()
    small = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    models = {
        "table": GPT2LMHeadModel(GPT2Config(**small, bos_token_id=1, eos_token_id=1)),
        "rotary": tiny_llama(max_position_embeddings=64),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, words in {"long": "x" * 90, "short": "x"}.items():
        pairs = [{"prompt": f"{i} {words}", "chosen": "good", "rejected": "bad"} for i in range(4)]
        rows = [{"prompt": f"{i} {words}", "completion": "good"} for i in range(4)]
        (folder / f"{name}.pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        (folder / f"{name}.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(place, model, data, max_length=400, **more):
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2}
    data = {"path": str(place / data), "max_length": max_length}
    return parse({"job": "train", "model": str(place / model), "data": data, "trainer": trainer} | more)


@pytest.mark.parametrize("model", ["table", "rotary"])
@pytest.mark.parametrize("data", ["long.pairs.jsonl", "long.rows.jsonl"])
def test_the_check_finds_rows_that_are_all_too_long(model, data, place, tmp_path):
    given = recipe(place, model, data, max_length=50, **(PAIRS if "pairs" in data else {}))
    for attempt in (plan, lambda given: execute(given, tmp_path / "run", quiet=True)):
        with pytest.raises(ModicumError, match="max_length 50"):
            attempt(given)


@pytest.mark.parametrize("data", ["long.pairs.jsonl", "long.rows.jsonl"])
def test_a_table_of_positions_limits_the_rows_in_check_and_run_alike(data, place, tmp_path):
    given = recipe(place, "table", data, **(PAIRS if "pairs" in data else {}))
    for attempt in (plan, lambda given: execute(given, tmp_path / "run", quiet=True)):
        with pytest.raises(ModicumError, match="max_length 64"):
            attempt(given)
    assert not any("positions" in line for line in plan(recipe(place, "rotary", "short.rows.jsonl")))


def test_short_rows_are_learned_whatever_the_limit_says(place, tmp_path):
    given = recipe(place, "table", "short.rows.jsonl")
    told = plan(given)
    assert any("table of 64 positions: max_length is 64 (data)" in line for line in told), told
    run = execute(given, tmp_path / "run", quiet=True)
    assert run.record["status"] == "done" and any("64 positions" in note for note in run.record["notes"])
