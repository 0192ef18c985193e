"""Models with tables of another vocabulary: all that their rows are made from is watched while it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from modicum.errors import CheckpointError, UnsupportedError
from modicum.jobs import execute
from modicum.recipe import parse
from modicum.weights import Checkpoint
from modicum.weights.mergekit.vocabulary import Vocabulary, with_vocabulary
from modicum.weights.retabled import Retabled, rows_of
from modicum.weights.transplant import Transplanted
from weights.families import WORDS, write_tokenizer

ROWS = torch.tensor([0, -1])
KINDS: dict[str, Callable[[Checkpoint, Checkpoint], Retabled]] = {
    "union": lambda model, donor: Vocabulary(model, 2, ROWS, [(donor, torch.tensor([-1, 1]))]),
    "transplant": lambda model, donor: Transplanted(model, donor, ROWS, torch.ones(2) > 0, way="nearest", k=1),
}


def save(file: Path, scale: float) -> None:
    tables = {"model.embed_tokens.weight": scale * torch.eye(2), "model.norm.weight": scale * torch.ones(2)}
    save_file(tables, file, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changed", ["model", "donor"])
def test_a_change_of_the_model_or_of_a_donor_is_noticed(kind: str, changed: str, tmp_path: Path) -> None:
    for name in ("model", "donor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save(tmp_path / name / "model.safetensors", 1.0)
    model, donor = (Checkpoint(tmp_path / name) for name in ("model", "donor"))
    made = KINDS[kind](model, donor)
    made.check()
    assert len(made) == 2 and made.spec("model.embed_tokens.weight").shape == (2, 2)
    assert torch.equal(made["model.embed_tokens.weight"][0], torch.tensor([1.0, 0.0]))
    assert torch.equal(made["model.norm.weight"], torch.ones(2))
    # In place: a file that another one replaces stays what it was to whoever reads it.
    file = tmp_path / changed / "model.safetensors"
    save(tmp_path / "other", 2.0)
    with file.open("r+b") as opened:
        opened.write((tmp_path / "other").read_bytes())
    with pytest.raises(CheckpointError, match=changed):
        made.check()


TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({TABLE: (5, 2), "lm_head.weight": (4, 2)}, "tables of several sizes, 'lm_head.weight' of 4 tokens and"),
        ({TABLE: (5, 2), "qformer.embeddings.word_embeddings.weight": (9, 2)}, "tables of several sizes"),
        ({TABLE: (5, 2), "final_logits_bias": (1, 4)}, "tables of several sizes, 'final_logits_bias' of 4 tokens and"),
        (
            {TABLE: (5, 2), "logits_scale": (1, 5)},
            "'logits_scale' has 5 entries as its vocabulary.* Keep",
        ),
        ({"final_logits_bias": (1, 5), "lm_head.bias": (5,)}, "has no embedding of tokens"),
        ({TABLE: (5, 2), "model.values.weight": (5, 3)}, "'model.values.weight' has 5 entries as its vocabulary"),
        ({"model.odd_table.weight": (5, 2)}, "has no embedding of tokens"),
    ],
)
@pytest.mark.parametrize("source", ["union", "base"])
def test_what_one_vocabulary_cannot_order_is_refused(
    shapes: dict[str, tuple[int, ...]], message: str, source: str, tmp_path: Path
) -> None:
    models = {name: tmp_path / name for name in ("base", "a")}
    for words, folder in zip(("abcde", "edcba"), models.values()):
        folder.mkdir()
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        vocabulary = {"model": {"type": "BPE", "vocab": {word: row for row, word in enumerate(words)}, "merges": []}}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UnsupportedError, match=message):
        with_vocabulary({"tokenizer_source": source}, {n: Checkpoint(folder) for n, folder in models.items()}, "base")


def test_what_is_as_wide_as_the_vocabulary_is_long_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({TABLE: torch.eye(5), "model.norm.weight": torch.ones(5)}, tmp_path / "model.safetensors")
    assert rows_of(Checkpoint(tmp_path)) == 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Bart", "Marian"])
def test_biases_of_the_logits_go_with_their_tokens(kind: str, tmp_path: Path) -> None:
    """As those of BART, which are a row of a matrix; Marian counts its decoder's tokens apart."""
    sizes = {
        f"{side}_{what}": 8 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    sizes |= {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, "decoder_start_token_id": 2}
    maker = {"Bart": transformers.BartForConditionalGeneration, "Marian": transformers.MarianMTModel}[kind]
    biases = {}
    for name in ("base", "a", "c"):
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(WORDS[name]), eos_token_id=2, **sizes)
        model = maker(config)
        model.final_logits_bias.copy_(torch.randn(1, len(WORDS[name])))
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name, WORDS[name])
        biases[name] = dict(zip(WORDS[name], model.final_logits_bias[0]))
    merged = {"job": "merge", "base": str(tmp_path / "base"), "tokenizer": "union",
              "experts": [str(tmp_path / "a"), str(tmp_path / "c")], "method": "linear"}  # fmt: skip
    execute(parse(merged), tmp_path / "merged", quiet=True)
    given = {"job": "transplant", "model": str(tmp_path / "c"), "donor": str(tmp_path / "a"), "k": 2}
    execute(parse(given), tmp_path / "given", quiet=True)
    for made in ("merged", "given"):
        model, report = maker.from_pretrained(tmp_path / made / "model", output_loading_info=True)
        assert not any(report.values())
        model.generate(torch.tensor([[4, 5]]), max_new_tokens=2)
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path / made / "model").convert_tokens_to_ids
        for token, bias in biases["a"].items():
            own = biases["c"].get(token)
            if made == "merged":  # of a token that one expert has, both have its bias
                expected = bias if own is None else (bias + own) / 2
            else:
                expected = torch.stack([*biases["c"].values()]).mean() if own is None else own
            torch.testing.assert_close(model.final_logits_bias[0, ids(token)], expected)
