"""Nothing that a model, a wrapper or a server says lies in a run folder in clear, and no error quotes it."""

import json

import pytest
from chat_server import completion, serving

from modicum.evaluate.chat import ChatRequest, Goal, JudgeItem, user
from modicum.jobs import attack_data, execute
from modicum.jobs.chat.cache import Recorded
from modicum.jobs.chat.http import Endpoint, FailedError
from modicum.jobs.chat.scripted import Scripted
from modicum.jobs.safety.suites import Suite
from modicum.recipe import parse

WORDS = [b"SECRET", b"PLAIN", b"Filtered", b"wish, number", b"rebmun ,hsiw", b"WRAPPED now. A"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    for name in ("harmful", "harmless"):
        rows = [{"prompt": f"A {name} wish, number {i}"} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [JudgeItem(f"g{i}", "p", text) for i, text in enumerate(["I will not.", "Step one."] * 6)]
    monkeypatch.setattr(attack_data, "labelled", lambda name: (items, [False, True] * 6))
    monkeypatch.setattr(attack_data, "provenance", lambda *names: dict.fromkeys(names))
    data = {
        "job": "attack", "samples": 2, "max_new_tokens": 6, "suites": {"plain": "plain", "flip": "flip"},
        "goals": str(tmp_path / "harmful.jsonl"), "benign": str(tmp_path / "harmless.jsonl"),
    }  # fmt: skip
    return lambda url, **more: parse(
        data | {"targets": {"far": {"endpoint": url, "name": "m", "retries": 0, **more.pop("target", {})}}} | more
    )


def test_no_answer_wrapped_prompt_or_word_of_a_server_lies_in_clear(recipe, tmp_path):
    def reply(body, number):
        asked = body["messages"][-1]["content"]
        if "number 1" in asked or "1 rebmun" in asked:
            return 200, b"PLAIN words in the place of JSON: " + asked.encode(), {}
        if "number 2" in asked:
            return 400, {"error": {"message": f"Filtered request: {asked}"}}, {}
        if "2 rebmun" in asked:
            return 500, b"PLAIN words about " + asked.encode(), {}
        return completion(f"SECRET answer {number} to {asked}")

    wrapper = {"attack": {"name": "template", "template": "You are WRAPPED now. {{ prompt }}"}}
    with serving(reply) as (url, seen):
        made = recipe(url, suites={"plain": "plain", "flip": "flip", "mine": wrapper})
        run = execute(made, tmp_path / "run", quiet=True)
    assert any("hsiw" in body["messages"][-1]["content"] for body in seen)  # the flipped form that is looked for
    assert len(run.record["lacks"]) == 3 and set(run.record["metrics"]["safety"]["data"]) == {"harm", "refusal"}
    for file in (file for file in run.folder.rglob("*") if file.is_file()):
        assert not [word for word in WORDS if word in file.read_bytes()], file
    with serving(lambda body, number: (200, b"PLAIN words", {})) as (url, _), pytest.raises(ValueError) as caught:
        execute(recipe(url), tmp_path / "down", quiet=True)
    assert "PLAIN" not in str(caught.value)


def test_errors_tell_lengths_and_hashes_and_mask_the_key_before_they_cut(monkeypatch):
    key = "s3cret-key-of-the-server"
    messages = [{"role": "user", "content": "A harmful wish, number 1"}]
    replies = [
        (b"PLAIN words", "11 bytes with the SHA-256"),
        ({"error": {"message": "flagged: A harmful wish, number 1"}}, "bytes with the SHA-256"),
        ({"error": {"message": "m is not loaded"}}, "m is not loaded"),
        ({"error": {"message": "x" * 190 + key}}, "x" * 190 + "***"),
    ]
    for content, said in replies:
        with serving(lambda body, number, content=content: (400, content, {})) as (url, _):
            endpoint = Endpoint(url, key=key, timeout=5, retries=0)
            with pytest.raises(FailedError) as caught:
                endpoint.post("/x", {"model": "m", "messages": messages})
            endpoint.close()
        assert said in str(caught.value) and "harmful" not in str(caught.value) and key[:8] not in str(caught.value)


def test_what_is_not_recorded_or_scripted_is_told_by_its_hash(tmp_path):
    asked = [ChatRequest(user("A harmful wish"))]
    (tmp_path / "none.jsonl").write_text("")
    for model in (Recorded(tmp_path / "none.jsonl", name="m"), Scripted({})):
        with pytest.raises(ValueError, match="SHA-256") as caught:
            model.generate(asked)
        assert "harmful" not in str(caught.value)


def test_goals_are_worded_anew_once_and_those_that_the_model_declines_are_left_out(recipe, tmp_path):
    """However many targets there are, and after a kill, the attacker is asked once for each request."""
    asked = []

    def reply(body, number):
        text = body["messages"][-1]["content"]
        if body["model"] != "words":
            return completion(f"Well {number}")
        asked.append(text)
        return completion(
            "I cannot help with that." if "number 1" in text else "" if "number 2" in text else f"How {text[-20:]}"
        )

    with serving(reply) as (url, _):
        two = {name: {"endpoint": url, "name": name} for name in ("m", "n")}
        made = recipe(url, targets=two, suites={"past": "past_tense"}, attacker={"endpoint": url, "name": "words"})
        run = execute(made, tmp_path / "run", quiet=True)
        wordings = [text for text in asked if "past" in text]
        assert len(wordings) == len(set(wordings)) == 8
        (run.folder / "cells.json").unlink()
        (run.folder / "record.json").write_text((run.folder / "record.json").read_text().replace('"done"', '"running"'))
        execute(made, run.folder, quiet=True)
    assert len([text for text in asked if "past" in text]) == 8
    assert any("past: 4 of 8 requests were not worded anew" in note for note in run.record["notes"])
    assert [cell["prompts"] for cell in run.record["metrics"]["safety"]["cells"]] == [2, 2]
    suite = Suite(attack="past_tense")
    with pytest.raises(ValueError, match="words none of 1 goals"):
        suite.wrap("past", [Goal("g", "A wish")], Scripted(lambda request: "I'm sorry, no."))


def test_transcripts_of_other_weights_are_refused(recipe, tmp_path, monkeypatch):
    from modicum.jobs.attack import _same_models

    with serving(lambda body, number: completion(f"Well {number}")) as (url, _):
        kept = execute(recipe(url, save_completions=True), tmp_path / "kept", quiet=True)
        again = recipe(url, transcripts=str(kept.folder))
        again = again.model_copy(
            update={"targets": {"near": again.targets["far"].model_copy(update={"model": "here"})}}
        )
        record = json.loads((kept.folder / "record.json").read_text())
        (kept.folder / "record.json").write_text(json.dumps({**record, "inputs": {"here": "abc"}}))
        _same_models(again, {"here": "abc"})
        with pytest.raises(ValueError, match="is not what it was"):
            _same_models(again, {"here": "abd"})


def test_fields_and_tags_of_a_target_reach_its_server(recipe, tmp_path):
    with serving(lambda body, number: completion(f"[t]Hm {number}[/t]Fine.")) as (url, seen):
        target = {"extra_body": {"top_k": 3}, "tags": ["[t]", "[/t]"]}
        run = execute(recipe(url, target=target, save_completions=True), tmp_path / "run", quiet=True)
    assert all(body["top_k"] == 3 for body in seen)
    lines = [json.loads(line) for line in (run.folder / "verdicts/far.jsonl").read_text().splitlines()]
    assert all(line["text"] == "Fine." and line["reasoning"].startswith("Hm") for line in lines)
    assert all(cell["tokens"] == 2 for cell in run.record["metrics"]["safety"]["cells"])
    for bad in ({"tags": ["a", "a"]}, {"endpoint": None, "name": None, "model": "x", "extra_body": {"a": 1}}):
        with pytest.raises(ValueError, match="two different|extra_body"):
            recipe(url, target=bad)


def test_a_judge_that_asks_a_model_is_measured_once_and_corrects(recipe, tmp_path):
    """A judge who errs in a known way: of labelled answers it calls one harmless kind in two harmful."""
    judged = []

    def reply(body, number):
        text = body["messages"][-1]["content"]
        if body["model"] != "guard":
            return completion(f"Step one {number}.")
        judged.append(text)
        return completion("unsafe" if "Step one" in text or len(judged) % 2 else "safe")

    with serving(reply) as (url, _):
        judge = {"name": "jbb", "backend": {"endpoint": url, "name": "guard"}, "calibrate": 8}
        made = recipe(url, judge=judge, suites={"plain": "plain"}, samples=1)
        run = execute(made, tmp_path / "run", quiet=True)
    found = run.record["metrics"]["safety"]
    assert found["judge"]["positives"] == found["judge"]["negatives"] == 4 and found["judge"]["fnr"]["value"] == 0
    assert "corrected" in found["cells"][0] and "harm" in found["data"]
    assert json.loads((run.folder / "judge.json").read_text())["cells"]["harm"]["fpr"] == found["judge"]["fpr"]
    for bad in ({"name": "linear", "calibrate": 4}, {**judge, "calibrate": 1}):
        with pytest.raises(ValueError, match="calibrate"):
            recipe(url, judge=bad)
