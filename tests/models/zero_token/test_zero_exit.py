from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.zero_token.support_zero import decode, left_padded, looped, tokens
from modicum.errors import ModicumError, UnsupportedError
from modicum.models import exit_decision
from modicum.models.zero_token.exit import entropy_change, latent_change, layer_score, prediction_change, spread
from oracles import zero_token as oracle

SCOPES = ("sequence", "token", "last_token", "prefix", "batch")
POLICIES = ("latest", "propagate", "share_first", "select")


def run(model, input_ids, **knobs):
    with torch.no_grad():
        return model(input_ids, use_cache=False, **knobs)


def middling(model, input_ids, scope="token"):
    """A threshold that some tokens exceed after the first cycle and some do not, halfway between two scores."""
    p0 = run(model, input_ids, output_zero_attention=True).zero_attention
    score = spread(layer_score([p0[1, 0], p0[2, 0]]), scope=scope).flatten().sort().values
    return (score[len(score) // 2 - 1] + score[len(score) // 2]).item() / 2


def test_scores_reduce_layers_and_scopes_reduce_tokens():
    p0s = [torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]), torch.tensor([[[0.5, 0.6], [0.7, 0.8]]])]
    expected = {"cycle_mean": [0.4, 0.5], "cycle_max": [0.6, 0.7], "first_layer": [0.2, 0.3], "last_layer": [0.6, 0.7]}
    for score, values in expected.items():
        torch.testing.assert_close(layer_score(p0s, score=score), torch.tensor([values]))
    score = torch.tensor([[0.0, 1.0, 2.0], [3.0, 5.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = {
        "token": score,
        "sequence": torch.tensor([[1.0] * 3, [4.0] * 3]),
        "last_token": torch.tensor([[2.0] * 3, [5.0] * 3]),
        "prefix": torch.tensor([[0.0, 0.5, 1.0], [3.0, 4.0, 4.0]]),
        "batch": torch.full((2, 3), 11 / 5),
    }
    for scope, values in expected.items():
        torch.testing.assert_close(spread(score, scope=scope, mask=mask), values)
    with pytest.raises(ModicumError):
        spread(score, scope="all")
    with pytest.raises(ModicumError):
        layer_score(p0s, score="median")


@given(st.floats(-0.5, 1.5), st.floats(-0.5, 1.5), st.sampled_from(SCOPES), st.integers(0, 1000))
def test_a_higher_threshold_lets_nobody_leave_who_stayed(a, b, scope, seed):
    p0 = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    low, high = (exit_decision([p0], threshold=t, scope=scope) for t in sorted((a, b)))
    assert (high | ~low).all()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", ["cycle_mean", "first_layer", "last_layer", "cycle_max", "layer"])
def test_thresholds_out_of_reach_never_exit_and_negative_ones_always(scope, score):
    model = looped(exit_scope=scope, exit_score=score, min_cycles=2)
    fixed = run(model, tokens())
    never = run(model, tokens(), exit_threshold=1.0)
    assert torch.equal(never.logits, fixed.logits)
    assert never.layer_calls == 8
    if score != "layer":
        always = run(model, tokens(), exit_threshold=-1.0)
        assert (always.cycles == 2).all()
        assert always.layer_calls == 6
        torch.testing.assert_close(always.logits, run(model, tokens(), n_cycles=2).logits)


@pytest.mark.parametrize("min_cycles", [1, 2])
def test_decisions_begin_when_the_cycles_that_always_run_are_done(min_cycles):
    """A score of a cycle decides after each but the last; one of a layer after each of the two in later cycles."""
    for score, decisions in (("cycle_mean", 3 - min_cycles), ("layer", 2 * (3 - min_cycles))):
        model = looped(exit_score=score, min_cycles=min_cycles)
        assert len(run(model, tokens(), exit_threshold=1.0).exit_scores) == decisions


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_leaving_after_c_cycles_equals_running_c_cycles(policy, cycles):
    model = looped(cache_policy=policy)
    imposed = run(model, tokens(), n_cycles=torch.full((2,), cycles))
    torch.testing.assert_close(imposed.logits, run(model, tokens(), n_cycles=cycles).logits)
    assert (imposed.cycles == cycles).all()
    assert imposed.layer_calls == (8 if policy == "select" else 2 + 2 * cycles)


@pytest.mark.parametrize("scope", ["sequence", "token", "last_token", "prefix"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("criterion", ["zero_attention", "latent", "entropy", "kl", "random"])
def test_a_sequence_exits_the_same_alone_and_in_a_batch(scope, policy, criterion):
    model = looped(exit_scope=scope, cache_policy=policy, exit_criterion=criterion)
    ids = tokens(3)
    threshold = (
        middling(looped(), ids) if criterion == "zero_attention" else {"latent": 0.7, "random": 0.5}.get(criterion, 0.3)
    )
    together = run(model, ids, exit_threshold=threshold)
    for i in range(3):
        alone = run(model, ids[i : i + 1], exit_threshold=threshold)
        assert torch.equal(alone.cycles[0], together.cycles[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scope", ["sequence", "token", "prefix", "last_token"])
@pytest.mark.parametrize("policy", POLICIES)
def test_padding_takes_no_part_in_the_decision(scope, policy):
    model = looped(exit_scope=scope, cache_policy=policy)
    threshold = middling(model, tokens())
    plain = run(model, tokens(), exit_threshold=threshold)
    with torch.no_grad():
        padded = model(**left_padded(tokens(), 3), exit_threshold=threshold)
    assert torch.equal(padded.cycles[:, 3:], plain.cycles)
    torch.testing.assert_close(padded.logits[:, 3:], plain.logits, atol=1e-4, rtol=0)


def placed(input_ids, left, right, empty):
    """Put each sequence between padding, and rows of nothing but padding below; return inputs and where tokens are."""
    b, t = input_ids.shape
    mask = torch.zeros(b + empty, left + t + right, dtype=torch.long)
    ids = torch.full_like(mask, 5)
    ids[:b, left : left + t], mask[:b, left : left + t] = input_ids, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, mask.bool()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("criterion", ["zero_attention", "latent", "entropy", "kl", "random"])
@given(left=st.integers(0, 3), right=st.integers(0, 3), empty=st.integers(0, 2), share=st.sampled_from([0.2, 0.5, 0.8]))
@settings(max_examples=4)
def test_padding_and_padded_rows_neither_vote_nor_hold_up_nor_run(scope, criterion, left, right, empty, share):
    model = LOOPED[scope, criterion]
    seen = run(model, tokens(), exit_threshold={"zero_attention": 1.0}.get(criterion, 0.0)).exit_scores
    scores = torch.cat([score.flatten() for score in seen])
    scores = scores[scores.isfinite()].sort().values
    cut = int(share * (len(scores) - 1))
    # Halfway between two scores, so that rounding decides nothing.
    gap = next((i for i in range(cut, len(scores) - 1) if scores[i + 1] - scores[i] > 1e-4), None)
    threshold = 0.5 if gap is None else (scores[gap] + scores[gap + 1]).item() / 2
    threshold = {"zero_attention": threshold, "random": 1 - threshold}.get(criterion, -threshold)
    plain = run(model, tokens(), exit_threshold=threshold)
    inputs, real = placed(tokens(), left, right, empty)
    with torch.no_grad():
        padded = model(**inputs, exit_threshold=threshold, use_cache=False)
    assert torch.equal(padded.cycles[real].view_as(plain.cycles), plain.cycles)
    torch.testing.assert_close(padded.logits[real].view_as(plain.logits), plain.logits, atol=1e-4, rtol=0)
    # Padding leaves at the first decision: it is counted with one cycle, and the last real token ends the loop.
    assert (padded.cycles[~real] == 1).all() and padded.layer_calls == plain.layer_calls
    if scope == "token":
        assert all(score[~real].isnan().all() for score in padded.exit_scores)


LOOPED = {
    (scope, criterion): looped(exit_scope=scope, exit_criterion=criterion)
    for scope in SCOPES
    for criterion in ("zero_attention", "latent", "entropy", "kl", "random")
}


@pytest.mark.parametrize("scope", ["token", "prefix"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefill", [0, 3])
@pytest.mark.parametrize("score", ["cycle_mean", "layer"])
def test_decoding_with_exits_equals_a_full_pass_with_exits(scope, policy, prefill, score):
    model = looped(exit_scope=scope, cache_policy=policy, exit_score=score)
    threshold = middling(looped(), tokens(), scope)
    expected = run(model, tokens(), exit_threshold=threshold)
    assert expected.cycles.unique().numel() > 1
    logits, cycles, _ = decode(model, tokens(), prefill=prefill, exit_threshold=threshold)
    assert torch.equal(cycles, expected.cycles)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scope", ["token", "prefix"])
def test_padding_is_known_while_decoding(scope, policy):
    model = looped(exit_scope=scope, cache_policy=policy)
    threshold = middling(looped(), tokens(), scope)
    inputs = left_padded(tokens(), 3)
    with torch.no_grad():
        expected = model(**inputs, exit_threshold=threshold, use_cache=False)
        cache, cycles, logits = None, [], []
        for start, stop in pairwise([0, 5, 6, 7, 8, 9, 10]):
            positions = inputs["position_ids"][:, start:stop]
            out = model(
                inputs["input_ids"][:, start:stop],
                attention_mask=inputs["attention_mask"][:, :stop],
                position_ids=positions,
                cache=cache,
                use_cache=True,
                exit_threshold=threshold,
            )
            cache = out.cache
            cycles.append(out.cycles)
            logits.append(out.logits)
    assert expected.cycles[:, 5:].unique().numel() > 1
    assert torch.equal(torch.cat(cycles, 1)[:, 3:], expected.cycles[:, 3:])
    torch.testing.assert_close(torch.cat(logits, 1)[:, 3:], expected.logits[:, 3:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("criterion", ["latent", "random"])
def test_other_criteria_decode_like_a_full_pass(criterion):
    model = looped(exit_scope="token", exit_criterion=criterion)
    threshold = {"latent": 0.7, "random": 0.5}.get(criterion, 0.3)
    expected = run(model, tokens(), exit_threshold=threshold)
    assert expected.cycles.unique().numel() > 1
    logits, cycles, _ = decode(model, tokens(), exit_threshold=threshold)
    assert torch.equal(cycles, expected.cycles)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)


def test_exits_equal_the_slow_reference():
    model = looped(exit_scope="token").double()
    ids = tokens(1, 9)
    threshold = middling(model, ids)
    out = run(model, ids, exit_threshold=threshold)
    config = model.config
    slow = oracle.Llama(
        {n: t.numpy() for n, t in model.state_dict().items()}, n_layers=4, heads=4, groups=2, eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"], n_cycles=3,
    )  # fmt: skip
    steps = [slow.step(token, i, threshold=threshold) for i, token in enumerate(ids[0].tolist())]
    assert [ran for _, ran in steps] == out.cycles[0].tolist()
    np.testing.assert_allclose(out.logits[0].numpy(), np.stack([logits for logits, _ in steps]), atol=1e-5)


def test_imposed_depths_equal_the_slow_reference_with_and_without_cache():
    model = looped().double()
    depths = [3, 1, 2, 3, 1, 1, 3]
    slow = oracle.Llama(
        {n: t.numpy() for n, t in model.state_dict().items()}, n_layers=4, heads=4, groups=2,
        eps=model.config.rms_norm_eps, theta=model.config.rope_parameters["rope_theta"], n_cycles=3,
    )  # fmt: skip
    expected = np.stack([slow.step(t, i, cycles=depths[i])[0] for i, t in enumerate(tokens(1)[0].tolist())])
    out = run(model, tokens(1), n_cycles=torch.tensor([depths]))
    np.testing.assert_allclose(out.logits[0].numpy(), expected, atol=1e-5)
    cache, logits = None, []
    with torch.no_grad():
        for i, depth in enumerate(depths):
            step = model(tokens(1)[:, i : i + 1], cache=cache, n_cycles=torch.tensor([[depth]]))
            cache = step.cache
            logits.append(step.logits[0, 0])
    np.testing.assert_allclose(torch.stack(logits).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("scope", ["token", "prefix"])
def test_token_scopes_are_causal_and_the_sequence_scope_is_not(scope):
    model = looped(exit_scope=scope)
    changed = tokens().clone()
    changed[:, 5] = (changed[:, 5] + 7) % 30 + 3
    threshold = middling(model, tokens())
    a, b = (run(model, ids, exit_threshold=threshold) for ids in (tokens(), changed))
    assert torch.equal(a.cycles[:, :5], b.cycles[:, :5])
    # Tokens that left are packed, so the products have other numbers of rows, and on some processors other last bits.
    torch.testing.assert_close(a.logits[:, :5], b.logits[:, :5], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["token", "prefix"])
def test_texts_of_a_packed_row_leave_as_they_do_alone(scope):
    model, ids = looped(exit_scope=scope), tokens(1, 13)
    pieces, places = ids.split([6, 7], 1), torch.cat([torch.arange(6), torch.arange(7)])[None]
    for shift in (0.8, 1.0, 1.2):
        knobs = {"exit_threshold": middling(model, ids, scope) * shift}
        packed, alone = run(model, ids, position_ids=places, **knobs), [run(model, x, **knobs) for x in pieces]
        assert torch.equal(packed.cycles, torch.cat([x.cycles for x in alone], 1)), shift
        torch.testing.assert_close(packed.logits, torch.cat([x.logits for x in alone], 1), rtol=0, atol=1e-4)


def test_reported_cycles_add_up_to_the_layer_calls():
    model = looped(exit_scope="sequence")
    calls = []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    threshold = middling(model, tokens(1))
    for shift in (0.9, 1.0, 1.1):
        calls.clear()
        out = run(model, tokens(1), exit_threshold=threshold * shift)
        assert len(calls) == out.layer_calls == 2 + 2 * int(out.cycles[0, 0])


def test_generation_with_exits_is_the_same_with_and_without_cache():
    model = looped(exit_scope="token", exit_threshold=middling(looped(), tokens()))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens(), **settings), model.generate(tokens(), use_cache=False, **settings))


def test_training_with_imposed_depths_has_gradients():
    model = looped().train()
    model(tokens(), labels=tokens(), n_cycles=torch.tensor([1, 3])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_changes_between_cycles():
    before, after = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
    assert latent_change(before, after).item() == 1
    assert latent_change(after, after).item() == 0
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    kl = (p * (p / q).log()).sum()
    torch.testing.assert_close(prediction_change(p.log()[None, None], q.log()[None, None])[0, 0], kl)
    entropy = [-(x * x.log()).sum() for x in (p, q)]
    torch.testing.assert_close(entropy_change(p.log()[None, None], q.log()[None, None])[0, 0], entropy[0] - entropy[1])


def test_exits_without_zero_tokens_or_slots_are_refused():
    with pytest.raises(UnsupportedError, match="zero_token"):
        looped(zero_token=False)(tokens(), exit_threshold=0.1)
    with pytest.raises(UnsupportedError, match="prefix"):
        looped("mistral", exit_scope="prefix")(tokens(), exit_threshold=0.1)
    with pytest.raises(UnsupportedError, match="equally deep"):
        looped(order="sequence")(tokens(), n_cycles=torch.tensor([1, 2]))


def test_a_score_at_the_threshold_stays():
    model = looped(exit_scope="token", min_cycles=2)  # one decision
    (scores,) = run(model, tokens(), exit_threshold=1.0).exit_scores
    assert (run(model, tokens(), exit_threshold=scores.max().item()).cycles == 3).all()


def test_each_cycle_has_a_gate_of_its_own():
    model = looped(cycle_gate="rezero")
    model.zero_token.cycle_gate.data = torch.tensor([1.0, 0.0])
    two, three = (run(model, tokens(), n_cycles=cycles).logits for cycles in (2, 3))
    one = run(model, tokens(), n_cycles=1).logits
    torch.testing.assert_close(two, three)
    assert not torch.allclose(one, two, atol=1e-2)
