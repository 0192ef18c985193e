"""The kernel of HRP: against a dense decomposition, the closed-form cases, and the laws."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.adapters import Preheat, hrp_factors
from modicum.adapters import hrp as hrp_module
from modicum.adapters.angles import captured, principal_angles
from modicum.adapters.hrp import factor_svd
from modicum.adapters.squeeze import lora_squeeze
from modicum.errors import ModicumError
from modicum.linalg import product_svd
from modicum.random import generator
from oracles import hrp as oracle


def preheated(R, width, out, seed=0, dtype=torch.float64):
    rng = generator(seed, "test", R, width, out)
    return torch.randn(R, width, generator=rng, dtype=dtype), torch.randn(out, R, generator=rng, dtype=dtype)


shapes = st.tuples(st.integers(1, 6), st.integers(6, 12), st.integers(6, 12), st.integers(0, 10**6))


@pytest.mark.oracle("adapter_inits", "hrp", "lora_squeeze")
@pytest.mark.parametrize("init_factor", ["A", "B", "balanced"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_factors_equal_those_of_a_dense_decomposition(init_factor, dtype, tolerance):
    A, B = (factor.to(dtype) for factor in preheated(8, 20, 15))
    made = hrp_factors(A, B, rank=3, init_factor=init_factor)
    if init_factor == "balanced":
        assert all(torch.equal(a, b) for a, b in zip(lora_squeeze(A, B, rank=3), made))
    expected = oracle.hrp(A.double().numpy(), B.double().numpy(), 3, init_factor)
    for ours, theirs in zip(made, expected):
        ours = ours.double().numpy()
        # A singular vector's sign is free: compare what does not depend on it.
        np.testing.assert_allclose(
            ours.T @ ours if ours.shape[0] == 3 else ours @ ours.T,
            theirs.T @ theirs if theirs.shape[0] == 3 else theirs @ theirs.T,
            atol=tolerance * max(1, abs(theirs).max() ** 2),
        )
    np.testing.assert_allclose(
        (made[1].double() @ made[0].double()).numpy(), expected[1] @ expected[0], atol=tolerance * 60
    )
    assert [factor.dtype for factor in made] == [dtype, dtype]


@given(shapes)
def test_the_decomposition_reproduces_the_product_with_orthonormal_vectors(shape):
    R, width, out, seed = shape
    A, B = preheated(R, width, out, seed)
    U, S, V = factor_svd(A, B)
    np.testing.assert_allclose(((U * S) @ V.mT).numpy(), (B @ A).numpy(), atol=1e-10)
    for vectors in (U, V):
        np.testing.assert_allclose((vectors.mT @ vectors).numpy(), np.eye(R), atol=1e-10)
    np.testing.assert_allclose(S.numpy(), np.linalg.svd((B @ A).numpy())[1][:R], atol=1e-10)


@pytest.mark.parametrize("rank", [None, 3])
def test_each_left_vectors_largest_entry_is_positive(rank):
    for seed in range(4):
        U, _, _ = factor_svd(*preheated(6, 11, 9, seed), rank=rank)
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_direction_counts_as_missing_by_its_share_of_the_largest():
    for scale in (1e-4, 1.0, 1e4):
        A, B = factors_of_spectrum([scale, 0.1 * scale, 1e-3 * scale])
        hrp_factors(A, B, rank=2, rtol=1e-2, on_deficient="error")
        with pytest.raises(ModicumError, match=r"2 directions above rtol=0.01, expected rank=3"):
            hrp_factors(A, B, rank=3, rtol=1e-2, on_deficient="error")


def factors_of_spectrum(values, width=30, out=24, seed=0):
    """Factors whose product has these singular values."""
    rng = generator(seed, "spectrum", len(values))
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=rng, dtype=torch.float64)).Q for n in (out, width)
    )
    mixed = torch.randn(len(values), len(values), generator=rng, dtype=torch.float64)
    return mixed @ right.T, left * torch.as_tensor(values, dtype=torch.float64) @ torch.linalg.inv(mixed)


@pytest.mark.parametrize("values", [[8, 4, 2, 1], [1, 1e-2, 1e-3, 1e-4], [1, 1e-5, 1e-9, 1e-11], [1, 1, 0, 0], [0] * 4])
def test_leading_vectors_alone_are_as_exact_whatever_the_condition(values, monkeypatch):
    A, B = factors_of_spectrum(values)
    slow = []
    monkeypatch.setattr(hrp_module, "product_svd", lambda *some: slow.append(len(some[0])) or product_svd(*some))
    U, S, V = factor_svd(A, B, rank=3)
    assert bool(slow) == (values[2] < 1e-4 * values[0] or values[0] == 0)
    for vectors in (U, V):
        np.testing.assert_allclose((vectors.mT @ vectors).numpy(), np.eye(3), atol=1e-7)
    np.testing.assert_allclose(S.numpy(), values, rtol=1e-5, atol=1e-7 * values[0])
    np.testing.assert_allclose((B @ A @ V).numpy(), (U * S[:3]).numpy(), atol=1e-7)
    np.testing.assert_allclose((A.mT @ (B.mT @ U)).numpy(), (V * S[:3]).numpy(), atol=1e-7)


def test_only_the_ill_conditioned_members_of_a_stack_take_the_slow_way(monkeypatch):
    pairs = [factors_of_spectrum(values) for values in ([4, 3, 2, 1], [1, 1e-9, 1e-10, 0], [9, 5, 2, 1])]
    slow = []
    monkeypatch.setattr(hrp_module, "product_svd", lambda *some: slow.append(len(some[0])) or product_svd(*some))
    A, B = (torch.stack([pair[side] for pair in pairs]) for side in (0, 1))
    U, S, V = factor_svd(A, B, rank=2)
    assert slow == [1]
    np.testing.assert_allclose((B @ A @ V).numpy(), (U * S[:, None, :2]).numpy(), atol=1e-10)


def test_a_stack_is_decomposed_like_its_members():
    pairs = [preheated(4, 9, 7, seed) for seed in range(3)]
    stacked = factor_svd(torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs]))
    for index, (A, B) in enumerate(pairs):
        for ours, alone in zip(stacked, factor_svd(A, B)):
            torch.testing.assert_close(ours[index], alone)


@given(shapes)
def test_rows_are_orthogonal_of_the_asked_length_and_the_other_factor_is_zero(shape):
    R, width, out, seed = shape
    A, B = preheated(R, width, out, seed)
    for init_factor, side in (("A", 0), ("B", 1)):
        for scale, squared in (("match", 1 / 3), ("unit", 1.0), (2.0, 4.0)):
            made = hrp_factors(A, B, rank=R, init_factor=init_factor, scale=scale)
            vectors = made[side] if side == 0 else made[side].T
            np.testing.assert_allclose((vectors @ vectors.T).numpy(), squared * np.eye(R), atol=1e-9)
            assert not made[1 - side].any()


@given(shapes)
def test_signs_and_order_of_the_preheated_directions_do_not_matter(shape):
    R, width, out, seed = shape
    A, B = preheated(R, width, out, seed)
    rng = generator(seed, "flip")
    order = torch.randperm(R, generator=rng)
    sign = (torch.randint(0, 2, (R,), generator=rng) * 2 - 1).double()
    first = hrp_factors(A, B, rank=R)[0]
    second = hrp_factors((sign[:, None] * A)[order], (B * sign)[:, order], rank=R)[0]
    torch.testing.assert_close(first, second, atol=1e-7, rtol=0)


@given(shapes)
def test_inputs_are_not_changed(shape):
    A, B = preheated(*shape)
    copies = A.clone(), B.clone()
    hrp_factors(A, B, rank=1, init_factor="balanced")
    assert torch.equal(A, copies[0]) and torch.equal(B, copies[1])


def test_match_has_the_length_of_the_usual_start():
    usual = torch.nn.Linear(300, 8, bias=False).weight.detach()  # U(-1/sqrt(in), 1/sqrt(in)), as PEFT's
    ours = hrp_factors(*preheated(16, 300, 40), rank=8)[0]
    assert float(ours.norm()) == pytest.approx((8 / 3) ** 0.5)
    assert float(ours.norm()) == pytest.approx(float(usual.norm()), rel=0.05)


def test_balanced_keeps_the_best_approximation_of_the_product():
    A, B = preheated(8, 20, 15)
    lora_A, lora_B = hrp_factors(A, B, rank=3, init_factor="balanced")
    S = torch.linalg.svdvals(B @ A)
    assert float(((B @ A) - lora_B @ lora_A).square().sum()) == pytest.approx(float(S[3:].square().sum()))


@pytest.mark.parametrize("init_factor", ["A", "B", "balanced"])
def test_missing_directions_are_completed_orthogonally_and_can_learn(init_factor):
    A, B = preheated(6, 12, 10)
    B[:, 2:] = 0  # two directions were learned
    lora_A, lora_B = hrp_factors(A, B, rank=4, init_factor=init_factor, scale="unit")
    vectors = lora_B.T if init_factor == "B" else lora_A
    gram = vectors @ vectors.T
    np.testing.assert_allclose((gram - torch.diag(gram.diagonal())).numpy(), 0, atol=1e-9)
    found = torch.linalg.svd(B @ A)[0 if init_factor == "B" else 2]
    found = found[:, :2].T if init_factor == "B" else found[:2]
    assert float(principal_angles(vectors[:2], found).max()) < 1e-6
    # A rank-1 component whose two halves are both zero has no gradient at all.
    assert bool(((lora_A.norm(dim=1) + lora_B.norm(dim=0)) > 0.1).all())
    with pytest.raises(ModicumError, match=r"2 directions .* expected rank=4"):
        hrp_factors(A, B, rank=4, init_factor=init_factor, on_deficient="error")


def test_completion_depends_on_its_generator_only():
    A, B = preheated(6, 12, 10)
    B[:, 2:] = 0
    state = torch.get_rng_state()
    draws = [hrp_factors(A, B, rank=4, generator=generator(seed, "x"))[0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(hrp_factors(A, B, rank=4)[0], hrp_factors(A, B, rank=4)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_auto_follows_what_was_trained_and_right_vectors_of_a_frozen_a_warn():
    A, B = preheated(6, 12, 10)
    assert not hrp_factors(A, B, rank=2, init_factor="auto", train_factors="B")[0].any()
    assert not hrp_factors(A, B, rank=2, init_factor="auto", train_factors="A")[1].any()
    with pytest.warns(UserWarning, match="frozen A"):
        hrp_factors(A, B, rank=2, init_factor="A", train_factors="B")


@pytest.mark.parametrize("init_factor", ["A", "B", "balanced"])
def test_a_directions_sign_does_not_change_the_training_that_follows(init_factor):
    A, B = preheated(6, 12, 10)
    start = hrp_factors(A, B, rank=3, init_factor=init_factor)
    flip = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    target = preheated(6, 12, 10, seed=1)
    products = []
    for sign in (torch.ones(3, dtype=torch.float64), flip):
        factors = [(sign[:, None] * start[0]).requires_grad_(), (start[1] * sign).requires_grad_()]
        optimizer = torch.optim.AdamW(factors, lr=0.05, weight_decay=0.0)
        for _ in range(5):
            optimizer.zero_grad()
            (factors[1] @ factors[0] - target[1] @ target[0]).square().sum().backward()
            optimizer.step()
        products.append((factors[1] @ factors[0]).detach())
    torch.testing.assert_close(products[0], products[1], atol=1e-10, rtol=0)
    assert float((products[0] - start[1] @ start[0]).norm()) > 0.1


# The closed-form cases of the matrix model: loss = |B A - M|^2 / 2.


def spectrum_model(n, power, seed):
    rng = generator(seed, "model", n)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q for _ in range(2))
    return (U * torch.arange(1, n + 1, dtype=torch.float64) ** -power) @ V.T


def preheat_left(M, R, seed):
    """Train B to convergence with a frozen random A: B A becomes M projected on A's rows."""
    A = torch.randn(R, M.shape[1], generator=generator(seed, "A", R), dtype=torch.float64)
    return A, M @ torch.linalg.pinv(A)


