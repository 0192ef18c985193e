import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.evaluate.chat import ChatRequest, Choice, GenParams, user
from modicum.jobs.chat.cache import Cached, Recorded, end_last_line
from modicum.jobs.chat.local import LocalHF
from modicum.jobs.chat.scripted import Scripted
from support import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def local():
    return LocalHF(tiny_llama(seed=3, initializer_range=0.3).eval(), byte_tokenizer(), name="tiny")


def request(text="hi", prefill=None, **params):
    return ChatRequest(user(text), GenParams(**{"max_tokens": 6, "seed": 1} | params), prefill=prefill)


def test_a_local_model_gives_each_sample_its_own_numbers(local):
    together = local.generate([request("a", n=4), request("b", n=2), request("a", temperature=0.0)])
    assert [len(result.choices) for result in together] == [4, 2, 1]
    assert len({choice.text for choice in together[0].choices}) == 4
    for index in range(4):
        assert local.generate([request("a", n=4).single(index)])[0].choices[0] == together[0].choices[index]
    assert together[2].usage.completion_tokens <= 6 and together[0].usage.prompt_tokens > 0


def test_one_reading_serves_all_samples_of_a_prompt(local, monkeypatch):
    seen, forward = [], local.model.forward
    monkeypatch.setattr(local.model, "forward", lambda **k: (seen.append(tuple(k["input_ids"].shape)), forward(**k))[1])
    local.generate([request("a long question", n=1, max_tokens=2, seed=seed) for seed in range(8)])
    assert seen[0][0] == 1 and seen[0][1] > 10 and all(shape == (8, 1) for shape in seen[1:])


def test_prefills_log_probabilities_and_limits(local):
    (begun,) = local.generate([request(prefill="Sure", temperature=0.0)])
    (plain,) = local.generate([request(temperature=0.0)])
    assert begun.usage.prompt_tokens == plain.usage.prompt_tokens + 4
    (likely,) = local.generate([request(logprobs=3, max_tokens=2)])
    assert 1 <= len(likely.choices[0].logprobs) <= 3 and len(likely.choices[0].logprobs[0]) <= 3
    long, fine = local.generate([request("x" * 300), request("y")])
    assert "exceed" in long.error and not long.choices and fine.choices
    with pytest.raises(UnsupportedError, match="stop"):
        local.generate([request(stop=("x",))])
    with pytest.raises(CheckpointError, match="chat template"):
        LocalHF(local.model, byte_tokenizer(chat=False)).generate([request()])


def counted(name="scripted"):
    return Scripted(
        lambda request, index: Choice(f"{request.messages[-1]['content']} {request.params.seed}", "thought"), name=name
    )


def test_nothing_is_drawn_twice_and_more_samples_go_on_from_fewer(tmp_path):
    inner, path = counted(), tmp_path / "deep" / "cache.jsonl"
    model = Cached(inner, path)
    few = model.generate([request(n=2), request("b")])
    assert inner.calls == 3 and model.generate([request(n=2), request("b")]) == few and inner.calls == 3
    more = Cached(counted(), path).generate([request(n=5)])[0]
    assert more.choices[:2] == few[0].choices and model.missing([request(n=5)]) == 3
    before = path.read_bytes()
    again = Scripted(lambda request: pytest.fail("asked"))
    assert Cached(again, path).generate([request(n=5)])[0] == more and path.read_bytes() == before


