"""Whatever stands in a file or a recipe: one line, exit status 2, and no reading without end."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.borders import border, read_json
from modicum.credentials import redact, secrets_in
from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.jobs.loading.models import load_model
from modicum.recipe import override, parse, parse_yaml, text_of
from modicum.record import damage, read_log
from modicum.weights import Checkpoint
from support import byte_tokenizer, tiny_llama

STRANGE: list[Any] = [
    None, True, -1, 0, 2**63, 10**400, 1.5, float("nan"), "", "\0", "x" * 10_000, "../../etc/passwd", "\ud800",
    [], [[]], {}, {"": None}, [1, "a", None], {"a": {"b": []}},
]  # fmt: skip


def paths_in(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in JSON-like data."""
    found = [here]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += paths_in(item, (*here, key))
    return found


def changed(value: Any, path: tuple[Any, ...], strange: Any) -> Any:
    if not path:
        return strange
    value = copy.deepcopy(value)
    target = value
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = strange
    return value


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one")):
        tiny_llama(seed=seed).save_pretrained(root / name, max_shard_size="40KB")
        byte_tokenizer().save_pretrained(root / name)
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_llama(seed=0), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = str(root / "base")
    wrapped.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def models(kept: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept, tmp_path / "models")


def merge(models: Path) -> dict[str, Any]:
    return {"job": "merge", "base": str(models / "base"), "experts": [str(models / "one"), str(models / "adapter")],
            "method": {"name": "task_arithmetic", "scale": 0.5}}  # fmt: skip


def survives(act: Any) -> bool:
    """Whether ``act`` worked; whatever it refuses must be one clear line."""
    try:
        act()
    except ModicumError as error:
        assert str(error).strip()
        return False
    return True


@pytest.mark.parametrize(
    "name",
    [
        "one/config.json",
        "one/model.safetensors.index.json",
        "adapter/adapter_config.json",
        "one/generation_config.json",
    ],
)
def test_a_configuration_of_wrong_types_is_one_line(models: Path, name: str) -> None:
    path = models / name
    whole = json.loads(path.read_text())
    places = paths_in(whole)
    rng = random.Random(name)
    refused = 0
    for _ in range(120):
        path.write_bytes(dumped(changed(whole, rng.choice(places), rng.choice(STRANGE))))
        refused += not survives(lambda: plan(parse(merge(models))))
    assert refused or name.endswith("generation_config.json")


def test_an_index_of_wrong_types_is_one_line_for_whoever_loads_the_model(models: Path) -> None:
    """transformers reads it once more, and trusts it."""
    path = models / "one" / "model.safetensors.index.json"
    whole = json.loads(path.read_text())
    places, rng, refused = paths_in(whole), random.Random(0), 0
    for _ in range(150):
        path.write_bytes(dumped(changed(whole, rng.choice(places), rng.choice(STRANGE))))
        refused += not survives(lambda: load_model(models / "one"))
    del whole["metadata"]
    path.write_bytes(dumped(whole))
    with pytest.raises(CheckpointError, match="has no metadata, which transformers reads"):
        load_model(models / "one")
    assert refused > 100


def test_a_header_of_wrong_types_is_one_line(models: Path) -> None:
    path = models / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    places, rng = paths_in(header), random.Random(0)
    for _ in range(200):
        text = dumped(changed(header, rng.choice(places), rng.choice(STRANGE)))
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        survives(lambda: Checkpoint(models / "adapter"))
    for text in (b"[" * 100_000, b'{"a":1', b"\xff\xfe", b"1" * 5000, b'{"__metadata__": 3}', b"", b"null"):
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        assert not survives(lambda: Checkpoint(models / "adapter"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_neither_read_nor_waited_for(models: Path, name: str, kind: str) -> None:
    path = models / "one" / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    survived = survives(lambda: plan(parse(merge(models))))
    assert survived == (kind == "folder" and name in ("README.md", "tokenizer.json"))
    for reference in (models / "one", path) if kind != "folder" else ():
        with pytest.raises(CheckpointError, match="is a (pipe|device), expected a file"):
            Checkpoint(reference)


@pytest.mark.parametrize("name", ["generation_config.json", "LICENSE", "tokenizer.json"])
def test_a_link_out_of_a_model_is_not_copied_into_a_result(models: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "private.json").write_text('{"mine": 1}')
    (models / "base" / name).unlink(missing_ok=True)
    (models / "base" / name).symlink_to(tmp_path / "private.json")
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*private.json, outside its folder"):
        plan(parse(merge(models)))


def test_links_into_the_hubs_cache_are_followed(models: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "abc", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((models / "base").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert {path.name for path in Checkpoint(snapshot).companions()} >= {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "{" * 5000, "a: " * 3000, "&a [*a]", "{[1]: 2}", "? {a: 1}\n: 2", "a: \0", "1" * 5000, "!!python/none",
     "a: &x [" + ",".join(["1"] * 9) + "]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n"
                                                       for p, c in zip("xbcdefgh", "bcdefghi")),
     "!!timestamp x", "a: !!binary ?", "2001-99-99", "\t- a", "<<: 3", "%YAML 9.9\n---\na", "\ufeff{", "a: 1\na: 2"],
)  # fmt: skip
def test_yaml_of_any_kind_is_one_line_and_soon(text: str) -> None:
    def act() -> None:
        data = parse_yaml(text)
        if not isinstance(data, dict):
            raise RecipeError("no mapping")
        parse(data)

    assert not survives(act)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
), st.sampled_from(["merge", "train", "evaluate", "average", "pipeline", "calibrate", "statistics"]),
    st.data())  # fmt: skip
