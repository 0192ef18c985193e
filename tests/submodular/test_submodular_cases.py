"""The exact cases: small objectives whose every number is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from modicum.submodular import (
    MAOSEA,
    MAOSMA,
    MASPL,
    OSG,
    FacilityLocation,
    ProbabilisticCoverage,
    complete,
    grid,
    kl_capped_simplex_step,
    lazy_weights,
    metropolis_weights,
    path,
    policy_surrogate_grad_exact,
    project_capped_simplex,
    ring,
    sample_scale,
    second_modulus,
    sequential_greedy,
    simulate,
    star,
    surrogate_grad_exact,
    surrogate_ratio,
)

DELTA, EPS = 0.01, 0.1
GADGET = FacilityLocation([[1, 0, 0, 0], [0, 1, 1, 0], [0, DELTA, 0, 0], [0, 0, 0, EPS]])
BLOCKS = [[0, 1], [2, 3]]
HALVES = torch.full((2, 2), 0.5, dtype=torch.float64)
CORNER = [[0.0, 1, 0, 1], [0, 1, 0, 1]]


def close(found, expected, tolerance=1e-8):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance)


def after(policy, f, rounds):
    for _ in range(rounds):
        policy.act()
        policy.update(f)
    return policy.x


def test_facility_location_by_hand():
    f = FacilityLocation([[3, 1, 0], [0, 2, 2]])
    values = f.value([[True, False, False], [True, True, False], [True, True, True], [False] * 3])
    assert values.tolist() == [3, 5, 5, 0] and f.curvature() == 1
    x = (0.5, 0.25, 0.5)
    close(f.multilinear(x), 2.875)
    close(f.multilinear_grad(x), (2.75, 1.5, 1.5))
    close(surrogate_grad_exact(f, x, c=1), (1.8043918162, 1.3445425147, 1.0803013971), 1e-9)
    close(surrogate_grad_exact(f, x, c=0.5), (2.2542853820, 1.7216320834, 1.3608160417), 1e-9)
    close(surrogate_grad_exact(f, x, c=0), (2.875, 2.25, 1.75), 1e-9)


def test_coverage_by_hand():
    f = ProbabilisticCoverage([[0.5, 0.2, 0], [0, 0.4, 1]], weights=(1, 2))
    close(f.value([True, True, False]), 1.4)
    close(f.curvature(), 0.9)
    x = (0.3, 0.6, 0.5)
    close(f.multilinear(x), 1.492)
    close(f.multilinear_grad(x), (0.44, 0.57, 1.52))
    close(surrogate_grad_exact(f, x, c=1), (0.2939875129, 0.4739323991, 1.0876589859), 1e-9)


def test_the_gadget_at_a_corner_that_traps_the_plain_gradient():
    x = CORNER[0]
    close(GADGET.multilinear_grad(x), (1, 1.01, 0, 0.1))
    e = 1 / math.e
    close(surrogate_grad_exact(GADGET, x, c=1), (1 - e, (1 + DELTA) * (1 - e), 1 - 2 * e, EPS * (1 - e)), 1e-10)
    assert GADGET.curvature() == 1


def test_the_gadget_at_an_even_point():
    x = [0.2] * 4
    close(GADGET.multilinear(x), 0.582)
    close(GADGET.multilinear_grad(x), (1, 0.81, 0.8, 0.1))
    for c, expected in (
        (1, (0.6321205588, 0.5648658762, 0.5585446706, 0.0632120559)),
        (0.5, (0.7869386806, 0.7095835396, 0.7017141528, 0.0786938681)),
        (0, (1, 0.91, 0.9, 0.1)),
    ):
        close(surrogate_grad_exact(GADGET, x, c=c), expected, 1e-9)
    close(policy_surrogate_grad_exact(GADGET, x, BLOCKS), (1, 0.5685446706, 0.5585446706, 0.1), 1e-9)


def test_without_the_surrogate_the_corner_holds_for_ever():
    policy = MAOSMA(BLOCKS, HALVES, eta=0.1, gradient="exact", surrogate=False)
    policy.x = CORNER
    close(after(policy, GADGET, 200), CORNER, 0)


def test_with_the_surrogate_the_second_agent_leaves_the_corner():
    policy = MAOSMA(BLOCKS, HALVES, eta=0.1, gradient="exact")
    policy.x = CORNER
    for own, copy in (
        ((0.0100514531, 0.9899485469), 0),
        ((0.0150771796, 0.9849228204), 0.0050257265),
        ((0.0201029062, 0.9798970938), 0.0100514531),
    ):
        x = after(policy, GADGET, 1)
        close(x[1, 2:], own, 1e-9)
        close(x[0, :2], (0, 1), 0)
        close(x[0, 2], copy, 1e-9)
    close(after(policy, GADGET, 397), [[1, 0, 1, 0]] * 2)
    assert simulate(policy, GADGET, rounds=1).utility[0] == 2


def test_one_round_moves_by_half_the_difference_and_only_below_a_bound():
    policy = MAOSMA(BLOCKS, HALVES, eta=0.03, gradient="exact")
    policy.x = CORNER
    e = 1 / math.e
    close(after(policy, GADGET, 1)[1, 2], 0.03 * (1 - 2 * e - EPS * (1 - e)) / 2, 1e-12)
    for eps, leaves in ((0.418, True), (0.4181, False), (0.45, False)):
        f = FacilityLocation([[1, 0, 0, 0], [0, 1, 1, 0], [0, DELTA, 0, 0], [0, 0, 0, eps]])
        policy = MAOSMA(BLOCKS, HALVES, eta=0.1, gradient="exact")
        policy.x = CORNER
        after(policy, f, 1)
        assert (float(policy.x[1, 2]) > 0) is leaves
    after(policy, f, 400)
    close(simulate(policy, f, rounds=1).utility, [1.46], 1e-12)


def test_ma_osma_from_its_own_block():
    policy = MAOSMA(BLOCKS, HALVES, eta=0.1, gradient="exact", init="own")
    close(
        after(policy, GADGET, 1), [[0.3132120559, 0.3138441764, 0.25, 0.25], [0.25, 0.25, 0.3132120559, 0.2563212056]]
    )
    close(
        after(policy, GADGET, 1),
        [
            [0.3448180838, 0.3365692786, 0.2816060279, 0.2531606028],
            [0.2816060279, 0.2819220882, 0.3356210978, 0.2594818084],
        ],
    )


def expected_utility(policy):
    p = policy.probabilities().tolist()
    f = [[float(GADGET.value([a == 0, a == 1, b == 0, b == 1])) for b in (0, 1)] for a in (0, 1)]
    return sum(p[a] * p[2 + b] * f[a][b] for a in (0, 1) for b in (0, 1))


@pytest.mark.parametrize(
    ("consensus", "weights", "expected"),
    [
        ("paper", HALVES, {0: 1.305, 1: 1.3247059, 2: 1.3339418, 10: 1.3857672, 50: 1.8232763, 100: 2.0}),
        ("owner", HALVES, {0: 1.305, 1: 1.3162143, 2: 1.3280679, 10: 1.4487712, 50: 2.0, 100: 2.0}),
        ("paper", torch.eye(2), {200: 1.4424201}),
    ],
)
def test_expected_utility_of_the_gadget(consensus, weights, expected):
    policy = MAOSMA(BLOCKS, weights, eta=0.1, gradient="exact", consensus=consensus)
    for number in range(max(expected) + 1):
        if number in expected:
            close(expected_utility(policy), expected[number], 6e-8)
        policy.update(GADGET)


def test_ma_osea_from_its_own_block():
    policy = MAOSEA(BLOCKS, HALVES, eta=1, gamma=0.1, mix="per_block", gradient="exact", init="own")
    close(
        after(policy, GADGET, 1),
        [[0.4984197039, 0.5015802961, 0.275, 0.275], [0.275, 0.275, 0.5174390066, 0.2929444948]],
    )
    close(
        after(policy, GADGET, 1),
        [
            [0.5228038751, 0.4771961249, 0.4065975530, 0.3055750227],
            [0.3980388667, 0.3994611333, 0.6799126089, 0.3200873911],
        ],
    )


def test_ma_spl_from_everywhere():
    policy = MASPL(BLOCKS, HALVES, eta=0.1, gradient="exact", init="all")
    close(after(policy, GADGET, 1), [[0.5270909581, 0.4729090419, 0.5, 0.5], [0.5, 0.5, 0.5174090419, 0.4825909581]])
    close(
        after(policy, GADGET, 1),
        [
            [0.5406364371, 0.4593635629, 0.5087045210, 0.4912954790],
            [0.5135454790, 0.4864545210, 0.5261135629, 0.4738864371],
        ],
    )
    close(policy_surrogate_grad_exact(GADGET, [0.5] * 4, BLOCKS), (1, 0.4581808382, 0.4481808382, 0.1), 1e-9)
    close(policy_surrogate_grad_exact(GADGET, CORNER[0], BLOCKS), (1, 0.6421205588, 0.2642411177, 0.1), 1e-9)


def test_three_agents_on_a_path():
    f = FacilityLocation(
        [[0.9, 0.1, 0.4, 0.2, 0.7], [0.2, 0.8, 0.3, 0.6, 0.1], [0.5, 0.5, 0.1, 0.9, 0.3]], weights=(1, 2, 1)
    )
    blocks, W = [[0, 1], [2], [3, 4]], metropolis_weights(path(3))
    best = simulate(MASPL(blocks, W, eta=1), f, rounds=1, optimum="exact")
    close(best.optimum, [3.0])
    assert best.optimum_actions.tolist() == [[0, 0, 0]]
    osma = MAOSMA(blocks, W, c=0.8, eta=0.2, init="all", gradient="exact")
    osea = MAOSEA(blocks, W, eta=0.5, gamma=0.05, init="own", gradient="exact")
    for policy, first, second in (
        (osma, (0.4734323505, 0.5265676495, 1, 0.5537068927, 0.4462931073),
         (0.4550559094, 0.5449440906, 1, 0.5902257222, 0.4097742778)),
        (osea, (0.4684360016, 0.5315639984, 0.5191119055, 0.5860515504, 0.4139484496),
         (0.4397759508, 0.5602240492, 0.5743960566, 0.6505439188, 0.3494560812)),
    ):  # fmt: skip
        for expected in (first, second):
            x = after(policy, f, 1)
            close(torch.cat([x[i, block] for i, block in enumerate(blocks)]), expected)


@pytest.mark.parametrize(
    ("c", "expected"),
    [(0, ((0.525, 0.475), (0.53, 0.47))), (1, ((0.5158030140, 0.4841969860), (0.5189636168, 0.4810363832)))],
)
def test_a_modular_objective_has_no_noise(c, expected):
    f = FacilityLocation(np.diag([1, 0.5, 0.8, 0.2]))
    policy = MAOSMA(BLOCKS, torch.eye(2), eta=0.1, c=c, gradient="sample", init="own")
    x = after(policy, f, 1)
    close(x[0, :2], expected[0])
    close(x[1, 2:], expected[1])
    assert f.curvature() == 0


@pytest.mark.parametrize("c", [0, 0.5, 1])
def test_the_sampled_gradient_is_unbiased(c):
    worlds = 20_000
    eta = 1e-3  # so small that no projection acts
    policy = MAOSMA(BLOCKS, torch.eye(2), eta=eta, c=c, seed=list(range(worlds)))
    policy.x = torch.full((worlds, 2, 4), 0.2)
    y = policy.x
    policy.update(GADGET)
    rows = ((policy.x - y) / eta)[:, [0, 0, 1, 1], [0, 1, 2, 3]]
    expected = surrogate_grad_exact(GADGET, [0.2] * 4, c=c)
    error = (rows.mean(0) - expected).abs()
    assert bool((error <= 4 * rows.std(0) / math.sqrt(worlds) + 1e-12).all())


def test_one_agent_with_a_modular_objective_is_hedge():
    f = FacilityLocation(np.diag([1, 0.5]))
    policy = MAOSEA([2], [[1.0]], c=0, gamma=0, allow_zero_mixing=True, eta=0.5)
    for t in range(1, 5):
        after(policy, f, 1)
        close(policy.probabilities()[0], 1 / (1 + math.exp(-0.25 * t)), 1e-12)
    close(policy.probabilities()[0], 0.7310585786, 1e-10)


def test_osg_alone():
    policy = OSG([2], horizon=8)
    close(policy.rates[0], (1.6651092223, 1.1774100226, 0.8325546112), 1e-9)
    close(policy.meta_rate, 0.3705759518, 1e-9)
    f = FacilityLocation(np.diag([1, 0.5]))
    for expected in (0.6290785059, 0.7222460319, 0.7817885784):
        policy.act()
        policy.update(f)
        close(policy.probabilities()[0], expected, 1e-9)


def test_sequential_greedy_falls_into_the_trap_in_one_order():
    first, second = sequential_greedy(GADGET, BLOCKS, order=(0, 1)), sequential_greedy(GADGET, BLOCKS, order=(1, 0))
    assert set(first) == {1, 3} and first.value == pytest.approx(1.11, abs=1e-12)
    assert set(second) == {0, 2} and second.value == 2


def test_weights_of_known_graphs():
    third = 1 / 3
    W = metropolis_weights(path(4))
    close(W[:2], [[2 * third, third, 0, 0], [third, third, third, 0]], 1e-15)
    close(metropolis_weights(star(4)).diagonal(), [0.25, 0.75, 0.75, 0.75], 1e-15)
    close(metropolis_weights(complete(5)), np.full((5, 5), 0.2), 1e-15)
    for weights, beta in (
        (W, 0.8047378541),
        (metropolis_weights(star(4)), 0.75),
        (metropolis_weights(complete(5)), 0),
        (metropolis_weights(ring(20)), 0.9673710109),
        (metropolis_weights(grid(3, 3)), 0.7674234615),
        (lazy_weights(W), 0.9023689271),
    ):
        close(second_modulus(weights), beta, 1e-9)
    for n in (3, 4, 7):
        close(second_modulus(metropolis_weights(ring(n))), max(0, 1 / 3 + 2 / 3 * math.cos(2 * math.pi / n)), 1e-12)


def test_projection_and_kl_step():
    points = [[0.5, 0.7, -0.2], [0.2, 0.3, 0.1], [1.2, 1.1, 0.9]]
    expected = [[0.4, 0.6, 0], [0.2, 0.3, 0.1], [0.4666666667, 0.3666666667, 0.1666666667]]
    close(project_capped_simplex(points), expected, 1e-10)
    close(project_capped_simplex([-1, -2]), [0, 0], 0)
    step = kl_capped_simplex_step([0.2, 0.3, 0.5], [1, 0, -1], eta=1)
    close(step, (0.5290564775, 0.2919435019, 0.1790000206), 1e-10)
    close(kl_capped_simplex_step([0.1, 0.1], [1, 0], eta=0.5), (0.1648721271, 0.1), 1e-10)
    close(kl_capped_simplex_step([0.5, 0.5], [1, 0], eta=1e4), (1, 0), 0)


def test_scales():
    close(sample_scale([0, 0.25, 0.5, 0.75, 1], c=1), (0, 0.3573740195, 0.6201145070, 0.8279889392, 1), 1e-10)
    close(sample_scale(0.5, c=0.5), 0.5618596072, 1e-10)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for c, mean in ((1, 0.5819767069), (0.5, 0.5414940825), (0, 0.5)):
        close(sample_scale(u, c=c).mean(), mean, 1e-8)
    assert bool(sample_scale(u, c=1e-12).isfinite().all())
    close([surrogate_ratio(0), surrogate_ratio(1)], [1, 0.6321205588], 1e-10)


def test_scales_follow_their_density():
    from scipy.stats import kstest

    from modicum.submodular.draws import keys, uniform

    u = uniform(keys([3], "scales", [0])[0], 7, 20_000)[0]
    for c in (0.3, 1.0):
        z = sample_scale(u, c=c).numpy()
        assert kstest(z, lambda z, c=c: np.expm1(c * z) / np.expm1(c)).pvalue > 1e-4


def test_a_hint_is_used_once_and_forgotten():
    policy = MAOSMA(BLOCKS, HALVES, eta=1, gradient="exact", consensus="owner")
    before = policy.x.clone()
    assert policy.act(hint=GADGET, rounds=50).tolist() == [0, 0]
    assert torch.equal(policy.x, before)
