"""HRP and its controls on SmolLM2-135M-Instruct, on two procedural tasks with checked answers.

    python -m benchmarks.claims.hrp.smollm2 [--budget SECONDS]

Loss of the answers on 64 unseen examples after 40 optimiser steps of 4 rows; a step of preheating is charged as one.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any

import torch
from benchmarks.claims.hrp.result import run_cells
from peft import LoraConfig, get_peft_model

from modicum.jobs.adapters import config_fields, initialize
from modicum.jobs.data import DataSection, collate, load_rows, tokenize
from modicum.jobs.models import load_model, load_tokenizer

MODEL = "builtin:smollm2-135m-instruct"
TASKS = ("chain_sum", "spell_backward")
RANK, TOTAL, PREHEAT, ROWS, UNSEEN = 8, 40, 10, 4, 64
LRS = (3e-4, 1e-3, 3e-3)
SEEDS = 3
HRP = {"preheat_steps": PREHEAT}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("default", {}),
    "hrp R=8": ("hrp", HRP | {"preheat_rank": 8}),
    "hrp R=128": ("hrp", HRP | {"preheat_rank": 128}),
    "balanced R=8": ("hrp", HRP | {"preheat_rank": 8, "init_factor": "balanced"}),
    "balanced R=128": ("hrp", HRP | {"preheat_rank": 128, "init_factor": "balanced"}),
    "pissa": ("pissa", {}),
    "lora-one": ("lora_one", {}),
    "rslora": ("rslora", {}),
}


@cache
def parts(task: str, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the training batches and the unseen ones."""
    tokenizer = load_tokenizer(MODEL)
    made = []
    for split_seed, rows in ((seed, TOTAL * ROWS), (10_000 + seed, UNSEEN)):
        section = DataSection(path=f"reasoning-gym:{task}", size=rows, seed=split_seed, max_length=128)
        tokens = list(tokenize(load_rows(section, seed=split_seed), tokenizer, section))
        join = collate(tokenizer)
        made.append([join(tokens[start : start + ROWS]) for start in range(0, rows, ROWS)])
    return made[0], made[1]


def run(cell: dict[str, Any]) -> dict[str, Any]:
    name, knobs = METHODS[cell["method"]]
    training, unseen = parts(cell["task"], cell["seed"])
    base: Any = load_model(MODEL, dtype="float32")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **config_fields(name))
    model = get_peft_model(base, config)
    started = initialize(
        model, name, knobs, batches=lambda: training, lr=cell["lr"], seed=cell["seed"], total_steps=TOTAL
    )
    spent = PREHEAT if name == "hrp" else started.origin.get("batches", 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cell["lr"], weight_decay=0.0)
    steps = TOTAL - spent
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 5, 1 - s / steps))
    model.train()
    for batch in training[spent:]:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        loss = sum(float(model(**batch).loss) for batch in unseen) / len(unseen)
    return {"loss": loss, "main_steps": steps}


def cells() -> list[dict[str, Any]]:
    return [
        {"task": task, "method": method, "lr": lr, "seed": seed}
        for seed in range(SEEDS) for task in TASKS for lr in LRS for method in METHODS
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=400)
    run_cells("hrp-smollm2", cells(), run, budget=parser.parse_args().budget, workers=1)
