"""Hops with known needs: which token needs how many cycles, and does a criterion know it?

    python -m benchmarks.claims.zero_token.hops [--seeds 10] [--minutes 3.5] [--only VARIANT]

Every token carries a symbol and a number of hops, 1 to 4; its target is the symbol that so many jumps reach, each to
"the last earlier place with the same symbol, plus one". Its need of depth is known, and differs within a sequence. A
cell is a variant and a seed; the data of a seed are the same for all variants. Cells with a result are skipped, so that
the study may be stopped and started again.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from benchmarks import cells
from torch import Tensor
from torch.nn.functional import cross_entropy

from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM, fit_exit_gate, parameter_groups
from modicum.random import generator

RESULT = "zero-token-hops"
SYMBOLS, HOPS, LENGTH, BATCH, HELD_OUT = 4, 4, 20, 24, 256
STEPS, FIXED, RATE = 1400, 900, 4e-3  # all cycles at first, then as many as are drawn
CYCLES = 4
HOST = {
    "model_type": "llama",
    "vocab_size": SYMBOLS * HOPS,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "HTC": {"zero_token": False},
    "ZTT": {},
    "off-by-one key": {"zero_kind": "off_by_one"},
    "sink per head": {"zero_kind": "sink"},
    "one key for all cycles": {"pool": "layer"},
    "HTC + cycle embedding": {"zero_token": False, "cycle_embedding": "add"},
    "vanilla, equal parameters": {"n_cycles": 1, "zero_token": False},
    "vanilla, equal compute": {"n_cycles": 1, "zero_token": False, "layers": 2 + CYCLES},
    "HTC + LoRA for each cycle": {"zero_token": False, "lora_rank": 4},
    "HTC + anchor": {"zero_token": False, "loop_connection": "anchor"},
    "HTC + residual": {"zero_token": False, "loop_connection": "residual"},
}
CRITERIA = ("zero_attention", "confidence", "gate", "latent", "entropy", "kl", "random")
SHARES = [k / 10 for k in range(1, 10)]


def batch(rng: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets (-100 where a chain breaks) and needs (0 there)."""
    x = torch.randint(SYMBOLS, (size, LENGTH), generator=rng)
    need = torch.randint(1, HOPS + 1, (size, LENGTH), generator=rng)
    position = torch.arange(LENGTH)
    same = (x[:, :, None] == x[:, None, :]) & (position[None, :] < position[:, None])
    last = torch.where(same, position, -1).amax(-1)
    hop = torch.where(last >= 0, last + 1, -1)
    where, target = position.expand(size, -1), torch.full_like(x, -100)
    for hops in range(1, HOPS + 1):
        where = torch.where(where >= 0, hop.gather(1, where.clamp(min=0)), -1)
        arrived = (need == hops) & (where >= 0)
        target = torch.where(arrived, x.gather(1, where.clamp(min=0)), target)
    return x + SYMBOLS * (need - 1), target, torch.where(target >= 0, need, 0)