def test_recipes_of_any_values_are_one_line(value: Any, job: str, data: Any) -> None:
    recipes: dict[str, dict[str, Any]] = {
        "merge": {"base": "./x", "experts": ["./a"], "method": {"name": "ties", "density": 0.5}},
        "train": {"model": {"path": "./x"}, "data": {"path": "./d"}, "adapter": {"rank": 2, "init": {"name": "hrp"}}},
        "evaluate": {"models": {"m": "./x"}, "tasks": {"t": {"kind": "exact_match", "data": {"path": "./d"}}}},
        "average": {"checkpoints": ["./a"], "method": {"name": "ema"}},
        "pipeline": {"stages": [{"name": "a", "job": "average", "checkpoints": ["./a"]}]},
        "calibrate": {"model": "./m", "data": {"path": "./d"}},
        "statistics": {"model": "./m", "kind": "gram", "data": {"path": "./d"}},
    }
    recipe = {"job": job, **recipes[job]}
    place = data.draw(st.sampled_from(paths_in(recipe)[1:]))
    survives(lambda: parse(changed(recipe, place, value)))


@pytest.mark.parametrize("assignment", ["", "=", "a", "a=[", "job.x=1", "experts.9=1", ".=1", "a..b=1"])
def test_assignments_of_any_kind_are_one_line(assignment: str) -> None:
    recipe = {"job": "merge", "experts": ["./a"], "method": "linear"}
    assert not survives(lambda: parse(override(recipe, [assignment])))


def test_a_record_of_wrong_types_is_one_line(models: Path, tmp_path: Path) -> None:
    recipe = parse(merge(models))
    run = tmp_path / "run"
    execute(recipe, run, quiet=True)
    whole = json.loads((run / "record.json").read_text())
    small = {key: value for key, value in whole.items() if key not in ("metrics", "environment")}
    places, rng = paths_in(small), random.Random(0)
    for _ in range(150):
        place, strange = rng.choice(places), rng.choice(STRANGE)
        (run / "record.json").write_bytes(dumped(changed(whole, place, strange)))
        survives(lambda: damage(run))
        survives(lambda: read_log(run))
    (run / "record.json").write_text(json.dumps(whole | {"files": {"../../x": [1, "a"]}}))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        damage(run)


def test_a_log_of_any_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(
        b'{"event": "a"}\n[1]\n\xff\n\0\0\0\n' + b"[" * 100_000 + b'\n{"event": "b"}\n3\n'
    )
    assert [line["event"] for line in read_log(tmp_path)] == ["a", "b"]


def test_a_border_names_what_and_why(tmp_path: Path) -> None:
    for error in (ValueError("no"), TypeError(), KeyError("a"), RecursionError(), OverflowError("big")):
        with pytest.raises(CheckpointError, match=r"mine is malformed .*Do this"), border("mine", "Do this."):
            raise error
    with pytest.raises(CheckpointError, match="kept"), border("mine"):
        raise CheckpointError("kept")
    with pytest.raises(RuntimeError), border("mine"):
        raise RuntimeError("a fault of ours")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"me: x.json is not valid JSON"):
        read_json(tmp_path / "x.json", "me")


