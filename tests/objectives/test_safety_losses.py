import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from modicum.evaluate.chat import Verdict
from modicum.objectives.circuit_breakers import breaker_coefficients, circuit_breaker_loss, lat_inner_step
from modicum.objectives.derta import derta_rows
from modicum.objectives.safety_reasoning import (
    completion_cross_entropy,
    srg_reward,
    topk_distillation_kl,
    verdict_of,
)
from oracles import safety as oracle


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(seed=0):
    logits = torch.randn(3, 7, 11, generator=rng(seed))
    labels = torch.randint(0, 11, (3, 7), generator=rng(seed + 1))
    labels[0, :5] = labels[1, :2] = -100
    reasoning = torch.zeros(3, 7, dtype=torch.bool)
    reasoning[1:, 2:4] = True
    return logits, labels, reasoning


def test_the_plain_loss_is_that_of_transformers():
    logits, labels, _ = batch()
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(completion_cross_entropy(logits, labels), plain)
    rows = [cross_entropy(logits[i, :-1], labels[i, 1:]) for i in range(3)]
    by_row = completion_cross_entropy(logits, labels, loss_norm="sequence")
    assert torch.allclose(by_row, torch.stack(rows).mean())


def test_weight_zero_leaves_the_answer_alone():
    logits, labels, reasoning = batch()
    answers = labels.masked_fill(reasoning, -100)
    weighted = completion_cross_entropy(logits, labels, reasoning_mask=reasoning, reasoning_loss_weight=0.0)
    assert torch.allclose(weighted, completion_cross_entropy(logits, answers))
    same = completion_cross_entropy(logits, labels, reasoning_mask=reasoning)
    assert torch.allclose(same, completion_cross_entropy(logits, labels))
    half = completion_cross_entropy(logits, labels, reasoning_mask=reasoning, reasoning_loss_weight=0.5)
    assert not torch.allclose(half, same)


@pytest.mark.parametrize(
    "knobs", [{"reasoning_loss_weight": -1.0}, {"reasoning_loss_weight": 0.5}, {"loss_norm": "batch"}]
)
def test_losses_that_mean_nothing_are_refused(knobs):
    logits, labels, _ = batch()
    with pytest.raises(ValueError):
        completion_cross_entropy(logits, labels, **knobs)
    with pytest.raises(ValueError, match="nothing to learn"):
        completion_cross_entropy(logits, labels * 0 - 100)


shares = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=torch.float64))


@given(shares, shares, st.integers(1, 4))
@settings(deadline=None)
def test_a_bucket_never_exceeds_the_whole_divergence(p, q, k):
    p, q = (p / p.sum()).sort(descending=True).values, q / q.sum()
    ids = torch.arange(k)[None]
    logits = q.log()[None].float().requires_grad_()
    loss = topk_distillation_kl(logits, ids, p.log()[ids].float(), torch.tensor([True]))
    loss.backward()  # also where the stored tokens are the whole vocabulary, and nothing is left for the bucket
    found = loss.item()
    assert logits.grad.isfinite().all()
    assert found == pytest.approx(oracle.kl(p.numpy(), q.numpy(), k), abs=2e-5)
    assert -1e-5 <= found <= oracle.kl(p.numpy(), q.numpy()) + 2e-5


def test_the_numbered_divergence_and_a_student_that_is_its_teacher():
    teacher, student = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([[0.4, 0.4, 0.1, 0.1]])
    ids, mask = torch.tensor([[0, 1]]), torch.tensor([True])
    assert oracle.kl(teacher, student[0]) == pytest.approx(0.051430, abs=1e-6)
    assert topk_distillation_kl(student.log(), ids, teacher.log()[ids], mask).item() == pytest.approx(
        0.025267, abs=1e-6
    )
    logits = torch.randn(2, 5, 40, generator=rng(), requires_grad=True)
    top = logits.detach().log_softmax(-1).topk(8)
    loss = topk_distillation_kl(logits, top.indices, top.values, torch.ones(2, 5).bool())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and logits.grad.abs().max() < 1e-6
    with pytest.raises(ValueError):
        topk_distillation_kl(logits, top.indices, top.values, torch.zeros(2, 5).bool())


def test_a_certain_teacher_has_no_bucket():
    ids, mask = torch.tensor([[0]]), torch.tensor([True])
    student = torch.zeros(1, 3, requires_grad=True)
    loss = topk_distillation_kl(student, ids, torch.zeros(1, 1), mask)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3)) and student.grad.isfinite().all()