def test_one_gradient_step_of_b_gives_the_gradients_left_space():
    rng = generator(0, "step")
    G, A = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((10, 12), (4, 12)))
    lora_A, lora_B = hrp_factors(A, -0.1 * G @ A.T, rank=4, init_factor="B", train_factors="B")
    assert not lora_A.any()
    assert float(principal_angles(lora_B.T, (G @ A.T).T).max()) < 1e-6


def test_left_vectors_of_a_preheat_left_find_the_whole_range_of_a_low_rank_change():
    M = spectrum_model(24, 1.0, 0)
    U, S, Vh = torch.linalg.svd(M)
    low = (U[:, :3] * S[:3]) @ Vh[:3]
    lora_B = hrp_factors(*preheat_left(low, 6, 1), rank=3, init_factor="B", train_factors="B")[1]
    assert float(1 - captured(low.T, lora_B.T)) < 1e-12


def test_full_rank_preheating_finds_the_leading_right_vectors():
    M = spectrum_model(16, 1.0, 2)
    with pytest.warns(UserWarning, match="frozen A"):
        lora_A = hrp_factors(*preheat_left(M, 16, 3), rank=4, train_factors="B")[0]
    S = torch.linalg.svdvals(M)
    assert float(principal_angles(lora_A, torch.linalg.svd(M)[2][:4]).max()) < 1e-5
    assert float(captured(M, lora_A)) == pytest.approx(float(S[:4].square().sum() / S.square().sum()))


