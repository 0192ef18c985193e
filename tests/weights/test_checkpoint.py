from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modicum.errors import CheckpointError, UnsupportedError
from modicum.weights import Checkpoint
from weights.conftest import Family, random_tensors, write_model


def test_a_sharded_checkpoint_reads_like_a_single_one(tmp_path: Path) -> None:
    tensors = random_tensors(0)
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, tmp_path / "model-00002-of-00002.safetensors")
    where = {n: f"model-0000{1 if n in names[:2] else 2}-of-00002.safetensors" for n in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    checkpoint = Checkpoint(tmp_path)
    assert list(checkpoint) == names
    assert len(checkpoint) == len(names)
    assert all(torch.equal(checkpoint[n], tensors[n]) for n in names)
    assert checkpoint.nbytes == sum(t.nbytes for t in tensors.values())

    index.write_text(json.dumps({"weight_map": {**where, "ghost": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="has no tensor 'ghost'"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {**where, names[0]: "model-00003-of-00003.safetensors"}}))
    with pytest.raises(CheckpointError, match="does not list, the tensor"):
        Checkpoint(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors does not exist"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_may_not_point_outside_its_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        Checkpoint(tmp_path)


def test_pickled_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights only"):
        Checkpoint(tmp_path)
    assert torch.equal(Checkpoint(tmp_path, pickled=True)["w"], torch.ones(2))


def test_a_pickle_that_runs_code_is_refused_even_then(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"w": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        Checkpoint(tmp_path, pickled=True)


def test_a_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no model folder"):
        Checkpoint(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(CheckpointError, match="holds no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "notes.pdf").write_text("")
    with pytest.raises(CheckpointError, match=r"expected \.safetensors"):
        Checkpoint(tmp_path / "notes.pdf")


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"l.qweight": torch.ones(2, 2, dtype=torch.int32)}, {}),
        ({"l.weight": torch.ones(2, 2, dtype=torch.float8_e4m3fn)}, {}),
        ({"l.weight": torch.ones(2, 2)}, {"quantization_config": {"quant_method": "gptq"}}),
    ],
)
def test_quantised_weights_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    write_model(tmp_path / "q", tensors, **config)
    with pytest.raises(UnsupportedError, match="quantised"):
        Checkpoint(tmp_path / "q")


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    tensors = random_tensors(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = write_model(tmp_path / "tied", tensors, tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint(folder)
    untied = write_model(tmp_path / "untied", tensors, tie_word_embeddings=False)
    assert "lm_head.weight" in Checkpoint(untied)
    tensors["lm_head.weight"] += 1
    broken = write_model(tmp_path / "broken", tensors, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="but the two differ"):
        Checkpoint(broken)


@pytest.mark.parametrize(
    ("embedding", "head"),
    [
        ("transformer.wte.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("transformer.word_embeddings.weight", "lm_head.weight"),
        ("shared.weight", "lm_head.weight"),
        ("model.tok_embeddings.weight", "output.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_tied_heads_of_every_name_are_one_tensor(embedding: str, head: str, tmp_path: Path) -> None:
    table = torch.ones(6, 4)
    folder = write_model(tmp_path / "m", {embedding: table, head: table.clone()}, tie_word_embeddings=True)
    assert list(Checkpoint(folder)) == [embedding]
    broken = write_model(tmp_path / "broken", {embedding: table, head: 2 * table}, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=head):
        Checkpoint(broken)


def test_companions_are_the_model_s_files_and_not_its_weights(family: Family) -> None:
    base, _ = family
    (base / "model.safetensors.index.json.bak").write_text("")
    (base / "trainer_state.json").write_text("{}")
    (base / "LICENSE").write_text("free")
    names = [path.name for path in Checkpoint(base).companions()]
    assert names == ["LICENSE", "chat_template.jinja", "config.json", "tokenizer.json"]


def test_pickled_weights_that_lie_there_twice_are_refused(tmp_path):
    for name, value in (("pytorch_model.bin", 1.0), ("pytorch_model-00001-of-00001.bin", 2.0)):
        torch.save({"w": torch.full((2,), value)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="both have 'w'. Remove one"):
        Checkpoint(tmp_path, allow_pickle=True)
