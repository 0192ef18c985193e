"""Files and folders of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modicum.borders import LARGEST, border, check_plain, expanded, loads
from modicum.data_files import data_files, whole
from modicum.errors import CheckpointError, first_line, listed
from modicum.evaluate.rows import Row
from modicum.jobs.data.bad_rows import BadRow
from modicum.jobs.data.section import DataSection
from modicum.registry import source

LONGEST = 64 << 20  # letters of a line
BATCH = 256  # rows of a table that are decoded at once
SMALL, GROWTH = 256 << 20, 100  # bytes that any table's rows may take, and how many times those of its file
ROW = 100  # bytes that a row takes at least
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "dev": "validation"}


def _itself(section: DataSection, name: str) -> Iterator[str]:  # noqa: ARG001
    """Yield the file or folder, whose content is part of a run's identity."""
    yield from whole(name)


@source("file", inputs=_itself)
def local(section: DataSection, name: str) -> list[Row]:
    """Read a file, a folder of files, or a folder that ``datasets`` wrote with ``save_to_disk``.

    Tables are ``.jsonl``, ``.json`` and ``.parquet``; ``.txt``, ``.md`` and ``.py`` hold one document each.

    Args:
        section: ``split``, ``size`` and ``fields`` are read.
        name: The file or folder.

    Raises:
        CheckpointError: There is no such file or split, or a file cannot be read.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> rows = local(DataSection(path="data.jsonl"), "data.jsonl")  # doctest: +SKIP

    Cost:
        The files are held in memory whole.
    """
    path = expanded(name)
    if path.is_file():
        if section.split != "train":
            raise CheckpointError(f"{path} is one file and has only the split train, got {section.split!r}.")
        return _read(path, section.fields.text)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(section, path)
    found = data_files(path)
    # A README beside tables describes them; it is data only where there is nothing else.
    files = [file for file in found if file.suffix in TABLES] or [file for file in found if file.suffix in TEXTS]
    if not files:
        raise CheckpointError(f"{path} holds no data files, expected {', '.join(SUFFIXES)}.")
    # Files or folders named after splits, such as test.jsonl or train/0.parquet, are the splits; else all is train.
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    chosen = [file for file in files if splits[file] == section.split]
    if not chosen:
        raise CheckpointError(f"{path} has the splits {listed(set(splits.values()))}, got {section.split!r}.")
    return [row for file in chosen for row in _read(file, section.fields.text)]


def _split_of(file: Path) -> str:
    stem = file.stem.replace("_", "-").replace(".", "-").partition("-")[0]
    return next((SPLITS[part] for part in (*file.parts[:-1], stem) if part in SPLITS), "train")


def _read(file: Path, text_field: str) -> list[Row]:
    check_plain(file)
    try:
        if file.suffix in TEXTS:
            text = _whole(file, "Cut it into several files.")
            return [{text_field: text}] if text.strip() else []
        if file.suffix in TABLES:
            return TABLES[file.suffix](file)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror or error}.") from None
    raise CheckpointError(f"{file} has the suffix {file.suffix!r}, expected {', '.join(SUFFIXES)}.")


def _read_jsonl(file: Path) -> list[Row]:
    """Return the rows of the lines; a line that is no row comes as a :class:`BadRow`."""
    rows: list[Row] = []
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except (ValueError, RecursionError) as error:
            row = BadRow(f"{file}, line {number} is not valid JSON: {first_line(error).partition(': line')[0]}.")
        if not isinstance(row, dict):
            row = BadRow(f"{file}, line {number} is {type(row).__name__}, expected an object.")
        rows.append(row)
    return rows


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers; one that is no row is not read to its end."""
    with file.open("rb") as opened:
        # Only a line feed ends a line of JSON; text that is cut at other separators would be cut inside strings.
        for number, line in enumerate(iter(lambda: opened.readline(LONGEST + 1), b""), 1):
            if len(line) > LONGEST:
                raise CheckpointError(
                    f"{file}, line {number} has more than {LONGEST / 1e6:.0f} million letters, which is no row. "
                    "Cut it into rows."
                )
            yield number, line.removesuffix(b"\n").decode("utf-8")


def _whole(file: Path, remedy: str) -> str:
    """Return the text of a file that is read at once."""
    if (size := file.stat().st_size) > LARGEST:
        raise CheckpointError(f"{file} has {size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f}. {remedy}")
    return file.read_text(encoding="utf-8")


def _read_json(file: Path) -> list[Row]:
    try:
        rows = loads(_whole(file, "Save its rows as JSON lines, in a file called .jsonl."))
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        return _read_jsonl(file)  # many call a file of JSON lines .json
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{file} holds no list of objects.")
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    rows: list[Row] = []
    most, nbytes = max(SMALL, GROWTH * file.stat().st_size), 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(BATCH):
                # A column of few different values is kept once for all rows, until rows are made of it.
                nbytes += sum(_dense(column).nbytes for column in batch.columns)
                if nbytes > most or len(rows) * ROW > most:
                    raise CheckpointError(
                        f"{file} has {file.stat().st_size / 1e6:.1f} MB, and its rows take more than "
                        f"{most / 1e6:.0f} MB: it is no honest table. Save its rows as JSON lines, if it is."
                    )
                rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError, OverflowError, NotImplementedError) as error:
        raise CheckpointError(f"{file} is not a sound Parquet file: {first_line(error)}") from None
    return rows


def _dense(column: Any) -> Any:
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _saved(section: DataSection, path: Path) -> list[Row]:
    import datasets

    try:
        with border(path):
            data = datasets.load_from_disk(str(path), keep_in_memory=True)
    except Exception as error:  # of pyarrow and datasets, each with kinds of its own
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {first_line(error)} Save it again.") from None
    return rows_of(data, section)


def rows_of(data: Any, section: DataSection) -> list[Row]:
    """Return the rows of one split of a loaded data set, no more than the section takes."""
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if section.split not in data:
            raise CheckpointError(f"{section.path} has the splits {listed(data)}, got {section.split!r}.")
        data = data[section.split]
    if section.size is not None and not section.shuffle:
        data = data.select(range(min(section.size, len(data))))
    return list(data)


TABLES: Mapping[str, Callable[[Path], list[Row]]] = MappingProxyType(
    {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
)
TEXTS = (".txt", ".md", ".py")  # one document each
SUFFIXES = (*TABLES, *TEXTS)
