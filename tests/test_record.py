import json

import pytest

from modicum.errors import CheckpointError, RecipeError
from modicum.record import Run, digest, fingerprint, read_log, read_record, whole_folder, write_atomic


def run(folder, recipe=None, **settings):
    return Run(folder, job="train", recipe=recipe or {"seed": 0}, quiet=True, **settings)


def test_a_finished_run_is_recognised_and_its_results_are_kept(tmp_path):
    with run(tmp_path / "r") as first:
        first.record["metrics"]["loss"] = 1.5
        (first.folder / "model").mkdir()
        first.output("model", first.folder / "model")
    again = run(tmp_path / "r")
    assert again.done and again.record["metrics"] == {"loss": 1.5} and again.record["outputs"] == {"model": "model"}


def test_the_output_folder_is_no_part_of_the_identity(tmp_path):
    assert run(tmp_path / "a", {"seed": 0, "out": "a"}).hash == run(tmp_path / "b", {"seed": 0, "out": "b"}).hash


def test_a_changed_recipe_or_input_is_refused_unless_replaced(tmp_path):
    with run(tmp_path / "r", inputs={"x": "1"}) as first:
        first.log("train", step=1)
    with pytest.raises(CheckpointError, match=r"holds the run of another recipe .*\(seed is 0 there, 1 here\)"):
        run(tmp_path / "r", {"seed": 1})
    with pytest.raises(CheckpointError, match="holds the run of another recipe"):
        run(tmp_path / "r", inputs={"x": "2"})
    with run(tmp_path / "r", {"seed": 1}, on_change="replace"):
        pass
    assert read_log(tmp_path / "r") == []


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty and not a run"):
        run(tmp_path)
    with pytest.raises(CheckpointError, match="not empty and not a run"):
        run(tmp_path, on_change="replace")
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_failed_run_keeps_what_it_made_and_says_why(tmp_path):
    with pytest.raises(RuntimeError), run(tmp_path / "r") as failing:
        failing.log("train", step=1)
        raise RuntimeError("out of luck")
    record = read_record(tmp_path / "r")
    assert record["status"] == "failed" and record["error"] == "RuntimeError: out of luck"
    assert not run(tmp_path / "r").done


def test_a_mistake_in_the_input_leaves_no_folder_behind(tmp_path):
    with pytest.raises(RecipeError), run(tmp_path / "r"):
        raise RecipeError("wrong")
    assert not (tmp_path / "r").exists()


def test_an_unwritable_place_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Choose another --out"), run(tmp_path / "file" / "r"):
        pass


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run(tmp_path / "r") as other:
        other.log("train", step=1)
        other.note("quiet")
    assert not (tmp_path / "r").exists()


def test_notes_are_kept_once(tmp_path):
    with run(tmp_path / "r") as noting:
        noting.note("fell back")
        noting.note("fell back")
    assert read_record(tmp_path / "r")["notes"] == ["fell back"]


def test_a_log_line_cut_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "train", "step": 1}\n{"event": "eval", "step": 1}\n{"event": "tr')
    assert read_log(tmp_path, "train") == [{"event": "train", "step": 1}]
    assert len(read_log(tmp_path)) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    monkeypatch.setattr("modicum.durable.commit", lambda *_: [][0])
    with pytest.raises(IndexError):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), whole_folder(target) as partial:
        (partial / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(target) as partial:
        (partial / "a").write_text("2")
        assert not target.exists()
    assert (target / "a").read_text() == "2"


def test_an_unfinished_folder_can_be_kept_for_resuming(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), whole_folder(target, keep_partial=True) as partial:
        (partial / "a").write_text("1")
        raise RuntimeError
    with whole_folder(target, keep_partial=True) as partial:
        assert (partial / "a").read_text() == "1"
    assert (target / "a").exists()


def test_fingerprints_follow_content_and_names_but_not_times(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "big").write_bytes(b"\0" * (1 << 21))
        (tmp_path / name / "small").write_text("1")
    assert fingerprint(tmp_path / "x") == fingerprint(tmp_path / "y")
    (tmp_path / "y" / "small").write_text("2")
    assert fingerprint(tmp_path / "x") != fingerprint(tmp_path / "y")


def test_digest_tells_types_apart():
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest(json.loads('{"a": 1, "b": 2}')) == digest({"b": 2, "a": 1})


def test_what_a_killed_process_was_writing_is_removed_by_the_next_run(tmp_path):
    with run(tmp_path / "r"):
        (tmp_path / "r" / "items").mkdir()
    for name in (".record.json.123", "items/.m.say.jsonl.77", ".keep", "items/.x.5a"):
        (tmp_path / "r" / name).write_text("half")
    (tmp_path / "r" / "record.json").write_text((tmp_path / "r" / "record.json").read_text().replace("done", "running"))
    with run(tmp_path / "r"):
        pass
    left = {str(path.relative_to(tmp_path / "r")) for path in (tmp_path / "r").rglob(".*")}
    assert left == {".keep", "items/.x.5a"}


def test_a_record_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="the first"), run(tmp_path / "r"):
        monkeypatch.setattr("modicum.record.write_atomic", full)
        raise RuntimeError("the first")


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no text in UTF-8"):
        run(tmp_path / "caf\udce9")
