"""Passes that begin above the lowest blocks: the same numbers, shared by equal blocks alone, else off."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs import execute
from modicum.jobs.data.pairs import Alternatives, Pair, PairCollator
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.subject import LocalSubject
from modicum.jobs.training import lower_blocks
from modicum.jobs.training.lower_blocks import Kept, LowerBlocks
from modicum.jobs.training.objective import LabelHead
from modicum.jobs.training.partial_passes import states_below
from modicum.jobs.training.references import log_probabilities
from modicum.recipe import parse
from modicum.record import read_record
from support import byte_tokenizer, tiny_llama

RNG = torch.Generator().manual_seed(0)
PAIRS = [
    Pair(*(tuple(torch.randint(5, 250, (size,), generator=RNG).tolist()) for size in sizes))
    for sizes in ((9, 4, 7), (3, 8, 1), (14, 2, 2), (5, 1, 6))
]
BELOW = 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lower_blocks, "KEPT", Kept())


def probabilities(model, collator, pairs):
    head = LabelHead(model)
    try:
        return log_probabilities(model, collator(pairs))
    finally:
        head.detach()


def counted(model, number):
    """Return a list that grows with every call of a block."""
    calls = []
    model.get_submodule("model.layers")[number].register_forward_hook(lambda *_: calls.append(number))
    return calls


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[2, 3], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(model, config).eval()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_probabilities_and_gradients_are_those_of_whole_passes(shared, attention):
    model = with_adapter(tiny_llama(num_hidden_layers=4, attn_implementation=attention))
    collator = PairCollator(0, shared=shared, mask=torch.bool if attention == "sdpa" else model.dtype)
    lower = LowerBlocks(model, BELOW, PAIRS[0], collator)
    found = []
    for pairs in (PAIRS, lower.under(PAIRS)):
        model.zero_grad()
        values = probabilities(model, collator, pairs)
        values.square().sum().backward()
        found.append((values.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (whole, slopes), (begun, others) = found
    torch.testing.assert_close(begun, whole, rtol=0, atol=1e-5)
    assert all(slope.abs().max() > 0 for slope in slopes)
    torch.testing.assert_close(others, slopes, rtol=1e-4, atol=1e-4)
    # The model is what it was.
    torch.testing.assert_close(probabilities(model, collator, PAIRS).detach(), whole, rtol=0, atol=0)


def test_lower_blocks_compute_once_for_each_pair_and_content():
    one, same, other = (tiny_llama(num_hidden_layers=4).eval() for _ in range(3))
    with torch.no_grad():
        one.model.layers[2].mlp.up_proj.weight.mul_(1.5)  # above
        other.model.layers[1].input_layernorm.weight[3] += 1e-6  # one number below
    calls = [counted(model, 0) for model in (one, same, other)]
    collator = PairCollator(0, mask=torch.bool)
    for model in (one, same, with_adapter(same), other, one):
        LowerBlocks(model, BELOW, PAIRS[0], collator).under(PAIRS)
    trial = [2, 2, 1]  # whole passes with which each of them was tried
    assert [len(made) for made in calls] == [trial[0] + 4, trial[1], trial[2] + 4]


def test_states_do_not_depend_on_what_else_was_asked():
    model, collator = tiny_llama(num_hidden_layers=4).eval(), PairCollator(0, mask=torch.bool)
    alone = LowerBlocks(model, BELOW, PAIRS[2], collator, kept=Kept()).under(PAIRS[2:3])
    among = LowerBlocks(model, BELOW, PAIRS[0], collator, kept=Kept()).under(PAIRS)
    torch.testing.assert_close(alone[0].lower.states, among[2].lower.states, rtol=0, atol=0)


KINDS = ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi", "gpt2", "gpt_neox", "bloom", "falcon"]
KINDS += ["gpt_neo", "opt", "qwen3_moe", "granite", "stablelm", "mamba", "cohere2", "recurrent_gemma"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_gives_its_own_numbers_or_is_refused(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
    if kind == "gpt_neo":
        fields |= {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    except (TypeError, ValueError, AttributeError, ImportError, KeyError, IndexError, RuntimeError) as error:
        pytest.skip(f"cannot be built so small: {error}")
    collator = PairCollator(0, shared=False)
    try:
        lower = LowerBlocks(model, BELOW, PAIRS[0], collator)
    except UnsupportedError:
        assert kind not in ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "qwen3_moe")
        return
    with torch.no_grad():
        whole, begun = (probabilities(model, collator, pairs) for pairs in (PAIRS, lower.under(PAIRS)))
    torch.testing.assert_close(begun, whole, rtol=0, atol=1e-4)


def test_a_model_that_goes_through_its_blocks_twice_is_refused():
    from modicum.models import convert_to_zero_token

    model = convert_to_zero_token(tiny_llama(num_hidden_layers=4), n_cycles=2, n_head=1, n_tail=1).eval()
    with pytest.raises(UnsupportedError):
        LowerBlocks(model, BELOW, PAIRS[0], PairCollator(0, shared=False))


def test_blocks_that_an_adapter_changes_or_that_are_not_there_are_refused():
    from peft import LoraConfig, get_peft_model

    collator = PairCollator(0, mask=torch.bool)
    changed = get_peft_model(tiny_llama(num_hidden_layers=4), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(UnsupportedError, match="an adapter changes these blocks"):
        LowerBlocks(changed, BELOW, PAIRS[0], collator)
    with pytest.raises(UnsupportedError, match=r"4 blocks in model\.layers, expected one stack of more than 4"):
        LowerBlocks(tiny_llama(num_hidden_layers=4), 4, PAIRS[0], collator)


def test_memory_is_bounded_and_the_oldest_goes_first():
    model, collator = tiny_llama(num_hidden_layers=4).eval(), PairCollator(0, mask=torch.bool)
    row = 32 * 4
    kept = Kept(most=30 * row)
    lower = LowerBlocks(model, BELOW, PAIRS[0], collator, kept=kept)  # 18 tokens
    lower.under(PAIRS[1:2])  # 10 tokens
    assert kept.size == 28 * row
    lower.under(PAIRS[1:2])
    lower.under(PAIRS[3:4])
    assert kept.size == 20 * row and kept.get((lower.name, lower_blocks.key_of(PAIRS[0]))) is None
    with pytest.raises(UnsupportedError, match="states of 4 pairs take 0.00 GB, and a process keeps 0.00"):
        lower.under(PAIRS)


def test_states_of_an_evaluation_can_be_trained_on():
    model, collator = tiny_llama(num_hidden_layers=4).eval(), PairCollator(0, mask=torch.bool)
    with torch.inference_mode():
        (pair,) = LowerBlocks(model, BELOW, PAIRS[0], collator).under(PAIRS[:1])
    probabilities(model, collator, [pair]).sum().backward()
    assert model.model.layers[2].mlp.up_proj.weight.grad.abs().max() > 0
    assert model.model.layers[1].mlp.up_proj.weight.grad is None


def test_a_language_model_begins_above_its_lower_blocks():
    reference = "builtin:smollm2-135m-instruct"
    tokenizer = load_tokenizer(reference)
    words = tokenizer("Name three rivers of the north, and say of each of them where it ends.")["input_ids"]
    pairs = [
        Pair(tuple(words), tuple(words[4:9]), tuple(words[2:6])),
        Pair(tuple(words[3:]), (5, 6), tuple(words[1:9])),
    ]
    for dtype, most in (("float32", 1e-3), ("bfloat16", 0.3)):
        model = load_model(reference, dtype=dtype)
        collator = PairCollator(0, mask=torch.bool)
        begun = LowerBlocks(model, 20, pairs[0], collator).under(pairs)
        with torch.no_grad():
            whole, found = (probabilities(model, collator, each) for each in (pairs, begun))
        # A pair's tokens go through the lower blocks in a row of their own, which rounds otherwise than a batch.
        torch.testing.assert_close(found, whole, rtol=0, atol=most)


def test_a_subject_reads_likelihoods_above_and_says_where_it_cannot():
    rows = [[{"prompt": text, "completion": end} for end in (" b", " cd")] for text in ("one", "two two", "three")]
    told = []
    for blocks in (None, BELOW, 9):
        model = tiny_llama(num_hidden_layers=4).eval()
        calls = counted(model, 0)
        notes = []
        subject = LocalSubject("m", model, byte_tokenizer(), cached_blocks=blocks, note=notes.append)
        told.append([[each.nats for each in answers] for answers in subject.alternatives(rows)])
        count = len(calls)
        assert subject.alternatives(rows) is not None
        told.append((len(calls) - count, notes))
    assert torch.tensor(told[2]).sub(torch.tensor(told[0])).abs().max() < 1e-5 and told[4] == told[0]
    assert told[1] == (1, []) and told[3] == (0, [])
    assert told[5][0] == 1 and len(told[5][1]) == 1
    assert told[5][1][0].startswith(
        "m: cached_blocks: 9 is off, and passes begin at the tokens: the model has 4 blocks"
    )


@pytest.fixture
def training(tmp_path):
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    lines = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i} {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "job": "train",
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "pairs.jsonl"),
        "objective": "dpo",
        "adapter": {"rank": 2, "config": {"layers_to_transform": [2, 3]}},
        "cached_blocks": BELOW,
        "trainer": {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "use_cpu": True},
    }


def test_training_above_learns_what_whole_passes_learn(training, tmp_path):
    from safetensors.torch import load_file

    run = execute(parse(training), tmp_path / "above", quiet=True)
    assert not [note for note in run.record["notes"] if "cached_blocks" in note]
    execute(parse(training | {"cached_blocks": None}), tmp_path / "whole", quiet=True)
    above, whole = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("above", "whole"))
    torch.testing.assert_close(above, whole, rtol=1e-3, atol=1e-4)
    scores = {}
    for blocks in (BELOW, None):
        task = {"kind": "pairs", "data": training["data"]}
        recipe = {"job": "evaluate", "model": str(tmp_path / "above" / "adapter"), "tasks": {"own": task}}
        folder = tmp_path / f"scores {blocks}"
        execute(parse(recipe | {"cached_blocks": blocks}), folder, quiet=True)
        (scores[blocks],) = read_record(folder)["metrics"]["cells"]
    assert scores[BELOW]["value"] == scores[None]["value"]
    assert scores[BELOW]["margin"] == pytest.approx(scores[None]["margin"], abs=1e-5)


def test_training_says_where_passes_begin_at_the_tokens(training, tmp_path, monkeypatch):
    monkeypatch.setattr(lower_blocks, "KEPT", Kept(most=100))
    run = execute(parse(training | {"trainer": training["trainer"] | {"max_steps": 1}}), tmp_path / "run", quiet=True)
    (note,) = [note for note in run.record["notes"] if "cached_blocks" in note]
    assert note.startswith("cached_blocks: 2 is off, and passes begin at the tokens: states of 12 pairs take")


def changed(recipe, text):
    for key, value in yaml.safe_load(text).items():
        recipe = recipe | {key: recipe[key] | value if isinstance(value, dict) else value}
    return recipe


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("adapter: {config: {layers_to_transform: [1, 2]}}", "list blocks from 2 on in adapter.config.layers_to_trans"),
        ("adapter: {config: {}}", "needs an adapter that leaves these blocks alone"),
        ("adapter: null", "needs an adapter that leaves these blocks alone"),
        ("cached_blocks: 0", "cached_blocks"),
        ("{objective: null, data: {format: preference}}", "set objective: dpo"),
        ("trainer: {gradient_checkpointing: true}", "cached_blocks and trainer.gradient_checkpointing came together"),
        ("adapter: {config: {layers_to_transform: [2], modules_to_save: [norm]}}", "norm.* is trained below"),
    ],
)
def test_what_cannot_begin_above_is_refused(training, tmp_path, change, told):
    training["data"] = {"path": training["data"]}
    with pytest.raises((RecipeError, UnsupportedError), match=told):
        execute(parse(changed(training, change)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_pass_without_such_a_block_ends_in_an_error():
    model = tiny_llama(num_hidden_layers=4).eval()
    model.config.num_hidden_layers = 2  # the model's own loop reads it
    pair = Alternatives((5, 6, 7), ((8, 9),))
    with pytest.raises(UnsupportedError, match="never comes to the LlamaDecoderLayer"):
        states_below(model, PairCollator(0, shared=False)([pair]), 3)
    assert replace(pair, lower=None) == pair
