import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zeroth_order_models import flat, matrix, task, tied, train

from modicum.errors import RecipeError
from modicum.optim import MeZO, TeZO
from modicum.optim.zeroth_order.lifts import direction
from modicum.optim.zeroth_order.moments import entry_adam, spsa_coefficient
from modicum.optim.zeroth_order.ranks import select_ranks
from modicum.registry import zeroth_order
from oracles import zeroth_order as oracle

VARIANTS = ["sgd", "momentum", "adam", "lion", "factor_adam"]


@pytest.mark.oracle("zeroth_order", "tezo")
@pytest.mark.parametrize("scale", ["unit", "none", "unbiased"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_its_formulas(variant, scale):
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = TeZO([("w", weight)], lr=1e-3, rank=3, variant=variant, scale=scale, seed=7)
    left, right = (factor.numpy() for factor in optimizer.leaves[0].basis)
    taus = [optimizer._coordinates((t, 0)).numpy() for t in range(30)]
    weights, kappas = oracle.tezo(loss, start, left, right, taus, lr=1e-3, rho=1e-3, variant=variant, scale=scale)
    for expected, kappa in zip(weights, kappas, strict=True):
        optimizer.step(lambda: loss(weight.detach()))
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(optimizer.kappas.item(), kappa, rtol=1e-8)


def test_without_bias_correction_the_moving_averages_start_small():
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = TeZO([("w", weight)], lr=1e-3, rank=3, variant="adam", bias_correction=False)
    left, right = (factor.numpy() for factor in optimizer.leaves[0].basis)
    taus = [optimizer._coordinates((t, 0)).numpy() for t in range(5)]
    weights, _ = oracle.tezo(loss, start, left, right, taus, lr=1e-3, rho=1e-3, variant="adam", correct=False)
    for _ in taus:
        optimizer.step(lambda: loss(weight.detach()))
    np.testing.assert_allclose(weight.detach().numpy(), weights[-1], rtol=1e-9)


def test_the_published_case_by_hand():
    left, right = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    z = direction(left, right, torch.tensor([2.0]))
    assert torch.equal(z, torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    for rho in (1e-2, 0.5, 3.0):
        kappa = spsa_coefficient((gradient * (rho * z)).sum(), (gradient * (-rho * z)).sum(), eps=rho)
        torch.testing.assert_close(kappa, torch.tensor(4.0))
        torch.testing.assert_close(kappa * z, torch.tensor([[0.0, 8.0], [0.0, 0.0]]))


@given(rho=st.floats(1e-3, 10.0), seed=st.integers(0, 1000))
def test_the_coefficient_of_a_quadratic_is_exact_at_any_radius(rho, seed):
    weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    gradient = 2 * weight.detach().clone()
    optimizer = TeZO([("w", weight)], lr=0.0, eps=rho, rank=2, seed=seed)
    optimizer.step(lambda: weight.detach().square().sum())
    left, right = optimizer.leaves[0].basis
    z = direction(left, right, optimizer._coordinates((0, 0)))
    torch.testing.assert_close(optimizer.kappas[0], (gradient * z).sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", ["sgd", "momentum", "factor_adam"])
def test_a_run_stays_in_the_span_of_its_factors(variant):
    weight, loss = matrix(9, 7)
    start = weight.detach().clone()
    optimizer = TeZO([("w", weight)], lr=1e-2, rank=3, variant=variant)
    for _ in range(40):
        optimizer.step(lambda: loss(weight.detach()))
    left, right = optimizer.leaves[0].basis
    change = (weight.detach() - start).flatten()
    span = torch.stack([torch.outer(left[:, s], right[:, s]).flatten() for s in range(3)], dim=1)
    residual = change - span @ torch.linalg.lstsq(span, change).solution
    assert change.norm() > 1e-2 and residual.norm() <= 1e-10 * change.norm()
    assert torch.linalg.matrix_rank((weight.detach() - start), atol=1e-9) <= 3


def test_entrywise_adam_leaves_the_span():
    weight, loss = matrix(9, 7)
    start = weight.detach().clone()
    optimizer = TeZO([("w", weight)], lr=1e-2, rank=3, variant="adam")
    for _ in range(10):
        optimizer.step(lambda: loss(weight.detach()))
    assert torch.linalg.matrix_rank(weight.detach() - start, atol=1e-9) > 3


def test_momentum_without_memory_is_the_plain_variant():
    plain, _, _ = train(TeZO, rank=3)
    forgetful, _, _ = train(TeZO, rank=3, variant="momentum", betas=(0.0, 0.99))
    assert torch.equal(flat(plain), flat(forgetful))


def test_adam_at_rank_one_is_dense_adam():
    weight, loss = matrix(6, 5)
    expected = weight.detach().numpy().copy()
    optimizer = TeZO([("w", weight)], lr=1e-2, rank=1, variant="adam")
    left, right = (factor.numpy() for factor in optimizer.leaves[0].basis)
    mean, square = np.zeros_like(expected), np.zeros_like(expected)
    for t in range(1, 201):
        z = np.outer(left[:, 0], right[:, 0]) * optimizer._coordinates((t - 1, 0)).item()
        g = oracle.coefficient(loss, expected, z, 1e-3) * z
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
        expected -= 1e-2 * (mean / (1 - 0.9**t)) / np.sqrt(square / (1 - 0.99**t) + 1e-8)
        optimizer.step(lambda: loss(weight.detach()))
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=0, atol=1e-9)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_the_variance_is_never_negative(rows, columns, rank, seed):
    rng = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=rng), torch.randn(columns, rank, generator=rng)
    mean, square = torch.randn(rank, generator=rng), torch.rand(rank, generator=rng)
    assert torch.isfinite(entry_adam(left, right, mean, square, eps=1e-8)).all()


def test_unit_and_none_are_one_method_at_converted_rates():
    rank = 3
    weight, loss = matrix(6, 5)
    other = nn.Parameter(weight.detach().clone())
    unit = TeZO([("w", weight)], lr=1e-2, eps=1e-3, rank=rank)
    none = TeZO([("w", other)], lr=1e-2 / rank, eps=1e-3 / rank**0.5, rank=rank, scale="none")
    for _ in range(50):
        unit.step(lambda: loss(weight.detach()))
        none.step(lambda: loss(other.detach()))
    torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "copies"), [("sgd", 0), ("momentum", 1), ("lion", 1), ("adam", 2), ("factor_adam", 2)]
)
def test_state_and_draws_are_as_small_as_claimed(variant, copies):
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-3, rank=4, variant=variant, vectors="freeze")
    optimizer.step(task(model))
    report = optimizer.report()
    assert report["coordinates"] == report["draws_per_step"] == 3 * 4
    assert report["state_numbers"] == copies * 12
    assert report["factor_bytes"] == 8 * 4 * ((11 + 8) + (12 + 8) + (8 + 12))
    optimizer = TeZO(model.named_parameters(), lr=1e-3, rank=4, variant=variant)
    optimizer.step(task(model))
    vectors = 8 + 8 + 12
    assert optimizer.report()["draws_per_step"] == 12 + vectors
    assert optimizer.report()["state_numbers"] == copies * (12 + vectors)


