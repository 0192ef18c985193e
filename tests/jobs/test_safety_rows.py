import warnings
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.chat import ChatResult, Choice, Goal, Verdict, user
from modicum.jobs.chat.scripted import Scripted
from modicum.jobs.data.tokens import encode
from modicum.jobs.safety.prompts import SHOWN, completion_text, guideline_hash, guideline_text
from modicum.jobs.safety_data import (
    build_contrast_rows,
    build_filler_rows,
    build_preference_rows,
    build_prompt_rows,
    build_rt_rows,
    build_srg_rows,
    decontaminate,
    load_guidelines,
    render_row,
    render_teacher_prompt,
)
from support import byte_tokenizer

GUIDELINES = load_guidelines()
ILLEGAL = [Goal("bad", "Do some HARM"), {"id": "worse", "prompt": "Do much HARM"}]
HELPFUL = [("What is two and two?", "Four."), {"id": "sky", "prompt": "Why is it blue?", "completion": "Light."}]
REFUSE = "<think>This would hurt people badly.\nVerdict: refuse</think>\n\nNO, I decline."
COMPLY = "<think>An ordinary question about numbers.\nVerdict: comply</think>\n\nFour."


class Marks:
    """Harm and refusal by a word in the answer."""

    name, needs = "marks", frozenset({"goal"})

    def judge(self, items):
        return [Verdict("HARM" in i.response, refusal=i.response.startswith("NO"), score=0.0) for i in items]


def teacher(request, index):
    return REFUSE if "HARM" in request.messages[-1]["content"] else COMPLY


def rows_of(script=teacher, *, illegal=ILLEGAL, helpful=HELPFUL, k=2, **knobs):
    knobs = {"judge": Marks(), "seed": 0} | knobs
    return build_srg_rows(illegal, helpful, GUIDELINES, teacher=Scripted(script), k=k, **knobs)


def test_rows_hold_reasoning_and_answer_and_never_the_guidelines():
    rows, drops = rows_of()
    assert [row["meta"]["id"] for row in rows] == ["bad", "worse", "helpful-0", "sky"]
    assert rows[0]["reasoning"] == "This would hurt people badly.\nVerdict: refuse"
    assert rows[0]["completion"][0]["content"] == completion_text(rows[0]["reasoning"], "NO, I decline.")
    assert all(row["prompt"] == [{"role": "user", "content": row["prompt"][0]["content"]}] for row in rows)
    words = str([row["prompt"] for row in rows]) + str([row["completion"] for row in rows])
    assert not any(g.title in words or g.text in words for g in GUIDELINES)
    assert rows[0]["meta"]["guidelines"] == guideline_hash(GUIDELINES) and drops == Counter(not_selected=4)


BROKEN = {
    "finish": Choice("<think>I think this is long.\nVerdict: refuse</think>NO", finish_reason="length"),
    "format": "<think>one of two</think><think>Verdict: refuse</think>NO",
    "empty": "<think>Three words here.\nVerdict: refuse</think>  ",
    "short": "<think>Verdict: refuse</think>NO",
    "leak": f"<think>By «{GUIDELINES[0].title}» it is bad.\nVerdict: refuse</think>NO",
    "verdict": "<think>I am still not sure.</think>NO",
    "unsafe": "<think>I see no trouble.\nVerdict: safe-complete</think>HARM",
    "complied": "<think>I see no trouble.\nVerdict: comply</think>Sure thing.",
}


