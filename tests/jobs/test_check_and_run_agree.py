"""What a run refuses without a pass through a model, its check refuses in the same words."""

from __future__ import annotations

import json

import pytest

from modicum.errors import ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.jobs.data.tokens import prompt_ids
from modicum.jobs.training import rehearsal
from modicum.models import convert_to_zero_token
from modicum.recipe import parse
from support import byte_tokenizer, tiny_llama

SAY = {"path": "say.jsonl", "max_length": 64}
PAIRS = {"job": "train", "model": "base", "objective": "dpo", "trainer": {"max_steps": 1}}


def filtered(path, **scorer):
    return PAIRS | {"data": {"mix": {"parts": {"a": path}, "filter": {"scorer": scorer}}}}


def evaluated(model, **task):
    return {"job": "evaluate", "models": {"m": model}, "tasks": {"t": {"kind": "exact_match", "data": SAY} | task}}


def searched(**task):
    merge = {"base": "base", "experts": ["base", "plain"], "method": "linear"}
    knobs = {"weights": {"low": 0, "high": 1, "each": True}}
    return {"job": "search", "merge": merge, "knobs": knobs, "tasks": evaluated("base", **task)["tasks"]}


def routed(**more):
    experts = {"job": "route", "base": "base", "experts": {"a": "base", "b": "other"}, "rule": "all", "store": "sign"}
    return experts | {"data": {"a": "say.jsonl", "b": "say.jsonl"}} | more


