"""Sizes are looked at before room is made, and what is said of wrong input steers no terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from modicum import cli, lock, stored
from modicum.borders import loads
from modicum.documents import stored_yaml
from modicum.errors import CheckpointError, ModicumError, RecipeError, printable
from modicum.jobs import plan
from modicum.jobs.data.rows import load_rows
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.sources import local
from modicum.jobs.loading.models import load_model
from modicum.recipe import override, parse, parse_yaml
from modicum.report import write
from modicum.report.sections.training import smooth
from modicum.vocabulary import token_ids
from modicum.weights.finished import read_journals
from modicum.weights.journal import Journal
from support import byte_tokenizer, tiny_llama


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run a command that is refused, and return the one line that it says."""
    monkeypatch.setattr(sys, "argv", ["modicum", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and error[:-1].isprintable()
    return error


ARGUMENTS = [
    ("verify", "\x1b[2J"), ("report", "a\nb"), ("show", "\x9b2J"), ("list", "\x1b]0;x\x07"), ("run", "\u202ex.yaml"),
    ("check", "quickstart", "-s", "x\x1b[2J=1"), ("check", "quickstart", "-s", "job=\x1b[2J"), ("run",), ("verify",),
    ("check", "quickstart", "-s", "a." * 3000 + "b=1"), ("check", "quickstart", "-s", "stages." + "9" * 5000 + "=1"),
    ("check", "quickstart", "-s", "job=1", "-s", "nonsense=2", "-s", "seed=-1"), ("nonsense",), ("run", "a", "b"),
    ("run", "quickstart", "--nonsense"), ("run", "quickstart", "-o", "x" * 5000),
    ("run", "quickstart", "-o", "/x" * 2000),
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_whatever_the_arguments_are_one_line_is_said(arguments, capsys, monkeypatch):
    assert told(capsys, monkeypatch, *arguments).startswith("modicum: ")


def test_what_can_be_printed_stays_as_it_is():
    assert printable("naïve → 多 😀 'x'") == "naïve → 多 😀 'x'"
    assert printable("a\x1b[31m\r\u202e\ud800") == "a\\x1b[31m\\r\\u202e\\ud800"


@pytest.mark.parametrize("place", ["recipe.yaml", "record.json", "sub", "old.html"])
def test_a_report_overwrites_reports_alone(tmp_path, place):
    run = tmp_path / "run"
    run.mkdir()
    (run / "record.json").write_text(json.dumps({"job": "merge", "status": "done"}))
    assert write([run]) == run / "report.html" == write([run])
    (run / "recipe.yaml").write_text("job: merge")
    (run / "old.html").write_text("<p>mine")
    (run / "sub").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    if place == "sub":
        (run / "sub" / "report.html").mkdir()
    with pytest.raises(CheckpointError):
        write([run], run / place)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[[[", "\0", ""])
def test_json_of_others_fails_in_one_way(tmp_path, text):
    with pytest.raises(ValueError, match="."):
        loads(text)
    (tmp_path / "journal.0.jsonl").write_text(f'{text}\n["w", {{"x": 1}}]\n')
    assert read_journals(tmp_path) == {"w": {"x": 1}}
    (tmp_path / "search.jsonl").write_text(f'"it"\n["a", [1.5]]\n{text}\n["b", [2.0]]\n')
    assert len(Journal(tmp_path / "search.jsonl", "it")._known) == 1
    (tmp_path / "one.lock").write_text(text)
    with pytest.raises(CheckpointError, match="no lock file that can be read"):
        lock.read_owner(tmp_path / "one.lock")


@pytest.mark.parametrize("line", ["1e999", "3", "null", "[1]", '["w", 3]', '["a", ["x"]]', '["a", null]'])
def test_lines_of_other_kinds_are_passed_over(tmp_path, line):
    (tmp_path / "journal.0.jsonl").write_text(f'{line}\n["v", {{}}]\n')
    assert set(read_journals(tmp_path)) == {"v"}
    (tmp_path / "search.jsonl").write_text(f'"it"\n{line}\n')
    assert Journal(tmp_path / "search.jsonl", "it")._known == []


@pytest.mark.parametrize(
    "change",
    [{"files": {"a": ["/etc", "ab"]}}, {"files": {"a": [1]}}, {"files": {"\0": [1, "ab"]}}, {"outputs": {"a": 3}},
     {"stages": [{"name": "a"}]}, {"stages": [3]}, {"stages": [{"folder": "\0"}]}, {"files": {"a": [True, "ab"]}}],
)  # fmt: skip
def test_records_name_files_or_are_refused(tmp_path, change):
    (tmp_path / "record.json").write_text(json.dumps({"job": "merge", "status": "done", "files": {}} | change))
    for read in (stored.verify, stored.damage, stored.read_record):
        with pytest.raises(CheckpointError, match="malformed"):
            read(tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        {"job": "coordinate", "policies": ["osg"], "application": {"name": []}},
        {"merge_method": ["linear"], "models": []},
    ],
)
def test_values_of_unforeseen_kinds_are_one_line(recipe):
    with pytest.raises(RecipeError, match="has the wrong kind"):
        parse(recipe)


def test_a_section_that_cannot_be_drawn_does_not_stop_the_page(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"job": "coordinate", "status": "done"}))
    (tmp_path / "results.json").write_text(json.dumps({"cells": [3], "graphs": [], "differences": 1}))
    assert "cannot be drawn" in write([tmp_path]).read_text()


def test_smoothing_a_long_series_is_linear():
    """Each mean over a twentieth of the series by itself would take an hour here."""
    points = [(float(i), float(i % 7) if i % 11 else None) for i in range(400_000)]
    found = smooth(points)
    assert found[200_000][1] == pytest.approx(3.0, abs=1e-3) and found[0][1] is None and found[5][1] is not None


@pytest.mark.parametrize("text", ["\n".join(f"k{i}: {i}" for i in range(60_000)), "[" + "1," * 60_000 + "]"])
def test_yaml_of_too_many_values_is_refused_before_they_are_made(text):
    with pytest.raises(RecipeError, match="more than 50000 values"):
        parse_yaml(text)


def test_yaml_that_takes_long_to_read_is_refused_unread(tmp_path):
    # Eight million characters took seven seconds.
    text = "a: " + "x" * (5 << 20)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="more than 4 MiB"):
        parse_yaml(text)
    with pytest.raises(CheckpointError, match="no recipe. Delete it"):
        stored_yaml(tmp_path / "recipe.yaml")


def test_assignments_are_no_deeper_than_recipes():
    with pytest.raises(RecipeError, match="60 levels, expected at most 50"):
        override({}, ["a." * 60 + "b=1"])


@pytest.mark.parametrize("number", [10**6, 2**40, -1])
@pytest.mark.parametrize("where", ["vocabulary", "added"])
def test_token_ids_without_rows_are_refused(where, number):
    data: dict[str, Any] = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    assert token_ids(data, "m")["a"] > 0
    if where == "vocabulary":
        data["model"]["vocab"]["zz"] = number
    else:
        data["added_tokens"].append(data["added_tokens"][0] | {"id": number, "content": "zz"})
    with pytest.raises(CheckpointError, match=f"gives the token 'zz' the id {number}"):
        token_ids(data, "m")


@pytest.mark.parametrize("multiple", [0.5, -8, 10**9, "8", True])
def test_rows_are_filled_up_to_a_sensible_multiple(tiny_model, multiple):
    if multiple is True:
        return
    models = [{"model": str(tiny_model)}]
    recipe = {"merge_method": "linear", "models": models * 2, "parameters": {"weight": 1},
              "tokenizer": {"source": "union", "pad_to_multiple_of": multiple}}  # fmt: skip
    with pytest.raises(RecipeError, match="pad_to_multiple_of is"):
        plan(parse(recipe))


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"])
@pytest.mark.parametrize("size", [10**7, 10**12, 10**30])
def test_a_configuration_larger_than_the_weights_makes_no_room(tmp_path, key, size):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: size}))
    with pytest.raises(CheckpointError, match=r"config.json asks for .* Download it again"):
        load_model(tmp_path)


