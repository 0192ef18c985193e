"""Time of the zero token: attention by each route, a training step, decoding, and exits, side by side in one run.

Compared with what a user would run instead: plain attention, head-tail cycling without zero tokens, and a stock Llama
of the same logical depth. Widths are those of SmolLM2-135M, with few layers. Run:

    python benchmarks/speed/zero_token.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM
from modicum.models.zero_attention import zero_attention
from modicum.record import environment

RESULT = Path(__file__).parents[1] / "results" / "zero_token_speed.json"
WIDTHS = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHYSICAL, CYCLES = 5, 3  # 2 + 3 * 3 = 11 visits


def timed(variants, *, rounds, warmup=1):
    """Time the variants in turn, so that drift of the machine meets all alike; return seconds by name, per round."""
    seconds = {name: [] for name in variants}
    for i in range(rounds + warmup):
        for name, function in variants.items():
            start = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def against(seconds, peer):
    """Median time and median of the paired ratios to ``peer``."""
    return {
        name: {
            "ms": round(1e3 * statistics.median(values), 3),
            f"over {peer}": round(statistics.median(a / b for a, b in zip(values, seconds[peer])), 4),
        }
        for name, values in seconds.items()
    }


def attention_call(route, q, k, v, z, backward):
    def call():
        if route == "plain":
            out = zero_attention(q, k, v, None, is_causal=True)
        else:
            out = zero_attention(q, k, v, z, is_causal=True, route=route)
        if backward:
            torch.autograd.grad(out.sum(), [q, k, v] + ([] if route == "plain" else [z]))

    return call


def attention():
    found = {}
    for t, rounds in ((512, 15), (2048, 5)):
        for heads, groups in ((9, 9), (9, 3)):
            for backward in (False, True):
                q, k, v = (torch.randn(1, h, t, 64, requires_grad=backward) for h in (heads, groups, groups))
                z = torch.randn(groups, 64, requires_grad=backward)
                calls = {
                    route: attention_call(route, q, k, v, z, backward)
                    for route in ("plain", "lse", "concat", "query_row")
                }
                name = f"T={t} heads={heads}/{groups} {'forward+backward' if backward else 'forward'}"
                found[name] = against(timed(calls, rounds=rounds), "plain")
    return found


def models():
    torch.manual_seed(0)
    host = LlamaConfig(num_hidden_layers=PHYSICAL, **WIDTHS)
    ztt = ZeroTokenForCausalLM(ZeroTokenConfig(host=host, n_cycles=CYCLES))
    htc = ZeroTokenForCausalLM(ZeroTokenConfig(host=host, n_cycles=CYCLES, zero_token=False))
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=ztt.config.num_hidden_layers, **WIDTHS))
    return {"llama": llama, "htc": htc, "ztt": ztt}


def train_step(model, ids):
    def step():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def decode(model, ids, new_tokens, **knobs):
    def step():
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **knobs)
            for _ in range(new_tokens):
                out = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, **knobs)
        return out

    return step


def decode_times(prefix, new_tokens, rounds, variants):
    """Time decoding alone: the prompt's time is measured apart and taken off."""
    with_tokens = timed({n: decode(m, prefix, new_tokens, **k) for n, (m, k) in variants.items()}, rounds=rounds)
    without = timed({n: decode(m, prefix, 0, **k) for n, (m, k) in variants.items()}, rounds=rounds)
    return {n: [(a - b) / new_tokens for a, b in zip(with_tokens[n], without[n])] for n in variants}


def main():
    torch.set_num_threads(2)
    found = {"attention": attention()}
    trio = models()
    ids = torch.randint(3, 49152, (2, 256))
    for model in trio.values():
        model.train()
    steps = timed({n: train_step(m, ids) for n, m in trio.items()}, rounds=8)
    found["training step, batch 2 x 256"] = against(steps, "llama")
    found["training step over htc"] = round(statistics.median(a / b for a, b in zip(steps["ztt"], steps["htc"])), 4)
    for model in trio.values():
        model.eval()
    variants = {n: (m, {}) for n, m in trio.items()}
    for length in (64, 1024):
        seconds = decode_times(ids[:1, :64].repeat(1, length // 64), 24, 6, variants)
        found[f"decode one token after {length}"] = against(seconds, "llama")
    exits = {f"{c} cycles": (trio["ztt"], {"exit_threshold": 1.0 if c == CYCLES else -1.0}) for c in (CYCLES, 1)}
    per_token = decode_times(ids[:1, :64], 24, 8, exits)
    visits = {CYCLES: 2 + CYCLES * (PHYSICAL - 2), 1: 2 + (PHYSICAL - 2)}
    time_saved = 1 - statistics.median(a / b for a, b in zip(per_token["1 cycles"], per_token[f"{CYCLES} cycles"]))
    calls_saved = 1 - visits[1] / visits[CYCLES]
    found["exit"] = {
        "layer calls saved": round(calls_saved, 4),
        "time saved": round(time_saved, 4),
        "share of the saving realized": round(time_saved / calls_saved, 4),
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = bool(subprocess.run(["git", "status", "--porcelain", "src"], capture_output=True, check=False).stdout)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {
                "what": __doc__.partition("\n")[0],
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit,
                "dirty": dirty,
                "environment": environment(),
                "threads": torch.get_num_threads(),
                "widths": WIDTHS,
                "physical_layers": PHYSICAL,
                "cycles": CYCLES,
                "results": found,
            },
            indent=2,
        )
        + "\n"
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