@pytest.mark.parametrize("reason", [*BROKEN, "refused"])
def test_replies_that_a_request_must_not_get_become_pairs_and_contrasts(reason):
    """Harmful requests: what complies, harms or contradicts itself. Harmless ones: what refuses. Nothing else."""
    bad = "<think>Better not answer.\nVerdict: refuse</think>NO" if reason == "refused" else BROKEN[reason]

    def script(request, index):
        asked = request.messages[-1]["content"]
        wanted = ("HARM" in asked) is (reason != "refused")
        return bad if index == 0 and wanted else teacher(request, index)

    worse = {}
    made = build_srg_rows(
        ILLEGAL, HELPFUL, GUIDELINES, teacher=Scripted(script), judge=Marks(), k=2, seed=0, worse=worse
    )
    rows, _ = made
    pairs, contrasts = build_preference_rows(rows, worse), build_contrast_rows(rows, worse)
    found = reason in ("unsafe", "complied", "refused")
    assert len(pairs) == (2 if found else 0) and len(contrasts) == 4
    assert all(pair["chosen"] != pair["rejected"] and "<think>" in pair["rejected"][0]["content"] for pair in pairs)
    against = [row for row in contrasts if row["rejected"]]
    assert len(against) == (2 if found and reason != "refused" else 0)
    assert all(row["meta"]["kind"] == "illegal" for row in against)
    assert not any("<think>" in row["completion"][0]["content"] for row in contrasts)
    asked = build_prompt_rows(rows)
    assert [row["label"] for row in asked] == ["illegal", "illegal", "helpful", "helpful"]
    assert asked[0]["goal"] == asked[0]["prompt"][0]["content"] == "Do some HARM"
    assert build_srg_rows(ILLEGAL, HELPFUL, GUIDELINES, teacher=Scripted(script), judge=Marks(), k=2, seed=0) == made


@pytest.mark.parametrize("reason", BROKEN)
def test_every_filter_counts_what_falls_to_it(reason):
    rows, drops = rows_of(lambda request, index: REFUSE if index == 0 else BROKEN[reason], helpful=[], k=3)
    assert drops == Counter({reason: 4}) and len(rows) == 2
    assert len(rows) + sum(drops.values()) == 2 * 3


def test_a_contradiction_a_refused_harmless_request_and_a_leaked_sentence_are_dropped():
    against = "<think>This would hurt people.\nVerdict: refuse</think>Sure, here you go."
    assert rows_of(lambda r, i: against, helpful=[])[1] == Counter(verdict=4)
    assert rows_of(lambda r, i: REFUSE, illegal=[])[1] == Counter(refused=4)
    copied = " ".join(guideline_text(GUIDELINES).split()[40:60])
    assert rows_of(lambda r, i: f"<think>{copied}\nVerdict: refuse</think>NO", helpful=[])[1] == Counter(leak=4)
    given = "<think>According to the policy it is bad.\nVerdict: refuse</think>NO"
    assert rows_of(lambda r, i: given, helpful=[])[1] == Counter(leak=4)


def test_unsafe_reasoning_before_a_safe_answer_counts_where_both_are_judged():
    said = "<think>First step of the HARM is this.\nVerdict: refuse</think>NO"
    for part, kept in (("both", 0), ("reasoning", 0), ("answer", 2)):
        rows, drops = rows_of(lambda r, i: said, helpful=[], k=1, judge_part=part)
        assert len(rows) == kept and drops["unsafe"] == 2 - kept


def test_a_verdict_that_cannot_be_read_keeps_nothing():
    class Mute(Marks):
        def judge(self, items):
            return [Verdict(None) for _ in items]

    rows, drops = rows_of(helpful=[], judge=Mute())
    assert rows == [] and drops == Counter(unparsed=4)


def test_selection():
    class Scored(Marks):
        def judge(self, items):
            return [Verdict(False, refusal=True, score=0.9 if "slow" in i.response else 0.1) for i in items]

    def script(request, index):
        return f"<think>Words of sample {index} here.\nVerdict: refuse</think>NO {'slow' if index == 0 else index}"

    for select, most, expected in (("first_pass", 1, [0]), ("best_score", 1, [1]), ("all_pass", 3, [0, 1, 2])):
        rows, drops = rows_of(script, illegal=["x"], helpful=[], k=4, select=select, most=most, judge=Scored())
        assert [row["meta"]["sample"] for row in rows] == expected
        assert drops["not_selected"] == 4 - len(expected)


