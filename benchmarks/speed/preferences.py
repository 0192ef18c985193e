"""What a step on pairs costs beside TRL's DPOTrainer with precomputed reference: same LoRA, rows and precision.

    python -m benchmarks.speed.preferences [--prompt 200] [--answer 50] [--pairs 4] [--steps 4] [--rounds 2]

Both train SmolLM2-135M on one batch of pairs, in float32 on the processor, each in a process of its own, whose peak of
memory is then its own; they take turns. Time is that of a step after the first, by the trainer's callbacks: by the
clock, and as seconds of processors, which a busy machine changes less.
Results are merged into ``benchmarks/results/preferences-speed.json``, each case with its code, machine and load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "preferences-speed.json"
PAIRS = 4
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def rows(count: int, prompt: int, answer: int, tokenizer: Any) -> list[dict[str, str]]:
    """Return pairs of about so many tokens, of words of one token each."""
    words = [" " + w for w in "the a of and to in is it on as at by for with from this that was are be".split()]  # noqa: SIM905
    words = [word for word in words if len(tokenizer(word)["input_ids"]) == 1]

    def text(length: int, shift: int) -> str:
        return "".join(words[(shift + 3 * i + i // 7) % len(words)] for i in range(length))

    return [
        {"prompt": text(prompt, i), "chosen": text(answer, i + 5), "rejected": text(answer, i + 11)}
        for i in range(count)
    ]


def measured(side: str, count: int, prompt: int, answer: int, steps: int) -> dict[str, Any]:
    """Train, and return seconds of each step after the first, losses and the peak of memory."""
    import torch
    from benchmarks.memory import Peak
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback

    from modicum.jobs.loading.models import load_model, load_tokenizer

    name = "builtin:smollm2-135m-instruct"
    model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
    tokenizer.chat_template = None  # both then end an answer alike
    given = rows(count, prompt, answer, tokenizer)
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": count,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.marks: list[float] = []
            self.work: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())
            self.work.append(time.process_time())

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, Peak() as peak:
        if side == "trl":
            import trl
            from datasets import Dataset

            torch.manual_seed(0)  # both draw the adapter now
            trainer: Any = trl.DPOTrainer(
                model=get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)),
                args=trl.DPOConfig(output_dir=folder, precompute_ref_log_probs=True, max_length=None, **arguments),
                train_dataset=Dataset.from_list(given),
                processing_class=tokenizer,
                callbacks=[clock],
            )
        else:
            trainer = _ours(get_peft_model, LoraConfig, model, tokenizer, given, folder, arguments, clock)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seconds = [b - a for a, b in zip(clock.marks, clock.marks[1:])]
    work = [b - a for a, b in zip(clock.work, clock.work[1:])]
    return {"seconds": seconds, "work": work, "losses": losses, "bytes": peak.bytes}


def _ours(
    wrap: Any, config: Any, model: Any, tokenizer: Any, given: Any, folder: str, arguments: Any, clock: Any
) -> Any:
    import torch
    from transformers import TrainingArguments

    from modicum.evaluate.rows import Rows
    from modicum.jobs.data.collators import pad_id
    from modicum.jobs.data.pairs import encode_pairs
    from modicum.jobs.data.section import DataSection
    from modicum.jobs.training.parts import Build
    from modicum.jobs.training.preferences import layout, use_pairs
    from modicum.jobs.training.references import referenced
    from modicum.jobs.training.trainer import build_trainer
    from modicum.registry import objective

    section = DataSection(path="benchmark", max_length=4096)
    pairs = encode_pairs(Rows("preference", given), tokenizer, section, note=print)
    collator = layout(model, pairs, pad_id(tokenizer), print)
    (pairs,) = referenced([pairs], model, collator, precision="float32", note=print, folder=Path(folder) / "store")
    torch.manual_seed(0)
    build = Build(
        wrap(model, config(task_type="CAUSAL_LM", **LORA)),
        TrainingArguments(output_dir=folder, remove_unused_columns=False, **arguments),
        tokenizer,
        collator,
        pairs,
    )
    use_pairs(build, "dpo", objective["dpo"].knobs({}), collator=collator)
    build.add_callback(clock)
    return build_trainer(build)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--answer", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["trl", "modicum"])
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(given.side, given.pairs, given.prompt, given.answer, given.steps)))
        return
    from benchmarks.provenance import origin

    from modicum.environment import environment
    from modicum.record import write_atomic

    found: dict[str, list[dict[str, Any]]] = {"trl": [], "modicum": []}
    where, load = {**origin(), "environment": environment()}, [os.getloadavg()[0]]
    for _ in range(given.rounds):
        for side, kept in found.items():
            command = [sys.executable, "-m", "benchmarks.speed.preferences", "--side", side]
            for key in ("pairs", "prompt", "answer", "steps"):
                command += [f"--{key}", str(getattr(given, key))]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            kept.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {side: statistics.median(s for one in kept for s in one["seconds"]) for side, kept in found.items()}
    work = {side: statistics.median(s for one in kept for s in one["work"]) for side, kept in found.items()}
    size = {side: statistics.median(one["bytes"] for one in kept) for side, kept in found.items()}
    result = {
        **where,
        "load": [*load, os.getloadavg()[0]],  # before and after
        "pairs": given.pairs,
        "processor_seconds_per_step": work,
        "processor_ratio": work["trl"] / work["modicum"],
        "seconds_per_step": seconds,
        "pairs_per_second_ratio": seconds["trl"] / seconds["modicum"],
        "peak_bytes": size,
        "memory_ratio": size["modicum"] / size["trl"],
        "first_losses": {side: kept[0]["losses"][0] for side, kept in found.items()},
        "last_losses": {side: kept[0]["losses"][-1] for side, kept in found.items()},
        "steps": given.steps,
        "rounds": given.rounds,
    }
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    cases = old.get("cases", {}) | {f"prompt {given.prompt}, answer {given.answer}": result}
    write_atomic(RESULTS, json.dumps({"cases": cases}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
