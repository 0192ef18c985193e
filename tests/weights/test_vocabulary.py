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
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.weights import Checkpoint
from modicum.weights.mergekit.tokenizers import TEMPLATES
from modicum.weights.mergekit.vocabulary import with_vocabulary
from oracles.vocabulary import unified
from support import tiny_llama
from weights.families import write_tokenizer

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
        tokens: list[str | None] = [*owner]
        for each in [*(words if source == "union" else []), list(setting)]:  # models in order, then what is asked for
            tokens += [word for word in each if word not in tokens]
        tokens += [None] * (-len(tokens) % 4)
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


def test_a_model_listed_twice_is_two_models_of_a_union(tmp_path: Path) -> None:
    words = {"base": ["?", "a", "b"], "other": ["?", "b", "c", "a"]}
    ids = {name: {word: i for i, word in enumerate(each)} for name, each in words.items()}
    models = {name: write(tmp_path / name, ids[name], seed=i) for i, name in enumerate(words)}
    paths = {name: str(tmp_path / name) for name in words}
    document = {"job": "merge", "base": paths["base"], "experts": [paths["base"], paths["other"], paths["other"]],
                "method": "linear", "tokenizer": "union"}  # fmt: skip
    execute(parse(document), tmp_path / "run", quiet=True)
    base, other = (models[name]["embed_out.weight"] for name in words)
    made = Checkpoint(tmp_path / "run/model")["embed_out.weight"]
    torch.testing.assert_close(made[1], (base[1] + 2 * other[3]) / 3)
    torch.testing.assert_close(made[3], other[2])  # a token that the base lacks


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


def words(folder: Path, tokens: Sequence[str], seed: int = 0, **config: Any) -> Path:
    """Write a Llama with a tokenizer of whole words; the configuration's ids are those of its own tokens."""
    tiny_llama(seed=seed, vocab_size=len(tokens), tie_word_embeddings=False, **config).save_pretrained(folder)
    write_tokenizer(folder, tokens)
    return folder


def test_settings_go_by_the_vocabulary_of_the_result(tmp_path: Path) -> None:
    ours = words(tmp_path / "a", ["<pad>", "<s>", "</s>", "<unk>", "a", "b"], pad_token_id=0, bos_token_id=1)
    (ours / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "max_length": 7}))
    words(tmp_path / "c", ["b", "</s>", "<pad>", "<unk>", "a"], seed=1)
    models = [{"model": str(ours), "parameters": {"weight": 1.0}}]
    document = {"merge_method": "linear", "models": models, "tokenizer_source": str(tmp_path / "c")}
    execute(parse(document), tmp_path / "run", quiet=True)
    folder = tmp_path / "run/model"
    config, generation = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (5, 1, 2)
    assert generation == {"eos_token_id": [1, 0], "max_length": 7}
    assert any(
        "bos_token_id name tokens that the vocabulary lacks" in line for line in plan(parse(document))
    )  # c has no <s>
    assert Checkpoint(folder)["lm_head.weight"].shape[0] == 5


@pytest.mark.parametrize("setting", ["union", {"source": "union", "pad_to_multiple_of": 8}])
def test_a_recipe_of_our_own_brings_vocabularies_together(tmp_path: Path, setting: Any) -> None:
    folders = [words(tmp_path / "a", ["<unk>", "a", "b"]), words(tmp_path / "b", ["<unk>", "b", "c", "a"], seed=1)]
    recipe = {"job": "merge", "experts": [str(f) for f in folders], "method": {"name": "linear"}, "dtype": "float32"}
    with pytest.raises(ModicumError, match="Set tokenizer: union to bring their tokens together"):
        plan(parse(recipe))
    execute(parse(recipe | {"tokenizer": setting}), tmp_path / "run", quiet=True)
    made, a, b = (Checkpoint(f)["model.embed_tokens.weight"] for f in (tmp_path / "run/model", *folders))
    expected = torch.stack([(a[0] + b[0]) / 2, (a[1] + b[3]) / 2, (a[2] + b[1]) / 2, b[2]])
    torch.testing.assert_close(made[:4], expected)
    if setting != "union":
        torch.testing.assert_close(made[4:], expected.mean(0).repeat(4, 1))
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["vocab_size"] == len(made)
    for wrong, told in (({"output": "lora"}, "no vocabulary of its own"), ({"tokenizer": {"sauce": 1}}, "unknown key")):
        with pytest.raises(ModicumError, match=told):
            plan(parse(recipe | {"tokenizer": "union"} | wrong))


def test_an_older_tokenizer_is_converted(tmp_path: Path) -> None:
    import transformers

    for seed, (name, tokens) in enumerate({"a": ["[UNK]", "x", "y"], "b": ["[UNK]", "y", "z"]}.items()):
        tiny_llama(seed=seed, vocab_size=3).save_pretrained(tmp_path / name)
        (tmp_path / name / "vocab.txt").write_text("\n".join(tokens) + "\n")
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    experts = [str(tmp_path / name) for name in "ab"]
    recipe = {"job": "merge", "experts": experts, "method": {"name": "linear"}, "tokenizer": "union"}
    execute(parse(recipe), tmp_path / "run", quiet=True)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ids = made.convert_tokens_to_ids(["x", "y", "z"])
    table, a, b = (Checkpoint(f)["model.embed_tokens.weight"] for f in (tmp_path / "run/model", *experts))
    for row, expected in zip(ids, [a[1], (a[2] + b[1]) / 2, b[2]]):
        torch.testing.assert_close(table[row], expected)
    assert not (tmp_path / "run/model/vocab.txt").exists()
    (tmp_path / "b/vocab.txt").rename(tmp_path / "b/spiece.model")
    with pytest.raises(ModicumError, match=r"its tokenizer has no tokenizer.json, and transformers makes none"):
        plan(parse(recipe))
    (tmp_path / "b/spiece.model").unlink()
    assert any("has no tokenizer: its rows are taken for those of" in line for line in plan(parse(recipe)))


@pytest.mark.parametrize("kept", ["one", "several", "file"])
def test_the_commonest_chat_template_is_found_wherever_it_is_kept(tmp_path: Path, kept: str) -> None:
    template = "{{ messages }} of a"
    for seed, name in enumerate("ab"):
        words(tmp_path / name, ["<unk>", "a"], seed=seed)
        file = tmp_path / name / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"chat_template": "{{ messages }} of b"}
        if name == "a" and kept == "file":
            (tmp_path / name / "chat_template.jinja").write_text(template)
        elif name == "a":
            several = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
            settings["chat_template"] = template if kept == "one" else several
        file.write_text(json.dumps(settings))
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in "ab"]
    execute(parse({"merge_method": "linear", "models": models, "chat_template": "auto"}), tmp_path / "run", quiet=True)
    assert (tmp_path / "run/model/chat_template.jinja").read_text() == template
    assert "chat_template" not in json.loads((tmp_path / "run/model/tokenizer_config.json").read_text())
