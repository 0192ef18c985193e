"""The Python of README and guide runs as it stands, on tiny models. Pages on training parts have tests beside those."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from modicum.optim import AdaGC
from modicum.report import sections, write
from support import byte_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
IDS = torch.arange(3, 27).reshape(2, 12)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def dictionaries() -> list[dict[str, torch.Tensor]]:
    return [tiny_llama(seed=seed).state_dict() for seed in range(3)]


def folders() -> dict[str, Any]:
    """Write the folders that the pages name, and return the dictionaries."""
    for seed, name in enumerate(("base", "expert-a", "expert-b")):
        tiny_llama(seed=seed).save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    for seed, name in enumerate(("adapter-a", "adapter-b")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(tiny_llama(seed=0), config)
        adapted.peft_config["default"].base_model_name_or_path = str(Path("base").resolve())
        adapted.save_pretrained(name)
    base, a, b = dictionaries()
    return {"base": base, "a": a, "b": b, "model": tiny_llama(seed=0)}


def learn(model: torch.nn.Module, batch: Any = BATCH) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainer() -> dict[str, Any]:
    rows = Dataset.from_dict({"input_ids": [list(range(3, 30))] * 8, "labels": [list(range(3, 30))] * 8})
    arguments = TrainingArguments(
        output_dir="trained", max_steps=2, per_device_train_batch_size=2, report_to="none", save_strategy="no"
    )
    return {"Trainer": Trainer, "rows": rows, "arguments": arguments}


def stepping() -> dict[str, Any]:
    model = tiny_llama(seed=0)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "loss": model(**BATCH).loss}


def looped() -> dict[str, Any]:
    tiny_llama(seed=0).save_pretrained("base")
    return {"path": "base", "input_ids": IDS, "inputs": {"input_ids": IDS, "max_new_tokens": 3}}


def faulty() -> dict[str, Any]:
    given = trainer()
    learner = Trainer(model=tiny_llama(seed=0), args=given["arguments"], train_dataset=given["rows"])
    return {"trainer": learner, "tokenizer": byte_tokenizer()}


def domains() -> dict[str, Any]:
    given = trainer()
    given["arguments"].per_device_train_batch_size = 32  # one process stands for four workers
    return given | {
        "model": tiny_llama(seed=0),
        "texts": {"news": "rain in the north", "code": "def rain(): return north"},
        "rows_by_domain": {name: list(given["rows"]) for name in ("news", "code")},
        "probes": [BATCH, BATCH],
    }


def reported() -> dict[str, Any]:
    run = Path("runs/quickstart")
    run.mkdir(parents=True)
    (run / "record.json").write_text('{"job": "merge", "status": "done"}')
    (run / "recipe.yaml").write_text("job: merge\nexperts: [expert-a, expert-b]\nmethod: linear\n")
    return {}


# Page, its blocks that follow one another, and what they take from the reader.
RUN: list[tuple[str, list[int], Callable[[], dict[str, Any]]]] = [
    ("README.md", [0], folders),
    ("docs/index.md", [0], lambda: dict(zip(("base", "math_expert", "code_expert"), dictionaries(), strict=True))),
    ("docs/guide/merge.md", [0], folders),
    ("docs/guide/average.md", [0], lambda: {"model": tiny_llama(seed=0)} | trainer()),
    (
        "docs/guide/average.md",
        [1],
        lambda: {
            "model": tiny_llama(seed=0),
            "train": learn,
            "batches": [BATCH] * 150,
            "train_batches": [BATCH] * 2,
            "held_out_batches": [BATCH],
        },
    ),
    ("docs/guide/gradients.md", [0], stepping),
    ("docs/guide/gradients.md", [1], stepping),
    ("docs/guide/gradients.md", [2], lambda: stepping() | {"AdaGC": AdaGC}),
    ("docs/guide/gradients.md", [3], lambda: {"losses": [1 + step % 3 for step in range(60)]}),
    ("docs/guide/gradients.md", [4], faulty),
    ("docs/guide/coordinate.md", [0], domains),
    ("docs/guide/report.md", [0], reported),
    ("docs/guide/safety.md", [0], dict),
    ("docs/guide/zero-token.md", [0, 1], looped),
    ("docs/guide/zeroth-order.md", [0], lambda: {"model": tiny_llama(seed=0).eval(), "batches": [BATCH]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("page", "numbers", "given"), RUN, ids=[f"{page}-{'-'.join(map(str, numbers))}" for page, numbers, _ in RUN]
)
def test_code_of_the_guide_runs(page: str, numbers: list[int], given: Callable, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch} | given()
    for number in numbers:
        exec(compile(blocks(page)[number], page, "exec"), names)


@pytest.mark.filterwarnings("ignore")
def test_the_section_of_the_page_on_reports_shows_what_a_run_holds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sections, "_sections", dict(sections._sections))
    exec(compile(blocks("docs/guide/report.md")[1], "report.md", "exec"), {})
    (tmp_path / "record.json").write_text('{"job": "merge", "status": "done", "metrics": {"memory_bound": 25234048}}')
    (tmp_path / "recipe.yaml").write_text("job: merge\nexperts: [expert-a, expert-b]\nmethod: linear\n")
    assert "25,234,048" in write([tmp_path]).read_text(encoding="utf-8")
