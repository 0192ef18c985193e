"""Mixtures of experts: each tensor is where it belongs, equal experts are the dense model, routers follow prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.record import read_record
from modicum.weights import Checkpoint
from modicum.weights.aliases import apart
from weights.families import NAMES, WORDS, make_family, write_tokenizer

FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
PROMPTS = {"a": ["a b c", "d e"], "b": ["f g", "h i j k"], "c": ["l m n", "o p a b"]}
THEIRS = json.loads((Path(__file__).parent / "moe_mergekit.json").read_text())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for family in FAMILIES:
        make_family(folder / family, family, vocab_size=20)
        for name in NAMES:
            write_tokenizer(folder / family / name, WORDS["base"])
    return folder


def document(zoo: Path, family: str, mode: str, experts: str = "abc", **more: Any) -> dict[str, Any]:
    """Return a file of mergekit-moe."""
    listed = [{"source_model": str(zoo / family / name), "positive_prompts": PROMPTS[name]} for name in experts]
    shared = {"source_model": str(zoo / family / "base"), "positive_prompts": ["a d g"], "residual_scale": 0.1}
    return {
        "base_model": str(zoo / family / "base"), "gate_mode": mode, "experts": listed, "dtype": "float32",
        **({"shared_experts": [shared]} if family == "qwen2" else {}),
    } | more  # fmt: skip


def run(recipe: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    execute(parse(recipe), out, quiet=True)
    return dict(apart(Checkpoint(out / "model")))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_where_it_belongs_and_the_class_reads_it(family: str, zoo: Path, tmp_path: Path) -> None:
    recipe = document(zoo, family, "random")
    recipe["experts"][1]["residual_scale"] = 0.5
    made = run(recipe, tmp_path / "run")
    base, *experts = (Checkpoint(zoo / family / name) for name in ("base", "a", "b", "c"))
    block, parts = ("block_sparse_moe", ("w1", "w3", "w2")) if FAMILIES[family] == "mixtral" else (
        "mlp", ("gate_proj", "up_proj", "down_proj"))  # fmt: skip
    for name, tensor in base.items():
        if ".mlp." not in name:
            assert torch.equal(made.pop(name), tensor)
    for layer in range(4):
        at = f"model.layers.{layer}"
        for dense, part in zip(("gate_proj", "up_proj", "down_proj"), parts):
            for number, expert in enumerate(experts):
                scale = 0.5 if number == 1 and dense == "down_proj" else 1
                found = made.pop(f"{at}.{block}.experts.{number}.{part}.weight")
                assert torch.equal(found, scale * expert[f"{at}.mlp.{dense}.weight"])
            if family == "qwen2":
                scale = 0.1 if dense == "down_proj" else 1
                found = made.pop(f"{at}.mlp.shared_expert.{dense}.weight")
                torch.testing.assert_close(found, scale * base[f"{at}.mlp.{dense}.weight"])
    assert len(made) == (8 if family == "qwen2" else 4)  # the routers
    auto = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert model.config.model_type == FAMILIES[family]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "3 experts" in read_record(tmp_path / "run")["notes"][0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_experts_are_the_dense_model(family: str, zoo: Path, tmp_path: Path) -> None:
    recipe = document(zoo, family, "random", "aa", base_model=str(zoo / family / "a"))
    for shared in recipe.get("shared_experts", []):
        shared["residual_scale"] = 0.0
    execute(parse(recipe), tmp_path / "run", quiet=True)
    ids = torch.arange(12)[None]
    auto = transformers.AutoModelForCausalLM
    with torch.no_grad():
        dense, mixture = (auto.from_pretrained(f)(ids).logits for f in (zoo / family / "a", tmp_path / "run/model"))
    torch.testing.assert_close(mixture, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_what_a_config_leaves_to_the_dense_class_is_said(family: str, zoo: Path, tmp_path: Path) -> None:
    """Llama 2 was published without its rotary base, for which Mixtral's class takes another."""
    shutil.copytree(zoo / family / "a", tmp_path / "a")
    file = tmp_path / "a/config.json"
    silent = ("rope_parameters", "rms_norm_eps", "sliding_window")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in silent}))
    execute(parse(document(tmp_path, "", "random", "aa", base_model=str(tmp_path / "a"))), tmp_path / "run", quiet=True)
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / f) for f in ("a", "run/model"))
    for key in silent:
        assert getattr(after, key) == getattr(before, key, None)
    ids, auto = torch.arange(12)[None], transformers.AutoModelForCausalLM
    with torch.no_grad():
        dense, mixture = (auto.from_pretrained(tmp_path / f)(ids).logits for f in ("a", "run/model"))
    torch.testing.assert_close(mixture, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_windows_that_the_mixture_s_class_puts_elsewhere_are_refused(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "qwen3/a", tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text()) | {"use_sliding_window": True, "sliding_window": 4}
    config |= {"max_window_layers": 2, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    recipe = document(tmp_path, "", "random", "aa", base_model=str(tmp_path / "a"))
    with pytest.raises(ModicumError, match=r"layers\.0\.self_attn\.sliding_window is 4 in Qwen3Moe.*expected None"):
        plan(parse(recipe))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_routers_point_where_mergekit_s_do(name: str, zoo: Path, tmp_path: Path) -> None:
    family, _, mode = name.partition("_")
    recipe = document(zoo, family, mode)
    if mode in ("hidden", "cheap_embed"):
        recipe["experts"][0]["negative_prompts"] = ["h g f"]
    made = run(recipe, tmp_path / "run")
    named = {tensor.replace(".block_sparse_moe.", ".mlp."): found for tensor, found in made.items()}
    for tensor, rows in THEIRS[name].items():
        for ours, theirs in zip(named[tensor], torch.tensor(rows), strict=True):
            torch.testing.assert_close(ours.norm(), torch.tensor(1.0))
            # Mergekit reads the prompts in bfloat16.
            assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.998, tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": []}, "experts"),
        ({"experts_per_token": 4}, "3 experts, expected at least 4"),
        ({"gate_mode": "hiden"}, "gate_mode"),
        ({"architecture": "qwen3"}, "becomes a mixtral"),
        ({"shared_experts": [{"source_model": "base", "positive_prompts": ["a"]}]}, "has no shared expert"),
    ],
)
def test_what_cannot_be_put_together_is_refused(change: dict[str, Any], message: str, zoo: Path) -> None:
    recipe = document(zoo, "llama", "hidden") | change
    for shared in recipe.get("shared_experts", []):
        shared["source_model"] = str(zoo / "llama/base")
    with pytest.raises(ModicumError, match=message):
        plan(parse(recipe))


