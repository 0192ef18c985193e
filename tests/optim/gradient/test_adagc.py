import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_gradients import INITS, draw, feed, params_with
from modicum.optim import AdaGC
from modicum.optim.gradient.adagc import AdaGCState, adagc_factors
from oracles import adagc as oracle


def started(gamma=1.0, n=1):
    return AdaGCState(gamma=torch.full((n,), gamma, dtype=torch.float64), step=100)


# The exact cases


def test_the_published_example_after_the_warmup():
    state = started()
    expected = [(10.0, 0.104, 1.0004), (0.5, 1.0, 0.995396), (2.0, 0.51760592, 0.9957941584)]
    for norm, factor, gamma in expected:
        factors, state = adagc_factors(torch.tensor([norm], dtype=torch.float64), state, eps=0)
        assert factors.item() == pytest.approx(factor, rel=1e-12)
        assert state.gamma.item() == pytest.approx(gamma, rel=1e-12)


def test_the_published_example_of_the_warmup():
    params = params_with([3.0, 0.0], [0.0, 4.0])
    clipper = AdaGC(params, init="min", eps=0)
    clipper.clip_()
    assert torch.allclose(params[0].grad, torch.tensor([0.6, 0.0])) and torch.allclose(
        params[1].grad, torch.tensor([0.0, 0.8])
    )
    assert torch.allclose(clipper.state.gamma, torch.tensor([0.6, 0.8]))
    feed(params, [0.3, 0.0], [0.4, 0.0])
    clipper.clip_()
    assert params[0].grad[0] == 0.3 * torch.ones(()) and torch.allclose(clipper.state.gamma, torch.tensor([0.3, 0.4]))


def test_the_warmup_can_observe_raw_norms():
    params = params_with([3.0], [4.0])
    clipper = AdaGC(params, observe="raw", init="min")
    clipper.clip_()
    assert clipper.state.gamma.tolist() == [3.0, 4.0]


def test_the_norm_of_all_gradients_may_come_from_the_caller():
    norms = torch.tensor([3.0, 4.0])
    assert adagc_factors(norms, None, torch.tensor(50.0), eps=0)[0].tolist() == pytest.approx([0.02, 0.02])
    assert adagc_factors(norms, None, eps=0)[0].tolist() == pytest.approx([0.2, 0.2])
    # After the warm-up nobody needs it.
    state = AdaGCState(gamma=torch.tensor([1.0, 1.0]), step=100)
    assert torch.equal(adagc_factors(norms, state, torch.tensor(50.0))[0], adagc_factors(norms, state)[0])


def test_the_thresholds_of_a_step_are_those_that_it_was_clipped_to():
    params = params_with([1.0], [2.0])
    clipper = AdaGC(params, warmup=1, relative=1.5, eps=0)
    assert clipper.clip_().thresholds is None
    before = clipper.state.gamma.clone()
    feed(params, [30.0], [40.0])
    clipped = clipper.clip_()
    torch.testing.assert_close(clipped.thresholds, 1.5 * before)
    torch.testing.assert_close(clipped.factors * clipped.norms, clipped.thresholds)


# Parity with the oracle


@pytest.mark.oracle("gradient_rules", "adagc")
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("ignore_zero", [True, False])
def test_kernel_equals_the_oracle_in_float64(init, ignore_zero):
    knobs = {"init": init, "ignore_zero": ignore_zero, "warmup": 4, "beta": 0.8, "absolute": 2.0}
    slow, state = oracle.AdaGC(**knobs), None
    for step in range(12):
        grads = draw(step, dtype=torch.float64)
        if step in (0, 3, 8):
            grads[1] = torch.zeros_like(grads[1])
        expected = slow.step([g.numpy() for g in grads])
        norms = torch.stack([g.norm() for g in grads])
        factors, state = adagc_factors(norms, state, **knobs)
        for grad, factor, want in zip(grads, factors, expected):
            np.testing.assert_allclose((grad * factor).numpy(), want, rtol=1e-10)
        np.testing.assert_allclose(state.gamma.numpy(), [slow.gamma.get(i, math.nan) for i in range(5)], rtol=1e-10)


@pytest.mark.parametrize("init", INITS)
def test_the_object_equals_the_oracle_with_missing_and_infinite_gradients(init):
    knobs = {"init": init, "warmup": 3, "beta": 0.9}
    params = params_with(*draw(0))
    clipper, slow = AdaGC(params, **knobs), oracle.AdaGC(**knobs)
    for step in range(10):
        grads = draw(step)
        if step % 3 == 1:
            grads[2] = None
        if step in (2, 6):
            grads[4] = torch.full_like(grads[4], math.inf)
        feed(params, *grads)
        clipper.clip_()
        for param, want in zip(params, slow.step([None if g is None else g.numpy() for g in grads])):
            if want is None:
                assert param.grad is None
            else:
                np.testing.assert_allclose(param.grad.numpy(), want, rtol=1e-5, atol=1e-9)


# Laws


@pytest.mark.parametrize("absolute", [1.0, 1e3])
def test_warmup_clips_like_torch(absolute):
    ours, theirs = params_with(*draw(1)), params_with(*draw(1))
    AdaGC(ours, absolute=absolute, eps=1e-6).clip_()
    torch.nn.utils.clip_grad_norm_(theirs, absolute)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6)


def test_without_warmup_the_first_gradient_passes_and_sets_the_scale():
    params = params_with([3.0, 4.0], [7.0])
    clipper = AdaGC(params, warmup=0)
    clipper.clip_()
    assert params[0].grad.tolist() == [3.0, 4.0] and clipper.state.gamma.tolist() == [5.0, 7.0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.0, 3.0), st.floats(0, 0.999), st.floats(1e-3, 1e3))
