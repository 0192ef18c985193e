"""Stored experts and their mixtures: against an independent version, the dense model, and the whole experts."""

import numpy as np
import pytest
import torch

from modicum.errors import ModicumError
from modicum.weights import merge_state_dicts
from modicum.weights.mediator import ExpertSet, build_experts, layer_conflict, select_layers
from oracles import mediator as oracle


def two_models(shape=(6, 8), layers=3):
    rng = torch.Generator().manual_seed(3)
    made = [
        {f"h.{i}.{p}.weight": torch.randn(s, generator=rng) for i in range(layers) for p, s in (("a", shape), ("n", 4))}
        | {"wte.weight": torch.randn(5, 4, generator=rng)}
        for _ in range(4)
    ]
    return made[0], made[1:]


def test_no_routed_layer_is_the_plain_merge_bit_for_bit():
    base, experts = two_models()
    for average, method, knobs in (("uniform", "linear", {}), ("ties", "ties", {"density": 0.5})):
        given = average if average == "uniform" else {"name": average, **knobs}
        built = build_experts(base, experts, [], average=given)
        plain = merge_state_dicts(base, experts, method=method, **knobs)
        found = built.state_dict([0.2, 0.3, 0.5])
        assert built.nbytes == 0 and all(torch.equal(found[n], plain[n]) for n in plain)


@pytest.mark.parametrize("dense", ["average", "base"])
def test_all_routed_at_density_one_is_the_whole_expert(dense):
    base, experts = two_models()
    built = build_experts(base, experts, ["h.0", "h.1", "h.2"], density=1.0, values="f32", dense=dense)
    for t, expert in enumerate(experts):
        found = built.state_dict([float(t == s) for s in range(3)])
        for name in base:
            if name != "wte.weight":
                torch.testing.assert_close(found[name], expert[name], rtol=2e-6, atol=1e-6)


def test_density_one_in_bfloat16_is_off_by_a_unit_in_the_last_place():
    base, experts = two_models()
    base, *experts = ({n: t.bfloat16() for n, t in m.items()} for m in (base, *experts))
    built = build_experts(base, experts, ["h.0"], density=1.0)
    found, want = built.state_dict([0, 1, 0])["h.0.a.weight"], experts[1]["h.0.a.weight"]
    dense = built.dense["h.0.a.weight"]
    largest = torch.stack([want.abs(), dense.abs(), (want - dense).abs()]).amax(0).float()
    step = 2.0 ** (torch.floor(torch.log2(largest)) - 7)
    assert bool(((found - want).abs().float() <= step).all())


@pytest.mark.parametrize("store", ["random_rescaled", "magnitude", "sign", "low_rank", "whole"])
def test_uniform_weights_are_the_dense_model_bit_for_bit(store):
    base, experts = two_models()
    built = build_experts(base, experts, ["h.0", "h.1"], sparsifier=store)
    even, mixed = built.state_dict([1 / 3] * 3), built.state_dict([1, 0, 0])
    assert all(torch.equal(even[n], built.dense[n]) for n in base)
    assert not torch.equal(mixed["h.0.a.weight"], built.dense["h.0.a.weight"])
    assert all(torch.equal(mixed[n], built.dense[n]) for n in base if n.startswith("h.2"))


def test_a_mixture_is_the_oracle_s():
    base, experts = two_models()
    built = build_experts(base, experts, ["h.1"], sparsifier="sign")
    w, name = [0.5, 0.25, 0.25], "h.1.a.weight"
    dense = built.dense[name].double().numpy()
    stored = [oracle.sign((e[name] - built.dense[name]).double().numpy()) for e in experts]
    want = dense + sum(x * s for x, s in zip(w, stored))
    np.testing.assert_allclose(built.tensor(name, w).numpy(), want, rtol=1e-5, atol=1e-6)


def test_a_centred_mixture_is_the_oracle_s():
    base, experts = two_models()
    built = build_experts(base, experts, ["h.1"], density=0.4, values="f32", seed=3)
    w, name = [0.5, 0.25, 0.25], "h.1.a.weight"
    dense = built.dense[name].double().numpy()
    stored = [
        oracle.random_rescaled(
            (e[name] - built.dense[name]).double().numpy(), key=built.about.key(t, name), density=0.4
        )
        for t, e in enumerate(experts)
    ]
    want = dense + sum((x - 1 / 3) * s for x, s in zip(w, stored))
    np.testing.assert_allclose(built.tensor(name, w, centred=True).numpy(), want, rtol=1e-5, atol=1e-6)
    plain = built.tensor(name, w).numpy()
    assert not np.allclose(plain, want, atol=1e-3)


