"""SmolLM2-135M on two small tasks: zeroth-order methods beside LoRA, at equal time and at equal memory.

    python -m benchmarks.claims.tezo.smollm2 [--minutes 60] [--forwards 32]

Every method moves the same 60 matrices (queries and values), sees batches of 4 prompts and the loss over two label
words, and trains for the time of 32 forward passes. What its step costs in such passes is measured once, both in one
process, so that a busy machine changes nobody's number of steps. A learning rate is chosen by dev loss on seed 100,
from one grid for each kind; seeds 0 to 2 report on other data. Resumable cell by cell, as ``study.py``. Peak memory is
measured once for each method, in a process of its own; one row of LoRA gets gradient checkpoints and the largest batch
that fits what TeZO takes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.cells import resumable
from benchmarks.claims.tezo.study import SEEDS, SELECTION_SEED
from benchmarks.memory import Peak
from torch import Tensor, nn

from modicum.errors import ModicumError
from modicum.jobs.data.sources.suite import Example, task_examples
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.training.task_losses import TaskLoss
from modicum.optim import LOZO, MeZO, TeZO
from modicum.random import generator

MODEL = "builtin:smollm2-135m-instruct"
TASKS = ("polarity", "order")
MATRICES = r"self_attn\.(q|v)_proj"
BATCH, TRAIN, DEV = 4, 512, 64
FORWARDS = 32.0
SQUEEZED = "LoRA, TeZO's memory"  # its batch is halved until it fits what TeZO takes

# One grid for each kind: plain steps, steps that Adam scales, and first order.
RATES = {"plain": (3e-4, 1e-3, 3e-3), "adam": (1e-4, 3e-4, 1e-3), "lora": (3e-4, 1e-3, 3e-3)}
TEZO = {"rank": 16, "engine": "adapter"}
METHODS: dict[str, tuple[Callable[..., Any] | None, dict[str, Any], str]] = {  # method, knobs, kind
    "TeZO": (TeZO, TEZO, "plain"),
    "TeZO-Adam": (TeZO, TEZO | {"variant": "adam"}, "adam"),
    "TeZO, refresh 10": (TeZO, TEZO | {"refresh_every": 10}, "plain"),
    "LOZO": (LOZO, {"rank": 4, "refresh_every": 50, "engine": "adapter"}, "plain"),
    "MeZO": (MeZO, {"passes": 2}, "plain"),
    "LoRA": (None, {}, "lora"),
    SQUEEZED: (None, {"checkpointing": True}, "lora"),
}


class FirstOrder:
    """AdamW on a LoRA adapter of rank 8, behind the interface of the zeroth-order optimizers."""

    def __init__(self, model: nn.Module, *, lr: float, seed: int, checkpointing: bool) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.wrapped: Any = get_peft_model(model, config)
        self.checkpointing = checkpointing
        if checkpointing:
            self.wrapped.enable_input_require_grads()
            self.wrapped.gradient_checkpointing_enable({"use_reentrant": False})
            self.wrapped.train()  # checkpoints are made in training mode only; the model has no dropout
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    @torch.enable_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        loss = closure()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def detach(self) -> None:
        if self.checkpointing:
            self.wrapped.gradient_checkpointing_disable()
            self.wrapped.disable_input_require_grads()
        self.wrapped.merge_and_unload()


class Bench:
    """The model, which every cell begins with as it was delivered, and the examples of a task."""

    def __init__(self, task: str, seed: int) -> None:
        self.model, self.tokenizer = loaded()
        self.seed = seed
        self.train = task_examples(task, size=TRAIN, seed=seed)
        self.dev = task_examples(task, split="test", size=DEV, seed=seed)

    def batch(self, step: int, size: int) -> TaskLoss:
        rows = torch.randint(TRAIN, (size,), generator=generator(self.seed, "batch", step)).tolist()
        return TaskLoss(self.model, self.tokenizer, [self.train[row] for row in rows])

    @torch.no_grad()
    def measure(self) -> dict[str, float | None]:
        """Return loss and accuracy on the dev examples."""
        parts = [TaskLoss(self.model, self.tokenizer, part) for part in chunks(self.dev, 16)]
        scores, answers = torch.cat([p.scores() for p in parts]), torch.cat([p.answers for p in parts])
        loss = float(nn.functional.cross_entropy(scores, answers))
        accuracy = float((scores.argmax(1) == answers).float().mean())
        return {"dev_loss": loss if math.isfinite(loss) else None, "dev_accuracy": accuracy}


_MODEL: list[Any] = []


def loaded() -> tuple[Any, Any]:
    """Return model and tokenizer, read once; the moved matrices are as delivered."""
    if not _MODEL:
        model = load_model(MODEL, dtype="float32").eval()
        _MODEL.extend([model, load_tokenizer(MODEL), {n: p.detach().clone() for n, p in matrices(model)}])
    model, tokenizer, start = _MODEL
    for name, weight in matrices(model.requires_grad_(True).eval()):
        weight.data.copy_(start[name])
    return model, tokenizer


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if re.search(MATRICES, name))


def chunks(items: list[Example], size: int) -> list[list[Example]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def optimizer_of(name: str, model: nn.Module, lr: float, seed: int) -> Any:
    method, knobs, _ = METHODS[name]
    if method is None:
        return FirstOrder(model, lr=lr, seed=seed, checkpointing=knobs.get("checkpointing", False))
    optimizer = method(model.named_parameters(), lr=lr, seed=seed, include=[MATRICES], **knobs)
    optimizer.attach(model)
    return optimizer


def cell(task: str, name: str, lr: float, seed: int, *, steps: int, batch: int) -> dict[str, Any]:
    """Train for ``steps``; return dev loss and accuracy, the curve and what the method kept."""
    bench = Bench(task, seed)
    optimizer = optimizer_of(name, bench.model, lr, seed)
    report = optimizer.report() if hasattr(optimizer, "report") else {}
    curve: list[float] = []
    begun, failed = time.process_time(), None
    for step in range(steps):
        try:
            curve.append(round(float(optimizer.step(bench.batch(step, batch))), 5))
        except ModicumError as error:  # the loss stopped being finite: the cell's result is that it diverged
            failed = str(error)
            break
    spent = time.process_time() - begun
    finish(optimizer)
    bench.model.eval()
    return {
        "task": task, "method": name, "lr": lr, "seed": seed, "batch": batch, "seconds": round(spent, 2),
        "steps": len(curve), "diverged": failed, **bench.measure(), "curve": curve, "report": report,
    }  # fmt: skip


def finish(optimizer: Any) -> None:
    """Leave the trained weights in the model, and nothing else."""
    if hasattr(optimizer, "settle_"):
        optimizer.settle_()
    optimizer.detach()


def cost(name: str, batch: int) -> dict[str, Any]:
    """Return the time of a step in forward passes of the bare model on a full batch, the best of a few of both."""
    bench = Bench(TASKS[0], SELECTION_SEED)
    plain, batches = bench.batch(0, BATCH), [bench.batch(step, batch) for step in range(4)]
    with torch.no_grad():
        passes = [timed(plain) for _ in range(4)]
    optimizer = optimizer_of(name, bench.model, 0.0, SELECTION_SEED)
    steps = [timed(lambda loss=loss: optimizer.step(loss)) for loss in batches]
    finish(optimizer)
    with torch.no_grad():
        passes += [timed(plain) for _ in range(2)]
    return {"batch": batch, "forwards": round(min(steps[1:]) / min(passes[1:]), 3)}


def timed(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def peak(name: str, batch: int) -> dict[str, Any]:
    """Return the peak of the anonymous resident set over two steps, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.claims.tezo.smollm2", "--peak", name, "--batch", str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def one_peak(name: str, batch: int) -> dict[str, Any]:
    # Not through `loaded`: the copy for the next cell is the study's, not the method's.
    model, tokenizer = load_model(MODEL, dtype="float32").eval(), load_tokenizer(MODEL)
    examples = task_examples(TASKS[0], size=TRAIN)
    optimizer = optimizer_of(name, model, 0.0, 0)
    with Peak() as found:
        for step in range(2):
            optimizer.step(TaskLoss(model, tokenizer, examples[step * batch :][:batch]))
    return {"batch": batch, "peak_bytes": found.bytes}


