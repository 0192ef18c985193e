"""Models with tables of another vocabulary: all that their rows are made from is watched while it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modicum.errors import CheckpointError, UnsupportedError
from modicum.weights import Checkpoint
from modicum.weights.mergekit.vocabulary import Vocabulary, with_vocabulary
from modicum.weights.retabled import Retabled, rows_of
from modicum.weights.transplant import Transplanted

ROWS = torch.tensor([0, -1])
KINDS: dict[str, Callable[[Checkpoint, Checkpoint], Retabled]] = {
    "union": lambda model, donor: Vocabulary(model, 2, ROWS, [(donor, torch.tensor([-1, 1]))]),
    "transplant": lambda model, donor: Transplanted(model, donor, ROWS, torch.ones(2) > 0, way="nearest", k=1),
}


def save(file: Path, scale: float) -> None:
    tables = {"model.embed_tokens.weight": scale * torch.eye(2), "model.norm.weight": scale * torch.ones(2)}
    save_file(tables, file, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", ["model", "donor"])
def test_a_change_of_the_model_or_of_a_donor_is_noticed(kind: str, changed: str, tmp_path: Path) -> None:
    for name in ("model", "donor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save(tmp_path / name / "model.safetensors", 1.0)
    model, donor = (Checkpoint(tmp_path / name) for name in ("model", "donor"))
    made = KINDS[kind](model, donor)
    made.check()
    assert len(made) == 2 and made.spec("model.embed_tokens.weight").shape == (2, 2)
    assert torch.equal(made["model.embed_tokens.weight"][0], torch.tensor([1.0, 0.0]))
    assert torch.equal(made["model.norm.weight"], torch.ones(2))
    # In place: a file that another one replaces stays what it was to whoever reads it.
    file = tmp_path / changed / "model.safetensors"
    save(tmp_path / "other", 2.0)
    with file.open("r+b") as opened:
        opened.write((tmp_path / "other").read_bytes())
    with pytest.raises(CheckpointError, match=changed):
        made.check()


TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({TABLE: (5, 2), "lm_head.weight": (4, 2)}, "tables of several sizes, 'lm_head.weight' of 4 rows and"),
        ({TABLE: (5, 2), "qformer.embeddings.word_embeddings.weight": (9, 2)}, "tables of several sizes"),
        ({TABLE: (5, 2), "final_logits_bias": (1, 5)}, "'final_logits_bias' has 5 entries as its vocabulary"),
        ({TABLE: (5, 2), "model.values.weight": (5, 3)}, "'model.values.weight' has 5 entries as its vocabulary"),
        ({"model.odd_table.weight": (5, 2)}, "has no embedding of tokens"),
    ],
)
@pytest.mark.parametrize("source", ["union", "base"])
def test_what_one_vocabulary_cannot_order_is_refused(
    shapes: dict[str, tuple[int, ...]], message: str, source: str, tmp_path: Path
) -> None:
    models = {name: tmp_path / name for name in ("base", "a")}
    for words, folder in zip(("abcde", "edcba"), models.values()):
        folder.mkdir()
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        vocabulary = {"model": {"type": "BPE", "vocab": {word: row for row, word in enumerate(words)}, "merges": []}}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UnsupportedError, match=message):
        with_vocabulary({"tokenizer_source": source}, {n: Checkpoint(folder) for n, folder in models.items()}, "base")


def test_what_is_as_wide_as_the_vocabulary_is_long_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({TABLE: torch.eye(5), "model.norm.weight": torch.ones(5)}, tmp_path / "model.safetensors")
    assert rows_of(Checkpoint(tmp_path)) == 5
