"""A byte-level language model on the standard library's sources, small enough to train in seconds."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from modicum.optim.gradient.faults import tensor_noise_
from modicum.optim.gradient.make import make_clipper
from modicum.optim.gradient.spikes import spike_score
from modicum.random import generator

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 48, 2, 4, 32, 16
FIRST_FAULT = 150


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def loss(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1]) + self.place.weight[: tokens.shape[1] - 1]
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Lion(torch.optim.Optimizer):
    """Sign of a mix of gradient and momentum."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, _=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(mean.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - group["betas"][1])


def optimizers(name: str, model: ByteModel) -> list[torch.optim.Optimizer]:
    """Return the optimisers of an arm; Muon leaves what is no hidden matrix to AdamW."""
    params = list(model.parameters())
    if name.startswith("adamw"):
        return [torch.optim.AdamW(params, lr=3e-3, betas=(0.9, float(name.removeprefix("adamw"))))]
    if name == "lion":
        return [Lion(params, lr=3e-4)]
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in params if not any(p is q for q in hidden)]
    return [torch.optim.Muon(hidden, lr=1e-2), torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.999))]


def corpus() -> tuple[Tensor, Tensor]:
    """Return training and validation bytes: every tenth file of the standard library validates."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 0) == held) for held in (False, True)]
    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return train, held_out


def batch(data: Tensor, size: int, *names: str | int) -> Tensor:
    starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=generator(0, "byte_model", *names))
    return data[starts[:, None] + torch.arange(CONTEXT + 1)]


def run(
    optimizer: str,
    rule: str | None,
    knobs: dict,
    *,
    faults: bool,
    seed: int,
    steps: int = 1000,
    probability: float = 0.02,
    rate: float = 1.0,
) -> dict:
    """Train one model and return what came of it."""
    torch.manual_seed(seed)
    model, (train, held_out) = ByteModel(), corpus()
    params = list(model.named_parameters())
    opts = optimizers(optimizer, model)
    base = [[group["lr"] * rate for group in opt.param_groups] for opt in opts]
    clipper = make_clipper(rule, params, **knobs) if rule else None
    clip: Callable[[], None] = lambda: None  # noqa: E731
    rates: list[Tensor] = []
    if clipper is not None and hasattr(clipper, "clip_"):
        clip = lambda: rates.append((clipper.clip_().factors < 1).float().mean())  # noqa: E731
    elif clipper is not None:
        clipper.attach(opts[0])
    losses, hits = [], 0
    for step in range(steps):
        share = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for opt, lrs in zip(opts, base):
            for group, lr in zip(opt.param_groups, lrs):
                group["lr"] = lr * share
        loss = model.loss(batch(train, BATCH, seed, step))
        loss.backward()
        losses.append(loss.detach())
        if faults and step >= FIRST_FAULT:
            hit = tensor_noise_([p.grad for _, p in params], step=step, seed=seed, probability=probability)
            hits += hit is not None
        clip()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    with torch.no_grad():
        value = torch.stack([model.loss(batch(held_out, 256, "held_out", i)) for i in range(8)]).mean()
    curve = torch.stack(losses)
    spikes = spike_score(curve, window=100, sigma=6.0)
    return {
        "held_out_loss": round(float(value), 5),
        "train_loss": [round(float(x), 4) for x in curve.view(-1, 20).mean(1)],
        "clip_rate": round(float(torch.stack(rates[100:]).mean()), 4) if len(rates) > 100 else None,
        "spikes": spikes.count,
        "spike_window": 100,
        "spike_sigma": 6.0,
        "faults": hits,
    }
