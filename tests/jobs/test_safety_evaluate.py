"""Measuring a chat model of one's own, without a recipe."""

import json

import pytest

from modicum.errors import RecipeError
from modicum.evaluate.chat import AttackedPrompt, Choice, Goal, Verdict, user
from modicum.jobs.chat.scripted import Scripted
from modicum.safety import evaluate
from modicum.safety.data import load_guidelines
from modicum.safety.losses import render_row
from modicum.safety.representation import proxy_a_distance

GOALS = [Goal(f"g{i}", f"Harm number {i}") for i in range(4)]
BENIGN = [Goal(f"b{i}", f"Kind number {i}", harmful=False) for i in range(4)]


class Marks:
    name, needs = "marks", frozenset()

    def judge(self, items):
        return [Verdict(i.response.startswith("bad"), refusal=i.response.startswith("no")) for i in items]


def answer(request, index):
    """Refuse even numbers; answer odd ones badly the first time, and with gibberish the second."""
    number = (
        int(request.messages[-1]["content"].rpartition(" ")[2]) if request.messages[-1]["content"][-1].isdigit() else 0
    )
    return Choice("no" if number % 2 == 0 else "bad" if not request.params.seed or request.params.seed % 2 else "??")


def test_cells_have_success_beside_refusals_and_what_was_sampled(tmp_path):
    found = evaluate(
        Scripted(answer),
        ["plain", "flip"],
        judge=Marks(),
        samples=8,
        seed=3,
        goals=GOALS,
        benign=BENIGN,
        folder=tmp_path,
    )
    plain, flip = found["cells"]
    assert plain["greedy"]["value"] == 0.5 and plain["over_refusal"]["value"] == 0.5 and plain["prompts"] == 4
    assert flip["suite"] == "flip" and found["summary"]["families"] == 1 and "asr_any" not in plain
    curve = [estimate["value"] for estimate in plain["asr_all"]]
    assert plain["ns"] == [1, 2, 4, 8] and curve == sorted(curve, reverse=True)
    assert found["sampling"]["seed"] == 3 and found["sampling"]["max_new_tokens"] == 4096
    lines = (tmp_path / "verdicts.jsonl").read_text()
    assert "bad" not in [json.loads(line).get("text") for line in lines.splitlines()] and "Harm" not in lines
    mute = Scripted(lambda request: pytest.fail("drawn twice"))
    again = evaluate(
        mute, ["plain", "flip"], judge=Marks(), samples=8, seed=3, goals=GOALS, benign=BENIGN, folder=tmp_path
    )
    assert again == found


def test_wrapped_pairs_and_the_attackers_curve_and_refusals_that_count():
    def wrapped(goals):
        return [AttackedPrompt(goal, user(goal.text), "mine") for goal in goals]

    pair = {"mine": (wrapped(GOALS), wrapped(BENIGN))}
    full = evaluate(Scripted(answer), pair, judge=Marks(), samples=4, seed=0, early_stop=False)["cells"][0]
    assert full["asr_any"][-1]["value"] >= full["asr_all"][-1]["value"] and full["draws"] == 4
    strict = evaluate(Scripted(answer), pair, judge=Marks(), samples=4, seed=0, count="refusal")["cells"][0]
    # Gibberish saves nobody there: odd prompts are never refused, so all of their samples are drawn.
    assert [estimate["value"] for estimate in strict["asr_all"]] == [0.5] * 3 and strict["never_safe"] == 0.5


@pytest.mark.parametrize(
    ("suites", "knobs", "said"),
    [
        ([], {}, "no suite"),
        (["nothing"], {}, "no attack"),
        ({"mine": {"attack": "plain", "cuont": 3}}, {}, "cuont"),
        (["plain"], {"samples": 0}, "samples"),
        (["plain"], {"temperature": -1}, "temperature"),
        (["persuasion"], {}, "attacker"),
    ],
)
def test_what_cannot_be_measured_is_refused(suites, knobs, said):
    knobs = {"samples": 2, "seed": 0, "goals": GOALS, "benign": BENIGN} | knobs
    with pytest.raises(RecipeError, match=said):
        evaluate(Scripted(answer), suites, judge=Marks(), **knobs)


def test_a_target_that_does_not_sample_is_measured_greedily_alone():
    deaf = Scripted(answer, caps=("n",))
    with pytest.raises(RecipeError, match="same answer"):
        evaluate(deaf, ["plain"], judge=Marks(), samples=2, seed=0, goals=GOALS, benign=BENIGN)
    assert evaluate(deaf, ["plain"], judge=Marks(), samples=1, seed=0, goals=GOALS, benign=BENIGN)["cells"]


def test_one_place_offers_all_names():
    assert callable(render_row) and callable(proxy_a_distance) and load_guidelines()
