"""Merges of real experts beside training on mixed data: SmolLM2-135M-Instruct, three tasks with checked answers.

    python -m benchmarks.claims.merging.experts [--minutes 40]

The experts are trained in full in the upper ten of thirty blocks; what the lower blocks make of an example is computed
once, which is what makes the study affordable on one core. Mixed training gets the steps, and the rows, of the three
experts together. Every merged delta is scaled by a factor that the validation split chooses from one grid, walking from
1 as long as it pays; the test split reports. A task's score is the share of the fall of its loss, from the delivered
model to its own expert, that a model reaches. Resumable cell by cell.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from benchmarks.cells import resumable
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from modicum.jobs.data.sources.suite import Example, task_examples
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.training.task_losses import TaskLoss
from modicum.random import generator
from modicum.weights.kernels.compare import compare
from modicum.weights.merge import merge_state_dicts

MODEL = "builtin:smollm2-135m-instruct"
TASKS = ("polarity", "order", "kind")
KINDS = (
    ("dog", "horse", "cat", "rabbit", "sheep", "tiger", "goat", "fox", "mouse", "lion", "bear", "wolf"),
    ("hammer", "drill", "saw", "wrench", "axe", "shovel", "knife", "screwdriver", "rake", "chisel", "pliers", "ladder"),
)
SEEDS = (0, 1, 2)
FROZEN = 20  # blocks below the trained ones
STEPS, ROWS, LR = 30, 8, 5e-5
SIZES = {"train": 160, "validation": 32, "test": 64}
SCALES = (0.2, 0.35, 0.6, 1.0, 1.5, 2.2, 3.3)
SPARSE = {"density": 0.2}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Task arithmetic": ("task_arithmetic", {}),
    "TIES": ("ties", SPARSE),
    "DARE-TIES": ("dare", SPARSE | {"elect": "ties"}),
    "DELLA": ("della", {"density": 0.3, "epsilon": 0.15, "elect": "ties"}),
    "Breadcrumbs": ("breadcrumbs", {"density": 0.15, "gamma": 0.01}),
    "Model Stock": ("model_stock", {}),
    "TSV-M": ("tsv", {}),
    "TSV-M, cut-off 0.05": ("tsv", {"whiten_rtol": 0.05}),
    "TSV-M, no cut-off": ("tsv", {"whiten_rtol": 0.0}),
    "RESM": ("resm", {}),
    "Iso-C": ("iso_c", {}),
    "WUDI": ("wudi", {}),
    "KnOTS": ("knots", {"inner": "ties", **SPARSE}),
}
Weights = dict[str, Tensor]


def kind_examples(size: int, split: str, seed: int) -> list[Example]:
    """Ask for the group of two animals, or of two tools; what the groups are called tells nothing about them."""
    rng = generator(seed, "kind", split)
    made = []
    for _ in range(size):
        answer = int(torch.randint(2, (), generator=rng))
        words = KINDS[answer]
        first, second = (words[place] for place in torch.randperm(len(words), generator=rng)[:2].tolist())
        made.append(Example(f"The {first} and the {second} are in group", (" A", " B"), answer))
    return made


@dataclass(frozen=True)
class Part:
    """Examples of one task and one split, as the trained blocks meet them."""

    hidden: Tensor
    mask: Tensor
    positions: Tensor
    words: list[int]
    answers: Tensor


def examples_of(task: str, split: str, size: int, seed: int) -> list[Example]:
    if task == "kind":
        return kind_examples(size, split, seed)
    return task_examples(task, split=split, size=size, seed=seed)


@torch.no_grad()
def part(whole: Any, task: TaskLoss) -> Part:
    """Run the lower blocks."""
    mask, positions = task.batch["attention_mask"], task.batch["position_ids"]
    read = whole.model(
        input_ids=task.batch["input_ids"], attention_mask=mask, position_ids=positions,
        use_cache=False, output_hidden_states=True,
    )  # fmt: skip
    return Part(read.hidden_states[FROZEN], mask, positions, task.words, task.answers)


class Bench:
    """The upper blocks of the model, and what the lower ones make of each task's examples."""

    def __init__(self, seed: int) -> None:
        whole: Any = load_model(MODEL, dtype="float32").eval().requires_grad_(False)
        tokenizer = load_tokenizer(MODEL)
        self.parts = {
            (task, split): part(whole, TaskLoss(whole, tokenizer, examples_of(task, split, size, seed)))
            for task in TASKS for split, size in SIZES.items()
        }  # fmt: skip
        self.seed = seed
        whole.model.layers = nn.ModuleList(whole.model.layers[FROZEN:])
        self.model = whole
        self.start: Weights = {n: p.clone() for n, p in self._matrices()}

    def _matrices(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if "_proj." in name]

    def loss(self, part: Part, rows: slice | Tensor = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the loss over the label words, and the share of right answers."""
        logits = self.model(
            inputs_embeds=part.hidden[rows], attention_mask=part.mask[rows], position_ids=part.positions[rows],
            use_cache=False, logits_to_keep=1,
        ).logits[:, -1, part.words]  # fmt: skip
        answers = part.answers[rows]
        return functional.cross_entropy(logits, answers), (logits.argmax(1) == answers).float().mean()

    def put(self, weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Set the weights to the start plus ``scale`` times what ``weights`` differ from it."""
        with torch.no_grad():
            for name, p in self._matrices():
                p.copy_(torch.lerp(self.start[name], weights[name], scale))

    @torch.no_grad()
    def measure(self, split: str) -> dict[str, dict[str, float]]:
        found = {task: self.loss(self.parts[task, split]) for task in TASKS}
        return {task: {"loss": float(loss), "accuracy": float(right)} for task, (loss, right) in found.items()}

    def train(self, tasks: Sequence[str]) -> Weights:
        """Train on the tasks' batches in turn, as many steps for each task as an expert gets; return the weights."""
        self.put(self.start)
        matrices = [p.requires_grad_(True) for _, p in self._matrices()]
        optimizer = torch.optim.AdamW(matrices, lr=LR, weight_decay=0.0, fused=True)
        steps = STEPS * len(tasks)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 5, 1 - s / steps))
        for step in range(steps):
            turn, task = step // len(tasks), tasks[step % len(tasks)]
            rows = torch.randint(SIZES["train"], (ROWS,), generator=generator(self.seed, "batch", task, turn))
            self.loss(self.parts[task, "train"], rows)[0].backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        for p in matrices:
            p.requires_grad_(False)
        return {name: p.clone() for name, p in self._matrices()}


