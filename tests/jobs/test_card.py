from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from modicum.jobs import execute
from modicum.jobs.card import front_matter, model_card
from modicum.recipe import parse
from support import tiny_llama
from weights.test_adapter import train_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for seed, name in enumerate(["base", "a", "b"]):
        made.append(tmp_path_factory.mktemp("models") / name)
        tiny_llama(seed=seed).save_pretrained(made[-1])
        (made[-1] / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    return made


def test_a_merge_of_our_own_has_a_card_that_the_hub_reads(folders: list[Path], tmp_path: Path) -> None:
    base, *experts = map(str, folders)
    recipe: dict[str, Any] = {
        "job": "merge", "base": base, "experts": experts, "method": {"name": "ties", "density": 0.5},
    }  # fmt: skip
    execute(parse(recipe), tmp_path / "run", quiet=True)
    card = ModelCard.load(tmp_path / "run/model/README.md")
    assert card.data.library_name == "transformers"
    assert {"merge", "modicum"} <= set(card.data.tags)
    assert card.data.license == "apache-2.0"
    assert card.data.language == "en"
    assert f"| `{base}` (base) | apache-2.0 |" in card.text
    written = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert {key: written[key] for key in ("base", "experts")} == {"base": base, "experts": experts}
    again = parse(written)  # the recipe in the card runs
    execute(again, tmp_path / "again", quiet=True)
    files = [tmp_path / name / "model/model.safetensors" for name in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "run/model/mergekit_config.yml").exists()


def test_a_mergekit_file_comes_along_and_speaks_for_the_card(folders: list[Path], tmp_path: Path) -> None:
    document = {
        "merge_method": "linear", "models": [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders],
        "base_model": str(folders[0]), "license": "mit", "tags": ["mine"],
    }  # fmt: skip
    execute(parse(document), tmp_path / "run", quiet=True)
    assert yaml.safe_load((tmp_path / "run/model/mergekit_config.yml").read_text()) == document
    card = ModelCard.load(tmp_path / "run/model/README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["merge", "modicum", "mergekit", "mine"]
    assert yaml.safe_load(card.text.split("```yaml")[1].split("```")[0]) == document


def test_merged_adapters_have_a_card_too(folders: list[Path], tmp_path: Path) -> None:
    for name in "ab":
        train_adapter(folders[0], tmp_path / name)
    recipe = {"job": "merge", "experts": [str(tmp_path / n) for n in "ab"], "method": {"name": "tsv"}, "output": "lora"}
    execute(parse(recipe), tmp_path / "run", quiet=True)
    card = ModelCard.load(tmp_path / "run/adapter/README.md")
    assert card.data.library_name == "peft"
    assert f"`{folders[0]}`" in card.text


def test_licences_that_differ_are_listed_and_none_is_claimed(tmp_path: Path) -> None:
    texts = {"org/a": "---\nlicense: other\nlicense_name: own\n---", "org/b@v1": "---\nlicense: mit\n---", "c": "no"}
    for name, text in texts.items():
        (tmp_path / name.replace("/", "-")).mkdir()
        (tmp_path / name.replace("/", "-") / "README.md").write_text(text)
    inputs = {name: [tmp_path / name.replace("/", "-")] for name in texts}
    card = ModelCard(model_card(inputs, base="org/a", method="ties", recipe={}, said={}).decode())
    assert card.data.license is None
    assert card.data.base_model == ["org/a", "org/b"]
    assert "| [org/b@v1](https://huggingface.co/org/b) | mit |" in card.text
    assert "| `c` | not stated |" in card.text
    alone = ModelCard(model_card({"org/a": inputs["org/a"]}, base=None, method="x", recipe={}, said={}).decode())
    assert (alone.data.license, alone.data.license_name) == ("other", "own")


@pytest.mark.parametrize("text", ["", "# no head", "---\n: : :\n---", "---\n- a\n---", "---\nlicense: mit"])
def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert front_matter([tmp_path / "none", tmp_path]) == {}