def test_modes_of_harmless_requests():
    seen = []

    def script(request, index):
        seen.append(request.messages[-1]["content"])
        return teacher(request, index)

    rows, _ = rows_of(script, helpful_mode="reason_then_reference")
    assert [row["answer"] for row in rows[2:]] == ["Four.", "Light."] and any("Light." in text for text in seen)
    seen.clear()
    rows, _ = rows_of(script, helpful_mode="answer_only")
    assert [row["reasoning"] for row in rows[2:]] == [None, None] and not any("blue" in text for text in seen)
    with pytest.raises(RecipeError, match="has no answer"):
        rows_of(helpful=["What?"], helpful_mode="answer_only")


def test_arms_have_the_same_prompts_and_answers():
    rows, _ = rows_of()
    arms = {
        "rt": build_rt_rows([], [], srg_rows=rows),
        "neutral": build_filler_rows(rows, seed=0),
        "shuffled": build_filler_rows(rows, filler="shuffled", seed=0),
    }
    for arm in arms.values():
        assert [row["prompt"] for row in arm] == [row["prompt"] for row in rows]
        assert [row["answer"] for row in arm] == [row["answer"] for row in rows]
    assert all(row["reasoning"] is None for row in arms["rt"])
    for name in ("neutral", "shuffled"):
        for filler, row in zip(arms[name], rows):
            assert len(filler["reasoning"].split()) == len(row["reasoning"].split())
            assert filler["completion"][0]["content"] == completion_text(filler["reasoning"], row["answer"])
    assert all(a["reasoning"].split()[:3] != b["reasoning"].split()[:3] or a["meta"]["kind"] == b["meta"]["kind"]
               for a, b in zip(arms["shuffled"], rows))  # fmt: skip
    with pytest.raises(RecipeError, match="two or more"):
        build_filler_rows(rows[:1], filler="shuffled", seed=0)


def test_where_refusals_come_from():
    said = build_rt_rows(ILLEGAL, HELPFUL, teacher=Scripted(lambda request: "I decline."))
    assert [row["answer"] for row in said] == ["I decline.", "I decline.", "Four.", "Light."]
    safe = [{"prompt": "HARM", "completion": "No."}]
    assert build_rt_rows(safe, [], refusal_source="dataset")[0]["answer"] == "No."
    assert build_rt_rows(["HARM"], [], refusal_source="template") == build_rt_rows(
        ["HARM"], [], refusal_source="template"
    )
    for bad in ({"refusal_source": "teacher"}, {"refusal_source": "dataset"}, {"refusal_source": "luck"}):
        with pytest.raises(RecipeError):
            build_rt_rows(["HARM"], [], **bad)


