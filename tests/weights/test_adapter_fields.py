"""Every field of PEFT's configuration: an adapter reads as PEFT loads and merges it, or it is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from modicum.architectures import is_turned
from modicum.errors import CheckpointError, UnsupportedError
from modicum.jobs.loading.serving import export_adapter
from modicum.weights import Checkpoint, extract_lora, merge_loras
from modicum.weights.adapter import UNDERSTOOD, residual
from modicum.weights.plan import plan_merge
from support import tiny_llama

FIELDS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
MODULES = ["q_proj", "down_proj"]
# Values that PEFT trains and loads on a small model; the fields of a configuration that are not here are set by hand.
TRAINED: list[dict[str, Any]] = [
    *({"init_lora_weights": value} for value in (True, False, "gaussian", "eva", "orthogonal", "mica")),
    *({"init_lora_weights": value} for value in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga")),
    {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"fan_in_fan_out": True},
    {"lora_bias": True},
    {"use_dora": True},
    {"trainable_token_indices": [1, 2]},
    {"layer_replication": [(0, 2), (1, 2)]},
    {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    {"lora_dropout": 0.5, "revision": "main", "megatron_core": "other.core", "qalora_group_size": 4},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(attention_bias=True, num_key_value_heads=4, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def save(base: Path, out: Path, options: dict[str, Any]) -> None:
    """Write an adapter with random factors, whose configuration says ``options``."""
    start = options.get("init_lora_weights", True)
    by_hand = {"init_lora_weights": start} if start in ("loftq", "corda", "lora_ga", "eva") else {}
    config = peft.LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": MODULES} | options | dict.fromkeys(by_hand, True))
    )
    wrapped = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    rng = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=rng))  # in place: some are tied
    wrapped.save_pretrained(out)
    rewrite(out, by_hand)


def rewrite(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def loaded(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the model that PEFT loads, with the adapter merged in."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return dict(merged.state_dict())


def check(base: Path, adapter: Path) -> bool:
    """Compare with PEFT; return whether the adapter is read at all."""
    try:
        folded = Checkpoint(adapter, base=base)
    except UnsupportedError as error:
        assert "PEFT first" in str(error)
        return False
    expected = loaded(base, adapter)
    for name in folded:
        torch.testing.assert_close(folded[name].float(), expected[name], rtol=1e-6, atol=1e-6)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_an_adapter_is_what_peft_loads_or_refused(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    save(base, tmp_path, options)
    more = {"lora_bias", "use_dora", "trainable_token_indices", "layer_replication"}
    shifted = options.get("init_lora_weights") in ("pissa_niter_4", "loftq", "corda", "lora_ga")
    assert check(base, tmp_path) == (not shifted and more.isdisjoint(options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_start_left_of_the_base_is_found_again(tmp_path: Path, start: str, dtype: torch.dtype) -> None:
    tiny_llama(seed=4, num_key_value_heads=4).to(dtype).save_pretrained(tmp_path / "base")
    options = {"init_lora_weights": start, "use_rslora": True, "rank_pattern": {"down_proj": 3}}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=5, lora_alpha=7, target_modules=MODULES, **options))
    wrapped.save_pretrained(tmp_path / "untrained")
    left = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    read = Checkpoint(tmp_path / "untrained", base=tmp_path / "base")
    for name, change in read.adapter.factors.items():  # type: ignore[union-attr]
        made = residual(read.base[name], change, name)
        assert made.dtype == dtype
        torch.testing.assert_close(made, left[name], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    for name in read:  # an adapter that has not been trained is its base
        torch.testing.assert_close(read[name].float(), read.base[name].float(), rtol=1e-2, atol=2e-3)
    with pytest.raises(CheckpointError, match="Use merge"):
        merge_loras([tmp_path / "untrained"] * 2, tmp_path / "out", method="tsv")
    with pytest.raises(UnsupportedError, match="Merge it into its base"):
        export_adapter(tmp_path / "untrained", tmp_path / "served")


@pytest.mark.filterwarnings("ignore")
def test_a_start_whose_directions_rounding_decides_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(seed=4)
    for layer in model.model.layers:
        torch.nn.init.orthogonal_(layer.self_attn.q_proj.weight)  # all singular values are one
    model.save_pretrained(tmp_path / "base")
    save(tmp_path / "base", tmp_path / "a", {"init_lora_weights": "pissa", "target_modules": ["q_proj"]})
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UnsupportedError, match=f"{name}: two singular values"):
        Checkpoint(tmp_path / "a", base=tmp_path / "base")[name]


@pytest.mark.filterwarnings("ignore")
def test_pissa_of_turned_layers_is_found_again_and_olora_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True}
    save(tmp_path / "base", tmp_path / "a", options | {"init_lora_weights": "pissa"})
    assert check(tmp_path / "base", tmp_path / "a")
    rewrite(tmp_path / "a", {"init_lora_weights": "olora"})
    assert not check(tmp_path / "base", tmp_path / "a")


def test_a_pickled_adapter_is_read_when_asked(base: Path, tmp_path: Path) -> None:
    save(base, tmp_path / "a", {})
    expected = dict(Checkpoint(tmp_path / "a", base=base))
    file = tmp_path / "a/adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "a/adapter_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match="set allow_pickle: true"):
        Checkpoint(tmp_path / "a", base=base)
    found = Checkpoint(tmp_path / "a", base=base, allow_pickle=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "adapter_model.bin" in [item[0] for item in found.identity]
    torch.save({"weights": {}}, tmp_path / "a/adapter_model.bin")
    with pytest.raises(CheckpointError, match="not a mapping of names to tensors"):
        Checkpoint(tmp_path / "a", base=base, allow_pickle=True)


def test_every_start_that_peft_names_is_tried() -> None:
    tried = {options.get("init_lora_weights") for options in TRAINED}
    named = get_type_hints(peft.LoraConfig)["init_lora_weights"]
    literals = {value for part in get_args(named) for value in get_args(part)}
    assert {value.replace("[number of iters]", "4") for value in literals} <= tried


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_peft_is_understood_or_must_be_off(base: Path, tmp_path: Path, field: str) -> None:
    save(base, tmp_path, {})
    rewrite(tmp_path, {field: {"some": "value"}})
    if field not in UNDERSTOOD:
        with pytest.raises(UnsupportedError, match=f"adapter with {field}, which is more than a low-rank delta"):
            Checkpoint(tmp_path, base=base)
    default = FIELDS[field].default
    assert field in UNDERSTOOD or default in (None, False, dataclasses.MISSING)


def test_unknown_starts_and_fields_are_refused(base: Path, tmp_path: Path) -> None:
    save(base, tmp_path, {})
    for change, told in (
        ({"init_lora_weights": "PiSSA"}, "PiSSA"),
        ({"init_lora_weights": "new"}, "path_initial_model"),
    ):
        rewrite(tmp_path, change)
        with pytest.raises(UnsupportedError, match=told):
            Checkpoint(tmp_path, base=base)
    rewrite(tmp_path, {"init_lora_weights": True, "use_next_year": 1})
    with pytest.raises(UnsupportedError, match="use_next_year"):
        Checkpoint(tmp_path, base=base)


@pytest.mark.filterwarnings("ignore")
def test_biases_of_modules_that_are_stored_whole_stand_there_under_three_names(base: Path, tmp_path: Path) -> None:
    save(base, tmp_path, {"bias": "all", "modules_to_save": ["k_proj"]})
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {"k_proj.bias", "modules_to_save.bias", "original_module.bias"} <= {
        ".".join(name.split(".")[-2:]) for name in names
    }
    assert check(base, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("said", [True, False])
def test_square_matrices_of_gpt2_are_turned_whatever_the_adapter_says(tmp_path: Path, said: bool) -> None:
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    save(tmp_path / "base", tmp_path / "a", {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True})
    rewrite(tmp_path / "a", {"fan_in_fan_out": said})
    assert check(tmp_path / "base", tmp_path / "a")


@pytest.mark.parametrize("name", ["GPT2", "OpenAIGPT", "ImageGPT", "GPTBigCode", "Llama"])
def test_layout_knows_the_models_that_store_weights_turned(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=1)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    for module, part in model.named_modules():
        if isinstance(part, transformers.pytorch_utils.Conv1D | torch.nn.Linear):
            assert is_turned(f"{module}.weight", config.model_type) == (not isinstance(part, torch.nn.Linear)), module


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    tiny_llama(seed=1).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize("both", [False, True])
def test_a_tied_embedding_changes_with_its_head_or_not_at_all(tied: Path, tmp_path: Path, key: str, both: bool) -> None:
    save(tied, tmp_path, {key: ["embed_tokens"] if key == "modules_to_save" else ["embed_tokens", "q_proj"],
                          "ensure_weight_tying": both})  # fmt: skip
    if not both and key == "modules_to_save":
        with pytest.raises(UnsupportedError, match="ensure_weight_tying: true"):
            Checkpoint(tmp_path, base=tied)
        return
    if both:
        assert_same_answers(tied, tmp_path)
    expected = [] if both else ["without ensure_weight_tying"]
    opened = Checkpoint(tmp_path, base=tied)
    assert [word for word in expected for note in opened.notes if word in note] == expected
    assert len(opened.notes) == len(expected)
    assert set(opened.notes) <= set(plan_merge(None, [opened, opened], method="linear", knobs={}).notes)


def assert_same_answers(base: Path, adapter: Path) -> None:
    """Compare with the model that PEFT loads, its adapter not merged."""
    plain, other = (transformers.AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    expected = peft.PeftModel.from_pretrained(plain, adapter).eval()
    other.load_state_dict(
        {name: tensor.clone() for name, tensor in Checkpoint(adapter, base=base).items()}, strict=False
    )
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(other.eval()(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_an_extracted_embedding_of_a_tied_model_is_the_head_too(tied: Path, tmp_path: Path) -> None:
    tiny_llama(seed=2).save_pretrained(tmp_path / "tuned")
    extract_lora(tmp_path / "tuned", tied, tmp_path / "lora", max_rank=4, save_rest=True)
    assert_same_answers(tied, tmp_path / "lora")
