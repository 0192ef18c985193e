"""All arms learn the same rows, told apart by the reasoning alone; and what teachers must not repeat."""

from __future__ import annotations

import json
import warnings

import pyarrow.parquet
import pytest

from modicum.errors import RecipeError
from modicum.evaluate.chat import Goal, Verdict
from modicum.jobs import execute
from modicum.jobs.chat.scripted import Scripted
from modicum.jobs.data.tokens import encode
from modicum.jobs.safety.leaks import shared_span, spans_of
from modicum.jobs.safety.prompts import Guideline
from modicum.jobs.safety_data import build_rt_rows, build_srg_rows, render_row
from modicum.jobs.training.reasoning import refuse_guidelines
from modicum.recipe import parse
from support import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_start|>"], ids=["that of texts", "another"])
def test_an_answer_without_reasoning_is_learned_as_refusal_training_learns_it(end):
    """The arm that reasons ends its answers as the template does, and not with a token of its own."""
    tokenizer = byte_tokenizer()
    assert "<|im_end|>" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", end)
    ids, labels = encode({"prompt": "Why?", "completion": "Because."}, tokenizer, completion_only=True)
    learned = [label for label in labels if label != -100]
    row = {"prompt": "Why?", "reasoning": None, "answer": "Because."}
    rendered, answers, _ = render_row(row, tokenizer)
    assert [label for label in answers if label != -100] == learned and rendered == ids[: len(rendered)]
    reasoned = render_row({**row, "reasoning": "Let me see."}, tokenizer)
    start = len(rendered) - len(learned)
    assert reasoned[0][:start] == rendered[:start] and reasoned[0][-len(learned) :] == learned


def test_an_answer_that_no_template_ends_learns_to_stop():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    ids, labels, _ = render_row({"prompt": "Why?", "reasoning": "I see.", "answer": "Because."}, tokenizer)
    assert ids[-1] == labels[-1] == tokenizer.eos_token_id


SAID = "<think>\n{}\nVerdict: {}\n</think>\n\n{}"


