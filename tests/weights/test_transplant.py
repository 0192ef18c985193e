"""Transplanted tokenizers: shared tokens keep their rows, new ones are what the donor says they are like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.record import read_record
from modicum.weights import Checkpoint
from modicum.weights.mergekit.tokenizers import spelt
from modicum.weights.transplant import neighbours, plan_transplant, pursue
from weights.families import WORDS, make_family, write_tokenizer

SHARED = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"]
NEW = ["q", "r", "s", "<tool>"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a donor whose new tokens are combinations of two shared ones each, the same in both tables."""
    folder = tmp_path_factory.mktemp("zoo")
    make_family(folder / "mine", "llama", vocab_size=20)
    make_family(folder / "theirs", "qwen2", vocab_size=26)
    write_tokenizer(folder / "mine/base", SHARED)
    words = [*SHARED[:4], *NEW[:2], *reversed(SHARED[4:]), *NEW[2:]]
    write_tokenizer(folder / "theirs/base", words)
    file = folder / "theirs/base/model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    for place, new in enumerate(NEW):
        table[words.index(new)] = 2 * table[words.index("a")] - 0.5 * table[words.index("bcde"[place])]
    save_file(tensors, file, {"format": "pt"})
    return folder


def recipe(zoo: Path, **more: Any) -> dict[str, Any]:
    return {"job": "transplant", "model": str(zoo / "mine/base"), "donor": str(zoo / "theirs/base"), "k": 2} | more


