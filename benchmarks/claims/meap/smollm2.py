"""Retrieval after fine-tuning SmolLM2-135M on questions over long contexts that are generated here.

Training items hide invented facts in the standard library's training texts; test items use other names and held-out
texts. Every arm sees the same items in the same order, for the same number of tokens. An answer counts when every one
of its tokens is the most likely one, which is what greedy decoding would write.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from modicum.evaluate.retrieval import Haystack, Item, grids, make_items
from modicum.jobs.data import DataSection, load_rows
from modicum.jobs.models import load_model, load_tokenizer
from modicum.jobs.objectives import build_collator
from modicum.random import derive_seed

MODEL = "builtin:smollm2-135m-instruct"
LENGTH, STEPS, BATCH, RATE = 256, 24, 2, 1e-4
TEST_LENGTHS, TEST_DEPTHS, PER_CELL = (128, 256, 512), (0.0, 0.5, 1.0), 3
ARMS = {
    "ntp": ("ntp", {}),
    "meap 0.15": ("meap", {"ratio": 0.15}),
    "before": None,
    "meap 0.05": ("meap", {"ratio": 0.05}),
    "masked thought": ("masked_thought", {}),
}


def run(arm: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Fine-tune one arm and return its scores by depth and length."""
    del scratch
    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    losses = []
    if ARMS[arm] is not None:
        losses = _train(model, tokenizer, arm, seed, Haystack(_text("train"), count))
    items = make_items(
        "needle", Haystack(_text("test"), count), lengths=TEST_LENGTHS, depths=TEST_DEPTHS, per_cell=PER_CELL, seed=seed
    )
    scores = [_right(model.eval(), tokenizer, item) for item in items]
    [grid] = grids(items, scores)
    return {
        "recall": sum(scores) / len(scores),
        "depths": grid.depths,
        "lengths": grid.lengths,
        "values": grid.values,
        "losses": losses,
        "tokens": STEPS * BATCH * LENGTH if losses else 0,
    }


def _train(model: Any, tokenizer: Any, arm: str, seed: int, text: Haystack) -> list[float]:
    name, knobs = ARMS[arm]
    collator = build_collator(_pad, name, knobs, seed=seed, tokenizer=tokenizer, model=model)
    collator.start_epoch(0, total_steps=STEPS)
    items: list[Item] = []
    for task in ("needle", "multi_key"):
        items += make_items(
            task, text, lengths=[LENGTH], per_cell=max(1, STEPS * BATCH // 10), seed=seed, split="train"
        )
    random.Random(derive_seed(seed, "order")).shuffle(items)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=RATE), []
    model.train()
    for step in range(STEPS):
        rows = [_encode(tokenizer, item) for item in items[step * BATCH : (step + 1) * BATCH]]
        loss = model(**collator(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _encode(tokenizer: Any, item: Item) -> tuple[list[int], list[int]]:
    prompt = tokenizer(item.prompt, add_special_tokens=False, verbose=False)["input_ids"]
    answer = tokenizer(item.expected, add_special_tokens=False, verbose=False)["input_ids"]
    return prompt + answer, [-100] * len(prompt) + answer


def _pad(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    padded = {
        "input_ids": [ids + [2] * (longest - len(ids)) for ids, _ in rows],
        "labels": [labels + [-100] * (longest - len(labels)) for _, labels in rows],
        "attention_mask": [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows],
    }
    return {key: torch.tensor(value) for key, value in padded.items()}


@torch.no_grad()
def _right(model: Any, tokenizer: Any, item: Item) -> float:
    ids, labels = _encode(tokenizer, item)
    answer = [label for label in labels if label != -100]
    # Only the answer's logits are needed: over a vocabulary of 49 k the others would take most of the memory.
    logits = model(input_ids=torch.tensor([ids]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    return float(logits.argmax(-1).tolist() == answer)


def _text(split: str) -> str:
    rows = load_rows(DataSection(path="builtin:python-stdlib", split=split, size=400), seed=0)
    return "\n\n".join(row["text"] for row in rows.rows)
