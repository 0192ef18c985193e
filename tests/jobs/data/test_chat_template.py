"""Chat templates are programs of others: what they take is limited, what they write is what transformers writes."""

from __future__ import annotations

import os
import time

import pytest

from campaigns.bombs import TEMPLATES
from modicum.errors import CheckpointError
from modicum.jobs.data import chat_template
from support import byte_tokenizer

HELLO = [{"role": "user", "content": "hi 😀 é"}, {"role": "assistant", "content": "a\nb"}]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)


@pytest.mark.parametrize("prompt", [True, False])
def test_it_writes_what_transformers_writes(prompt):
    tokenizer = byte_tokenizer()
    for messages in (HELLO[:1], HELLO, HELLO * 200):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert chat_template.apply(tokenizer, messages, prompt=prompt) == expected
    writer = chat_template._writers[tokenizer]
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert chat_template.apply(tokenizer, HELLO) == "<|endoftext|>hi 😀 é"
    assert chat_template._writers[tokenizer] is not writer


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_takes_long_or_much_or_runs_code(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    began = time.monotonic()
    try:
        text = chat_template.apply(tokenizer, HELLO)
    except CheckpointError as error:
        told = str(error)
        assert "\n" not in told and told.startswith("The chat template ") and "user, assistant" in told
    else:
        assert name in ("powers", "NUL") and len(text) < 1 << 30
    assert time.monotonic() - began < 20 and not list(tmp_path.parent.glob("ran"))


def test_after_one_that_was_ended_the_next_conversation_is_written():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 1 %}" + TEMPLATES["loops"] + "{% endif %}x"
    assert chat_template.apply(tokenizer, HELLO[:1]) == "x"
    with pytest.raises(CheckpointError, match="takes more than 0.3 s"):
        chat_template.apply(tokenizer, HELLO)
    assert chat_template.apply(tokenizer, HELLO[:1]) == "x"


def test_a_template_adds_no_more_than_a_prompt_to_a_conversation():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "x" * 3_000_000 + "{{ messages[0].content }}"
    with pytest.raises(CheckpointError, match="adds more than 1 MiB to a conversation of user, assistant"):
        chat_template.apply(tokenizer, HELLO)
    long = [{"role": "user", "content": "y" * 400_000}]
    assert len(chat_template.apply(tokenizer, long)) == 3_400_000
    tokenizer.chat_template = "x" * 1_000_000 + "{{ messages[0].content }}"
    assert len(chat_template.apply(tokenizer, HELLO)) == 1_000_000 + len(HELLO[0]["content"])


def test_its_process_ends_with_the_tokenizer():
    tokenizer = byte_tokenizer()
    chat_template.apply(tokenizer, HELLO)
    pid = chat_template._writers[tokenizer]._pid
    del tokenizer
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