class Marks:
    name, needs = "marks", frozenset()

    def judge(self, items):
        return [Verdict(False, refusal=item.response.startswith("NO")) for item in items]


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A teacher that reasons long about some requests, and a judge by words."""
    folder = tmp_path / "model"
    tiny_llama(max_position_embeddings=4096).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for name in ("harmful", "harmless"):
        rows = [{"prompt": f"A {name} wish, number {i}", "completion": "Here it is."} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def say(request):
        harmful, number = "harmful" in request.tag, int(request.tag[-1])
        thought = "It asks for a thing of number " + "and so on " * (20 if number % 3 == 0 else 1) + request.tag
        return SAID.format(thought, "refuse" if harmful else "comply", "NO, I decline." if harmful else "Here it is.")

    monkeypatch.setattr("modicum.jobs.chat.targets.open_target", lambda *a, **k: Scripted(say))
    monkeypatch.setattr("modicum.jobs.chat.targets.open_judge", lambda section: (Marks(), {}))
    return tmp_path


def synthesize(parts, **more):
    data = {
        "job": "synthesize", "teacher": str(parts / "model"), "illegal": str(parts / "harmful.jsonl"), "k": 1,
        "helpful": str(parts / "harmless.jsonl"), "arms": ["srg", "rt", "filler_neutral", "filler_shuffled"],
    }  # fmt: skip
    return parse(data | more)


def tables(run, recipe):
    return {arm: pyarrow.parquet.read_table(run.folder / f"rows/{arm}.parquet").to_pylist() for arm in recipe.arms}


def test_a_row_that_is_too_long_in_one_arm_is_in_none(parts, tmp_path):
    recipe = synthesize(parts, max_length=230)
    run = execute(recipe, tmp_path / "run", quiet=True)
    found, made = run.record["metrics"]["synthesis"], tables(run, recipe)
    assert found["dropped"] == {"long": 4} and found["kept"] == {"illegal": 4, "helpful": 4}
    assert len({json.dumps([row["id"] for row in rows]) for rows in made.values()}) == 1
    tokenizer = byte_tokenizer()
    for rows in zip(*made.values(), strict=True):
        rendered = [render_row(row, tokenizer, max_length=230) for row in rows]
        learned = [[label for label in labels if label != -100] for _, labels, _ in rendered]
        prompts = [ids[: len(ids) - len(own)] for (ids, _, _), own in zip(rendered, learned, strict=True)]
        assert all(prompt == prompts[0] for prompt in prompts)
        answer = learned[recipe.arms.index("rt")]
        assert all(own[-len(answer) :] == answer for own in learned)
        # Refusal training is tokenised by another part of the library, to the same ids.
        plain = encode(
            {"prompt": rows[1]["prompt"], "completion": rows[1]["completion"]}, tokenizer, completion_only=True
        )
        assert [label for label in plain[1] if label != -100] == answer and plain[0][: len(prompts[0])] == prompts[0]


def test_filler_that_is_longer_than_its_reasoning_takes_the_row_from_all_arms(parts, tmp_path, monkeypatch):
    """As many words may be more tokens: who has the shortest words gets the longest filler."""
    full = synthesize(parts, arms=["srg", "filler_neutral"])
    made = tables(execute(full, tmp_path / "full", quiet=True), full)
    tokenizer = byte_tokenizer()
    sizes = {arm: [len(render_row(row, tokenizer)[0]) for row in rows] for arm, rows in made.items()}
    limit = max(sizes["srg"])
    assert max(sizes["filler_neutral"]) > limit
    recipe = synthesize(parts, arms=["srg", "filler_neutral"], max_length=limit)
    run = execute(recipe, tmp_path / "run", quiet=True)
    kept = sum(size <= limit for size in sizes["filler_neutral"])
    assert [len(rows) for rows in tables(run, recipe).values()] == [kept, kept]
    assert run.record["metrics"]["synthesis"]["dropped"]["long"] == 12 - kept


def test_an_arm_without_harmful_rows_is_the_rest_of_refusal_training(parts, tmp_path):
    recipe = synthesize(parts, arms=["rt", "helpful"])
    made = tables(execute(recipe, tmp_path / "run", quiet=True), recipe)
    rest = [row["prompt"] for row in made["rt"] if row["kind"] == "helpful"]
    assert [row["prompt"] for row in made["helpful"]] == rest and len(rest) == 6


@pytest.mark.parametrize("source", ["teacher", "template"])
def test_refusal_training_may_decline_in_words_of_its_own(parts, tmp_path, source):
    recipe = synthesize(parts, final_answer="own", refusal_source=source, arms=["srg", "rt"])
    made = tables(execute(recipe, tmp_path / "run", quiet=True), recipe)
    assert [row["prompt"] for row in made["rt"]] == [row["prompt"] for row in made["srg"]]
    for own, reasoned in zip(made["rt"], made["srg"], strict=True):
        same = own["completion"] == reasoned["answer"]
        assert same is (own["kind"] == "helpful" or source == "teacher")  # this teacher says the same again


def test_generated_counts_replies_and_no_rows_that_nobody_drew(parts, tmp_path):
    recipe = synthesize(parts, helpful_mode="answer_only", arms=["srg", "rt"])
    found = execute(recipe, tmp_path / "run", quiet=True).record["metrics"]["synthesis"]
    assert found["generated"] == 6 and found["kept"] == {"illegal": 6, "helpful": 0} and found["given"] == 6


def test_shared_words_with_an_evaluation_are_noted_in_the_record(parts, tmp_path):
    words = "A harmful wish, number 3"
    tests = tmp_path / "tests.jsonl"
    tests.write_text(json.dumps({"prompt": " ".join(f"w{i}" for i in range(9)) + f" and {words} w10 w11"}) + "\n")
    rows = [json.loads(line) for line in (parts / "harmful.jsonl").read_text().splitlines()]
    rows[3]["prompt"] = " ".join(f"w{i}" for i in range(9)) + f" and {words}"
    (parts / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = synthesize(parts, evaluation=[str(tests)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = execute(recipe, tmp_path / "run", quiet=True)
    assert any("shares 12 words in a row with evaluation set" in note for note in run.record["notes"])


SHORT = Guideline("pii", "safety", "others", "Harm", "Never tell anybody where people live.")
LONG = Guideline("no_harm", "reasoning", "others", "Second thoughts", " ".join(f"word{i}" for i in range(20)))


@pytest.mark.parametrize(
    ("thought", "leaks"),
    [
        ("I must never tell anybody where people live, so", True),
        ("One must not tell where people live, so", False),
        ("It would do harm, real harm, so", False),
        ("The guideline «Harm» says no, so", True),
        ("My second thoughts are these, and so", True),
        ("As no_harm guideline says, so", True),
        ("By guideline pii it is bad, so", True),
        (" ".join(f"word{i}" for i in range(3, 15)), True),
        (" ".join(f"word{i}" for i in range(3, 14)), False),
    ],
)
def test_what_counts_as_a_leak_of_guidelines(thought, leaks):
    said = SAID.format(thought, "refuse", "NO, I decline.")
    rows, drops = build_srg_rows(
        [Goal("bad", "Do a thing")],
        [],
        [SHORT, LONG],
        teacher=Scripted(lambda request: said),
        judge=Marks(),
        k=1,
        seed=0,
    )
    assert bool(drops["leak"]) is leaks and len(rows) == (0 if leaks else 1)


def test_training_refuses_rows_with_a_guideline_shorter_than_twelve_words():
    spans = spans_of([SHORT])
    assert shared_span("So, never tell anybody where people live!", spans)
    with pytest.raises(RecipeError, match="row 0 holds 6 words of the guidelines"):
        refuse_guidelines("never tell anybody where people live", spans, "row 0")
    assert spans_of([Guideline("a", "safety", "others", "Harm", "Decline it.")]) == set()  # ordinary speech


def test_refusal_training_takes_answers_of_the_same_rows():
    say = Scripted(lambda request: SAID.format("It is bad, I think", "refuse", "NO, I decline."))
    rows, _ = build_srg_rows([Goal("bad", "Do it")], [], [SHORT], teacher=say, judge=Marks(), k=1, seed=0)
    assert build_rt_rows([], [], srg_rows=rows)[0]["completion"][0]["content"] == rows[0]["answer"]
