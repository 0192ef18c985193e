"""Time and memory of the zero token: attention by each route, training steps, decoding, exits, side by side in one run.

    python -m benchmarks.speed.zero_token [--part attention|train|decode|exit] [--threads 1] [--again]

Compared with what a user would run instead: plain attention, head-tail cycling without zero tokens, and a stock Llama
of the same logical depth. Widths are those of SmolLM2-135M with a smaller vocabulary and fewer layers. Each part takes
about a minute of one idle core; without ``--part`` all four run. Rows are written as they come, and rows that are there
are skipped, so that a run may be cut short and started again. Variants take turns, and every ratio is the median of
ratios within a turn, once of wall-clock time and once of processor time: where other work shares the machine, only the
latter says something.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from benchmarks.memory import Peak, status
from benchmarks.provenance import origin
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modicum.environment import environment
from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM
from modicum.models.zero_token.attention import zero_attention
from modicum.record import write_atomic

RESULT = Path(__file__).parents[1] / "results" / "zero-token-speed.json"
WIDTHS = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHYSICAL, CYCLES = 4, 3  # 2 + 3 * 2 = 8 visits
Calls = dict[str, Callable[[], object]]
Table = dict[str, dict[str, float]]
Rows = Iterator[tuple[str, Callable[[], Table]]]


def timed(calls: Calls, *, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Run the calls in turn, so that drift of the machine meets all alike; return (wall, processor) seconds."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call()
            if turn:  # the first turn warms up
                found[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return found


def ratios(seconds: dict[str, list[tuple[float, float]]], peer: str) -> Table:
    return {
        name: {
            "processor ms": round(1e3 * statistics.median(cpu for _, cpu in values), 3),
            "wall ms": round(1e3 * statistics.median(wall for wall, _ in values), 3),
            f"processor / {peer}": round(ratio(values, seconds[peer], 1), 4),
            f"wall / {peer}": round(ratio(values, seconds[peer], 0), 4),
        }
        for name, values in seconds.items()
    }


def ratio(a: list[tuple[float, float]], b: list[tuple[float, float]], clock: int) -> float:
    return statistics.median(x[clock] / y[clock] for x, y in zip(a, b))


def peak_mib(call: Callable[[], object]) -> float:
    """Return by how much one call lifts the process's resident memory at most."""
    call()
    before = status("RssAnon")
    with Peak() as peak:
        call()
    return round((peak.bytes - before) / 2**20, 1)


def attention() -> Rows:
    """Every route against plain attention; beyond 2048 positions with grouped queries and forward only."""
    for t, rounds in ((512, 15), (2048, 3), (8192, 1)):
        for heads, groups in ((9, 9), (9, 3)) if t <= 2048 else ((9, 3),):
            for backward in (False, True)[: 1 if t > 2048 else 2]:
                name = f"T={t} heads={heads}/{groups} {'forward+backward' if backward else 'forward'}"
                yield name, partial(attention_row, t, heads, groups, backward, rounds)


def attention_row(t: int, heads: int, groups: int, backward: bool, rounds: int) -> Table:
    q, k, v = (torch.randn(1, h, t, 64, requires_grad=backward) for h in (heads, groups, groups))
    z = torch.randn(groups, 64, requires_grad=backward)
    calls = {route: attention_call(route, q, k, v, z, backward) for route in ("plain", "lse", "concat", "query_row")}
    table = ratios(timed(calls, rounds=rounds), "plain")
    for route, call in calls.items():
        table[route]["peak MiB"] = peak_mib(call)
    return table


def attention_call(
    route: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor, backward: bool
) -> Callable[[], object]:
    def call() -> None:
        plain = route == "plain"
        out = zero_attention(q, k, v, None if plain else z, is_causal=True, route="auto" if plain else route)
        if backward:
            torch.autograd.grad(out.sum(), [q, k, v] + ([] if plain else [z]))

    return call


def trio() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    host = LlamaConfig(num_hidden_layers=PHYSICAL, **WIDTHS)
    visits = ZeroTokenConfig(host=host, n_cycles=CYCLES).num_hidden_layers
    return {
        "llama": LlamaForCausalLM(LlamaConfig(num_hidden_layers=visits, **WIDTHS)),
        "htc": ZeroTokenForCausalLM(ZeroTokenConfig(host=host, n_cycles=CYCLES, zero_token=False)),
        "ztt": ZeroTokenForCausalLM(ZeroTokenConfig(host=host, n_cycles=CYCLES)),
    }


def looped(n_cycles: int, **knobs: object) -> ZeroTokenForCausalLM:
    torch.manual_seed(0)
    host = LlamaConfig(num_hidden_layers=PHYSICAL, **WIDTHS)
    return ZeroTokenForCausalLM(ZeroTokenConfig(host=host, n_cycles=n_cycles, **knobs)).eval()


def train() -> Rows:
    """Forward and backward of one batch; the goals are 1.05 of head-tail cycling and 1.15 of the stock Llama."""
    for batch, length, rounds in ((1, 256, 5), (1, 1024, 3)):
        yield f"batch {batch} x {length}", partial(train_row, batch, length, rounds)


