"""Retrieval after fine-tuning SmolLM2-135M on questions over contexts that are generated here.

Training items hide invented facts in the standard library's training texts; test items use other names and held-out
texts, at the trained length and at twice that. Every arm sees the same items in the same order, for the same number of
tokens. An answer counts when every one of its tokens is the most likely one, which is what greedy decoding would
write; its nats per token tell arms apart that are all right or all wrong. A single fact is too easy after a few steps,
so it is hidden among its like, or asked for with others, or reached by assignments.
"""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from modicum.evaluate.measures.retrieval import Haystack, Item, grids, make_items
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.training.objective import LabelHead, build_collator
from modicum.random import derive_seed

MODEL = "builtin:smollm2-135m-instruct"
TASKS = ("multi_key", "multi_needle", "variables")
LENGTH, STEPS, RATE = 256, 15, 5e-5
TEST_LENGTHS, TEST_DEPTHS, PER_CELL = (256, 512), (0.0, 0.5, 1.0), 1
ARMS = {
    "before": None,
    "ntp": ("ntp", {}),
    "meap 0.15": ("meap", {"ratio": 0.15}),
    "masked thought": ("masked_thought", {}),
}


def run(arm: str, seed: int) -> dict[str, Any]:
    """Fine-tune one arm and return its scores by task, depth and length."""
    model, tokenizer = load_model(MODEL, dtype="float32"), load_tokenizer(MODEL)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    losses = [] if ARMS[arm] is None else _train(model, tokenizer, arm, seed, Haystack(_text("train"), count))
    knobs = {"lengths": TEST_LENGTHS, "depths": TEST_DEPTHS, "per_cell": PER_CELL, "seed": seed}
    text = Haystack(_text("test"), count)
    items = [item for task in TASKS for item in make_items(task, text, **knobs)]
    scores, nats = zip(*(_judge(model.eval(), tokenizer, item) for item in items))
    return {
        "recall": sum(scores) / len(scores),
        "answer_nats": sum(nats) / len(nats),
        "grids": {
            grid.task: asdict(grid) | {"answer_nats": hard.values}
            for grid, hard in zip(grids(items, scores), grids(items, nats))
        },
        "losses": losses,
        "steps": len(losses),
    }


def _train(model: Any, tokenizer: Any, arm: str, seed: int, text: Haystack) -> list[float]:
    name, knobs = ARMS[arm]
    collator = build_collator(_batch, name, knobs, seed=seed, tokenizer=tokenizer, model=model, gather_labels=True)
    collator.start_epoch(0, total_steps=STEPS)
    items: list[Item] = []
    for task in TASKS:
        items += make_items(task, text, lengths=[LENGTH], per_cell=-(-STEPS // 15), seed=seed, split="train")
    random.Random(derive_seed(seed, "order")).shuffle(items)
    optimizer, losses, head = torch.optim.AdamW(model.parameters(), lr=RATE), [], LabelHead(model)
    model.train()
    for item in items[:STEPS]:
        batch = collator([_encode(tokenizer, item)])
        labels = batch.pop("labels")
        loss = head(model(**batch), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    head.detach()
    return losses


def _encode(tokenizer: Any, item: Item) -> tuple[list[int], list[int]]:
    prompt = tokenizer(item.prompt, add_special_tokens=False, verbose=False)["input_ids"]
    answer = tokenizer(item.expected, add_special_tokens=False, verbose=False)["input_ids"]
    return prompt + answer, [-100] * len(prompt) + answer


def _batch(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    [(ids, labels)] = rows
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


@torch.no_grad()
def _judge(model: Any, tokenizer: Any, item: Item) -> tuple[float, float]:
    """Return whether the whole answer is right, and its nats per token."""
    ids, labels = _encode(tokenizer, item)
    answer = torch.tensor([label for label in labels if label != -100])
    # Only the answer's logits are needed: over a vocabulary of 49 k the others would take most of the memory.
    logits = model(input_ids=torch.tensor([ids]), logits_to_keep=len(answer) + 1).logits[0, :-1]
    return float(torch.equal(logits.argmax(-1), answer)), float(cross_entropy(logits, answer))


def _text(split: str) -> str:
    rows = load_rows(DataSection(path="builtin:python-stdlib", split=split, size=400), seed=0)
    return "\n\n".join(row["text"] for row in rows.rows)
