import numpy as np
import pytest
import torch
from zeroth_order_models import matrix

from modicum.errors import RecipeError
from modicum.optim import LOZO
from modicum.optim.zeroth_order.lifts import Left
from oracles import zeroth_order as oracle


@pytest.mark.oracle("zeroth_order", "lozo")
@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("variant", ["sgd", "momentum"])
def test_lozo_equals_its_formulas_through_refreshes(variant, every):
    weight, loss = matrix(6, 5)
    start = weight.detach().numpy().copy()
    optimizer = LOZO([("w", weight)], lr=1e-3, rank=2, variant=variant, refresh_every=every)
    lefts = [optimizer._coordinates((t, 0)).view(6, 2).numpy() for t in range(12)]
    rights = [Left().basis((6, 5), rank=2, seed=0, name="w", epoch=e)[0].numpy() for e in range(12 // every + 1)]
    beta = 0.9 if variant == "momentum" else 0.0
    knobs = {"lr": 1e-3, "rho": 1e-3, "every": every, "beta": beta, "factor": 2**-0.5}
    expected = oracle.lozo_momentum(loss, start, lefts, rights, **knobs)
    for _ in lefts:
        optimizer.step(lambda: loss(weight.detach()))
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("passes", [2, 3])
def test_probe_and_update_share_their_direction_at_every_step(passes):
    weight, loss = matrix(6, 5)
    optimizer = LOZO([("w", weight)], lr=1e-2, rank=2, refresh_every=1, passes=passes)
    for _ in range(10):
        optimizer.settle_()
        before, seen = weight.detach().clone(), []

        def closure(seen=seen):
            seen.append(weight.detach().clone())
            return loss(weight.detach())

        optimizer.step(closure)
        optimizer.settle_()
        probe, update = seen[0] - before, weight.detach() - before
        cosine = (probe * update).sum() / probe.norm() / update.norm()
        assert abs(abs(cosine.item()) - 1) < 1e-9
        torch.testing.assert_close(seen[0] - before, before - seen[1], rtol=1e-9, atol=1e-12)


def test_it_learns_when_every_step_has_new_factors():
    weight, loss = matrix(8, 8)
    optimizer = LOZO([("w", weight)], lr=2e-3, rank=2, refresh_every=1)
    losses = [optimizer.step(lambda: loss(weight.detach())).item() for _ in range(400)]
    assert losses[-1] < 0.5 * losses[0]


def test_an_unknown_variant_is_refused():
    with pytest.raises(RecipeError, match="variant is 'adam'"):
        LOZO([("w", matrix()[0])], lr=1e-3, variant="adam")
