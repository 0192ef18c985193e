"""Retrieval from scratch: when does a small model learn to look values up by their keys, with and without masks?

Rows hold four key-value pairs, four filler tokens of a Markov chain, and four queries, each a key followed by its
value. Accuracy of the values is measured on clean inputs; a guess among those in context is right one time in four.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.objectives import mask_inputs
from modicum.objectives.philox import row_keys
from modicum.random import generator

KEYS, VALUES, FILLERS, PAIRS, FILLER = 8, 8, 16, 4, 4
MASK, VOCABULARY = KEYS + VALUES + FILLERS, KEYS + VALUES + FILLERS + 1
LENGTH, BATCH, STEPS = 4 * PAIRS + FILLER, 64, 1200
ARMS = {"ntp": 0.0, "meap 0.15": 0.15, "meap 0.05": 0.05}
VALUE_PLACES = torch.arange(2 * PAIRS + FILLER + 1, LENGTH, 2)


def rows(count: int, rng: torch.Generator) -> torch.Tensor:
    """Return rows of pairs, filler and queries."""
    keys = torch.stack([torch.randperm(KEYS, generator=rng)[:PAIRS] for _ in range(count)])
    values = KEYS + torch.stack([torch.randperm(VALUES, generator=rng)[:PAIRS] for _ in range(count)])
    pairs = torch.stack((keys, values), -1)
    order = torch.argsort(torch.rand(count, PAIRS, generator=rng), -1)
    queries = pairs.gather(1, order[..., None].expand(-1, -1, 2))
    # Each filler token is followed by one of two: something to learn that needs no retrieval.
    state, filler = torch.randint(0, FILLERS, (count,), generator=rng), []
    for _ in range(FILLER):
        filler.append(state)
        state = (3 * state + 1 + 4 * torch.randint(0, 2, (count,), generator=rng)) % FILLERS
    middle = KEYS + VALUES + torch.stack(filler, -1)
    return torch.cat((pairs.flatten(1), middle, queries.flatten(1)), 1)


def run(arm: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Train one arm and return its curve."""
    del scratch
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    rng, test = generator(seed, "rows"), rows(512, generator(10_000, "test"))
    curve = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        clean = rows(BATCH, rng)
        keys = row_keys(range(BATCH), seed=seed, method="meap", epoch=step)
        net.train()
        net(input_ids=mask_inputs(clean, ratio=ARMS[arm], mask_token_id=MASK, keys=keys), labels=clean).loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            curve.append([step + 1, *_accuracy(net, test)])
    risen = [step for step, accuracy, _ in curve if accuracy > 0.35]
    return {
        "accuracy": curve[-1][1],
        "best_accuracy": max(point[1] for point in curve),
        "filler_nll": curve[-1][2],
        "rises_at": risen[0] if risen else None,
        "curve": curve,
        "tokens": STEPS * BATCH * LENGTH,
    }


@torch.no_grad()
def _accuracy(net: LlamaForCausalLM, test: torch.Tensor) -> tuple[float, float]:
    net.eval()
    logits = net(input_ids=test).logits
    right = logits[:, VALUE_PLACES - 1].argmax(-1) == test[:, VALUE_PLACES]
    filler = torch.arange(2 * PAIRS + 1, 2 * PAIRS + FILLER)
    nll = nn.functional.cross_entropy(logits[:, filler - 1].flatten(0, 1), test[:, filler].flatten())
    return float(right.double().mean()), float(nll)
