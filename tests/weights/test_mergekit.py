from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.jobs.merge import MergeRecipe
from modicum.recipe import dump, override, parse
from modicum.weights import Checkpoint
from modicum.weights.mergekit.document import KEYS, evaluate, models_of
from modicum.weights.mergekit.vocabulary import Vocabulary
from oracles import merge as oracle
from support import tiny_llama

FILES = sorted((Path(__file__).parent / "mergekit").glob("*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "a", "b", "c"]):
        model = tiny_llama(seed=seed, num_hidden_layers=4, tie_word_embeddings=False)
        model.save_pretrained(folder / name)
    return folder


def load(file: Path, root: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text().replace("$R", str(root)))


def run(document: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    execute(parse(document), out, quiet=True)
    return load_file(out / "model/model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_run_unchanged_and_load(file: Path, zoo: Path, tmp_path: Path) -> None:
    import transformers

    run(load(file, zoo), tmp_path / "run")
    (name,) = json.loads((tmp_path / "run/model/config.json").read_text())["architectures"]
    _, report = getattr(transformers, name).from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not {key for key in report["unexpected_keys"] if not key.endswith(("masked_bias", "attention.bias"))}


def test_a_ties_file_equals_the_oracle(zoo: Path, tmp_path: Path) -> None:
    merged = run(load(Path(__file__).parent / "mergekit/ties.yaml", zoo), tmp_path / "run")
    models = [load_file(zoo / "llama" / n / "model.safetensors") for n in ("base", "a", "b", "c")]
    for name, tensor in merged.items():
        base, *experts = (m[name].double().numpy() for m in models)
        expected = oracle.ties(base, experts, [0.5, 0.3, 0.7], weights=[0.5, 0.3, 1.0])
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_slices_stack_layers(zoo: Path, tmp_path: Path) -> None:
    merged = run(load(Path(__file__).parent / "mergekit/passthrough.yaml", zoo), tmp_path / "run")
    a, b = (load_file(zoo / "llama" / n / "model.safetensors") for n in ("a", "b"))
    assert json.loads((tmp_path / "run/model/config.json").read_text())["num_hidden_layers"] == 6
    up, down = "model.layers.{}.mlp.up_proj.weight", "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(merged[up.format(2)], a[up.format(2)].bfloat16())
    assert torch.equal(merged[up.format(3)], b[up.format(1)].bfloat16())
    assert torch.equal(merged[down.format(5)], (0.5 * b[down.format(3)]).bfloat16())
    assert torch.equal(merged["lm_head.weight"], b["lm_head.weight"].bfloat16())


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.3, 0.9, 0.3),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 4], 0.75, 2.5),
        ([0, 1, 4], 1.0, 4),
        ([7], 0.4, 7),
        ([{"filter": "mlp", "value": [0, 2]}, {"value": 9}], 0.5, 1.0),
        ([{"filter": "attn", "value": 1}, {"filter": "*", "value": 9}], 0.5, 9),
        ([{"filter": "attn", "value": 1}], 0.5, None),
        ({"filter": "mlp", "value": [0, 2]}, 0.5, 1.0),
        ({"filter": "attn", "value": 1}, 0.5, None),
        ([True, False, True], 0.6, False),
        (["l1", "none"], 0.9, "l1"),
    ],
)
def test_parameters_are_values_gradients_or_filters(setting: object, t: float, expected: object) -> None:
    assert evaluate(setting, "model.layers.1.mlp.up_proj.weight", t, "x") == expected


@pytest.mark.parametrize("wanted", ["mlp", "block_sparse_moe"])
def test_filters_see_both_names_of_a_mixture(wanted: str) -> None:
    setting = [{"filter": wanted, "value": 1}, {"value": 2}]
    assert evaluate(setting, "model.layers.0.block_sparse_moe.gate.weight", 0, "x") == 1
    assert evaluate(setting, "model.layers.0.self_attn.q_proj.weight", 0, "x") == 2


