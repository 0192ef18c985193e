"""The step that every zeroth-order optimizer shares."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zeroth_order_models import METHODS, flat, matrix, task, tied, train

from modicum.errors import ModicumError, RecipeError, UnsupportedError
from modicum.optim import LOZO, HiZOO, MeZO, SubZero, TeZO
from modicum.optim.zeroth_order import perturb
from modicum.optim.zeroth_order.rounding import place_noise, stochastic_round

every_method = pytest.mark.parametrize("name", METHODS)


def made(name, model, **knobs):
    method, more = METHODS[name]
    return method(model.named_parameters(), **{"lr": 1e-2, **more, **knobs})


def steps(name, model, optimizer, count):
    for _ in range(count):
        optimizer.step(task(model))
    optimizer.settle_()


@every_method
def test_no_gradient_is_made_and_the_loss_is_a_plain_number(name):
    model = tied()
    loss = made(name, model).step(task(model))
    assert loss.dim() == 0 and not loss.requires_grad and math.isfinite(loss)
    assert all(p.grad is None for p in model.parameters())


@every_method
def test_a_resumed_run_ends_with_the_same_bytes(name):
    whole = tied()
    optimizer = made(name, whole)
    steps(name, whole, optimizer, 5)
    saved, buffer = copy.deepcopy(whole), io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    steps(name, whole, optimizer, 6)
    buffer.seek(0)
    resumed = made(name, saved)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    steps(name, saved, resumed, 6)
    assert torch.equal(flat(whole), flat(saved))


@every_method
def test_kept_draws_are_those_that_would_be_drawn_again(name, monkeypatch):
    kept, redrawn = tied(), tied()
    steps(name, kept, made(name, kept), 4)
    monkeypatch.setattr(perturb, "KEPT", 0)
    optimizer = made(name, redrawn)
    steps(name, redrawn, optimizer, 4)
    assert not optimizer._kept and torch.equal(flat(kept), flat(redrawn))


def test_what_is_kept_of_a_step_is_bounded():
    big, small = (nn.Parameter(torch.zeros(size)) for size in ((1100, 1000), (7,)))
    optimizer = MeZO([("big", big), ("small", small)], lr=1e-3)
    for _ in range(3):
        optimizer.step(lambda: 1.0)
        assert sum(values.numel() for values in optimizer._kept.values()) <= perturb.KEPT
        assert ((optimizer.steps - 1, 0), "dense", "small", 0) in optimizer._kept


@every_method
def test_it_learns(name):
    model = tied()
    optimizer = made(name, model, lr=1e-3)
    before = task(model)().item()
    steps(name, model, optimizer, 60)
    assert task(model)().item() < before


@every_method
def test_frozen_parameters_stay_bit_identical(name):
    model = tied()
    model.up.weight.requires_grad_(False)
    kept = model.up.weight.detach().clone()
    steps(name, model, made(name, model), 3)
    assert torch.equal(kept, model.up.weight)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "hizoo"])
def test_a_log_of_coefficients_replays_the_run(name):
    model, other = tied(), tied()
    optimizer, log = made(name, model), []
    for _ in range(6):
        optimizer.step(task(model))
        log.append(optimizer.kappas)
    again = made(name, other)
    again.replay(log)
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-10)


def test_what_cannot_be_replayed_says_so():
    with pytest.raises(UnsupportedError, match="HiZOO cannot be replayed"):
        HiZOO([("w", matrix()[0])], lr=1e-3).replay([torch.zeros(1)])


@pytest.mark.parametrize("name", ["mezo", "tezo", "tezo-adam", "lozo-momentum", "subzero", "n-spsa"])
def test_two_passes_give_what_three_give(name):
    three, two = tied(), tied()
    first, second = made(name, three), made(name, two, passes=2)
    steps(name, three, first, 9)
    steps(name, two, second, 9)
    torch.testing.assert_close(flat(three), flat(two), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("queries", "passes", "expected"), [(1, 3, 30), (1, 2, 21), (2, 3, 50), (2, 2, 41)])
def test_passes_over_the_weights_are_counted(queries, passes, expected):
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=1e-3, rank=2, queries=queries, passes=passes)
    for _ in range(10):
        optimizer.step(task(model))
    assert optimizer.passes == expected
    assert optimizer.report()["weight_passes_per_step"] == 2 * queries + passes - 2


def test_with_two_passes_settling_gives_the_weights_back():
    weight, loss = matrix()
    optimizer = MeZO([("w", weight)], lr=0.0, passes=2)
    before = weight.detach().clone()
    optimizer.step(lambda: loss(weight.detach()))
    assert (weight.detach() - before).norm() > 1e-4
    optimizer.settle_()
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("mezo", {}),
        ("sparse-mezo", {}),
        ("tezo", {}),
        ("tezo", {"refresh_every": 1}),
        ("lozo-momentum", {"variant": "sgd", "refresh_every": 1}),
        ("subzero", {"refresh_every": 1}),
    ],
)
def test_the_update_lies_along_the_probe(name, knobs):
    model = tied()
    optimizer = made(name, model, **knobs)
    for _ in range(6):
        before, seen = flat(model), []

        def closure(seen=seen):
            seen.append(flat(model))
            return task(model)()

        optimizer.step(closure)
        plus, minus, update = seen[0] - before, seen[1] - before, flat(model) - before
        torch.testing.assert_close(plus, -minus, rtol=1e-9, atol=1e-13)
        assert abs(abs(torch.cosine_similarity(plus, update, dim=0).item()) - 1) < 1e-9


@given(st.integers(0, 100))
def test_swapping_the_signs_gives_the_same_update(seed):
    weight, loss = matrix(seed=seed)
    other = nn.Parameter(weight.detach().clone())
    one, two = (TeZO([("w", p)], lr=1e-2, rank=2, seed=seed) for p in (weight, other))
    two._drawn[(0, 0)] = -two._coordinates((0, 0))
    one.step(lambda: loss(weight.detach()))
    two.step(lambda: loss(other.detach()))
    torch.testing.assert_close(one.kappas, -two.kappas, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(weight, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-23), (torch.float64, 2**-52)])
def test_restoring_leaves_at_most_the_rounding_of_each_pass(dtype, bound):
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=dtype))
    before = weight.detach().clone()
    optimizer = TeZO([("w", weight)], lr=0.0, rank=4)
    for _ in range(10):
        optimizer.step(lambda: weight.detach().square().sum())
    assert ((weight - before).abs() <= 2 * 30 * bound * before.abs().clamp_min(0.01)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_are_not_lost_in_short_weights(dtype):
    weight = nn.Parameter(torch.full((64, 64), 1.0, dtype=dtype))
    optimizer = TeZO([("w", weight)], lr=1.0, rank=2)
    optimizer._transition({}, torch.tensor([1e-4]))
    moved = weight.detach().float() - 1
    left, right = optimizer.leaves[0].factors(optimizer.settings.lift, optimizer._coordinates((0, 0)) / 2**0.5)
    wanted = -1e-4 * left @ right.float().mT
    assert wanted.abs().max() < torch.finfo(dtype).eps
    slope = (moved * wanted).sum() / wanted.square().sum()
    assert 0.5 < slope < 1.5


@given(st.floats(-1e4, 1e4, allow_nan=False, allow_subnormal=False), st.sampled_from([torch.bfloat16, torch.float16]))
def test_stochastic_rounding_picks_a_neighbor(value, dtype):
    values = torch.full((64,), value, dtype=torch.float32)
    rounded = stochastic_round(values, dtype, noise=place_noise(0, 0, 64, 1)).double()
    # One unit in the last place, or a subnormal step of the format.
    step = max(abs(values[0].item()) * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal)
    assert ((rounded - values.double()).abs() <= step).all()


def test_stochastic_rounding_keeps_what_is_exact_or_not_finite():
    values = torch.tensor([0.0, 1.0, -2.5, math.inf, -math.inf])
    noise = place_noise(0, 0, 1, 5)
    assert torch.equal(stochastic_round(values, torch.bfloat16, noise=noise).float(), values)
    assert stochastic_round(torch.tensor([math.nan]), torch.float16, noise=noise[:, :1]).isnan().all()


@pytest.mark.parametrize("name", ["mezo-adam", "tezo-adam", "lozo-momentum", "hizoo", "sparse-mezo"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_count(name, bad):
    model = tied()
    optimizer = made(name, model)
    steps(name, model, optimizer, 2)
    before, state = flat(model), copy.deepcopy(optimizer.memory)
    optimizer.step(lambda: torch.tensor(bad))
    torch.testing.assert_close(flat(model), before, rtol=0, atol=1e-14)
    assert optimizer.skipped == 1 and all(map(torch.equal, state, optimizer.memory))
    optimizer.step(task(model))
    assert optimizer.skipped == 1 and optimizer.skipped_in_a_row == 0


def test_too_many_bad_losses_stop_the_run():
    weight, _ = matrix()
    before = weight.detach().clone()
    optimizer = MeZO([("w", weight)], lr=1e-2)
    with pytest.raises(ModicumError, match="NaN or infinite in 10 steps in a row"):
        for _ in range(20):
            optimizer.step(lambda: math.nan)
    assert optimizer.skipped == 10
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("passes", [2, 3])
def test_an_error_inside_the_closure_restores_the_weights(passes):
    weight, loss = matrix()
    optimizer = MeZO([("w", weight)], lr=1e-2, passes=passes)
    optimizer.step(lambda: loss(weight.detach()))
    optimizer.settle_()
    before, calls = weight.detach().clone(), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("out of data")
        return loss(weight.detach())

    with pytest.raises(KeyError):
        optimizer.step(closure)
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["mezo", "tezo", "hizoo", "n-spsa"])
def test_micro_batches_give_what_one_batch_gives(name):
    whole, parts = tied(), tied()
    ids = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(4))
    labels = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(5))

    def closure(model, rows):
        return lambda: nn.functional.cross_entropy(model(ids[rows]).flatten(0, 1), labels[rows].flatten())

    first, second = made(name, whole), made(name, parts)
    for _ in range(4):
        first.step(closure(whole, slice(0, 6)))
        for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):
            second.probe(closure(parts, rows), weight=rows.stop - rows.start)
        second.step()
    torch.testing.assert_close(flat(whole), flat(parts), rtol=0, atol=1e-10)


def test_a_number_serves_as_loss():
    weight, _ = matrix()
    optimizer = MeZO([("w", weight)], lr=1e-3, eps=0.1)
    rewards = [
        float(optimizer.step(lambda: float((weight.detach() - 1).abs().sum().round(decimals=1)))) for _ in range(300)
    ]
    assert sum(rewards[-20:]) < sum(rewards[:20])


def test_weight_decay_shrinks_matrices_only():
    model = tied()
    optimizer = TeZO(model.named_parameters(), lr=0.1, rank=2, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(lambda: torch.tensor(1.0))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() > 1 else 1), rtol=0, atol=1e-12)


def test_patterns_choose_what_is_trained_and_how():
    model = tied()
    optimizer = TeZO(
        model.named_parameters(), lr=1e-3, rank=2, include=["up", "embed"], dense=["embed"], exclude=["bias"]
    )
    assert {leaf.name: leaf.rank for leaf in optimizer.leaves} == {"embed.weight": 0, "up.weight": 2}
    assert TeZO(model.named_parameters(), lr=1e-3, rank=2, vectors="freeze").factored[0].name == "embed.weight"
    with pytest.raises(RecipeError, match="No parameter is left"):
        MeZO(model.named_parameters(), lr=1e-3, include=["nothing"])
    with pytest.raises(RecipeError, match="No matrix is left"):
        TeZO([("b", model.up.bias)], lr=1e-3)


@every_method
@pytest.mark.parametrize("vectors", [False, True])
def test_groups_have_their_own_learning_rates(name, vectors):
    method, more = METHODS[name]
    shape = (3,) if vectors else (3, 3)
    a, b, matrix = (nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (shape, shape, (3, 3)))
    groups = [{"params": [a], "lr": 0.0}, {"params": [b, matrix]}]
    optimizer = method(groups, **{"lr": 1e-2, **more})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)

    def loss():
        return (a.detach() + b.detach()).square().sum() + a.detach().sum()

    optimizer.step(loss)
    torch.testing.assert_close(a.detach(), torch.ones(shape, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (b - 1).abs().max() > 1e-4
    schedule.step()
    kept = b.detach().clone()
    optimizer.step(loss)
    torch.testing.assert_close(b.detach(), kept, rtol=0, atol=1e-14)


def test_nothing_draws_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train(TeZO, rank=2, steps=2)
    train(MeZO, steps=2)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", [MeZO, TeZO, LOZO, SubZero])
def test_several_queries_are_averaged_by_every_kind_of_direction(method):
    weight, loss = matrix(5, 4)
    start, more = weight.detach().clone(), {} if method is MeZO else {"rank": 2}
    optimizer = method([("w", weight)], lr=1e-2, queries=3, **more)
    (leaf,) = optimizer.leaves
    directions = [optimizer._tangents((0, query))[leaf].clone() for query in range(3)]
    optimizer.step(lambda: loss(weight.detach()))
    slopes = [(loss(start + 1e-3 * z) - loss(start - 1e-3 * z)) / 2e-3 for z in directions]
    mean = sum(slope * z for slope, z in zip(slopes, directions)) / 3
    torch.testing.assert_close(weight.detach(), start - 1e-2 * mean, rtol=1e-9, atol=1e-12)


# Sparse-MeZO's threshold is itself a weight, which the rounding of a restored probe may push over it.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "sparse-mezo"])
def test_a_skipped_step_leaves_its_number_and_nothing_else(name):
    """Bias corrections, moments and energies count updates, draws and refreshes count steps."""
    skipping, starting = tied(), tied()
    one, two = made(name, skipping), made(name, starting)
    one.step(lambda: math.nan)
    two.steps = 1
    steps(name, skipping, one, 4)
    steps(name, starting, two, 4)
    torch.testing.assert_close(flat(skipping), flat(starting), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("method", "variant"), [(SubZero, "adam"), (TeZO, "factor_adam")])
def test_adam_starts_anew_with_new_factors(method, variant):
    model = tied()
    knobs = {"rank": 2, "variant": variant, "refresh_every": 3, "engine": "adapter"}
    optimizer = method(model.named_parameters(), lr=1e-3, **knobs)
    optimizer.attach(model)
    for _ in range(4):
        optimizer.step(task(model))
    # Since the refresh there was one step, and the first corrected step of Adam is as long as the learning rate.
    torch.testing.assert_close(optimizer.position.abs(), torch.full_like(optimizer.position, 1e-3), rtol=1e-3, atol=0)
