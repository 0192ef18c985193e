"""The polar-words study: every zeroth-order method on one pre-trained toy GPT, equal forwards, equal grids.

    python -m benchmarks.claims.tezo.study [--minutes 7] [--steps 1000]

Resumable: a cell (method, learning rate, seed) with a result is skipped, and each is written when it ends. Learning
rates are chosen on seed 100 by dev loss on data of that seed; seeds 0 to 2 report, at the chosen rate, on other data.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from benchmarks.cells import resumable
from torch import Tensor, nn
from torch.nn import functional

from modicum.optim import FZOO, LOZO, ConMeZO, HiZOO, MeZO, SparseMeZO, SubZero, TeZO, ZOAdaMU
from modicum.random import generator

POSITIVE, NEGATIVE, NEUTRAL = range(3, 43), range(43, 83), range(83, 203)
BOS, IT, WAS, GOOD_WORD, BAD_WORD = 0, 1, 2, 203, 204
SELECTION_SEED, SEEDS = 100, (0, 1, 2)


class Block(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, last: int) -> Tensor:
        """Return the last so many positions after this block."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.before(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        # One position looks at all; more than one means all of them here.
        mixed = functional.scaled_dot_product_attention(q[:, :, -last:], k, v, is_causal=last > 1)
        x = x[:, -last:] + self.out(mixed.transpose(1, 2).reshape(b, last, d))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Toy(nn.Module):
    """Two blocks of width 64 over 208 tokens, output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(208, 64), nn.Embedding(16, 64)
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(64)
        self.head = nn.Linear(64, 208, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        # Places on the scale of the tokens: at the default of 1 they drown them, and the labels are never learnt.
        nn.init.normal_(self.place.weight, std=0.1)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, only_last: bool = False) -> Tensor:
        """Return the logits of all positions, or without the work that only the others need, of the last one."""
        length = ids.shape[1]
        x = self.embed(ids) + self.place(torch.arange(length).expand(ids.shape))
        x = self.blocks[1](self.blocks[0](x, length), 1 if only_last else length)
        return self.head(self.norm(x))


def sentences(count: int, *names: str | int) -> tuple[Tensor, Tensor]:
    """Return sentences that end in "it was", and whether each is positive."""
    rng = generator(0, "polar", *names)

    def draw(words: range) -> Tensor:
        return torch.randint(words.start, words.stop, (count, 10), generator=rng)

    label = torch.randint(2, (count, 1), generator=rng).bool()
    agrees = torch.rand(count, 10, generator=rng) < 0.85
    polar = torch.where(label == agrees, draw(POSITIVE), draw(NEGATIVE))
    words = torch.where(torch.rand(count, 10, generator=rng) < 0.5, polar, draw(NEUTRAL))
    ends = [torch.full((count, 1), token) for token in (BOS, IT, WAS)]
    return torch.cat([ends[0], words, ends[1], ends[2]], 1), label.squeeze(1)


def pretrained(steps: int = 1200) -> Toy:
    """Return the toy after ordinary training on sentences whose last word is often, not always, the true label."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        ids, label = sentences(64, "pretrain", step)
        rng = generator(0, "polar", "continuation", step)
        chance, coin = torch.rand(64, generator=rng), torch.randint(2, (64,), generator=rng).bool()
        neutral = torch.randint(NEUTRAL.start, NEUTRAL.stop, (64,), generator=rng)
        word = torch.where(torch.where(chance < 0.25, label, coin), GOOD_WORD, BAD_WORD)
        ids = torch.cat([ids, torch.where(chance < 0.6, word, neutral)[:, None]], 1)
        loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(True)