@pytest.mark.filterwarnings("ignore")
def test_new_rows_are_the_donor_s_combinations_of_shared_ones(zoo: Path, tmp_path: Path) -> None:
    assert "20 tokens keep their rows, 4 are made by omp" in plan(parse(recipe(zoo)))[0]
    execute(parse(recipe(zoo)), tmp_path / "run", quiet=True)
    before, made = Checkpoint(zoo / "mine/base"), Checkpoint(tmp_path / "run/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        row = {token: before[name][i] for i, token in enumerate(SHARED)}
        assert made[name].shape == (26, 16)
        for token in SHARED:
            assert torch.equal(made[name][tokenizer.convert_tokens_to_ids(token)], row[token])
        for place, new in enumerate(NEW):
            expected = 2 * row["a"] - 0.5 * row["bcde"[place]]
            torch.testing.assert_close(made[name][tokenizer.convert_tokens_to_ids(new)], expected)
        torch.testing.assert_close(made[name][25], before[name][: len(SHARED)].mean(0))  # no token at all
    for name in before:
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(made[name], before[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.config.vocab_size == 26
    assert read_record(tmp_path / "run")["metrics"] == {"shared_tokens": 20, "new_tokens": 4}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["nearest", "mean", "zero"])
def test_the_other_ways(method: str, zoo: Path, tmp_path: Path) -> None:
    execute(parse(recipe(zoo, method=method, k=1, dtype="bfloat16")), tmp_path / "run", quiet=True)
    table = Checkpoint(tmp_path / "run/model")["model.embed_tokens.weight"]
    own = Checkpoint(zoo / "mine/base")["model.embed_tokens.weight"]
    expected = {"nearest": own[4], "mean": own.mean(0), "zero": torch.zeros(16)}[method]
    torch.testing.assert_close(table[4], expected.bfloat16(), rtol=1e-2, atol=1e-3)  # the row of "q", closest to "a"


@pytest.mark.filterwarnings("ignore")
def test_ids_in_settings_are_of_the_donor_s_vocabulary(zoo: Path, tmp_path: Path) -> None:
    """A donor may say nothing of padding, as Llama does; the model's own id may then be beyond the new tables."""
    make_family(tmp_path, "llama", vocab_size=44)
    folder, donor = tmp_path / "base", tmp_path / "donor"
    write_tokenizer(folder, [*SHARED, *map(chr, range(0x430, 0x430 + 24))])
    shutil.copytree(zoo / "theirs/base", donor)
    for place, ends in ((folder, {"pad_token_id": 40, "sep_token_id": 3}), (donor, {"pad_token_id": "unsaid"})):
        config = json.loads((place / "config.json").read_text()) | ends
        said = {key: value for key, value in config.items() if value != "unsaid"}
        (place / "config.json").write_text(json.dumps(said | {"image_token_id": 4}))
    lists = {"suppress_tokens": [4, 40], "bad_words_ids": [[5], [5, 40]], "eos_token_id": 40,
             "forced_eos_token_id": 40}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(lists))
    execute(parse(recipe(zoo, model=str(folder), donor=str(donor))), tmp_path / "run", quiet=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model").convert_tokens_to_ids
    assert (model.config.pad_token_id, model.config.image_token_id) == (None, ids("a"))
    assert model.config.eos_token_id == 2
    made = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert (made["suppress_tokens"], made["bad_words_ids"]) == ([ids("a")], [[ids("b")]])
    assert made["forced_eos_token_id"] is None
    assert any(
        "pad_token_id name tokens that the vocabulary lacks" in note for note in read_record(tmp_path / "run")["notes"]
    )


def test_models_that_share_nothing_or_have_no_tokenizer_are_refused(zoo: Path, tmp_path: Path) -> None:
    make_family(tmp_path, "llama", vocab_size=20)
    with pytest.raises(ModicumError, match="has no tokenizer"):
        plan(parse(recipe(zoo, donor=str(tmp_path / "base"))))
    write_tokenizer(tmp_path / "base", [*WORDS["base"][:4], *"ABCDEFGHIJKLMNOP"])
    with pytest.raises(ModicumError, match="share 4 tokens, too few"):
        plan(parse(recipe(zoo, donor=str(tmp_path / "base"))))


def slow_pursuit(target: Any, atoms: Any, k: int) -> Any:
    """Return the combination as a vector, by NumPy's least squares."""
    picked: list[int] = []
    rest = target
    for _ in range(k):
        towards = np.abs(atoms @ rest) / np.linalg.norm(atoms, axis=1)
        towards[picked] = -1
        picked.append(int(towards.argmax()))
        solved = np.linalg.lstsq(atoms[picked].T, target, rcond=None)[0]
        rest = target - solved @ atoms[picked]
    return solved @ atoms[picked], np.linalg.norm(rest)


@given(st.integers(0, 1000), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_pursuit_is_the_slow_one_and_its_rest_shrinks(seed: int, k: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    atoms = torch.randn(12, 7, generator=numbers, dtype=torch.float64)
    targets = torch.randn(3, 7, generator=numbers, dtype=torch.float64)
    made = pursue(targets, atoms, k=k).of(atoms)
    for target, ours in zip(targets.numpy(), made):
        expected, left = slow_pursuit(target, atoms.numpy(), k)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
        assert k == 1 or left <= slow_pursuit(target, atoms.numpy(), k - 1)[1] + 1e-9


def test_atoms_that_repeat_or_vanish_do_no_harm() -> None:
    atoms = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1e-7]])
    for found in (pursue(torch.tensor([[2.0, 1.0]]), atoms, k=4), neighbours(torch.tensor([[2.0, 1.0]]), atoms, k=9)):
        made = found.of(atoms)
        assert bool(made.isfinite().all())
        assert float(made.abs().max()) < 10


@pytest.mark.parametrize("first", ["piece", "byte"])
def test_a_piece_and_its_byte_are_two_tokens(first: str, tmp_path: Path) -> None:
    """SentencePiece has a line feed twice where it falls back to bytes; Gemma's bytes come after its pieces."""
    pieces = [f"p{i}" for i in range(18)]
    two = ["\n", "<0x0A>"] if first == "piece" else ["<0x0A>", "\n"]
    words = {"sentencepiece": [*pieces, *two], "level": [*reversed(pieces), "\u010a", "q"]}
    decoders = {"sentencepiece": {"type": "ByteFallback"}, "level": {"type": "ByteLevel"}}
    for name, tokens in words.items():
        make_family(tmp_path / name, "llama", vocab_size=20)
        vocabulary = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []}
        data = {"model": vocabulary, "decoder": decoders[name], "added_tokens": []}
        (tmp_path / name / "base/tokenizer.json").write_text(json.dumps(data))
    models = {name: Checkpoint(tmp_path / name / "base") for name in words}

    def row(model: str, donor: str, token: str) -> int:
        table: Any = plan_transplant(models[model], models[donor]).plan.steps[0].experts[0].tensors
        assert bool(table.tokens.all())
        return int(table.rows[words[donor].index(token)])

    level, piece = words["level"].index("\u010a"), words["sentencepiece"].index("\n")
    assert row("level", "sentencepiece", "\n") == row("level", "sentencepiece", "<0x0A>") == level
    assert row("sentencepiece", "level", "\u010a") == piece
    assert row("sentencepiece", "sentencepiece", "<0x0A>") == words["sentencepiece"].index("<0x0A>")


def test_tokens_are_compared_by_what_they_stand_for() -> None:
    level = {"decoder": {"type": "ByteLevel"}, "added_tokens": [{"content": "<|im_end|>"}]}
    assert spelt("\u0120a", level) == spelt("\u2581a", {}) == b" a"
    assert spelt("\u010a", level) == spelt("<0x0A>", {}) == b"\n"
    assert spelt("\u00c3\u00a9", level) == spelt("\u00e9", {})
    assert spelt("<|im_end|>", level) == "<|im_end|>"
    assert json.dumps(spelt("<|im_end|>", level))
