"""What a run folder tells whoever reads it: its record, its recipe, its log, and whether its outputs are whole."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modicum.borders import OURS, border, check_plain, check_plain_tree, loads, read_json
from modicum.content import hash_files
from modicum.documents import stored_yaml
from modicum.errors import CheckpointError
from modicum.schema import in_yaml


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Say in which key a stored recipe differs from the one that is to run; nothing where none does.

    Example:
        >>> difference({"method": {"name": "ties", "density": 0.5}}, {"method": {"name": "ties", "density": 0.2}})
        'method.density is 0.5 there, 0.2 here'
    """
    return next(_differences(theirs, ours, ""), "")


def _differences(theirs: Any, ours: Any, place: str) -> Iterator[str]:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in (*theirs, *(key for key in ours if key not in theirs)):
            if place or key != "out":  # where a run lies makes no other run
                yield from _differences(
                    theirs.get(key, _NOTHING), ours.get(key, _NOTHING), f"{place}.{key}".lstrip(".")
                )
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for position, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            yield from _differences(one, other, f"{place}.{position}")
    elif theirs is not ours and theirs != ours:
        told = ["not set" if value is _NOTHING else _short(value) for value in (theirs, ours)]
        yield f"{place} is {told[0]} there, {told[1]} here"


def _short(value: object) -> str:
    text = in_yaml(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_NOTHING = object()  # in the place of a key that a recipe does not have


def read_record(folder: str | Path, *, strict: bool = True) -> dict[str, Any]:
    """Return the record of the run in ``folder``.

    Args:
        folder: The run folder.
        strict: Refuse a record whose parts are not what they should be, rather than leave them to whoever reads them.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    path = Path(folder) / "record.json"
    if not path.exists():
        raise CheckpointError(f"{folder} is not a run: it holds no record.json.")
    record = read_json(path, str(folder), "Delete the folder and run again.")
    for key, kind in KINDS.items() if strict else ():
        if key not in record and key in ALWAYS:
            raise CheckpointError(f"{path} has no {key}. Delete the folder and run again.")
        if not _is(record.get(key, kind()), kind):
            raise CheckpointError(f"{path}: {key} is no {kind.__name__}. Delete the folder and run again.")
    if strict and not _is_sound(record):
        raise CheckpointError(f"{path}: files, outputs or stages are malformed. Delete the folder and run again.")
    if strict and (
        outside := [name for name in _places(record) if Path(name).is_absolute() or ".." in Path(name).parts]
    ):
        raise CheckpointError(f"{path} points outside its folder, to {outside[0]!r}. Do not use this run.")
    return record


def _places(record: Mapping[str, Any]) -> list[str]:
    """Return every path in the run's folder that a record names."""
    stages = [stage["folder"] for stage in record.get("stages") or ()]
    return [*(record.get("files") or ()), *(record.get("outputs") or {}).values(), *stages]


def _is(value: object, kind: type) -> bool:
    """Whether a value is of a kind as JSON has them: a whole number is a number, true and NaN are none."""
    if kind is not float:
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_sound(record: Mapping[str, Any]) -> bool:
    """Whether what a record names are sizes and hashes of files, names of outputs, and folders of stages."""
    files, outputs, stages = (record.get(key) or () for key in ("files", "outputs", "stages"))
    sizes = [record["files"][name] for name in files]
    return (
        all(isinstance(size, list) and [type(part) for part in size] == [int, str] for size in sizes)
        and all(isinstance(record["outputs"][name], str) for name in outputs)
        and all(isinstance(stage, dict) and isinstance(stage.get("folder"), str) for stage in stages)
        and not any("\0" in name for name in (*files, *(stage["folder"] for stage in stages)))
    )


def stored_recipe(folder: str | Path) -> dict[str, Any] | None:
    """Return the recipe of the run in ``folder``, as far as it can be read; ``None`` when there is no run."""
    folder = Path(folder)
    if not (folder / "record.json").is_file():
        return None
    found = {"job": read_record(folder).get("job")}
    try:
        recipe = stored_yaml(folder / "recipe.yaml")
    except CheckpointError:
        return found
    return recipe | found if isinstance(recipe, dict) else found


def read_log(folder: str | Path, event: str | None = None, **kinds: type) -> list[dict[str, Any]]:
    """Return the log's lines, of one kind when ``event`` is given; a line cut off by a crash is left out.

    Args:
        folder: The run folder.
        event: Of which kind.
        **kinds: Keys that a line must have, and what stands under them; other lines were damaged, and are left out.
    """
    lines = [line for line in read_lines(Path(folder) / "log.jsonl") if event is None or line.get("event") == event]
    return [line for line in lines if all(key in line and _is(line[key], kind) for key, kind in kinds.items())]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, if there is one; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    check_plain(path, OURS)
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def end_last_line(path: Path) -> None:
    """Take back a line that a kill or a full disk has cut, so that the file ends with the bytes of an undisturbed run.

    A last line that lacks nothing but its end, as some editors leave it, is closed.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        content = file.read()
        cut = content.rpartition(b"\n")[2]
        if _is_mapping(cut):
            file.write(b"\n")
        elif os.fstat(file.fileno()).st_size == len(content):  # else another process is just writing
            file.truncate(len(content) - len(cut))


def _is_mapping(line: bytes) -> bool:
    try:
        return isinstance(loads(line.decode("utf-8", "surrogatepass")), dict)
    except ValueError:
        return False


ADDED, UNSAID = "was added", "does not say what was made"
WEIGHTS = (".safetensors", ".bin", ".index.json")  # names of what a model is read from end so
# What a record holds under its keys, where it has them.
KINDS = {"job": str, "status": str, "hash": str, "inputs": dict, "metrics": dict, "outputs": dict, "notes": list,
         "files": dict, "stages": list, "environment": dict, "lacks": dict,
         "seconds": float}  # fmt: skip
ALWAYS = ("job", "status")  # and what every record has


@dataclass(frozen=True)
class Verified:
    """What a check of a finished run found.

    Attributes:
        files: How many files its records name, those of its stages included.
        nbytes: Their bytes.
        damaged: See :func:`damage`.
    """

    files: int
    nbytes: int
    damaged: Mapping[str, str]


def verify(folder: str | Path) -> Verified:
    """Read every output of a finished run again, and compare it with what its record says.

    Raises:
        CheckpointError: The record cannot be read, or was written by a version that kept no hashes.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_plain_tree(folder)
    if "files" not in record:
        raise CheckpointError(f"{folder} was made by a version that kept no hashes of outputs: nothing to compare.")
    found = damage(folder, record, cached=False)
    sizes = [size for size, _ in record["files"].values()]
    with border(folder / "record.json", "Delete the folder and run again."):
        for stage in record.get("stages") or []:
            inner = folder / "stages" / Path(stage["folder"]).name
            if (inner / "record.json").is_file():
                sizes += [size for size, _ in (read_record(inner).get("files") or {}).values()]
    return Verified(len(sizes), sum(sizes), found)


def outputs_in(path: Path) -> list[Path]:
    """Return the files of an output, all of them: other stages may read any."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def damage(folder: str | Path, record: Mapping[str, Any] | None = None, *, cached: bool = True) -> dict[str, str]:
    """Return which outputs of a finished run are not what its record says, and in what way.

    Args:
        folder: The run folder.
        record: Its record, when it is known already.
        cached: Files that were hashed before, and look untouched since, are not read again.

    Returns:
        From the path in the folder to what is wrong; empty for a sound run. Stages of a pipeline count too, and so does
        what the run says that it lacks.
    """
    folder = Path(folder)
    record = read_record(folder) if record is None else record
    with border(folder / "record.json", "Delete the folder and run again."):
        return _damage(folder, record, cached)


def _damage_of_stage(folder: Path, cached: bool) -> dict[str, str]:
    record = read_record(folder)
    return damage(folder, record, cached=cached) if record["status"] == "done" else {"record.json": UNSAID}


def _added(folder: Path, record: Mapping[str, Any], known: Mapping[str, object]) -> list[str]:
    """Return weights, and lists of their files, that somebody laid beside those of the run's outputs."""
    found = []
    for output in record.get("outputs", {}).values():
        if any(name.startswith(f"{output}/") for name in known) and (folder / output).is_dir():
            files = [path for path in outputs_in(folder / output) if path.name.endswith(WEIGHTS)]
            found += [str(path.relative_to(folder)) for path in files]
    return [name for name in dict.fromkeys(found) if name not in known and not Path(name).name.startswith(".")]


def _damage(folder: Path, record: Mapping[str, Any], cached: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    known: Mapping[str, list[Any]] = record.get("files") or {}
    if "files" not in record and "numerics" in record:
        return {"record.json": UNSAID}
    if "files" not in record:  # of version 0.1.0
        found = {
            path: "is missing" for path in list(record.get("outputs", {}).values())[:1] if not (folder / path).exists()
        }
    there = {name: folder / name for name in known if (folder / name).is_file()}
    sized = {name: path for name, path in there.items() if path.stat().st_size == known[name][0]}
    hashes = hash_files(list(sized.values()), cached=cached)
    for name, (_, expected) in known.items():
        if name not in there:
            found[name] = "is missing"
        elif name not in sized or hashes[sized[name]] != expected:
            found[name] = "changed"
    found |= dict.fromkeys(record.get("lacks") or (), "is incomplete")
    found |= dict.fromkeys(_added(folder, record, known), ADDED)
    for stage in record.get("stages") or []:
        inner = folder / "stages" / Path(stage["folder"]).name
        lost = not (inner / "record.json").is_file()
        within = {"record.json": "is missing"} if lost else _damage_of_stage(inner, cached)
        found |= {f"{stage['folder']}/{name}": problem for name, problem in within.items()}
    return found
