from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import CheckpointError, MissingExtraError, RecipeError
from modicum.jobs.data.rows import DataSection, Rows, load_rows, tokenize
from modicum.jobs.data.tokens import encode, prompt_ids
from modicum.jobs.loading.models import load_tokenizer
from modicum.types import IGNORED
from support import byte_tokenizer

TASK = "reasoning-gym:chain_sum"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def spoken(ids, labels, tokenizer):
    return tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label != IGNORED])


# Sources


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"text": "a"}, "text", {"text": "a"}),
        ({"prompt": "a", "completion": "b", "x": 1}, "completion", {"prompt": "a", "completion": "b"}),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_the_kind_of_rows_shows_in_their_fields(tmp_path, row, kind, expected):
    rows = load_rows(DataSection(path=write(tmp_path / "a.jsonl", [row])))
    assert (rows.kind, rows.rows) == (kind, [expected])


def test_json_jsonl_and_parquet_hold_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    data = [{"text": f"line\u2028{i}"} for i in range(5)]
    write(tmp_path / "a.jsonl", data)
    write(tmp_path / "lines.json", data)
    (tmp_path / "a.json").write_text(json.dumps(data))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "a.parquet")
    for name in ("a.jsonl", "lines.json", "a.json", "a.parquet"):
        assert load_rows(DataSection(path=str(tmp_path / name))).rows == data


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert load_rows(DataSection(path=str(tmp_path / "a.txt"))).rows == [{"text": "one\n\ntwo"}]


@pytest.mark.parametrize("layout", ["{split}.jsonl", "{split}-00000-of-00001.jsonl", "data/{split}/part.jsonl"])
def test_a_folder_keeps_its_splits_apart_and_its_readme_out(tmp_path, layout):
    for split in ("train", "test"):
        file = tmp_path / layout.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, [{"text": split}])
    (tmp_path / "README.md").write_text("about")
    for split in ("train", "test"):
        assert load_rows(DataSection(path=str(tmp_path), split=split)).rows == [{"text": split}]
    with pytest.raises(CheckpointError, match="has the splits test, train, got 'dev'"):
        load_rows(DataSection(path=str(tmp_path), split="dev"))


@pytest.mark.parametrize("splits", [True, False])
def test_what_datasets_saved_to_disk_is_read_back(tmp_path, splits):
    import datasets

    data = datasets.Dataset.from_list([{"text": str(i)} for i in range(6)])
    (datasets.DatasetDict({"test": data}) if splits else data).save_to_disk(str(tmp_path / "saved"))
    section = DataSection(path=str(tmp_path / "saved"), split="test" if splits else "train", size=2)
    assert load_rows(section).rows == [{"text": "0"}, {"text": "1"}]


def test_users_may_name_their_own_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "reply": "r"}])
    section = DataSection(path=path, fields={"prompt": "question", "completion": "reply"}, template="Q: {prompt}\nA:")
    assert load_rows(section).rows == [{"prompt": "Q: q\nA:", "completion": "r"}]


def test_size_takes_the_first_rows_and_shuffle_others_by_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(50)])
    assert [row["text"] for row in load_rows(DataSection(path=path, size=3)).rows] == ["0", "1", "2"]
    section = DataSection(path=path, size=20, shuffle=True)
    assert load_rows(section, seed=1).rows == load_rows(section, seed=1).rows != load_rows(section, seed=2).rows
    assert load_rows(section.model_copy(update={"seed": 1}), seed=2).rows == load_rows(section, seed=1).rows
    everything = load_rows(section.model_copy(update={"size": None})).rows
    assert sorted(int(row["text"]) for row in everything) == list(range(50))


def test_a_task_is_the_same_for_the_same_seed_and_held_out_by_split():
    section = DataSection(path=TASK, size=40)
    train, again, other = (load_rows(section, seed=s).rows for s in (0, 0, 1))
    test = load_rows(section.model_copy(update={"split": "test"})).rows
    assert train == again
    for rows in (other, test):
        assert len({row["prompt"] for row in rows} & {row["prompt"] for row in train}) < 5


