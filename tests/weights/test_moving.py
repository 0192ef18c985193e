"""Moving averages beside NumPy and torch's own, put in the weights' place and back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from modicum.errors import CheckpointError
from modicum.weights.moving import Factors, MovingAverage, nearest
from modicum.weights.snapshots import Snapshots


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(dtype)
    model[0].bias.requires_grad_(False)
    return model


def shift(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype))


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_is_that_of_numpy_and_leaves_the_weights_alone(decay: float | None, dtype: torch.dtype) -> None:
    model = net(dtype)
    average, seen = MovingAverage(model, decay=decay), []
    for _ in range(6):
        shift(model)
        average.update()
        seen.append({name: p.detach().double().numpy().copy() for name, p in model.named_parameters()})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with average.in_place():
        for name, parameter in model.named_parameters():
            mean = seen[0][name]
            for i, now in enumerate(seen[1:], 2):
                share = 1 / i if decay is None else 1 - decay
                mean = (1 - share) * mean + share * now[name]
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            np.testing.assert_allclose(parameter.detach().double().numpy(), mean, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "0.bias" not in average.state_dict()


def test_it_is_torch_s_own() -> None:
    model = net().requires_grad_(True)
    ours, theirs = MovingAverage(model, decay=0.8), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for _ in range(4):
        shift(model)
        ours.update()
        theirs.update_parameters(model)
    with ours.in_place():
        for a, b in zip(model.parameters(), theirs.module.parameters()):
            torch.testing.assert_close(a, b)


def test_a_long_memory_in_bfloat16_is_not_rounded_away() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    average = MovingAverage(model, decay=0.999)
    average.update()
    nn.init.constant_(model.weight, 2.0)
    for _ in range(1000):
        average.update()
    assert float(average.state_dict()["mean/weight"]) == pytest.approx(2 - 0.999**1000, rel=1e-3)


def test_of_an_adapter_the_products_are_averaged() -> None:
    torch.manual_seed(0)
    model = nn.ParameterDict({"A": nn.Parameter(torch.ones(1, 1)), "B": nn.Parameter(torch.ones(1, 1))})
    average = MovingAverage(model, decay=None, factors={"w": Factors(model["A"], model["B"], 2.0)})
    average.update()
    with torch.no_grad():
        model["A"].neg_(), model["B"].neg_()
    average.update()
    with average.in_place(), torch.no_grad():  # of the factors, the mean would be zero
        assert float(2.0 * model["B"] @ model["A"]) == pytest.approx(2.0)
    assert model["A"].item() == -1
    with torch.no_grad():
        for part in model.values():
            part.zero_()
    average.update()
    assert float(average.state_dict()["delta/w"]) == pytest.approx(4 / 3)
    assert average.state_dict().keys() == {"delta/w", "updates"}


def test_the_nearest_factors_of_a_rank() -> None:
    torch.manual_seed(0)
    delta = torch.randn(6, 4)
    A, B, held = nearest(delta, 2)
    U, S, Vh = np.linalg.svd(delta.double().numpy())
    np.testing.assert_allclose(B @ A, (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-5)
    assert held == pytest.approx((S[:2] ** 2).sum() / (S**2).sum(), rel=1e-5)
    A, B, held = nearest(delta, 9)
    torch.testing.assert_close(B @ A, delta, atol=1e-5, rtol=1e-5)
    assert A.shape == (9, 4) and held == pytest.approx(1)
    assert nearest(torch.zeros(2, 2), 1)[2] == 1.0


def test_state_goes_on_bit_for_bit_and_that_of_another_model_is_refused() -> None:
    model = net()
    whole, first = MovingAverage(model, decay=0.7), MovingAverage(model, decay=0.7)
    for step in range(6):
        shift(model)
        whole.update()
        if step == 3:
            state = {key: tensor.clone() for key, tensor in first.state_dict().items()}
            first = MovingAverage(model, decay=0.7)
            first.load_state_dict(state)
        first.update()
    assert all(torch.equal(a, first.state_dict()[key]) for key, a in whole.state_dict().items())
    with pytest.raises(CheckpointError, match="differs from the model"):
        MovingAverage(nn.Linear(2, 2)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="as many processes"):
        MovingAverage(nn.Linear(4, 4)).load_state_dict({"mean/weight": torch.ones(2, 4), "mean/bias": torch.ones(4),
                                                        "updates": torch.tensor(1)})  # fmt: skip
    with pytest.raises(CheckpointError, match="no step"), MovingAverage(model).in_place():
        pass


def test_a_block_that_fails_leaves_the_weights_as_they_were() -> None:
    model = net()
    average = MovingAverage(model)
    average.update()
    shift(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError
    assert torch.equal(model[0].weight, before)


def test_snapshots_of_what_is_trained_hold_nothing_else() -> None:
    snapshots = Snapshots(net(), trained=True)
    snapshots.take(1)
    assert snapshots.states()[0].keys() == {"0.weight", "1.weight", "1.bias"}
