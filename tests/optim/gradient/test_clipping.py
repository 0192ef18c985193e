"""Baselines of AdaGC: each against its oracle, and all of them through the same loop."""

import inspect
import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.optim.gradient import aggc
from modicum.optim.gradient import entries as elementwise
from modicum.optim.gradient import norms as clipping
from modicum.optim.gradient import updates as update_clipping
from modicum.optim.gradient.make import make_clipper
from modicum.optim.gradient.tensor_hook import TensorHook
from modicum.registry import gradient_rule
from oracles import clipping as oracle

KNOBS = {"value": {"limit": 0.01}, "fixed_norm": {"limit": 0.1}, "aggc": {"steps": 30}}
# A rule with a knob that has no default and no value above is trained in tests of its own.
NEEDY = {n for n, e in gradient_rule.items() if any(f.is_required() for f in e.schema.model_fields.values())}
NAMES = [name for name in gradient_rule if name in KNOBS or name not in NEEDY]


def rng(seed=0):
    return np.random.default_rng(seed)


def t64(array):
    return torch.tensor(array, dtype=torch.float64)


def totals(n=200):
    values = rng().lognormal(-1, 0.3, n)
    values[[40, 90, 91, 150]] *= 50
    return values


@pytest.mark.oracle("gradient_rules", "global_norm", "autoclip", "zclip", "skip_step")
@pytest.mark.parametrize(
    ("rule", "slow", "knobs"),
    [
        (clipping.global_norm, oracle.global_norm, {"limit": 0.3}),
        (clipping.autoclip, oracle.autoclip, {"percentile": 30.0}),
        (clipping.zclip, oracle.zclip, {"limit": math.inf}),
        (clipping.zclip, oracle.zclip, {"z": 1.0, "warmup": 1, "decay": 0.8}),
        (clipping.zclip, oracle.zclip, {"limit": 0.3}),
        (clipping.skip_step, oracle.skip_step, {}),
        (clipping.skip_step, oracle.skip_step, {"window": 10, "minimum": 2, "sigma": 1.0}),
    ],
)
def test_rules_of_the_global_norm_equal_their_oracles(rule, slow, knobs):
    state, found = None, []
    for total in totals():
        # Two tensors whose squares add up to the total.
        factors, state = rule(t64([0.6, 0.8]) * total, state, **knobs)
        assert factors[0] == factors[1]
        found.append(factors[0].item())
    np.testing.assert_allclose(found, slow(totals(), **knobs), rtol=1e-9)
    assert min(found) < 1


@pytest.mark.oracle("gradient_rules", "aggc")
@pytest.mark.parametrize("size", [1.0, 3e-3])
def test_aggc_equals_its_oracle(size):
    norms, state, found = size * rng(1).lognormal(0, 0.7, (60, 3)), None, []
    for row in norms:
        factors, state = aggc.aggc_factors(t64(row), state, steps=60)
        found.append(factors.numpy())
    for i in range(3):
        np.testing.assert_allclose(np.stack(found)[:, i], oracle.aggc(norms[:, i], 60), rtol=1e-10)
    assert np.stack(found).max() > 1 > np.stack(found).min()


@pytest.mark.oracle("gradient_rules", "agc", "agc_update")
@pytest.mark.parametrize("shape", [(4, 3), (5,), (1,), (2, 3, 2)])
def test_agc_equals_its_oracle(shape):
    g, w = rng(2).normal(size=shape), rng(3).normal(size=shape)
    factor = oracle.agc_factor(g, w, ratio=0.5)
    np.testing.assert_allclose(elementwise.agc(t64(g), t64(w), ratio=0.5).numpy(), g * factor, rtol=1e-6)
    np.testing.assert_allclose(update_clipping.agc_update(t64(g), t64(w), ratio=0.5).numpy(), factor, rtol=1e-6)


