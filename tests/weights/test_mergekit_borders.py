"""A mergekit file with anything at all in the place of a value is planned, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modicum.errors import ModicumError
from modicum.jobs.merge import make_plan
from modicum.recipe import parse
from modicum.weights.mergekit.document import evaluate
from test_borders import changed, paths_in

STRANGE: list[Any] = [
    None, True, -1, 0, 5, 10**400, 1e308, "", "x", "0.5", "-1", [], [1], ["0.1", "0.9"], ["a", 1], [[]], {}, {1: 2},
    {"a": 1}, [{"filter": [1], "value": {"value": []}}],
]  # fmt: skip
TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
SHARED = {"normalize": True, "lambda": 0.5}


def write_models(folder: Path) -> None:
    """Write three small folders of tensors with tokenizers."""
    for seed, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir()
        rng = torch.Generator().manual_seed(seed)
        save_file({tensor: torch.randn(8, 4, generator=rng) for tensor in TENSORS}, folder / name / "model.safetensors")
        vocabulary = {token: row for row, token in enumerate("abcdefgh")}
        (folder / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def merge(method: str, shared: dict[str, Any], **each: Any) -> dict[str, Any]:
    models = [{"model": f"$R/{name}", "parameters": dict(each)} for name in ("a", "b") if each or name == "a"]
    return {"merge_method": method, "base_model": "$R/base", "models": models, "parameters": shared}


FILES: dict[str, dict[str, Any]] = {
    "linear": merge("linear", {"normalize": False}, weight=[0.1, 0.9]),
    "task_arithmetic": merge("task_arithmetic", SHARED, weight=1),
    "dare": merge("dare_linear", {**SHARED, "rescale": True, "rescale_norm": "l1"}, weight=1, density=0),
    "ties": merge("ties", SHARED, weight=[{"filter": "mlp", "value": 1}, {"value": 2}], density=0.5),
    "della": merge("della", SHARED, weight=1, density=0.5, epsilon=0.1),
    "breadcrumbs": merge("breadcrumbs", SHARED, weight=1, density=0.5, gamma=0.1),
    "slerp": merge("slerp", {"t": 0.5}),
    "nearswap": merge("nearswap", {"t": 0.5}),
    "nuslerp": merge("nuslerp", {"nuslerp_flatten": True, "nuslerp_row_wise": False}, weight=1),
    "multislerp": merge("multislerp", {"normalize_weights": True}, weight=1),
    "karcher": merge("karcher", {"max_iter": 10, "tol": 0.1}, weight=1),
    "model_stock": merge("model_stock", {"filter_wise": True}, weight=1),
    "ramplus_tl": merge("ramplus_tl", {"epsilon": 0.1, "r": 0.1, "alpha": 0.2}, weight=1),
    "sce": merge("sce", {"select_topk": 0.5}, weight=1),
    "ours": merge("iso_c", {"scale": 1.0}, weight=1),
    "slices": {
        "merge_method": "passthrough", "out_dtype": "float32", "tags": ["a"], "chat_template": "chatml",
        "slices": [{"sources": [{"model": "$R/a", "layer_range": [0, 2], "parameters": {"scale": 1}}]}],
    },
    "modules": {"merge_method": "linear", "modules": {
        "x": {"models": [{"model": "$R/a", "parameters": {"weight": 1}}]}}},
    "tokenizer": merge("linear", {}, weight=1) | {"tokenizer": {
        "source": "union", "pad_to_multiple_of": 8,
        "tokens": {"a": {"source": {"kind": "model_token", "model": "$R/a", "token_id": 3}, "force": True}},
    }},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_any_value_in_any_place_is_planned_or_refused(name: str, root: Path) -> None:
    document = json.loads(json.dumps(FILES[name]).replace("$R", str(root)))
    whole = name in ("slices", "modules", "tokenizer")
    for path in paths_in(document)[1:] if whole else [p for p in paths_in(document) if "parameters" in p]:
        for strange in STRANGE:
            try:
                make_plan(parse(changed(document, path, strange)))
            except ModicumError as error:
                assert str(error).count("\n") <= 1, (path, strange)
                assert " is malformed (" not in str(error), (path, strange, str(error))


def test_the_files_themselves_are_planned(root: Path) -> None:
    for name, document in FILES.items():
        if name != "modules":  # a model of one module has no name for it
            make_plan(parse(json.loads(json.dumps(document).replace("$R", str(root)))))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("0.5", 0.5), ("-1", -1), (["0.1", "0.9"], 0.3), (["0.1", 0.9], 0.3), (["l1", "none"], "l1"), ("l1", "l1")],
)
def test_numbers_may_stand_in_quotes(setting: object, expected: object) -> None:
    assert evaluate(setting, "x", 0.25, "weight") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (merge("dare_linear", {"normalize": True}, weight=[{"value": 0}], density=0), "sum to 0 and cannot be normal"),
        (merge("linear", {}, weight="much"), "parameter 'weight' is 'much', expected a finite number"),
        (merge("linear", {}, weight=["0.1", "x"]), "a gradient is a list of numbers"),
        (merge("linear", {"normalize": "false"}, weight=1), "expected true or false"),
    ],
)
def test_wrong_parameters_are_named(document: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(ModicumError, match=message):
        make_plan(parse(json.loads(json.dumps(document).replace("$R", str(root)))))