def test_a_table_that_grows_beyond_measure_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "SMALL", 1 << 20)
    index = pyarrow.array(memoryview(bytes(4 * 100_000)).cast("i"), type=pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array(["x" * 1000]))
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "bomb.parquet")
    with pytest.raises(CheckpointError, match="it is no honest table"):
        load_rows(DataSection(path=str(tmp_path / "bomb.parquet")))
    rows = [{"text": f"row {i}"} for i in range(1000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load_rows(DataSection(path=str(tmp_path / "rows.parquet"))).rows == rows


@pytest.mark.parametrize(
    "trainer",
    [{"max_steps": "a"}, {"max_steps": [1]}, {"learning_rate": {}}, {"warmup_steps": "x"}, {"bf16": 3.5},
     {"optim": 3}, {"save_steps": None}, {"per_device_train_batch_size": "many"}, {"lr_scheduler_type": "nonsense"}],
)  # fmt: skip
def test_arguments_of_the_trainer_have_its_types(tiny_model: Path, tmp_path: Path, trainer: dict[str, Any]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "abc"}\n')
    recipe = {"job": "train", "model": str(tiny_model), "data": str(tmp_path / "rows.jsonl"), "trainer": trainer}
    with pytest.raises(ModicumError, match=r"^trainer"):
        plan(parse(recipe))


@pytest.mark.parametrize("key", ["base", "experts.0", "model.path", "data.path", "checkpoints.0", "application.tracks"])
def test_a_home_of_nobody_is_a_path_that_is_not_there(key):
    """It was a RuntimeError of pathlib's, in every job."""
    nobody = "~nobody-of-this-name/x"
    recipes = {
        "base": {"job": "merge", "base": nobody, "experts": [nobody], "method": "linear"},
        "experts.0": {"job": "merge", "experts": [nobody, f"{nobody}+{nobody}"], "method": "linear"},
        "model.path": {"job": "train", "model": nobody, "data": "unread.jsonl"},
        "data.path": {"job": "statistics", "kind": "fisher", "model": "unread", "data": {"path": f"{nobody}.jsonl"}},
        "checkpoints.0": {"job": "average", "checkpoints": [nobody]},
        "application.tracks": {"job": "coordinate", "policies": ["random"],
                               "application": {"name": "tracking", "tracks": f"{nobody}.csv"}},
    }  # fmt: skip
    with pytest.raises(ModicumError, match=r"^[^\n]*~nobody-of-this-name[^\n]*$"):
        plan(parse(recipes[key]))
