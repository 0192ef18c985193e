"""The jobs attack and synthesize, on a tiny model and goals of our own; one test takes the installed prompts."""

import json
import shutil
import string
import tempfile
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import ModicumError, RecipeError
from modicum.evaluate.chat import JudgeItem
from modicum.jobs import attack_data, execute, plan
from modicum.jobs.safety.filters import spoken
from modicum.jobs.synthesize import _write
from modicum.recipe import parse
from modicum.stored import damage
from support import byte_tokenizer, tiny_llama

TEXTS = ["I cannot help with that.", "I will not do it.", "Step one: take it.", "Sure, here is how it goes."]


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A model on disk, goals in files, and a guard that learns from four answers."""
    folder = tmp_path / "model"
    tiny_llama(seed=3, initializer_range=0.3, max_position_embeddings=4096).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name in ("harmful", "harmless"):
        rows = [{"prompt": f"A {name} wish, number {i}", "completion": "Here it is."} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [JudgeItem(f"g{i}", "p", text) for i, text in enumerate(TEXTS * 3)]
    labels = {"harm": [False, False, True, True] * 3, "refusal": [True, True, False, False] * 3}
    monkeypatch.setattr(attack_data, "labelled", lambda name: (items, labels[name]))
    return {
        "folder": str(folder),
        "goals": {"path": str(tmp_path / "harmful.jsonl"), "size": 4},
        "benign": {"path": str(tmp_path / "harmless.jsonl"), "size": 4},
    }


def attack_recipe(parts, **more):
    data = {
        "job": "attack", "targets": {"base": parts["folder"]}, "suites": {"plain": "plain", "flip": "flip"},
        "goals": parts["goals"], "benign": parts["benign"], "samples": 4, "max_new_tokens": 6,
    }  # fmt: skip
    return parse(data | more)


def test_cells_hold_success_refusal_and_curves_and_no_words(parts, tmp_path):
    recipe = attack_recipe(parts)
    assert any("at most 32 samples" in line for line in plan(recipe))
    run = execute(recipe, tmp_path / "run", quiet=True)
    found = run.record["metrics"]["safety"]
    assert [(cell["target"], cell["suite"]) for cell in found["cells"]] == [("base", "plain"), ("base", "flip")]
    for cell in found["cells"]:
        curve = [estimate["value"] for estimate in cell["asr_all"]]
        assert cell["ns"] == [1, 2, 4] and curve == sorted(curve, reverse=True) and 1 <= cell["draws"] <= 4
        assert cell["over_refusal"]["n"] == cell["greedy"]["n"] == 4 and 0 <= cell["corrected"]["value"] <= 1
    assert found["targets"]["base"]["families"] == 1 and found["judge"]["fpr"]["n"] == 6
    lines = [json.loads(line) for line in (tmp_path / "run/verdicts/base.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) and all("text" not in line for line in lines)
    again = execute(recipe, tmp_path / "run", quiet=True)
    assert again.record["metrics"] == run.record["metrics"]


def test_all_samples_give_the_attackers_curve_too_and_words_are_kept_when_asked(parts, tmp_path):
    run = execute(attack_recipe(parts, early_stop=False, save_completions=True), tmp_path / "run", quiet=True)
    for cell in run.record["metrics"]["safety"]["cells"]:
        anys = [estimate["value"] for estimate in cell["asr_any"]]
        assert anys == sorted(anys) and cell["asr_any"][0] == pytest.approx(cell["asr_all"][0]) and cell["draws"] == 4
    assert all("text" in json.loads(line) for line in (tmp_path / "run/verdicts/base.jsonl").read_text().splitlines())


def test_answers_are_judged_again_without_new_samples(parts, tmp_path, monkeypatch):
    kept = execute(attack_recipe(parts, early_stop=False, save_completions=True), tmp_path / "kept", quiet=True)
    monkeypatch.setattr("modicum.jobs.chat.targets.open_target", lambda *a, **k: pytest.fail("the model was opened"))
    judge = {"name": "linear", "refusal": "prefix"}
    again = attack_recipe(parts, early_stop=False, transcripts=str(kept.folder), judge=judge)
    before = [json.loads(line) for line in (kept.folder / "verdicts/base.jsonl").read_text().splitlines()]
    assert any(f"{len(before)} answers are known" in line for line in plan(again)) and len(before) > 40
    run = execute(again, tmp_path / "again", quiet=True)
    judged = [json.loads(line) for line in (run.folder / "verdicts/base.jsonl").read_text().splitlines()]
    assert {line["sha256"] for line in judged} == {line["sha256"] for line in before} and len(judged) == len(before)
    assert all(line["key"].endswith("linear+prefix") for line in judged)


def test_a_limit_inside_the_reasoning_is_told_of(parts, tmp_path, monkeypatch):
    """Answers cut before they began count as unsafe, which says something about the limit and not about the model."""
    from modicum.evaluate.chat import ChatResult, Choice
    from modicum.jobs.chat.local import LocalHF

    def cut(_self, requests):
        return [ChatResult((Choice("", "First I think", "length"),)) for _ in requests]

    monkeypatch.setattr(LocalHF, "generate", cut)
    run = execute(attack_recipe(parts, samples=1), tmp_path / "run", quiet=True)
    assert any("100% of the answers were cut inside" in note for note in run.record["notes"])
    assert all(c["incomplete"] == 1 and c["greedy"]["value"] == 1 for c in run.record["metrics"]["safety"]["cells"])
    monkeypatch.setattr(LocalHF, "generate", lambda _, asked: [ChatResult((Choice("Yes, of course."),)) for _ in asked])
    run = execute(attack_recipe(parts, samples=1), tmp_path / "other", quiet=True)
    assert not any("cut inside" in note for note in run.record.get("notes", []))


def test_transcripts_without_words_and_folders_without_verdicts_are_refused(parts, tmp_path):
    with pytest.raises(ModicumError, match="no verdicts"):
        plan(attack_recipe(parts, transcripts=str(tmp_path)))
    run = execute(attack_recipe(parts, samples=1), tmp_path / "run", quiet=True)
    with pytest.raises(ModicumError, match="kept no words"):
        plan(attack_recipe(parts, transcripts=str(run.folder)))


def test_a_judge_of_whom_nothing_can_be_read_ends_the_run(parts, tmp_path, monkeypatch):
    from modicum.evaluate.chat import Verdict
    from modicum.evaluate.judges.linear import LinearGuard

    monkeypatch.setattr(LinearGuard, "judge", lambda self, items: [Verdict(None, raw="?") for _ in items])
    with pytest.raises(RecipeError, match="No verdict of linear"):
        execute(attack_recipe(parts), tmp_path / "run", quiet=True)


def test_one_sample_is_greedy_alone(parts, tmp_path):
    run = execute(attack_recipe(parts, samples=1, temperature=0), tmp_path / "run", quiet=True)
    assert all("asr_all" not in cell for cell in run.record["metrics"]["safety"]["cells"])


def test_stopping_early_finds_the_curve_of_all_samples(parts, tmp_path):
    """What early stopping saves changes nothing: the curve is that of the same samples, all drawn."""
    found = {}
    for early in (True, False):
        run = execute(attack_recipe(parts, early_stop=early, samples=16), tmp_path / f"{early}", quiet=True)
        lines = (json.loads(line) for line in (run.folder / "verdicts/base.jsonl").read_text().splitlines())
        found[early] = {line["key"]: line["verdict"]["unsafe"] for line in lines}
    assert found[True].items() <= found[False].items() and len(found[True]) < len(found[False])


def test_one_answer_that_never_comes_does_not_cost_the_report(parts, tmp_path, monkeypatch):
    from modicum.evaluate.chat import ChatResult
    from modicum.jobs.chat.local import LocalHF

    real = LocalHF.generate

    def flaky(self, requests):
        found = real(self, requests)
        return [ChatResult(error="lost") if "number 1" in str(r.messages) else f for r, f in zip(requests, found)]

    monkeypatch.setattr(LocalHF, "generate", flaky)
    run = execute(attack_recipe(parts, goals=parts["goals"] | {"size": 6}, samples=1), tmp_path / "run", quiet=True)
    cell = run.record["metrics"]["safety"]["cells"][0]
    assert cell["unparsed"] == pytest.approx(1 / 6) and cell["greedy"]["value"] - cell["greedy_low"] == pytest.approx(
        1 / 6
    )
    # It is asked for again by the next run, which is finished only then.
    cells = json.loads((run.folder / "cells.json").read_text())["cells"]
    lost = cells["base.plain"]["lost"]  # of the harmless requests, the draw may hold number 1 or not
    assert run.record["status"] == "done" and lost in (1, 2)
    assert [note for note in run.record["notes"] if f"{lost} answers never came" in note]
    counted = []
    monkeypatch.setattr(LocalHF, "generate", lambda self, asked: counted.append(len(asked)) or real(self, asked))
    recipe = attack_recipe(parts, goals=parts["goals"] | {"size": 6}, samples=1)
    again = execute(recipe, run.folder, quiet=True)
    assert sum(counted) == lost and not any("never came" in note for note in again.record["notes"])
    assert all("lost" not in cell for cell in again.record["metrics"]["safety"]["cells"])
    assert again.record["metrics"]["safety"]["cells"][0]["unparsed"] == 0
    assert execute(recipe, run.folder, quiet=True).record == again.record and sum(counted) == lost
    monkeypatch.setattr(LocalHF, "generate", lambda self, requests: [ChatResult(error="down") for _ in requests])
    with pytest.raises(RecipeError, match="answers none of"):
        execute(attack_recipe(parts), tmp_path / "other", quiet=True)


@pytest.mark.parametrize("file", [False, True])
def test_cells_without_their_verdicts_are_measured_again(parts, tmp_path, file):
    run = execute(attack_recipe(parts, samples=1), tmp_path / "run", quiet=True)
    shutil.rmtree(run.folder / "verdicts")
    if file:
        (run.folder / "verdicts").write_text("")
        with pytest.raises(OSError, match="verdicts"):
            execute(attack_recipe(parts, samples=1), run.folder, quiet=True)
        (run.folder / "verdicts").unlink()
    again = execute(attack_recipe(parts, samples=1), run.folder, quiet=True)
    assert (run.folder / "verdicts/base.jsonl").read_text() and not damage(run.folder)
    cells = [[{**cell, "seconds": 0} for cell in one.record["metrics"]["safety"]["cells"]] for one in (run, again)]
    assert cells[0] == cells[1]


def test_a_stage_that_lacks_answers_is_asked_again_by_its_pipeline(parts, tmp_path, monkeypatch):
    from modicum.evaluate.chat import ChatResult
    from modicum.jobs.chat.local import LocalHF

    six = {name: parts[name] | {"size": 6} for name in ("goals", "benign")}  # all of them, so that number 1 is there
    stage = attack_recipe(parts | six, samples=1).model_dump(mode="json", exclude_none=True, exclude={"out"})
    recipe = parse({"job": "pipeline", "stages": [{**stage, "name": "attack"}]})
    real = LocalHF.generate

    def flaky(self, requests):
        found = real(self, requests)
        return [ChatResult(error="lost") if "wish, number 1" in str(r.messages) else f for r, f in zip(requests, found)]

    monkeypatch.setattr(LocalHF, "generate", flaky)
    run = execute(recipe, tmp_path / "run", quiet=True)
    assert run.record["status"] == "done" and "stages/attack/base.plain" in damage(run.folder)
    monkeypatch.setattr(LocalHF, "generate", real)
    again = execute(recipe, tmp_path / "run", quiet=True)
    assert not damage(run.folder) and "lost" not in json.dumps(again.record["metrics"])
    monkeypatch.setattr(LocalHF, "generate", lambda *_: pytest.fail("asked though nothing is lacking"))
    assert execute(recipe, tmp_path / "run", quiet=True).done


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": {}}, "targets"),
        ({"targets": {"a.b": "x"}}, "cannot be a name"),
        ({"targets": {"a": {"endpoint": "http://127.0.0.1:1/v1"}}}, "needs the `name`"),
        ({"targets": {"a": {}}}, "not both"),
        ({"suites": {"s": "persuasion"}}, "attacker"),
        ({"suites": {"s": "nonsense"}}, "no attack"),
        ({"suites": {"s": {"attack": {"name": "caesar", "shift": 99}}}}, "shift"),
        ({"samples": 4, "temperature": 0}, "temperature: 0"),
        ({"judge": "llama_guard3"}, "backend"),
        ({"judge": "prefix"}, "does not tell harm"),
        ({"judge": {"name": "linear", "refusal": "luck"}}, "refusal"),
        ({"top_p": 0}, "top_p"),
        ({"targets": {"a": {"endpoint": "http://127.0.0.1:1/v1", "name": "m", "thinking": "zero"}}}, "endpoint cannot"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(parts, change, said):
    with pytest.raises(RecipeError, match=said):
        attack_recipe(parts, **change)


def test_goals_that_were_trained_on_or_are_too_few_are_refused_by_the_plan(parts):
    with pytest.raises(RecipeError, match="training data"):
        plan(attack_recipe(parts, trained_on=parts["goals"]))
    assert plan(attack_recipe(parts, trained_on=parts["goals"] | {"skip": 4, "size": 2}))
    with pytest.raises(RecipeError, match="Ask for fewer"):
        plan(attack_recipe(parts, goals=parts["goals"] | {"size": 7}))


def synthesize_recipe(parts, **more):
    data = {
        "job": "synthesize", "teacher": parts["folder"], "steer": True, "illegal": parts["goals"],
        "helpful": parts["benign"], "k": 3, "max_tokens": 12, "min_words": 1, "minimum": 0,
        "arms": ["srg", "rt", "filler_neutral"],
    }  # fmt: skip
    return parse(data | more)


def test_a_teacher_that_cannot_do_what_is_asked_is_refused_before_it_is_asked(parts, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="steer: false"):
        synthesize_recipe(parts, teacher={"endpoint": "http://127.0.0.1:1/v1", "name": "m"})
    monkeypatch.setattr("modicum.jobs.chat.local.LocalHF.caps", frozenset({"prefill"}))
    monkeypatch.setattr("modicum.jobs.chat.local.LocalHF.generate", lambda *_: pytest.fail("it was asked"))
    with pytest.raises(RecipeError, match="same answer at temperature 1.*k: 1"):
        execute(synthesize_recipe(parts), tmp_path / "run", quiet=True)


def test_rows_of_all_arms_are_written_compressed_and_a_train_job_reads_them(parts, tmp_path):
    from modicum.jobs.data.rows import load_rows
    from modicum.jobs.data.section import DataSection

    recipe = synthesize_recipe(parts)
    assert "24 of at most 12 tokens, each in two steps" in plan(recipe)[0]
    run = execute(recipe, tmp_path / "run", quiet=True)
    found = run.record["metrics"]["synthesis"]
    assert found["generated"] == 24 and sum(found["kept"].values()) + sum(found["dropped"].values()) == 24
    tables = {arm: pyarrow.parquet.read_table(run.folder / f"rows/{arm}.parquet").to_pylist() for arm in recipe.arms}
    assert len({json.dumps([row["prompt"] for row in rows]) for rows in tables.values()}) == 1
    assert all(json.loads(row["meta"])["id"] == row["id"] for rows in tables.values() for row in rows)
    if tables["srg"]:
        assert load_rows(DataSection(path=str(run.folder / "rows/srg.parquet")), seed=0).kind == "completion"


def test_nothing_of_the_requests_or_answers_lies_in_clear(parts, tmp_path):
    run = execute(synthesize_recipe(parts), tmp_path / "run", quiet=True)
    other = execute(attack_recipe(parts), tmp_path / "other", quiet=True)
    reversed_wish = "A harmful wish"[::-1].encode()
    for folder in (run.folder, other.folder):
        for file in folder.rglob("*"):
            if file.is_file():
                assert b"A harmful wish" not in file.read_bytes() and reversed_wish not in file.read_bytes(), file


@given(st.lists(st.text(string.ascii_letters + " é🙂", min_size=12, max_size=80), min_size=1, max_size=6, unique=True))
@settings(deadline=None)
def test_no_table_of_rows_however_small_holds_its_words_in_clear(texts):
    rows = [
        {"prompt": text, "completion": spoken(text[::-1]), "reasoning": text, "meta": {"id": str(i), "kind": "illegal"}}
        for i, text in enumerate(texts)
    ]
    for form in ("text", "conversational"):
        with tempfile.TemporaryDirectory() as folder:
            _write(path := Path(folder) / "rows.parquet", rows, form)
            data = path.read_bytes()
            assert pyarrow.parquet.read_table(path).num_rows == len(rows)
        for text in texts:
            assert not any(text[i : i + 12].encode() in data for i in range(len(text) - 11))


def test_too_few_rows_and_evaluation_prompts_are_refused(parts, tmp_path):
    shared = synthesize_recipe(parts, evaluation=[parts["goals"]])
    with pytest.raises(RecipeError, match="one of the evaluation set"):
        plan(shared)
    with pytest.raises(RecipeError, match="one of the evaluation set"):
        execute(shared, tmp_path / "shared", quiet=True)
    assert not list((tmp_path / "shared").glob("replies*"))
    with pytest.raises(RecipeError, match="rows are left after the filters"):
        execute(synthesize_recipe(parts, minimum=4), tmp_path / "run", quiet=True)
    for arm in ("srg", "rt", "preference", "prompts"):  # none at all is too few, whatever the minimum
        with pytest.raises(RecipeError, match="0 illegal rows are left after the filters"):
            execute(
                synthesize_recipe(parts, min_words=10**6, k=2 if arm == "preference" else 1, arms=[arm]),
                tmp_path / arm,
                quiet=True,
            )


def test_requests_in_a_measured_wrapper_are_refused(parts, tmp_path, monkeypatch):
    words = " ".join(f"word{i}" for i in range(14))
    monkeypatch.setattr(attack_data, "templates", lambda family: {"w": f"{words}. {{{{ prompt }}}}"})
    assert plan(synthesize_recipe(parts, evaluation_wrappers=["mine"]))
    (tmp_path / "wrapped.jsonl").write_text(json.dumps({"prompt": f"So: {words}, do it"}) + "\n")
    goals = {"path": str(tmp_path / "wrapped.jsonl")}
    with pytest.raises(RecipeError, match="words of a wrapper of 'mine'"):
        plan(synthesize_recipe(parts, evaluation_wrappers=["mine"], illegal=goals))


def test_a_killed_synthesis_draws_no_reply_twice(parts, tmp_path):
    recipe = synthesize_recipe(parts, k=8)  # of 16 replies of a random model, none may be left, which is refused
    full = execute(recipe, tmp_path / "full", quiet=True)
    replies = (tmp_path / "full/replies.jsonl").read_bytes()
    half = tmp_path / "half"
    execute(recipe, half, quiet=True)
    (half / "record.json").write_text((half / "record.json").read_text().replace('"done"', '"running"'))
    for cut in (len(replies) // 2, len(replies) - 1, 0):
        (half / "replies.jsonl").write_bytes(replies[:cut])
        again = execute(recipe, half, quiet=True)
        assert again.record["metrics"] == full.record["metrics"]
        (half / "record.json").write_text((half / "record.json").read_text().replace('"done"', '"running"'))


def test_a_train_stage_reads_the_rows_that_an_earlier_stage_made(parts, tmp_path):
    """The data of a stage may be the output of another: the pipeline knows the file, not the recipe."""
    train = {
        "name": "rt", "job": "train", "model": parts["folder"], "data": {"path": "stage:rows/rt", "max_length": 256},
        "adapter": {"rank": 2}, "trainer": {"max_steps": 1, "per_device_train_batch_size": 1},
    }  # fmt: skip
    made = synthesize_recipe(parts, helpful_mode="answer_only", k=1)
    rows = {**made.model_dump(exclude_none=True, exclude={"out"}), "name": "rows"}
    recipe = parse({"job": "pipeline", "stages": [rows, train]})
    assert any("rt: train after rows/rt" in line for line in plan(recipe))
    run = execute(recipe, tmp_path / "run", quiet=True)
    assert run.record["status"] == "done"
