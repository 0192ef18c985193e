"""LoRA snapshots of SmolLM2-135M that learns to reverse words: python -m benchmarks.claims.sewa.smollm2 [--minutes 30].

A constant and a high rate, eight snapshots of the last steps, and a run that lowers its rate over the same steps.
Selection looks at training rows, the guard and the report at rows that were not learned. Run it again to go on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.claims.sewa.arms import HELD_OUT, LEARNT, measure, run_study

from modicum.jobs import execute
from modicum.jobs.averaging.loss import make_landscape
from modicum.jobs.data.batches import load_batches
from modicum.jobs.data.section import DataSection
from modicum.jobs.loading.models import load_tokenizer
from modicum.recipe import parse
from modicum.weights import Checkpoint
from modicum.weights.search import Landscape

MODEL = "builtin:smollm2-135m-instruct"
TASK = {
    "path": "reasoning-gym:word_sequence_reversal", "config": {"min_words": 3, "max_words": 4}, "system": ""
}  # fmt: skip
N, EVERY, STEPS, ITERS = 8, 3, 48, 40
RATES = {"calm": 5e-4, "fast": 3e-3}
ROWS = {"train": 192, "selection": 16, "guard": 16, "report": 64}
DEVICE = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
KEPT = ("greedy", "sewa, k auto, no exchanges", "quadratic, k auto", "quadratic")


def train(folder: Path, seed: int, rate: float, **more: Any) -> Path:
    trainer = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": rate, "warmup_steps": 4,
        "lr_scheduler_type": "constant_with_warmup", "logging_steps": 12, "save_steps": EVERY, "save_total_limit": N,
    } | more  # fmt: skip
    data = TASK | {"size": ROWS["train"], "seed": seed}
    recipe = {"job": "train", "model": MODEL, "seed": seed, "data": data, "adapter": {"rank": 8}, "trainer": trainer}
    return Path(execute(parse(recipe), folder, quiet=True).folder)


def work(rate: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        plain = train(Path(place) / "plain", seed, RATES[rate])
        window = N * EVERY
        decay = {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": window, "decay_type": "linear", "min_lr_ratio": 0.0},
        }
        decayed = Checkpoint(train(Path(place) / "decayed", seed, RATES[rate], **decay) / "adapter")
        states = [Checkpoint(plain / f"checkpoints/checkpoint-{STEPS - EVERY * back}") for back in range(N)][::-1]
        recipe: Any = parse({
            "job": "average", "checkpoints": [str(plain / "checkpoints")], "method": "quadratic", "batch_size": 4,
            "device": DEVICE,
            "data": TASK | {"size": ROWS["selection"], "seed": seed},
            "held_out": TASK | {"split": "test", "size": ROWS["guard"], "seed": seed + 100},
        })  # fmt: skip
        made = make_landscape(recipe, states, print)
        section = DataSection(**TASK, split="test", size=ROWS["report"], seed=seed + 200)
        rows = load_batches(section, load_tokenizer(MODEL), batch_size=16, seed=seed)
        reporting = Landscape(made.function, states, rows, device=DEVICE)
        arms = measure(
            states,
            made.function,
            lambda c: {"loss": reporting.value(c)},
            batches=made.batches,
            held_out=made.held_out or (),
            seed=seed,
            leave_out=[*(name for name in LEARNT if name not in KEPT), HELD_OUT],
            iters=ITERS,
            device=DEVICE,
        )
        arms["decay over the window"] = {
            "loss": round(Landscape(made.function, [decayed], rows, device=DEVICE).value([1.0]), 6)
        }
        single = [round(reporting.value([float(i == j) for j in range(N)]), 4) for i in range(N)]
    return {"regime": rate, "seed": seed, "single": single, "arms": arms}


def main() -> None:
    about = {"snapshots": N, "every": EVERY, "steps": STEPS, "rates": RATES, "rows": ROWS, "iterations": ITERS}
    run_study(__doc__, "sewa-smollm2", about, {rate: (rate,) for rate in RATES}, work, minutes=30.0)


if __name__ == "__main__":
    main()
