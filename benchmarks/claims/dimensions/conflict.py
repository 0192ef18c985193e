"""Mix the data or merge the specialists, as the labels of two dimensions contradict each other more and more.

    python -m benchmarks.claims.dimensions.conflict [--minutes 30]

A small Llama reads six digits and answers two. It was trained before to repeat the first or the last digit when it is
asked for it, and any two of them when it is not. Dimension A then prefers answers whose first digit is the prompt's
first, dimension B answers whose second digit is the prompt's last; the pairs have the same prompts. In a share q of
the pairs the one answer is right for A and wrong for B, and the other one the reverse: both dimensions see these pairs,
with opposite labels. One expert for each dimension is trained by DPO, and mixtures on the rows of both at as many steps
together, and at as many as one expert. Learning rates, and the scale of every merge, are chosen on validation pairs;
test pairs report: the share of pairs without conflict in which the answer that is right for the dimension is likelier.
Resumable cell by cell.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from benchmarks.cells import measure_all, resumable
from torch import Tensor
from torch.nn import functional

from modicum.objectives.dpo import dpo_loss
from modicum.random import generator
from modicum.weights.merge import merge_state_dicts

SEEDS = tuple(range(8))
SHARES = (0.0, 0.25, 0.5)
DIMENSIONS = ("first digit first", "last digit second")
DIGITS, LENGTH = 10, 6
PLAIN, FIRST, LAST, START = DIGITS, DIGITS + 1, DIGITS + 2, DIGITS + 3
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE_STEPS, BASE_ROWS, BASE_LR = 400, 64, 3e-3
STEPS, ROWS, PAIRS = 24, 32, 1024
RATES = (1.5e-4, 5e-4, 1.5e-3)
SCALES = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
SIZES = {"validation": 256, "test": 1024}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Average": ("linear", {}),
    "Task arithmetic": ("task_arithmetic", {}),
    "TIES": ("ties", {"density": 0.2}),
    "TSV-M": ("tsv", {}),
    "RESM": ("resm", {}),
}
FIXED = ("Average",)  # merges without a scale to choose
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Pairs:
    """Prompts (n, 8) with a chosen and a rejected answer (n, 2) each, and what the base says of both (n, 2)."""

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor
    reference: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, rows: Tensor) -> Pairs:
        return Pairs(self.prompts[rows], self.chosen[rows], self.rejected[rows], self.reference[rows])

    def flipped(self, which: Tensor) -> Pairs:
        """Return the pairs with the answers of some of them exchanged."""
        swap = which[:, None]
        return Pairs(
            self.prompts,
            torch.where(swap, self.rejected, self.chosen),
            torch.where(swap, self.chosen, self.rejected),
            torch.where(swap, self.reference.flip(1), self.reference),
        )


def new_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=START + 1, max_position_embeddings=16, **SHAPE))


def drawn(n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return digits without repetition, (n, 6), and for each row two that are neither the first nor the last."""
    digits = torch.rand(n, DIGITS, generator=rng).argsort(1)[:, :LENGTH]
    middle = digits[:, 1:-1]
    return digits, middle.gather(1, torch.rand(n, LENGTH - 2, generator=rng).argsort(1)[:, :2])


def framed(digits: Tensor, question: int | Tensor) -> Tensor:
    """Put the start before the digits and the question behind them."""
    asked = question if isinstance(question, Tensor) else torch.full((len(digits),), question)
    return torch.cat([torch.full((len(digits), 1), START), digits, asked[:, None]], 1)


