"""Ordinary rows: tokenised as generation does, their end learned, and bad ones told or left out."""

import json
import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.jobs.data.rows import DataSection, load_rows, tokenize
from modicum.jobs.data.tokens import encode, messages_of, prompt_ids
from modicum.recipe import parse
from modicum.record import read_record
from modicum.types import IGNORED
from support import byte_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Prompts that end in a line feed, a space, a word and a special token.
TEMPLATES = {
    "line feed": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "space": "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "word": "{% for m in messages %}{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}",
    "special": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}",
}


def joining_tokenizer(template=None, *, eos="<|im_end|>"):
    """Return a tokenizer that joins pairs of letters, line feeds and spaces into one token wherever they meet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, line = "Ġ", "Ċ"
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [(a, b) for a in (space, line, *letters) for b in (space, line, *letters)]
    words = [*SPECIAL, *alphabet, *(a + b for a, b in pairs)]
    inner = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def rows_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


TEXT = st.text(alphabet="ab \n", max_size=6)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), None])
@given(prompt=TEXT, answer=TEXT)
def test_an_answer_goes_on_from_the_tokens_that_generation_begins_with(template, prompt, answer):
    tokenizer = joining_tokenizer(template)
    row = {"prompt": prompt, "completion": answer}
    ids, labels = encode(row, tokenizer, completion_only=True)
    start = prompt_ids(row, tokenizer)
    learned = [label for label in labels if label != IGNORED]
    assert ids[: len(start)] == start and set(labels[: len(start)]) <= {IGNORED}
    assert tokenizer.decode(learned) == answer + "<|im_end|>" and learned[-1] == tokenizer.eos_token_id
    assert encode(row, tokenizer, completion_only=False) == (ids, labels[:0] + ids)


@pytest.mark.parametrize("template", TEMPLATES.values())
@given(words=st.lists(TEXT, min_size=2, max_size=6))
def test_every_turn_of_a_chat_is_learned_and_nothing_else(template, words):
    tokenizer = joining_tokenizer(template)
    chat = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
    ids, labels = encode({"messages": chat}, tokenizer, completion_only=True)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == "".join(m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant")
    first = prompt_ids({"prompt": words[0]}, tokenizer)
    assert ids[: len(first)] == first


def test_rows_without_a_joined_token_are_tokenised_as_a_whole():
    tokenizer = joining_tokenizer(TEMPLATES["line feed"])
    row = {"prompt": "ab", "completion": "Ba"}
    whole = tokenizer.apply_chat_template([*messages_of(row), {"role": "assistant", "content": "Ba"}], tokenize=False)
    assert encode(row, tokenizer, completion_only=True)[0] == tokenizer(whole)["input_ids"]


def test_a_template_that_takes_no_beginning_of_a_chat_is_fine_where_all_is_learned():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length < 2 %}{{ raise_exception('two') }}{% endif %}x{{ messages[-1].content }}"
    )
    row = {"prompt": "a", "completion": "b"}
    assert encode(row, tokenizer, completion_only=False)[0]
    with pytest.raises(CheckpointError, match="not how the whole conversation begins"):
        encode(row, tokenizer, completion_only=True)


def sentencepiece_like(template):
    """Return a tokenizer that puts a space before a text's first word, and joins it to a letter."""
    alphabet = ["▁", *"ab\n"]
    merges = [("▁", "a"), ("▁", "b"), ("\n", "\n")]
    words = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


def test_sentencepiece_puts_no_space_before_an_answer():
    turns = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    for end, answer, learned in (
        ("", "b", ["b", "<|im_end|>"]),  # not '▁b': the whole text has none there
        ("\n", "\nb", ["\n", "b", "<|im_end|>"]),
    ):
        template = turns.replace("<|im_end|>", f"<|im_end|>{end}")
        tokenizer = sentencepiece_like(template)
        ids, labels = encode({"prompt": "a", "completion": answer}, tokenizer, completion_only=True)
        told = tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORED])
        assert told == learned and tokenizer.convert_ids_to_tokens(ids)[0] == "▁a"


def test_a_single_turn_whose_prompt_is_not_its_beginning_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(CheckpointError, match="not how the whole conversation begins"):
        encode({"prompt": "a", "completion": "b"}, tokenizer, completion_only=True)


# The end of an answer


@pytest.mark.parametrize(
    ("end", "eos", "said"),
    [
        ("<|im_end|>\n", "<|im_end|>", "answers end with '<|im_end|>', which is learned.$"),
        ("<|im_end|>\n", "<|endoftext|>", "end with '<|im_end|>', which is learned. .* eos_token is '<|endoftext|>'"),
        ("\n", "<|im_end|>", "nothing ends an answer .* does not learn to stop"),
        (" end", "<|im_end|>", "nothing ends an answer"),
        ("{% if m.role == 'user' %}<|im_end|>{% endif %}", "<|im_end|>", "nothing ends an answer"),
    ],
)
@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a_data_set_says_once_what_ends_its_answers(tmp_path, end, eos, said, completion_only, packing):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = joining_tokenizer(template, eos=eos)
    path = rows_file(tmp_path, [{"prompt": "a", "completion": "b"}] * 5)
    section = DataSection(path=path, completion_only=completion_only, packing=packing)
    notes = []
    data = tokenize(load_rows(section), tokenizer, section, note=notes.append)
    (note,) = [note for note in notes if "end" in note]
    assert re.search(re.sub(r"\|", r"\\|", said), note), note
    if not completion_only:
        return
    learned = {label for labels in data["labels"] for label in labels}
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>") in learned
    assert ends == ("which is learned" in note)


