"""Retrieval from scratch: when does a small model learn to look facts up by their keys, with and without masks?

A row holds eight facts, each one token that stands for a key and its value, eight filler tokens of a Markov chain, and
eight queries, each a key followed by its value. Keys are asked with repetition, so that no value can be found by
leaving out those that were asked before: on the first query a guess among the values in context is right about one
time in eight. Accuracy is measured on clean inputs. The learning rate stays constant after its warm-up, since what is
asked is when retrieval appears; the sizes were chosen by trials of the plain arm on seed 0, which with sixteen keys and
a rate that fell to zero in 800 steps never got beyond guessing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.objectives import mask_inputs
from modicum.philox import row_keys
from modicum.random import generator

KEYS, VALUES, FILLERS, FACTS, FILLER, QUERIES = 8, 8, 8, 8, 8, 8
KEY = KEYS * VALUES  # facts come first in the vocabulary, then keys, values, fillers and the mask
VALUE = KEY + KEYS
MASK = VALUE + VALUES + FILLERS
LENGTH, BATCH, STEPS, EVERY = FACTS + FILLER + 2 * QUERIES, 32, 1200, 50
ARMS = {"ntp": 0.0, "meap 0.05": 0.05, "meap 0.15": 0.15, "meap 0.3": 0.3}
VALUE_PLACES = torch.arange(FACTS + FILLER + 1, LENGTH, 2)


def rows(count: int, rng: torch.Generator) -> torch.Tensor:
    """Return rows of facts, filler and queries."""
    keys = torch.rand(count, KEYS, generator=rng).argsort(-1)[:, :FACTS]
    values = torch.rand(count, VALUES, generator=rng).argsort(-1)[:, :FACTS]
    asked = torch.randint(0, FACTS, (count, QUERIES), generator=rng)
    queries = torch.stack((KEY + keys.gather(1, asked), VALUE + values.gather(1, asked)), -1)
    # Each filler token is followed by one of two: something to learn that needs no retrieval.
    state, filler = torch.randint(0, FILLERS, (count,), generator=rng), []
    for _ in range(FILLER):
        filler.append(state)
        state = (3 * state + 1 + 4 * torch.randint(0, 2, (count,), generator=rng)) % FILLERS
    middle = VALUE + VALUES + torch.stack(filler, -1)
    return torch.cat((keys * VALUES + values, middle, queries.flatten(1)), 1)


def run(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and return its curve."""
    config = LlamaConfig(
        vocab_size=MASK + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
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
            group["lr"] = 3e-3 * min(1.0, (step + 1) / EVERY)
        clean = rows(BATCH, rng)
        keys = row_keys(range(BATCH), seed=seed, method="meap", epoch=step)
        net.train()
        net(input_ids=mask_inputs(clean, ratio=ARMS[arm], mask_token_id=MASK, keys=keys), labels=clean).loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            curve.append([step + 1, *_accuracy(net, test)])
    found = [step for step, accuracy, _ in curve if accuracy > 0.9]
    return {
        "accuracy": curve[-1][1],
        "filler_nll": curve[-1][2],
        "found_at": found[0] if found else None,
        "curve": curve,
        "tokens": STEPS * BATCH * LENGTH,
    }


@torch.no_grad()
def _accuracy(net: LlamaForCausalLM, test: torch.Tensor) -> tuple[float, float]:
    net.eval()
    logits = net(input_ids=test).logits
    right = logits[:, VALUE_PLACES - 1].argmax(-1) == test[:, VALUE_PLACES]
    filler = torch.arange(FACTS + 1, FACTS + FILLER)
    nll = nn.functional.cross_entropy(logits[:, filler - 1].flatten(0, 1), test[:, filler].flatten())
    return float(right.double().mean()), float(nll)
