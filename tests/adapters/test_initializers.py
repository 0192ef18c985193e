"""Baselines of HRP: against NumPy, against PEFT's own code, and the laws of their kind."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga

from modicum.adapters.decomposed import lora_xs, mica, milora, olora, pissa
from modicum.adapters.drawn import default, etf, gaussian, orthogonal
from modicum.adapters.informed import corda, eva, lora_ga, lora_one, lora_sb
from modicum.errors import ModicumError, UnsupportedError
from modicum.random import generator
from modicum.registry import adapter_init
from oracles import hrp as oracle


def matrix(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "matrix", *shape))


def moment(n, seed=0):
    rows = matrix(5 * n, n, seed=seed)
    return rows.T @ rows / len(rows)


W, G = matrix(14, 10), matrix(14, 10, seed=1)


def same_product(made, expected, atol=1e-5):
    np.testing.assert_allclose((made[1] @ made[0]).numpy(), expected[1] @ expected[0], atol=atol)
    for ours, theirs in zip(made, expected):
        np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), atol=atol)


@pytest.mark.oracle(
    "adapter_inits", "pissa", "milora", "lora_one", "corda", "lora_ga", "olora", "mica", "lora_xs", "lora_sb", "eva"
)
def test_decompositions_equal_their_numpy_transcriptions():
    same_product(pissa(W, rank=3, scaling=2.0), oracle.pissa(W.numpy(), 3, 2.0))
    same_product(milora(W, rank=3, scaling=2.0), oracle.milora(W.numpy(), 3, 2.0))
    same_product(lora_one(G, rank=3, gamma=64.0), oracle.lora_one(G.numpy(), 3, 64.0))
    same_product(corda(W, moment(10), rank=3, scaling=2.0), oracle.corda(W.numpy(), moment(10).numpy(), 3, 2.0))
    same_product(olora(W, rank=3), oracle.olora(W.numpy(), 3))
    same_product(mica(W, rank=3), oracle.mica(W.numpy(), 3))
    same_product(lora_xs(W, rank=3), oracle.lora_xs(W.numpy(), 3))
    same_product(lora_sb(G, rank=3), oracle.lora_sb(G.numpy(), 3))
    same_product(eva(moment(10), W, rank=3), oracle.eva(moment(10).numpy(), 14, 3))
    for convention in ("peft", "authors"):
        made, expected = lora_ga(G, rank=3, convention=convention), oracle.lora_ga(G.numpy(), 3, convention)
        for ours, theirs in zip(made, expected):  # vectors of different triplets: each sign is free
            np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), atol=1e-5)


@pytest.mark.oracle("adapter_inits", "default", "gaussian", "orthogonal", "etf")
@pytest.mark.parametrize(("out", "width", "rank"), [(14, 10, 4), (1, 2, 2), (3, 40, 6)])
def test_drawn_starts_equal_their_transcriptions_given_the_draws(out, width, rank):
    def source():
        return generator(5, "drawn", out)

    def draws(*shapes, dtype=torch.float32):
        rng = source()
        return [torch.randn(*shape, generator=rng, dtype=dtype).double().numpy() for shape in shapes]

    shape = torch.empty(out, width, device="meta")
    uniform = torch.rand(rank, width, generator=source()).double().numpy()
    for made, expected in (
        (default(shape, rank=rank, rng=source()), oracle.default(uniform, out)),
        (gaussian(shape, rank=rank, rng=source()), oracle.gaussian(*draws((rank, width)), out)),
        (
            orthogonal(shape, rank=rank, rng=source()),
            oracle.orthogonal(*draws((rank, rank), (width, rank // 2), (out, rank // 2))),
        ),
        (
            etf(shape, rank=rank, rounds=7, rng=source()),
            oracle.etf(*draws((rank, width), dtype=torch.float64), out, rounds=7),
        ),
    ):
        for ours, theirs in zip(made, expected):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)


def test_pissa_takes_and_milora_leaves_the_best_approximation():
    A, B = pissa(W, rank=3, scaling=0.5)
    tail = torch.linalg.svdvals(W)[3:].square().sum()
    torch.testing.assert_close((W - 0.5 * B @ A).square().sum(), tail, rtol=1e-4, atol=1e-5)
    A, B = milora(W, rank=7)
    torch.testing.assert_close(W - B @ A, oracle_best(W, 3), atol=1e-5, rtol=1e-4)
    fast, exact = pissa(W, rank=3, fast=True), pissa(W, rank=3)
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], atol=1e-5, rtol=1e-4)


def oracle_best(M, rank):
    U, S, Vh = torch.linalg.svd(M)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def peft_start(init, rank=4, alpha=8, **options):
    """Return A, B, the shifted weight and the original one of a linear layer that PEFT started itself."""
    model = torch.nn.Sequential(torch.nn.Linear(10, 14, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(W)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, **options)
    if init == "lora_ga":
        # One batch of the identity: the gradient of <G, W> is G itself.
        preprocess_loraga(model, config, lambda: (model(torch.eye(10)) * G.T).sum().backward())
    layer = get_peft_model(model, config).base_model.model[0]
    factors = (layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach())
    return factors, layer.base_layer.weight.detach()


@pytest.mark.parametrize(("init", "ours"), [("pissa", pissa), ("olora", olora), ("mica", mica)])
def test_starts_equal_those_of_peft(init, ours):
    (A, B), shifted = peft_start(init)
    scaling = {"scaling": 2.0} if init == "pissa" else {}
    made = ours(W, rank=4, **scaling)
    same_product(made, (A.numpy(), B.numpy()))
    torch.testing.assert_close(W - 2.0 * made[1] @ made[0], shifted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_equals_that_of_peft():
    (A, B), _ = peft_start("lora_ga", lora_ga_config=LoraGAConfig())
    made = lora_ga(G, rank=4)
    for ours, theirs in zip(made, (A, B)):
        torch.testing.assert_close(ours.abs(), theirs.abs(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("direction", "for_A", "for_B"),
    [("ArB2r", [0, 1], [2, 3]), ("A2rBr", [2, 3], [0, 1]), ("ArBr", [1, 3], [0, 2])],
)
def test_lora_ga_gives_each_factor_its_directions(direction, for_A, for_B):
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    for scale, size in (("unit", 1.0), ("stable", 5**0.25 / 4)):
        A, B = lora_ga(torch.diag(values), rank=2, direction=direction, scale=scale)
        torch.testing.assert_close(A.abs(), torch.eye(5)[for_A])
        torch.testing.assert_close(B.abs(), size * values[for_B] * torch.eye(5)[:, for_B])
        A, B = lora_ga(torch.diag(values), rank=2, direction=direction, scale=scale, convention="authors")
        torch.testing.assert_close(A.abs(), size * torch.eye(5)[for_A])
        torch.testing.assert_close(B.abs(), size * torch.eye(5)[:, for_B])


def test_corda_raises_its_damping_until_the_moment_can_be_inverted():
    # A moment of rank one, and a damping that float64 cannot see beside it.
    A, B = corda(W, torch.ones(10, 10), rank=10, damping=1e-19)
    assert float((B @ A - W).norm() / W.norm()) < 0.1
    with pytest.raises(ModicumError, match="cannot invert .* with damping 1e-99. Use 0.01"):
        corda(W, torch.ones(10, 10), rank=10, damping=1e-99)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_draws_have_the_distribution_of_peft(init):
    model = torch.nn.Sequential(torch.nn.Linear(400, 30))
    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=True if init == "default" else "gaussian")
    theirs = get_peft_model(model, config).base_model.model[0].lora_A["default"].weight.detach()
    ours, B = adapter_init[init].function(torch.empty(30, 400, device="meta"), rank=16, rng=generator(0, "x"))
    assert not B.any()
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)
    assert float(ours.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.3)


def test_orthogonal_starts_with_both_factors_and_no_product():
    A, B = orthogonal(torch.empty(14, 10, device="meta"), rank=4)
    assert float((B @ A).abs().max()) < 1e-6 and A.any() and B.any()
    with pytest.raises(UnsupportedError, match="even rank, got 3"):
        orthogonal(W, rank=3)


def test_orthogonal_draws_have_the_size_of_pefts():
    model = torch.nn.Sequential(torch.nn.Linear(300, 200))
    config = LoraConfig(r=16, target_modules=["0"], init_lora_weights="orthogonal")
    layer = get_peft_model(model, config).base_model.model[0]
    ours = orthogonal(torch.empty(200, 300, device="meta"), rank=16, rng=generator(0, "x"))
    for made, theirs in zip(ours, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)):
        assert float(made.std()) == pytest.approx(float(theirs.detach().std()), rel=0.1)


def test_etf_is_tight_with_equal_columns():
    A, B = etf(torch.empty(14, 10, device="meta"), rank=4)
    torch.testing.assert_close(3 * A @ A.T, torch.eye(4), atol=1e-5, rtol=0)
    norms = A.norm(dim=0)
    assert float(norms.max() / norms.min()) < 1.001 and not B.any()
    with pytest.raises(UnsupportedError, match="at most the 10 inputs"):
        etf(W, rank=11)


def test_eva_takes_the_directions_of_largest_variance():
    A, B = eva(torch.diag(torch.arange(10.0)), W, rank=3)
    torch.testing.assert_close(A.abs(), torch.eye(10)[[9, 8, 7]], atol=1e-6, rtol=0)
    assert B.shape == (14, 3) and not B.any()


def test_core_methods_give_orthogonal_frames():
    A, frame = lora_xs(W, rank=3)
    torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(frame @ A, oracle_best(W, 3), atol=1e-5, rtol=1e-4)
    A, frame = lora_sb(G, rank=3)
    torch.testing.assert_close(frame.T @ frame, torch.eye(3), atol=1e-5, rtol=0)
    S = torch.linalg.svdvals(G)[:3]
    torch.testing.assert_close(frame.T @ -G @ A.T, torch.diag(S), atol=1e-4, rtol=1e-4)


def test_kpm_takes_the_other_end_of_cordas_spectrum():
    C = moment(10)
    A, B = corda(W, C, rank=10, mode="ipm")
    torch.testing.assert_close(B @ A, W, atol=1e-4, rtol=1e-3)
    first, last = (corda(W, C, rank=5, mode=mode) for mode in ("ipm", "kpm"))
    torch.testing.assert_close(first[1] @ first[0] + last[1] @ last[0], W, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("function", [pissa, milora, olora, mica, lora_xs])
def test_a_rank_beyond_the_weight_is_refused(function):
    with pytest.raises(UnsupportedError, match="rank 11"):
        function(W, rank=11)


@pytest.mark.parametrize("function", [lora_ga, lora_one, lora_sb])
def test_a_useless_gradient_is_refused(function):
    with pytest.raises(ModicumError, match="zero or not finite"):
        function(torch.zeros(8, 8), rank=2)
    with pytest.raises(ModicumError, match="zero or not finite"):
        function(torch.full((8, 8), torch.nan), rank=2)
    with pytest.raises(ModicumError, match="directions"):
        function(torch.ones(8, 2), rank=4)


def test_draws_are_named():
    shape = torch.empty(6, 5, device="meta")
    for function in (default, gaussian, etf):
        draws = [function(shape, rank=2, rng=generator(0, name))[0] for name in ("a", "a", "b")]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
