"""Routers: the numbered cases of the spec, an independent version, and laws."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from modicum.errors import ModicumError
from modicum.models.router import (
    Router,
    calibrate,
    expected_calibration_error,
    fit_router,
    is_uniform,
    mahalanobis,
    residuals,
    routing_weights,
    standardised,
    uncertainty,
)
from oracles import mediator as oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("p", "u", "w"),
    [
        ((0.99, 0.005, 0.003, 0.002), 0.047824, (1, 0, 0, 0)),
        ((0.62, 0.3, 0.05, 0.03), 0.658271, (0.673913, 0.326087, 0, 0)),
        ((0.6, 0.3, 0.07, 0.03), 0.691795, (2 / 3, 1 / 3, 0, 0)),
        ((0.7, 0.1, 0.1, 0.1), None, (0.777778, 0.111111, 0.111111, 0)),
        ((0.25,) * 4, 1.0, (0.25,) * 4),
    ],
)
def test_m10_to_m13_gates(p, u, w, dtype):
    logits = torch.tensor(p, dtype=dtype).log()
    assert routing_weights(logits).tolist() == pytest.approx(w, abs=1e-6)
    if u is not None:
        assert float(uncertainty(logits)) == pytest.approx(u, abs=1e-6)
    assert bool(is_uniform(routing_weights(logits))) == (p[0] == 0.25)


@pytest.mark.parametrize(("temperature", "u"), [(0.5, 0.328522), (1, 0.683503), (2, 0.898114)])
def test_m14_temperatures(temperature, u):
    assert float(uncertainty([2.0, 1, 0, -1], temperature=temperature)) == pytest.approx(u, abs=1e-6)


def test_m15_calibration():
    assert calibrate(torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 1, 0])) == pytest.approx(2 / math.log(3))


def test_m17_entropies_of_the_experts_own_predictions():
    router = fit_router(torch.tensor([[0.0, 1, 2], [1, 0, 2]]), [0, 1], kind="entropy")
    logits = router.logits(torch.tensor([[0, math.log(2), math.log(4)]]))
    assert routing_weights(logits, selection="soft")[0].tolist() == pytest.approx((4 / 7, 2 / 7, 1 / 7), abs=1e-6)


def test_m18_residuals():
    logits = torch.tensor([-4.0, -3.0, -5.0])
    assert standardised(logits).tolist() == pytest.approx((0.244728, 0.665241, 0.090031), abs=1e-6)
    w = routing_weights(logits, selection="standardised", least=0.2)
    assert (w > 0).tolist() == [True, True, False] and float(w.sum()) == pytest.approx(1)


LOGITS = st.lists(st.floats(-6, 6), min_size=1, max_size=5)


@given(LOGITS, st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_gate_is_the_oracle_s(logits, temperature, nucleus):
    z = np.array(logits)
    u = oracle.uncertainty(z, temperature)
    if min(abs(u - 0.1), abs(u - 0.9)) < 1e-6:
        return  # on the edge either side is right
    want = oracle.gated(z, temperature=temperature, u_lo=0.1, u_hi=0.9, nucleus=nucleus)
    got = routing_weights(logits, temperature=temperature, nucleus=nucleus)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)
    assert float(uncertainty(logits, temperature=temperature)) == pytest.approx(u, abs=1e-9)


@given(LOGITS, st.sampled_from(["entropy_gated", "soft", "top1", "nucleus", "uniform", "standardised"]), st.data())
def test_weights_are_a_distribution_and_follow_the_order_of_the_experts(logits, selection, data):
    w = routing_weights(logits, selection=selection)
    assert float(w.min()) >= 0 and float(w.sum()) == pytest.approx(1)
    order = data.draw(st.permutations(range(len(logits))))
    if len(set(logits)) == len(logits):  # equal logits are told apart by their place
        turned = routing_weights([logits[i] for i in order], selection=selection)
        assert turned.tolist() == pytest.approx([float(w[i]) for i in order])


@given(LOGITS)
def test_a_higher_temperature_never_lowers_the_uncertainty(logits):
    found = [float(uncertainty(logits, temperature=t)) for t in (0.25, 0.5, 1, 2, 4, 64)]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(found)) and all(0 <= u <= 1 + 1e-9 for u in found)


def test_ends_of_the_uncertainty():
    assert float(uncertainty([7.0])) == 0 and routing_weights([7.0]).tolist() == [1.0]
    assert float(uncertainty([0.0, -math.inf])) == 0 and routing_weights([0.0, -math.inf]).tolist() == [1, 0]
    assert float(uncertainty([1.0, 1.0])) == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_say_nothing_give_the_dense_model(bad):
    with pytest.warns(RuntimeWarning, match="logits of 1 prompts are not finite"):
        got = routing_weights([[bad, 1.0], [5.0, -5.0]])
    assert got.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert routing_weights([5.0, -5.0], distance=math.nan).tolist() == [0.5, 0.5]


def test_a_prompt_far_from_every_task_is_unknown():
    logits = [[9.0, 0.0], [9.0, 0.0]]
    got = routing_weights(logits, selection="top1", distance=torch.tensor([0.9, 1.1]))
    assert got.tolist() == [[1, 0], [0.5, 0.5]]


def clouds(n=40, d=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(3).repeat_interleave(n)
    return 4 * torch.eye(3, d)[y] + torch.randn(3 * n, d, generator=rng), y


@pytest.mark.parametrize("kind", ["linear", "mlp", "subspace"])
def test_every_router_tells_tasks_apart(kind):
    x, y = clouds()
    knobs = {"epochs": 150} if kind == "mlp" else {}
    router = fit_router(x, y, kind=kind, **knobs)
    fresh, labels = clouds(seed=1)
    assert float((router.logits(fresh).argmax(1) == labels).double().mean()) > 0.85
    again = fit_router(x, y, kind=kind, **knobs)
    assert all(torch.equal(router.tensors[k], again.tensors[k]) for k in router.tensors)
    alone = router.logits(fresh[7:8])
    assert torch.allclose(alone, router.logits(fresh)[7:8])  # other rows of a batch do not count


def test_the_linear_router_minimises_what_it_says():
    x, y = clouds(n=9)
    router = fit_router(x, y, label_smoothing=0.1, decay=0.01)
    z = ((x.double() - x.double().mean(0)) / x.double().std(0, correction=0)).numpy()

    def value(weight, bias):
        logs = np.stack([np.log(oracle.softmax(row @ weight.T + bias)) for row in z])
        target = np.eye(3)[y.numpy()] * 0.9 + 0.1 / 3
        return -(target * logs).sum(1).mean() + 0.005 * (weight**2).sum()

    weight, bias = router.tensors["weight"].numpy(), router.tensors["bias"].numpy()
    best = value(weight, bias)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert value(weight + 1e-3 * rng.standard_normal(weight.shape), bias) > best


@given(st.integers(0, 99))
def test_calibration_is_the_minimum(seed):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(30, 3)) * 3, rng.integers(0, 3, 30)
    got = calibrate(torch.from_numpy(z), torch.from_numpy(y))
    found = minimize_scalar(lambda t: oracle.loss(z, list(y), math.exp(t)), bounds=(-6.9, 6.9), method="bounded")
    assert oracle.loss(z, list(y), got) <= found.fun + 1e-6


def test_distances_and_residuals_are_the_oracle_s():
    rng = np.random.default_rng(0)
    x, centers = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    root = rng.normal(size=(4, 4))
    precision = root @ root.T
    got = mahalanobis(*(torch.from_numpy(part) for part in (x, centers, precision)))
    np.testing.assert_allclose(got.numpy(), oracle.mahalanobis(x, centers, precision), rtol=1e-9)
    bases = [np.linalg.qr(rng.normal(size=(4, 2)))[0].T for _ in range(3)]
    got = residuals(torch.from_numpy(x), [torch.from_numpy(b) for b in bases])
    np.testing.assert_allclose(got.numpy(), oracle.residuals(x, bases), rtol=1e-9)


def test_calibration_error_by_hand():
    p = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.45, 0.55]])
    assert expected_calibration_error(p, torch.tensor([0, 1, 0, 1])) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_router(X, [0, 0, 0, 0]), "of one task or none"),
        (lambda: fit_router(X[:0], []), "of one task or none"),
        (lambda: fit_router(X, [0, 2, 0, 2]), "no prompt of expert 1"),
        (lambda: fit_router(X, [0, 1]), "expected \\(n, d\\) and \\(n\\)"),
        (lambda: fit_router(X * math.nan, [0, 1, 0, 1]), "NaN or infinite"),
        (lambda: fit_router(X, [0, 1, 0, 1], kind="tree"), "kind 'tree' is not known"),
        (lambda: fit_router(X, [0, 1, 0, 1], label_smoothing=1.0), "label_smoothing is 1.0"),
        (lambda: routing_weights([1.0, 2], temperature=0), "temperature is 0"),
        (lambda: routing_weights([1.0, 2], temperature=-1.0), "temperature is -1"),
        (lambda: routing_weights([1.0, 2], nucleus=0), "nucleus is 0"),
        (lambda: routing_weights([1.0, 2], u_lo=0.9, u_hi=0.1), "u_lo is 0.9"),
        (lambda: routing_weights([1.0, 2], selection="best"), "selection 'best' is not known"),
        (lambda: calibrate([[1.0, 2]], [5]), "labels run from 5"),
        (lambda: calibrate([[math.nan, 2]], [0]), "expected finite"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ModicumError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_router_without_a_threshold_has_no_gate():
    assert Router("entropy", 2).distance(X) is None
