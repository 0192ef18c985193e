"""Many epochs over little text: is input masking a regulariser, and does it make the model robust to missing context?

A byte model of two layers sees 12 KB of documentation text about 85 times, every arm in the same order and for the same
number of tokens. Validation is on later text, clean, and with 5, 10 and 15 % of the inputs masked.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.evaluate.attention import measure_contrast
from modicum.objectives import mask_inputs
from modicum.philox import row_keys
from modicum.random import generator

MASK, VOCABULARY, CONTEXT = 256, 257, 64
TRAIN, HELD_OUT, BATCH, STEPS = 12_000, 8_000, 16, 1000
ARMS = {
    "ntp": {},
    "meap 0.15": {"ratio": 0.15},
    "dropout 0.1": {"dropout": 0.1},
    "dropout 0.2": {"dropout": 0.2},
    "dropout 0.3": {"dropout": 0.3},
    "meap 0.05": {"ratio": 0.05},
    "meap 0.3": {"ratio": 0.3},
    "random 0.15": {"ratio": 0.15, "random": True},
}
CORRUPTION = (0.0, 0.05, 0.10, 0.15)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Return training and held-out bytes of the Python documentation topics; the second comes later in the text."""
    from pydoc_data.topics import topics

    data = "\n".join(topics[name] for name in sorted(topics)).encode()[: TRAIN + HELD_OUT]
    ids = torch.tensor(list(data))
    return ids[:TRAIN], ids[TRAIN:]


def model(seed: int, width: int = 64) -> LlamaForCausalLM:
    """Return a fresh model; global randomness is forked because transformers initialises from it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def run(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and return its figures, with its attention against that of plain training."""
    net, found = trained(arm, seed)
    if "ratio" in ARMS[arm]:
        plain, _ = trained("ntp", seed)
        found = found | {"attention_against_ntp": contrast(plain, net, text()[1])}
    return found


@cache  # plain training is what the other arms of its seed are compared with
def trained(arm: str, seed: int) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Return a trained model and its figures."""
    knobs = ARMS[arm]
    net, (train, held) = model(seed), text()
    noise = generator(seed, "dropout")
    if "dropout" in knobs:
        for layer in net.model.layers:
            for block in (layer.self_attn, layer.mlp):
                block.register_forward_hook(partial(_drop, knobs["dropout"], noise))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    order = generator(seed, "order")
    curve, losses = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        starts = torch.randint(0, TRAIN - CONTEXT, (BATCH,), generator=order)
        clean = torch.stack([train[s : s + CONTEXT] for s in starts])
        net.train()
        loss = net(input_ids=_corrupt(clean, knobs, seed, step), labels=clean).loss
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            curve.append([step + 1, validate(net, held, 0.0)])
    return net, {
        "best": min(value for _, value in curve),
        "final": curve[-1][1],
        "train_last_100": sum(losses[-100:]) / 100,
        "corruption": {str(share): validate(net, held, share) for share in CORRUPTION},
        "curve": curve,
        "tokens": STEPS * BATCH * CONTEXT,
        "epochs": STEPS * BATCH * CONTEXT / TRAIN,
    }


@torch.no_grad()
def validate(net: LlamaForCausalLM, held: torch.Tensor, share: float) -> float:
    """Return nats per byte on the held-out text, the same masks for every arm; masked targets count as well."""
    net.eval()
    rows = held[: held.numel() // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    keys = row_keys(range(rows.shape[0]), seed=0, method="validation")
    inputs = mask_inputs(rows, ratio=share, mask_token_id=MASK, sampling="bernoulli", keys=keys)
    parts = [(inputs[i : i + 64], rows[i : i + 64]) for i in range(0, rows.shape[0], 64)]
    total = sum(float(net(input_ids=x, labels=y).loss) * y.shape[0] for x, y in parts)
    return total / rows.shape[0]


def contrast(plain: LlamaForCausalLM, net: LlamaForCausalLM, held: torch.Tensor) -> dict[str, dict[str, float]]:
    """Compare attention with that of plain training, in both readings of the published measure."""
    rows = held[: 64 * CONTEXT].reshape(-1, CONTEXT)
    masked = mask_inputs(rows, ratio=0.15, mask_token_id=MASK)
    for either in (plain, net):
        either.eval()
        either.set_attn_implementation("eager")
    kinds = ("models", "inputs")
    return {kind: measure_contrast(plain, net, rows, masked, between=kind)._asdict() for kind in kinds}


def _corrupt(clean: torch.Tensor, knobs: dict[str, Any], seed: int, step: int) -> torch.Tensor:
    keys = row_keys(range(BATCH), seed=seed, method="meap", epoch=step)
    masked = mask_inputs(clean, ratio=knobs.get("ratio", 0.0), mask_token_id=MASK, keys=keys)
    if not knobs.get("random"):
        return masked
    drawn = torch.randint(0, 256, clean.shape, generator=generator(seed, "random", step))
    return torch.where(masked == MASK, drawn, clean)


def _drop(share: float, noise: torch.Generator, module: nn.Module, _: Any, output: Any) -> Any:
    if not module.training:
        return output
    hidden = output[0] if isinstance(output, tuple) else output
    kept = torch.rand(hidden.shape, generator=noise) >= share
    dropped = hidden * kept / (1 - share)
    return (dropped, *output[1:]) if isinstance(output, tuple) else dropped
