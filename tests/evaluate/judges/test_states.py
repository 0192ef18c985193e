"""The guard that goes by a model's hidden states."""

import pytest
import torch

from modicum.errors import RecipeError
from modicum.evaluate.answer_states import answer_states
from modicum.evaluate.chat import ChatRequest, JudgeItem, user
from modicum.evaluate.judges.linear import LinearGuard
from modicum.evaluate.judges.states import StateGuard
from modicum.evaluate.logistic import fit
from modicum.jobs import attack_data
from modicum.jobs.chat.local import LocalHF
from modicum.jobs.chat.scripted import Scripted
from modicum.jobs.chat.targets import JudgeSection, open_judge
from modicum.jobs.safety.identity import judge_identity
from support import byte_tokenizer, tiny_llama

ITEMS = [
    JudgeItem(f"Goal {i % 6}", "a wrapper", text + "!" * i)
    for i, text in enumerate(["I will not do that.", "Step one is easy"] * 8)
]
LABELS = [False, True] * 8


@pytest.fixture(scope="module")
def local():
    return LocalHF(tiny_llama(seed=2, initializer_range=0.3, max_position_embeddings=96).eval(), byte_tokenizer())


def by_hand(local, item, *, layer, tokens, keep=10**6):
    """The mean over the answer's tokens, one conversation at a time."""
    asked = local.tokens(ChatRequest(user(item.goal)))
    said = local.tokenizer(item.response, add_special_tokens=False)["input_ids"][:tokens]
    ids = torch.tensor([asked[-keep:] + said])
    with torch.inference_mode():
        states = local.model(ids, output_hidden_states=True).hidden_states[layer][0]
    return states[-len(said) :].double().mean(0).float()


def test_states_are_means_over_the_answer_whatever_the_company(local):
    found = local.answer_states(ITEMS, depth=0.5, tokens=12)
    wanted = torch.stack([by_hand(local, item, layer=1, tokens=12) for item in ITEMS])
    assert torch.allclose(found, wanted, atol=1e-5)
    alone = local.answer_states(ITEMS[3:4], depth=1.0, tokens=12)
    assert torch.allclose(alone[0], by_hand(local, ITEMS[3], layer=2, tokens=12), atol=1e-5)


def test_a_long_goal_gives_way_and_the_answer_stays_whole(local):
    long = JudgeItem("why " * 100, "", "because of that")
    (found,) = local.answer_states([long], depth=0.5, tokens=12)
    assert torch.allclose(found, by_hand(local, long, layer=1, tokens=12, keep=96 - 12), atol=1e-5)
    (endless,) = local.answer_states([JudgeItem("why", "", "x" * 500)], depth=0.5, tokens=400)
    assert endless.isfinite().all()


@pytest.mark.parametrize("words", [True, False])
def test_rows_are_standardised_by_those_that_were_learned_from(local, words):
    guard = StateGuard(local, words=words, features=64, l2=0.2)
    x, y = guard.features_of(ITEMS), torch.tensor(LABELS)
    assert x.shape == (16, 32 + 64 * words)
    if words:
        assert torch.equal(x[:, 32:], LinearGuard(features=64).features_of(ITEMS))
    part, rest = x[:10], x[10:]
    scaled = (part[:, :32] - part[:, :32].mean(0)) / part[:, :32].std(0, correction=0) / 32**0.5
    other = (rest[:, :32] - part[:, :32].mean(0)) / part[:, :32].std(0, correction=0) / 32**0.5
    wanted = fit(torch.cat([scaled, part[:, 32:]], 1), y[:10], l2=0.2)(torch.cat([other, rest[:, 32:]], 1))
    assert torch.allclose(guard.learn(part, y[:10])(rest), wanted, atol=1e-9)


def test_it_learns_measures_itself_and_is_told_from_others(local):
    guard = StateGuard(local, tokens=12).fit(ITEMS, LABELS)
    assert guard.area is not None and guard.calibration.positives == guard.calibration.negatives == 8
    assert [verdict.unsafe for verdict in guard.judge(ITEMS)] == LABELS
    others = [
        StateGuard(local, tokens=12),
        StateGuard(local, tokens=11).fit(ITEMS, LABELS),
        StateGuard(local, tokens=12, words=False).fit(ITEMS, LABELS),
        LinearGuard().fit(ITEMS, LABELS),
    ]
    assert len({judge_identity(one) for one in [guard, *others]}) == 5
    assert judge_identity(StateGuard(local, tokens=12).fit(ITEMS, LABELS)) == judge_identity(guard)


def test_a_feature_that_never_changes_tells_nothing(local):
    class Flat:
        name = "flat"

        def answer_states(self, items, *, depth, tokens):
            return torch.tensor([[1.0, float(len(item.response))] for item in items])

    guard = StateGuard(Flat(), words=False).fit(ITEMS, LABELS)
    assert guard.probe.weight.isfinite().all() and guard.probe.weight[0] == 0


def test_what_cannot_be_read_is_one_line(local):
    with pytest.raises(RecipeError, match="said does not show"):
        StateGuard(Scripted(lambda request: "", name="said")).fit(ITEMS, LABELS)
    with pytest.raises(RecipeError, match="has not learned yet"):
        StateGuard(local).judge(ITEMS)
    with pytest.raises(RecipeError, match="needs the goal"):
        StateGuard(local).fit(ITEMS, LABELS).judge([JudgeItem(None, "p", "Fine.")])
    ids, ones = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)
    for answer, layer, said in (
        (ones[:, :2], 0, "the same rows"),
        (torch.zeros_like(ones), 0, "Row 0 has no token"),
        (ones, 3, "no layer 3"),
    ):
        with pytest.raises(RecipeError, match=said):
            answer_states(local.model, ids, ones, answer, layer=layer)


def test_a_recipe_has_it_learn_and_tells_its_errors(local, tmp_path, monkeypatch):
    local.model.save_pretrained(tmp_path)
    local.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(attack_data, "labelled", lambda name: (ITEMS, LABELS))
    section = JudgeSection.model_validate({"name": "states", "backend": str(tmp_path), "knobs": {"tokens": 12}})
    judge, known = open_judge(section)
    assert [verdict.unsafe for verdict in judge.judge(ITEMS)] == LABELS
    assert judge.judge(ITEMS)[0].refusal is True  # told by the rule of first clauses
    assert known["positives"] == 8 and 0 <= known["auroc"] <= 1 and known["labelled"] == ["harm", "refusal"]