def test_a_rank_one_change_is_seen_through_the_projection_on_the_preheated_rows():
    rng = generator(4, "one")
    u, v = (torch.nn.functional.normalize(torch.randn(20, generator=rng, dtype=torch.float64), dim=0) for _ in "uv")
    A, B = preheat_left(3.0 * torch.outer(u, v), 5, 4)
    with pytest.warns(UserWarning, match="frozen A"):
        direction = hrp_factors(A, B, rank=1, scale="unit", train_factors="B")[0][0]
    overlap = float((direction @ v).abs())
    projected = float((torch.linalg.pinv(A) @ A @ v).norm())
    rows = (torch.nn.functional.normalize(A, dim=1) @ v).abs()
    assert overlap == pytest.approx(projected)
    assert overlap >= float(rows.max())


def test_captured_energy_rises_with_the_preheating_rank_and_beats_a_random_start():
    """Mean over seeds, b = 64, r = 4, as the theorem says; right vectors of a frozen-A preheat."""
    share = {R: [] for R in (4, 8, 16, 32, 64)}
    for seed in range(60):
        M = spectrum_model(64, 1.0, seed)
        for R in share:
            A, B = preheat_left(M, R, seed)
            share[R].append(float(captured(M, factor_svd(A, B).V[:, :4].T)))
    means = [np.mean(values) for values in share.values()]
    errors = [np.std(values) / len(values) ** 0.5 for values in share.values()]
    assert all(later > earlier for earlier, later in pairwise(means))
    assert means[0] == pytest.approx(4 / 64, abs=3 * errors[0])


