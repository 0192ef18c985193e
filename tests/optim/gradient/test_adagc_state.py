"""AdaGC: its state, its edges, and what it may not read back from a device."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fed_gradients import INITS, draw, feed, params_with
from modicum.errors import CheckpointError, ModicumError, UnsupportedError
from modicum.optim import AdaGC
from modicum.optim.gradient.adagc import AdaGCState, adagc_advice, adagc_factors

# State


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("split", [1, 3, 7])
def test_saving_and_loading_changes_no_bit(init, split):
    def clip(clipper, params, steps):
        for step in steps:
            feed(params, *draw(step))
            clipper.clip_()

    straight = params_with(*draw(0))
    whole = AdaGC(straight, warmup=5, init=init)
    clip(whole, straight, range(10))
    first = params_with(*draw(0))
    half = AdaGC(first, warmup=5, init=init)
    clip(half, first, range(split))
    second = params_with(*draw(0))
    resumed = AdaGC(second, warmup=5, init=init)
    resumed.load_state_dict(half.state_dict())
    clip(resumed, second, range(split, 10))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(straight, second))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())


def test_a_state_that_does_not_fit_is_refused_before_anything_changes():
    params = params_with([1.0], [2.0])
    clipper = AdaGC([("a", params[0]), ("b", params[1])])
    clipper.clip_()
    good = clipper.state_dict()
    before = clipper.state
    for wrong in (
        {k: v for k, v in good.items() if k != "gamma.a"},
        {**good, "gamma.c": torch.tensor(1.0)},
        {**good, "gamma.a": torch.ones(2)},
        {**good, "step": torch.tensor(-3)},
        {**good, "step": torch.tensor(1.5)},
        {**good, "gamma.a": torch.tensor(-1.0)},
        {**good, "gamma.a": torch.tensor(math.inf)},
        {**good, "gamma.a": 1.0},
        {"gamma.a": good["gamma.a"], "gamma.b": good["gamma.b"]},
    ):
        with pytest.raises(CheckpointError, match="state"):
            clipper.load_state_dict(wrong)
        assert clipper.state is before
    clipper.load_state_dict({})
    assert clipper.state is None


def test_state_is_four_bytes_a_tensor_whatever_the_gradients_are():
    params = [torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16)) for _ in range(7)]
    clipper = AdaGC(params, init="mean", warmup=2)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        clipper.clip_()
    tensors = [v for v in vars(clipper.state).values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in tensors) == 4 * len(params)
    assert clipper.state.gamma.dtype == torch.float32


def test_a_bfloat16_average_would_stall_and_ours_does_not():
    params = [torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]
    clipper = AdaGC(params, warmup=0)
    for norm in [1.0] + [0.9] * 1000:
        params[0].grad = torch.tensor([norm], dtype=torch.bfloat16)
        clipper.clip_()
    assert clipper.state.gamma.item() == pytest.approx(0.8984375, abs=1e-3)


# Edges


def test_a_tied_parameter_counts_once():
    weight = params_with([3.0, 4.0])[0]
    assert AdaGC([("embed", weight), ("head", weight)]).units == ["embed"]


def test_a_parameter_without_gradient_keeps_its_state():
    for literal in (True, False):
        params = params_with([1.0], [2.0])
        clipper = AdaGC(params, warmup=0, ignore_zero=literal)
        clipper.clip_()
        feed(params, [1.0], None)
        clipper.clip_()
        assert clipper.state.gamma[1] == 2.0 and params[1].grad is None


def test_no_gradient_at_all_is_no_step():
    params = params_with([1.0])
    params[0].grad = None
    clipper = AdaGC(params)
    clipper.clip_()
    assert clipper.state is None


@pytest.mark.parametrize("warmup", [0, 5])
def test_zero_gradients_pass_and_are_not_counted(warmup):
    params = params_with([0.0, 0.0], [0.0])
    clipper = AdaGC(params, warmup=warmup, eps=0)
    clipper.clip_()
    assert all((p.grad == 0).all() for p in params) and clipper.state.gamma.isnan().all()
    feed(params, [3.0, 4.0], [0.0])
    clipper.clip_()
    assert clipper.state.gamma[0] == pytest.approx(5.0 if warmup == 0 else 1.0)


def test_the_literal_rule_freezes_a_tensor_after_one_zero():
    params = params_with([0.0], [1.0])
    clipper = AdaGC(params, warmup=2, init="min", ignore_zero=False)
    for _ in range(5):
        clipper.clip_()
        feed(params, [1.0], [1.0])
    clipper.clip_()
    assert params[0].grad.item() == 0 and clipper.state.gamma[0] == 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("warmup", [0, 9])
def test_a_gradient_that_is_not_finite_harms_nobody(bad, warmup):
    for policy in ("zero", "skip", "raise"):
        params = params_with([0.3], [0.4])
        clipper = AdaGC(params, warmup=warmup, nonfinite=policy)
        clipper.clip_()
        before = clipper.state.gamma
        feed(params, [bad], [0.4])
        if policy == "raise":
            with pytest.raises(UnsupportedError, match="gradient of '0' is not finite"):
                clipper.clip_()
            continue
        clipper.clip_()
        assert params[1].grad.item() == pytest.approx(0.4) and clipper.state.gamma[0] == before[0]
        assert params[0].grad.item() == 0 if policy == "zero" else not math.isfinite(params[0].grad.item())


def test_raise_does_not_mistake_a_missing_gradient_for_an_overflow():
    params = params_with([1.0], [1.0])
    params[1].grad = None
    AdaGC(params, nonfinite="raise").clip_()
    assert params[0].grad.item() == pytest.approx(1.0)


def test_kernel_leaves_its_inputs_alone():
    norms, state = torch.tensor([1.0, 0.0, math.inf]), AdaGCState(torch.tensor([0.5, 0.5, 0.5]), step=200)
    kept = norms.clone(), state.gamma.clone()
    adagc_factors(norms, state)
    assert torch.equal(norms, kept[0]) and torch.equal(state.gamma, kept[1])


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"relative": 0}, "relative"),
        ({"relative": math.nan}, "relative"),
        ({"beta": 1.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"absolute": 0}, "absolute"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": 1.5}, "warmup"),
        ({"eps": -1e-9}, "eps"),
        ({"init": "median"}, "init"),
        ({"granularity": "layer"}, "granularity"),
        ({"groups": {"(": "x"}}, "groups"),
    ],
)
def test_knobs_out_of_range_are_named(knobs, word):
    with pytest.raises(ModicumError, match=word):
        AdaGC(params_with([1.0]), **knobs)


def test_a_factor_below_one_is_warned_of():
    with pytest.warns(UserWarning, match=r"relative=0\.9 is below 1"):
        AdaGC(params_with([1.0]), relative=0.9)


def test_no_parameters_no_other_norm_no_odd_gradients():
    with pytest.raises(UnsupportedError, match="no parameters"):
        AdaGC([])
    with pytest.raises(UnsupportedError, match="expected a tensor"):
        AdaGC([{"params": []}])
    with pytest.raises(TypeError, match="norm_type"):
        AdaGC(params_with([1.0]), norm_type=1)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="'weight' is sparse"):
        AdaGC(embedding.named_parameters()).clip_()
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    weight.grad = torch.ones(1, dtype=torch.complex64)
    with pytest.raises(UnsupportedError, match="complex"):
        AdaGC([weight]).clip_()


def test_advice_speaks_only_when_there_is_a_reason():
    assert "ema" in adagc_advice({"init": "min", "warmup": 100}, steps=1000)[0]
    assert "warm-up" in adagc_advice({"init": "ema", "warmup": 100}, steps=50)[0]
    assert adagc_advice({"init": "ema", "warmup": 100}, steps=1000) == []


# No synchronisation with the host


class Watch(TorchDispatchMode):
    """Remember which operations ran, and on tensors of which devices."""

    def __init__(self):
        super().__init__()
        self.seen, self.devices = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        result = func(*args, **(kwargs or {}))
        self.devices |= {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize("init", INITS)
def test_no_value_is_read_back(init):
    params = params_with(*draw(0))
    clipper = AdaGC(params, warmup=2, init=init)
    with Watch() as watch:
        for step in range(4):
            feed(params, *draw(step))
            clipper.clip_()
    assert any("_foreach_norm" in op for op in watch.seen)
    assert not [op for op in watch.seen if "_local_scalar_dense" in op or "nonzero" in op]


@pytest.mark.parametrize("init", INITS)
def test_on_an_accelerator_no_decision_depends_on_a_value(init):
    # Tensors on the meta device have no values: whatever would have to wait for one raises.
    params = [torch.nn.Parameter(torch.empty(n, 3, device="meta")) for n in (1, 2, 5)]
    clipper = AdaGC(params, warmup=2, init=init, groups={"[01]": "x"})
    for step in range(5):
        for p in params:
            p.grad = None if step == 3 and p is params[0] else torch.empty_like(p)
        clipped = clipper.clip_()
    assert clipped.factors.device.type == "meta" and clipper.state.step == 5


@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
@pytest.mark.parametrize("init", INITS)
def test_on_an_accelerator_nothing_travels_between_it_and_the_host(init, nonfinite):
    params = [torch.nn.Parameter(torch.empty(n, 3, device="meta")) for n in (1, 2, 5)]
    clipper = AdaGC(params, warmup=2, init=init, nonfinite=nonfinite, groups={"[01]": "x"})
    for step in range(4):
        for p in params:
            p.grad = torch.empty_like(p)
        with Watch() as watch:
            clipper.clip_()
        # The first step sends once which parameter belongs to which group.
        assert step == 0 or watch.devices == {"meta"}


def test_watching_devices_would_see_a_number_travel():
    with Watch() as watch:
        torch.empty(2, device="meta") * torch.tensor(2.0)
    assert watch.devices == {"meta", "cpu"}