def test_rows_that_do_not_end_are_counted(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% if m.content == 'b' %}<|im_end|>{% endif %}{% endfor %}"
    path = rows_file(tmp_path, [{"prompt": "a", "completion": text} for text in "bbc"])
    section, notes = DataSection(path=path), []
    tokenize(load_rows(section), joining_tokenizer(template), section, note=notes.append)
    assert "in 1 of 3 rows nothing does" in notes[0]


# Bad rows

GOOD = {"prompt": "a", "completion": "b"}
BAD = {
    "broken": '{"prompt": "a", ',
    "no object": "[1]",
    "missing field": {"prompt": "a"},
    "other kind": {"text": "a"},
    "null": {"prompt": "a", "completion": None},
    "number": {"prompt": 1, "completion": "b"},
    "half a character": '{"prompt": "a", "completion": "\\ud83d"}',
    "too deep": "[" * 100_000,
}


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_row_ends_the_run_or_is_left_out(tmp_path, bad, where):
    rows = [GOOD, GOOD]
    rows.insert(where, bad)
    path = rows_file(tmp_path, rows)
    with pytest.raises((CheckpointError, RecipeError), match="^[^\n]*$"):
        load_rows(DataSection(path=path))
    notes = []
    section = DataSection(path=path, on_bad_row="skip")
    assert load_rows(section, note=notes.append).rows == [GOOD, GOOD]
    assert len(notes) == 1 and "1 of 3 rows were left out (on_bad_row: skip): " in notes[0] and "\n" not in notes[0]
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        load_rows(section)


def test_without_skipping_the_first_row_tells_the_kind(tmp_path):
    path = rows_file(tmp_path, [{"text": "a"}, GOOD, GOOD])
    with pytest.raises(RecipeError, match="row 1: field 'text' is missing"):
        load_rows(DataSection(path=path))
    assert load_rows(DataSection(path=path, on_bad_row="skip"), note=print).kind == "completion"


def test_good_rows_say_nothing_and_bad_ones_alone_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rows(DataSection(path=rows_file(tmp_path, [GOOD]), on_bad_row="skip"))
    for bad in (bad for name, bad in BAD.items() if name != "other kind"):
        with pytest.raises(ModicumError):
            load_rows(DataSection(path=rows_file(tmp_path, [bad]), on_bad_row="skip"))


def test_rows_that_the_template_refuses_are_left_out_too(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}" + (
        tokenizer.chat_template
    )
    rows = [GOOD, *({"prompt": "x", "completion": "b"} for _ in range(5)), GOOD]
    path, notes = rows_file(tmp_path, rows), []
    section = DataSection(path=path)
    with pytest.raises(CheckpointError, match=r"no x.*on_bad_row: skip leaves such rows out"):
        tokenize(load_rows(section), tokenizer, section)
    section = DataSection(path=path, on_bad_row="skip")
    assert len(tokenize(load_rows(section), tokenizer, section, note=notes.append)) == 2
    assert "5 of 7 rows were left out" in notes[0] and notes[0].count("no x") == 3 and notes[0].endswith("| …")


@pytest.fixture
def recipe(tiny_model):
    def make(path, **data):
        trainer = {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "use_cpu": True}
        fields = {"path": path, "max_length": 64, **data}
        return parse({"job": "train", "model": str(tiny_model), "data": fields, "trainer": trainer})

    return make


def test_check_tells_what_the_run_records(tmp_path, recipe):
    rows = [GOOD, BAD["missing field"], *[{"prompt": "a", "completion": "\n b"}] * 3]
    made = recipe(rows_file(tmp_path, rows), on_bad_row="skip")
    lines = "\n".join(plan(made))
    execute(made, tmp_path / "run", quiet=True)
    notes = read_record(tmp_path / "run")["notes"]
    for said in ("1 of 5 rows were left out", "answers end with '<|im_end|>'"):
        assert said in lines and sum(said in note for note in notes) == 1


@pytest.mark.parametrize("count", [3, 200])
def test_check_refuses_rows_that_the_run_would_refuse(tmp_path, recipe, count):
    chat = {"messages": [{"role": "user", "content": "no answer"}]}
    with pytest.raises(CheckpointError, match="no message of the assistant"):
        plan(recipe(rows_file(tmp_path, [chat] * count)))
    with pytest.raises(CheckpointError, match="Raise it"):
        plan(recipe(rows_file(tmp_path, [GOOD | {"prompt": "a" * 90}] * count)))


def test_check_accepts_rows_of_which_the_sample_alone_is_too_long(tmp_path, recipe):
    rows = [GOOD | {"prompt": "a" * (90 if index % 3 == 0 else 1)} for index in range(192)]
    assert plan(recipe(rows_file(tmp_path, rows)))
