"""Run folders as the report sees them: a tree, because a pipeline's stages are runs again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from modicum.borders import check_plain_tree
from modicum.credentials import redact
from modicum.documents import stored_yaml
from modicum.errors import CheckpointError
from modicum.record import read_log, read_record

GROUP = "group"  # the job of the root that holds several runs given side by side


@dataclass(frozen=True)
class RunView:
    """A run to show. Nothing in it is secret any more; everything in it is untrusted text."""

    name: str
    folder: Path
    record: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[RunView, ...] = ()

    @property
    def job(self) -> str:
        """Name of the job."""
        return str(self.record.get("job", "?"))

    @property
    def status(self) -> str:
        """One of done, failed, running, waiting."""
        status = str(self.record.get("status", "waiting"))
        return "waiting" if status == "new" else status

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The job's measurements."""
        found = self.record.get("metrics")
        return found if isinstance(found, Mapping) else {}

    @property
    def notes(self) -> list[str]:
        """Notes of the job: fallbacks, defaults that matter."""
        notes = self.record.get("notes")
        return [str(note) for note in notes] if isinstance(notes, list) else []

    def walk(self) -> Iterator[RunView]:
        """Yield this run and every run inside it, in order."""
        yield self
        for stage in self.stages:
            yield from stage.walk()

    def log(self, event: str) -> list[dict[str, Any]]:
        """Return the log's lines of one kind."""
        return self._events.get(event, [])

    @cached_property
    def _events(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for line in read_log(self.folder):
            found.setdefault(str(line.get("event")), []).append(line)
        return found


def load(folders: Sequence[Path]) -> RunView:
    """Return the tree of runs in ``folders``; several get a common root.

    Raises:
        CheckpointError: A folder is no run.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if (path / "record.json").exists():  # else it is no run, and may be any size
            check_plain_tree(path)
    if not paths:
        raise CheckpointError("There is no run to report on. Name at least one run folder.")
    views = [_view(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    if len(views) == 1:
        return views[0]
    # Two pipelines have stages of the same names; in one report each name must say whose it is.
    views = [replace(v, stages=tuple(replace(s, name=f"{v.name}/{s.name}") for s in v.stages)) for v in views]
    return RunView("runs", Path(), {"job": GROUP, "status": _together(views)}, stages=tuple(views))


def _view(folder: Path, name: str) -> RunView:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, expected the folder of a run.")
    if not (folder / "record.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/record.json"))
        hint = f" It holds runs, though: try {folder / inside[0]}." if inside else ""
        raise CheckpointError(f"{folder} is not a run: it holds no record.json.{hint}")
    record = read_record(folder, strict=False)
    if not isinstance(record, dict):
        raise CheckpointError(f"{folder / 'record.json'} is {type(record).__name__}, expected an object.")
    recipe = _recipe(folder)
    stages = tuple(_stage(folder, stage) for stage in _listed(record, recipe))
    return RunView(name, folder, redact(record), redact(recipe), stages)


def _listed(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List a pipeline's stages: the planned ones in order, completed by what the record tells of those that ended."""
    stages: dict[str, dict[str, Any]] = {}
    # A grid's recipe lists templates, which are no runs.
    planned = None if record.get("job") == "grid" else recipe.get("stages")
    for source in (planned, record.get("stages")):
        for stage in source if isinstance(source, list) else ():
            if isinstance(stage, dict):
                name = str(stage.get("name", "?"))
                known = {key: stage[key] for key in ("job", "status", "seconds", "folder") if key in stage}
                stages[name] = stages.get(name, {"name": name}) | known
    return list(stages.values())


def _stage(pipeline: Path, listed: dict[str, Any]) -> RunView:
    name = listed["name"]
    folder = pipeline / str(listed.get("folder") or f"stages/{name}")
    if (folder / "record.json").exists():
        return _view(folder, name)
    return RunView(name, folder, redact({**listed, "status": listed.get("status", "waiting")}))


def _recipe(folder: Path) -> dict[str, Any]:
    if not (folder / "recipe.yaml").exists():
        return {}
    data = stored_yaml(folder / "recipe.yaml")
    return data if isinstance(data, dict) else {}


def _names(paths: Sequence[Path]) -> list[str]:
    """Name each folder by as many of its last parts as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _together(views: Sequence[RunView]) -> str:
    states = {view.status for view in views}
    return next((state for state in ("failed", "interrupted", "running", "waiting") if state in states), "done")
