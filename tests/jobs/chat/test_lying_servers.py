"""Answers of servers that lie: whatever they send is an error of that answer, and not of the run."""

from __future__ import annotations

import pytest

from modicum.borders import loads
from modicum.evaluate.chat import ChatRequest, user
from modicum.jobs.chat.openai import OpenAICompatible

MESSAGE = '{"choices": [{"message": {"content": "a"}, "logprobs": %s}], "usage": {"prompt_tokens": %s}}'


@pytest.mark.parametrize(
    "text",
    [
        MESSAGE % ("null", "1e400"),
        MESSAGE % ("null", "NaN"),
        MESSAGE % ('{"content": [{"token": "a", "logprob": 1' + "0" * 400 + "}]}", "1"),
        MESSAGE % ('{"content": 3}', "1"),
        '{"choices": 3}',
        '{"choices": {"a": 1}}',
        "[]",
        "3",
    ],
)
def test_a_malformed_completion_is_an_error_of_its_answer(monkeypatch, text):
    client = OpenAICompatible("http://127.0.0.1:9/v1", "m")
    monkeypatch.setattr(client.endpoint, "post", lambda *_: loads(text))
    (result,) = client.generate([ChatRequest(user("hi"))])
    assert result.error


@pytest.mark.parametrize("text", ['{"answers": {"a": {"noul": 1%s}}}' % ("0" * 400), '{"answers": 3}', "[]", '"x"'])
def test_a_malformed_decision_is_an_error_of_its_text(monkeypatch, text):
    client = OpenAICompatible("http://127.0.0.1:9/v1", "m")
    monkeypatch.setattr(client.endpoint, "post", lambda *_: loads(text))
    (said,) = client.decide(["x"], {"a": "b?"})
    assert isinstance(said, str)


def test_an_answer_nested_beyond_measure_is_an_error(monkeypatch):
    client = OpenAICompatible("http://127.0.0.1:9/v1", "m", retries=0)
    monkeypatch.setattr(client.endpoint, "_send", lambda *_: (200, b"[" * 100_000, None))
    (result,) = client.generate([ChatRequest(user("hi"))])
    assert result.error is not None and "is no JSON" in result.error
    monkeypatch.setattr(client.endpoint, "_send", lambda *_: (400, b"[" * 100_000, None))
    (result,) = client.generate([ChatRequest(user("hi"))])
    assert result.error is not None and "status 400" in result.error
