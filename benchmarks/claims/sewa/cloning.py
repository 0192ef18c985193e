"""Behaviour cloning of written controllers, judged by return: python -m benchmarks.claims.sewa.cloning [--minutes 7].

Two tasks with discrete actions (CartPole, Acrobot), two with continuous ones (Pendulum, Reacher). A small network
imitates a controller at a constant rate; what is averaged is chosen by the imitation loss and reported by the return of
50 episodes. Needs the extra ``bench``. Run it again to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from benchmarks.claims.sewa.arms import State, Trajectory, measure, run_study
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from modicum.random import generator
from modicum.weights.average import weighted_mean

N, EVERY, STEPS, BATCH, RATE, EPISODES = 20, 10, 600, 64, 1e-2, 50
DEMONSTRATIONS = {"train": 12, "guard": 12, "report": 12}

Array = NDArray[np.float64]
Act = Callable[[Array], Array]


@dataclass(frozen=True)
class Task:
    name: str
    expert: Act  # from observations (episodes, features) to actions
    actions: int  # discrete actions, or dimensions of a continuous one
    discrete: bool
    steps: int
    noise: float  # of the demonstrations: a share of random actions, or a deviation added


def cart_pole(seen: Array) -> Array:
    """Push by a linear law of position, speed, angle and angular speed."""
    return (seen @ np.array([0.1, 0.3, 3.0, 1.0]) > 0).astype(int)


def acrobot(seen: Array) -> Array:
    """Pump energy: torque along the second joint's speed."""
    return np.where(seen[:, 5] > 0, 2, 0)


def pendulum(seen: Array) -> Array:
    """Shape the energy far from the top, stabilise linearly near it."""
    angle, speed = np.arctan2(seen[:, 1], seen[:, 0]), seen[:, 2]
    energy = speed**2 / 2 - 15 * (1 - np.cos(angle))
    near = (np.abs(angle) < 0.5) & (np.abs(speed) < 3)
    return np.clip(np.where(near, -12 * angle - 3 * speed, -np.sign(speed + 1e-9) * np.sign(energy) * 2), -2, 2)[
        :, None
    ]


def reacher(seen: Array) -> Array:
    """Pull the fingertip to the target through the Jacobian's transpose, with damping."""
    first = np.arctan2(seen[:, 2], seen[:, 0])
    both = first + np.arctan2(seen[:, 3], seen[:, 1])
    off = seen[:, 8:10]
    by_both = np.stack([-0.11 * np.sin(both), 0.11 * np.cos(both)], 1)
    by_first = np.stack([-0.1 * np.sin(first), 0.1 * np.cos(first)], 1) + by_both
    pull = np.stack([(by_first * off).sum(1), (by_both * off).sum(1)], 1)
    return np.clip(-20 * pull - 0.15 * seen[:, 6:8], -1, 1)


TASKS = (
    Task("CartPole-v1", cart_pole, 2, discrete=True, steps=500, noise=0.1),
    Task("Acrobot-v1", acrobot, 3, discrete=True, steps=500, noise=0.1),
    Task("Pendulum-v1", pendulum, 1, discrete=False, steps=200, noise=0.3),
    Task("Reacher-v5", reacher, 2, discrete=False, steps=50, noise=0.1),
)


def play(task: Task, act: Act, episodes: int, seed: int) -> tuple[Array, list[Array]]:
    """Return the episodes' returns, and what was seen in each step in which they still ran."""
    worlds = gymnasium.make_vec(task.name, num_envs=episodes, vectorization_mode="sync")
    seen, _ = worlds.reset(seed=seed)
    returns, alive, rows = np.zeros(episodes), np.ones(episodes, dtype=bool), []
    for _ in range(task.steps):
        rows.append(np.asarray(seen[alive], dtype=float))
        seen, reward, ended, cut, _ = worlds.step(act(np.asarray(seen, dtype=float)))
        returns += reward * alive
        alive &= ~(ended | cut)
        if not alive.any():
            break
    worlds.close()
    return returns, rows


def demonstrations(task: Task, episodes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return what a disturbed expert saw, and what the undisturbed one would do there."""
    rng = np.random.default_rng(seed)

    def disturbed(seen: Array) -> Array:
        wanted = task.expert(seen)
        if task.discrete:
            return np.where(rng.random(len(wanted)) < task.noise, rng.integers(task.actions, size=len(wanted)), wanted)
        return wanted + task.noise * rng.normal(size=wanted.shape)

    seen = np.concatenate(play(task, disturbed, episodes, seed)[1])
    wanted = task.expert(seen)
    return torch.tensor(seen, dtype=torch.float32), torch.tensor(
        wanted, dtype=torch.long if task.discrete else torch.float32
    )


def network(features: int, task: Task) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, task.actions)
    )  # fmt: skip


def imitation(task: Task, out: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(out, wanted) if task.discrete else functional.mse_loss(out, wanted)


def work(task: Task, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    data = {
        name: demonstrations(task, episodes, 10_000 * seed + 100 * i)
        for i, (name, episodes) in enumerate(DEMONSTRATIONS.items())
    }
    x, y = data["train"]
    model = network(x.shape[1], task)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def learned(rows: Tensor) -> Tensor:
        return imitation(task, model(x[rows]), y[rows])

    draws = generator(seed, "cloning", "batches")
    states = Trajectory(STEPS, BATCH, N, EVERY).run(model, optimizer, learned, rows=len(x), draws=draws)

    def loss(weights: State, batch: tuple[Tensor, Tensor]) -> Tensor:
        return imitation(task, torch.func.functional_call(model, weights, (batch[0],)), batch[1])

    def report(coefficients: list[float]) -> dict[str, float]:
        weights = weighted_mean(states, coefficients)

        @torch.no_grad()
        def act(seen: Array) -> Array:
            out = torch.func.functional_call(model, weights, (torch.tensor(seen, dtype=torch.float32),))
            found: Array = out.argmax(1).numpy() if task.discrete else out.numpy()
            return found

        with torch.no_grad():
            off = float(loss(weights, data["report"]))
        return {"loss": off, "return": float(play(task, act, EPISODES, seed + 77)[0].mean())}

    def batches(name: str) -> list[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(data[name][0]), generator=generator(seed, "cloning", name))[:2048]
        return [(data[name][0][part], data[name][1][part]) for part in order.split(256)]

    arms = measure(states, loss, report, batches=batches("train"), held_out=batches("guard"), seed=seed)
    expert = float(play(task, task.expert, EPISODES, seed + 77)[0].mean())
    single = [round(report([float(i == j) for j in range(N)])["return"], 2) for i in range(N)]
    return {"regime": task.name, "seed": seed, "expert": expert, "single": single, "arms": arms}


def main() -> None:
    about = {"snapshots": N, "every": EVERY, "steps": STEPS, "rate": RATE, "episodes": EPISODES, **DEMONSTRATIONS}
    run_study(__doc__, "sewa-cloning", about, {task.name: (task,) for task in TASKS}, work)


if __name__ == "__main__":
    main()