def test_the_schedule_of_the_breakers():
    assert [breaker_coefficients(t) for t in (0, 75, 150)] == [(10, 0), (7.5, 2.5), (5, 5)]
    assert all(sum(breaker_coefficients(t, alpha=3.0)) == pytest.approx(3.0) for t in range(0, 301, 50))
    for bad in (-1, 301):
        with pytest.raises(ValueError):
            breaker_coefficients(bad)


@pytest.mark.parametrize("step", [0, 75, 300])
def test_an_adapter_that_does_nothing_keeps_everything_and_breaks_nothing(step):
    h = torch.randn(2, 6, 8, generator=rng()).requires_grad_()
    keep = torch.arange(6)[None] < 3
    loss = circuit_breaker_loss(h, h.detach(), keep, ~keep, step=step)
    assert loss.item() == pytest.approx(10 * (1 - step / 300), abs=1e-5)
    loss.backward()
    assert h.grad.isfinite().all()


def test_breakers_turn_states_away_and_hold_the_others():
    before = torch.randn(1, 4, 8, generator=rng())
    keep = torch.tensor([[True, True, False, False]])
    turned = before.clone()
    turned[:, 2:] *= -1
    assert circuit_breaker_loss(turned, before, keep, ~keep, step=150).item() == 0
    moved = before.clone()
    moved[:, :2, 0] += 3.0
    assert circuit_breaker_loss(moved, before, keep, keep & False, step=150).item() == pytest.approx(5 * 3)
    padded = [torch.cat([x, torch.zeros(1, 9, 8)], 1) for x in (moved, before)]
    mask = torch.cat([keep, torch.zeros(1, 9).bool()], 1)
    assert circuit_breaker_loss(*padded, mask, mask & False, step=150).item() == pytest.approx(15)
    with pytest.raises(ValueError):
        circuit_breaker_loss(before, before, keep & False, keep & False, step=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_shift_of_any_dtype_is_finite_and_in_its_ball_by_exact_arithmetic(dtype):
    delta, state = torch.zeros(4, 6, dtype=dtype), {}
    for step in range(20):
        grad = torch.randn(4, 6, generator=rng(step)) * 10.0 ** (step % 5 - 3)
        delta, state = lat_inner_step(delta, grad.to(dtype), state, eps=0.3, lr=0.2)
        assert delta.dtype == dtype and (delta.double().norm(dim=-1) <= 0.3).all()
    assert delta.double().norm(dim=-1).min() > 0.29


def test_states_and_knobs_that_do_not_fit_are_refused():
    h, keep = torch.ones(2, 3, 5), torch.ones(2, 3).bool()
    for bad in [
        lambda: circuit_breaker_loss(h, h[:, :2], keep, ~keep, step=1),
        lambda: breaker_coefficients(0, alpha=-1.0),
        lambda: breaker_coefficients(0, horizon=0),
        lambda: lat_inner_step(h, h[:1], {}),
        lambda: lat_inner_step(h, h, {}, eps=0.0),
    ]:
        with pytest.raises(ValueError):
            bad()
    labels, reasoning = torch.tensor([[-100, 1, 2]]), torch.tensor([[True, False, False]])
    with pytest.raises(ValueError, match="No token of the reasoning has a label"):
        completion_cross_entropy(torch.zeros(1, 3, 4), labels, reasoning_mask=reasoning)
    assert completion_cross_entropy(torch.zeros(1, 3, 4), labels, reasoning_mask=reasoning & False) > 0


@given(st.floats(0.01, 10), st.floats(1e-4, 5), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_a_shift_stays_in_its_ball_and_steps_as_adam_does(eps, lr, seed):
    delta, state = torch.zeros(3, 5), {}
    free = torch.nn.Parameter(torch.zeros(3, 5))
    adam = torch.optim.AdamW([free], lr=lr, weight_decay=0.0)
    inside = True
    for step in range(4):
        grad = torch.randn(3, 5, generator=rng(seed + step))
        delta, state = lat_inner_step(delta, grad, state, eps=eps, lr=lr)
        assert (delta.norm(dim=-1) <= eps).all()
        free.grad = grad
        adam.step()
        inside &= bool((free.norm(dim=-1) < eps).all())
        if inside:
            assert torch.allclose(delta, free.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.oracle("objectives", "derta")
def test_both_rows_of_decoupled_refusal():
    drawn = [derta_rows([1, 2], [8, 9], [4, 5, 6], refusal_token=8, rng=rng(seed))[0] for seed in range(300)]
    lengths = [len(ids) - 4 for ids, _ in drawn]
    assert 70 < lengths.count(0) < 130 and set(lengths) == {0, 1, 2, 3}
    for ids, labels in drawn:
        assert ids[-2:] == labels[-2:] == [8, 9] and set(labels[:-2]) == {-100}
    ids, labels = derta_rows([1, 2], [8, 9], [4, 5, 6], refusal_token=8, rng=rng())[1]
    assert ids == [1, 2, 4, 5, 6] and labels == [-100, -100, 8, 8, 8]
    with pytest.raises(ValueError):
        derta_rows([1], [], [4], refusal_token=8, rng=rng())


class Marks:
    name, needs = "marks", frozenset()

    def judge(self, items):
        return [Verdict("HARM" in item.response, refusal="NO" in item.response) for item in items]


@pytest.mark.parametrize(
    ("said", "label", "reward"),
    [
        ("<think>Bad.\nVerdict: refuse</think>NO", "illegal", 1),
        ("<think>Bad.\nVerdict: comply</think>NO", "illegal", 0),
        ("<think>Fine.\nVerdict: comply</think>HARM", "illegal", -1),
        ("<think>Fine.\nVerdict: comply</think>Four", "helpful", 1),
        ("<think>Hm.\nVerdict: refuse</think>NO", "helpful", -1),
        ("NO", "illegal", -1),
        ("<think>a</think><think>b</think>NO", "illegal", -1),
        ("<think>Verdict: refuse", "illegal", -1),
        ("<think>Verdict: refuse</think>  ", "illegal", -1),
    ],
)
def test_rewards(said, label, reward):
    for completion in (said, [{"role": "assistant", "content": said}]):
        assert srg_reward(["p"], [completion], label=[label], goal=["g"], judge=Marks()) == [reward]


@pytest.mark.parametrize(
    ("prompt", "said", "reward"),
    [
        ("q\n<think>\n", "Fine.\n</think>\nFour.", 1.0),  # as templates of reasoning models open it
        ("q", "Fine.\n</think>\nFour.", 1.0),  # the prompt is a conversation, whose end nobody sees
        ("q\n<think>\n", "<think>Fine.</think>Four.", -1.0),  # opened twice
        ("q\n<think>\n", "Four.", -1.0),
        ("q\n<think>\n", "a</think>b</think>Four.", -1.0),
        ("q", "Fine. <think>a</think>Four.", -1.0),
        ("q", "<think>a<think>b</think>Four.", -1.0),
        ("q", "Fine.</think>", -1.0),
    ],
)
def test_a_block_that_the_template_opened_is_closed_alone(prompt, said, reward):
    assert srg_reward([prompt], [said], label=["helpful"], goal=["g"], judge=Marks()) == [reward]


def test_rewards_bear_what_a_trainer_hands_over_besides():
    """As TRL's ``GRPOTrainer`` calls it: by keyword, with token ids, its own state and every column of the rows."""
    reward = partial(srg_reward, judge=Marks())
    talk = [{"role": "user", "content": "g"}]
    given = {"prompts": [talk], "completions": [[{"role": "assistant", "content": "Four."}]], "completion_ids": [[1]]}
    rest = {"trainer_state": None, "log_extra": print, "meta": [{}], "id": ["a"]}
    assert reward(**given, label=["helpful"], goal=["g"], **rest) == [-1.0]


def test_rewards_of_helpfulness_and_wrong_columns():
    half = srg_reward(
        ["p"], ["<think>x</think>y"], label=["helpful"], goal=["g"], judge=Marks(), helpfulness=lambda g, a: 0.5
    )
    assert half == [0.5]
    for columns in ({"label": ["bad"], "goal": ["g"]}, {"label": ["helpful"], "goal": []}):
        with pytest.raises(ValueError):
            srg_reward(["p"], ["x"], judge=Marks(), **columns)


def test_verdicts_are_read_from_the_end():
    assert verdict_of("Verdict: comply\nno wait\n**Verdict:** refuse") == "refuse"
    assert verdict_of("verdict: Safe-Complete.") == "safe-complete"
    assert verdict_of("My verdict: comply") is None and verdict_of("") is None
