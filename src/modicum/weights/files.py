"""The safetensors format, read by memory mapping and written in place.

A file is an 8-byte length, a JSON header and the tensors' bytes. Knowing every shape and dtype beforehand, the header
can be written first and each tensor's bytes put at their offset in any order, by any thread or process: that is what
makes a streamed result parallel, resumable and equal to the last byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.borders import check_plain, loads
from modicum.content import Stamp, changed
from modicum.errors import CheckpointError, InputGoneError, first_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """Where a tensor's bytes lie."""

    path: Path
    spec: Spec
    start: int


def read_header(path: Path, *, owner: str) -> dict[str, Slot]:
    """Return where each tensor of a safetensors file lies, having checked that all of it is there.

    Args:
        path: The file.
        owner: Name of the model, for error messages.

    Raises:
        CheckpointError: The file is missing, truncated or corrupt.
    """
    corrupt = f"{owner}: {path.name} is not a valid safetensors file"
    check_plain(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{corrupt}: its header should take {length} bytes, the file has {size}. Download it again."
                )
            header = loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{owner}: {path} does not exist. Download the model again.") from None
    except OSError as error:
        raise CheckpointError(f"{owner}: cannot read {path}: {error.strerror}. Check its permissions.") from None
    except (ValueError, RecursionError, MemoryError):
        raise CheckpointError(f"{corrupt}: its header is not JSON. Download it again.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{corrupt}: its header is not a mapping. Download it again.")
    header.pop("__metadata__", None)
    if not header:
        raise CheckpointError(f"{owner}: {path.name} holds no tensors. Download it again.")
    slots = {name: _slot(path, name, entry, 8 + length, corrupt) for name, entry in header.items()}
    _check_cover(slots, 8 + length, size, corrupt)
    _ask_the_library(path, corrupt)
    return slots


def _ask_the_library(path: Path, corrupt: str) -> None:
    """Refuse what the format's own library refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{corrupt}: {first_line(error)} Download it again.") from None


def _slot(path: Path, name: str, entry: object, data: int, corrupt: str) -> Slot:
    try:
        shape = tuple(entry["shape"])  # type: ignore[index]
        begin, end = entry["data_offsets"]  # type: ignore[index]
        code = entry["dtype"]  # type: ignore[index]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{corrupt}: tensor {name!r} has a malformed header entry. Download it again.")
    if code not in DTYPES:
        raise CheckpointError(f"{corrupt}: tensor {name!r} has dtype {code}; known: {', '.join(DTYPES)}.")
    spec = Spec(shape, DTYPES[code])
    if end - begin != spec.nbytes:
        raise CheckpointError(
            f"{corrupt}: tensor {name!r} of shape {list(shape)} {code} takes {spec.nbytes} bytes, "
            f"its header says {end - begin}. Download it again."
        )
    return Slot(path, spec, data + begin)


def _check_cover(slots: Mapping[str, Slot], data: int, size: int, corrupt: str) -> None:
    position = data
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].spec.nbytes)):
        if slot.start != position:
            raise CheckpointError(f"{corrupt}: tensor {name!r} overlaps another or leaves a hole. Download it again.")
        position += slot.spec.nbytes
        if position > size:
            raise CheckpointError(
                f"{corrupt}: truncated, tensor {name!r} ends at byte {position}, the file has {size}. "
                "Download it again."
            )
    if position != size:
        raise CheckpointError(f"{corrupt}: {size - position} bytes follow the last tensor. Download it again.")


def map_slot(file: mmap.mmap, slot: Slot) -> Tensor | None:
    """Return the place of a tensor in a mapped file; none where it is empty or not aligned."""
    spec = slot.spec
    if not spec.numel or slot.start % spec.dtype.itemsize:
        return None
    return torch.frombuffer(file, dtype=spec.dtype, count=spec.numel, offset=slot.start).view(spec.shape)


def let_go(file: mmap.mmap, slot: Slot) -> None:
    """Take a finished tensor's pages out of this process, while the system keeps them.

    The system would otherwise look up every page here to write it to the disk, and this process would ask for it anew.
    """
    first, end = -(-slot.start // mmap.PAGESIZE), (slot.start + slot.spec.nbytes) // mmap.PAGESIZE
    if end > first:
        file.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE)


class MappedFile:
    """A file's tensors as views of its memory map: the pages belong to the page cache, not to this process.

    Args:
        path: The file.
        stamp: How it looked when its header was read.

    Raises:
        InputGoneError: It is not there any more.
        CheckpointError: It is not what it was.
    """

    def __init__(self, path: Path, stamp: Stamp | None = None) -> None:
        try:
            with path.open("rb") as file:
                # A private writable map keeps torch from warning of read-only memory; nothing ever writes to it.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise InputGoneError(
                f"Cannot read {path} any more: {error.strerror or error}. Put it back and run again."
            ) from None
        except ValueError:  # empty by now
            raise changed(path) from None
        if stamp is not None and Stamp.of(path) != stamp:
            raise changed(path)  # its header was another one's
        self._map.madvise(mmap.MADV_SEQUENTIAL)

    def tensor(self, slot: Slot) -> Tensor:
        """Return the tensor in ``slot``, without copying."""
        spec = slot.spec
        if not spec.numel:
            return torch.empty(spec.shape, dtype=spec.dtype)
        mapped = map_slot(self._map, slot)
        if mapped is None:  # files of other writers need not align
            stop = slot.start + spec.nbytes
            return torch.frombuffer(bytearray(self._map[slot.start : stop]), dtype=spec.dtype).view(spec.shape)
        return mapped


def plan_files(specs: Mapping[str, Spec], *, shard_bytes: int, stem: str = "model") -> dict[str, dict[str, Spec]]:
    """Spread tensors over files of at most ``shard_bytes`` (or one tensor), in order.

    Example:
        >>> spec = Spec((2,), torch.float32)
        >>> list(plan_files({"a": spec, "b": spec}, shard_bytes=8))
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    groups: list[dict[str, Spec]] = [{}]
    used = 0
    for name, spec in specs.items():
        if groups[-1] and used + spec.nbytes > shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = spec
        used += spec.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def lay_out(path: Path, specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, Slot]]:
    """Return the header of a file that will hold ``specs``, and where each tensor's bytes go."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    # Widest types first keeps every tensor aligned to its own size.
    ordered = sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize)
    for name, spec in ordered:
        entries[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    slots: dict[str, Slot] = {}
    start = 8 + len(text)
    for name, spec in ordered:
        slots[name] = Slot(path, spec, start)
        start += spec.nbytes
    return len(text).to_bytes(8, "little") + text, slots


def put(descriptor: int, slot: Slot, tensor: Tensor) -> None:
    """Write a tensor's bytes at its place."""
    if not slot.spec.numel:
        return
    view = _bytes_of(tensor)
    written = 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written : written + (1 << 30)], slot.start + written)


def digest_tensor(tensor: Tensor) -> str:
    """Return a hash of a tensor's shape, dtype and bytes.

    Example:
        >>> digest_tensor(torch.zeros(2)) == digest_tensor(torch.zeros(2)) != digest_tensor(torch.zeros(2, 1))
        True
    """
    sha = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    sha.update(_bytes_of(tensor))
    return sha.hexdigest()[:16]


def _bytes_of(tensor: Tensor) -> memoryview:
    content: Any = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return memoryview(content)
