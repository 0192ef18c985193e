"""A folder that holds a part of a model is no model, and what is not the model's own is not carried along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modicum.errors import ModicumError
from modicum.weights import Checkpoint
from modicum.weights.compatibility import notes_on_configs
from modicum.weights.mergekit.tokenizers import notes_on_tokenizers
from modicum.weights.mergekit.vocabulary import with_vocabulary


def model(folder: Path, *layers: str, file: str = "model.safetensors", **config: Any) -> Path:
    """Write a model with tensors in some layers."""
    folder.mkdir(exist_ok=True)
    names = ["model.embed_tokens.weight", *(layer if "." in layer else f"model.layers.{layer}.w" for layer in layers)]
    save_file({name: torch.ones(4, 2) for name in names}, folder / file)
    if config:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return folder


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 1}])
def test_one_of_two_files_is_no_model(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = model(tmp_path / "m", "0", file="model-00001-of-00002.safetensors", **config)
    with pytest.raises(ModicumError, match=r"holds 1 of the 2 files model-…-of-00002. Download the others too"):
        Checkpoint(folder)
    with pytest.raises(ModicumError, match="holds 1 of the 2 files"):
        Checkpoint(folder / "model-00001-of-00002.safetensors")
    assert Checkpoint(model(tmp_path / "one", "0", file="model-00001-of-00001.safetensors", **config))
    (tmp_path / "p").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "p/pytorch_model-00002-of-00002.bin")
    with pytest.raises(ModicumError, match="holds 1 of the 2 files"):
        Checkpoint(tmp_path / "p", allow_pickle=True)


WRONG = [
    (("0", "2"), {"num_hidden_layers": 3}, r"counts 3 layers, and there is no model.layers.1"),
    (("0", "1"), {"num_hidden_layers": 3}, r"counts 3 layers, and there is no model.layers.2"),
    (("0", "1"), {"num_hidden_layers": 1}, r"counts 1 layers, and there is a model.layers.1"),
    (("0", "99999999"), {"n_layer": 2}, r"there is no model.layers.1"),
    (("0", "2"), {"text_config": {"num_hidden_layers": 2}}, r"there is no model.layers.1"),
    (("encoder.block.0.w", "encoder.block.1.w", "decoder.block.1.w"), {"num_layers": 2}, "no decoder.block.0"),
    (("model.decoder.layers.0.w",), {"num_hidden_layers": 1, "decoder_layers": 2}, r"counts 2 layers, .* no model.dec"),
]


@pytest.mark.parametrize(("layers", "config", "message"), WRONG)
def test_layers_that_config_json_does_not_count_are_refused(
    tmp_path: Path, layers: tuple[str, ...], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModicumError, match=message):
        Checkpoint(model(tmp_path / "m", *layers, **config))
    assert Checkpoint(model(tmp_path / "raw", *layers))


RIGHT = [
    (("0", "1", "2"), {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}),
    (("0", "1"), {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}),
    (("0", "1", "mtp.layers.0.w"), {"num_hidden_layers": 2}),
    (("0", "1", "model.vision_tower.layers.3.w"), {"num_hidden_layers": 2}),
    (("0",), {"num_hidden_layers": 12, "model_type": "albert"}),
    (("H.layers.0.w", "L.layers.0.w"), {"num_hidden_layers": 4, "num_layers_per_stack": 1, "model_type": "hrm_text"}),
    (("0", "2"), {"num_hidden_layers": 3, "auto_map": {"AutoConfig": "x.y"}}),
    (("encoder.block.0.w", "decoder.block.0.w", "decoder.block.1.w"), {"num_layers": 1, "num_decoder_layers": 2}),
    (("model.decoder.layers.0.w",), {"num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 1}),
]


@pytest.mark.parametrize(("layers", "config"), RIGHT)
def test_layers_that_draft_or_are_shared_are_whole(tmp_path: Path, layers: Any, config: dict[str, Any]) -> None:
    assert Checkpoint(model(tmp_path / "m", *layers, **config))


def test_only_texts_are_licences(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "0")
    for name in ("LICENSE", "license.md", "NOTICE.txt", "license.py", "notice.bin", "LICENSE.sh"):
        (folder / name).write_text("x")
    assert {path.name for path in Checkpoint(folder).companions()} == {"LICENSE", "license.md", "NOTICE.txt"}


def vocabulary(letters: str = "abcd", **more: Any) -> str:
    return json.dumps({"model": {"vocab": {letter: row for row, letter in enumerate(letters)}, "merges": []}} | more)


@pytest.mark.parametrize("which", ["tokenizer.json", "vocab.txt"])
def test_a_tokenizer_s_links_are_not_followed(tmp_path: Path, which: str) -> None:
    (tmp_path / "secret").write_text(vocabulary())
    folder, other = model(tmp_path / "m", "0"), tmp_path / "other"
    (folder / "tokenizer.json").write_text(vocabulary())
    other.mkdir()
    (other / "tokenizer.json").write_text(vocabulary())
    (other / which).unlink(missing_ok=True)
    (other / which).symlink_to(tmp_path / "secret")
    with pytest.raises(ModicumError, match="is a link to .*outside its folder"):
        with_vocabulary({"tokenizer": str(other)}, {"m": Checkpoint(folder)}, "m", find=lambda _: other)


FILES: list[tuple[dict[str, str | bytes], dict[str, str | bytes], str | None]] = [
    ({"tokenizer.json": vocabulary()}, {"tokenizer.json": vocabulary()}, None),
    ({"tokenizer.json": vocabulary()}, {"tokenizer.json": vocabulary() + " "}, None),
    ({"tokenizer.json": vocabulary()}, {"tokenizer.json": vocabulary("bacd")}, "other tokens than .*a in 2 rows"),
    (
        {"tokenizer.json": vocabulary()},
        {"tokenizer.json": vocabulary(normalizer={"type": "Lowercase"})},
        r"cuts texts into others \(normalizer\)",
    ),
    (
        {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0}, "merges": ["a b"]}})},
        {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}})},
        None,
    ),
    ({"tokenizer.json": vocabulary()}, {"tokenizer.json": "{"}, "tokenizer.json that cannot be compared"),
    ({"tokenizer.json": vocabulary()}, {"tokenizer.json": vocabulary().encode() + b"\xff"}, "cannot be compared"),
    ({"vocab.json": "1", "merges.txt": "x"}, {"vocab.json": "2", "merges.txt": "x"}, "has another vocab.json than"),
    ({"vocab.json": "1", "merges.txt": "x"}, {"vocab.json": "1", "merges.txt": "y"}, "has another merges.txt than"),
    ({"tokenizer.model": b"x"}, {"tokenizer.model": b"y"}, "has another tokenizer.model than"),
    ({"qwen.tiktoken": "x"}, {"qwen.tiktoken": "y"}, "has another qwen.tiktoken than"),
    ({"vocab.txt": "x"}, {"vocab.txt": "x"}, None),
    ({"vocab.json": "1", "merges.txt": "x"}, {"tokenizer.json": vocabulary()}, "no file of its tokenizer in common"),
    ({"tokenizer.json": vocabulary()}, {}, None),
]


@pytest.mark.parametrize(("one", "other", "told"), FILES)
def test_tokenizers_are_compared_in_every_form(tmp_path: Path, one: Any, other: Any, told: str | None) -> None:
    for name, files in (("a", one), ("b", other)):
        model(tmp_path / name, "0")
        for file, text in files.items():
            (tmp_path / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    notes = notes_on_tokenizers({str(tmp_path / name): Checkpoint(tmp_path / name) for name in "ab"})
    assert len(notes) == (told is not None)
    if told:
        with pytest.raises(AssertionError, match=told):
            raise AssertionError(notes[0])


@pytest.mark.parametrize(
    ("key", "one", "other", "told"),
    [
        ("layer_types", ["full_attention", "sliding_attention"], ["full_attention"] * 2, True),
        ("no_rope_layers", [1, 0], [1, 1], True),
        ("layer_types", ["full_attention"] * 2, ["full_attention"] * 3, False),
    ],
)
def test_what_each_layer_is_matters_between_models_of_one_depth(
    tmp_path: Path, key: str, one: list[Any], other: list[Any], told: bool
) -> None:
    for name, value in (("a", one), ("b", other)):
        layers = [str(number) for number in range(len(value))]
        model(tmp_path / name, *layers, num_hidden_layers=len(value), **{key: value})
    notes = notes_on_configs([Checkpoint(tmp_path / name) for name in "ab"], ["a", "b"])
    assert any(key in note for note in notes) == told