def ties(**changes: Any) -> dict[str, Any]:
    models = [{"model": "$R/a", "parameters": {"weight": 1.0}}, {"model": "$R/b", "parameters": {"weight": 1.0}}]
    return {"merge_method": "ties", "base_model": "$R/base", "models": models} | changes


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (ties(merge_method="tise"), "Did you mean 'ties'"),
        (ties(slices=[]) | {"models": []}, "exactly one of models, slices and modules"),
        (ties(slise=[]), "Did you mean 'slices'"),
        (ties(models=[{"model": "$R/a"}]), "parameter 'weight' is missing"),
        (ties(models=[{"model": "$R/a", "layer_range": [0, 2]}]), "layer_range stands among models"),
        (ties(parameters={"density": []}), "the list is empty"),
        (ties(models=[{"model": "$R/a", "parameters": {"density": 1.5, "weight": 1}}]), "density"),
        (ties(base_model=None), "Set base_model"),
        (ties(tokenizer={"source": "union"}, tokenizer_source="base"), "Keep one"),
        (ties(tokenizer_source="nobody"), "expected union, base, a model of the file or"),
        (ties(chat_template="chatmll"), "Did you mean 'chatml'"),
        (
            {"merge_method": "linear", "slices": [{"sources": [
                {"model": "$R/a", "layer_range": [0, 2]}, {"model": "$R/b", "layer_range": [0, 3]}]}]},
            "expected one length",
        ),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "$R/a", "layer_range": [0, 9]}]}]},
            "a has 4 layers",
        ),
        (
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "$R/a", "layer_range": [2, 2]}]}]},
            "first < end",
        ),
        (ties(merge_method="slerp", parameters={"t": 0.5}), "goes between two|at most|got 3"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_in_one_line(
    document: dict[str, Any], message: str, root: Path, tmp_path: Path
) -> None:
    text = json.dumps(document).replace("$R", str(root))
    with pytest.raises(ModicumError, match=message) as error:
        execute(parse(json.loads(text)), tmp_path / "run", quiet=True)
    assert str(error.value).count("\n") <= 1


def test_the_plan_says_what_differs_and_what_is_overlooked(root: Path) -> None:
    text = json.dumps(ties(parameters={"weight": [0.1, 1.0], "int8_mask": True, "densty": 0.3})).replace(
        "$R", str(root)
    )
    lines = "\n".join(plan(parse(json.loads(text))))
    for words in ("float32 with one cast", "density is 1", "the last value", "int8_mask", "does not read 'densty'"):
        assert words in lines
    assert "random masks" not in lines
    text = json.dumps(json.loads(text) | {"dtype": "torch.float32"}).replace('"densty"', '"density"')
    assert "density is 1" not in "\n".join(plan(parse(json.loads(text))))
    text = text.replace('"density": 0.3', '"density": 0')
    assert "density is 1" not in "\n".join(plan(parse(json.loads(text))))


@pytest.mark.parametrize(
    ("weight", "expected"),
    [([0, 1], True), ({"filter": "mlp", "value": [0, 1]}, True), ([{"filter": "mlp", "value": 1}, {"value": 2}], False),
     ([{"value": [1, 2]}], True), ([1], False), (1, False)],
)  # fmt: skip
def test_the_plan_says_when_a_gradient_ends_otherwise(weight: object, expected: bool, root: Path) -> None:
    document = json.loads(json.dumps(ties(parameters={"lambda": weight})).replace("$R", str(root)))
    assert any("the last value" in line for line in plan(parse(document))) == expected


def test_unknown_keys_are_ignored_with_a_note_and_slips_are_not(root: Path) -> None:
    document = json.loads(json.dumps(ties(description="mine", license="mit")).replace("$R", str(root)))
    document["models"][1]["architecture"] = "llama"
    assert "description, models[1].architecture: unknown and ignored, as mergekit does" in plan(parse(document))
    known = {"models": document["models"][0], "parameters": document}
    for key, place in known.items():
        slip = f"{key[:-1]}" if key == "parameters" else "modle"
        place[slip] = {}
        with pytest.raises(ModicumError, match=f"unknown key {slip!r}. Did you mean"):
            parse(document)
        del place[slip]


@pytest.mark.parametrize(
    ("method", "base", "said"),
    [
        ("ties", {}, ["'lambda' on a model: no effect, as it is the whole merge's"]),
        ("ties", {"weight": 1.0}, ["'weight' on BASE: no effect, as it is the base"]),
        ("linear", {"weight": 1.0}, []),
    ],
)
def test_the_plan_says_where_nobody_reads_a_parameter(method: str, base: Any, said: list[str], root: Path) -> None:
    document = json.loads(json.dumps(ties(merge_method=method)).replace("$R", str(root)))
    document["models"].append({"model": document["base_model"], "parameters": base | {"lambda": 2.0}})
    lines = [line for line in plan(parse(document)) if ": no effect" in line]
    wanted = [words.replace("BASE", document["base_model"]) for words in said]
    assert all(words in lines for words in wanted)
    assert any("as it is the base" in line for line in lines) == any("BASE" in words for words in said)


@pytest.mark.parametrize("method", ["linear", "karcher", "ties"])
@pytest.mark.parametrize("listed", [True, False])
def test_the_plan_says_that_a_base_is_not_merged(method: str, listed: bool, root: Path) -> None:
    document = json.loads(json.dumps(ties(merge_method=method)).replace("$R", str(root)))
    if listed:
        document["models"].append({"model": document["base_model"], "parameters": {"weight": 1.0}})
    said = any("base_model only gives config and tokenizer" in line for line in plan(parse(document)))
    assert said == (method != "ties" and not listed)


def test_check_refuses_what_the_method_would(root: Path) -> None:
    weight = [{"filter": "mlp.up", "value": 0}, {"value": 1}]
    document = json.loads(
        json.dumps(ties(merge_method="linear", parameters={"weight": weight})).replace("$R", str(root))
    )
    for model in document["models"]:
        del model["parameters"]
    with pytest.raises(ModicumError, match=r"^model\.layers\.0\.mlp\.up_proj\.weight: linear: the weights .* sum to 0"):
        plan(parse(document))


def test_the_plan_names_random_masks(root: Path) -> None:
    document = ties(merge_method="dare_ties", parameters={"weight": 1.0, "density": 0.5}, dtype="float32")
    lines = "\n".join(plan(parse(json.loads(json.dumps(document).replace("$R", str(root))))))
    assert "random masks" in lines
    assert "density is 1" not in lines


# Of the job's keys, those that a mergekit file neither says itself nor makes meaningless.
SETTINGS = [("seed", 3), ("device", "meta"), ("diagnostics", True), ("allow_pickle", True), ("shard_bytes", 1000)]


@pytest.mark.parametrize(("key", "value"), [*SETTINGS, ("out", "elsewhere")])
def test_a_mergekit_file_takes_the_job_s_settings(key: str, value: object, root: Path) -> None:
    file = {"merge_method": "linear", "models": [{"model": "m", "parameters": {"weight": 1.0}}]}
    recipe = parse(override(file, [f"{key}={json.dumps(value)}", "models.0.parameters.weight=0.5", "dtype=float16"]))
    assert getattr(recipe, key) == value
    assert recipe.mergekit == {
        "merge_method": "linear",
        "models": [{"model": "m", "parameters": {"weight": 0.5}}],
        "dtype": "float16",
    }
    assert parse(dump(recipe)) == recipe


def test_a_key_is_the_job_s_or_the_file_s_never_lost() -> None:
    """Every key of the job and of a file arrives in one of them, or is refused by name."""
    file = {"merge_method": "linear", "models": [{"model": "m", "parameters": {"weight": 1.0}}]}
    for key in sorted({*MergeRecipe.model_fields, *KEYS, "pickled", "nonsense"} - {"merge_method", "models"}):
        value = {"seed": 1, "shard_size": 7, "out": "x", "device": "cuda", "name": "x", "job": "merge"}.get(key, True)
        try:
            recipe = parse(file | {key: value})
        except ModicumError as error:
            assert key in str(error), key
        else:
            told = {"pickled": "allow_pickle"}.get(key, key)
            assert recipe.mergekit is not None
            assert value in (recipe.mergekit.get(key), getattr(recipe, told, None)), key


def test_seed_and_pickle_reach_the_merge(root: Path, tmp_path: Path) -> None:
    document = {"merge_method": "dare_ties", "base_model": f"{root}/base", "dtype": "float32", "models": [
        {"model": f"{root}/a", "parameters": {"weight": 1.0, "density": 0.5}}]}  # fmt: skip
    found = [run(override(document, [f"seed={seed}"]), tmp_path / str(i)) for i, seed in enumerate([0, 1, 1])]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[1][name], found[2][name])
    assert not torch.equal(found[0][name], found[1][name])
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_bytes((root / "a/config.json").read_bytes())
    torch.save(load_file(root / "a/model.safetensors"), tmp_path / "old/pytorch_model.bin")
    document["models"][0]["model"] = str(tmp_path / "old")
    with pytest.raises(ModicumError, match="pickled"):
        plan(parse(document))
    for key in ("allow_pickle", "pickled"):
        assert plan(parse(override(document, [f"{key}=true"])))