@pytest.mark.filterwarnings("ignore")
def test_experts_may_be_sharded_adapters_and_of_other_tokens(zoo: Path, tmp_path: Path) -> None:
    import peft

    place = tmp_path / "a place"
    for name in NAMES[:3]:
        model = transformers.AutoModelForCausalLM.from_pretrained(zoo / "llama" / name)
        model.save_pretrained(place / "llama" / name, max_shard_size="8KB")
        words = WORDS["base"] if name != "b" else [*WORDS["base"][:4], *reversed(WORDS["base"][4:])]
        write_tokenizer(place / "llama" / name, words)
    config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "llama/base")
    peft.get_peft_model(base, config).save_pretrained(place / "lora")
    recipe = document(place, "llama", "random", experts="ab")
    recipe["experts"][0]["source_model"] = f"{place / 'llama/a'}+{place / 'lora'}"
    assert any("other tokens than" in line and "the base's tokens" in line for line in plan(parse(recipe)))
    made = run(recipe, tmp_path / "run")
    experts = [Checkpoint(place / "lora", base=place / "llama/a"), Checkpoint(place / "llama/b")]
    assert not torch.equal(experts[0][(up := "model.layers.1.mlp.up_proj.weight")], Checkpoint(place / "llama/a")[up])
    for number, expert in enumerate(experts):
        for part, own in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            found = made[f"model.layers.1.block_sparse_moe.experts.{number}.{part}.weight"]
            assert torch.equal(found, expert[f"model.layers.1.mlp.{own}.weight"])


def test_prompts_are_needed_and_must_differ(zoo: Path) -> None:
    for prompts, message in (([], "has no positive_prompts"), (["a"], "All experts have the same prompts")):
        recipe = document(zoo, "llama", "hidden")
        for expert in recipe["experts"]:
            expert["positive_prompts"] = prompts
        with pytest.raises(ModicumError, match=message):
            parse(recipe)
    with pytest.raises(ModicumError, match="is a gpt2 model"):
        make_family(zoo / "gpt2", "gpt2")
        plan(parse(document(zoo, "gpt2", "random")))


def folder_with(zoo: Path, out: Path, change: Any) -> dict[str, Any]:
    """Return a recipe of experts of Llama whose tensors are changed."""
    for name in ("base", "a", "b"):
        shutil.copytree(zoo / "llama" / name, out / name)
        file = out / name / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})
    listed = [{"source_model": str(out / name)} for name in "ab"]
    return {"base_model": str(out / "base"), "gate_mode": "random", "experts": listed}


@pytest.mark.filterwarnings("ignore")
def test_biases_that_the_class_has_no_place_for_are_refused(zoo: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj.bias" for layer in range(4)]
    recipe = folder_with(zoo, tmp_path, lambda tensors: tensors | {name: torch.ones(16) for name in names})
    with pytest.raises(ModicumError, match=r"q_proj.bias' and 3 more tensors have no place in MixtralForCausalLM"):
        plan(parse(recipe))


@pytest.mark.filterwarnings("ignore")
def test_tensors_keep_their_own_dtypes(zoo: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}

    recipe = folder_with(zoo, tmp_path, change)
    execute(parse(recipe), tmp_path / "run", quiet=True)
    for name, tensor in Checkpoint(tmp_path / "run/model").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