CASES = {
    "statistics of nothing": (
        {"job": "statistics", "model": "base", "kind": "fisher", "data": SAY | {"max_length": 1}},
        "say.jsonl has nothing to learn within max_length 1",
    ),
    "losses of nothing": (
        {"job": "average", "checkpoints": ["base", "plain"], "method": "best", "data": SAY | {"max_length": 1}},
        "say.jsonl has nothing to learn within max_length 1",
    ),
    "a system message": (evaluated("plain", data=SAY | {"system": "Be brief."}), "has no chat template, so it has no"),
    "prompts beyond the table": (evaluated("short"), "and 32 new ones exceed the model's 16 positions"),
    "answers beyond the table": (searched(max_new_tokens=1000), "and 1000 new ones exceed the model's 256 positions"),
    "windows beyond the table": (
        evaluated("base", kind="perplexity", data="text.jsonl"),
        "A window of 1024 tokens exceeds the model's 256 positions",
    ),
    "pairs that are all long": (
        evaluated("base", kind="pairs", data={"path": "pairs.jsonl", "max_length": 3}),
        "All 30 rows are longer than max_length 3",
    ),
    "states beyond the table": (
        {"job": "represent", "targets": {"m": "short"}, "folds": 2, "suites": {"p": "flip"},
         "goals": {"path": "harmful.jsonl"}, "benign": {"path": "harmless.jsonl"}},
        "exceeds the model's 16 positions. Shorten it",
    ),
    "answers without room": (
        {"job": "attack", "targets": {"m": "base"}, "goals": {"path": "harmful.jsonl"}, "max_new_tokens": 256,
         "benign": {"path": "harmless.jsonl"}},
        "tokens and 256 new ones exceed the model's 256 positions. Lower the limit on an answer",
    ),
    "answers without room below guidelines": (
        {"job": "attack", "targets": {"m": {"model": "base", "guidelines": True}}, "max_new_tokens": 9,
         "goals": {"path": "harmful.jsonl"}, "benign": {"path": "harmless.jsonl"}},
        "tokens and 9 new ones exceed the model's 256 positions. Lower the limit on an answer",
    ),
    "replies without room": (
        {"job": "synthesize", "teacher": "base", "max_tokens": 300, "illegal": {"path": "harmful.jsonl"},
         "helpful": {"path": "harmless.jsonl"}},
        "tokens and 300 new ones exceed the model's 256 positions. Lower the limit on an answer",
    ),
    "rows that are all long": (
        {"job": "synthesize", "teacher": {"endpoint": "http://localhost:9", "name": "m"}, "student": "base",
         "max_length": 1, "illegal": {"path": "harmful.jsonl"}, "helpful": {"path": "harmless.jsonl"}},
        "max_length is 1, and a row of the shortest request has more than",
    ),
    "replies that nobody can draw": (
        {"job": "synthesize", "teacher": "base", "k": 1, "arms": ["srg", "contrast"],
         "illegal": {"path": "harmful.jsonl"}, "helpful": {"path": "harmless.jsonl"}},
        "arm 'contrast' needs a reply that a request must not get beside one that passed, and k: 1",
    ),
    "a mask without a row": (
        {"job": "train", "model": "base", "data": SAY, "objective": {"name": "meap", "mask_token_id": 99999}},
        "mask_token_id 99999 has no embedding: the model has",
    ),
    "a mask that ends texts": (
        {"job": "train", "model": "base", "data": SAY, "objective": {"name": "meap", "mask_token_id": 2}},
        "mask_token_id 2 is the tokenizer's eos_token_id",
    ),
    "guidelines beyond the table": (
        {"job": "represent", "targets": {"m": {"model": "base", "guidelines": True}}, "folds": 2,
         "suites": {"p": "flip"}, "goals": {"path": "harmful.jsonl"}, "benign": {"path": "harmless.jsonl"}},
        "exceeds the model's 256 positions. Shorten it",
    ),
    "a file of tracks and simulated targets": (
        {"job": "coordinate", "policies": ["random"],
         "application": {"name": "tracking", "tracks": "tracks.csv", "targets": 3}},
        "targets changes nothing where tracks is given. Remove tracks or targets",
    ),
    "steps of no tracks": (
        {"job": "coordinate", "policies": ["random"], "application": {"name": "tracking", "step": 3}},
        "step changes nothing where tracks is not given. Set tracks, or remove step",
    ),
    "a choice without data": (
        {"job": "average", "checkpoints": ["base", "plain"], "fallback": False},
        "fallback changes nothing where data is not given",
    ),
    "no chat template for a router's prompts": (
        routed(base="plain", data={"a": "say.jsonl", "b": "chat.jsonl"}),
        "A row is a chat, but the tokenizer has no chat template",
    ),
    "a router's prompts without tokens": (
        routed(base="plain", data={"a": "say.jsonl", "b": "blank.jsonl"}), "A prompt of b has no tokens. Take it out",
    ),
    "no parameter of that name": (
        {"job": "train", "model": "base", "data": SAY, "trainer": {"max_steps": 1},
         "optimizer": {"name": "mezo", "lr": 1e-4, "include": ["nothing"]}},
        "No parameter is left to train",
    ),
    "modules that are not there": (
        {"job": "train", "model": "base", "data": SAY, "adapter": {"config": {"target_modules": ["nope"]}}},
        "adapter.config: Target modules {'nope'} not found in the base model",
    ),
    "layers that are not there": (
        {"job": "train", "model": "base", "data": SAY, "adapter": {"config": {"layers_to_transform": [99]}}},
        "not found in the base model",
    ),
    "a full fine-tune of another shape": (
        {"job": "train", "model": "base", "data": SAY, "trainer": {"max_steps": 1},
         "adapter": {"init": "hrp", "compare": "wide"}},
        "wide has model.layers.0.mlp.gate_proj.weight of shape (96, 32), expected (64, 32) as the adapter's base has",
    ),
    "a full fine-tune of no stage": (
        {"job": "train", "model": "base", "data": SAY, "trainer": {"max_steps": 1},
         "adapter": {"init": "hrp", "compare": "stage:x"}},
        "stage:x names a stage, which only a later stage of the same pipeline can read",
    ),
    "visits that stay": (
        {"job": "calibrate", "model": "looped", "data": {"path": "text.jsonl"}, "prune": 100},
        "100 visits were to be skipped, but only 1 can be",
    ),
    "rows that nobody can make": (
        {"job": "synthesize", "teacher": "base", "minimum": 9, "illegal": {"path": "harmful.jsonl"},
         "helpful": {"path": "harmless.jsonl"}},
        "minimum asks for 9 rows of each kind, and 4 illegal requests make at most 4",
    ),
    "heads of few pairs": (filtered("few.jsonl", heads_of="base"), "a has 9 pairs, of which 3 would train its head"),
    "answers that are long for heads": (
        filtered("pairs.jsonl", heads_of="base", max_length=4),
        "more than its max_length 4. Raise scorer.max_length",
    ),
    "no classifier": (filtered("pairs.jsonl", model="base"), "base is no model that classifies sequences"),
    "a filter of no pairs": (filtered("say.jsonl", heads_of="base"), "filter compares two answers, and the parts hold"),
    "a template around chats": (
        {"job": "train", "model": "base", "data": {"path": "chat.jsonl", "template": "Q: {prompt}"}},
        "chat.jsonl holds chat rows, which have no prompt for template",
    ),
    "a system message before texts": (
        {"job": "train", "model": "base", "data": {"path": "text.jsonl", "system": "Be brief."}},
        "text.jsonl holds text rows, which have no prompt for system",
    ),
} | {
    message: ({"job": "train", "model": "base", "data": SAY, "trainer": {"max_steps": 1} | trainer}, message)
    for trainer, message in (
        ({"save_strategy": "best"}, "`args.metric_for_best_model` must be provided"),
        ({"save_strategy": "best", "metric_for_best_model": "f1"}, "is 'f1', which no evaluation of this training"),
        ({"per_device_train_batch_size": 0}, "trainer.per_device_train_batch_size is 0, expected 1 or more"),
        ({"gradient_accumulation_steps": 0}, "trainer.gradient_accumulation_steps is 0, expected 1 or more"),
        ({"max_steps": 0}, "trainer.max_steps is 0, which trains nothing"),
        ({"dataloader_drop_last": True}, "leaves out all 4 rows: they make no whole batch of 8"),
        ({"learning_rate": -1}, "trainer: Invalid learning rate: -1"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "trainer: One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_kwargs": {"x": 1}}, "got an unexpected keyword argument 'x'"),
        ({"dataloader_num_workers": 10**6}, "is 1000000, expected at most 1024: each is a process"),
        ({"neftune_noise_alpha": -1}, "trainer.neftune_noise_alpha is -1, expected 0 or more"),
        ({"dataloader_num_workers": -1}, "trainer: num_workers option should be non-negative"),
    )
} | {
    f"a token without an embedding, {name}": (recipe, "gives the token 264, and the model has embeddings of 264. Use")
    for name, recipe in {
        "trained": {"job": "train", "model": "worded", "data": SAY, "trainer": {"max_steps": 1}},
        "preferred": PAIRS | {"model": "worded", "data": "pairs.jsonl"},
        "measured": {"job": "statistics", "model": "worded", "kind": "fisher", "data": SAY},
        "looped": {"job": "calibrate", "model": "worded-loop", "data": {"path": "worded.jsonl"}},
        "answered": evaluated("worded"),
        "read": evaluated("worded", kind="perplexity", data={"path": "worded.jsonl", "max_length": 64}),
        "chosen": evaluated("worded", kind="pairs", data="pairs.jsonl"),
    }.items()
}  # fmt: skip


