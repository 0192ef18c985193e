"""Data selection while training: the objective reached, and the loss at equal tokens: ….training [--minutes 4].

Four workers of a byte model choose among eight packages of the standard library, split by file into text to train on,
probes and a test. Every arm sees as many tokens. Run it again to go on.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.cells import measure_all, resumable
from benchmarks.claims.adagc.byte_model import CONTEXT, ByteModel
from torch import Tensor

from modicum.random import generator
from modicum.submodular.data_selection import DomainScheduler, Needs, counted, objective_of, similarities
from modicum.submodular.graphs import complete, metropolis_weights, ring
from modicum.submodular.policies import ODM, Fixed, Hedge, Policy
from modicum.submodular.policies.fixed import favourites

PACKAGES = ("asyncio", "concurrent", "email", "importlib", "logging", "multiprocessing", "unittest", "xml")
WORKERS, ROWS, STEPS, EVERY, RATE, SEEDS = 4, 4, 800, 10, 3e-3, 10
PROBES = 24  # windows of a domain's probe; the test has eight times as many
ETAS = (1.0, 10.0, 100.0)  # tuned on seed 100, which is not reported
Chooser = Callable[[int, list[float]], list[int]]  # from the round and the probes' losses to the workers' domains


@cache
def texts(kind: str) -> dict[str, list[bytes]]:
    """Return each domain's text in three parts; ``duplicate`` repeats the first, ``identical`` has one text for all."""
    root, parts = Path(sysconfig.get_paths()["stdlib"]), {"train": [], "probe": [], "test": []}  # type: dict[str, list[bytes]]
    for package in PACKAGES:
        files = [file.read_bytes() for file in sorted((root / package).rglob("*.py"))]
        for i, name in enumerate(parts):
            parts[name].append(b"".join(files[i::3]))
    if kind == "duplicate":
        return {name: [*part, part[0]] for name, part in parts.items()}
    if kind == "identical":
        return {name: [b"".join(part)] * len(part) for name, part in parts.items()}
    return parts


@cache
def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(text: bytes, count: int, *names: str | int) -> Tensor:
    data = as_tensor(text)
    starts = torch.randint(len(data) - CONTEXT - 1, (count,), generator=generator(0, "training", *names))
    return data[starts[:, None] + torch.arange(CONTEXT + 1)]


@cache
def table_of(kind: str, shuffled: int | None = None) -> Tensor:
    """Return how well each domain serves each probe, by counts of three bytes; shuffled for a control."""
    parts = texts(kind)
    named = [[part.decode("utf-8", "replace") for part in parts[name]] for name in ("train", "probe")]
    vectors = counted([*named[0], *named[1]])
    table = similarities(vectors[: len(named[0])], vectors[len(named[0]) :])
    if shuffled is None:
        return table
    order = torch.randperm(table.numel(), generator=generator(shuffled, "training", "shuffled"))
    return table.flatten()[order].reshape(table.shape)


def drawn(policy: Policy, name: str, seed: int, *, above: Sequence[float] | None = None) -> Chooser:
    """Draw every worker's domain from a policy's weights, which follow the losses (in excess of ``above``)."""
    count = policy.partition.widest
    needs = Needs(count, reference=above, memory=0.0)

    def choose(round_: int, losses: list[float]) -> list[int]:
        if losses:
            needs.observe(losses)
            policy.update(objective_of("loss", torch.eye(count), needs.known, workers=WORKERS))
        p = policy.probabilities()[:count]
        rng = generator(seed, name, round_)
        policy.act()
        policy.overrule(chosen := torch.multinomial(p, WORKERS, replacement=True, generator=rng))
        return chosen.tolist()

    return choose


def evenly(count: int, seed: int, **knobs: Any) -> Chooser:
    """Draw every worker's domain from fixed weights, even ones where no other are given."""
    return drawn(Fixed([count] * WORKERS, **knobs), "fixed", seed)


def scheduled(scheduler: DomainScheduler, *, constant: bool = False) -> Chooser:
    """Let a policy choose; with ``constant`` it is told that all probes need the same."""

    def choose(round_: int, losses: list[float]) -> list[int]:  # noqa: ARG001
        if losses:
            scheduler.observe([1.0] * len(losses) if constant else losses)
        return scheduler.next_domains()

    return choose


