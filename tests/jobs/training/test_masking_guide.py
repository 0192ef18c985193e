"""The guide's code runs as it stands, on small parts."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

from modicum.recipe import parse, parse_yaml
from support import byte_tokenizer, tiny_llama

GUIDE = (Path(__file__).parents[3] / "docs" / "guide" / "masking.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def block(language, holds):
    [found] = [text for text in blocks(language) if holds in text]
    return found


def parts(tmp_path, **model):
    tokenizer = byte_tokenizer()
    texts = [f"A sentence about the number {i} and its square {i * i}." for i in range(30)]
    return {"model": tiny_llama(**model), "tokenizer": tokenizer, "folder": str(tmp_path)}, texts


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_the_trainer_example_runs(tmp_path):
    names, texts = parts(tmp_path)
    names["dataset"] = Dataset.from_dict({"input_ids": [names["tokenizer"](text)["input_ids"] for text in texts]})
    exec(block("python", "import DataCollatorForLanguageModeling"), names)
    assert names["trainer"].state.global_step == 3
    assert names["tokenizer"].mask_token_id == 259


def test_the_trl_example_runs(tmp_path):
    names, texts = parts(tmp_path)
    names["dataset"] = Dataset.from_dict({"text": texts})
    exec(block("python", "import SFTConfig"), names)
    assert names["trainer"].state.global_step == 3


def test_the_lora_and_loop_examples_run(tmp_path):
    names, _ = parts(tmp_path)
    exec(block("python", "lora_options(knobs)"), names)
    assert any("trainable_tokens" in name for name, _ in names["model"].named_parameters())
    exec(block("python", "start_epoch(0)"), names)
    assert not names["collator"].training


@pytest.mark.parametrize("text", blocks("yaml"))
def test_every_recipe_is_valid(text):
    assert parse(parse_yaml(text)).job in ("train", "evaluate")
