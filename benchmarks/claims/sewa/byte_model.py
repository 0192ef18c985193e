"""A byte-level language model in three regimes: python -m benchmarks.claims.sewa.byte_model [--minutes 7].

Stable; noise planted in 6 of 20 snapshots; the rate times ten for five steps before 3 of 20 snapshots. Run it again to
go on.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from benchmarks.claims.adagc.byte_model import ByteModel, batch, corpus
from benchmarks.claims.sewa.arms import State, measure, run_study
from torch import Tensor

from modicum.random import generator
from modicum.weights import Snapshots
from modicum.weights.search import Landscape

N, EVERY, STEPS, RATE = 20, 15, 900, 3e-3
NOISY, SPIKED = 6, 3
REGIMES = ("stable", "noise", "spikes")
SIZES = {"selection": (12, 64), "guard": (12, 128), "report": (24, 256)}


class Net(ByteModel):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.loss(tokens)


def train(regime: str, seed: int) -> tuple[Net, list[State], State, dict[str, Any]]:
    """Return the model, its snapshots, the weights after a decay over the same steps, and which snapshots are bad."""
    torch.manual_seed(seed)
    model, (data, _) = Net(), corpus()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    first = STEPS - EVERY * (N - 1)
    draws = torch.randperm(N, generator=generator(seed, "sewa", "bad"))
    bad = sorted(draws[: SPIKED if regime == "spikes" else NOISY].tolist()) if regime != "stable" else []
    hot = {first + EVERY * i - back for i in bad for back in range(5)} if regime == "spikes" else set()
    snapshots, decayed, started = Snapshots(model, keep=N), model, optimizer
    for step in range(1, STEPS + 1):
        if step == first + 1:  # from here on the second run lowers the rate, and has no spikes
            decayed, started = copy.deepcopy((model, optimizer))
            for group, own in zip(started.param_groups, optimizer.param_groups):
                assert group["params"][0] is not own["params"][0]
        tokens = batch(data, 16, seed, "train", step)
        _step(model, optimizer, tokens, RATE * (10 if step in hot else 1))
        if step > first:
            _step(decayed, started, tokens, RATE * (1 - (step - first) / (STEPS - first + 1)))
        if step >= first and (step - first) % EVERY == 0:
            snapshots.take(step)
    states = snapshots.states()
    if regime == "noise":
        for i in bad:
            rng = generator(seed, "sewa", "noise", i)
            for tensor in states[i].values():
                if tensor.dim() > 1:
                    tensor.add_(0.6 * tensor.std() * torch.randn(tensor.shape, generator=rng))
    return model, states, {name: t.detach().clone() for name, t in decayed.state_dict().items()}, {"bad": bad}


def _step(model: Net, optimizer: torch.optim.Optimizer, tokens: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    model(tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def data(seed: int) -> dict[str, list[Tensor]]:
    """Return batches of disjoint data: training text, and two halves of the files that were held out."""
    train_bytes, held = corpus()
    parts = {"selection": train_bytes, "guard": held[: len(held) // 2], "report": held[len(held) // 2 :]}
    return {
        name: [batch(parts[name], size, seed, name, i) for i in range(count)] for name, (count, size) in SIZES.items()
    }


def work(regime: str, seed: int) -> dict[str, Any]:
    model, states, decayed, about = train(regime, seed)
    batches = data(seed)

    def loss(weights: State, tokens: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (tokens,))
        return found

    reporting = Landscape(loss, states, batches["report"])
    arms = measure(
        states,
        loss,
        lambda c: {"loss": reporting.value(c)},
        batches=batches["selection"],
        held_out=batches["guard"],
        seed=seed,
    )
    arms["decay over the window"] = {"loss": round(Landscape(loss, [decayed], batches["report"]).value([1.0]), 6)}
    single = [round(reporting.value([float(i == j) for j in range(N)]), 4) for i in range(N)]
    return {"regime": regime, "seed": seed, **about, "single": single, "arms": arms}


def main() -> None:
    about = {"snapshots": N, "every": EVERY, "steps": STEPS, "rate": RATE, "batches": SIZES}
    run_study(__doc__, "sewa-byte-model", about, {regime: (regime,) for regime in REGIMES}, work, seeds=5)


if __name__ == "__main__":
    main()