def test_equal_shapes_get_different_directions():
    a, b = (nn.Parameter(torch.zeros(4, 4, dtype=torch.float64)) for _ in range(2))
    optimizer = TeZO([("a", a), ("b", b)], lr=1e-2, rank=2)
    assert not torch.equal(optimizer.leaves[0].basis[0], optimizer.leaves[1].basis[0])


def test_directions_follow_names_not_order():
    a, b = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    one = TeZO([("a", a), ("b", b)], lr=1e-2, rank=2)
    two = TeZO([("b", b), ("a", a)], lr=1e-2, rank=2)
    assert torch.equal(one.leaves[0].basis[0], two.leaves[1].basis[0])


def test_a_refresh_draws_new_factors_and_forgets_the_moments():
    weight, loss = matrix(6, 5)
    optimizer = TeZO([("w", weight)], lr=1e-3, rank=2, variant="momentum", refresh_every=3)
    first = optimizer.leaves[0].basis[0].clone()
    for _ in range(3):
        optimizer.step(lambda: loss(weight.detach()))
    assert torch.equal(first, optimizer.leaves[0].basis[0])
    optimizer.step(lambda: loss(weight.detach()))
    assert not torch.equal(first, optimizer.leaves[0].basis[0])
    kappa, tau = optimizer.kappas[0], optimizer._coordinates((3, 0))
    torch.testing.assert_close(optimizer.memory[0], 0.1 * kappa * tau / 2**0.5)


def test_refreshing_reaches_what_one_subspace_cannot():
    def end(refresh_every):
        weight = nn.Parameter(torch.zeros(12, 12, dtype=torch.float64))
        target = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        optimizer = TeZO([("w", weight)], lr=2e-3, rank=2, refresh_every=refresh_every)
        for _ in range(1500):
            loss = optimizer.step(lambda: (weight.detach() - target).square().sum())
        return loss.item() / target.square().sum().item()

    assert end(50) < 0.75 < 0.9 < end(None)


def test_a_stack_of_experts_has_factors_for_each_expert():
    stack = nn.Parameter(torch.zeros(3, 5, 4, dtype=torch.float64))
    target = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for variant in VARIANTS:
        optimizer = TeZO([("experts", stack)], lr=1e-2, rank=2, variant=variant)
        assert [tuple(f.shape) for f in optimizer.leaves[0].basis] == [(3, 5, 2), (3, 4, 2)]
        assert optimizer.report()["coordinates"] == 3 * 2
        with torch.no_grad():
            stack.zero_()
        losses = [optimizer.step(lambda: (stack.detach() - target).square().sum()).item() for _ in range(50)]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 2, 3, 3, 2)])
