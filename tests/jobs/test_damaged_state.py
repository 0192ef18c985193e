"""What an unfinished run keeps for the next one, and tables of tracks: whatever they hold is read, or is one line."""

from __future__ import annotations

import base64
import importlib
import json
import os
import zlib
from pathlib import Path

import pytest

from modicum import lock
from modicum.cells import Document, Folder
from modicum.durable import whole_folder
from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.inputs import look
from modicum.jobs import execute
from modicum.jobs.chat.cache import read_samples
from modicum.jobs.grids.results import write_json
from modicum.recipe import parse
from modicum.record import Run
from modicum.submodular.tracks import read_tracks
from modicum.weights.journal import Journal

evaluate = importlib.import_module("modicum.jobs.evaluate")
BAD = [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"a": \x00}', b'\xef\xbb\xbf{"a": 1}x']
DOCUMENTS = [*BAD, b"{}", b'{"about": 3, "cells": {}}', b'{"about": {}, "cells": [1]}', b'{"about": {}, "cells": 3}',
             b'{"about": {}, "cells": {"a": 3}}']  # fmt: skip
PLAYED = {"job": "coordinate", "policies": ["ma_spl", "random"], "rounds": 3, "seeds": 1, "frames": 0, "steps": [10],
          "application": {"name": "tracking", "agents": 2, "targets": 2}}  # fmt: skip


@pytest.mark.parametrize("content", BAD)
def test_a_damaged_cell_is_named(tmp_path, content):
    store = Folder(tmp_path)
    store["a"] = {"value": 1}
    next(tmp_path.iterdir()).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is malformed .*Delete it and run again"):
        store["a"]


@pytest.mark.parametrize("content", DOCUMENTS)
def test_a_damaged_document_is_named(tmp_path, content):
    (tmp_path / "cells.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cells\.json is malformed .*Delete it and run again"):
        Document(tmp_path / "cells.json")


def test_a_pipe_in_the_place_of_state_is_refused(tmp_path):
    os.mkfifo(tmp_path / "cells.json")
    with pytest.raises(CheckpointError, match="is a pipe, expected a file. Delete it and run again"):
        Document(tmp_path / "cells.json")
    with pytest.raises(CheckpointError, match="is a pipe, expected a file. Delete it and run again"):
        Journal(tmp_path / "cells.json", "x")


@pytest.mark.parametrize("change", ["utility", "frames", "graph", "label"])
@pytest.mark.parametrize("value", [None, "x", [[]], {"a": "b"}])
def test_a_cell_of_another_form_is_one_line(tmp_path, change, value):
    execute(parse(PLAYED), tmp_path / "run", quiet=True)
    record = json.loads((tmp_path / "run/record.json").read_text())
    (tmp_path / "run/record.json").write_text(json.dumps(record | {"status": "interrupted"}))
    for file in (tmp_path / "run/cells").glob("*.json"):
        cell = json.loads(file.read_text())
        file.write_text(json.dumps({key: part for key, part in cell.items() if key != change} | {change: value}))
    try:
        execute(parse(PLAYED), tmp_path / "run", quiet=True)
    except ModicumError as error:
        assert "cells is malformed" in str(error) and "Delete it and run again" in str(error)


def test_a_cell_has_a_name_that_a_file_can_have(tmp_path):
    store = Folder(tmp_path)
    long, other = "fixed, weights " + "0.125, " * 100, "fixed, weights " + "0.125, " * 99 + "0.25"
    store[long], store[other] = {"value": 1}, {"value": 2}
    assert (store[long], store[other]) == ({"value": 1}, {"value": 2})


@pytest.mark.parametrize("line", [b"\xff", b'["a", [1' + b"0" * 400 + b"]]", b"[" * 100_000, b"3", b"\0"])
def test_a_journal_ends_where_it_is_damaged(tmp_path, line):
    (tmp_path / "search.jsonl").write_bytes(b'"x"\n["a", [1.0]]\n' + line + b"\n")
    journal = Journal(tmp_path / "search.jsonl", "x")
    assert journal.answer("a", lambda: [2.0]) == [1.0] and journal.answer("a", lambda: [3.0]) == [3.0]


