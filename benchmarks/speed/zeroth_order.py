"""What a zeroth-order step costs: TeZO's engines beside two forward passes and the loop as MeZO publishes it.

    python -m benchmarks.speed.zeroth_order time [--rounds 4] [--rank 16] [--dtype float32] [--last]
    python -m benchmarks.speed.zeroth_order memory [--last]

Every method steps on one batch of 8 x 64 tokens of SmolLM2-135M, with the model's own loss over all positions, or with
``--last`` over the last position, as label words have it, for all methods alike; there a further row computes the
logits of all positions first, as MeZO's code does for label words too. Methods take turns inside each round,
so that a busy machine is busy for all of them; the second step of each is timed, and ratios are of the medians. Memory
is the peak of the anonymous resident set as the kernel keeps it, of a process for each method, and varies by some
percent from run to run: medians here too. The paired engine is set beside one forward pass of as many rows as well.
Results are merged into ``benchmarks/results/tezo-speed.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory import Peak
from benchmarks.provenance import origin
from torch.nn.functional import cross_entropy

from modicum.environment import environment
from modicum.jobs.loading.models import load_model
from modicum.optim import LOZO, MeZO, SubZero, TeZO
from modicum.record import write_atomic

RESULTS = Path(__file__).parents[1] / "results" / "tezo-speed.json"
LR, EPS = 1e-7, 1e-3
EVERYWHERE = "MeZO as published, logits too"


class PublishedLoop:
    """MeZO as its code does it: the global generator seeded anew for each of four passes, a new tensor each time."""

    def __init__(self, model: torch.nn.Module, *, adam: bool = False, everywhere: bool = False) -> None:
        self.everywhere = everywhere
        self.parameters = list(model.parameters())
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters] if adam else []
        self.steps = 0

    def perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in self.parameters:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data + scale * z * EPS

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> None:
        self.steps += 1
        seed = self.steps
        self.perturb(seed, 1)
        plus = closure()
        self.perturb(seed, -2)
        minus = closure()
        self.perturb(seed, 1)
        kappa = ((plus - minus) / (2 * EPS)).item()
        torch.manual_seed(seed)
        for index, p in enumerate(self.parameters):
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            if self.moments:
                mean, square = self.moments[index]
                mean.mul_(0.9).add_(z, alpha=0.1 * kappa)
                square.mul_(0.999).addcmul_(z, z, value=0.001 * kappa**2)
                c1, c2 = 1 - 0.9**self.steps, 1 - 0.999**self.steps
                p.data = p.data - LR * (mean / c1) / ((square / c2).sqrt() + 1e-8)
            else:
                p.data = p.data - LR * (kappa * z)


class Forwards:
    """The floor: the losses alone."""

    def __init__(self, _model: torch.nn.Module, *, count: int = 2, paired: bool = False) -> None:
        self.count, self.paired = count, paired

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> None:
        for _ in range(self.count):
            closure()


def attached(method: Any, **knobs: Any) -> Callable[[torch.nn.Module], Any]:
    def make(model: torch.nn.Module) -> Any:
        optimizer = method(model.named_parameters(), lr=LR, eps=EPS, **knobs)
        optimizer.attach(model)
        return optimizer

    return make


def methods(rank: int) -> dict[str, Callable[[torch.nn.Module], Any]]:
    return {
        "two forwards": Forwards,
        "MeZO as published": PublishedLoop,
        "TeZO adapter": attached(TeZO, rank=rank, engine="adapter"),
        "TeZO paired": attached(TeZO, rank=rank, engine="paired"),
        "TeZO mutate, 3 passes": attached(TeZO, rank=rank),
        "TeZO mutate, 2 passes": attached(TeZO, rank=rank, passes=2),
        "TeZO-Adam mutate": attached(TeZO, rank=rank, variant="adam"),
        "TeZO-Adam adapter": attached(TeZO, rank=rank, variant="adam", engine="adapter"),
        EVERYWHERE: lambda model: PublishedLoop(model, everywhere=True),
        "MeZO, 3 passes": attached(MeZO),
        "MeZO, 2 passes": attached(MeZO, passes=2),
        "MeZO-Adam as published": lambda model: PublishedLoop(model, adam=True),
        "LOZO adapter": attached(LOZO, rank=2, engine="adapter"),
        "SubZero adapter": attached(SubZero, rank=rank, engine="adapter"),
    }


class Task:
    """The model, one batch, and the closure that a method asks for."""

    def __init__(self, dtype: str, *, last: bool) -> None:
        self.model = load_model("builtin:smollm2-135m-instruct", dtype=dtype)
        rng = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 49_000, (8, 64), generator=rng)
        self.last = last

    def closure(self, optimizer: Any) -> Callable[[], torch.Tensor]:
        engine = getattr(getattr(optimizer, "settings", None), "engine", "")
        blocks = 2 if engine == "paired" or getattr(optimizer, "paired", False) else 1
        ids, size = self.ids.repeat(blocks, 1), self.model.config.vocab_size
        kept = 0 if getattr(optimizer, "everywhere", False) else 1  # zero keeps all

        def losses() -> torch.Tensor:
            if self.last:
                logits = self.model(input_ids=ids, logits_to_keep=kept).logits[:, -1]
                return torch.stack([cross_entropy(x, self.ids[:, 0]) for x in logits.chunk(blocks)])
            logits = self.model(input_ids=ids).logits
            return torch.stack([self.model.loss_function(x, self.ids, vocab_size=size) for x in logits.chunk(blocks)])

        return losses if blocks == 2 else lambda: losses()[0]


def measure_time(task: Task, rank: int, rounds: int, chosen: list[str]) -> dict[str, Any]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for turn in range(rounds):
        for name in chosen:
            # A fresh optimizer each time: hooks of one would slow down the next. Its making is not timed, nor is its
            # first step, which has no perturbation from the step before to start from.
            optimizer = methods(rank)[name](task.model)
            closure = task.closure(optimizer)
            optimizer.step(closure)
            wall, cpu = time.perf_counter(), time.process_time()
            optimizer.step(closure)
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            if hasattr(optimizer, "detach"):
                optimizer.settle_()
                optimizer.detach()
            taken[name].append(seconds)
            print(f"{turn} {name}: {seconds[0]:.2f} s wall, {seconds[1]:.2f} s processor", file=sys.stderr, flush=True)
    medians = {name: [statistics.median(clock) for clock in zip(*values)] for name, values in taken.items()}
    floor = medians["two forwards"]
    loop, everywhere = medians.get("MeZO as published"), medians.get(EVERYWHERE)
    found = {}
    for name, (wall, cpu) in medians.items():
        found[name] = {
            "wall_seconds": round(wall, 3),
            "processor_seconds": round(cpu, 3),
            "over_two_forwards": round(wall / floor[0], 3),
            "over_two_forwards_processor": round(cpu / floor[1], 3),
        }
        if loop:
            found[name] |= {
                "faster_than_published": round(loop[0] / wall, 2),
                "faster_than_published_processor": round(loop[1] / cpu, 2),
            }
        if everywhere:
            found[name]["faster_than_published_logits_too"] = round(everywhere[0] / wall, 2)
        optimizer = methods(rank)[name](task.model)
        if hasattr(optimizer, "report"):
            found[name]["report"] = optimizer.report()
            optimizer.detach()
    return found


INFERENCE = {"one forward": False, "one forward, twice the rows": True}


def one_memory(task: Task, rank: int, name: str) -> dict[str, Any]:
    if name in INFERENCE:
        optimizer: Any = Forwards(task.model, count=1, paired=INFERENCE[name])
    else:
        optimizer = methods(rank)[name](task.model)
    closure = task.closure(optimizer)
    with Peak() as peak:
        for _ in range(2):
            optimizer.step(closure)
    weights = sum(p.numel() * p.element_size() for p in task.model.parameters())
    return {"peak_bytes": peak.bytes, "weight_bytes": weights}


def measure_memory(chosen: list[str], rounds: int, options: list[str]) -> dict[str, Any]:
    names = [*INFERENCE, *(c for c in chosen if c != "two forwards")]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.speed.zeroth_order", "one", "--name", name, *options]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    found: dict[str, Any] = {}
    for name, several in runs.items():
        peaks = [run["peak_bytes"] for run in several]
        found[name] = several[0] | {"peak_bytes": round(statistics.median(peaks)), "all": peaks}
        for key, baseline in zip(("over_inference", "over_inference_twice_the_rows"), INFERENCE):
            if baseline in found:
                found[name][key] = round(found[name]["peak_bytes"] / found[baseline]["peak_bytes"], 3)
        print(name, found[name], file=sys.stderr, flush=True)
    for row in found.values():
        if (adam := found.get("MeZO-Adam as published")) is not None:
            row["over_mezo_adam"] = round(row["peak_bytes"] / adam["peak_bytes"], 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["time", "memory", "one"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--last", action="store_true", help="loss over the last position")
    parser.add_argument("--name", default="")
    parser.add_argument("--only", nargs="*", default=None, help="methods, by name; all when not given")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.part == "one":
        print(json.dumps(one_memory(Task(given.dtype, last=given.last), given.rank, given.name)))
        return
    # Where every position counts anyway, this loop is the other one.
    chosen = given.only or [name for name in methods(given.rank) if given.last or name != EVERYWHERE]
    if given.part == "time":
        found = measure_time(Task(given.dtype, last=given.last), given.rank, given.rounds, chosen)
    else:
        options = ["--rank", str(given.rank), "--dtype", given.dtype, "--threads", str(given.threads)]
        found = measure_memory(chosen, given.rounds, options + ["--last"] * given.last)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    settings = {
        "rank": given.rank,
        "dtype": given.dtype,
        "threads": given.threads,
        "batch": [8, 64],
        "last": given.last,
        "rounds": given.rounds,
    }
    cell = {"settings": settings, "results": found, "environment": environment()} | origin()
    key = f"{given.part}-{given.dtype}-rank{given.rank}-threads{given.threads}" + "-last" * given.last
    results[key] = cell
    write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
