"""Keys of endpoints: whence they come, which are none, and that none is told."""

import pytest
from chat_server import completion, serving

from modicum.errors import RecipeError
from modicum.evaluate.chat import ChatRequest, GenParams, user
from modicum.jobs.chat.openai import OpenAICompatible

ASKED = ChatRequest(user("hi"), GenParams())


def test_keys_come_from_the_environment_and_appear_nowhere(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "s3cret-value")
    with serving(lambda body, number: (401, {"error": "wrong key s3cret-value"}, {})) as (url, seen):
        model = OpenAICompatible(url, "m", api_key_env="TEACHER_KEY")
        (result,) = model.generate([ASKED])
        assert seen[0]["key"] == "Bearer s3cret-value"
    assert "s3cret" not in f"{result.error}{model.name}{model.endpoint!r}{vars(model)}" and "***" in result.error
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(RecipeError, match="TEACHER_KEY is not set"):
        OpenAICompatible(model="m", api_key_env="TEACHER_KEY")


def test_the_line_end_of_a_file_is_no_part_of_a_key(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "s3cret-value\r\n")
    with serving(lambda body, number: completion("fine")) as (url, seen):
        (result,) = OpenAICompatible(url, "m", api_key_env="TEACHER_KEY").generate([ASKED])
        assert result.error is None and seen[0]["key"] == "Bearer s3cret-value"


@pytest.mark.parametrize("key", ["s3cret value", "s3cret\nX-Other: 1", "s3crèt", "s3cret☃"])
def test_what_no_header_can_carry_is_no_key(monkeypatch, key):
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(RecipeError, match="TEACHER_KEY holds what no key does") as refused:
        OpenAICompatible(model="m", api_key_env="TEACHER_KEY")
    assert "s3cr" not in str(refused.value)


@pytest.mark.parametrize("variable", ["s3cret-value", "s3cret", "S3CRET.VALUE"])
def test_a_key_in_the_place_of_its_variable_is_not_repeated(variable):
    with pytest.raises(RecipeError, match="that api_key_env names is not set") as refused:
        OpenAICompatible(model="m", api_key_env=variable)
    assert variable not in str(refused.value)