@pytest.mark.parametrize("knobs", [{"sparsifier": "sign"}, {"sparsifier": "magnitude"}, {"dense": "base"}])
def test_experts_whose_differences_do_not_sum_to_zero_are_not_centred(knobs):
    base, experts = two_models()
    built = build_experts(base, experts, ["h.1"], **knobs)
    with pytest.raises(ModicumError, match="centred needs"):
        built.state_dict([0.5, 0.25, 0.25], centred=True)


def test_float64_models_are_stored_like_others():
    base, experts = two_models()
    doubles = [{n: t.double() for n, t in m.items()} for m in (base, *experts)]
    for store in ("magnitude", "magnitude_rescaled", "sign", "random_rescaled"):
        wide = build_experts(doubles[0], doubles[1:], ["h.0"], sparsifier=store, density=0.3)
        plain = build_experts(base, experts, ["h.0"], sparsifier=store, density=0.3)
        torch.testing.assert_close(
            wide.state_dict([0, 1, 0])["h.0.a.weight"].float(), plain.state_dict([0, 1, 0])["h.0.a.weight"]
        )


def test_a_bfloat16_base_takes_float32_experts():
    base, experts = two_models()
    low = {n: t.bfloat16() for n, t in base.items()}
    built = build_experts(low, experts, ["h.0"], sparsifier="whole", values="f32")
    for t, expert in enumerate(experts):
        found = built.state_dict([float(t == s) for s in range(3)])["h.0.a.weight"]
        torch.testing.assert_close(found.float(), expert["h.0.a.weight"], rtol=0.01, atol=0.02)


def test_a_routed_layer_of_which_nothing_is_stored_is_refused():
    base, experts = two_models()
    built = build_experts(base, experts, ["h.0", "h.1"], sparsifier="sign")
    parts = {key: part for key, part in built.parts.items() if ".h.1." not in key}
    with pytest.raises(ModicumError, match=r"hold nothing of 'h\.1'"):
        ExpertSet(built.about, built.dense, parts)


def test_norms_beside_a_matrix_are_stored_whole():
    base, experts = two_models()
    built = build_experts(base, experts, ["h.0"], density=0.1, values="f32")
    found = built.state_dict([0, 0, 1])["h.0.n.weight"]
    torch.testing.assert_close(found, experts[2]["h.0.n.weight"], rtol=1e-6, atol=1e-6)


def test_identical_experts_give_that_expert():
    base, (expert, *_) = two_models()
    same = [expert, dict(expert)]
    conflict = layer_conflict(base, same)
    assert set(conflict.values()) == {0.0} and select_layers(conflict) == []
    assert select_layers(conflict, rule="topk", k=1) == []
    found = build_experts(base, same, select_layers(conflict)).state_dict([1, 0])
    assert all(torch.equal(found[n], expert[n]) for n in expert)


BASE = {"h.0.w": torch.zeros(3, 3)}
ONE = {"h.0.w": torch.ones(3, 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_experts({"h.0.qweight": torch.ones(2)}, [{"h.0.qweight": torch.ones(2)}] * 2, []), "quantised"),
        (lambda: build_experts(BASE, [ONE], ["h.0"]), "expected at least 2"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.1"]), "routed names 'h.1'"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"], density=0.0), "density"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"], density=1.5), "density"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"], sparsifier="best"), "no expert store 'best'"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"], sparsifier="lora"), "is a whole model"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"], sparsifier="sign", values="int8"), "sign has no values"),
        (
            lambda: build_experts(BASE, [ONE, ONE], ["h.0"], sparsifier="low_rank", layout="csr"),
            "low_rank has no layout",
        ),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"], sparsifier="sign", rank=4), "sign has no rank"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"]).state_dict([1.0]), "expected 2"),
        (lambda: build_experts(BASE, [ONE, ONE], ["h.0"]).state_dict([2.0, -1.0]), "not negative"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ModicumError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and isinstance(caught.value, ValueError)
