from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.cells import Cell, Document, Folder, claim, fill, once
from modicum.errors import CheckpointError

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def store_in(kind: str, folder: Path) -> dict[str, Cell] | Folder | Document:
    return {"dict": {}, "folder": Folder(folder / "cells"), "document": Document(folder / "cells.json")}[kind]


@pytest.mark.parametrize("kind", ["dict", "folder", "document"])
def test_a_cell_is_measured_once_and_a_killed_grid_goes_on(tmp_path, kind):
    store, measured = store_in(kind, tmp_path), []

    def cell(key: str, dies: bool = False):
        def measure():
            measured.append(key)
            if dies:
                raise KeyboardInterrupt
            return {"value": key}

        return measure

    with pytest.raises(KeyboardInterrupt):
        fill(store, {"a": cell("a"), "b": cell("b", dies=True), "c": cell("c")})
    told = []
    # What was stored is read anew, as a second process would.
    store = store if kind == "dict" else store_in(kind, tmp_path)
    assert fill(store, {key: cell(key) for key in "abc"}, tell=lambda key, found: told.append((key, found))) == []
    assert measured == ["a", "b", "b", "c"] and [key for key, _ in told] == ["b", "c"]
    assert store["a"]["value"] == "a" and store["c"]["seconds"] >= 0 and told[1][1] == store["c"]


def test_no_cell_begins_after_the_time(tmp_path):
    store: dict[str, Cell] = {"a": {}}
    assert fill(store, {"a": dict, "b": dict, "c": dict}, minutes=-1) == ["b", "c"] and list(store) == ["a"]


def test_what_another_process_measures_is_left_to_it(tmp_path):
    store = Folder(tmp_path)
    with claim(tmp_path, "a") as mine, claim(tmp_path, "b") as other:
        assert mine and other
        assert fill(store, {"a": dict, "b": dict, "c": dict}, claims=tmp_path) == ["a", "b"]
        assert once(store, "a", dict, claims=tmp_path) is None
    assert fill(store, {"a": dict, "b": dict}, claims=tmp_path) == []
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "b.json", "c.json"}


def test_a_cell_that_another_finished_before_the_claim_came_through_is_taken(tmp_path, monkeypatch):
    from contextlib import contextmanager

    from modicum import cells

    store = Folder(tmp_path)

    @contextmanager
    def late(claims, key):
        store[key] = {"value": "theirs"}
        yield True

    monkeypatch.setattr(cells, "claim", late)
    assert once(store, "a", lambda: {"value": "mine"}, claims=tmp_path) == {"value": "theirs"}


def _work(folder: Path, keys: list[str], log: Path) -> None:
    def measure(key: str):
        def cell():
            with log.open("a") as file:
                file.write(f"{key}\n")
            time.sleep(0.01)
            return {"value": key}

        return cell

    fill(Folder(folder), {key: measure(key) for key in keys}, claims=folder)


def test_processes_share_a_grid_and_none_measures_a_cell_of_another(tmp_path):
    keys, log = [f"m|{i}" for i in range(8)], tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path / "grid", order, log)) for order in (keys, keys[::-1])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(log.read_text().split()) == sorted(keys)


def _die(folder: Path) -> None:
    import os

    with claim(folder, "a"):
        os._exit(1)


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    worker.start()
    worker.join()
    assert list(tmp_path.glob(".*.claim"))
    assert fill(Folder(tmp_path), {"a": dict}, claims=tmp_path) == []


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_keys_of_any_sort_are_files_of_their_own_inside_the_folder(tmp_path_factory, first, second):
    try:
        (first + second).encode()
    except UnicodeEncodeError:
        return
    folder = tmp_path_factory.mktemp("keys")
    store = Folder(folder)
    for key in (first, second):
        store[key] = {"key": key}
    assert all(key in store and store[key] == {"key": key} for key in (first, second))
    assert len(list(folder.iterdir())) == len({first, second})


def test_a_study_of_other_sizes_is_not_mixed_in(tmp_path):
    Document(tmp_path / "s.json", {"steps": (1, 2), "lr": 0.1})["a"] = {"value": 1}
    assert "a" in Document(tmp_path / "s.json", {"lr": 0.1, "steps": [1, 2]})
    with pytest.raises(CheckpointError, match=r"s\.json was measured with other lr, width. Move it away first"):
        Document(tmp_path / "s.json", {"steps": (1, 2), "lr": 0.2, "width": 3})


STUDIES = [p for p in sorted(RESULTS.glob("*.json")) if json.loads(p.read_text()).keys() >= {"study", "cells"}]


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_committed_studies_are_read(path):
    content = json.loads(path.read_text())
    store = Document(path, content.get("about", {}))
    assert all(key in store and store[key] == cell for key, cell in content["cells"].items())
