"""What jobs of safety refuse: the check says it first, and a run that is refused leaves nothing behind."""

import json
import re

import pytest
from pydantic import ValidationError

from modicum.errors import ModicumError, RecipeError
from modicum.evaluate.chat import Goal, Verdict
from modicum.jobs import execute, plan
from modicum.jobs.chat.local import LocalHF
from modicum.jobs.chat.scripted import Scripted
from modicum.recipe import parse
from modicum.safety import evaluate
from support import byte_tokenizer, tiny_llama

ONE = "- {id: a, kind: safety, perspective: others, title: Harm, text: Decline it.}\n"
FILES = {
    "none.yaml": "[]",
    "nameless.yaml": "- {kind: safety, perspective: others, title: Harm, text: Decline it.}\n",
    "safety.yaml": ONE,
    "twice.yaml": ONE + ONE,
    "tags.jsonl": '{"prompt": "say <think> now"}\n',
    "empty.jsonl": '{"prompt": "a wish"}\n{"prompt": "  "}\n',
    "signs.jsonl": '{"prompt": "你好吗"}\n',
    "numbers.jsonl": '{"prompt": "one wish", "completion": "Here."}\n{"prompt": "another", "completion": 3}\n',
    "alone.jsonl": '{"prompt": "an ordinary wish"}\n',
    "other.jsonl": '{"x": "a wish"}\n',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny_llama(max_position_embeddings=4096).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    tiny_llama().save_pretrained(folder / "base")
    byte_tokenizer(chat=False).save_pretrained(folder / "base")
    for kind in ("harmful", "harmless"):
        rows = [{"prompt": f"A {kind} wish, number {i}", "completion": "Here."} for i in range(4)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def filled(value, place):
    """Put the folder in the place of an @."""
    if isinstance(value, dict):
        return {key: filled(inner, place) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, place) for inner in value]
    return value.replace("@", str(place)) if isinstance(value, str) else value


ATTACK = {
    "job": "attack", "targets": {"a": "@/model"}, "goals": {"path": "@/harmful.jsonl"}, "samples": 1,
    "benign": {"path": "@/harmless.jsonl"}, "judge": {"name": "jbb", "backend": "@/model"}, "max_new_tokens": 2,
}  # fmt: skip
SYNTHESIZE = {
    "job": "synthesize", "teacher": "@/model", "illegal": {"path": "@/harmful.jsonl"}, "k": 1, "max_tokens": 2,
    "helpful": {"path": "@/harmless.jsonl"}, "judge": {"name": "jbb", "backend": "@/model"},
}  # fmt: skip
REPRESENT = {
    "job": "represent", "targets": {"a": "@/model"}, "goals": {"path": "@/harmful.jsonl"}, "folds": 2,
    "benign": {"path": "@/harmless.jsonl"},
}  # fmt: skip
AWAY = {"endpoint": "http://example.com/v1", "name": "m"}
HERE = {"endpoint": "http://127.0.0.1:9/v1", "name": "m"}
TARGETS = [  # what no target, teacher, attacker or model of a judge may be
    ("@/nowhere", "no model folder"),
    ("@/base", "chat template"),
    ({"model": "@/model", "dtype": "float13"}, "dtype"),
    ({"model": "@/model", "dtype": "int8"}, "dtype"),
    ({"model": "@/model", "device": "cuda:77"}, "device"),
    ({"model": "@/model", "device": "nothing"}, "device"),
    ({"model": "@/model", "guidelines": "@/none.yaml"}, "one guideline or more"),
    ({"model": "@/model", "guidelines": "@/nowhere.yaml"}, "cannot be read|No such file|nowhere"),
    (AWAY, "allow_remote|is an endpoint"),
    (HERE | {"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set|is an endpoint"),
    (HERE | {"endpoint": "127.0.0.1:9/v1"}, "no address|is an endpoint"),
    (HERE | {"endpoint": "http://127.0.0.1:99999/v1"}, "no address|is an endpoint"),
    (HERE | {"thinking": "more"}, "endpoint cannot"),
]
PLACES = {
    "target": lambda t: ATTACK | {"targets": {"a": t}},
    "attacker": lambda t: ATTACK | {"attacker": t, "suites": {"p": "persuasion"}},
    "judge": lambda t: ATTACK | {"judge": {"name": "jbb", "backend": t}},
    "teacher": lambda t: SYNTHESIZE | {"teacher": t},
    "judge of rows": lambda t: SYNTHESIZE | {"judge": {"name": "jbb", "backend": t}},
    "inside": lambda t: REPRESENT | {"targets": {"a": t}},
}
OTHERS = [
    (ATTACK | {"suites": {"s": {"attack": {"name": "template", "template": "no slot"}}}}, "0 slots"),
    (ATTACK | {"suites": {"s": {"attack": {"name": "template", "template": "{{ prompt }}{{ prompt }}"}}}}, "2 slots"),
    (REPRESENT | {"suites": {"s": {"attack": {"name": "template", "template": "no slot"}}}}, "0 slots"),
    (ATTACK | {"suites": {"s": {"attack": "template", "family": "nothing"}}}, "packaged data"),
    (ATTACK | {"suites": {"s": {"attack": "flip", "family": "jailbreakchat"}}}, "leave out family"),
    (ATTACK | {"suites": {"s": {"attack": "template", "count": 5000}}}, "count is 5000"),
    (ATTACK | {"suites": {"s": {"attack": {"name": "payload_split", "pieces": 26}}}}, "less than or equal to 25"),
    (ATTACK | {"suites": {"s": "morse"}, "goals": {"path": "@/signs.jsonl"}}, "words none of"),
    (ATTACK | {"judge": {"name": "strongreject", "backend": "@/model", "knobs": {"cutoff": 50}}}, "less than or equal"),
    (SYNTHESIZE | {"helpful": {"path": "@/numbers.jsonl"}}, "row 1: field 'completion'"),
    (ATTACK | {"benign": {"path": "@/harmful.jsonl"}}, "harmless, and harmful as"),
    (REPRESENT | {"benign": {"path": "@/harmful.jsonl"}}, "harmless, and harmful as"),
    (SYNTHESIZE | {"helpful": {"path": "@/harmful.jsonl"}}, "the id|harmless, and harmful as"),
    (ATTACK | {"goals": {"path": "@/empty.jsonl"}}, "row 1: the prompt is empty"),
    (SYNTHESIZE | {"illegal": {"path": "@/empty.jsonl"}}, "row 1: the prompt is empty"),
    (ATTACK | {"goals": {"path": "@/other.jsonl"}}, "'prompt' is missing"),
    (SYNTHESIZE | {"illegal": {"path": "@/tags.jsonl"}}, "marks reasoning"),
    (SYNTHESIZE | {"helpful": {"path": "@/alone.jsonl"}, "helpful_mode": "answer_only"}, "has no answer"),
    (SYNTHESIZE | {"helpful": {"path": "@/alone.jsonl"}, "helpful_mode": "reason_then_reference"}, "has no answer"),
    (SYNTHESIZE | {"guidelines": "@/none.yaml"}, "one guideline or more"),
    (SYNTHESIZE | {"guidelines": "@/nameless.yaml"}, "expected id, kind"),
    (SYNTHESIZE | {"guidelines": "@/twice.yaml"}, "stands twice"),
    (SYNTHESIZE | {"guidelines": "@/safety.yaml", "guideline_set": "reasoning_only"}, "finds none"),
    (SYNTHESIZE | {"evaluation": [{"path": "@/harmful.jsonl"}]}, "one of the evaluation set"),
    (ATTACK | {"trained_on": {"path": "@/harmful.jsonl"}}, "training data"),
    (ATTACK | {"judge": {"name": "jbb", "backend": "@/model", "knobs": {"template": "no slot"}}}, "no slot"),
    (ATTACK | {"judge": {"name": "jbb", "backend": "@/model", "knobs": {"tempalte": "x"}}}, "unknown key"),
    (ATTACK | {"judge": {"name": "linear", "knobs": {"featurs": 3}}}, "unknown key"),
    (ATTACK | {"judge": {"name": "linear", "backend": "@/model"}}, "asks no model"),
    (ATTACK | {"judge": "states"}, "name it as `backend`"),
    (ATTACK | {"judge": {"name": "states", "backend": HERE}}, "no endpoint shows"),
    (ATTACK | {"judge": {"name": "states", "backend": {"model": "@/model", "thinking": "zero"}}}, "write nothing"),
    (ATTACK | {"judge": {"name": "states", "backend": "@/model", "calibrate": 4}}, "measures itself"),
    (ATTACK | {"judge": {"name": "states", "backend": "@/base"}}, "chat template"),
    (ATTACK | {"judge": {"name": "decision", "backend": "@/model"}}, "give its `backend` an `endpoint`"),
    (SYNTHESIZE | {"judge": {"name": "decision", "backend": "@/model"}}, "give its `backend` an `endpoint`"),
    (SYNTHESIZE | {"steer": True, "teacher": HERE}, "steer: false"),
]
CASES = [(make(bad), said) for make in PLACES.values() for bad, said in TARGETS] + OTHERS


@pytest.mark.parametrize(("recipe", "said"), CASES)
def test_the_check_says_what_a_run_would_and_nothing_is_written(recipe, said, place, tmp_path):
    for attempt in (plan, lambda recipe: execute(recipe, tmp_path / "run", quiet=True)):
        with pytest.raises((ModicumError, ValidationError)) as error:
            attempt(parse(filled(recipe, place)))
        assert re.search(said, str(error.value)) and "\n" not in str(error.value), str(error.value)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


class Letters:
    """A judge of letters."""

    name, needs = "letters", frozenset()

    def judge(self, items):
        return [Verdict(sum(map(ord, item.response)) % 2 == 0, refusal=False) for item in items]


GOALS = [Goal(f"g{i}", f"wish {i}") for i in range(8)]
BENIGN = [Goal(f"b{i}", f"ordinary wish {i}", harmful=False) for i in range(8)]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"samples": 0}, "samples"),
        ({"samples": 2.5}, "samples"),
        ({"samples": 2, "temperature": 0}, "temperature"),
        ({"goals": []}, "goals"),
        ({"benign": []}, "benign"),
        ({"goals": BENIGN}, "goals"),
        ({"benign": GOALS}, "benign"),
        ({"max_new_tokens": 0}, "max_tokens"),
    ],
)
def test_a_measurement_that_cannot_be_meant_is_refused(knobs, said):
    target = Scripted(lambda request: pytest.fail("it was asked"))
    with pytest.raises(ModicumError, match=said):
        evaluate(target, ["plain"], judge=Letters(), seed=0, **{"goals": GOALS, "benign": BENIGN, "samples": 1} | knobs)


