import json
import math
import threading
import time

import pytest
from chat_server import completion, serving

from modicum.errors import RecipeError
from modicum.evaluate.chat import AttackedPrompt, ChatRequest, GenParams, Goal, JudgeItem, Verdict, user
from modicum.evaluate.judges.decision import TypedDecision
from modicum.jobs.chat.cache import Cached
from modicum.jobs.chat.decoding import ZeroThink
from modicum.jobs.chat.http import Endpoint, _Gate
from modicum.jobs.chat.openai import OpenAICompatible
from modicum.jobs.safety.drawing import Drawing, Verdicts


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch):
    monkeypatch.setattr("modicum.jobs.chat.http.time.sleep", lambda _: None)


def request(text="hi", **params):
    return ChatRequest(user(text), GenParams(**params))


def test_answers_come_in_the_order_of_the_requests():
    def slow_first(body, _):
        text = body["messages"][-1]["content"]
        time.monotonic()
        threading.Event().wait(0.05 if text == "0" else 0)
        return completion(f"<{text}>")

    with serving(slow_first) as (url, _):
        results = OpenAICompatible(url, "m").generate([request(str(i)) for i in range(30)])
    assert [result.choices[0].text for result in results] == [f"<{i}>" for i in range(30)]
    assert results[0].usage.prompt_tokens == 3


def test_a_server_that_ignores_n_is_asked_again_under_other_seeds():
    with serving(lambda body, number: completion(f"{body['seed']}")) as (url, seen):
        (result,) = OpenAICompatible(url, "m").generate([request(n=4, seed=5)])
    assert [choice.text for choice in result.choices] == ["5", "6", "7", "8"] and len(seen) == 4
    with serving(lambda body, number: completion(*"abcdef"[: body["n"]])) as (url, seen):
        (result,) = OpenAICompatible(url, "m").generate([request(n=4, seed=5)])
    assert [choice.text for choice in result.choices] == list("abcd") and len(seen) == 1


def test_reasoning_refusals_and_filters_are_told_apart():
    answers = [
        completion("Four.", reasoning_content="Add."),
        completion("<think>Add.</think>Four."),
        completion(None, refusal="I decline."),
        {"choices": [{"message": {"content": ""}, "finish_reason": "content_filter"}]},
        {"choices": [{"message": {"content": "<think>Add"}, "finish_reason": "length"}]},
    ]
    with serving(lambda body, number: answers[int(body["messages"][-1]["content"])]) as (url, _):
        results = OpenAICompatible(url, "m").generate([request(str(i)) for i in range(5)])
    said = [(r.choices[0].text, r.choices[0].reasoning, r.choices[0].finish_reason) for r in results]
    assert said == [
        ("Four.", "Add.", "stop"),
        ("Four.", "Add.", "stop"),
        ("I decline.", None, "refusal"),
        ("", None, "content_filter"),
        ("", "Add", "length"),
    ]
    assert results[4].choices[0].incomplete()


@pytest.mark.parametrize("trouble", [(429, {}, {"Retry-After": "1"}), (503, {}, {}), (500, b"no JSON", {})])
def test_passing_trouble_is_waited_for(trouble):
    with serving(lambda body, number: trouble if number <= 3 else completion("ok")) as (url, seen):
        (result,) = OpenAICompatible(url, "m").generate([request()])
    assert result.choices[0].text == "ok" and len(seen) == 4


@pytest.mark.parametrize(
    ("trouble", "said", "calls"),
    [
        ((429, {"error": {"message": "slow down"}}, {}), "status 429: slow down, after 3 attempts", 3),
        ((400, {"error": {"message": "context is too long"}}, {}), "status 400: context is too long", 1),
        ((404, {"error": "no such model"}, {}), "status 404: no such model", 1),
        ((200, b"<html>", {}), "the answer is no JSON", 1),
        ((200, {"choices": []}, {}), "no choices", 1),
        ((200, {"choices": [{"text": "old protocol"}]}, {}), "no chat completion", 1),
        ((200, ["surprise"], {}), "no chat completion", 1),
        ((200, {"choices": None}, {}), "no chat completion", 1),
    ],
)
def test_lasting_trouble_fails_one_request_and_no_other(trouble, said, calls):
    def answer(body, number):
        return trouble if body["messages"][-1]["content"] == "bad" else completion("ok")

    with serving(answer) as (url, seen):
        bad, good = OpenAICompatible(url, "m", retries=2).generate([request("bad"), request("good")])
    assert said in bad.error and not bad.choices and good.choices[0].text == "ok" and len(seen) == calls + 1