@pytest.mark.parametrize("size", [1, 500])
def test_train_and_test_draw_from_disjoint_seeds(monkeypatch, size):
    import reasoning_gym

    real, drawn = reasoning_gym.create_dataset, []

    def create(name, *, seed, **knobs):
        drawn.append(seed)
        return real(name, seed=seed, **knobs)

    monkeypatch.setattr(reasoning_gym, "create_dataset", create)
    for split in ("train", "test"):
        load_rows(DataSection(path=TASK, split=split, size=size), seed=7)
    train, test = drawn
    assert 0 <= train <= 2**31 - size < 2**31 <= test <= 2**32 - size


def test_a_task_scores_answers_by_its_own_rules():
    rows = load_rows(DataSection(path=TASK, size=3))
    assert rows.score is not None
    assert rows.score(1, rows.rows[1]["completion"]) == 1.0
    assert rows.score(1, "nonsense") < 1.0


def test_task_knobs_are_passed_and_wrong_ones_refused():
    rows = load_rows(DataSection(path=TASK, size=5, config={"min_terms": 2, "max_terms": 2})).rows
    assert all(row["prompt"].count("+") + row["prompt"].count(" - ") == 1 for row in rows)
    with pytest.raises(RecipeError, match="min_term"):
        load_rows(DataSection(path=TASK, config={"min_term": 2}))
    with pytest.raises(RecipeError, match="is refused"):
        load_rows(DataSection(path=TASK, config={"min_terms": 9, "max_terms": 2}))


def test_the_standard_library_is_text_split_by_file():
    train, test = (load_rows(DataSection(path="builtin:python-stdlib", split=s)) for s in ("train", "test"))
    assert train.kind == "text"
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.2
    assert not {row["text"] for row in train.rows} & {row["text"] for row in test.rows}
    assert load_rows(DataSection(path="builtin:python-stdlib", split="test")) == test


def test_a_hub_id_goes_through_load_dataset(monkeypatch):
    import datasets

    def load(path, **options):
        assert (path, options) == ("me/data", {"split": "test", "name": "main"})
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_rows(DataSection(path="me/data", split="test", config={"name": "main"}))) == 2


def test_data_that_lies_elsewhere_is_told_apart_by_its_version(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    assert list(DataSection(path=path).inputs()) == [path]
    (package,) = DataSection(path=TASK).inputs()
    assert package.startswith("reasoning-gym==")
    assert list(DataSection(path="me/data").inputs()) == ["dataset:me/data"]
    assert list(DataSection(path="me/data", config={"revision": "v1"}).inputs()) == ["dataset:me/data@v1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no rows"),
        ('{"text": "a"}\n{oops', "line 2 is not valid JSON"),
        ("[1, 2]", "line 1 is list, expected an object"),
        ('{"body": "a"}', "rows have the fields body; expected "),
        ('{"text": "a"}\n{"text": null}', "row 1: field 'text' is NoneType, expected text"),
        ('{"text": "a"}\n{"other": "b"}', "row 1: field 'text' is missing (it has other)"),
        ('{"messages": [{"role": "user"}]}', "expected a list of {role: …, content: …}"),
        ('{"messages": []}', "expected a list of {role: …, content: …}"),
    ],
)
def test_bad_rows_are_one_clear_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises((CheckpointError, RecipeError), match="^[^\n]*$") as error:
        load_rows(DataSection(path=str(tmp_path / "a.jsonl")))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", "There is no data file or folder nowhere.jsonl"),
        ("./nowhere", "There is no data file or folder"),
        ("nobody/nothing-here", "the Hub gave no such data"),
        ("nobody/nothing-here", "Check the path, or the Hub's name, the split and the network."),
        ("reasoning-gym:chain_sun", "no reasoning-gym task 'chain_sun'. Did you mean 'chain_sum'?"),
        ("builtin:python-stdlb", "Did you mean 'python-stdlib'?"),
    ],
)
def test_missing_data_is_one_clear_line(path, message):
    with pytest.raises(CheckpointError, match="^[^\n]*$") as error:
        load_rows(DataSection(path=path))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"nothing", "is not a sound Parquet file"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.csv", b"a,b", "has the suffix '.csv', expected .jsonl"),
        ("a.json", b"[1]", "holds no list of objects"),
    ],
)
def test_unreadable_files_are_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="^[^\n]*$") as error:
        load_rows(DataSection(path=str(tmp_path / name)))
    assert message in str(error.value)


