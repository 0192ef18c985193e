"""One check decides whether models fit together: for a recipe of ours, and for every slice of a mergekit file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.layout import is_recomputed
from modicum.recipe import parse

Tensors = dict[str, torch.Tensor]
LAYER = {
    "self_attn.q_proj.weight": (4, 4),
    "self_attn.rotary_emb.inv_freq": (2,),
    "mlp.up_proj.weight": (6, 4),
    "input_layernorm.weight": (4,),
}


def model(depth: int = 3) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(depth) for name, shape in LAYER.items()}
    return {name: torch.ones(shape) for name, shape in sorted(shapes.items())}


def write(folder: Path, tensors: Tensors, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "tie_word_embeddings": True} | config
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def names_of(tensors: Tensors) -> list[str]:
    return [*tensors, "lm_head.weight", "model.layers.1.self_attn.q_proj.bias", "model.extra.weight"]


def change(tensors: Tensors, kind: str, name: str) -> Tensors:
    """Drop, add, rename, resize or retype one tensor."""
    rest = {key: value for key, value in tensors.items() if key != name}
    here = tensors.get(name, torch.ones(3))
    changed = {
        "drop": rest,
        "add": tensors | {f"{name}_too": here},
        "rename": rest | {f"{name}.other": here},
        "resize": rest | {name: torch.ones(*here.shape[:-1], here.shape[-1] + 1)},
        "retype": rest | {name: here.long()},
        "deepen": {**tensors, **{n.replace("layers.2", "layers.3"): t for n, t in tensors.items() if "layers.2" in n}},
    }
    return changed[kind] if name in tensors else tensors | {name: here}


def ours(paths: list[str]) -> dict[str, Any]:
    return {"job": "merge", "method": "task_arithmetic", "base": paths[0], "experts": paths[1:]}


def listed(paths: list[str], method: str = "task_arithmetic") -> dict[str, Any]:
    models = [{"model": path, "parameters": {"weight": 1.0}} for path in paths]
    return {"merge_method": method, "base_model": paths[0], "models": models[1:]}


def sliced(paths: list[str], *ranges: tuple[int, int]) -> dict[str, Any]:
    slices = [
        {"sources": [{"model": path, "layer_range": list(span), "parameters": {"weight": 1.0}} for path in paths]}
        for span in ranges
    ]
    return {"merge_method": "task_arithmetic", "base_model": paths[0], "slices": slices}


def stacked(paths: list[str]) -> dict[str, Any]:
    slices = [{"sources": [{"model": path, "layer_range": [0, 2]}]} for path in paths]
    return {"merge_method": "passthrough", "slices": slices}


def refusal(document: dict[str, Any]) -> str | None:
    try:
        plan(parse(document))
    except ModicumError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_tensor_of_any_model_counts_in_every_path(data: st.DataObject) -> None:
    whole = model()
    kind = data.draw(st.sampled_from(["drop", "add", "rename", "resize", "retype", "deepen"]))
    name = data.draw(st.sampled_from(names_of(whole)))
    changed = data.draw(st.integers(0, 2))
    with tempfile.TemporaryDirectory() as folder:
        made = [change(whole, kind, name) if i == changed else whole for i in range(3)]
        paths = [write(Path(folder) / f"m{i}", tensors) for i, tensors in enumerate(made)]
        said = refusal(ours(paths))
        allowed = made[changed].keys() ^ whole.keys() and all(
            is_recomputed(n, (2,)) for n in made[changed].keys() ^ whole.keys()
        )
        # A tied model may keep a copy of its embedding as lm_head; here it differs, so that the model itself is broken.
        assert (said is None) == bool(allowed), (kind, name, said)
        # Only a recipe of ours has exclude.
        way = ", or leave out what one of them lacks with exclude, a regular expression of names"
        assert refusal(listed(paths)) == (said and said.replace(way, ""))
        for document in (sliced(paths, (0, 3)), sliced(paths, (0, 2), (1, 3)), stacked(paths)):
            found = refusal(document)
            if kind == "deepen" and name in whole:
                assert found is None  # layers beyond those that are asked for
            elif said is None or "tie_word_embeddings" in said or "ties its embeddings" in said:
                assert found == said
            else:
                assert found is not None
                assert paths[changed] in found
                assert len({path for path in paths if path in found}) == 2
                assert repr(name)[1:-1] in found


PATHS = [ours, listed, lambda paths: listed(paths, "linear"), lambda paths: sliced(paths, (0, 3)), stacked]


@pytest.mark.parametrize("document", PATHS)
@pytest.mark.parametrize("first", [0, 1])
def test_an_untied_head_is_refused_with_both_names(
    document: Callable[[list[str]], dict[str, Any]], first: int, tmp_path: Path
) -> None:
    tied = write(tmp_path / "tied", model())
    untied = write(tmp_path / "untied", model() | {"lm_head.weight": torch.zeros(8, 4)}, tie_word_embeddings=False)
    said = refusal(document([tied, untied] if first == 0 else [untied, tied]))
    assert said is not None
    for words in (tied, untied, "'lm_head.weight'", "untie or tie both"):
        assert words in said


def test_a_tied_model_may_store_its_head_twice(tmp_path: Path) -> None:
    whole = model()
    plain = write(tmp_path / "plain", whole)
    twice = write(tmp_path / "twice", whole | {"lm_head.weight": whole["model.embed_tokens.weight"].clone()})
    for document in (ours([plain, twice]), listed([twice, plain]), stacked([plain, twice])):
        assert refusal(document) is None


@pytest.mark.parametrize("document", PATHS)
def test_other_architectures_are_refused(document: Callable[[list[str]], dict[str, Any]], tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", model()), write(tmp_path / "b", model(), model_type="qwen2")]
    assert f"{paths[1]} is a qwen2 model, {paths[0]} a llama model" in str(refusal(document(paths)))


def test_models_of_another_depth_say_so_and_can_be_sliced(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", model(3)), write(tmp_path / "b", model(5))]
    for order in (paths, paths[::-1]):
        said = refusal(ours(order))
        assert said == refusal(listed(order))
        assert said is not None
        assert "'model.layers.3.input_layernorm.weight' and 5 more" in said
        assert f"{paths[1]} has 5 layers, {paths[0]} 3" in said
        assert refusal(sliced(order, (0, 3))) is None
    assert "has 3 layers, layer_range asks for [0, 4]" in str(refusal(sliced(paths, (0, 4))))


def test_several_stacks_cannot_be_sliced_by_one_range(tmp_path: Path) -> None:
    tower = {f"model.vision_tower.layers.{i}.w": torch.ones(2) for i in range(5)}
    paths = [write(tmp_path / name, model() | tower) for name in "ab"]
    assert refusal(listed(paths)) is None
    assert "2 stacks of layers (model.layers, model.vision_tower.layers)" in str(refusal(sliced(paths, (0, 3))))


def test_a_gradient_runs_over_each_stack_of_layers(tmp_path: Path) -> None:
    tower = {f"model.vision_tower.layers.{i}.w": torch.ones(2) for i in range(5)}
    whole = model() | tower
    paths = [write(tmp_path / "a", {n: 0 * t for n, t in whole.items()}), write(tmp_path / "b", whole)]
    execute(parse(listed(paths) | {"parameters": {"lambda": [1, 2]}}), tmp_path / "run", quiet=True)
    merged = load_file(tmp_path / "run/model/model.safetensors")
    assert [float(merged[f"model.vision_tower.layers.{i}.w"][0]) for i in range(5)] == [1, 1.25, 1.5, 1.75, 2]
    assert [float(merged[f"model.layers.{i}.input_layernorm.weight"][0]) for i in range(3)] == [1, 1.5, 2]


def test_buffers_that_some_models_lack_are_left_out(tmp_path: Path) -> None:
    whole = model()
    bare = {name: tensor for name, tensor in whole.items() if "inv_freq" not in name}
    for i, pair in enumerate([(whole, bare), (bare, whole), (whole, whole)]):
        paths = [write(tmp_path / f"{i}{j}", tensors) for j, tensors in enumerate(pair)]
        for kind, document in {"ours": ours(paths), "theirs": listed(paths)}.items():
            execute(parse(document), tmp_path / f"{kind}{i}", quiet=True)
            merged = load_file(tmp_path / f"{kind}{i}/model/model.safetensors")
            assert merged.keys() == (whole if i == 2 else bare).keys()


SAME = {"hidden_size": 4, "rms_norm_eps": 1e-5, "num_attention_heads": 2, "num_key_value_heads": 1,
        "hidden_act": "silu",
        "rope_theta": 1e4, "rope_scaling": None, "use_cache": True, "text_config": {"n_head": 4, "eps": 1}}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps (1e-06, 1e-05)"),
        ({"hidden_act": "gelu"}, "hidden_act (gelu, silu)"),
        ({"rope_theta": 5e5}, "rope_parameters.rope_theta (500000.0, 10000.0)"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters.rope_type (linear, default)"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}, "rope_theta (20000.0"),
        ({"text_config": {"n_head": 4, "eps": 2}}, "text_config.eps (2, 1)"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, None),
        ({"use_cache": False, "torch_dtype": "bfloat16", "transformers_version": "4"}, None),
    ],
)
def test_settings_that_change_what_weights_compute_are_said(changed: Any, told: str | None, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", model(), **SAME), write(tmp_path / "b", model(), **SAME | changed)]
    found = []
    for document in (ours(paths), listed(paths), sliced(paths, (0, 3)), stacked(paths)):
        found.append([line for line in plan(parse(document)) if "differs from" in line])
    assert found.count(found[0]) == len(found)
    assert bool(found[0]) == (told is not None)
    if told:
        assert found[0][0].startswith(f"{paths[1]} differs from {paths[0]} in")
        assert told in found[0][0]


@pytest.mark.parametrize("document", PATHS)
@pytest.mark.parametrize(
    "changed", [{"num_attention_heads": 4}, {"num_key_value_heads": 2}, {"text_config": {"n_head": 2, "eps": 1}}]
)
def test_other_numbers_of_heads_are_refused(document: Any, changed: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path / "a", model(), **SAME), write(tmp_path / "b", model(), **SAME | changed)]
    said = str(refusal(document(paths)))
    assert said.startswith(
        f"{paths[1]}: {'text_config.n_head' if 'text_config' in changed else next(iter(changed))} is"
    )
    assert f"as in {paths[0]}" in said


@pytest.mark.parametrize("document", PATHS)
def test_tokenizers_of_one_size_with_other_tokens_are_said(document: Any, tmp_path: Path) -> None:
    paths = [write(tmp_path / name, model()) for name in "ab"]
    for path, tokens in zip(paths, ("uvwxyz", "uvwzxy")):
        vocabulary = {token: row for row, token in enumerate(tokens)}
        (Path(path) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    lines = [line for line in plan(parse(document(paths))) if "other tokens" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"{paths[1]} has other tokens than {paths[0]} in 3 rows, such as 'z' for 'x'")
