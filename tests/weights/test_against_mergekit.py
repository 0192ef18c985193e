"""The same files through mergekit itself; MERGEKIT names its mergekit-yaml, in an environment of its own."""

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
GRADIENT_AT_THE_END = {"ties_gradient", "linear_filters", "slerp"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_results_agree(file: Path, root: Path, tmp_path: Path) -> None:  # noqa: F811
    document = load(file, root)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(document))
    command = [os.environ["MERGEKIT"], str(config), str(tmp_path / "theirs"), "--no-copy-tokenizer", "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = {k: v for f in (tmp_path / "theirs").glob("*.safetensors") for k, v in load_file(f).items()}
    ours = run(document, tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if file.stem in GRADIENT_AT_THE_END and "layers" not in name:
            continue
        assert tensor.dtype == theirs[name].dtype
        tolerance = 1e-2 if tensor.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance / 10, msg=name)
