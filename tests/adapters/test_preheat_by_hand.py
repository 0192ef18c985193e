"""The loop of preheating against one by hand: its rates, its gradients and its optimiser."""

from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modicum.adapters import Preheat, get_hrp_state_dict, preheating
from modicum.random import generator


class Rates(torch.optim.SGD):
    """Plain gradient descent that remembers the learning rate of every step."""

    made: ClassVar[list["Rates"]] = []

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.rates = []
        Rates.made.append(self)

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


def linear_stage():
    """A linear layer under an adapter, its loss, and endless batches."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.randn(5, 6, generator=generator(0, "net")))
    rng = generator(0, "rows")
    data = [{"input": torch.randn(8, 6, generator=rng), "target": torch.randn(8, 5, generator=rng)} for _ in range(130)]
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    return model, data, lambda made, batch: (made(batch["input"]) - batch["target"]).square().mean()


@pytest.mark.parametrize(("steps", "accumulation"), [(1, 1), (4, 3), (12, 2), (26, 1), (60, 2)])
def test_preheating_equals_gradient_descent_by_hand(steps, accumulation):
    """The rate warms up over a fifth of the steps, at most ten; a step takes the mean gradient of its micro-batches."""
    model, data, loss = linear_stage()
    config = Preheat(preheat_rank=4, preheat_steps=steps)
    state = get_hrp_state_dict(
        model, data, lr=0.05, config=config, accumulation=accumulation, loss=loss, optimizer=Rates, seed=3
    )
    warmup = {1: 1, 4: 1, 12: 2, 26: 5, 60: 10}[steps]
    expected = [0.05 * min(1.0, (step + 1) / warmup) for step in range(steps)]
    assert Rates.made[-1].rates == pytest.approx(expected)
    with preheating(model, config=config, seed=3) as stage:
        for step, lr in enumerate(expected):
            micro = data[step * accumulation : (step + 1) * accumulation]
            total = sum(loss(model, batch) for batch in micro) / accumulation
            gradients = torch.autograd.grad(total, stage.parameters())
            with torch.no_grad():
                for parameter, gradient in zip(stage.parameters(), gradients):
                    parameter.sub_(lr * gradient)
        by_hand = stage.state()
    for key, value in by_hand.items():
        torch.testing.assert_close(state[key], value, atol=1e-4, rtol=1e-4)


def test_the_rate_of_preheating_is_its_own_or_that_of_the_run():
    for own, expected in ((None, 0.25), (0.5, 0.5)):
        model, data, loss = linear_stage()
        config = Preheat(preheat_rank=4, preheat_steps=1, preheat_lr=own)
        get_hrp_state_dict(model, data, lr=0.25, config=config, loss=loss, optimizer=Rates)
        assert Rates.made[-1].rates == [expected]


def test_without_an_optimizer_adamw_without_decay_preheats():
    states = []
    for optimizer in (None, lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)):
        model, data, loss = linear_stage()
        for kind in ("same", "adamw"):
            config = Preheat(preheat_rank=4, preheat_steps=3, preheat_optimizer=kind)
            states.append(get_hrp_state_dict(model, data, lr=0.1, config=config, loss=loss, optimizer=optimizer))
    assert all(torch.equal(states[0][key], other[key]) for other in states[1:] for key in states[0])
