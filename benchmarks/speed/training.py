"""What a training step costs beside a stock Trainer's, and what the check of the saved folder costs at the end.

    python -m benchmarks.speed.training [--steps 40] [--rows 2] [--tokens 64]

A LoRA adapter of SmolLM2-135M is trained on the same rows in the same order by `modicum run` and by
``transformers.Trainer`` with PEFT, both in float32. The two take turns after every step, so that what else the machine
does meets both; a step lasts from its beginning to that of the next, with all that lies between. Checkpoints are off in
both. The check is timed in the same run of modicum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import origin
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from modicum.environment import environment
from modicum.jobs import execute
from modicum.jobs.data.rows import collate, load_rows, tokenize
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.training import trainer as seam
from modicum.jobs.training.parts.verification import Verification
from modicum.recipe import parse
from modicum.record import write_atomic

RESULTS = Path(__file__).parents[1] / "results" / "training-speed.json"
MODEL = "builtin:smollm2-135m-instruct"
WARM = 3  # steps that are not counted
RUN = 200  # steps of the run of which the check is a share


class Turns:
    """Let two threads train a step each in turn, and keep how long each took."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.free = {name: threading.Semaphore(int(name == names[0])) for name in names}
        self.other = dict(zip(names, reversed(names)))
        self.taken: dict[str, list[float]] = {name: [] for name in names}
        self.begun: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """End a step, wait for the other's, and begin the next."""
        if name in self.begun:
            self.taken[name].append(time.perf_counter() - self.begun[name])
            self.free[self.other[name]].release()
        self.free[name].acquire()
        self.begun[name] = time.perf_counter()

    def leave(self, name: str) -> None:
        """Let the other go on alone."""
        for _ in range(10_000):
            self.free[self.other[name]].release()


class Clock(TrainerCallback):
    """Take turns at the beginning of every step."""

    def __init__(self, turns: Turns, name: str) -> None:
        self.turns, self.name = turns, name

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Wait for one's turn."""
        self.turns.begin(self.name)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the rest to the other."""
        self.turns.leave(self.name)


def recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the recipe, whose trainer's arguments the stock Trainer gets too."""
    return {
        "job": "train",
        "model": {"path": MODEL, "dtype": "float32"},
        "data": {
            "path": "reasoning-gym:spell_backward",
            "size": 200,
            "max_length": arguments.tokens,
            "completion_only": False,
        },
        "adapter": {"rank": 16, "config": {"lora_alpha": 32}},
        "trainer": {
            "max_steps": arguments.steps + WARM + 1,
            "per_device_train_batch_size": arguments.rows,
            "learning_rate": 1e-3,
            "logging_steps": 5,
            "save_strategy": "no",
        },
    }


def stock(folder: Path, wanted: dict[str, Any], turns: Turns) -> None:
    """Train with transformers and PEFT alone, as their documentation does."""
    read = parse(wanted)
    tokenizer = load_tokenizer(MODEL)
    rows = tokenize(load_rows(read.data, seed=read.seed), tokenizer, read.data)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    trainer = Trainer(
        model=get_peft_model(load_model(MODEL, dtype="float32"), config),
        args=TrainingArguments(str(folder), seed=read.seed, data_seed=read.seed, **options, **wanted["trainer"]),
        data_collator=collate(tokenizer),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Clock(turns, "stock")],
    )
    trainer.train()


def ours(folder: Path, wanted: dict[str, Any], turns: Turns, spent: list[float]) -> None:
    """Train as `modicum run` does, and time the check."""
    build = seam.build_trainer

    def timed(build_: Any) -> Any:
        trainer = build(build_)
        trainer.callback_handler.callbacks.insert(0, Clock(turns, "modicum"))
        return trainer

    def watched(function: Any) -> Any:
        def call(*given: Any) -> Any:
            begun = time.perf_counter()
            found = function(*given)
            spent.append(time.perf_counter() - begun)
            return found

        return call

    seam.build_trainer = timed
    Verification.finish, Verification.verify = watched(Verification.finish), watched(Verification.verify)
    execute(parse(wanted), folder, quiet=True)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted, turns, spent = recipe(arguments), Turns(("stock", "modicum")), []
    with tempfile.TemporaryDirectory() as place:
        other = threading.Thread(target=stock, args=(Path(place, "stock"), wanted, turns))
        other.start()
        ours(Path(place, "run"), wanted, turns, spent)
        other.join()
    pairs = list(zip(turns.taken["stock"], turns.taken["modicum"]))[WARM:]
    ratios = sorted(mine / theirs for theirs, mine in pairs)
    step = statistics.median(mine for _, mine in pairs)
    result = {
        "steps": len(ratios),
        "stock_step_seconds": round(statistics.median(theirs for theirs, _ in pairs), 4),
        "modicum_step_seconds": round(step, 4),
        "median_of_ratios": round(statistics.median(ratios), 4),
        "quartiles_of_ratios": [round(ratios[len(ratios) * share // 4], 4) for share in (1, 3)],
        "check_seconds": round(sum(spent), 3),
        "check_share_of_200_steps": round(sum(spent) / (RUN * step), 5),
        "recipe": wanted,
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "origin": origin(),
    }
    write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("recipe", "environment")}, indent=1))


if __name__ == "__main__":
    main()