def test_residuals_match_the_committed_table_of_the_matrix_model():
    """256 x 256, r = 8, singular values 1/i; residual energy after the optimal main stage, for two of the columns."""
    expected = {("A", 32): 0.878, ("B", 32): 0.091, ("A", 128): 0.533, ("B", 128): 0.072}
    for (side, R), mean in expected.items():
        found = []
        for seed in range(3):
            M = spectrum_model(256, 1.0, seed)
            U, _, V = factor_svd(*preheat_left(M, R, seed))
            found.append(1 - float(captured(M, V[:, :8].T) if side == "A" else captured(M.T, U[:, :8].T)))
        assert np.mean(found) == pytest.approx(mean, abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number above 0"),
        ({"rank": 5}, "rank is 5, expected at most the preheated rank 4"),
        ({"A": torch.zeros(4, 6)}, "product is zero"),
        ({"A": torch.full((4, 6), torch.nan)}, "A holds NaN"),
        ({"B": torch.full((6, 4), torch.inf)}, "B holds NaN or infinite"),
        ({"B": torch.ones(6, 3)}, r"A is \(4, 6\) and B \(6, 3\), expected A \(R, in\) and B \(out, R\)"),
        ({"scale": "big"}, "scale is 'big', expected 'match' or 'unit' or a number above 0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"init_factor": "C"}, "init_factor is 'C'. Known: A, B, auto, balanced"),
        ({"on_deficient": "ignore"}, "on_deficient is 'ignore'. Known: complete, error"),
        ({"train_factors": "none"}, "train_factors is 'none'. Known: A, B, both"),
        ({"rtol": 1.0}, "rtol is 1.0, expected a number in \\[0, 1\\)"),
    ],
)
def test_what_is_wrong_is_said(change, message):
    A, B = preheated(4, 6, 6, dtype=torch.float32)
    arguments = {"A": A, "B": B, "rank": 2} | change
    with pytest.raises(ModicumError, match=message):
        hrp_factors(arguments.pop("A"), arguments.pop("B"), **arguments)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"preheat_lr": 0.0}, "preheat_lr is 0.0, expected a number above 0"),
        ({"preheat_optimizer": "lion"}, "preheat_optimizer is 'lion'. Known: adamw, same, sgd"),
        ({"train_factors": "C"}, "train_factors is 'C'"),
        ({"reuse_data": "never"}, "reuse_data is 'never'"),
        ({"rank_redistribution": "all"}, "rank_redistribution is 'all'"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(knobs, message):
    with pytest.raises(ModicumError, match=message):
        Preheat(**knobs)


def test_one_by_one_is_a_case():
    lora_A, lora_B = hrp_factors(torch.tensor([[2.0]]), torch.tensor([[-3.0]]), rank=1, init_factor="balanced")
    assert float(lora_B @ lora_A) == pytest.approx(-6.0)


def test_the_stage_derives_its_rank_and_length():
    assert Preheat().rank_for(8) == 128
    assert Preheat().rank_for(300) == 300  # never below the adapter's
    assert Preheat(preheat_rank=16).rank_for(8) == 16
    assert [Preheat().steps_for(total) for total in (None, 100, 1000, 100_000)] == [50, 10, 20, 50]
    with pytest.raises(ModicumError, match="preheat_rank is 4, expected at least the adapter's rank 8"):
        Preheat(preheat_rank=4).rank_for(8)
    with pytest.raises(ModicumError, match="preheat_steps is 0"):
        Preheat(preheat_steps=0).steps_for(None)