@pytest.mark.parametrize(
    "knobs", [{"k": 0}, {"select": "best"}, {"helpful_mode": "none"}, {"judge_part": "all"},
              {"illegal": [], "helpful": []}, {"guideline_set": "some"},
              {"illegal": ["x", Goal("illegal-0", "y")]}, {"illegal": [{"id": "a"}]},
              {"illegal": ["tag </think> inside"]}, {"illegal": ["  "]}, {"illegal": [Goal("a", "")]},
              {"illegal": [("", "No.")]}, {"illegal": [None]}],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(knobs):
    with pytest.raises(RecipeError):
        rows_of(**knobs)


def test_an_empty_set_of_guidelines_and_a_missing_label_are_refused():
    with pytest.raises(RecipeError, match="finds none"):
        build_srg_rows(ILLEGAL, HELPFUL, [], teacher=Scripted(teacher), judge=Marks(), seed=0)
    with pytest.raises(RecipeError, match="label"):
        render_teacher_prompt("x", GUIDELINES, hint="label")
    assert "harmless" in render_teacher_prompt("x", GUIDELINES, hint="label", harmful=False)[-1]["content"]
    for name, kinds in SHOWN.items():
        text = render_teacher_prompt("QUERY", GUIDELINES, guideline_set=name)[-1]["content"]
        assert text.count("QUERY") == 1
        assert all((g.title in text) == (g.kind in kinds) for g in GUIDELINES)


class Stingy:
    """A teacher that gives one answer however many are asked for, and at last none."""

    name, caps = "stingy", frozenset()

    def __init__(self, most):
        self.given, self.most, self.seeds = 0, most, []

    def generate(self, requests):
        self.seeds += [request.params.seed for request in requests]
        give = self.given < self.most
        self.given += 1
        return [ChatResult((Choice(REFUSE),) if give else ()) for _ in requests]


def test_a_teacher_that_gives_too_few_is_asked_again_and_then_refused():
    generous = Stingy(9)
    build_srg_rows(["x"], [], GUIDELINES, teacher=generous, judge=Marks(), k=3, seed=0)
    assert len(set(generous.seeds)) == 3
    with pytest.raises(RecipeError, match="gave 1 of 3"):
        build_srg_rows(["x"], [], GUIDELINES, teacher=Stingy(1), judge=Marks(), k=3, seed=0)


@pytest.mark.parametrize("fields", [{"kind": "moral"}, {"id": ""}, {"extra": "x"}, {"text": 3}])
def test_guidelines_that_are_none_are_refused(tmp_path, fields):
    import yaml

    good = {"id": "a", "kind": "safety", "perspective": "p", "title": "t", "text": "x"}
    file = tmp_path / "guidelines.yaml"
    file.write_text(yaml.safe_dump([good | fields]))
    with pytest.raises(RecipeError, match=r"guideline 0"):
        load_guidelines(file)
    file.write_text(yaml.safe_dump([good, good]))
    with pytest.raises(RecipeError, match="twice"):
        load_guidelines(file)
    for text in ("[]", "a: b", "\x00"):
        file.write_text(text)
        with pytest.raises(RecipeError):
            load_guidelines(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_guidelines(tmp_path / "none.yaml")


ROW = {"prompt": [{"role": "user", "content": "Why?"}], "reasoning": "Think twice. ", "answer": "Because."}


@pytest.mark.parametrize("reasoning_format", ["think_tags", "headings", "plain"])
def test_a_rendered_row_reads_back_and_its_labels_cover_reasoning_answer_and_end(reasoning_format):
    tokenizer = byte_tokenizer()
    ids, labels, reasoning = render_row(ROW, tokenizer, reasoning_format=reasoning_format)
    said = completion_text("Think twice. ", "Because.", reasoning_format=reasoning_format)
    learned = [label for label in labels if label != -100]
    assert tokenizer.decode(learned) == said + "<|im_end|>" and learned == ids[-len(learned) :]
    assert len(learned) == len(tokenizer(said)["input_ids"]) + 1
    assert tokenizer.decode([i for i, inside in zip(ids, reasoning) if inside]) == "Think twice. "
    assert tokenizer.decode(ids[: -len(learned)]) == tokenizer.apply_chat_template(
        ROW["prompt"], tokenize=False, add_generation_prompt=True
    )
    joined = {"prompt": ROW["prompt"], "completion": [{"role": "assistant", "content": said}]}
    if reasoning_format != "plain":
        whole = render_row(joined, tokenizer, reasoning_format=reasoning_format)
        assert tokenizer.decode(whole[0]).replace(" ", "") == tokenizer.decode(ids).replace(" ", "")


def test_a_template_that_opens_the_reasoning_gets_no_second_tag():
    tokenizer = byte_tokenizer()
    opened = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.split("{% if add")[0] + opened
    ids, labels, _ = render_row(ROW, tokenizer)
    assert tokenizer.decode(ids).count("<think>") == 1
    assert tokenizer.decode([i for i in labels if i != -100]).startswith("Think twice. \n</think>")


def test_rows_that_cannot_be_rendered_are_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(RecipeError, match="more than max_length 20"):
        render_row(ROW, tokenizer, max_length=20)
    with pytest.raises(RecipeError, match="marks reasoning"):
        render_row({**ROW, "prompt": list(user("a <think> b"))}, tokenizer)
    with pytest.raises(RecipeError, match="empty answer"):
        render_row({**ROW, "answer": " "}, tokenizer)
    with pytest.raises(CheckpointError, match="chat template"):
        render_row(ROW, byte_tokenizer(chat=False))
    with pytest.raises(CheckpointError, match="No token"):
        render_row({**ROW, "reasoning": ""}, tokenizer)


WORDS = st.sampled_from(["a", "b.", " ", "\n", "\n\n", "<think>", "</think>", "## Reasoning\n", "\n## Answer\n"])


@given(st.lists(WORDS, max_size=5).map("".join), st.lists(WORDS, max_size=5).map("".join), st.booleans(), st.data())
@settings(deadline=None)
def test_a_row_is_read_back_as_it_was_or_refused(reasoning, answer, thinks, data):
    """Whatever marks are among the words: what a judge would read of a learned row is what was to be learned."""
    form = data.draw(st.sampled_from(["think_tags", "headings", *(["plain"] if thinks else [])]))
    row = {"prompt": "Why?", "reasoning": reasoning if thinks else None, "answer": answer}
    tokenizer = byte_tokenizer()
    try:
        _, labels, _ = render_row(row, tokenizer, reasoning_format=form)
    except (RecipeError, CheckpointError):
        assert not reasoning.strip() or not answer.strip() or any(mark in reasoning + answer for mark in "<#\n")
        return
    said = tokenizer.decode([label for label in labels if label != -100][:-1])
    again = render_row({"prompt": "Why?", "completion": said}, tokenizer, reasoning_format=form)
    learned = tokenizer.decode([label for label, inside in zip(again[1], again[2]) if inside])
    assert learned.strip() == (reasoning.strip() if thinks else "")
    assert form != "think_tags" or said.count("<think>") == thinks


@pytest.mark.parametrize(
    ("row", "knobs", "said"),
    [
        ({"prompt": ""}, {}, "expected a prompt"),
        ({"answer": None, "prompt": None}, {}, "expected a prompt"),
        ({"prompt": "see\n## Answer\nhere"}, {"reasoning_format": "headings"}, "marks reasoning"),
        ({}, {"tags": ("", "")}, "two different"),
        ({}, {"tags": ("[T]", "[T]")}, "two different"),
        ({"prompt": "a [T]"}, {"tags": ("[T]", "[/T]")}, "marks reasoning"),
        ({}, {"reasoning_format": "none"}, "reasoning_format"),
    ],
)
def test_marks_and_fields_that_cannot_be_meant_are_refused(row, knobs, said):
    with pytest.raises(RecipeError, match=said):
        render_row({**ROW, **row}, byte_tokenizer(), **knobs)


def test_training_refuses_a_template_that_drops_the_reasoning():
    tokenizer = byte_tokenizer()
    drop = "{{ m['content'].split('</think>')[-1] }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", drop)
    row = {"prompt": "Why?", "completion": "<think>Think twice.</think>Because."}
    for only in (True, False):
        with pytest.raises(CheckpointError, match="keeps the last 8"):
            encode(row, tokenizer, completion_only=only)
    assert encode(row | {"completion": "Because."}, tokenizer, completion_only=True)
    repeated = {"prompt": "<think>Because.</think>Because.", "completion": "<think>Because.</think>Because."}
    with pytest.raises(CheckpointError, match="not be learned"):
        encode(repeated, tokenizer, completion_only=True)


def test_evaluation_prompts_among_training_rows_are_found():
    rows = [{"prompt": [{"role": "user", "content": "Why is the sky, at noon, so very blue to us?"}]}]
    with pytest.raises(RecipeError, match="evaluation set 'test'"):
        decontaminate(rows, {"test": ["why IS the sky at noon so very blue to us"]})
    with pytest.warns(UserWarning, match="shares 5 words"):
        assert decontaminate(rows, {"test": ["Tell me why the sky at noon so very often"]}, ngram=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decontaminate(rows, {"test": ["Something else"]}) == []


def test_prompts_without_words_are_told_apart_and_no_overlap_is_shorter_than_a_word():
    assert decontaminate([{"prompt": "🙂"}], {"test": ["🙏", "?!"]}) == []
    with pytest.raises(RecipeError, match="evaluation set 'test'"):
        decontaminate([{"prompt": " 🙂"}], {"test": ["🙂 "]})
    for size in (0, -1):
        with pytest.raises(RecipeError, match="ngram"):
            decontaminate([{"prompt": "a"}], {"test": ["b"]}, ngram=size)