@given(cut=st.integers(0, 400))
def test_a_kill_at_any_byte_loses_no_whole_sample(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "cache.jsonl"
    full = Cached(counted(), path).generate([request(n=4)])
    data = path.read_bytes()
    path.write_bytes(data[: min(cut, len(data))])
    whole = data[: min(cut, len(data))].count(b"\n")
    inner = counted()
    # A line whose bytes are all there, but for its end, is a whole sample too.
    ends = min(cut, len(data)) in {i for i, byte in enumerate(data) if byte == 10}
    assert Cached(inner, path).generate([request(n=4)]) == full and inner.calls == 4 - whole - ends
    assert Recorded(path, name="scripted").generate([request(n=4)]) == full
    assert path.read_bytes() == data


def test_a_line_that_was_cut_behind_an_inner_bracket_is_taken_back(tmp_path):
    path, lines = (
        tmp_path / "verdicts.jsonl",
        [b'{"key": "a", "verdict": {"unsafe": true}}\n', b'{"key": "b", "verdict": {}}\n'],
    )
    whole = b"".join(lines)
    for cut in range(1, len(lines[1])):
        path.write_bytes(whole[:-cut])
        end_last_line(path)
        assert path.read_bytes() == (whole if cut == 1 else lines[0])


def test_what_an_answer_depends_on_is_in_its_address(tmp_path):
    base = request()
    others = [
        request("other"), request(temperature=0.5), request(top_p=0.5), request(max_tokens=7), request(seed=2),
        request(stop=("x",)), request(prefill="Sure"), ChatRequest(user("hi", "system"), base.params),
    ]  # fmt: skip
    keys = [r.key("m") for r in [base, *others]] + [base.key("n"), base.key("m", "rev"), base.key("m", index=1)]
    assert len(set(keys)) == len(keys)
    assert base.key("m") == request(n=9).key("m") == ChatRequest(base.messages, base.params, tag="t").key("m")


def test_recordings_replay_and_refuse_what_they_lack(tmp_path):
    path = tmp_path / "cache.jsonl"
    full = Cached(counted(), path).generate([request(n=2)])
    assert Recorded(path, name="scripted").generate([request(n=2)]) == full
    assert Recorded(path).generate([request(n=2)]) == full  # the file names the model
    Cached(counted("another"), tmp_path / "two.jsonl").generate([request(n=1)])
    (tmp_path / "two.jsonl").write_bytes((tmp_path / "two.jsonl").read_bytes() + path.read_bytes())
    with pytest.raises(RecipeError, match="names 2 models"):
        Recorded(tmp_path / "two.jsonl")
    with pytest.raises(RecipeError, match="no sample 2"):
        Recorded(path, name="scripted").generate([request(n=3)])
    with pytest.raises(CheckpointError, match="no recording"):
        Recorded(tmp_path / "none", name="scripted")
    path.write_text(json.dumps({"key": "x", "text": "a", "surprise": 1}) + "\n" + path.read_text())
    with pytest.raises(CheckpointError, match="line 1"):
        Recorded(path, name="scripted")


def test_failures_are_not_stored(tmp_path):
    class Down:
        name, caps, calls = "down", frozenset(), 0

        def generate(self, requests):
            from modicum.evaluate.chat import ChatResult

            self.calls += 1
            return [ChatResult(error="503") for _ in requests]

    inner = Down()
    model = Cached(inner, tmp_path / "cache.jsonl")
    assert [model.generate([request()])[0].error for _ in range(2)] == ["503", "503"] and inner.calls == 2
    assert not (tmp_path / "cache.jsonl").exists()


def test_scripts():
    table = Scripted({"a": "A", "b": ["1", "2"]})
    assert [c.text for c in table.generate([request("b", n=3)])[0].choices] == ["1", "2", "1"]
    with pytest.raises(RecipeError, match="no answer"):
        table.generate([request("c")])
    kept = Scripted(lambda request, own="kept", more="too": own + more)  # defaults are the script's own
    assert kept.generate([request("a", n=2)])[0].choices[1].text == "kepttoo"
    counted = Scripted(lambda request, index, base=5: str(base + index))
    assert [c.text for c in counted.generate([request("a", n=2)])[0].choices] == ["5", "6"]


@pytest.mark.parametrize("knobs", [{"temperature": -1}, {"top_p": 0}, {"n": 0}, {"max_tokens": 0}])
def test_parameters_out_of_range_are_refused(knobs):
    with pytest.raises(RecipeError):
        GenParams(**knobs)