def inverted(model: Toy, ids: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and accuracy over the two label words, each sentence wanting the opposite one."""
    scores = model(ids, only_last=True)[:, 0, [GOOD_WORD, BAD_WORD]]
    return functional.cross_entropy(scores, label.long()), (scores.argmax(1) == label.long()).float().mean()


class DesynchronizedLOZO(LOZO):
    """The negative control: at a refresh the update uses other left factors than the probe."""

    def _transition_factors(self, shift: Any, kappas: Tensor | None) -> None:
        if kappas is None or self.steps % (self.settings.refresh_every or 1):
            return super()._transition_factors(shift, kappas)
        super()._transition_factors(shift, None)
        probed = self._drawn[(self.steps, 0)]
        self._drawn[(self.steps, 0)] = torch.randn(
            self._size, generator=generator(self.settings.seed, "other", self.steps)
        )
        super()._transition_factors({}, kappas)
        self._drawn[(self.steps, 0)] = probed


RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # for every method; a best rate at an edge is followed outwards, see ``search``
FARTHEST = 3  # rates beyond the grid on one side
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {  # method, knobs, forwards of a step
    "MeZO": (MeZO, {}, 2),
    "MeZO-m": (MeZO, {"variant": "momentum"}, 2),
    "MeZO-Adam": (MeZO, {"variant": "adam", "betas": (0.9, 0.99)}, 2),
    "MEAZO": (MeZO, {"variant": "scalar", "betas": (0.9, 0.99)}, 2),
    "n-SPSA, 4": (MeZO, {"queries": 4}, 8),
    "TeZO": (TeZO, {"rank": 16}, 2),
    "TeZO-m": (TeZO, {"rank": 16, "variant": "momentum"}, 2),
    "TeZO-Adam": (TeZO, {"rank": 16, "variant": "adam"}, 2),
    "TeZO-Lion": (TeZO, {"rank": 16, "variant": "lion"}, 2),
    "TeZO, factor Adam": (TeZO, {"rank": 16, "variant": "factor_adam"}, 2),
    "TeZO, refresh 100": (TeZO, {"rank": 16, "refresh_every": 100}, 2),
    "LOZO, every 50": (LOZO, {"rank": 4, "refresh_every": 50}, 2),
    "LOZO-m, every 50": (LOZO, {"rank": 4, "refresh_every": 50, "variant": "momentum"}, 2),
    "LOZO, every 1": (LOZO, {"rank": 4, "refresh_every": 1}, 2),
    "LOZO, every 1, desynchronized": (DesynchronizedLOZO, {"rank": 4, "refresh_every": 1}, 2),
    "SubZero": (SubZero, {"rank": 16, "refresh_every": 500}, 2),
    "Sparse-MeZO": (SparseMeZO, {}, 2),
    "HiZOO": (HiZOO, {}, 3),
    "FZOO": (FZOO, {}, 9),
    "ConMeZO": (ConMeZO, {}, 2),
    "ZO-AdaMU": (ZOAdaMU, {"hold": 150, "fall": 300}, 2),
}


def cell(start: dict[str, Tensor], name: str, lr: float, seed: int, forwards: int) -> dict[str, Any]:
    """Fine-tune from the pre-trained weights; return dev loss and accuracy and what the method kept."""
    model = Toy().eval()
    model.load_state_dict(start)
    method, knobs, cost = METHODS[name]
    optimizer = method(model.named_parameters(), lr=lr, seed=seed, **knobs)
    ids, label = sentences(1024, "train", seed)
    begun = time.process_time()
    skipped = None
    for step in range(forwards // cost):
        rows = torch.randint(1024, (32,), generator=generator(seed, "batch", step))
        try:
            optimizer.step(lambda rows=rows: inverted(model, ids[rows], label[rows])[0])
        except ValueError as error:  # the loss stopped being finite: the cell's result is that it diverged
            skipped = str(error)
            break
    seconds = time.process_time() - begun
    with torch.no_grad():
        loss, accuracy = inverted(model, *sentences(1000, "dev", seed))
    finite = bool(torch.isfinite(loss))
    return {
        "method": name, "lr": lr, "seed": seed, "forwards": forwards, "diverged": skipped,
        "dev_loss": float(loss) if finite else None, "dev_accuracy": float(accuracy), "seconds": round(seconds, 2),
        "report": optimizer.report(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--steps", type=int, default=1000, help="steps of two forwards")
    parser.add_argument("--only", nargs="*", default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recall = resumable("tezo-study", minutes=given.minutes)
    start = cache(lambda: {name: tensor.detach() for name, tensor in pretrained().state_dict().items()})

    def run(name: str, lr: float, seed: int) -> dict[str, Any] | None:
        key = f"{name}|{lr}|{seed}|{given.steps}"
        return recall(key, lambda: cell(start(), name, lr, seed, 2 * given.steps))

    for name in given.only or METHODS:
        best = search(lambda lr, name=name: run(name, lr, SELECTION_SEED))
        if best is None:
            continue
        found = [run(name, best, seed) for seed in SEEDS]
        losses = [r["dev_loss"] for r in found if r is not None and r["dev_loss"] is not None]
        if len(losses) == len(SEEDS):
            print(f"{name}: lr {best:.0e}, dev loss {statistics.mean(losses):.3f}", flush=True)


def search(run: Callable[[float], dict[str, Any] | None]) -> float | None:
    """Return the rate of least dev loss: of the grid, or beyond the edge at which the grid's best lies."""
    losses: dict[float, float] = {}
    for lr in RATES:
        if (result := run(lr)) is None:
            return None
        losses[lr] = math.inf if result["dev_loss"] is None else result["dev_loss"]
    for factor in (3.0, 1 / 3):
        for _ in range(FARTHEST):
            edge = (max if factor > 1 else min)(losses)
            if losses[edge] == math.inf or losses[edge] > min(losses.values()):
                break
            # One digit is kept, so that a rate reads, and its cell is found, the same on every machine.
            lr = float(f"{edge * factor:.0e}")
            if (result := run(lr)) is None:
                return None
            losses[lr] = math.inf if result["dev_loss"] is None else result["dev_loss"]
    best = min(losses, key=lambda lr: losses[lr])
    return best if losses[best] < math.inf else None


if __name__ == "__main__":
    main()
