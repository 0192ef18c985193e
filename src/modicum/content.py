"""What files hold: the hash of all their bytes, which a run's identity is made of.

The hash is XXH3 of 128 bits, as ``xxhsum -H128`` prints it: it tells files apart that were changed by mistake, not
files that were made to look alike. A large file that was hashed before is not read again as long as its device, inode,
size and times of change are the same; that memory lies in the user's cache (:func:`cache_folder`) and may be deleted.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from modicum.borders import expanded
from modicum.errors import CheckpointError
from modicum.layout import ADAPTER_CONFIG, STATE_FILES, TOKENIZER_FILES

BLOCK = 1 << 20  # bytes that are read at once; smaller files are not worth remembering
SETTLED = 2.0  # seconds after a change within which a second one may leave the same time
KEPT = 20_000  # files that are remembered at most
MODELS = ("config.json", ADAPTER_CONFIG)  # a folder with one of them is a model
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
DEEPER = (".py", ".jinja")  # code and chat templates, which transformers reads from folders inside a model's
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def cache_folder() -> Path:
    """Return where modicum keeps what it makes once: ``MODICUM_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("MODICUM_CACHE")
    if chosen:
        return expanded(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modicum"


@dataclass(frozen=True)
class Stamp:
    """What changes whenever a file does, without reading it.

    Attributes:
        device: The file system.
        inode: Which file there.
        size: Bytes.
        modified: When its content was changed last, in nanoseconds.
        changed: When it or its attributes were changed last, which nobody can set.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Look at a file.

        Raises:
            CheckpointError: It is not there, or it is no plain file.
        """
        try:
            found = path.stat()
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
        if not stat.S_ISREG(found.st_mode):
            kind = KINDS.get(stat.S_IFMT(found.st_mode), "a folder")
            raise CheckpointError(f"{path} is {kind}, expected a file. Give the file itself.")
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def hash_file(path: Path, *, cached: bool = True) -> str:
    """Return the hash of all bytes of a file, 32 hexadecimal digits.

    Args:
        path: The file.
        cached: Do not read a large file again whose device, inode, size and times are as they were.

    Raises:
        CheckpointError: It is no plain file, it cannot be read, or it changes meanwhile.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = file.write_text("modicum")
        >>> hash_file(file)
        '1a25b370a0b64fe410c52b7afa9c7095'
    """
    before = Stamp.of(path)
    note = _note(before) if cached and before.size > BLOCK else None
    if note is not None and (known := _remembered(note)) is not None:
        return known
    found = _read(path)
    if Stamp.of(path) != before:
        raise changed(path)
    if note is not None and time.time() - max(before.modified, before.changed) / 1e9 > SETTLED:
        _remember(note, found)
    return found


def hash_files(paths: Sequence[Path], *, cached: bool = True) -> dict[Path, str]:
    """Return the hash of each file, several files at a time; see :func:`hash_file`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores == 1 or sum(Stamp.of(path).size > BLOCK for path in paths) < 2:
        return {path: hash_file(path, cached=cached) for path in paths}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(cores, len(paths)), "hash") as pool:  # hashing needs no interpreter lock
        return dict(zip(paths, pool.map(lambda path: hash_file(path, cached=cached), paths)))


def files_in(path: Path) -> list[Path]:
    """Return the files that a file or folder consists of; what an unfinished write left there is none of them.

    A model is what lies in its own folder: neither what was kept in folders inside, such as older checkpoints, nor a
    trainer's state. Code and chat templates may lie deeper. The weights of a model, given by themselves, bring the
    configuration and the tokenizer along that lie beside them, as whoever reads them does.

    Raises:
        CheckpointError: There is nothing, or it is neither a file nor a folder.
    """
    if not path.is_dir():
        Stamp.of(path)
        return [path, *_beside_weights(path)]
    try:
        found = [item for item in path.rglob("*") if item.is_file()]
    except OSError as error:
        raise _unreadable(path, error) from None
    if any((path / name).is_file() for name in MODELS):
        found = [f for f in found if f.suffix in DEEPER or (f.parent == path and not STATE_FILES.match(f.name))]
    return sorted(item for item in found if not any(map(_is_unfinished, item.relative_to(path).parts)))


def _beside_weights(path: Path) -> list[Path]:
    """Return what belongs to weights that are given by themselves: the other files of their model but for weights."""
    folder = path.parent
    if path.suffix not in WEIGHTS or not any((folder / name).is_file() for name in ("config.json", *TOKENIZER_FILES)):
        return []
    found = (file for file in sorted(folder.iterdir()) if file.suffix not in WEIGHTS and file.is_file())
    return [file for file in found if not (STATE_FILES.match(file.name) or _is_unfinished(file.name))]


def fingerprint(path: str | Path) -> str:
    """Return the hash of all that a file or folder holds: for a folder, of the names and contents of its files.

    Raises:
        CheckpointError: It cannot be read, or it changes meanwhile.
    """
    return combine(Path(path), hash_files(files_in(Path(path))))


def combine(path: Path, hashes: dict[Path, str]) -> str:
    """Return the fingerprint of a file or folder, given the hashes of its files."""
    if list(hashes) == [path]:
        return hashes[path]
    from xxhash import xxh3_128_hexdigest

    folder = path if path not in hashes else path.parent
    lines = sorted(f"{file.relative_to(folder).as_posix()}\0{value}\n" for file, value in hashes.items())
    return xxh3_128_hexdigest("".join(lines).encode("utf-8", "surrogateescape"))


def old_fingerprint(path: Path) -> str:
    """Return what version 0.1.0 called the fingerprint: of files beyond 1 MiB, only the first and last 64 KiB count.

    It recognises the records and recipes of that version, and nothing else.
    """
    import hashlib

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != ".lock")
    sha = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.relative_to(path) if path.is_dir() else file.name}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= 1 << 20:
                sha.update(handle.read())
            else:
                sha.update(handle.read(1 << 16))
                handle.seek(-(1 << 16), os.SEEK_END)
                sha.update(handle.read())
    return sha.hexdigest()[:16]


def is_old(value: str) -> bool:
    """Whether a fingerprint is one of version 0.1.0.

    Example:
        >>> is_old("0f4acd6d3a6c2b71"), is_old("0f4acd6d3a6c2b710f4acd6d3a6c2b71")
        (True, False)
    """
    return re.fullmatch(r"[0-9a-f]{16}", value) is not None


def changed(path: Path) -> CheckpointError:
    """Return the error of an input that did not stay as it was."""
    return CheckpointError(f"{path} changed while it was read. Run again when nothing writes to it any more.")


def unchanged(stamps: Iterable[tuple[Path, Stamp]]) -> None:
    """Raise unless every file is as it was.

    Raises:
        CheckpointError: One was changed, replaced or removed.
    """
    for path, before in stamps:
        try:
            same = Stamp.of(path) == before
        except CheckpointError:
            same = False
        if not same:
            raise changed(path)


def check_in_place(path: Path, before: Stamp, known: str | None) -> None:
    """Raise where a file that is open, and may be mapped, was written to.

    A file that was removed or replaced by another is kept by the system for whoever has it open.

    Args:
        path: The file.
        before: How it looked when it was opened.
        known: Its hash at that time, if it is known: its mode or its times alone may have changed.

    Raises:
        CheckpointError: Its content is not what it was.
    """
    try:
        now = Stamp.of(path)
    except CheckpointError:
        return
    if (now.device, now.inode) != (before.device, before.inode) or now == before:
        return
    if now.size != before.size or hash_file(path) != known:
        raise changed(path)


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith((".partial", ".lock", ".replaced", ".removed", ".failed"))


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}. Check the path.")


def _read(path: Path) -> str:
    from xxhash import xxh3_128

    found, buffer = xxh3_128(), memoryview(bytearray(BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                found.update(buffer[:count])
    except OSError as error:
        raise _unreadable(path, error) from None
    return found.hexdigest()


def _note(stamp: Stamp) -> Path:
    return cache_folder() / "hashes" / "-".join(f"{number:x}" for number in astuple(stamp))


def _remembered(note: Path) -> str | None:
    try:
        text = note.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{32}", text) else None  # a loss of power may leave anything


def _remember(note: Path, found: str) -> None:
    """Keep a hash for the next time; where the cache cannot be written, the file is read again then."""
    beside = note.with_name(f".{note.name}.{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(found, encoding="ascii")
        beside.replace(note)
        if note.name.endswith("0"):  # now and then
            _forget(note.parent)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _forget(folder: Path) -> None:
    notes = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in notes[: max(0, len(notes) - KEPT)]:
        path.unlink(missing_ok=True)
