"""HRP and its controls on SmolLM2-135M-Instruct, on two procedural tasks with checked answers.

    python -m benchmarks.claims.hrp.smollm2 [--minutes MINUTES] [--tasks chain_sum]

Loss of the answers on 24 unseen examples after 16 optimiser steps of 2 rows. A step of preheating and a batch that a
start looks at are charged as one step, so random LoRA gets all 16 as main steps. One seed selects each method's
learning rate, following the best one outwards until both of its neighbours are worse; three seeds then compare at that
rate and at a fixed one, the same for all.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.cells import resumable
from benchmarks.claims.hrp.result import done_in, key_of, run_cells, untried
from peft import get_peft_model

from modicum.jobs.data.rows import DataSection, LabelledLogits, collate, load_rows, tokenize
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.training.adapter import initialize, peft_config

NAME, MODEL = "hrp-smollm2", "builtin:smollm2-135m-instruct"
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "spell_backward": {},
}
RANK, TOTAL, PREHEAT, ROWS, UNSEEN = 8, 16, 4, 2, 24
LADDER, FIXED, SEEDS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-3, 3
HRP = {"preheat_steps": PREHEAT}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("default", {}),
    "lora-ga": ("lora_ga", {"batches": PREHEAT}),
    "hrp R=8": ("hrp", HRP | {"preheat_rank": 8}),
    "hrp R=128": ("hrp", HRP | {"preheat_rank": 128}),
    "balanced R=128": ("hrp", HRP | {"preheat_rank": 128, "init_factor": "balanced"}),
}
_starts = tempfile.TemporaryDirectory(prefix="modicum-hrp-")


@cache
def parts(task: str, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the training batches and the unseen ones; prompts stand alone, which keeps the rows short."""
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = None
    join = LabelledLogits(collate(tokenizer))
    made = []
    for split, rows, size in (("train", TOTAL * ROWS, ROWS), ("test", UNSEEN, UNSEEN)):
        section = DataSection(
            path=f"reasoning-gym:{task}",
            size=rows,
            split=split,
            config=TASKS[task],
            template="{prompt}\n",
            max_length=64,
        )
        tokens = list(tokenize(load_rows(section, seed=seed), tokenizer, section))
        made.append([join(tokens[start : start + size]) for start in range(0, rows, size)])
    return made[0], made[1]


@cache
def base_model() -> Any:
    return load_model(MODEL, dtype="float32")


def _kept(cell: dict[str, Any]) -> Path | None:
    """Return where this process keeps a start that is the same for every learning rate; preheating is not."""
    name, _ = METHODS[cell["method"]]
    data = f"-{cell['task']}-{cell['seed']}" if name.startswith("lora_") else ""
    return None if name == "hrp" else Path(_starts.name) / f"{name}{data}-{cell['seed']}.safetensors"


def run(cell: dict[str, Any]) -> dict[str, Any]:
    name, knobs = METHODS[cell["method"]]
    training, unseen = parts(cell["task"], cell["seed"])
    config = peft_config(name, knobs, rank=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model: Any = get_peft_model(copy.deepcopy(base_model()), config)
    started = initialize(
        model, name, knobs, batches=lambda: training, lr=cell["lr"], seed=cell["seed"], total_steps=TOTAL,
        cache=_kept(cell),
    )  # fmt: skip
    spent = started.origin.get("preheat_steps", started.origin.get("batches", 0))
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


def climb(task: str, method: str, done: dict[str, dict[str, Any]]) -> tuple[list[float], float]:
    """Return the rates that the first seed has to try next, and the best so far."""
    losses = {
        lr: done[key]["loss"]
        for lr in LADDER if (key := key_of({"task": task, "method": method, "lr": lr, "seed": 0})) in done
    }  # fmt: skip
    return (untried(LADDER, losses), min(losses, key=losses.__getitem__)) if losses else ([FIXED], FIXED)


def next_cells(task: str, done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The selection of the rates; once all are bracketed, the other seeds, at the fixed rate and the selected one."""
    states = {method: climb(task, method, done) for method in METHODS}
    if any(rates for rates, _ in states.values()):
        plan = [(method, lr, 0) for method, (rates, _) in states.items() for lr in rates]
    else:
        plan = [
            (method, lr, seed)
            for seed in range(1, SEEDS) for method, (_, best) in states.items() for lr in sorted({FIXED, best})
        ]  # fmt: skip
    made = [{"task": task, "method": method, "lr": lr, "seed": seed} for method, lr, seed in plan]
    return [cell for cell in made if key_of(cell) not in done]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    recall = resumable(NAME, minutes=options.minutes)
    for task in options.tasks:
        while cells := next_cells(task, done_in(NAME)):
            if not run_cells(recall, cells, run):
                return
    print("All cells are there.")


if __name__ == "__main__":
    main()