@pytest.mark.parametrize("source", ["x" * 5000, "a/" * 3000, "\0", "/dev/zero", "/", "~"])
def test_a_recipes_name_may_be_anything(source: str) -> None:
    with pytest.raises(RecipeError):
        text_of(source)


@pytest.mark.parametrize("path", ["x" * 5000, "/root/\0"])
def test_a_strange_path_in_a_recipe_is_exit_2(tmp_path: Path, path: str) -> None:
    recipe = {"job": "merge", "experts": [path, path], "method": "linear"}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "modicum", "run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


SECRETS = {
    "hf_" + "a" * 30: "HF_TOKEN", "ghp_" + "b" * 36: "GITHUB_TOKEN", "github_pat_" + "c" * 40: "GITHUB_TOKEN",
    "glpat-" + "d" * 20: "GITLAB_TOKEN", "AKIA" + "E" * 16: "AWS_ACCESS_KEY_ID", "nvapi-" + "f" * 40: "NVIDIA_API_KEY",
    "sk-" + "g" * 40: "OPENAI_API_KEY", "Authorization: Bearer " + "h" * 24: "variable", "MY_TOKEN=" + "i" * 20: "that",
    "https://user:" + "j" * 10 + "@host/x": "variable", "https://" + "k" * 20 + "@host/x": "variable",
    "https://host/x?token=" + "l" * 20: "variable", "hf_oauth_" + "m" * 30: "HF_TOKEN",
    "hf_jwt_" + "n.n" * 10: "HF_TOKEN", "glagent-" + "o" * 20: "GITLAB_TOKEN", "dckr_pat_" + "p" * 27: "variable",
    "hvs." + "q" * 24: "VAULT_TOKEN", "dop_v1_" + "r" * 40: "variable", "sk_live_" + "s" * 24: "STRIPE",
    "xai-" + "t" * 40: "variable", "wandb_v1_" + "u" * 40: "variable", "https://:" + "v" * 10 + "@host/x": "variable",
    "https://hooks.slack.com/services/T0/B0/" + "w" * 24: "variable", "Authorization: Basic " + "x" * 24: "variable",
    "x-api-key: " + "y" * 24: "variable", "https://host/x?X-Goog-Signature=" + "z" * 40: "variable",
    "https://host/x#access_token=" + "A" * 20: "variable", "export HF_TOKEN='" + "B" * 20: "that variable",
    "aws_secret_access_key=" + "C" * 20: "variable", "https://host/x?private_token=" + "D" * 20: "variable",
}  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_a_recipe_with_a_key_is_refused_without_repeating_it(secret: str) -> None:
    for recipe in (
        {"job": "merge", "experts": [secret], "method": "linear"},
        {"job": "train", "model": "m", "data": {"path": "d"}, "trainer": {"run_name": f"x {secret} y"}},
        {"job": "train", "model": "m", "data": {"path": f"data/run_{secret}"}},
        {"job": "train", "model": "m", "data": {"path": "d"}, "trainer": {"report_to": [[["none", secret]]]}},
        {"job": "evaluate", "models": {f"as {secret}": "one"}, "tasks": {}},
    ):
        with pytest.raises(RecipeError, match="holds a key or a password") as refused:
            parse(recipe)
        assert SECRETS[secret] in str(refused.value)
        assert secret.rpartition("=")[2].rpartition(" ")[2].strip("'") not in str(refused.value)
    assert "(hidden)" in redact(f"x {secret} y") and secret not in redact(secret)
    assert secret not in str(redact({secret: {f"of {secret}": 1}}))


@pytest.mark.parametrize("key", ["hub_token", "HF_TOKEN", "api_key", "password", "wandb_api_key", "x-api-key", "pwd",
                                 "bearer", "cookie", "openai_key"])  # fmt: skip
@pytest.mark.parametrize("value", ["abc", ["abc"], [["abc"], 1], 12345678])
def test_what_stands_under_a_secrets_name_is_one(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"trainer.{key} holds a key"):
        parse({"job": "train", "model": "m", "data": {"path": "d"}, "trainer": {key: value}})


@pytest.mark.parametrize("text", ["org/name", "sk-small", "a@b", "https://host/x@main", "task:hf_x", "mask_token"])
def test_ordinary_words_are_no_secrets(text: str) -> None:
    assert not list(secrets_in({"path": text, "eos_token": text, "max_new_tokens": 4, "api_key_env": "OPENAI_API_KEY"}))
    assert not list(secrets_in({"password": {"kind": text}, "secret": 0.5, "token": True}))
    assert redact(text) == text