def train_row(batch: int, length: int, rounds: int) -> Table:
    ids = torch.randint(3, 8192, (batch, length), generator=torch.Generator().manual_seed(0))
    calls = {name: train_step(model.train(), ids) for name, model in trio().items()}
    seconds = timed(calls, rounds=rounds)
    table = ratios(seconds, "llama")
    for name, call in calls.items():
        table[name]["processor / htc"] = round(ratio(seconds[name], seconds["htc"], 1), 4)
        table[name]["peak MiB"] = peak_mib(call)
    return table


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def decode() -> Rows:
    """One token after another, batch 1; the goal is 1.10 of a stock Llama of the same depth."""
    for length, rounds in ((64, 5), (1024, 3)):
        yield f"after {length} tokens", partial(decode_row, length, rounds)
    yield "by cycles", cycles_row


def decode_row(length: int, rounds: int) -> Table:
    return ratios(per_token({name: (model.eval(), {}) for name, model in trio().items()}, length, 24, rounds), "llama")


def cycles_row() -> Table:
    models = {f"N={n}": looped(n) for n in (1, 2, 3, 4)}
    table = ratios(per_token({name: (model, {}) for name, model in models.items()}, 64, 24, 5), "N=1")
    visits = {name: model.config.num_hidden_layers for name, model in models.items()}
    for name, model in models.items():
        table[name] |= {
            "tokens/s of processor time": round(1e3 / table[name]["processor ms"], 2),
            "layer visits": visits[name],
            "visits / N=1": round(visits[name] / visits["N=1"], 4),
            "key-value bytes a token": cache_bytes(model),
        }
    return table | {"N=4, share_first": {"key-value bytes a token": cache_bytes(looped(4, cache_policy="share_first"))}}


def cache_bytes(model: torch.nn.Module, length: int = 256) -> int:
    slots = [slot for slot in prefill(model, length)[1].layers if slot.keys is not None]
    return sum(x.numel() * x.element_size() for slot in slots for x in (slot.keys, slot.values)) // length


def prefill(model: torch.nn.Module, length: int, **knobs: object) -> tuple[torch.Tensor, DynamicCache]:
    ids = torch.randint(3, 8192, (1, length), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1, **knobs)
    return ids, cache


def per_token(
    variants: dict[str, tuple[torch.nn.Module, dict[str, object]]], length: int, new: int, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Time ``new`` steps of decoding; the prompt is read anew for each turn, outside the time."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, (model, knobs) in variants.items():
            ids, cache = prefill(model, length, **knobs)
            wall, processor = time.perf_counter(), time.process_time()
            with torch.no_grad():
                for _ in range(new):
                    model(input_ids=ids[:, -1:], cache=cache, use_cache=True, **knobs)
            if turn:
                found[name].append(((time.perf_counter() - wall) / new, (time.process_time() - processor) / new))
    return found


def exit_() -> Rows:
    """Leave after the first of N cycles at every token, batch 1; the goal is 85 % of the saved layer calls.

    Embedding, last norm and head run whatever the depth, so that no exit can save their time: the share of the layers'
    own time is given beside that of the whole step.
    """
    for n in (2, 3, 4):
        yield f"N={n}", partial(exit_row, n)


def exit_row(n: int) -> Table:
    model = looped(n)
    # p0 lies between 0 and 1: the first threshold is reached by nobody, the second by all.
    variants = {"stay": (model, {"exit_threshold": 1.0}), "leave": (model, {"exit_threshold": -1.0})}
    seconds = per_token(variants, 64, 24, 5)
    table = ratios(seconds, "stay")
    calls = 1 - PHYSICAL / model.config.num_hidden_layers
    table["saved"] = {"layer calls": round(calls, 4)}
    ends = timed({"ends": partial(ends_of, model, 24)}, rounds=5)["ends"]
    for i, clock in enumerate(("wall", "processor")):
        share = (1 - ratio(seconds["leave"], seconds["stay"], i)) / calls
        # Least of the turns: what disturbs so short a call only adds to it.
        rest = min(turn[i] for turn in ends) / 24 / statistics.median(turn[i] for turn in seconds["stay"])
        table["saved"][f"{clock}, as a share of the calls"] = round(share, 4)
        table["saved"][f"{clock} of the layers, as a share of the calls"] = round(share / (1 - rest), 4)
    return table


@torch.no_grad()
def ends_of(model: ZeroTokenForCausalLM, times: int) -> None:
    """Run what every pass runs besides layers."""
    ids = torch.tensor([[3]])
    for _ in range(times):
        model.lm_head(model.base_model.norm(model.get_input_embeddings()(ids)))


PARTS = {"attention": attention, "train": train, "decode": decode, "exit": exit_}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"parts": {}}
    record |= {"what": (__doc__ or "").partition("\n")[0], "widths": WIDTHS}
    record |= {"physical layers": PHYSICAL, "cycles": CYCLES, "environment": environment()}
    for part in [options.part] if options.part else PARTS:
        rows = record["parts"].setdefault(part, {})
        for name, measure in PARTS[part]():
            if name in rows and not options.again:
                continue
            before = os.getloadavg()[0]
            table = measure()
            rows[name] = {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "threads": options.threads,
                "load of the machine": [round(before, 2), round(os.getloadavg()[0], 2)],
                "table": table,
            } | origin()
            write_atomic(RESULT, json.dumps(record, indent=1) + "\n")
            print(part, name, json.dumps(table), flush=True)


if __name__ == "__main__":
    main()
