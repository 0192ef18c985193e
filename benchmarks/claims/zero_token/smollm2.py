"""SmolLM2 with ten of its thirty layers run twice: does it beat the same fine-tuning without a loop?

    python benchmarks/claims/zero_token/smollm2.py [--steps 32] [--seeds 3] [--minutes 30] [--only VARIANT]

Fine-tuned by LoRA on the standard library's sources, measured on sources that were held out. A cell is a variant, a
seed and a number of steps; cells with a result are skipped, so the study may be stopped and started again. Seeds draw
the adapter and the order of the text; all variants of a seed read the same text.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from modicum.jobs.additions import additions
from modicum.jobs.data import DataSection, load_rows, tokenize
from modicum.jobs.models import load_model, load_tokenizer
from modicum.models import choose_cycle_range, convert_to_zero_token
from modicum.random import generator
from modicum.record import environment, write_atomic

RESULT = Path(__file__).parents[2] / "results" / "zero-token-smollm2.json"
MODEL = "builtin:smollm2-135m-instruct"
LENGTH, BATCH, RATE, NEW_RATE, HELD_OUT = 128, 2, 1e-3, 1e-2, 16
LOOP = {"n_cycles": 2, "n_head": 10, "n_tail": 10}
VISITS = {"layers": 30, "looped": 40}
VARIANTS: dict[str, dict[str, object] | None] = {
    "base": None,  # not trained at all
    "plain, same tokens": None,
    "plain, same compute": None,
    "HTC": LOOP | {"zero_token": False},
    "ZTT": LOOP,
    "ZTT, range by angle": LOOP,
}


@cache
def windows(split: str, seed: int, count: int) -> torch.Tensor:
    """Return ``count`` windows of text, in the order of ``seed``; the held-out ones are always the same."""
    tokenizer = load_tokenizer(MODEL)
    size = max(8, count // 8)  # documents; most hold more than eight windows
    section = DataSection(
        path="builtin:python-stdlib", split=split, size=size, shuffle=True, packing=True, max_length=LENGTH
    )
    rows = tokenize(load_rows(section, seed=seed), tokenizer, section)["input_ids"]
    whole = torch.tensor([ids for ids in rows if len(ids) == LENGTH])
    if len(whole) < count:
        raise SystemExit(f"{size} documents hold {len(whole)} windows, {count} are needed. Raise `size`.")
    return whole[torch.randperm(len(whole), generator=generator(seed, "windows", split))[:count]]


def build(variant: str, seed: int) -> tuple[torch.nn.Module, dict[str, object]]:
    model = load_model(MODEL, dtype="float32")
    knobs, about = VARIANTS[variant], {}
    if knobs is not None:
        if variant == "ZTT, range by angle":
            found = choose_cycle_range(model, [windows("train", seed, 8)], width=10)
            knobs = knobs | {"n_head": found.n_head, "n_tail": found.n_tail}
        model = convert_to_zero_token(model, seed=seed, **knobs)
        about = {"n_head": model.config.n_head, "n_tail": model.config.n_tail, "loss untrained": loss_of(model)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=sorted(additions(model)) or None
        )
        return get_peft_model(model, config), about


def train(variant: str, seed: int, steps: int) -> dict[str, object]:
    wall, processor = time.perf_counter(), time.process_time()
    if variant == "base":
        cell: dict[str, object] = {"loss": loss_of(load_model(MODEL, dtype="float32"))}
    else:
        model, cell = build(variant, seed)
        # The looped models make 40 layer visits where the plain one makes 30: it may read a third more.
        more = VISITS["looped"] / VISITS["layers"] if variant == "plain, same compute" else 1
        cell |= {"tokens": fine_tune(model, seed, round(steps * more), steps)}
        cell["loss"] = loss_of(model.eval())
        if VARIANTS[variant] is not None:
            cell |= by_cycle(model)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    return {"variant": variant, "seed": seed, "steps": steps} | cell | {"seconds": seconds}


def fine_tune(model: torch.nn.Module, seed: int, steps: int, shared: int) -> int:
    # Windows beyond those that all variants read come last, so that the rest of the order is the same.
    text = windows("train", seed, math.ceil(shared * 4 / 3) * BATCH)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    new = [p for name, p in named if "zero_token" in name]
    groups = [{"params": [p for name, p in named if "zero_token" not in name], "lr": RATE}]
    groups += [{"params": new, "lr": NEW_RATE}] if new else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 4) * (0.55 + 0.45 * math.cos(math.pi * i / steps))
    )
    model.train()
    for ids in text[: steps * BATCH].split(BATCH):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return steps * BATCH * LENGTH


@torch.no_grad()
def loss_of(model: torch.nn.Module, **knobs: object) -> float:
    """Return the mean loss on the held-out windows, in nats for each token."""
    batches = windows("test", 0, HELD_OUT).split(4)
    return statistics.fmean(float(model(input_ids=x, labels=x, use_cache=False, **knobs).loss) for x in batches)


@torch.no_grad()
def by_cycle(model: torch.nn.Module) -> dict[str, object]:
    found: dict[str, object] = {"loss with 1 cycle": loss_of(model, n_cycles=1)}
    out = model(input_ids=windows("test", 0, HELD_OUT)[:4], use_cache=False, output_zero_attention=True)
    if out.zero_attention:
        found["zero attention by cycle"] = [
            statistics.fmean(float(p.mean()) for (_, at), p in out.zero_attention.items() if at == cycle)
            for cycle in range(2)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--only", choices=VARIANTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"what": (__doc__ or "").partition("\n")[0]}
    cells = record.setdefault("cells", [])
    record |= {"length": LENGTH, "batch": BATCH, "rate": RATE, "rate of the zero tokens": NEW_RATE}
    begin = time.monotonic()
    for seed in range(options.seeds):
        for variant in [options.only] if options.only else VARIANTS:
            # What is not trained depends on neither.
            key = (variant, 0, 0) if variant == "base" else (variant, seed, options.steps)
            if any((c["variant"], c["seed"], c["steps"]) == key for c in cells):
                continue
            if time.monotonic() - begin > 60 * options.minutes:
                print("out of time; start again to go on")
                return
            cell = train(*key)
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
            about = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.strip()}
            cells.append(cell | about | {"environment": environment()})
            RESULT.parent.mkdir(exist_ok=True)
            write_atomic(RESULT, json.dumps(record, indent=1) + "\n")
            print(cell, flush=True)


if __name__ == "__main__":
    main()