def fitting(name: str, limit: float) -> dict[str, Any]:
    """Return the peak at the largest batch that stays within ``limit`` bytes, at worst a batch of one."""
    size = BATCH
    while (found := peak(name, size))["peak_bytes"] > limit and size > 1:
        size //= 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no new cell after so many")
    parser.add_argument("--forwards", type=float, default=FORWARDS, help="time of a cell's training, in forward passes")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(json.dumps(one_peak(given.peak, given.batch)))
        return
    recall = resumable("tezo-smollm2", minutes=given.minutes)
    for task in given.tasks:
        for seed in (SELECTION_SEED, *SEEDS):
            recall(f"{task}|start|{seed}", lambda task=task, seed=seed: Bench(task, seed).measure())
        for name in given.only or METHODS:
            losses = reported(task, name, given.forwards, recall)
            if losses:
                print(f"{task}, {name}: dev loss {statistics.mean(losses):.3f} {losses}", flush=True)


def reported(task: str, name: str, forwards: float, recall: Callable[..., dict[str, Any] | None]) -> list[float]:
    """Return the dev losses of the reporting seeds at the rate that the selection seed chose, as far as measured."""
    memory = tezo = recall("memory|TeZO", lambda: peak("TeZO", BATCH))
    if tezo is not None and name != "TeZO":
        limit = tezo["peak_bytes"] if name == SQUEEZED else math.inf
        memory = recall(f"memory|{name}", lambda: fitting(name, limit))
    spent = memory and recall(f"cost|{name}", lambda: cost(name, memory["batch"]))
    if not memory or not spent:
        return []
    steps = max(1, round(forwards / spent["forwards"]))

    def run(lr: float, seed: int) -> dict[str, Any] | None:
        key = f"{task}|{name}|{lr}|{seed}|{forwards:g}"
        return recall(key, lambda: cell(task, name, lr, seed, steps=steps, batch=memory["batch"]))

    tried = {lr: run(lr, SELECTION_SEED) for lr in RATES[METHODS[name][2]]}
    known = {lr: r["dev_loss"] for lr, r in tried.items() if r is not None and r["dev_loss"] is not None}
    if None in tried.values() or not known:
        return []
    best = min(known, key=lambda lr: known[lr])
    found = [run(best, seed) for seed in SEEDS]
    return [r["dev_loss"] for r in found if r is not None and r["dev_loss"] is not None]


if __name__ == "__main__":
    main()