def test_models_and_adapters_are_named() -> None:
    models = [{"model": "org/a+org/lora"}, {"model": {"model": {"path": "b", "revision": "v1"}, "lora": None}}]
    found = models_of({"merge_method": "linear", "base_model": "base", "models": models})
    assert found == ["org/a", "org/lora", "b@v1", "base"]


def test_an_adapter_in_a_reference_is_folded_in(root: Path, tmp_path: Path) -> None:
    from weights.test_adapter import train_adapter

    expected = train_adapter(root / "a", tmp_path / "lora")
    models = [{"model": f"{root}/a+{tmp_path}/lora", "parameters": {"weight": 1.0}}]
    merged = run({"merge_method": "linear", "models": models, "dtype": "float32"}, tmp_path / "run")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-5, atol=1e-6)


def write_tokenizer(folder: Path, tokens: list[str]) -> None:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    data = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "?"}}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_a_union_of_vocabularies_finds_every_token_its_row(tmp_path: Path) -> None:
    words = {"base": ["?", "x", "y"], "a": ["y", "?", "new", "x"]}
    for seed, (name, tokens) in enumerate(words.items()):
        tiny_llama(seed=seed, vocab_size=len(tokens), tie_word_embeddings=False).save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, tokens)
    document = {
        "merge_method": "linear",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in words],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
        "dtype": "float32",
        "chat_template": "chatml",
    }
    merged = run(document, tmp_path / "run")
    out = tmp_path / "run/model"
    base, a = (load_file(tmp_path / n / "model.safetensors") for n in words)
    name = "model.embed_tokens.weight"
    assert merged[name].shape[0] == 8
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 8
    torch.testing.assert_close(merged[name][1], (base[name][1] + a[name][3]) / 2)
    torch.testing.assert_close(merged[name][3], a[name][2])  # only one model knows it
    ids = json.loads((out / "tokenizer.json").read_text())
    assert [(t["content"], t["id"]) for t in ids["added_tokens"]] == [("new", 3)]
    assert "im_start" in (out / "chat_template.jinja").read_text()