class Study:
    """One seed's cells. Experts are kept in a temporary folder, and trained again when they are gone."""

    def __init__(self, seed: int, recall: Any) -> None:
        self.seed = seed
        self.recall = lambda key, run: recall(f"{seed}|{key}", run)

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.seed)

    def trained(self, *tasks: str) -> Weights:
        name = f"modicum-merging-{STEPS}-{LR}-{FROZEN}-{self.seed}-{'-'.join(tasks)}.safetensors"
        path = Path(tempfile.gettempdir()) / name
        if not path.exists():
            part = path.with_suffix(".part")
            save_file(self.bench.train(tasks), part)
            part.replace(path)
        return load_file(path)

    def both(self) -> dict[str, Any]:
        return {split: self.bench.measure(split) for split in ("validation", "test")}

    def begin(self) -> dict[str, Any]:
        self.bench.put(self.bench.start)
        return self.both()

    def train(self, *tasks: str) -> dict[str, Any]:
        begun = time.process_time()
        weights = self.trained(*tasks)
        spent = time.process_time() - begun
        self.bench.put(weights)
        return {"train_seconds": round(spent, 1), **self.both()}

    def likeness(self) -> dict[str, Any]:
        """Mean cosine, over the matrices, between the deltas of each pair of experts."""
        experts = [self.trained(task) for task in TASKS]
        found = [compare(base, [e[name] for e in experts])["cosines"] for name, base in self.bench.start.items()]
        return {f"{a}, {b}": mean(each) for (a, b), each in zip(combinations(TASKS, 2), zip(*found))}

    def merge(self, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
        """Merge, walk along the grid of scales from 1 while validation improves, and report the best on the test."""
        method, knobs = METHODS[name]
        begun = time.process_time()
        merged = merge_state_dicts(
            self.bench.start, [self.trained(task) for task in TASKS], method=method, seed=self.seed, **knobs
        )
        spent = time.process_time() - begun
        walked: dict[float, float] = {}

        def score(scale: float) -> float:
            if scale not in walked:
                self.bench.put(merged, scale)
                walked[scale] = mean(shares(self.bench.measure("validation"), known, "validation"))
            return walked[scale]

        best = SCALES.index(1.0)
        for way in (1, -1):
            while 0 <= best + way < len(SCALES) and score(SCALES[best + way]) > score(SCALES[best]):
                best += way
        self.bench.put(merged, SCALES[best])
        return {
            "merge_seconds": round(spent, 2), "scale": SCALES[best], "validation_scores": walked,
            "test": self.bench.measure("test"),
        }  # fmt: skip

    def run(self) -> None:
        """Measure the cells of this seed as far as time allows."""
        known = {"start": self.recall("start", self.begin)}
        known |= {task: self.recall(task, lambda task=task: self.train(task)) for task in TASKS}
        self.recall("mixed", lambda: self.train(*TASKS))
        self.recall("likeness", self.likeness)
        if None in known.values():
            return
        for name in METHODS:
            self.recall(name, lambda name=name: self.merge(name, known))


def shares(found: Mapping[str, Any], known: Mapping[str, Any], split: str) -> list[float]:
    """Return for each task what share of its expert's gain in loss a model has reached."""
    start, own = known["start"][split], [known[task][split] for task in TASKS]
    return [
        (start[task]["loss"] - found[task]["loss"]) / (start[task]["loss"] - expert[task]["loss"])
        for task, expert in zip(TASKS, own)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=40.0, help="begin no new cell after so many")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # TSV-M without a cut-off warns; how it fares is what is measured
    recall = resumable("merging-experts", minutes=given.minutes)
    for seed in SEEDS:
        Study(seed, recall).run()


if __name__ == "__main__":
    main()