@pytest.mark.oracle("gradient_rules", "value", "fixed_norm")
@pytest.mark.parametrize("limit", [0.1, 1.0, 30.0])
def test_fixed_limits_equal_their_oracles(limit):
    g, norms = rng(10).normal(size=(4, 3)), rng(11).lognormal(size=6)
    found = elementwise.clip_value(t64(g), limit=limit).numpy()
    np.testing.assert_allclose(found, oracle.value(g, limit), rtol=1e-12)
    factors, _ = clipping.fixed_norm(t64([*norms, 0.0, math.inf]), None, limit=limit)
    np.testing.assert_allclose(factors.numpy(), oracle.fixed_norm([*norms, 0.0, math.inf], limit), rtol=1e-12)
    # Beside a norm this small epsilon counts.
    assert clipping.fixed_norm(t64([1e-7]), None, limit=2e-7)[0].item() == pytest.approx(2e-7 / 1.1e-6)


def test_agc_lets_weights_at_zero_move():
    assert elementwise.agc(torch.ones(3, 2), torch.zeros(3, 2)).abs().min() > 0
    assert (elementwise.agc(torch.zeros(3, 2), torch.zeros(3, 2)) == 0).all()


@pytest.mark.oracle("gradient_rules", "spam")
def test_spam_equals_its_oracle_and_rests_after_a_reset():
    g, v = rng(4).normal(size=(6, 5)), rng(5).uniform(0, 1e-4, size=(6, 5))
    v[0, 0] = 0
    np.testing.assert_allclose(elementwise.spam_clip(t64(g), t64(v), 20).numpy(), oracle.spam(g, v), rtol=1e-10)
    assert elementwise.spam_clip(t64(g), t64(v), 19).equal(t64(g))
    assert elementwise.spam_clip(t64(g), None, 50).equal(t64(g))


@pytest.mark.oracle("gradient_rules", "stable_spam")
def test_stable_spam_equals_its_oracle():
    series, state = [rng(i).normal(size=7) * 10 ** (i % 3) for i in range(12)], None
    for g, want in zip(series, oracle.stable_spam(series)):
        got, state = elementwise.stable_spam_clip(torch.tensor(g, dtype=torch.float32), state)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)
    zeros, _ = elementwise.stable_spam_clip(torch.zeros(3), None)
    assert zeros.equal(torch.zeros(3))


@pytest.mark.oracle("gradient_rules", "clippy", "stable_adamw", "adafactor", "trust_ratio")
def test_rules_of_updates_equal_their_oracles():
    u, w, g = rng(6).normal(size=(4, 5)), rng(7).normal(size=(4, 5)), rng(8).normal(size=(4, 5))
    v = rng(9).uniform(1e-3, 1, size=(4, 5))
    factor, state = update_clipping.clippy(t64(u), t64(w), t64(g), None, relative=0.3)
    assert factor.item() == pytest.approx(oracle.clippy(u, w, relative=0.3)) and state is None
    factor, state = update_clipping.clippy(t64(u), t64(w), t64(g), None, accumulator=0.2, initial=0.1)
    assert factor.item() == pytest.approx(oracle.clippy(u, w, 0.1 + g**2, accumulator=0.2))
    assert update_clipping.stable_adamw(t64(g), t64(v)).item() == pytest.approx(oracle.stable_adamw(g, v), rel=1e-5)
    assert update_clipping.adafactor(t64(u), 0.1).item() == pytest.approx(oracle.adafactor(u, 0.1), rel=1e-5)
    assert update_clipping.trust_ratio(t64(u), t64(w), 0.1).item() == pytest.approx(
        oracle.trust_ratio(u, w, 0.1), rel=1e-5
    )


def test_clippy_adds_up_the_squares_of_all_gradients():
    u, w, g = (t64(rng(seed).normal(size=5)) for seed in (1, 2, 3))
    _, state = update_clipping.clippy(u, w, g, None, accumulator=0.2, initial=0.1)
    factor, state = update_clipping.clippy(u, w, 2 * g, state, accumulator=0.2, initial=0.1)
    torch.testing.assert_close(state.squares, 0.1 + 5 * g.square())
    expected = oracle.clippy(u.numpy(), w.numpy(), state.squares.numpy(), accumulator=0.2)
    assert factor.item() == pytest.approx(expected)


