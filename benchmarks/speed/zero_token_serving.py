"""What a trained looped model saves: by drafts with fewer cycles, and by tokens of mixed depths in a batch.

    python -m benchmarks.speed.zero_token_serving [--part draft|depths|memory] [--steps 600] [--again]

``draft`` trains byte-level models of four cycles on Python's own sources, with as many cycles as are drawn at each
step, and generates with and without drafts, greedy and sampled, in turn; greedy text must be the same. Of their layers
the first and the last run once: the more there are between, the less a cycle costs beside all. ``depths`` gives
the sequences, or the tokens, of a batch of eight 1 to N cycles and compares the time saved with the visits saved,
reading and writing. ``memory`` compares the cache with its keys and values. Rows that are there are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import origin
from benchmarks.speed.zero_token import looped, prefill
from transformers import DynamicCache

from modicum.environment import environment
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM, parameter_groups
from modicum.random import generator
from modicum.record import write_atomic

RESULT = Path(__file__).parents[1] / "results" / "zero-token-serving.json"
CYCLES, BATCH, LENGTH, NEW = 4, 8, 128, 96
LENGTHS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
LAYERS = (4, 8)  # of the models that draft
HOST = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 512, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
Row = dict[str, Any]


def text() -> torch.Tensor:
    section = DataSection(path="builtin:python-stdlib", shuffle=True, size=60)
    whole = b"\n".join(row["text"].encode() for row in load_rows(section, seed=0).rows)
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()


def trained(data: torch.Tensor, steps: int, layers: int) -> ZeroTokenForCausalLM:
    host = HOST | {"num_hidden_layers": layers}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZeroTokenForCausalLM(ZeroTokenConfig(host=host, n_cycles=CYCLES, train_cycles="random")).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=generator(0, "text", step))
        ids = data[starts + torch.arange(LENGTH)]
        model.set_training_step(step)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def draft(steps: int, layers: int) -> Row:
    data = text()
    model = trained(data[: -20 * LENGTH], steps, layers)
    held = data[-20 * LENGTH :].view(20, LENGTH)
    with torch.no_grad():
        losses = [round(float(model(held, labels=held, n_cycles=c).loss), 4) for c in range(1, CYCLES + 1)]
    ways: dict[str, Row] = {}
    for name, knobs in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True})):
        for cycles in (None, 1, 2):
            ways[f"{name}, {'no draft' if cycles is None else f'draft of {cycles}'}"] = knobs | {
                "assistant_early_exit": cycles
            }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[list[int]]] = {name: [] for name in ways}
    drafted, kept = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for prompt in held[:6, :32]:
        for name, knobs in ways.items():
            torch.manual_seed(0)
            began = time.process_time()  # one thread: what the machine does besides does not count
            out = model.generate(prompt[None], **LENGTHS, return_dict_in_generate=True, **knobs)
            seconds[name].append(time.process_time() - began)
            texts[name].append(out.sequences[0].tolist())
            # A draft runs few cycles on one token; each other pass leaves one token more than it keeps of the draft.
            drafts = sum(int(cycles.amax()) == knobs["assistant_early_exit"] for cycles in out.spent.cycles)
            drafted[name] += drafts
            kept[name] += NEW - (len(out.spent.cycles) - drafts)
    if any(texts[name] != texts["greedy, no draft"] for name in ways if name.startswith("greedy")):
        raise RuntimeError("Drafts changed the greedy text.")
    plain = {name.split(",")[0]: name for name in ways if "no draft" in name}
    return {
        "steps": steps,
        "visits, with one cycle": [len(model.schedule), layers],
        "loss by cycles": losses,
        "same greedy text": True,
        "ways": {
            name: {
                "tokens/s of processor time": round(NEW / statistics.median(values[1:]), 1),
                "times no draft": round(
                    statistics.median(a / b for a, b in zip(seconds[plain[name.split(",")[0]]][1:], values[1:])), 3
                ),
            }
            | ({"of the drafted tokens kept": round(kept[name] / drafted[name], 3)} if drafted[name] else {})
            for name, values in seconds.items()
        },
    }


def depths(n: int) -> Row:
    model, found = looped(n), {}
    rng = torch.Generator().manual_seed(0)
    by_row = torch.arange(BATCH) % n + 1
    for length in (64, 256):
        ids = torch.randint(3, 8192, (BATCH, length), generator=rng)
        by_token = torch.randint(1, n + 1, (BATCH, length), generator=rng)
        for name, asked in (("sequences", by_row), ("tokens", by_token)):
            calls = {
                "full": lambda ids=ids: model(ids, use_cache=False, logits_to_keep=1),
                "mixed": lambda ids=ids, asked=asked: model(ids, use_cache=False, logits_to_keep=1, n_cycles=asked),
            }
            found[f"reading {length}, by {name}"] = saved(model, calls, asked, rounds=4 if length > 64 else 8)
    ids = torch.randint(3, 8192, (BATCH, 64), generator=rng)
    caches = {name: DynamicCache(config=model.config) for name in ("full", "mixed")}
    for cache in caches.values():
        model(ids, cache=cache, use_cache=True, logits_to_keep=1)
    calls = {
        "full": lambda: model(ids[:, -1:], cache=caches["full"], use_cache=True),
        "mixed": lambda: model(ids[:, -1:], cache=caches["mixed"], use_cache=True, n_cycles=by_row),
    }
    return found | {"writing after 64, by sequences": saved(model, calls, by_row, rounds=24)}


def saved(model: ZeroTokenForCausalLM, calls: dict[str, Callable[[], object]], asked: torch.Tensor, rounds: int) -> Row:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:
                found[name].append(time.process_time() - began)
    ends = model.config.n_head + model.config.n_tail
    looped_layers = len(model.config.middle)
    visits = 1 - (ends + looped_layers * float(asked.float().mean())) / len(model.schedule)
    seconds = 1 - statistics.median(a / b for a, b in zip(found["mixed"], found["full"]))
    return {
        "processor ms": round(1e3 * statistics.median(found["full"]), 1),
        "visits saved": round(visits, 4),
        "time saved": round(seconds, 4),
        "of the visits": round(seconds / visits, 3),
    }


def memory() -> Row:
    """Bytes of the cache after a prompt and after tokens behind it, against keys and values alone."""
    model, found = looped(3), {}
    for length in (100, 1000):
        cache = prefill(model, length)[1]
        for behind in (0, 40):
            for _ in range(behind):
                model(torch.tensor([[3]]), cache=cache, use_cache=True)
            held = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in storages(layer))
            needed = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
            found[f"{length} + {behind}"] = round(held / needed, 4)
    return found


def storages(layer: Any) -> tuple[torch.Tensor, ...]:
    buffers: tuple[torch.Tensor, ...] | None = getattr(layer, "_buffers", None)
    return (layer.keys, layer.values) if buffers is None else buffers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("draft", "depths", "memory"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}}
    record |= {"what": (__doc__ or "").partition("\n")[0], "host": HOST, "environment": environment()}
    rows: dict[str, Callable[[], Row]] = {
        "memory": memory,
        "depths, N=3": lambda: depths(3),
        "depths, N=4": lambda: depths(4),
    }
    for layers in LAYERS:
        rows[f"draft, {layers} layers"] = partial(draft, options.steps, layers)
    for name, measure in rows.items():
        if (options.part and not name.startswith(options.part)) or (name in record["rows"] and not options.again):
            continue
        before = os.getloadavg()[0]
        found = torch.no_grad()(measure)() if not name.startswith("draft") else measure()
        when = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "load": [before, os.getloadavg()[0]]}
        record["rows"][name] = found | when | origin()
        write_atomic(RESULT, json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
