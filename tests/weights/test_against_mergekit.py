"""The same files through mergekit itself, whose results lie beside them as digests.

MERGEKIT=ENV/bin/mergekit-yaml python -m pytest -m thirdparty tests/weights/test_against_mergekit.py runs mergekit, in
an environment of its own, and compares every number; MERGEKIT_RECORD=1 beside it writes the digests anew.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from modicum.layout import is_recomputed, is_vocabulary, role
from modicum.vocabulary import token_ids
from modicum.weights import Checkpoint
from modicum.weights.aliases import apart
from weights.test_mergekit import FILES, load, run

HERE = Path(__file__).parent
RECORDED = HERE / "mergekit" / "results.json"
PAGE = HERE.parents[1] / "docs/guide/mergekit-differences.md"
needs_mergekit = pytest.mark.skipif("MERGEKIT" not in os.environ, reason="MERGEKIT does not name a mergekit-yaml")
MOE = {f"{family}_{method}" for family in ("mixtral", "qwen3moe") for method in ("slerp", "ties")}
# The differences that the page names: its words for each, the files, and the tensors that differ there.
DIFFERENCES: Mapping[str, tuple[set[str], Any]] = {
    "gradients at the end of the model": (
        {"ties_gradient", "density_to_zero", "switch_by_depth", "nearswap_gradient", "qwen2_nuslerp_task"},
        lambda name: name.endswith(("lm_head.weight", "model.norm.weight")),
    ),
    "experts of a mixture": (MOE, lambda name: ".experts." in name),
    "buffers that transformers recomputes": (
        {"neox_linear", "neox_ties", "neox_karcher"}, lambda name: name.endswith("attention.bias"),
    ),
}  # fmt: skip
# One process for all files: starting mergekit takes longer than all these merges.
SCRIPT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for file in sys.argv[1:]:
    with open(file) as text:
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(config, file.removesuffix(".yaml"), MergeOptions(copy_tokenizer=False, quiet=True))
"""


def canonical(folder: Path) -> dict[str, Tensor]:
    """Return a model's tensors by one set of names, a tensor for each expert, and rows in the order of their tokens."""
    model = apart(Checkpoint(folder))
    tensors = dict(model)
    file = folder / "tokenizer.json"
    if not file.exists():
        return tensors
    ids = token_ids(json.loads(file.read_text()), "")
    for name in filter(is_vocabulary, tensors):
        rows = [ids[token] for token in sorted(ids)]
        rows += sorted(set(range(len(tensors[name]))) - set(rows))
        tensors[name] = tensors[name][rows]
    return tensors


def digest(tensor: Tensor) -> list[Any]:
    """Return what tells a tensor from others: dtype, shape, and three numbers that depend on every entry."""
    flat = tensor.double().reshape(-1)
    place = torch.arange(len(flat), dtype=torch.float64)
    numbers = [flat.sum(), flat.square().sum().sqrt(), flat @ torch.cos(place)]
    return [str(tensor.dtype), list(tensor.shape), *(round(float(x), 6) for x in numbers)]


def differing(file: Path, name: str) -> bool:
    return any(file.stem in files and at(name) for files, at in DIFFERENCES.values())


@pytest.fixture(scope="module")
def theirs(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of mergekit's results, by the names of the files."""
    folder = tmp_path_factory.mktemp("theirs")
    configs = [folder / file.name for file in FILES]
    for file, config in zip(FILES, configs):
        config.write_text(yaml.safe_dump(load(file, zoo)))
    python = Path(os.environ["MERGEKIT"]).parent / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([str(python), "-c", SCRIPT, *map(str, configs)], check=True, env=environment)
    return folder


@pytest.mark.thirdparty
@needs_mergekit
@pytest.mark.filterwarnings("ignore")
def test_the_digests_are_those_of_mergekit(theirs: Path) -> None:
    found = {file.stem: {n: digest(t) for n, t in canonical(theirs / file.stem).items()} for file in FILES}
    if "MERGEKIT_RECORD" in os.environ:
        lines = [f'"{name}": {json.dumps(tensors)}' for name, tensors in sorted(found.items())]
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    recorded = json.loads(RECORDED.read_text())
    assert recorded.keys() == found.keys()
    for name, tensors in found.items():
        assert {key: value[:2] for key, value in tensors.items()} == {k: v[:2] for k, v in recorded[name].items()}
        for key, value in tensors.items():
            torch.testing.assert_close(value[2:], recorded[name][key][2:], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_results_agree_with_those_that_mergekit_gave(file: Path, zoo: Path, tmp_path: Path) -> None:
    expected = json.loads(RECORDED.read_text())[file.stem]
    run(load(file, zoo), tmp_path / "ours")
    made = canonical(tmp_path / "ours/model")
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        kind, shape, *numbers = digest(tensor)
        same = [kind, shape] == expected[name][:2]
        # Rounding moves each entry of a bfloat16 result by up to 1/256 of it, in either direction.
        most = (2e-2 if tensor.dtype != torch.float32 else 2e-5) * (1 + expected[name][3])
        close = all(abs(a - b) <= most for a, b in zip(numbers, expected[name][2:]))
        assert (same and close) or differing(file, name), (name, digest(tensor), expected[name])


@pytest.mark.thirdparty
@needs_mergekit
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_results_agree(file: Path, zoo: Path, theirs: Path, tmp_path: Path) -> None:
    run(load(file, zoo), tmp_path / "ours")
    ours, expected = canonical(tmp_path / "ours/model"), canonical(theirs / file.stem)
    assert ours.keys() == expected.keys()
    seen = set()
    for name, tensor in ours.items():
        if differing(file, name):
            seen |= {name} if not same(tensor, expected[name]) else set()
            continue
        assert same(tensor, expected[name]) or iterated(file, tensor, expected[name]), name
    named = [files for files, _ in DIFFERENCES.values() if file.stem in files]
    assert bool(seen) == bool(named), "A difference that is listed is there, or leaves the list."


def same(a: Tensor, b: Tensor) -> bool:
    tolerance = 2e-5 if a.dtype == torch.float32 else 1e-2
    return a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance / 10)


def iterated(file: Path, a: Tensor, b: Tensor) -> bool:
    """Whether two means that are found step by step agree to the length at which both stop, 1e-5 of the tensor's."""
    return "karcher" in file.stem and a.dtype == b.dtype and float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_there_are_enough_files_of_enough_kinds() -> None:
    assert len(FILES) >= 60
    families = {part.split("/")[1] for file in FILES for part in file.read_text().split() if part.startswith("$R/")}
    assert len(families) >= 15


def test_the_page_names_every_difference() -> None:
    page = " ".join(PAGE.read_text().split())
    for words in DIFFERENCES:
        assert words in page
    for files, _ in DIFFERENCES.values():
        assert files <= {file.stem for file in FILES}


def test_masks_are_buffers_and_heads_are_heads() -> None:
    assert is_recomputed("gpt_neox.layers.0.attention.bias", (1, 1, 4, 4))
    assert role("embed_out.weight") == "head"
