"""Handwritten digits with and without batch normalisation: python -m benchmarks.claims.sewa.digits [--minutes 7].

Small convolutional networks on the 1,797 images that come with scikit-learn, at a constant rate. Run it again to go on.
"""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.claims.sewa.arms import State, Trajectory, measure, run_study
from torch import Tensor, nn
from torch.nn import functional

from modicum.random import generator
from modicum.weights import refresh_batch_norm
from modicum.weights.average import weighted_mean

N, EVERY, STEPS, BATCH = 20, 8, 400, 64
RATES = {"calm": 0.05, "fast": 0.4}  # the second one leaps


def network(norm: bool) -> nn.Sequential:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        extra = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *extra, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(128, 10))


def images(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return disjoint images: to train on, for selection among those, for the guard, and to report on."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=generator(seed, "digits"))
    cuts = {"train": order[:600], "guard": order[600:1000], "report": order[1000:]}
    return {name: (x[part], y[part]) for name, part in cuts.items()}


def work(norm: bool, rate: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, data = network(norm), images(seed)
    x, y = data["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[rate], momentum=0.9, weight_decay=5e-4)

    def learned(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1)

    draws = generator(seed, "digits", "batches")
    states = Trajectory(STEPS, BATCH, N, EVERY, clip=5.0).run(model, optimizer, learned, rows=len(x), draws=draws)

    def loss(weights: State, batch: tuple[Tensor, Tensor]) -> Tensor:
        # In training mode: normalised by the batch, as no statistics are right for a mean.
        logits: Tensor = torch.func.functional_call(model, weights, (batch[0],))
        return functional.cross_entropy(logits, batch[1])

    def report(coefficients: list[float]) -> dict[str, float]:
        tested = network(norm)
        tested.load_state_dict(weighted_mean(states, coefficients))
        refresh_batch_norm(tested, x.split(200))
        tested.eval()
        with torch.no_grad():
            logits = tested(data["report"][0])
        right = (logits.argmax(1) == data["report"][1]).float().mean()
        return {"loss": float(functional.cross_entropy(logits, data["report"][1])), "accuracy": float(right)}

    batches = [(a, b) for a, b in zip(x.split(200), y.split(200))]
    held_out = [(a, b) for a, b in zip(data["guard"][0].split(200), data["guard"][1].split(200))]
    arms = measure(states, loss, report, batches=batches, held_out=held_out, seed=seed)
    return {"regime": f"{'with' if norm else 'without'} normalisation, {rate}", "seed": seed, "arms": arms}


def main() -> None:
    about = {"snapshots": N, "every": EVERY, "steps": STEPS, "rates": RATES}
    regimes = {f"norm {norm} | {rate}": (norm, rate) for norm in (True, False) for rate in RATES}
    run_study(__doc__, "sewa-digits", about, regimes, work)


if __name__ == "__main__":
    main()