def train(choose: Chooser, kind: str, seed: int) -> dict[str, Any]:
    """Train one model on the chosen domains, and return objective and losses."""
    torch.manual_seed(seed)
    model, parts = ByteModel(), texts(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99))
    probes = [windows(text, PROBES, "probe", i) for i, text in enumerate(parts["probe"])]
    judge, needs = table_of(kind), Needs(len(probes))
    losses: list[float] = []
    chosen: list[int] = []
    reached, counts = [], torch.zeros(len(probes), dtype=torch.long)
    for step in range(STEPS):
        if step % EVERY == 0:
            if step:
                with torch.no_grad():
                    losses = [float(model.loss(rows)) for rows in probes]
                needs.observe(losses)
            chosen = choose(step // EVERY, losses)
            # Coverage under the needs of this moment, by true similarities, whatever the arm believed.
            missed = (1 - judge[:, chosen]).prod(1)
            reached.append(float((needs.weights * (1 - missed)).sum()))
            counts += torch.bincount(torch.tensor(chosen), minlength=len(counts))
        rows = [windows(parts["train"][d], ROWS, seed, "train", step, worker) for worker, d in enumerate(chosen)]
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / STEPS)
        model.loss(torch.cat(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        test = [float(model.loss(windows(text, 8 * PROBES, "test", i))) for i, text in enumerate(parts["test"])]
        final = [float(model.loss(rows)) for rows in probes]
    return {
        "objective": sum(reached) / len(reached), "test": sum(test) / len(test), "worst": max(test),
        "probe": sum(final) / len(final), "final": final, "shares": (counts / counts.sum()).tolist(),
    }  # fmt: skip


@cache
def tuned(name: str) -> dict[float, float]:
    return {eta: arm(name, 100, eta)["probe"] for eta in ETAS}


@cache
def favourite(kind: str) -> int:
    """Return the domain whose weight of 40 % is best for all probes; -1 where even weights are."""
    count = len(texts(kind)["train"])
    return min(favourites([count]), key=lambda one: train(evenly(count, 100, favourite=one), kind, 100)["probe"])


@cache
def reference(kind: str) -> list[float]:
    """Return the probes' losses after a training on all domains alike."""
    losses: list[float] = train(evenly(len(texts(kind)["train"]), 200), kind, 200)["final"]
    return losses


def arm(name: str, seed: int, step: float | None = None) -> dict[str, Any]:
    """Train by one arm; arms with a step choose it by the probes' loss on a seed that is not reported."""
    kind = "duplicate" if "duplicate" in name else "identical" if "identical" in name else "real"
    count = len(texts(kind)["train"])
    if step is None and name.startswith(("ma_", "doremi", "hedge")):
        tuning = tuned(name)
        best = min(tuning, key=lambda eta: tuning[eta])
        return arm(name, seed, best) | {"step": best, "tuning": {str(k): v for k, v in tuning.items()}}
    if name == "uniform" or name.startswith("uniform,"):
        choose = evenly(count, seed)
    elif name == "by size":
        choose = evenly(count, seed, weights=[len(text) for text in texts(kind)["train"]])
    elif name == "best fixed":
        choose = evenly(count, seed, favourite=favourite(kind))
    elif name == "odm":
        choose = drawn(ODM([count] * WORKERS), "odm", seed)
    elif name == "doremi":
        policy = Hedge([count] * WORKERS, eta=(step or 1.0) / 10, gamma=0.05)
        choose = drawn(policy, "doremi", seed, above=reference(kind))
    else:
        chosen, _, control = name.partition(",")
        links = complete(WORKERS) if "complete" in control else ring(WORKERS)
        table = table_of(kind, seed if "shuffled" in control else None)
        scheduler = DomainScheduler(
            table, workers=WORKERS, policy=chosen, W=metropolis_weights(links), horizon=STEPS // EVERY, seed=seed,
            knobs={} if step is None else {"eta": step},
        )  # fmt: skip
        choose = scheduled(scheduler, constant="constant" in control)
    return train(choose, kind, seed) | {"arm": name, "seed": seed, "domains": kind}


ARMS = (
    "uniform", "by size", "best fixed", "odm", "doremi", "last_greedy", "ma_spl", "ma_spl, complete", "ma_osma",
    "ma_spl, shuffled", "ma_spl, constant needs", "uniform, duplicate", "ma_spl, duplicate", "uniform, identical",
    "ma_spl, identical",
)  # fmt: skip


def main() -> None:
    """Run cells until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"steps": STEPS, "every": EVERY, "workers": WORKERS, "rows": ROWS, "rate": RATE, "etas": list(ETAS)}
    recall = resumable("submodular-training", minutes=options.minutes, about=about)
    measure_all(recall, {f"{name}|{seed}": partial(arm, name, seed) for seed in range(options.seeds) for name in ARMS})


if __name__ == "__main__":
    main()