def test_a_token_can_get_a_row_of_zeros(tmp_path: Path) -> None:
    for seed, name in enumerate(["a", "b"]):
        tiny_llama(seed=seed, vocab_size=3, tie_word_embeddings=False).save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, ["?", "x", "y"])
    document = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("a", "b")],
        "tokenizer": {
            "source": "union",
            "tokens": {"new": {"source": {"kind": "zero"}}, "x": {"source": {"kind": "zero"}, "force": True}},
        },
    }
    table = run(document, tmp_path / "run")["model.embed_tokens.weight"]
    assert table[1:].any(1).tolist() == [False, True, False]


def test_a_token_s_row_can_be_chosen(tmp_path: Path) -> None:
    tiny_llama(seed=0, vocab_size=3, tie_word_embeddings=False).save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m", ["?", "x", "y"])
    model = Checkpoint(tmp_path / "m")
    remapped = Vocabulary(model, 4, torch.tensor([0, -1, 2, -2]), [(model, torch.tensor([-1, 2, -1, 1]))])
    name = "model.embed_tokens.weight"
    assert torch.equal(remapped[name][:3], model[name][[0, 2, 2]])
    assert not remapped[name][3].any()
    assert torch.equal(remapped["model.norm.weight"], model["model.norm.weight"])


ZERO = {"weight": [{"filter": "no_such_module", "value": 1}, {"value": 0}]}


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("task_arithmetic", {"weight": 0.0}, "the result is the base"),
        ("task_arithmetic", {"weight": 1, "lambda": 0}, "the result is the base"),
        ("ties", ZERO | {"density": 0.5}, "the result is the base"),
        ("dare_ties", {"weight": 0.5, "density": 0.0}, "the result is the base"),
        ("linear", ZERO | {"normalize": False}, "and so are these tensors"),
        ("passthrough", {"scale": [{"filter": "mlp.down_proj", "value": 0}, {"value": 1}]}, "of 4 of 39 tensors are 0"),
        ("task_arithmetic", {"weight": [{"filter": "mlp", "value": 1}, {"value": 0}]}, None),
    ],
)
def test_weights_of_zero_are_said(method: str, parameters: dict[str, Any], expected: str | None, root: Path) -> None:
    models = [{"model": str(root / "a"), "parameters": parameters}]
    document = {"merge_method": method, "models": models, "dtype": "float32"}
    based = {"base_model": str(root / "base")} if method not in ("linear", "passthrough") else {}
    lines = "\n".join(plan(parse(document | based | ({"parameters": parameters} if method != "passthrough" else {}))))
    assert expected in lines if expected else " are 0" not in lines
