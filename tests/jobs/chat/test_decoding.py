"""Less and more thinking, guards, and vLLM as far as a stand-in can show it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from modicum.errors import RecipeError, UnsupportedError
from modicum.evaluate.chat import ChatRequest, ChatResult, Choice, GenParams, Verdict, user
from modicum.jobs.chat import Guarded, LessThink, MoreThink, Scripted, VLLMOffline, ZeroThink
from modicum.jobs.chat.decoding import AGAIN, SHORT
from modicum.jobs.chat.targets import Target
from support import byte_tokenizer

ASK = ChatRequest(user("hi"), GenParams(n=2, seed=3))


def test_less_thinking_is_put_into_the_answer():
    seen = []
    inner = Scripted(lambda request: seen.append(request.prefill) or "Four.")
    assert [len(result.choices) for result in ZeroThink(inner).generate([ASK])] == [2]
    LessThink(inner).generate([ASK])
    assert seen[0] == "<think>\n\n</think>\n\n" and seen[-1] == f"<think>\n{SHORT}\n</think>\n\n"
    assert ZeroThink(inner).name == "scripted+zero_think"


def test_more_thinking_goes_on_from_what_was_thought():
    asked = []

    def think(request, index):
        asked.append(request.prefill)
        if request.prefill is None:
            return Choice(f"draft {request.params.seed}", f"first {request.params.seed}")
        return "second</think>\n\nfinal"

    (result,) = MoreThink(Scripted(think), times=2).generate([ASK])
    assert [choice.text for choice in result.choices] == ["final", "final"]
    assert result.choices[1].reasoning == f"first 4\n{AGAIN}\nsecond\n{AGAIN}\nsecond"
    assert asked[2] == f"<think>\nfirst 3\n{AGAIN}" and len(asked) == 6
    (cut,) = MoreThink(Scripted(lambda r: Choice("x", "y") if r.prefill is None else "never closed")).generate([ASK])
    assert cut.choices[0].incomplete() and cut.choices[0].reasoning.endswith("never closed")
    (plain,) = MoreThink(Scripted(lambda request: "no thought")).generate([ASK])
    assert [choice.text for choice in plain.choices] == ["no thought"] * 2


def test_models_that_cannot_be_begun_for_are_refused():
    deaf = Scripted(lambda request: "x", caps=("n",))
    for kind in (ZeroThink, LessThink, MoreThink):
        with pytest.raises(RecipeError, match="begun for it"):
            kind(deaf)
    with pytest.raises(RecipeError, match="times"):
        MoreThink(Scripted(lambda request: "x"), times=0)
    with pytest.raises(ValueError, match="thinking"):
        Target(model="m", thinking="none")


class Guard:
    name, needs = "guard", frozenset()

    def judge(self, items):
        return [Verdict({"bad": True, "odd": None}.get(item.response.split()[0], False)) for item in items]


@pytest.mark.parametrize(
    ("where", "expected"),
    [("front", ["no", "bad answer", "fine"]), ("behind", ["fine", "no", "fine"]), ("both", ["no", "no", "fine"])],
)
def test_a_guard_stands_before_or_behind(where, expected):
    answers = {"bad request": "fine", "good request": "bad answer", "odd request": "fine"}
    model = Guarded(Scripted(answers), Guard(), where=where)
    results = model.generate([ChatRequest(user(text)) for text in answers])
    said = ["no" if r.choices[0].text.startswith("I can't") else r.choices[0].text for r in results]
    assert said == expected and model.name == f"scripted+guard_{where}"
    with pytest.raises(RecipeError, match="where"):
        Guarded(model, Guard(), where="above")


def test_failures_pass_through():
    class Down:
        name, caps = "down", frozenset({"prefill"})

        def generate(self, requests):
            return [ChatResult(error="lost") for _ in requests]

    for model in (ZeroThink(Down()), MoreThink(Down()), Guarded(Down(), Guard())):
        (result,) = model.generate([ASK])
        assert result.error == "lost" and not result.choices


def test_vllm_gets_tokens_and_seeds_and_gives_reasoning_apart(monkeypatch):
    calls = []

    class Engine:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=200))

        def __init__(self, **options):
            calls.append(options)

        def get_tokenizer(self):
            return byte_tokenizer()

        def generate(self, prompts, params, use_tqdm):
            calls.append([(len(p["prompt_token_ids"]), q["seed"]) for p, q in zip(prompts, params, strict=True)])
            said = SimpleNamespace(text="<think>a</think>b", finish_reason="stop", token_ids=[1, 2, 3], logprobs=None)
            return [SimpleNamespace(outputs=[said]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UnsupportedError, match="pip install vllm"):
        VLLMOffline("folder")
    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = Engine, dict
    monkeypatch.setitem(sys.modules, "vllm", fake)
    model = VLLMOffline("folder", {"seed": 1})
    long = ChatRequest(user("x" * 400), GenParams(max_tokens=10))
    fits = ChatRequest(user("hi"), GenParams(n=2, seed=7, max_tokens=10))
    good, bad = model.generate([fits, long])
    assert [(c.reasoning, c.text) for c in good.choices] == [("a", "b")] * 2 and good.usage.completion_tokens == 6
    assert "exceed 200" in bad.error and [seed for _, seed in calls[1]] == [7, 8]
    assert calls[0] == {"model": "folder", "enable_prefix_caching": True, "seed": 1}
    assert model.name == "folder@vllm" and "sampling" in model.caps
