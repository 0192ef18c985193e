"""A byte-level model of width 384 on 100 million tokens, looped and not: fifteen minutes of one accelerator.

    python -m benchmarks.claims.zero_token.wide [--seeds 5] [--minutes 13] [--trial]

Python's own sources; four variants on the same batches, each seed in turn, so that what is there when the time is up is
paired. ``--trial`` runs a tiny size on the processor, to see that everything works. No results are committed yet.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from typing import Any

import torch
from benchmarks import cells
from torch import Tensor

from modicum.jobs.data.rows import DataSection, load_rows
from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM, fit_exit_gate, parameter_groups
from modicum.models.zero_token.calibrate import exit_curve, loss_by_cycles
from modicum.random import generator

RESULT = "zero-token-wide"
SIZES: dict[str, dict[str, int]] = {
    "full": {"width": 384, "heads": 6, "layers": 6, "length": 512, "batch": 64, "steps": 3000},
    "trial": {"width": 32, "heads": 2, "layers": 4, "length": 32, "batch": 4, "steps": 6},
}
CYCLES, RATE = 3, 1.5e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla, equal parameters": {"n_cycles": 1, "zero_token": False},
    "HTC": {"n_cycles": CYCLES, "zero_token": False},
    "ZTT": {"n_cycles": CYCLES},
    "off-by-one key": {"n_cycles": CYCLES, "zero_kind": "off_by_one"},
}
CRITERIA = ("zero_attention", "confidence", "gate", "latent", "random")


def corpus(split: str, device: torch.device) -> Tensor:
    rows = load_rows(DataSection(path="builtin:python-stdlib", split=split, shuffle=True), seed=0).rows
    return torch.frombuffer(bytearray(b"\n".join(row["text"].encode() for row in rows)), dtype=torch.uint8).to(device)


def measure(variant: str, seed: int, size: dict[str, int], device: torch.device) -> dict[str, Any]:
    host = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": size["width"], "intermediate_size": 4 * size["width"],
        "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"], "max_position_embeddings": 2 * size["length"],
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ZeroTokenForCausalLM(ZeroTokenConfig(host=host, seed=seed, **VARIANTS[variant])).to(device).train()
    groups = parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=size["steps"], pct_start=0.05)
    step_of = (
        torch.compile(partial(model, use_cache=False)) if device.type == "cuda" else partial(model, use_cache=False)
    )
    data, began = corpus("train", device), time.perf_counter()
    for step in range(size["steps"]):
        starts = torch.randint(len(data) - size["length"], (size["batch"], 1), generator=generator(seed, "text", step))
        ids = data[starts.to(device) + torch.arange(size["length"], device=device)].long()
        # Half of the steps run all cycles, the others as many as are drawn: every cycle is a place to leave.
        drawn = int(torch.randint(1, 2 * CYCLES + 1, (), generator=generator(seed, "cycles", step)))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = step_of(ids, labels=ids, n_cycles=min(model.depth, drawn if drawn <= CYCLES else CYCLES)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    return {"training seconds": round(seconds, 1)} | evaluate(model.eval(), corpus("test", device), size)


def evaluate(model: ZeroTokenForCausalLM, held: Tensor, size: dict[str, int]) -> dict[str, Any]:
    whole = held[: len(held) // size["length"] * size["length"]].view(-1, size["length"])[: 8 * size["batch"]].long()
    fitted, kept = whole[::2].split(size["batch"]), whole[1::2].split(size["batch"])
    losses = loss_by_cycles(model, kept)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "visits": len(model.schedule),
        "bits per byte": round(losses[-1] / math.log(2), 5),
        "bits per byte by cycles": [round(loss / math.log(2), 5) for loss in losses],
    }
    if model.depth == 1:
        return found
    fit_exit_gate(model, fitted)
    for criterion in CRITERIA:
        if criterion != "zero_attention" or model._rows:
            model.config.exit_criterion = criterion
            points = exit_curve(model, kept, candidates=8)
            found.setdefault("exits", {})[criterion] = [[p.mean_cycles, p.visits, p.loss] for p in points]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=13.0)
    parser.add_argument("--trial", action="store_true")
    options = parser.parse_args()
    size = SIZES["trial" if options.trial else "full"]
    device = torch.device("cuda" if torch.cuda.is_available() and not options.trial else "cpu")
    if options.trial:
        print(measure("ZTT", 0, size, device))
        return
    recall = cells.resumable(RESULT, minutes=options.minutes, about={"size": size, "cycles": CYCLES, "rate": RATE})
    wanted = [(variant, seed) for seed in range(options.seeds) for variant in VARIANTS]
    cells.measure_all(recall, {f"{v}|{s}": partial(one, v, s, size, device) for v, s in wanted})


def one(variant: str, seed: int, size: dict[str, int], device: torch.device) -> dict[str, Any]:
    return {"variant": variant, "seed": seed} | measure(variant, seed, size, device)


if __name__ == "__main__":
    main()
