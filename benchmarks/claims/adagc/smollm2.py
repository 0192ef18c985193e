"""Fine-tune all of SmolLM2-135M with an aggressive learning rate: python -m benchmarks.claims.adagc.smollm2.

One cell is one arm with one seed; finished cells are skipped, so the command can be given again to go on.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from functools import partial
from pathlib import Path

import torch
from benchmarks.cells import resumable

from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.optim.gradient.faults import tensor_noise_
from modicum.optim.gradient.make import make_clipper
from modicum.optim.gradient.spikes import spike_score
from modicum.random import generator

MODEL = "builtin:smollm2-135m-instruct"
WARMUP = 10
ARMS = {
    "none": (None, {}),
    "global": ("global_norm", {}),
    "adagc ema, relative 1.5": ("adagc", {"relative": 1.5, "warmup": WARMUP}),
    "adagc ema": ("adagc", {"warmup": WARMUP}),
    "adagc min (published)": ("adagc", {"init": "min", "ignore_zero": False, "warmup": WARMUP}),
}


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Return training and held-out tokens of the standard library; every tenth file is held out."""
    tokenizer = load_tokenizer(MODEL)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    found = []
    for held in (False, True):
        text = "\n".join(f.read_text("utf-8", "replace") for i, f in enumerate(files) if (i % 10 == 0) == held)
        found.append(torch.tensor(tokenizer(text[:600_000])["input_ids"]))
    return found[0], found[1]


def batch(data: torch.Tensor, rows: int, length: int, *names: str | int) -> torch.Tensor:
    starts = torch.randint(len(data) - length, (rows,), generator=generator(0, "smollm2", *names))
    return data[starts[:, None] + torch.arange(length)]


def run(arm: str, seed: int, given: argparse.Namespace) -> dict:
    rule, knobs = ARMS[arm]
    train, held_out = tokens()
    torch.manual_seed(seed)
    model = load_model(MODEL, dtype="float32")

    @torch.no_grad()
    def held_out_loss() -> float:
        model.eval()
        losses = [model(input_ids=(b := batch(held_out, 4, 128, "held", i)), labels=b).loss for i in range(2)]
        model.train()
        return float(torch.stack(losses).mean())

    before = held_out_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, betas=(0.9, 0.999), fused=True)
    clipper = make_clipper(rule, model.named_parameters(), **knobs) if rule else None
    losses, rates, hits = [], [], 0
    for step in range(given.steps):
        for group in optimizer.param_groups:
            group["lr"] = given.lr * min(1.0, (step + 1) / 5)
        ids = batch(train, given.rows, given.length, seed, step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        if given.faults and step >= WARMUP:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            hits += tensor_noise_(grads, step=step, seed=seed, probability=given.faults) is not None
        if clipper is not None:
            rates.append(float((clipper.clip_().factors < 1).float().mean()))
        optimizer.step()
        optimizer.zero_grad()
    spikes = spike_score(losses, window=10, sigma=6.0, two_sided=False)
    return {
        "arm": arm,
        "rule": rule,
        "knobs": knobs,
        "seed": seed,
        "lr": given.lr,
        "steps": given.steps,
        "tokens_per_step": given.rows * given.length,
        "fault_probability": given.faults,
        "faults": hits,
        "held_out_before": round(before, 5),
        "held_out_after": round(held_out_loss(), 5),
        "train_loss": [round(x, 4) for x in losses],
        "worst_train_loss": round(max(losses), 4),
        "clip_rate": round(sum(rates[WARMUP:]) / len(rates[WARMUP:]), 4) if rates else None,
        "spikes": spikes.count,
        "spike_window": 10,
        "spike_sigma": 6.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1e-3, help="fine-tuning would use 1e-5 to 1e-4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    names = {re.sub(r"[^a-z0-9.]+", "-", arm).strip("-"): arm for arm in ARMS}  # what a shell need not quote
    parser.add_argument("--arms", nargs="+", choices=names, default=list(names))
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--minutes", type=float, default=6.0)
    given = parser.parse_args()
    recall = resumable("adagc-smollm2", minutes=given.minutes)
    for seed in range(given.seeds):
        for arm in (names[name] for name in given.arms):
            recall(f"{arm} | lr {given.lr:g} | faults {given.faults:g} | {seed}", partial(run, arm, seed, given))


if __name__ == "__main__":
    main()
