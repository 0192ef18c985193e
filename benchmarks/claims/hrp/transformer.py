"""All initialisations on a tiny transformer: learn a teacher whose weights differ by a known change, by distillation.

    python -m benchmarks.claims.hrp.transformer [--minutes MINUTES]

A two-layer Llama of width 48 is trained on an order-2 Markov source. The teacher is that model plus a change of rank 16
in every linear, whose singular values fall as 1/i and whose norm is 35 % of the weight's. Students learn the teacher's
logits with LoRA of rank 4. Every method gets 165 optimiser steps in all: a start that costs steps (preheating) or
gradients is charged for them. The best learning rate of each method is bracketed: rates beyond the grid are tried until
both of its neighbours are worse.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.cells import resumable
from benchmarks.claims.hrp.result import done_in, key_of, run_cells, untried
from peft import get_peft_model
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.adapters.angles import captured, principal_angles
from modicum.adapters.layers import factors_of, lora_layers
from modicum.jobs.training.adapter import after_backward, initialize, make_optimizer, peft_config
from modicum.random import generator

VOCABULARY, TOKENS, BATCH, RANK = 24, 24, 16, 4
PREHEAT, TOTAL, PRETRAIN = 15, 165, 500
NAME = "hrp-transformer"
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
LRS = (3e-3, 1e-2, 3e-2)  # everybody's; the best of them is followed until it has a worse one on either side
SEEDS = 3

HRP = {"preheat_steps": PREHEAT}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("default", {}),
    "hrp R=4": ("hrp", HRP | {"preheat_rank": 4}),
    "hrp R=16": ("hrp", HRP | {"preheat_rank": 16}),
    "hrp R=48": ("hrp", HRP | {"preheat_rank": 48}),
    "hrp R=48, U to B": ("hrp", HRP | {"preheat_rank": 48, "init_factor": "B"}),
    "balanced R=4": ("hrp", HRP | {"preheat_rank": 4, "init_factor": "balanced"}),
    "balanced R=48": ("hrp", HRP | {"preheat_rank": 48, "init_factor": "balanced"}),
    "gaussian": ("gaussian", {}),
    "orthogonal": ("orthogonal", {}),
    "etf": ("etf", {}),
    "rslora": ("rslora", {}),
    "lora+": ("lora_plus", {}),
    "lora-fa": ("lora_fa", {}),
    "pissa": ("pissa", {}),
    "milora": ("milora", {}),
    "olora": ("olora", {}),
    "mica": ("mica", {}),
    "eva": ("eva", {}),
    "corda": ("corda", {}),
    "lora-ga": ("lora_ga", {}),
    "lora-ga, authors": ("lora_ga", {"convention": "authors"}),
    "lora-one": ("lora_one", {}),
    "lora-sb": ("lora_sb", {}),
    "lora-xs": ("lora_xs", {}),
    "dora": ("dora", {}),
    "adalora": ("adalora", {}),  # without its penalty, which PEFT adds to a loss of the model's own only
    "lora r=48": ("default", {}),
    "full": ("", {}),
}
GRADIENTS = 8  # batches for the starts that look at data, charged as steps


def source(seed: int, count: int) -> Tensor:
    """Draw rows from an order-2 Markov chain with peaked transitions."""
    rng = generator(0, "markov")
    table = torch.softmax(2.5 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=rng), -1)
    rng = generator(seed, "rows")
    rows = torch.randint(0, VOCABULARY, (count, 2), generator=rng)
    for _ in range(TOKENS - 2):
        chances = table[rows[:, -2], rows[:, -1]]
        rows = torch.cat([rows, torch.multinomial(chances, 1, generator=rng)], 1)
    return rows


@cache
def base_model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=TOKENS, pad_token_id=0,
            )
        )  # fmt: skip
    kept = Path(tempfile.gettempdir()) / f"modicum-hrp-base-{PRETRAIN}-{BATCH}.safetensors"
    if kept.exists():
        load_model(model, kept)
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAIN)
    rows = source(1, PRETRAIN * BATCH).split(BATCH)
    for ids in rows:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_model(model, str(kept))
    return model.eval()


def teacher(seed: int) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """Return the base plus a change of rank 16 in every linear, and the changes."""
    model, changes = copy.deepcopy(base_model()), {}
    for name, module in model.model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        rng = generator(seed, "teacher", name)
        U, V = (torch.linalg.qr(torch.randn(n, 16, generator=rng)).Q for n in module.weight.shape)
        change = (U / torch.arange(1, 17)) @ V.T
        change *= 0.35 * module.weight.detach().norm() / change.norm()
        with torch.no_grad():
            module.weight.add_(change)
        changes[f"model.{name}"] = change
    return model, changes


def distance(model: Any, guide: Any, ids: Tensor) -> Tensor:
    """Return the mean divergence of the model's next-token distribution from the teacher's."""
    with torch.no_grad():
        wanted = guide(input_ids=ids).logits.log_softmax(-1)
    found = model(input_ids=ids).logits.log_softmax(-1)
    return functional.kl_div(found, wanted, log_target=True, reduction="sum") / ids.numel()


def run(cell: dict[str, Any]) -> dict[str, Any]:
    name, knobs = METHODS[cell["method"]]
    seed, lr = cell["seed"], cell["lr"]
    guide, changes = teacher(seed)
    rows = source(100 + seed, (TOTAL + 1) * BATCH).split(BATCH)

    def batches() -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": ids} for ids in rows)

    steps = TOTAL
    model: Any = copy.deepcopy(base_model())
    if name:
        rank = 48 if cell["method"] == "lora r=48" else RANK
        # The scaling is 2 for every rank, so that a rank's effect is not its scaling's.
        config = peft_config(name, knobs, rank=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = get_peft_model(model, config)
        started = initialize(
            model, name, knobs, batches=batches, lr=lr, seed=seed, total_steps=TOTAL,
            loss=lambda m, batch: distance(m, guide, batch["input_ids"]),
        )  # fmt: skip
        if name == "hrp":
            steps -= PREHEAT
        elif "batches" in started.origin:
            steps -= GRADIENTS
    parameters = [p for p in model.parameters() if p.requires_grad]
    start_A = _right_spaces(model) if name and name not in ("dora", "adalora", "lora_xs", "lora_sb") else {}
    optimizer = (name and make_optimizer(model, name, knobs, lr=lr)) or torch.optim.AdamW(
        parameters, lr=lr / 10 if not name else lr, weight_decay=0.0
    )
    warmup = 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item()),
    )
    model.train()
    # Everybody ends on the same batches; a start that cost steps has seen the first ones already.
    for step, ids in enumerate(rows[TOTAL - steps : TOTAL]):
        distance(model, guide, ids).backward()
        optimizer.step()
        if name:
            after_backward(model, name, step)
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        final = float(distance(model, guide, source(999, 512)))
    found: dict[str, Any] = {"kl": final, "trained": sum(p.numel() for p in parameters), "main_steps": steps}
    if start_A:
        end_A = _right_spaces(model)
        found["captured_at_start"] = _mean(float(captured(changes[n], A)) for n, A in start_A.items() if A.any())
        found["captured_at_end"] = _mean(float(captured(changes[n], A)) for n, A in end_A.items() if A.any())
        found["angle_start_to_end"] = _mean(
            float(principal_angles(A, end_A[n]).mean()) for n, A in start_A.items() if A.any()
        )
    return found


def _right_spaces(model: Any) -> dict[str, Tensor]:
    return {n: factors_of(layer, "default")[0].detach().clone() for n, layer in lora_layers(model).items()}


def _mean(values: Iterator[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def cells(rates: Callable[[str], Iterable[float]]) -> list[dict[str, Any]]:
    """The question of the study first, then everybody else."""
    first = ("lora", "hrp R=4", "hrp R=48", "hrp R=48, U to B", "balanced R=4", "balanced R=48")
    rest = [method for method in METHODS if method not in first]
    return [
        {"method": method, "lr": lr, "seed": seed}
        for methods in (first, rest) for seed in range(SEEDS) for method in methods for lr in rates(method)
    ]  # fmt: skip


def beyond(method: str) -> list[float]:
    """Return the rates that the method's best one still needs as neighbours."""
    done = done_in(NAME)
    losses = {}
    for lr in LADDER:
        found = [done.get(key_of({"method": method, "lr": lr, "seed": seed})) for seed in range(SEEDS)]
        if all(found):
            losses[lr] = sum(cell["kl"] for cell in found) / SEEDS
    return untried(LADDER, losses)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=7.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recall, wanted = resumable(NAME, minutes=options.minutes), cells(lambda _: LRS)
    while wanted:
        if not run_cells(recall, wanted, run):
            return
        wanted = cells(beyond)
    print("All cells are there.")


if __name__ == "__main__":
    main()
