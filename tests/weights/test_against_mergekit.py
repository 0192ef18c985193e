"""The same files through mergekit itself; MERGEKIT names its mergekit-yaml, in an environment of its own.

MERGEKIT=ENV/bin/mergekit-yaml python -m pytest -m thirdparty tests/weights/test_against_mergekit.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from weights.test_mergekit import FILES, load, root, run  # noqa: F401 - root is a fixture

pytestmark = [
    pytest.mark.thirdparty,
    pytest.mark.skipif("MERGEKIT" not in os.environ, reason="MERGEKIT does not name a mergekit-yaml"),
]
# Where docs/guide/mergekit-differences.md says that we differ: the depth at which the last tensors see a gradient.
GRADIENT_AT_THE_END = {"ties_gradient", "linear_filters", "slerp", "density_to_zero", "switch_by_depth"}


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


@pytest.fixture(scope="module")
def theirs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Folder of mergekit's results, by the names of the files."""
    folder = tmp_path_factory.mktemp("theirs")
    configs = [folder / file.name for file in FILES]
    for file, config in zip(FILES, configs):
        config.write_text(yaml.safe_dump(load(file, root)))
    python = Path(os.environ["MERGEKIT"]).parent / "python"
    subprocess.run([str(python), "-c", SCRIPT, *map(str, configs)], check=True)
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_results_agree(file: Path, root: Path, theirs: Path, tmp_path: Path) -> None:  # noqa: F811
    expected = {k: v for f in (theirs / file.stem).glob("*.safetensors") for k, v in load_file(f).items()}
    ours = run(load(file, root), tmp_path / "ours")
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        if file.stem in GRADIENT_AT_THE_END and "layers" not in name:
            continue
        assert tensor.dtype == expected[name].dtype
        tolerance = 1e-2 if tensor.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(
            tensor, expected[name], rtol=tolerance, atol=tolerance / 10, msg=lambda text, name=name: f"{name}: {text}"
        )
