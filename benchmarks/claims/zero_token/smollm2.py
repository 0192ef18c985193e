"""SmolLM2 with ten of its thirty layers run twice: does it beat the same fine-tuning without a loop?

    python -m benchmarks.claims.zero_token.smollm2 [--steps 24] [--seeds 3] [--minutes 8]

Fine-tuned by LoRA on the standard library's sources, measured on sources that were held out. A cell is a variant, a
seed and a number of steps; cells with a result are skipped, so the study may be stopped and started again. All of them
take about 35 minutes of one core. Seeds draw the adapter and the order of the text; all variants of a seed read the
same text.
"""

from __future__ import annotations

import math
import statistics
from functools import cache

import torch
from benchmarks.claims.zero_token.cells import arguments, measure_all
from peft import LoraConfig, get_peft_model

from modicum.jobs.data.rows import DataSection, load_rows, tokenize
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.training.extra_modules import additions
from modicum.models import choose_cycle_range, convert_to_zero_token
from modicum.random import generator

RESULT = "zero-token-smollm2"
MODEL = "builtin:smollm2-135m-instruct"
LENGTH, BATCH, RATE, NEW_RATE, HELD_OUT = 128, 1, 1e-3, 1e-2, 12
LOOP = {"n_cycles": 2, "n_head": 10, "n_tail": 10}
VISITS = {"layers": 30, "looped": 40}
BY_ANGLE = "ZTT, range by angle"
UNTRAINED: dict[str, dict[str, object] | None] = {"base": None, "ZTT": LOOP, BY_ANGLE: LOOP}
VARIANTS: dict[str, dict[str, object] | None] = {
    "plain, same tokens": None,
    "plain, same compute": None,
    "HTC": LOOP | {"zero_token": False},
    "ZTT": LOOP,
    "ZTT, rezero": LOOP | {"cycle_gate": "rezero"},
}


@cache
def windows(split: str, seed: int, count: int) -> torch.Tensor:
    """Return ``count`` windows of text, in the order of ``seed``; the held-out ones are always the same."""
    tokenizer = load_tokenizer(MODEL)
    size = max(8, count // 8)  # documents; most hold more than eight windows
    section = DataSection(
        path="builtin:python-stdlib", split=split, size=size, shuffle=True, packing=True, max_length=LENGTH
    )
    rows = tokenize(load_rows(section, seed=seed), tokenizer, section)["input_ids"]
    whole = torch.tensor([ids for ids in rows if len(ids) == LENGTH])
    if len(whole) < count:
        raise SystemExit(f"{size} documents hold {len(whole)} windows, {count} are needed. Raise `size`.")
    return whole[torch.randperm(len(whole), generator=generator(seed, "windows", split))[:count]]


def measure(variant: str, seed: int, steps: int) -> dict[str, object]:
    model = load_model(MODEL, dtype="float32")
    knobs = (VARIANTS if steps else UNTRAINED)[variant]
    cell: dict[str, object] = {}
    if variant == BY_ANGLE:
        found = choose_cycle_range(model, [windows("train", seed, 8)], width=10)
        knobs = LOOP | {"n_head": found.n_head, "n_tail": found.n_tail}
        cell = {"n_head": found.n_head, "n_tail": found.n_tail}
    if knobs is not None:
        model = convert_to_zero_token(model, seed=seed, **knobs)
    if steps:
        # The looped models make 40 layer visits where the plain one makes 30: it may read a third more.
        more = VISITS["looped"] / VISITS["layers"] if variant == "plain, same compute" else 1
        model = with_adapter(model, seed)
        cell["tokens"] = fine_tune(model, seed, round(steps * more), steps)
    cell |= scores(model.eval())
    if steps and knobs is not None:
        cell["with 1 cycle"] = scores(model, n_cycles=1)
    return cell


def with_adapter(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=sorted(additions(model)) or None
        )
        return get_peft_model(model, config)


def fine_tune(model: torch.nn.Module, seed: int, steps: int, shared: int) -> int:
    # Windows beyond those that all variants read come last, so that the rest of the order is the same.
    text = windows("train", seed, math.ceil(shared * 4 / 3) * BATCH)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    new = [p for name, p in named if "zero_token" in name]
    groups = [{"params": [p for name, p in named if "zero_token" not in name], "lr": RATE}]
    groups += [{"params": new, "lr": NEW_RATE}] if new else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 4) * (0.55 + 0.45 * math.cos(math.pi * i / steps))
    )
    model.train()
    for ids in text[: steps * BATCH].split(BATCH):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return steps * BATCH * LENGTH


@torch.no_grad()
def scores(model: torch.nn.Module, **knobs: object) -> dict[str, object]:
    """Return loss, in nats for each token, and accuracy of the next token on the held-out windows."""
    losses, hits, attention = [], [], {}
    for ids in windows("test", 0, HELD_OUT).split(4):
        asked = {"output_zero_attention": True} if additions(model) else {}
        out = model(input_ids=ids, labels=ids, use_cache=False, **asked, **knobs)
        losses.append(float(out.loss))
        hits.append(float((out.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()))
        for (_, cycle), p0 in (getattr(out, "zero_attention", None) or {}).items():
            attention.setdefault(cycle, []).append(float(p0.mean()))
    found: dict[str, object] = {"loss": statistics.fmean(losses), "accuracy": statistics.fmean(hits)}
    if attention:
        found["zero attention by cycle"] = [statistics.fmean(attention[cycle]) for cycle in sorted(attention)]
    return found


def main() -> None:
    options = arguments(__doc__, steps=24)
    about = {
        "length": LENGTH,
        "batch": BATCH,
        "rate": RATE,
        "rate of the zero tokens": NEW_RATE,
        "held-out windows": HELD_OUT,
        "variants": VARIANTS,
    }
    wanted = [(variant, 0, 0) for variant in UNTRAINED]
    wanted += [(variant, seed, options.steps) for seed in range(options.seeds) for variant in VARIANTS]
    measure_all(RESULT, about, wanted, measure, minutes=options.minutes)


if __name__ == "__main__":
    main()