@cache
def base(seed: int) -> Weights:
    """Train the base: it can repeat the first and the last digit, and prefers nothing when it is asked for nothing."""
    rng = generator(seed, "conflict", "base")
    torch.manual_seed(seed)  # for the weights alone
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR)
    for step in range(BASE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = BASE_LR * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / BASE_STEPS)) / 2
        digits, _ = drawn(BASE_ROWS, rng)
        question = torch.randint(PLAIN, START, (BASE_ROWS,), generator=rng)
        best = torch.where(question == FIRST, digits[:, 0], digits[:, -1])
        free = digits.gather(1, torch.rand(BASE_ROWS, LENGTH, generator=rng).argsort(1)[:, :2])
        answer = torch.where((question == PLAIN)[:, None], free, best[:, None].expand(-1, 2))
        logits = model(input_ids=torch.cat([framed(digits, question), answer[:, :1]], 1), use_cache=False).logits
        loss = functional.cross_entropy(logits[:, -2:].flatten(0, 1), answer.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def log_probabilities(model: Any, pairs: Pairs) -> Tensor:
    """Return the summed log-probabilities of both answers, (n, 2)."""
    prompts = pairs.prompts.repeat(2, 1)
    answers = torch.cat([pairs.chosen, pairs.rejected])
    logits = model(input_ids=torch.cat([prompts, answers[:, :1]], 1), use_cache=False).logits[:, -2:]
    found = logits.log_softmax(-1).gather(2, answers[..., None])[..., 0].sum(1)
    return found.view(2, -1).T


class Bench:
    """One base, its pairs of both dimensions, and what is trained on them.

    Args:
        seed: Of base, pairs and training.
        q: Share of the training pairs on which the dimensions contradict each other.
    """

    def __init__(self, seed: int, q: float) -> None:
        self.seed, self.q = seed, q
        self.model = new_model()
        self.start = base(seed)
        self.put(self.start)
        self.train = self.made("train", PAIRS, round(q * PAIRS))
        self.splits = {split: self.made(split, size, 0) for split, size in SIZES.items()}
        self.contradicting = self.made("contradicting", SIZES["validation"], SIZES["validation"])

    def made(self, split: str, n: int, conflicts: int) -> list[Pairs]:
        """Return the pairs of both dimensions, the same prompts in the same order; the first ones contradict."""
        rng = generator(self.seed, "conflict", split)
        digits, middle = drawn(n, rng)
        opening, closing = digits[:, 0], digits[:, -1]
        first, second = middle[:, 0], middle[:, 1]
        contradict = torch.arange(n) < conflicts
        found = []
        for dimension in range(2):
            if dimension == 0:
                right, wrong = torch.stack([opening, second], 1), torch.stack([first, second], 1)
                other = torch.stack([first, closing], 1)
            else:
                right, wrong = torch.stack([first, closing], 1), torch.stack([first, second], 1)
                other = torch.stack([opening, second], 1)
            rejected = torch.where(contradict[:, None], other, wrong)
            pairs = Pairs(framed(digits, PLAIN), right, rejected, torch.zeros(n, 2))
            with torch.no_grad():
                found.append(replace(pairs, reference=log_probabilities(self.model, pairs)))
        return found

    def put(self, weights: Weights, scale: float = 1.0) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(torch.lerp(self.start[name], weights[name], scale))

    def learn(self, pairs: Sequence[Pairs], steps: int, rate: float, *names: str) -> Weights:
        """Train from the base by DPO; each step draws as many rows of every set."""
        rng = generator(self.seed, "conflict", "order", *names)
        self.put(self.start)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.0)
        for _ in range(steps):
            drawn = [part.part(torch.randint(len(part), (ROWS // len(pairs),), generator=rng)) for part in pairs]
            batch = Pairs(*(torch.cat([getattr(d, field) for d in drawn]) for field in Pairs.__dataclass_fields__))
            policy = log_probabilities(self.model, batch)
            loss = dpo_loss(policy[:, 0], policy[:, 1], batch.reference[:, 0], batch.reference[:, 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def scores(self, split: str) -> list[float]:
        """Return the pair accuracy in each dimension of the weights that were put."""
        return [accuracy(self.model, pairs) for pairs in self.splits[split]]

    def tested(self, weights: Weights, scale: float = 1.0) -> dict[str, Any]:
        self.put(weights, scale)
        with torch.no_grad():
            first = accuracy(self.model, self.contradicting[0])
        return {"test": self.scores("test"), "first digit first where both contradict": first}

    def chosen(self, make: Callable[[float], Weights], dimensions: Sequence[int]) -> tuple[float, Weights]:
        """Return the learning rate, and its weights, with the best validation accuracy; the first of equal ones."""
        best: tuple[float, float, Weights] | None = None
        for rate in RATES:
            weights = make(rate)
            self.put(weights)
            found = self.scores("validation")
            score = sum(found[d] for d in dimensions) / len(dimensions)
            if best is None or score > best[0]:
                best = (score, rate, weights)
        assert best is not None
        return best[1:]

    def scaled(self, weights: Weights, scales: Sequence[float]) -> float:
        """Return the scale with the best validation accuracy, mean over both dimensions."""
        found = []
        for scale in scales:
            self.put(weights, scale)
            found.append(sum(self.scores("validation")))
        return scales[max(range(len(scales)), key=lambda i: (found[i], -abs(math.log(scales[i]))))]


def accuracy(model: Any, pairs: Pairs) -> float:
    found = log_probabilities(model, pairs)
    difference = found[:, 0] - found[:, 1]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def measured(seed: int, q: float) -> dict[str, Any]:
    """Train and measure everything of one seed and one share of contradictions."""
    bench = Bench(seed, q)
    arms: dict[str, Any] = {"base": bench.tested(bench.start)}
    experts = []
    for d, name in enumerate(DIMENSIONS):
        rate, weights = bench.chosen(lambda rate, d=d: bench.learn([bench.train[d]], STEPS, rate, str(d)), [d])
        experts.append(weights)
        arms[f"expert, {name}"] = bench.tested(weights) | {"rate": rate}
    for label, steps in (("mixture, steps of both experts", 2 * STEPS), ("mixture, steps of one expert", STEPS)):
        rate, weights = bench.chosen(
            lambda rate, steps=steps: bench.learn(bench.train, steps, rate, "mixture"), range(len(DIMENSIONS))
        )
        arms[label] = bench.tested(weights) | {"rate": rate}
    for label, (method, knobs) in METHODS.items():
        merged = merge_state_dicts(bench.start, experts, method=method, seed=seed, **knobs)
        scale = bench.scaled(merged, (1.0,) if label in FIXED else SCALES)
        arms[label] = bench.tested(merged, scale) | {"scale": scale}
    arms |= controls(bench, experts)
    return {"q": q, "seed": seed, "arms": arms, "cosine of the experts": _cosine(bench, experts)}


def controls(bench: Bench, experts: Sequence[Weights]) -> dict[str, Any]:
    """Merge the first expert with what holds nothing of the second dimension, by task arithmetic and TSV-M."""
    rng = generator(bench.seed, "conflict", "controls")
    flips = torch.rand(PAIRS, generator=rng) < 0.5
    shuffled = bench.learn([bench.train[1].flipped(flips)], STEPS, RATES[1], "shuffled")
    noise = {}
    for name, start in bench.start.items():
        delta = torch.randn(start.shape, generator=rng)
        noise[name] = start + delta * (experts[1][name] - start).norm() / delta.norm()
    again = bench.learn([bench.train[0]], STEPS, RATES[1], "again")
    found = {}
    others: Mapping[str, Weights] = {"shuffled labels": shuffled, "random delta": noise, "another seed": again}
    for label, other in others.items():
        for name in ("Task arithmetic", "TSV-M"):
            method, knobs = METHODS[name]
            merged = merge_state_dicts(bench.start, [experts[0], other], method=method, seed=bench.seed, **knobs)
            scale = bench.scaled(merged, SCALES)
            found[f"{name}, first expert and {label}"] = bench.tested(merged, scale) | {"scale": scale}
    return found


def _cosine(bench: Bench, experts: Sequence[Weights]) -> float:
    flat = [torch.cat([(e[n] - bench.start[n]).flatten() for n in bench.start]).double() for e in experts]
    return float(functional.cosine_similarity(flat[0], flat[1], dim=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--try", dest="trial", action="store_true", help="print one cell and store nothing")
    given = parser.parse_args()
    if given.trial:
        import json

        print(json.dumps(measured(0, 0.25), indent=1))
        return
    about = {
        "model": SHAPE, "steps": STEPS, "rows": ROWS, "pairs": PAIRS, "rates": list(RATES), "scales": list(SCALES),
        "base_steps": BASE_STEPS, "methods": {k: [m, dict(v)] for k, (m, v) in METHODS.items()}, "sizes": SIZES,
    }  # fmt: skip
    recall = resumable("dimensions-conflict", minutes=given.minutes, about=about)
    wanted = {f"{seed}|{q}": (lambda s=seed, q=q: measured(s, q)) for seed in SEEDS for q in SHARES}
    measure_all(recall, wanted)


if __name__ == "__main__":
    main()
