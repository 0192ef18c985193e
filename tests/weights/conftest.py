"""Small checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import measured

SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_proj.weight": (6, 6),
    "model.layers.0.mlp.up_proj.weight": (8, 6),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.norm.weight": (6,),
}

Family = tuple[Path, list[Path]]
MakeFamily = Callable[..., Family]


def random_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in SHAPES.items()}


def write_model(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of families of models, which the mergekit files call ``$R``."""
    from weights.families import make_all

    return make_all(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def make_family(tmp_path: Path) -> MakeFamily:
    def make(experts: int = 2, dtype: torch.dtype = torch.bfloat16) -> Family:
        base = write_model(tmp_path / "base", random_tensors(0, dtype))
        return base, [write_model(tmp_path / f"expert{i}", random_tensors(i + 1, dtype)) for i in range(experts)]

    return make


def statistics_of(method: str, experts: list[Path]) -> dict[str, list[Path]]:
    """Write made-up statistics beside the experts, for a method that needs them: as keywords of a merge."""
    folders = []
    for expert, tensors in zip(experts, measured(method, [load_file(e / "model.safetensors") for e in experts])):
        folders.append(expert.with_name(f"{expert.name}-{method}"))
        folders[-1].mkdir(exist_ok=True)
        save_file(tensors, folders[-1] / "model.safetensors")
    return {"statistics": folders} if folders else {}


@pytest.fixture
def family(make_family: MakeFamily) -> Family:
    return make_family()
