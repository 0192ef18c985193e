"""Data selection while SmolLM2-135M learns eight packages by LoRA, one run an arm: ….smollm2 [--minutes 10].

Four workers of a stock Trainer choose by the callback that users have. The rows are the study's of the byte model in
SmolLM2's tokens; the loss at equal tokens is that of test files. One run shows that it works on a language model, and
no more. Run it again to go on.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import cache, partial
from typing import Any

import torch
from benchmarks.cells import measure_all, resumable
from benchmarks.claims.submodular.training import PACKAGES, texts
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.training.domains import DomainCallback, DomainStream
from modicum.submodular.data_selection import DomainScheduler, counted, similarities

MODEL = "builtin:smollm2-135m-instruct"
WORKERS, LENGTH, STEPS, EVERY, RATE, SEED = 4, 128, 40, 8, 1e-3, 0
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ROWS = {"train": 48, "probe": 2, "test": 4}
ARMS: dict[str, dict[str, Any]] = {
    "random": {},
    "odm": {"utility": "loss"},
    "last_greedy": {},
    "ma_spl": {"knobs": {"eta": 10.0}},
}


@cache
def rows(part: str) -> list[Tensor]:
    """Return token rows ``(count, LENGTH)`` of each package, evenly spaced over its files."""
    tokenizer, found = load_tokenizer(MODEL), []
    for text in texts("real")[part]:
        ids = torch.tensor(tokenizer(text.decode("utf-8", "replace")[:100_000])["input_ids"])
        starts = torch.linspace(0, len(ids) - LENGTH, ROWS[part]).long()
        found.append(ids[starts[:, None] + torch.arange(LENGTH)])
    return found


@torch.no_grad()
def losses(model: Any, part: str) -> list[float]:
    return [float(model(input_ids=ids, labels=ids).loss) for ids in (ids.to(DEVICE) for ids in rows(part))]


def arm(name: str) -> dict[str, Any]:
    """Train one adapter, and return the test losses before and after, and what was chosen."""
    torch.manual_seed(SEED)
    model: Any = load_model(MODEL, dtype=torch.float32, device=DEVICE)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    before = losses(model.eval(), "test")
    table = similarities(counted([text.decode("utf-8", "replace") for text in texts("real")["train"]]))
    scheduler = DomainScheduler(
        table, workers=WORKERS, domains=list(PACKAGES), policy=name, horizon=STEPS // EVERY, seed=SEED, **ARMS[name]
    )
    learnt = [[{"input_ids": ids, "labels": ids} for ids in part] for part in rows("train")]
    stream = DomainStream(dict(zip(PACKAGES, learnt, strict=True)), scheduler, batch=1, seed=SEED)
    callback = DomainCallback(stream, [{"input_ids": ids, "labels": ids} for ids in rows("probe")], every=EVERY)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=WORKERS, learning_rate=RATE, warmup_steps=5,
            save_strategy="no", report_to=[],
            use_cpu=DEVICE.type == "cpu", seed=SEED, disable_tqdm=True, logging_steps=STEPS,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=stream, callbacks=[callback]).train()
    after = losses(model.eval(), "test")
    shares = stream.tokens() / stream.tokens().sum()
    return {
        "policy": name, "before": sum(before) / len(before), "test": sum(after) / len(after), "worst": max(after),
        "final": after, "probes": callback.losses[-1], "shares": shares.tolist(),
    }  # fmt: skip


def main() -> None:
    """Run the arms that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"model": MODEL, "workers": WORKERS, "length": LENGTH, "steps": STEPS, "every": EVERY, "rate": RATE}
    measure_all(
        resumable("submodular-smollm2", minutes=options.minutes, about=about), {n: partial(arm, n) for n in ARMS}
    )


if __name__ == "__main__":
    main()