def test_rules_of_updates_at_zero():
    zero, one = torch.zeros(3), torch.ones(3)
    assert update_clipping.clippy(zero, zero, zero, None)[0] == 1
    assert update_clipping.clippy(one, zero, zero, None, absolute=0.0)[0] == 0
    assert update_clipping.adafactor(zero, 0.1) == 1 and update_clipping.adafactor(zero, 0.0) == 1
    assert update_clipping.trust_ratio(zero, one, 0.1) == 1 == update_clipping.trust_ratio(one, zero, 0.1)
    assert update_clipping.stable_adamw(one, None) == 1


def model_and_optimizer(seed=0, make=torch.optim.AdamW):
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 5), "b": torch.nn.Linear(5, 2, bias=False)})
    return model, make(model.parameters(), lr=0.01)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 4, generator=g), torch.randn(8, 2, generator=g)
        model["b"](model["a"](x).tanh()).sub(y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_trains_and_resumes_to_the_bit(name):
    knobs = KNOBS.get(name, {}) | ({"period": 6} if name in ("spam", "stable_spam") else {})
    knobs |= {"accumulator": 0.1} if name == "clippy" else {"warmup": 4} if name in ("adagc", "zclip") else {}
    model, optimizer = model_and_optimizer()
    clipper = make_clipper(name, model.named_parameters(), **knobs).attach(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 9)
    assert all(p.isfinite().all() and not p.equal(q) for p, q in zip(model.parameters(), before))
    other, again = model_and_optimizer()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    resumed = make_clipper(name, other.named_parameters(), **knobs).attach(again)
    resumed.load_state_dict(clipper.state_dict())
    train(model, optimizer, 9, start=9)
    train(other, again, 9, start=9)
    assert all(p.equal(q) for p, q in zip(model.parameters(), other.parameters()))


def test_by_value_and_global_norm_equal_torch():
    for name, knobs, theirs in (
        ("value", {"limit": 0.02}, lambda p: torch.nn.utils.clip_grad_value_(p, 0.02)),
        ("global_norm", {"limit": 0.1}, lambda p: torch.nn.utils.clip_grad_norm_(p, 0.1)),
    ):
        ours, optimizer = model_and_optimizer()
        make_clipper(name, ours.parameters(), **knobs).attach(optimizer)
        train(ours, optimizer, 4)
        reference, optimizer = model_and_optimizer()
        optimizer.register_step_pre_hook(
            lambda *_, reference=reference, theirs=theirs: theirs(reference.parameters()) and None
        )
        train(reference, optimizer, 4)
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(ours.parameters(), reference.parameters()))


def test_update_rules_scale_the_whole_step():
    model, optimizer = model_and_optimizer(make=torch.optim.SGD)
    before = [p.detach().clone() for p in model.parameters()]
    make_clipper("adafactor", model.parameters(), limit=1e-3).attach(optimizer)
    train(model, optimizer, 1)
    for p, q in zip(model.parameters(), before):
        assert float((p.detach() - q).square().mean().sqrt()) == pytest.approx(0.01 * 1e-3, rel=1e-2)


def test_spam_forgets_the_moments_and_warms_up_again():
    model, optimizer = model_and_optimizer()
    make_clipper("spam", model.parameters(), period=3, rewarm=2).attach(optimizer)
    weight = model["a"].weight
    train(model, optimizer, 3)
    assert optimizer.state[weight]["step"] == 3
    before = weight.detach().clone()
    train(model, optimizer, 1, start=3)
    assert optimizer.state[weight]["step"] == 1 and optimizer.param_groups[0]["lr"] == 0.01
    # Adam's first step moves every entry by the learning rate, here a hundredth of it, and decays it a little.
    assert float((weight.detach() - before).abs().max()) == pytest.approx(1e-4, rel=0.1)


