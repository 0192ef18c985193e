"""Models with tables of another vocabulary: all that their rows are made from is watched while it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modicum.errors import CheckpointError
from modicum.weights import Checkpoint
from modicum.weights.mergekit.vocabulary import Vocabulary
from modicum.weights.retabled import Retabled
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
