"""One architecture under several names: what only names tell apart is merged as it is under one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.jobs import execute
from modicum.recipe import parse
from modicum.weights import Checkpoint, extract_lora, merge
from modicum.weights.aliases import Renamed, aligned
from weights.families import make_family

Tensors = dict[str, Tensor]


def bare(tensors: Tensors) -> Tensors:
    """Return GPT-2's tensors as its body alone is saved."""
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """Return tensors with the experts of each layer in one, as transformers 5 holds them."""
    made: dict[str, Any] = {}
    kinds = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    for name, tensor in tensors.items():
        left, apart, right = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        if apart:
            number, kind, _ = right.split(".")
            made.setdefault(f"{left}.experts", {}).setdefault(kinds[kind], {})[int(number)] = tensor
        else:
            made[left] = tensor
    for name in [name for name, value in made.items() if isinstance(value, dict)]:
        parts = {kind: torch.stack([each[i] for i in sorted(each)]) for kind, each in made.pop(name).items()}
        made[f"{name}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        made[f"{name}.down_proj"] = parts["down"]
    return made


CASES = {"gpt2": bare, "mixtral": fused, "qwen3moe": fused}


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A family, and the same one by other names."""
    plain, other = (tmp_path_factory.mktemp(name) for name in ("plain", "other"))
    make_family(plain, request.param)
    make_family(other, request.param)
    for name in ("base", "a", "b"):
        file = other / name / "model.safetensors"
        save_file(CASES[request.param](load_file(file)), file, {"format": "pt"})
    return plain, other


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mergekit", [False, True])
@pytest.mark.parametrize("mixed", [{"base"}, {"a"}, {"a", "b"}])
def test_models_merge_whatever_they_are_called(
    pair: tuple[Path, Path], mixed: set[str], mergekit: bool, tmp_path: Path
) -> None:
    plain, other = pair
    apart = [str(plain / name) for name in ("base", "a", "b")]
    base, *experts = (str((other if name in mixed else plain) / name) for name in ("base", "a", "b"))

    def run(base: str, experts: list[str], out: str) -> Checkpoint:
        ours = {"job": "merge", "base": base, "experts": experts, "method": {"name": "ties", "density": 0.5}}
        models = [{"model": e, "parameters": {"weight": 1, "density": 0.5}} for e in experts]
        theirs = {"merge_method": "ties", "base_model": base, "models": models}
        execute(parse(theirs if mergekit else ours), tmp_path / out, quiet=True)
        return Checkpoint(tmp_path / out / "model")

    expected, made = run(apart[0], apart[1:], "plain"), run(base, experts, "mixed")
    if set(made) != set(expected):  # a base without its prefix
        made = aligned([expected, made])[1]
    assert set(made) == set(expected)
    for name in expected:
        assert torch.equal(made[name], expected[name]), name


def test_an_extraction_finds_the_names_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain, other = pair
    found = [extract_lora(model / "a", plain / "base", tmp_path / model.name, max_rank=2) for model in (plain, other)]
    assert found[0] == found[1]


def test_parts_are_known_without_being_read_and_are_part_of_the_identity(pair: tuple[Path, Path]) -> None:
    plain, other = (Checkpoint(folder / "a") for folder in pair)
    seen = aligned([plain, other])[1]
    assert isinstance(seen, Renamed)
    assert len(seen) == len(plain)
    for name in plain:
        assert name in seen
        assert seen.spec(name) == plain.spec(name)
    assert seen.identity != other.identity
    assert aligned([plain, plain])[1] is plain


def test_what_differs_in_more_than_names_stays_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain, other = pair
    tensors = load_file(other / "b" / "model.safetensors")
    less = {name: tensor for name, tensor in tensors.items() if not name.endswith(("ln_f.weight", "norm.weight"))}
    (tmp_path / "b").mkdir()
    save_file(less, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b/config.json").write_bytes((other / "b/config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no tensor"):
        merge(None, [plain / "a", tmp_path / "b"], tmp_path / "out", method="linear")


def test_what_is_excluded_may_be_missing_under_other_names_too(tmp_path: Path) -> None:
    make_family(tmp_path, "gpt2")
    file = tmp_path / "a/model.safetensors"
    whole = load_file(file)
    save_file(bare({name: tensor for name, tensor in whole.items() if "wpe" not in name}), file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="has no tensor 'transformer.wpe.weight'"):
        merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "none", method="task_arithmetic")
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", method="task_arithmetic", exclude="wpe")
    made, base = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "base")
    for name in made:
        torch.testing.assert_close(made[name], base[name] if "wpe" in name else whole[name])