def test_after_the_warmup_norm_direction_and_growth_are_bounded(seed, relative, beta, scale):
    params = params_with(*draw(seed))
    clipper = AdaGC(params, warmup=0, relative=relative, beta=beta, eps=0)
    clipper.clip_()
    before = clipper.state.gamma
    grads = [g * scale for g in draw(seed + 1)]
    feed(params, *grads)
    clipper.clip_()
    for param, grad, old, new in zip(params, grads, before, clipper.state.gamma):
        assert float(param.grad.norm()) == pytest.approx(min(float(grad.norm()), relative * float(old)), rel=2e-6)
        assert float(torch.dot(param.grad.view(-1), grad.view(-1))) == pytest.approx(
            float(param.grad.norm() * grad.norm()), rel=1e-5
        )
        assert float(new) <= float(old) * (beta + (1 - beta) * relative) * (1 + 1e-6)
        assert float(new) >= beta * float(old) * (1 - 1e-6)


def test_a_spike_in_one_tensor_leaves_the_others_bitwise_alone():
    results = []
    for spike in (1.0, 1e6):
        params = params_with(*draw(0))
        clipper = AdaGC(params, warmup=1)
        clipper.clip_()
        grads = draw(1)
        grads[0] = grads[0] * spike
        feed(params, *grads)
        clipper.clip_()
        results.append(([p.grad for p in params[1:]], clipper.state.gamma[1:]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0]))
    assert torch.equal(results[0][1], results[1][1])


def test_during_the_warmup_a_spike_does_touch_the_others():
    params = params_with([1e6], [1.0])
    AdaGC(params).clip_()
    assert params[1].grad.item() < 1e-5


def test_constant_norms_are_approached_at_the_rate_of_the_average():
    state, beta = started(5.0), 0.9
    for step in range(1, 20):
        _, state = adagc_factors(torch.tensor([2.0], dtype=torch.float64), state, beta=beta)
        assert state.gamma.item() - 2.0 == pytest.approx(beta**step * 3.0, rel=1e-9)


def test_scaling_every_gradient_scales_the_average_and_nothing_else():
    path = {}
    for scale in (1.0, 1024.0):
        params = params_with(*draw(0))
        optimizer = torch.optim.Adam(params, lr=0.1, eps=0)
        clipper = AdaGC(params, warmup=2, absolute=scale, eps=0).attach(optimizer)
        factors = []
        clipper.observer = lambda clipped, factors=factors: factors.append(clipped.factors)
        for step in range(6):
            feed(params, *[g * scale for g in draw(step)])
            optimizer.step()
        path[scale] = (torch.stack(factors), clipper.state.gamma / scale, [p.detach() for p in params])
    assert torch.allclose(path[1.0][0], path[1024.0][0], rtol=1e-6)
    assert torch.allclose(path[1.0][1], path[1024.0][1], rtol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(path[1.0][2], path[1024.0][2]))


def test_infinite_relative_clips_nothing_and_zero_beta_keeps_the_last_norm():
    params = params_with(*draw(0))
    clipper = AdaGC(params, warmup=0, relative=math.inf, beta=0)
    for step in range(3):
        feed(params, *draw(step))
        clipper.clip_()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, draw(step)))
    assert torch.allclose(clipper.state.gamma, torch.stack([g.norm() for g in draw(2)]))


def run(grads_of, shapes_of=lambda gs: gs, steps=6, **knobs):
    params = params_with(*shapes_of(grads_of(0)))
    clipper = AdaGC([(str(i), p) for i, p in enumerate(params)], warmup=2, **knobs)
    for step in range(steps):
        feed(params, *shapes_of(grads_of(step)))
        clipper.clip_()
    return clipper, params


def test_order_and_shape_of_the_tensors_do_not_matter():
    plain, _ = run(draw)
    turned, _ = run(lambda s: draw(s)[::-1])
    flat, _ = run(draw, lambda gs: [g.reshape(-1) for g in gs])
    assert torch.allclose(turned.state.gamma.flip(0), plain.state.gamma, rtol=1e-6)
    assert torch.allclose(flat.state.gamma, plain.state.gamma, rtol=1e-6)


def qkv(step):
    g = torch.Generator().manual_seed(step)
    return [torch.randn(4, 4, generator=g) * k for k in (1.0, 5.0, 0.1)]


def test_three_projections_are_not_the_fused_matrix_unless_they_share_a_group():
    names = ["layer.q_proj", "layer.k_proj", "layer.v_proj"]

    def parts(**knobs):
        params = params_with(*qkv(0))
        clipper = AdaGC(list(zip(names, params)), warmup=2, **knobs)
        for step in range(6):
            feed(params, *qkv(step))
            clipper.clip_()
        return torch.cat([p.grad for p in params]), clipper

    fused = params_with(torch.cat(qkv(0)))
    whole = AdaGC([("layer.qkv_proj", fused[0])], warmup=2)
    for step in range(6):
        feed(fused, torch.cat(qkv(step)))
        whole.clip_()
    grouped, clipper = parts(groups={"[qkv]_proj": "qkv_proj"})
    assert torch.allclose(grouped, fused[0].grad, rtol=1e-5)
    assert clipper.state_dict().keys() == whole.state_dict().keys()
    assert not torch.allclose(parts()[0], fused[0].grad, rtol=1e-2)


def test_global_granularity_is_the_rule_on_the_global_norm():
    params = params_with([3.0], [4.0])
    clipper = AdaGC(params, warmup=0, granularity="global", eps=0)
    clipper.clip_()
    feed(params, [30.0], [40.0])
    clipper.clip_()
    assert clipper.state.gamma.shape == (1,)
    assert torch.allclose(torch.cat([p.grad for p in params]), torch.tensor([3.12, 4.16]))