def test_splits_that_a_source_does_not_have_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}])
    for section in (DataSection(path=path, split="test"), DataSection(path="builtin:python-stdlib", split="dev")):
        with pytest.raises(CheckpointError, match="split"):
            load_rows(section)


def test_without_reasoning_gym_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'modicum\[demo\]'"):
        load_rows(DataSection(path=TASK))


def test_a_template_without_a_place_for_the_prompt_is_refused():
    with pytest.raises(ValueError, match="holds {prompt}"):
        DataSection(path="x", template="Q:")


@pytest.mark.parametrize("key", ["template", "system"])
def test_what_stands_in_every_row_is_no_book(key):
    # A template of a million prompts was gigabytes of text, and minutes.
    with pytest.raises(ValueError, match="at most 100000 characters"):
        DataSection(path="x", **{key: "{prompt}" * 10**6})


# Labels

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def test_only_what_the_assistant_says_is_learned(tokenizer):
    ids, labels = encode({"messages": CHAT}, tokenizer, completion_only=True)
    assert spoken(ids, labels, tokenizer) == "hello<|im_end|>ciao<|im_end|>"
    ids, labels = encode({"messages": CHAT}, tokenizer, completion_only=False)
    assert ids == labels


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=10))
def test_a_completion_is_learned_after_the_very_prompt_it_is_generated_from(prompt, completion, system):
    for tokenizer in (byte_tokenizer(chat=True), byte_tokenizer(chat=False)):
        row = {"prompt": prompt, "completion": completion}
        row |= {"system": system} if tokenizer.chat_template else {}
        if not tokenizer.chat_template and not prompt:
            continue
        ids, labels = encode(row, tokenizer, completion_only=True)
        start = prompt_ids(row, tokenizer)
        assert ids[: len(start)] == start
        assert labels[: len(start)] == [IGNORED] * len(start)
        assert spoken(ids, labels, tokenizer) == completion + "<|im_end|>"


def test_the_real_tokenizer_masks_the_prompt_too():
    real = load_tokenizer("builtin:smollm2-135m-instruct")
    ids, labels = encode({"prompt": "2 + 2 =", "completion": "4"}, real, completion_only=True)
    assert spoken(ids, labels, real) == "4<|im_end|>"
    assert ids[: len(prompt_ids({"prompt": "2 + 2 ="}, real))] == prompt_ids({"prompt": "2 + 2 ="}, real)


def test_a_chat_needs_a_chat_template():
    with pytest.raises(CheckpointError, match="row 0 is a chat, but the tokenizer has no chat template"):
        encode({"messages": CHAT}, byte_tokenizer(chat=False), completion_only=True, where="row 0")


def test_a_template_whose_prompt_is_not_how_the_chat_begins_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(CheckpointError, match="not how the whole conversation begins"):
        encode({"messages": CHAT}, tokenizer, completion_only=True)
    assert encode({"messages": CHAT}, tokenizer, completion_only=False)


def test_a_template_that_refuses_the_roles_says_which():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system please') }}"
    with pytest.raises(CheckpointError, match=r"of user, assistant.*no system please"):
        encode({"messages": CHAT[:2]}, tokenizer, completion_only=True)


def test_a_chat_in_which_the_assistant_is_silent_teaches_nothing(tokenizer):
    with pytest.raises(CheckpointError, match="no message of the assistant"):
        encode({"messages": CHAT[:1]}, tokenizer, completion_only=True)


# Data sets and batches


def make(kind, rows, tokenizer, note=None, **knobs):
    return tokenize(Rows(kind, rows), tokenizer, DataSection(path="x", **knobs), note=note)
