from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modicum.errors import ModicumError
from modicum.jobs import plan
from modicum.recipe import parse
from modicum.weights import Checkpoint
from modicum.weights.mergekit.vocabulary import TEMPLATES, with_vocabulary
from oracles.vocabulary import unified

TABLES = {"gpt_neox.embed_in.weight": (5,), "embed_out.weight": (5,), "lm_head.bias": ()}


def write(
    folder: Path,
    ids: Mapping[str, int],
    *,
    seed: int = 0,
    rows: int | None = None,
    added: Sequence[Mapping[str, Any]] = (),
    **files: str,
) -> Checkpoint:
    folder.mkdir()
    noise = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(rows or len(ids), *rest, generator=noise) for name, rest in TABLES.items()}
    save_file(tensors | {"gpt_neox.layers.0.mlp.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    tokenizer = {"model": {"type": "BPE", "vocab": dict(ids), "merges": []}, "added_tokens": list(added)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "vocab_size": len(ids)}))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return Checkpoint(folder)


vocabularies = st.lists(
    st.lists(st.sampled_from("abcdefg"), unique=True, min_size=1, max_size=5), min_size=2, max_size=4
)


@given(vocabularies, st.data())
@settings(max_examples=25, deadline=None)
def test_every_row_is_the_oracle_s(words: list[list[str]], data: st.DataObject) -> None:
    ids = {f"m{i}": {word: place for place, word in enumerate(each)} for i, each in enumerate(words)}
    source = data.draw(st.sampled_from(["union", "base", *ids]))
    chosen: dict[str, Any] = {}
    setting: dict[str, Any] = {}
    for token in data.draw(st.lists(st.sampled_from("abcxy"), unique=True, max_size=3)):
        donor, force = data.draw(st.sampled_from([None, *ids])), data.draw(st.booleans())
        row = data.draw(st.integers(0, len(ids[donor]) - 1)) if donor else 0
        chosen[token] = (donor, row, force)
        kind = {"kind": "model_token", "model": donor, "token_id": row} if donor else {"kind": "zero"}
        setting[token] = {"source": kind, "force": force}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: write(Path(folder) / name, ids[name], seed=i) for i, name in enumerate(ids)}
        document = {"tokenizer": {"source": source, "tokens": setting, "pad_to_multiple_of": 4}}
        found = with_vocabulary(document, models, "m0")
        owner = ids["m0" if source in ("union", "base") else source]
        more = sorted({word for each in words for word in each} - owner.keys()) if source == "union" else []
        tokens = [*owner, *more]
        tokens += [token for token in setting if token not in tokens]
        tokens += [f"padding {i}" for i in range(-len(tokens) % 4)]
        assert found.config == {"vocab_size": len(tokens)}
        for table in TABLES:
            plain = {name: model[table].double().numpy() for name, model in models.items()}
            for name, made in found.tables.items():
                expected = unified(tokens, plain, ids, "m0", name, chosen)
                assert made.spec(table).shape == expected.shape
                np.testing.assert_allclose(made[table].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_row_of_two_donors_is_their_mean_and_the_base_s_row_goes_before(tmp_path: Path) -> None:
    words = {"base": ["?", "both"], "a": ["?", "both", "new"], "b": ["new", "both"], "poor": ["?"]}
    ids = {name: {word: i for i, word in enumerate(each)} for name, each in words.items()}
    models = {name: write(tmp_path / name, ids[name], seed=i) for i, name in enumerate(words)}
    table = "embed_out.weight"
    made = with_vocabulary({"tokenizer_source": "union"}, models, "base").tables["poor"][table]
    torch.testing.assert_close(made[2], (models["a"][table][2] + models["b"][table][0]) / 2)
    torch.testing.assert_close(made[1], models["base"][table][1])


def test_a_tokenizer_may_know_more_tokens_than_the_tables_have_rows(tmp_path: Path) -> None:
    models = {
        "base": write(tmp_path / "base", {"?": 0, "x": 1, "beyond": 2}, rows=2),
        "a": write(tmp_path / "a", {"?": 0, "beyond": 1}, seed=1),
    }
    made = with_vocabulary({"tokenizer_source": "union"}, models, "base").tables["base"]["embed_out.weight"]
    torch.testing.assert_close(made[2], models["a"]["embed_out.weight"][1])


def test_added_tokens_keep_their_settings_and_no_older_vocabulary_stays(tmp_path: Path) -> None:
    token = {"id": 1, "content": "<new>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": True,
             "special": True}  # fmt: skip
    older = {"tokenizer__model": "old", "vocab__json": "{}", "merges__txt": "", "tokenizer_config__json": "{}"}
    models = {
        "base": write(tmp_path / "base", {"?": 0}, **older),
        "a": write(tmp_path / "a", {"?": 0}, rows=2, added=[token]),
    }
    found = with_vocabulary({"tokenizer_source": "union"}, models, "base")
    assert json.loads(found.files["tokenizer.json"])["added_tokens"] == [token]
    assert sorted(found.files) == ["tokenizer.json", "tokenizer_config.json"]
    assert {"tokenizer.model", "vocab.json", "merges.txt"} <= set(found.removed)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ({"source": "nobody"}, "names no token of a model"),
        ({"source": {"kind": "model_token", "model": "base", "token_id": 9}}, "base has 2 rows, so there is no row 9"),
        ("base", "expected {source: …}"),
    ],
)
def test_a_token_whose_row_is_nowhere_is_refused(tmp_path: Path, token: object, message: str) -> None:
    models = {"base": write(tmp_path / "base", {"?": 0, "x": 1})}
    with pytest.raises(ModicumError, match=message):
        with_vocabulary({"tokenizer": {"tokens": {"new": token}}}, models, "base")


@pytest.mark.timeout(60)
def test_a_union_takes_time_linear_in_its_tokens(tmp_path: Path) -> None:
    # Work that grows with the square of the added tokens takes minutes here.
    shared, own = {f"s{i}": i for i in range(1000)}, 50_000
    for name in "ab":
        write(tmp_path / name, shared | {f"{name}{i}": 1000 + i for i in range(own)})
    chosen = {f"new{i}": {"source": {"kind": "zero"}} for i in range(5_000)}
    document = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in "ab"],
        "tokenizer": {"source": "union", "tokens": chosen},
    }
    assert any(f"{1000 + 2 * own + len(chosen)} rows" in line for line in plan(parse(document)))


@pytest.mark.parametrize("template", sorted(TEMPLATES.iterdir(), key=str), ids=lambda path: path.name)
def test_templates_say_every_message_in_its_role(template: Any) -> None:
    import jinja2

    turns = [("system", "SYS"), ("user", "ASK"), ("assistant", "ANSWER"), ("user", "MORE")]
    messages = [{"role": role, "content": content} for role, content in turns]
    # As transformers renders chat templates.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    made = environment.from_string(template.read_text())
    text = made.render(messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    places = [text.index(content) for _, content in turns]
    assert places == sorted(places)
    if template.name == "mistral.jinja":
        assert text == "<s>[INST] SYS\n\nASK [/INST]ANSWER</s>[INST] MORE [/INST]"
        assert (
            made.render(messages=messages[1:3], bos_token="<s>", eos_token="</s>") == "<s>[INST] ASK [/INST]ANSWER</s>"
        )