CASES |= {
    f"nothing to pad with, {name}": (recipe, "The tokenizer has neither a padding nor an end-of-text token")
    for name, recipe in {
        "trained": {"job": "train", "model": "endless", "data": "text.jsonl", "trainer": {"max_steps": 1}},
        "measured": {"job": "statistics", "model": "endless", "kind": "gram", "data": "text.jsonl"},
        "averaged": {"job": "average", "checkpoints": ["base", "endless"], "method": "greedy", "data": "text.jsonl"},
        "answered": evaluated("endless"),
        "distilled": routed(base="endless", distil={"steps": 1}),
    }.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    from transformers import GPT2Config, GPT2LMHeadModel

    root = tmp_path_factory.mktemp("world")
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 264}
    models = {"base": tiny_llama(), "plain": tiny_llama(seed=1), "short": GPT2LMHeadModel(GPT2Config(**shape)),
              "looped": convert_to_zero_token(tiny_llama(num_hidden_layers=4), n_cycles=2)}  # fmt: skip
    models |= {"worded": models["base"], "worded-loop": models["looped"], "endless": models["base"],
               "other": tiny_llama(seed=2), "wide": tiny_llama(intermediate_size=96)}  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer = byte_tokenizer(chat=name != "plain")
        if name.startswith("worded"):
            tokenizer.add_tokens([*(f"word {i}" for i in range(264 - len(tokenizer))), "say"])
        if name == "endless":
            tokenizer.pad_token = tokenizer.eos_token = None
        tokenizer.save_pretrained(root / name)
    pairs = [{"prompt": f"say {i}", "chosen": "abc", "rejected": "xyz"} for i in range(30)]
    rows = {
        "say": [{"prompt": f"say {i}", "completion": "abc"} for i in range(4)],
        "text": [{"text": f"{i} abcdefghijklmnopqrstuvwxyz"} for i in range(4)],
        "worded": [{"text": f"say {i}"} for i in range(4)],
        "chat": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4,
        "pairs": pairs,
        "few": pairs[:9],
        "blank": [{"prompt": "", "completion": "abc"}] * 4,
        "harmful": [{"prompt": f"Harm {i}"} for i in range(4)],
        "harmless": [{"prompt": f"Help {i}", "completion": "Here."} for i in range(4)],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture
def world(built, tmp_path, monkeypatch):
    monkeypatch.chdir(built)
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_check_and_run_refuse_alike(world, name):
    recipe, message = CASES[name]
    for act in (plan, lambda recipe: execute(recipe, world / "out", quiet=True)):
        with pytest.raises(ModicumError) as caught:
            act(parse(recipe))
        assert message in str(caught.value)
    assert not any((world / "out").rglob("*.safetensors"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    "config",
    [{"init_lora_weights": name} for name in ("pissa", "olora", "orthogonal")]
    + [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q_proj": 1}}],
)
def test_check_passes_adapters_that_a_run_takes(world, config):
    """Also those whose start is computed from the weights, which a check does not have."""
    recipe = {"job": "train", "model": "base", "data": SAY, "adapter": {"config": config}, "trainer": {"max_steps": 1}}
    assert plan(parse(recipe))
    assert execute(parse(recipe), world / "out", quiet=True).done


def test_a_router_reads_the_chats_up_to_their_last_answers(world):
    recipe = parse(routed(data={"a": "say.jsonl", "b": "chat.jsonl"}))
    assert plan(recipe)
    assert execute(recipe, world / "out", quiet=True).done
    tokenizer, asked = byte_tokenizer(), [{"role": "user", "content": "a"}]
    said = {"role": "assistant", "content": "b"}
    prompt = prompt_ids({"prompt": "a", "completion": "b"}, tokenizer)
    assert prompt_ids({"messages": [*asked, said]}, tokenizer) == prompt_ids({"messages": asked}, tokenizer) == prompt
    longer = prompt_ids({"messages": [*asked, said, *asked, said]}, tokenizer)
    assert longer[: len(prompt)] == prompt and len(longer) > 2 * len(asked)


def test_a_toy_trainer_goes_through_its_rows_once():
    assert len([*rehearsal._Rows(3)]) == len(rehearsal._Rows(3)) == 3


def test_one_process_shards_nothing(world):
    recipe = {"job": "train", "model": "base", "data": SAY, "trainer": {"max_steps": 1, "fsdp": "full_shard"}}
    with pytest.raises(RecipeError, match="shards a model over several processes, and this is one"):
        execute(parse(recipe), world / "out", quiet=True)


def test_rows_that_are_measured_keep_within_the_table_of_positions(world):
    recipe = parse({"job": "statistics", "model": "short", "kind": "fisher", "data": {"path": "text.jsonl"}})
    told = "text.jsonl: the model has a table of 16 positions: max_length is 16."
    assert f"note: {told}" in plan(recipe)
    assert told in execute(recipe, world / "out", quiet=True).record["notes"]