def test_after_every_reset_the_rate_rises_along_a_cosine():
    model, optimizer = model_and_optimizer()
    make_clipper("spam", model.parameters(), period=5, rewarm=3).attach(optimizer)
    rates = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    train(model, optimizer, 15)
    rise = [1 - 0.99 * (1 + math.cos(math.pi * age / 3)) / 2 for age in range(3)]
    assert rates == pytest.approx([0.01] * 5 + 2 * [0.01 * share for share in [*rise, 1.0, 1.0]])


def test_a_rule_is_given_adams_moments_and_the_rate():
    seen = []

    def spy(update, lr, second_moment, debiased_second_moment):
        seen.append((update.clone(), lr, second_moment.clone(), debiased_second_moment.clone()))
        return torch.tensor(1.0)

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.5, 0.75), weight_decay=0.0)
    TensorHook([weight], spy, acts="after").attach(optimizer)
    gradients = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 0.5, 1.0])]
    moment = torch.zeros(3)
    for step, gradient in enumerate(gradients, start=1):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        moment = 0.75 * moment + 0.25 * gradient.square()
        update, lr, stored, debiased = seen[-1]
        torch.testing.assert_close(update, weight.detach() - before)
        torch.testing.assert_close(stored, moment)
        torch.testing.assert_close(debiased, moment / (1 - 0.75**step))
        assert lr == 0.01


def test_a_rule_that_needs_adams_moment_says_so():
    model, optimizer = model_and_optimizer(make=lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9))
    make_clipper("spam", model.parameters()).attach(optimizer)
    with pytest.raises(UnsupportedError, match=r"second moment, which SGD does not keep. Use AdamW"):
        train(model, optimizer, 2)


@pytest.mark.parametrize("name", ["global_norm", "zclip", "autoclip", "skip_step", "fixed_norm", "aggc", "adagc"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_rules_of_norms_survive_a_gradient_that_is_not_finite(name, bad):
    model, _ = model_and_optimizer()
    clipper = make_clipper(name, model.named_parameters(), **KNOBS.get(name, {}))
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        if step == 2:
            model["a"].weight.grad[0, 0] = bad
        clipper.clip_()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert (model["a"].weight.grad > 0).all()


def test_unknown_rules_and_knobs_are_named():
    with pytest.raises(RecipeError, match="Did you mean 'zclip'"):
        make_clipper("zclib", [torch.zeros(1)])
    with pytest.raises(RecipeError, match="unknown key 'sigma'"):
        make_clipper("zclip", [torch.zeros(1)], sigma=1)
    with pytest.raises(RecipeError, match="'limit' is missing"):
        make_clipper("value", [torch.zeros(1)])


def test_states_of_strangers_are_refused():
    clipper = make_clipper("stable_spam", [("a", torch.nn.Parameter(torch.ones(2)))])
    with pytest.raises(CheckpointError, match="does not know"):
        clipper.load_state_dict({"largest.b": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match="incomplete"):
        clipper.load_state_dict({"largest.a": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match="keeps none"):
        make_clipper("global_norm", [torch.zeros(1)]).load_state_dict({"step": torch.tensor(1)})


@pytest.mark.parametrize("name", ["global_norm", "autoclip", "zclip", "skip_step", "aggc"])
def test_defaults_are_those_of_the_oracle(name):
    slow = inspect.signature(getattr(oracle, name)).parameters
    fields = gradient_rule[name].schema.model_fields
    assert {n: p.default for n, p in slow.items() if p.default is not p.empty} == {
        n: fields[n].default for n in slow if n in fields and not fields[n].is_required()
    }


def test_what_is_not_finite_does_not_count_for_the_others():
    factors, _ = clipping.global_norm(t64([3.0, 4.0, math.inf, math.nan]), None)
    np.testing.assert_allclose(factors.numpy(), [0.2, 0.2, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("percentile", [-0.1, 100.1])
def test_percentiles_end_at_0_and_100(percentile):
    with pytest.raises(RecipeError, match="percentile"):
        make_clipper("autoclip", [torch.zeros(1)], percentile=percentile)