def measure(variant: str, seed: int) -> dict[str, Any]:
    knobs = {"n_cycles": CYCLES} | VARIANTS[variant]
    host = HOST | {"num_hidden_layers": knobs.pop("layers", 3)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the host's weights are the same for all variants of three layers
        model = ZeroTokenForCausalLM(ZeroTokenConfig(host=host, seed=seed, **knobs)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        x, target, _ = batch(generator(seed, "hops", step), BATCH)
        drawn = int(torch.randint(1, CYCLES + 1, (), generator=generator(seed, "cycles", step)))
        cycles = min(model.depth, drawn if step >= FIXED else CYCLES)
        logits = model(x, use_cache=False, n_cycles=cycles).logits
        loss = cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return evaluate(model.eval())


@torch.no_grad()
def evaluate(model: ZeroTokenForCausalLM) -> dict[str, Any]:
    x, target, need = batch(generator(0, "hops", "held out"), HELD_OUT)
    counts, depth = target >= 0, model.depth
    right = torch.stack(
        [model(x, use_cache=False, n_cycles=c).logits.argmax(-1) == target for c in range(1, depth + 1)]
    )
    out = model(x, use_cache=False, output_zero_attention=True)
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "visits": len(model.schedule),
        "accuracy": share(right[-1][counts]),
        "accuracy after 1": share(right[0][counts]),
        "loss": float(cross_entropy(out.logits.flatten(0, 1), target.flatten(), ignore_index=-100)),
        "accuracy by cycles and hops": [[share(r[need == h]) for h in range(1, HOPS + 1)] for r in right],
    }
    if depth == 1:
        return found
    if out.zero_attention:
        found["zero attention by cycle and hops"] = [
            [float(p.mean(1)[need == h].mean()) for h in range(1, HOPS + 1)]
            for (_, cycle), p in sorted(out.zero_attention.items(), key=lambda item: item[0][1])
        ]
    found["exits"] = exits(model, x, target, right)
    return found


def exits(model: ZeroTokenForCausalLM, x: Tensor, target: Tensor, right: Tensor) -> dict[str, Any]:
    """Whole curves of accuracy against mean cycles; and who is known to be right after the first cycle already."""
    counts, found = target >= 0, {}
    fit_exit_gate(model, [batch(generator(0, "hops", "gate", i), 64)[0] for i in range(4)])
    for criterion in CRITERIA:
        if criterion == "zero_attention" and not model._rows:
            continue
        ask = {"exit_criterion": criterion, "use_cache": False}
        rising = criterion in ("zero_attention", "confidence", "gate")
        never = 1.0 if rising else 0.0
        scores = model(x, **ask, exit_threshold=never).exit_scores
        first = scores[0] if criterion not in ("entropy", "kl") else None  # these compare two cycles
        seen = torch.cat([s[counts] for s in scores])
        seen = seen[seen.isfinite()]
        curve = []
        for share_left in SHARES:
            cut = float(seen.quantile(1 - share_left))
            threshold = cut if rising else 1 - cut if criterion == "random" else -cut
            out = model(x, **ask, exit_threshold=threshold)
            curve.append(point(out.cycles, out.logits, target))
        found[criterion] = {"curve": curve, "auroc": None if first is None else auroc(first[counts], right[0][counts])}
    # The oracle stops at the first cycle from which on the token would be right; tokens that never are stop at once.
    sure = right.flip(0).cummin(0).values.flip(0)
    oracle = torch.where(sure.any(0), sure.int().argmax(0) + 1, 1)
    out = model(x, use_cache=False, n_cycles=oracle)
    found["oracle"] = {
        "curve": [point(oracle, out.logits, target)],
        "auroc": 1.0,
    }
    return found


def point(cycles: Tensor, logits: Tensor, target: Tensor) -> list[float]:
    counts = target >= 0
    return [float(cycles[counts].float().mean()), share((logits.argmax(-1) == target)[counts])]


def share(right: Tensor) -> float:
    return round(float(right.float().mean()), 5)


def auroc(score: Tensor, positive: Tensor) -> float | None:
    """Return the chance that a positive scores above a negative; ties count half."""
    _, place, size = score.double().unique(return_inverse=True, return_counts=True)
    ranks = (size.cumsum(0) - (size - 1) / 2)[place]
    up, down = int(positive.sum()), int((~positive).sum())
    if not up or not down:
        return None
    return round(float((ranks[positive].sum() - up * (up + 1) / 2) / (up * down)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=3.5)
    parser.add_argument("--only", nargs="*", choices=VARIANTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        "symbols": SYMBOLS,
        "hops": HOPS,
        "length": LENGTH,
        "batch": BATCH,
        "held_out": HELD_OUT,
        "steps": STEPS,
        "fixed": FIXED,
        "rate": RATE,
        "host": HOST,
        "variants": VARIANTS,
    }
    recall = cells.resumable(RESULT, minutes=options.minutes, about=about)
    wanted = [(variant, seed) for seed in range(options.seeds) for variant in options.only or VARIANTS]
    cells.measure_all(recall, {f"{v}|{s}": partial(one, v, s) for v, s in wanted})


def one(variant: str, seed: int) -> dict[str, Any]:
    return {"variant": variant, "seed": seed} | measure(variant, seed)


if __name__ == "__main__":
    main()
