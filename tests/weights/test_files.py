from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modicum.errors import CheckpointError
from modicum.weights.files import MappedFile, Spec, lay_out, plan_files, put, read_header


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)])
def test_reads_what_safetensors_writes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": (torch.rand(shape) * 9).to(dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    slots = read_header(tmp_path / "x.safetensors", owner="x")
    file = MappedFile(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(slots[name]), tensor)
        assert file.tensor(slots[name]).dtype == tensor.dtype


def test_safetensors_reads_what_is_written_in_any_order(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(3).half(), "wide": torch.randn(2, 2).double(), "scalar": torch.tensor(2.5)}
    path = tmp_path / "y.safetensors"
    header, slots = lay_out(path, {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()})
    with path.open("wb") as file:
        file.write(header)
        for name in ("scalar", "wide", "half"):
            put(file.fileno(), slots[name], tensors[name])
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert torch.equal(opened.get_tensor(name), tensor)


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    big, small = Spec((100,), torch.float32), Spec((1,), torch.float32)
    files = plan_files({"a": small, "b": big, "c": small}, shard_bytes=40)
    assert [list(group) for group in files.values()] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"x", "bytes follow"),
        (lambda b: b[:4], "header"),
        (lambda b: b"", "header"),
        (lambda b: (1 << 40).to_bytes(8, "little") + b[8:], "header"),
        (lambda b: b[:8] + b"}" + b[9:], "not JSON"),
        (lambda b: b.replace(b'"F32"', b'"Q99"'), "dtype Q99"),
        (lambda b: b.replace(b"[0,8]", b"[0,4]"), "takes 8 bytes"),
        (lambda b: b.replace(b"[0,8]", b"[4,8]"), "takes 8 bytes"),
        (lambda b: b.replace(b"data_offsets", b"data_offsetz"), "malformed"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path, owner="my-model")
    assert "my-model" in str(error.value)
    assert "\n" not in str(error.value)
