"""Text classification: which package a snippet comes from: python -m benchmarks.claims.sewa.packages [--minutes 7].

Snippets of 96 bytes of eight packages of the standard library, split by file; a small convolutional network at a calm
and a fast constant rate. Run it again to go on.
"""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.claims.sewa.arms import State, Trajectory, measure, run_study
from torch import Tensor, nn
from torch.nn import functional

from modicum.random import generator
from modicum.weights.average import weighted_mean

PACKAGES = ("asyncio", "email", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
N, EVERY, STEPS, BATCH, LENGTH = 20, 10, 700, 64, 96
RATES = {"calm": 1e-3, "fast": 1e-2}
SIZES = {"train": 4096, "guard": 1600, "report": 3200}


@cache
def texts() -> dict[str, list[list[bytes]]]:
    """Return each package's files, in three parts: half to learn, a quarter for the guard, a quarter to report on."""
    root, parts = Path(sysconfig.get_paths()["stdlib"]), {name: [] for name in SIZES}  # type: dict[str, list[list[bytes]]]
    for package in PACKAGES:
        files = [f.read_bytes() for f in sorted((root / package).rglob("*.py")) if f.stat().st_size > 4 * LENGTH]
        parts["train"].append(files[0::4] + files[2::4])
        parts["guard"].append(files[1::4])
        parts["report"].append(files[3::4])
    return parts


def snippets(part: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return bytes ``[count, LENGTH]`` and their packages, drawn evenly over packages, then over files."""
    rng, rows, labels = generator(seed, "packages", part), [], []
    for i in range(count):
        label = i % len(PACKAGES)
        files = texts()[part][label]
        text = files[int(torch.randint(len(files), (), generator=rng))]
        start = int(torch.randint(len(text) - LENGTH, (), generator=rng))
        rows.append(list(text[start : start + LENGTH]))
        labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 24)
        self.convolutions = nn.Sequential(
            nn.Conv1d(24, 64, 5, padding=2), nn.ReLU(), nn.Conv1d(64, 64, 5, padding=2), nn.ReLU()
        )
        self.head = nn.Linear(64, len(PACKAGES))

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.head(self.convolutions(self.embed(rows).transpose(1, 2)).amax(2))
        return found


def work(rate: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, data = Net(), {name: snippets(name, size, seed) for name, size in SIZES.items()}
    x, y = data["train"]
    optimizer = torch.optim.Adam(model.parameters(), lr=RATES[rate])

    def learned(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(x[rows]), y[rows])

    draws = generator(seed, "packages", "batches")
    states = Trajectory(STEPS, BATCH, N, EVERY).run(model, optimizer, learned, rows=len(x), draws=draws)

    def loss(weights: State, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, weights, (batch[0],))
        return functional.cross_entropy(logits, batch[1])

    def report(coefficients: list[float]) -> dict[str, float]:
        with torch.no_grad():
            logits = torch.func.functional_call(model, weighted_mean(states, coefficients), (data["report"][0],))
        wanted = data["report"][1]
        accuracy = (logits.argmax(1) == wanted).float().mean()
        return {"loss": float(functional.cross_entropy(logits, wanted)), "accuracy": float(accuracy)}

    def batches(name: str) -> list[tuple[Tensor, Tensor]]:
        return list(zip(data[name][0][:1600].split(200), data[name][1][:1600].split(200)))

    arms = measure(states, loss, report, batches=batches("train"), held_out=batches("guard"), seed=seed)
    return {"regime": rate, "seed": seed, "arms": arms}


def main() -> None:
    about = {"snapshots": N, "every": EVERY, "steps": STEPS, "rates": RATES, "sizes": SIZES, "packages": PACKAGES}
    run_study(__doc__, "sewa-packages", about, {rate: (rate,) for rate in RATES}, work)


if __name__ == "__main__":
    main()