def test_a_convolution_kernel_counts_as_a_matrix(shape):
    kernel = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = TeZO([("conv", kernel)], lr=1e-3, rank=2)
    losses = [optimizer.step(lambda: (kernel.detach() - 1).square().sum()).item() for _ in range(50)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 5), (5, 1)])
def test_edge_shapes_move(shape):
    value = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    anchor = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = TeZO([("value", value), ("anchor", anchor)], lr=1e-2, rank=1)
    losses = [optimizer.step(lambda: (value.detach() - 3).square().sum()).item() for _ in range(100)]
    assert losses[-1] < losses[0]


def test_a_rank_above_the_shorter_side_is_clamped_with_a_warning():
    with pytest.warns(UserWarning, match=r"The rank is larger than w \(4 × 3\)"):
        optimizer = TeZO([("w", matrix()[0])], lr=1e-3, rank=32)
    assert optimizer.leaves[0].rank == 3


def test_ranks_can_be_read_off_the_weights():
    values = torch.diag(torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1]))
    optimizer = TeZO([("w", nn.Parameter(values))], lr=1e-3, rank="auto", rank_threshold=0.25)
    assert optimizer.leaves[0].rank == 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"rank": 0}, "rank is 0, expected a whole number above 0"),
        ({"eps": 0.0}, "eps is 0.0, expected a number above 0"),
        ({"lr": -1.0}, "lr is -1.0, expected a number of at least 0"),
        ({"betas": (1.0, 0.9)}, "betas is .*expected .*in"),
        ({"variant": "adamw"}, "variant is 'adamw'"),
        ({"rank": "auto", "rank_threshold": 1.5}, "rank_threshold is 1.5"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"queries": 0}, "queries is 0"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": "full"}, "rank is 'full'"),
        ({"scale": "unbised"}, "scale is 'unbised'. Did you mean 'unbiased'"),
        ({"engine": "adaptor"}, "engine is 'adaptor'. Did you mean 'adapter'"),
        ({"vectors": "frozen"}, "vectors is 'frozen'"),
        ({"parallel": "queries"}, "parallel is 'queries'. Did you mean 'query'"),
        ({"rank": "auto", "rank_criterion": "engery"}, "rank_criterion is 'engery'. Did you mean 'energy'"),
        ({"rank": "auto", "rank_scope": "blocks"}, "rank_scope is 'blocks'. Did you mean 'block'"),
    ],
)
def test_knobs_out_of_range_are_named(knobs, message):
    with pytest.raises(RecipeError, match=message):
        TeZO([("w", matrix()[0])], **{"lr": 1e-3, "rank": 2, **knobs})


def test_a_recipe_sets_its_knobs():
    knobs = zeroth_order["tezo"].knobs({"lr": 1e-3, "rank": "auto", "engine": "adapter"})
    assert knobs["rank"] == "auto" and knobs["variant"] == "sgd" and knobs["eps"] == 1e-3
    with pytest.raises(RecipeError, match="rank"):
        zeroth_order["tezo"].knobs({"lr": 1e-3, "rank": 0})


def test_draws_are_a_small_share_of_mezo_s():
    with torch.device("cpu"):
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    tezo = TeZO(model.named_parameters(), lr=1e-3, rank=16).report()
    mezo = MeZO(model.named_parameters(), lr=1e-3).report()
    assert tezo["draws_per_step"] < 0.02 * mezo["draws_per_step"]


@pytest.mark.parametrize(
    ("knobs", "chosen"),
    [
        ({"rank_max": 2}, {"largest": 2}),
        ({"rank_scope": "layer"}, {"scope": "layer"}),
        ({"rank_criterion": "energy", "rank_threshold": 0.9}, {"criterion": "energy", "threshold": 0.9}),
        ({"target_mean_rank": 3.0}, {"target_mean_rank": 3.0}),
    ],
)
def test_knobs_of_the_ranks_reach_their_choice(knobs, chosen):
    steep, flat_one = (torch.diag(torch.logspace(0, end, 8, dtype=torch.float64)) for end in (-2, -0.5))
    weights = [("h.0.a", nn.Parameter(steep)), ("h.0.b", nn.Parameter(flat_one))]
    optimizer = TeZO(weights, lr=1e-3, rank="auto", **knobs)
    spectra = {name: torch.linalg.svdvals(weight.detach()) for name, weight in weights}
    expected = select_ranks(spectra, **chosen)
    assert {leaf.name: leaf.rank for leaf in optimizer.leaves} == expected != select_ranks(spectra)