def test_a_packed_answer_takes_no_more_room_than_an_answer(tmp_path):
    packed = base64.b64encode(zlib.compress(b'{"text": "' + b"x" * (100 << 20) + b'"}')).decode()
    (tmp_path / "replies.jsonl").write_text(json.dumps({"key": "a", "packed": packed}) + "\n")
    with pytest.raises(CheckpointError, match="line 1 is no sample"):
        read_samples(tmp_path / "replies.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('time,id,x,y\n0,a,"' + "x" * 200_000 + '",1\n', "Cannot read .*field limit"),
        ("time,id,x,y\n0,a,1,1\n1e12,a,2,2\n", "1e.11 positions .*Narrow start and duration, or raise step"),
        ("time,id,x,y\n0,a,1,1\n1e308,a,2,2\n", "line 3: time is '1e308', expected seconds"),
        ("time,id,x,y\n0,a,1e300,1\n9,a,2,2\n", "line 2: x is '1e300', expected a number"),
        ("time,id,lat,lon\n0,a,91,181\n9,a,1,1\n", "line 2: lat is '91', expected degrees from -90 to 90"),
        ("time,id,lat,lon\n0,a,1,361\n9,a,1,1\n", "line 2: lon is '361', expected degrees from -180 to 360"),
    ],
)
def test_tracks_beyond_all_measure_are_one_line(tmp_path, text, message):
    (tmp_path / "tracks.csv").write_text(text)
    with pytest.raises((CheckpointError, RecipeError), match=message) as told:
        read_tracks(tmp_path / "tracks.csv", max_gap=1e15)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_a_pipe_of_tracks_is_refused(tmp_path):
    os.mkfifo(tmp_path / "tracks.csv")
    with pytest.raises(CheckpointError, match="is a pipe"):
        read_tracks(tmp_path / "tracks.csv")


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path(tmp_path, "tracks.csv").write_text("time,id,x,y\n0,a,0,0\n10,a,1,1\n")
    assert len(read_tracks("~/tracks.csv")) == 2


@pytest.mark.parametrize("name", ["log.jsonl", "choice.json", "verdicts/a.jsonl", ".model.partial", "checkpoints/1/x"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_in_a_run_folder_is_refused_before_it_is_opened(tmp_path, name, kind):
    run = {"job": "merge", "recipe": {}, "quiet": True}
    with Run(tmp_path / "run", **run) as opened:
        opened.log("a")
    record = json.loads((tmp_path / "run/record.json").read_text())
    (tmp_path / "run/record.json").write_text(json.dumps(record | {"status": "interrupted"}))
    place = tmp_path / "run" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")
    with (
        pytest.raises(CheckpointError, match=f"is a {kind}, expected a file. Delete it and run again"),
        Run(tmp_path / "run", **run),
    ):
        pass


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_lies_in_the_place_of_an_adapter_s_configuration_is_not_read(tmp_path, kind):
    place = tmp_path / "adapter_config.json"
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"is a {kind}, expected a file"):
        look([str(tmp_path)])


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_what_is_no_lock_is_not_read(tmp_path, kind):
    place = tmp_path / ".lock"
    if kind == "large":
        place.write_text("{" + " " * 100_000)
    else:
        os.mkfifo(place) if kind == "pipe" else place.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is no lock file that can be read"):
        lock.read_owner(place, tries=2)


@pytest.mark.parametrize("kind", ["pipe", "file", "link"])
def test_what_lies_in_the_place_of_an_unfinished_folder_goes(tmp_path, kind):
    place = tmp_path / ".model.partial"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.write_text("x") if kind == "file" else place.symlink_to(place.name)
    with whole_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "model/a").read_text() == "a" and not os.path.lexists(place)


@pytest.mark.parametrize("content", [b"\xff\n", b"3\n", b"{\n", b"[" * 100_000])
def test_damaged_items_are_named(tmp_path, content):
    with Run(tmp_path / "run", job="evaluate", recipe={}, quiet=True) as run:
        (run.folder / "items").mkdir()
        (run.folder / "items/a.b.jsonl").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.b\.jsonl is malformed .*measured anew"):
            evaluate._read_items(run, "a.b")


def test_a_table_of_a_grid_that_is_no_text_is_written_anew(tmp_path):
    (tmp_path / "grid.json").write_bytes(b"\xff")
    write_json(tmp_path / "grid.json", {"a": 1})
    assert json.loads((tmp_path / "grid.json").read_text()) == {"a": 1}