@pytest.mark.parametrize("message", [{"content": [{"text": "ok"}]}, {"content": "ok", "reasoning": {"steps": 1}}])
def test_answers_in_parts_are_errors_and_cost_no_other_answer(message):
    strange = {"choices": [{"message": message, "finish_reason": "stop"}]}
    with serving(lambda body, number: strange if number == 1 else completion("ok")) as (url, _):
        bad, good = (OpenAICompatible(url, "m").generate([request()])[0] for _ in range(2))
    assert bad.error == "the answer is no chat completion" and good.choices[0].text == "ok"


def test_connections_that_the_server_closed_while_they_were_idle_cost_no_attempt():
    together = threading.Barrier(8)

    def answer(body, number):
        if number <= 8:
            together.wait(10)  # so that eight connections are open at a time
        return completion("ok")

    with serving(answer, idle=0.2) as (url, seen):
        endpoint = Endpoint(url, key=None, timeout=10, retries=0)
        threads = [threading.Thread(target=endpoint.post, args=("/chat/completions", {})) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(endpoint.idle) == 8
        threading.Event().wait(0.6)
        for _ in range(3):
            assert endpoint.post("/chat/completions", {})["choices"]
        assert len(seen) == 11 and len(endpoint.idle) == 1
        endpoint.close()


def test_a_server_that_is_not_there_is_one_line():
    (result,) = OpenAICompatible("http://127.0.0.1:9/v1", "m", retries=1).generate([request()])
    assert "ConnectionRefusedError at 127.0.0.1:9" in result.error and "\n" not in result.error


@pytest.mark.parametrize(
    "knobs",
    [
        {"base_url": "ftp://127.0.0.1/v1"}, {"base_url": "127.0.0.1:8000"}, {"base_url": "http://u:p@127.0.0.1/v1"},
        {"base_url": "http://example.org/v1"}, {"base_url": "http://127.0.0.1/v1?version=u:p"},
        {"concurrency": 0}, {"timeout": 0.0}, {"retries": -1},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(knobs):
    with pytest.raises(RecipeError) as caught:
        OpenAICompatible(**{"model": "m"} | knobs)
    assert "\n" not in str(caught.value) and "u:p" not in str(caught.value)


def test_another_machine_is_asked_when_allowed():
    assert OpenAICompatible("https://example.org/v1", "m", allow_remote=True).name == "m@example.org"


def test_a_probe_finds_servers_that_do_not_sample():
    with serving(lambda body, number: completion("always this")) as (url, _):
        deaf = OpenAICompatible(url, "m")
        assert not deaf.probe() and "sampling" not in deaf.caps and deaf.extra_body == {}
    with serving(lambda body, number: completion(str(body["seed"]))) as (url, _):
        free = OpenAICompatible(url, "m")
        assert free.probe() and "sampling" in free.caps and free.extra_body == {}
    with serving(lambda b, _: completion(str(b["seed"]) if "do_sample" in b.get("generation_config", "") else "x")) as (
        url,
        seen,
    ):
        told = OpenAICompatible(url, "m")
        assert told.probe() and "sampling" in told.caps
        told.generate([request(temperature=0.5, top_p=0.9, seed=1), request(temperature=0.0, seed=1)])
        bodies = {body["temperature"]: body for body in seen[-2:]}
        assert '"temperature": 0.5' in bodies[0.5]["generation_config"] and "generation_config" not in bodies[0.0]
    lone = OpenAICompatible("http://127.0.0.1:9/v1", "m", retries=0)
    for look in (lone.probe, lone.reach):
        with pytest.raises(RecipeError, match="does not answer"):
            look()


def test_a_server_that_samples_as_its_first_request_did_is_refused():
    """``transformers serve --continuous-batching`` keeps the way of sampling of whoever asks first."""

    def keeping(first):
        def answer(body, number):
            first.append('do_sample": true' in body.get("generation_config", ""))
            return completion(str(number) if first[0] else "x")

        return answer

    mine = {"generation_config": '{"do_sample": true}'}
    with serving(keeping([])) as (url, _), pytest.raises(RecipeError, match="two answers at temperature 0"):
        OpenAICompatible(url, "m", extra_body=mine).probe()
    with serving(keeping([])) as (url, _):
        assert not OpenAICompatible(url, "m").probe()


def test_what_a_recipe_says_of_generation_reaches_the_server():
    mine = {"generation_config": '{"do_sample": true, "min_new_tokens": 3, "top_k": 5, "temperature": 0.1}'}
    with serving(lambda body, number: completion(str(number) if body["temperature"] else "x")) as (url, seen):
        client = OpenAICompatible(url, "m", extra_body=mine)
        assert client.probe()
        client.generate([request(temperature=0.5, top_p=0.9)])
        client.generate([request(temperature=0.0)])
    sampled, greedy = (json.loads(body["generation_config"]) for body in seen[-2:])
    assert sampled == {"do_sample": True, "min_new_tokens": 3, "top_k": 5, "temperature": 0.5, "top_p": 0.9}
    assert greedy == {"do_sample": False, "min_new_tokens": 3, "top_k": 5}
    for bad in ("no JSON", "[1]", {"do_sample": True}):
        with pytest.raises(RecipeError, match="no JSON object in a text"):
            OpenAICompatible(url, "m", extra_body={"generation_config": bad})


def test_a_probe_asks_no_more_than_it_needs_and_bears_servers_that_know_no_field_but_the_usual_ones():
    with serving(lambda body, number: completion(str(number))) as (url, seen):
        OpenAICompatible(url, "m").probe()
        assert len(seen) == 2
    strict = lambda body, _: (400, {"error": "unknown field"}, {}) if "generation_config" in body else completion("x")  # noqa: E731
    with serving(strict) as (url, seen):
        assert not OpenAICompatible(url, "m", retries=0).probe() and len(seen) == 8
    # Two answers may be equal by chance: the next ones tell.
    with serving(lambda body, _: completion("x" if body["seed"] < 2 else str(body["seed"]))) as (url, seen):
        client = OpenAICompatible(url, "m")
        assert client.probe() and client.extra_body == {} and len(seen) == 6
    with serving(lambda body, _: completion("x")) as (url, seen):
        OpenAICompatible(url, "m").reach()
        assert [(body["max_tokens"], body["temperature"]) for body in seen] == [(1, 0.0)]


def test_concurrency_grows_to_what_is_allowed_and_falls_when_there_is_too_much():
    inside, most, lock = 0, 0, threading.Lock()

    def answer(body, number):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.004)
        with lock:
            inside -= 1
        return completion("ok")

    with serving(answer) as (url, _):
        OpenAICompatible(url, "m", concurrency=12).generate([request(str(i)) for i in range(150)])
        assert 1 <= most <= 12
    most = 0

    def strict(body, number):
        nonlocal most
        found = answer(body, number)
        return (429, {}, {}) if inside >= 2 else found

    with serving(strict) as (url, _):
        results = OpenAICompatible(url, "m", concurrency=12, retries=20).generate([request()] * 80)
    assert all(result.error is None for result in results)


@pytest.mark.parametrize(("speed", "grows"), [(lambda limit: limit, True), (lambda limit: 1 / limit, False)])
def test_more_are_asked_at_a_time_while_that_brings_more_answers(monkeypatch, speed, grows):
    now = 0.0
    monkeypatch.setattr("modicum.jobs.chat.http.time.monotonic", lambda: now)
    gate = _Gate(2, 32, Endpoint("http://127.0.0.1:9/v1", key=None, timeout=1.0, retries=0))
    for _ in range(200):
        with gate:
            now += 1 / speed(gate.limit)
    assert (gate.limit == 32) == grows and gate.limit >= 2
    gate.endpoint.busy += 1
    before = gate.limit
    with gate:
        pass
    assert gate.limit == before // 2


def test_who_asks_for_too_many_goes_back_to_the_number_that_brought_most(monkeypatch):
    now = 0.0
    monkeypatch.setattr("modicum.jobs.chat.http.time.monotonic", lambda: now)
    gate = _Gate(4, 64, Endpoint("http://127.0.0.1:9/v1", key=None, timeout=1.0, retries=0))
    seen = []
    for _ in range(600):
        with gate:
            seen.append(gate.limit)
            now += 1 / min(gate.limit, 8) * (2 if gate.limit > 8 else 1)
    assert max(seen) == 16 and seen.count(8) > 0.8 * len(seen)


def test_typed_decisions_and_log_probabilities():
    def answer(body, number):
        if "questions" in body:
            return {"answers": {name: {"noul": 0.75 if name == "unsafe" else 0.25} for name in body["questions"]}}
        tops = [{"token": "safe", "logprob": -0.1}, {"token": "unsafe", "logprob": -2.0}]
        found = completion("safe")
        found["choices"][0]["logprobs"] = {"content": [{"token": "safe", "logprob": -0.1, "top_logprobs": tops}]}
        return found

    with serving(answer) as (url, seen):
        model = OpenAICompatible(url, "m")
        (verdict,) = TypedDecision(model).judge([JudgeItem("goal", "p", "Step one.")])
        assert (verdict.unsafe, verdict.refusal) == (True, False) and seen[0]["path"] == "/v1/systemone"
        (result,) = model.generate([request(logprobs=2)])
        assert result.choices[0].logprobs == [{"safe": -0.1, "unsafe": -2.0}]
    with serving(lambda body, number: (404, {}, {})) as (url, _):
        (verdict,) = TypedDecision(OpenAICompatible(url, "m")).judge([JudgeItem("goal", "", "Step one.")])
        assert (verdict.unsafe, verdict.refusal, verdict.outcome) == (None, None, "error") and "404" in verdict.raw


def test_a_text_that_cannot_be_decided_does_not_cost_the_others():
    def reply(body, number):
        if "broken" in body["state"]:
            return {"answers": {"unsafe": "no number"}}
        return {"answers": {"unsafe": {"noul": 0.9}, "refusal": {"noul": math.nan}}}

    items = [JudgeItem("goal", "", text) for text in ("Step one.", "broken", "Step two.")]
    with serving(reply) as (url, _):
        first, broken, last = TypedDecision(OpenAICompatible(url, "m")).judge(items)
    assert first.unsafe and last.unsafe and first.refusal is None
    assert (broken.unsafe, broken.outcome) == (None, "error")


def slow(body, _):
    threading.Event().wait(0.005)
    return completion(body["messages"][-1]["content"])


class Impatient:
    """A judge who is interrupted after some answers."""

    name, needs = "impatient", frozenset()

    def __init__(self, patience):
        self.left = patience

    def judge(self, items):
        self.left -= len(items)
        if self.left < 0:
            raise KeyboardInterrupt
        return [Verdict(False) for _ in items]


def test_each_answer_is_kept_as_it_comes_and_an_interruption_asks_for_no_more(tmp_path):
    """Of 40 answers that one batch could hold, an interruption after some loses those alone that were on their way."""
    prompts = [AttackedPrompt(Goal(f"g{i}", f"goal {i}"), user(f"goal {i}"), "plain") for i in range(40)]

    with serving(slow) as (url, seen):
        target = OpenAICompatible(url, "m", concurrency=2)
        path = tmp_path / "verdicts.jsonl"
        with pytest.raises(KeyboardInterrupt):
            Drawing(target, Impatient(10), Verdicts(path), params=GenParams(), seed=0).greedy(prompts)
        kept, asked = len(path.read_text().splitlines()), len(seen)
        assert 5 <= kept <= 10 and asked <= kept + 10
        Drawing(target, Impatient(99), Verdicts(path), params=GenParams(), seed=0).greedy(prompts)
        assert len(seen) == asked + 40 - kept and len(path.read_text().splitlines()) == 40


def test_a_cache_keeps_each_answer_as_it_comes(tmp_path, monkeypatch):
    """A kill before the last answer of a batch leaves the others on disk."""
    with serving(slow) as (url, seen):
        client = OpenAICompatible(url, "m", concurrency=1)
        cached = Cached(client, tmp_path / "cache.jsonl")
        store, left = cached._store, [5]

        def interrupted(key, choice):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            store(key, choice)

        monkeypatch.setattr(cached, "_store", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached.generate([request(str(i)) for i in range(40)])
        assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 5 and len(seen) < 40
        asked = len(seen)
        Cached(client, tmp_path / "cache.jsonl").generate([request(str(i)) for i in range(40)])
        assert len(seen) == asked + 35


def test_wrapped_models_hand_over_what_comes():
    class Begins(OpenAICompatible):
        caps = frozenset({"prefill"})

    with serving(lambda body, _: completion(body["messages"][-2]["content"])) as (url, _):
        parts = list(ZeroThink(Begins(url, "m")).arriving([request(str(i)) for i in range(9)]))
    found = dict(pair for part in parts for pair in part)
    assert [found[i].choices[0].text for i in range(9)] == [str(i) for i in range(9)]
