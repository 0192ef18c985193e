"""Cost of MEAP: the collator beside the plain one, a training step with and without, and the gathered head.

    python benchmarks/speed/meap.py [--pairs 6] [--parts collator head step]

Writes ``benchmarks/results/meap-speed.json``: parts that have no result yet, or those that are named, anew. Steps with
and without masks take turns in one run, so that a machine that is busy now and then is busy for both. Collators are
timed by the processor, on one thread, as they run in a loader's worker.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory import Peak, status
from benchmarks.provenance import origin

RESULTS = Path(__file__).parents[1] / "results" / "meap-speed.json"
ROWS, TOKENS = 2, 256  # of a training step on a CPU
PROMPT = 64  # of a fine-tuning row in the head's measurement
HEAD_ROWS, HEAD_TOKENS, WIDTH, VOCABULARY = 4, 512, 576, 49152


def clean(features: list[list[int]]) -> dict[str, torch.Tensor]:
    """Collate rows of one length; labels are the ids."""
    ids = torch.tensor(features)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the median processor time of a call."""
    work()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return statistics.median(found)


def collator() -> dict[str, float]:
    """Time the collators on rows as they come in pre-training, and masking alone on a million tokens."""
    from modicum.objectives import MEAPCollator, mask_inputs
    from modicum.philox import row_keys

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = torch.randint(5, 49_000, (8, 2048), generator=torch.Generator().manual_seed(0)).tolist()
    masked = MEAPCollator(clean, mask_token_id=49_152, protect_ids=range(5))
    plain, whole = seconds(lambda: clean(rows), 30), seconds(lambda: masked(rows), 30)
    ids = torch.randint(5, 49_000, (256, 4096), generator=torch.Generator().manual_seed(0))
    keys = row_keys(range(256), seed=0, method="meap")
    kinds = {
        kind: seconds(lambda: mask_inputs(ids, ratio=0.15, mask_token_id=49_152, keys=keys, sampling=kind), 3)  # noqa: B023
        for kind in ("fixed_count", "bernoulli")
    }
    torch.set_num_threads(threads)
    return {
        "plain_us_per_1k_tokens": 1e6 * plain / (8 * 2.048),
        "meap_us_per_1k_tokens": 1e6 * whole / (8 * 2.048),
        "added_us_per_1k_tokens": 1e6 * (whole - plain) / (8 * 2.048),
        **{f"mask_inputs_{kind}_ns_per_token": 1e9 * value / ids.numel() for kind, value in kinds.items()},
    }


def step(pairs: int) -> dict[str, Any]:
    """Train SmolLM2-135M with and without masks in turns."""
    from modicum.jobs.loading.models import load_model, load_tokenizer
    from modicum.objectives import MEAPCollator, ensure_mask_token

    reference = "builtin:smollm2-135m-instruct"
    model, tokenizer = load_model(reference, dtype="float32"), load_tokenizer(reference)
    mask = ensure_mask_token(model, tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    arms: dict[str, Callable[..., Any]] = {"ntp": clean, "meap": MEAPCollator(clean, mask_token_id=mask)}
    rng = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {name: [] for name in arms}
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(pairs + 1):
        for name in list(arms) if turn % 2 else list(arms)[::-1]:
            rows = torch.randint(20, 49_000, (ROWS, TOKENS), generator=rng).tolist()
            started = time.perf_counter()
            batch = arms[name](rows)
            collated = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn:  # the first is for warming up
                times[name].append(time.perf_counter() - started)
                spent[name].append(collated - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    added = statistics.median(spent["meap"]) - statistics.median(spent["ntp"])
    return {
        "rows": ROWS,
        "tokens": TOKENS,
        "pairs": pairs,
        "seconds": times,
        "tokens_per_second": {name: ROWS * TOKENS / value for name, value in medians.items()},
        "tokens_per_second_ratio": medians["ntp"] / medians["meap"],
        "collator_share_of_step": added / medians["meap"],
    }


def head(gathered: bool) -> dict[str, float]:
    """Measure the head and loss, forward and backward, on masked fine-tuning rows; run it in a fresh process."""
    from modicum.jobs.training.objective import LabelHead

    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(HEAD_ROWS, HEAD_TOKENS, WIDTH, generator=rng, requires_grad=True)
    labels = torch.full((HEAD_ROWS, HEAD_TOKENS), -100)
    count = (HEAD_TOKENS - PROMPT) // 10
    for row in labels:
        places = PROMPT + torch.randperm(HEAD_TOKENS - PROMPT, generator=rng)[:count]
        row[places] = torch.randint(0, VOCABULARY, (count,), generator=rng)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.lm_head

        def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.lm_head(hidden)}

    model = Model()
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    # Pages of the weight's gradient are touched before, so that they count for neither form.
    model.lm_head.weight.grad += 1.0
    form = LabelHead(model)
    positions = (labels.flatten() != -100).nonzero().flatten() - 1
    extra = {"label_positions": positions, "label_weights": torch.ones(positions.numel())} if gathered else {}
    hidden.grad = torch.zeros_like(hidden) + 1.0
    before = status("RssAnon")
    with Peak() as peak:
        started = time.perf_counter()
        form(model(hidden, **extra), labels).backward()
        took = time.perf_counter() - started
    return {
        "peak_mb": (peak.bytes - before) / 1e6,
        "seconds": took,
        "labels": count * HEAD_ROWS,
    }


def heads() -> dict[str, Any]:
    """Compare both forms of the head, each three times in a process of its own."""

    def once(kind: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--head", kind]
        found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    runs = {kind: [once(kind) for _ in range(3)] for kind in ("plain", "gathered")}
    medians = {
        kind: {what: statistics.median(r[what] for r in found) for what in ("peak_mb", "seconds")}
        for kind, found in runs.items()
    }
    ratios = {f"{what}_ratio": medians["gathered"][what] / value for what, value in medians["plain"].items()}
    return {"rows": HEAD_ROWS, "tokens": HEAD_TOKENS, "vocabulary": VOCABULARY, **runs, **ratios}


def main() -> None:
    """Measure the parts that have no result yet, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument(
        "--parts", nargs="*", choices=("collator", "head", "step"), help="default: those without a result"
    )
    parser.add_argument("--head", choices=("gathered", "plain"))
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if options.head:
        print(json.dumps(head(options.head == "gathered")))
        return
    from modicum.environment import environment
    from modicum.record import write_atomic

    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "meap_speed"}
    work = {"collator": collator, "head": heads, "step": lambda: step(options.pairs)}
    for part in options.parts or [part for part in work if part not in found]:
        machine = environment() | {"threads": torch.get_num_threads(), "load": os.getloadavg()}
        found[part] = work[part]() | {"environment": machine} | origin()
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(RESULTS, json.dumps(found, indent=1) + "\n")
        print(part, json.dumps(found[part], indent=1), flush=True)


if __name__ == "__main__":
    main()
