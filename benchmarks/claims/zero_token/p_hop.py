"""p-hop induction: does cycling, and do zero tokens, beat an equal number of parameters?

    python benchmarks/claims/zero_token/p_hop.py [--steps 700] [--seeds 3] [--minutes 7]

A cell is a variant and a seed; cells with a result are skipped, so the study may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM
from modicum.random import generator
from modicum.record import environment

RESULT = Path(__file__).parents[2] / "results" / "zero_token_p_hop.json"
SYMBOLS, LENGTH, HOPS, BATCH = 4, 32, 3, 64
HOST = {
    "model_type": "llama",
    "vocab_size": SYMBOLS,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
VARIANTS = {
    "vanilla-3": {"n_cycles": 1, "zero_token": False},
    "vanilla-5": {"n_cycles": 1, "zero_token": False, "layers": 5},
    "BC 3x2": {"n_cycles": 2, "n_head": 0, "n_tail": 0, "zero_token": False},
    "HTC": {"n_cycles": 3, "zero_token": False},
    "HTC + cycle embedding": {"n_cycles": 3, "zero_token": False, "cycle_embedding": "add"},
    "ZTT": {"n_cycles": 3},
    "ZTT random cycles": {"n_cycles": 3, "train_cycles": "random"},
}


def batch(rng: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences and the symbol that p hops reach from each position; -100 where the chain breaks."""
    x = torch.randint(SYMBOLS, (size, LENGTH), generator=rng)
    position = torch.arange(LENGTH)
    same = (x[:, :, None] == x[:, None, :]) & (position[None, :] < position[:, None])
    last = torch.where(same, position, -1).amax(-1)
    hop = torch.where(last >= 0, last + 1, -1)
    where = position.expand(size, -1)
    for _ in range(HOPS):
        where = torch.where(where >= 0, hop.gather(1, where.clamp(min=0)), -1)
    return x, torch.where(where >= 0, x.gather(1, where.clamp(min=0)), -100)


def accuracy(logits: torch.Tensor, target: torch.Tensor) -> float:
    counts = target >= 0
    return float((logits.argmax(-1)[counts] == target[counts]).float().mean())


def train(variant: str, seed: int, steps: int) -> dict[str, object]:
    knobs = dict(VARIANTS[variant])
    host = HOST | {"num_hidden_layers": knobs.pop("layers", 3)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ZeroTokenForCausalLM(ZeroTokenConfig(host=host, seed=seed, **knobs))
    plain = [p for n, p in model.named_parameters() if n.startswith("zero_token.") or p.dim() < 2]
    weights = [p for n, p in model.named_parameters() if not n.startswith("zero_token.") and p.dim() >= 2]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    model.train()
    for step in range(steps):
        x, target = batch(generator(seed, "p-hop", step), BATCH)
        model.set_training_step(step)
        loss = cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    return {"variant": variant, "seed": seed, "steps": steps, "seconds": round(seconds, 1)} | evaluate(model)


@torch.no_grad()
def evaluate(model: ZeroTokenForCausalLM) -> dict[str, object]:
    model.eval()
    x, target = batch(generator(0, "p-hop", "held out"), 1024)
    out = model(x, use_cache=False, output_zero_attention=True)
    result: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "visits": model.config.num_hidden_layers,
        "accuracy": accuracy(out.logits, target),
        "loss": float(cross_entropy(out.logits.flatten(0, 1), target.flatten(), ignore_index=-100)),
    }
    depth = model.config.depth
    if depth == 1:
        return result
    result["accuracy by cycles"] = [
        accuracy(model(x, use_cache=False, n_cycles=c).logits, target) for c in range(1, depth + 1)
    ]
    if out.zero_attention:
        result["zero attention by cycle"] = [
            float(torch.stack([p.mean() for (_, at), p in out.zero_attention.items() if at == c]).mean())
            for c in range(depth)
        ]
        result["exits"] = exits(model, x, target)
    return result


def exits(model: ZeroTokenForCausalLM, x: torch.Tensor, target: torch.Tensor) -> dict[str, list[dict[str, float]]]:
    """Accuracy against mean cycles for three criteria; the random exit shows what the mean depth alone is worth."""
    found: dict[str, list[dict[str, float]]] = {}
    model.config.exit_scope = "token"
    for criterion, never in (("zero_attention", 1.0), ("latent", 0.0), ("random", 0.0)):
        model.config.exit_criterion = criterion
        scores = model(x, use_cache=False, exit_threshold=never).exit_scores[0].flatten()
        found[criterion] = []
        for share in (0.1, 0.25, 0.5, 0.75, 0.9):
            cut = float(scores.quantile(1 - share))
            threshold = {"zero_attention": cut, "random": 1 - cut}.get(criterion, -cut)
            out = model(x, use_cache=False, exit_threshold=threshold)
            counts = target >= 0
            found[criterion].append(
                {
                    "threshold": threshold,
                    "mean cycles": float(out.cycles[counts].float().mean()),
                    "accuracy": accuracy(out.logits, target),
                }
            )
    model.config.exit_criterion, model.config.exit_scope = "zero_attention", "sequence"
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"task": __doc__.partition("\n")[0], "cells": []}
    done = {(c["variant"], c["seed"], c["steps"]) for c in record["cells"]}
    begin = time.monotonic()
    for seed in range(options.seeds):
        for variant in VARIANTS:
            if (variant, seed, options.steps) in done:
                continue
            if time.monotonic() - begin > 60 * options.minutes:
                print("out of time; start again to go on")
                return
            cell = train(variant, seed, options.steps)
            commit = subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
            ).stdout.strip()
            cell |= {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit,
                "environment": environment(),
            }
            record["cells"].append(cell)
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(record, indent=1) + "\n")
            print(
                {k: cell[k] for k in ("variant", "seed", "accuracy", "loss", "seconds")},
                cell.get("accuracy by cycles"),
                flush=True,
            )


if __name__ == "__main__":
    main()
