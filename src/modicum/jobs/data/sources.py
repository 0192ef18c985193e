"""Where rows come from: local files, the Hub, generated tasks, and the text that every Python brings along.

Rows are plain dictionaries under the source's own field names.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError, MissingExtraError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from modicum.jobs.data.section import DataSection, Row

TASK_SIZE = 500  # rows of a generated task when the recipe does not say
TEST_SHARE = 10  # one document in so many of a builtin text is held out
SEEDS = 1 << 31  # the generators take 32-bit seeds: train has the lower half, every other split the upper
SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "dev": "validation"}


def task(section: DataSection, name: str, seed: int) -> tuple[list[tuple[str, str]], Callable[[int, str], float]]:
    """Generate a reasoning-gym task: questions with answers, and the task's own scorer.

    Train and the other splits draw from disjoint halves of the seeds.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise MissingExtraError("reasoning-gym", "demo") from None
    from modicum.random import derive_seed

    if name not in DATASETS:
        raise CheckpointError(f"There is no reasoning-gym task {name!r}. {did_you_mean(name, DATASETS)}")
    size = section.size or TASK_SIZE
    # A task draws row i with seed + i, so the start leaves room for all rows within its half.
    start = derive_seed(seed, "reasoning-gym", name, section.split) % (SEEDS - size)
    start += 0 if section.split == "train" else SEEDS
    try:
        generated = reasoning_gym.create_dataset(name, seed=start, size=size, **section.config)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"{section.path}: config {section.config} is refused: {error}") from None
    entries = [generated[index] for index in range(size)]

    def score(index: int, answer: str) -> float:
        return float(generated.score_answer(answer, entries[index]))

    return [(entry["question"], entry["answer"]) for entry in entries], score


def builtin(section: DataSection, name: str) -> list[Row]:
    """Return the rows of ``builtin:NAME``."""
    if name not in BUILTINS:
        raise CheckpointError(f"There is no builtin data {name!r}. {did_you_mean(name, BUILTINS)}")
    return BUILTINS[name](section)


def _python_stdlib(section: DataSection) -> list[Row]:
    """Return the standard library's sources and documentation topics of the running Python, one row each."""
    from pydoc_data.topics import topics

    from modicum.random import derive_seed

    if section.split not in ("train", "test"):
        raise CheckpointError(f"{section.path} has the splits train and test, got {section.split!r}.")
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "lib-dynload"}
    files = {"/".join(file.relative_to(root).parts): file for file in root.rglob("*.py")}
    documents: dict[str, Path | str] = {f"topic/{topic}": text for topic, text in topics.items()}
    # Build settings differ from machine to machine; the rest depends on the version of Python alone.
    documents |= {
        name: file
        for name, file in files.items()
        if left_out.isdisjoint(name.split("/")) and not file.name.startswith("_sysconfigdata")
    }
    held_out = section.split == "test"
    chosen = [
        document for name, document in sorted(documents.items()) if (derive_seed(0, name) % TEST_SHARE == 0) == held_out
    ]
    texts = (d if isinstance(d, str) else d.read_text(encoding="utf-8", errors="replace") for d in chosen)
    return [{section.fields.text: text} for text in texts if text.strip()]


def local(section: DataSection, path: Path) -> list[Row]:
    """Read a file, a folder of files, or what ``datasets`` wrote with ``save_to_disk``."""
    if path.is_file():
        if section.split != "train":
            raise CheckpointError(f"{path} is one file and has only the split train, got {section.split!r}.")
        return _read(path, section.fields.text)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(section, path)
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    # A README beside tables describes them; it is data only where there is nothing else.
    files = [file for file in found if file.suffix in TABLES] or [file for file in found if file.suffix in TEXTS]
    if not files:
        raise CheckpointError(f"{path} holds no data files, expected {', '.join((*TABLES, *TEXTS))}.")
    # Files or folders named after splits, such as test.jsonl or train/0.parquet, are the splits; else all is train.
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    chosen = [file for file in files if splits[file] == section.split]
    if not chosen:
        raise CheckpointError(
            f"{path} has the splits {', '.join(sorted(set(splits.values())))}, got {section.split!r}."
        )
    return [row for file in chosen for row in _read(file, section.fields.text)]


def _split_of(file: Path) -> str:
    stem = file.stem.replace("_", "-").replace(".", "-").partition("-")[0]
    return next((SPLITS[part] for part in (*file.parts[:-1], stem) if part in SPLITS), "train")


def _read(file: Path, text_field: str) -> list[Row]:
    try:
        if file.suffix in TEXTS:
            text = file.read_text(encoding="utf-8")
            return [{text_field: text}] if text.strip() else []
        if file.suffix in TABLES:
            return TABLES[file.suffix](file)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror or error}.") from None
    raise CheckpointError(f"{file} has the suffix {file.suffix!r}, expected {', '.join((*TABLES, *TEXTS))}.")


def _read_jsonl(file: Path) -> list[Row]:
    rows = []
    # Only a line feed ends a line of JSON; splitlines would also cut at separators inside strings.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{file}, line {number} is not valid JSON: {error.msg}.") from None
        if not isinstance(row, dict):
            raise CheckpointError(f"{file}, line {number} is {type(row).__name__}, expected an object.")
        rows.append(row)
    return rows


def _read_json(file: Path) -> list[Row]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return _read_jsonl(file)  # many call a file of JSON lines .json
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{file} holds no list of objects.")
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[Row] = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise CheckpointError(f"{file} is not a sound Parquet file: {str(error).splitlines()[0]}") from None
    return rows


def _saved(section: DataSection, path: Path) -> list[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path), keep_in_memory=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return _table(section, data)


def hub(section: DataSection) -> list[Row]:
    """Read a data set of the Hub through ``datasets``, or whatever else ``load_dataset`` takes."""
    if section.path.startswith((".", "/", "~")) or Path(section.path).suffix in (*TABLES, *TEXTS):
        raise CheckpointError(f"There is no data file or folder {section.path}. Check the path.")
    import datasets

    try:
        data = datasets.load_dataset(section.path, split=section.split, **section.config)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"There is no file {section.path}, and the Hub gave no such data: {first}") from None
    return _table(section, data)


def _table(section: DataSection, data: Any) -> list[Row]:
    import datasets

    if isinstance(data, datasets.DatasetDict):
        if section.split not in data:
            raise CheckpointError(f"{section.path} has the splits {', '.join(data)}, got {section.split!r}.")
        data = data[section.split]
    if section.size is not None and not section.shuffle:
        data = data.select(range(min(section.size, len(data))))
    return list(data)


TABLES: Mapping[str, Callable[[Path], list[Row]]] = MappingProxyType(
    {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
)
TEXTS = (".txt", ".md", ".py")  # one document each
BUILTINS: Mapping[str, Callable[[DataSection], list[Row]]] = MappingProxyType({"python-stdlib": _python_stdlib})