def test_models_of_one_name_do_not_share_the_verdicts_in_a_folder(tmp_path):
    def measured(seed, folder):
        model = LocalHF(tiny_llama(seed=seed, initializer_range=0.3).eval(), byte_tokenizer())
        asked = {"goals": GOALS, "benign": BENIGN, "samples": 1, "max_new_tokens": 4}
        found = evaluate(model, ["plain"], judge=Letters(), seed=0, folder=folder, **asked)
        return found["cells"][0]["greedy"]["value"]

    alone = [measured(seed, None) for seed in (3, 4, 5)]
    assert len(set(alone)) > 1 and [measured(seed, tmp_path) for seed in (3, 4, 5)] == alone
    lines = len((tmp_path / "verdicts.jsonl").read_text().splitlines())
    assert [measured(seed, tmp_path) for seed in (3, 4, 5)] == alone
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == lines


def test_requests_with_the_same_words_are_one_request():
    from modicum.jobs.safety.suites import refuse_both, refuse_shared

    one, twin, other = Goal("a", "Say it, loud!"), Goal("b", "say IT  loud"), Goal("c", "say it softly")
    refuse_shared([one], [other])
    refuse_both([one], [other])
    with pytest.raises(RecipeError, match="b of the evaluation is goal a of the training data"):
        refuse_shared([other, one], [Goal("d", "another"), twin])
    with pytest.raises(RecipeError, match="b is harmless, and harmful as a"):
        refuse_both([one, other], [twin])
