"""A new source or kind of rows is one file: everything below registers a toy and edits nothing else."""

import json
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import RecipeError
from modicum.jobs.data.rows import DataSection, Rows, load_rows, tokenize
from modicum.jobs.data.tokens import dataset, text_of
from modicum.registry import row_kind, source
from support import byte_tokenizer, with_own_entries


@pytest.fixture
def pair(monkeypatch):
    """Rows with two answers to one prompt."""
    with_own_entries(monkeypatch, row_kind)

    def pairs(rows, tokenizer, section, note):
        examples = [(ids, ids) for row in rows.rows for ids in tokenizer([row["left"], row["right"]]).input_ids]
        return dataset(examples, section, note)

    @row_kind("pair", fields=("prompt", "left", "right"), order=5, tokenize=pairs)
    def read(section, row, index):
        return {field: text_of(section, row, field, index) for field in ("prompt", "left", "right")}


@pytest.fixture
def counting(monkeypatch):
    with_own_entries(monkeypatch, source)

    @source("counting", inputs=lambda section, name: ["a-file"])
    def count(section, name, *, until: int = 3, seed: int):
        return [{"text": f"{name} {seed + i}"} for i in range(until)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_kind_of_rows_tells_its_fields_and_its_tokens(pair, tmp_path):
    row = {"question": "p", "left": "good", "right": "bad", "completion": "x"}
    section = DataSection(path=write(tmp_path / "a.jsonl", row), fields={"prompt": "question"})
    rows = load_rows(section)
    assert (rows.kind, rows.rows) == ("pair", [{"prompt": "p", "left": "good", "right": "bad"}])
    assert len(tokenize(rows, byte_tokenizer(), section)) == 2
    assert DataSection(path="x", format="pair").format == "pair"
    renamed = DataSection(path=write(tmp_path / "b.jsonl", {"prompt": "p", "better": "a", "worse": "b"}),
                          fields={"left": "better", "right": "worse"})  # fmt: skip
    assert load_rows(renamed).rows[0]["right"] == "b"
    # What a section says of fields is unchanged by new kinds: the hashes of older runs stay.
    assert set(DataSection(path="x").model_dump()["fields"]) == {"text", "messages", "prompt", "completion"}
    with pytest.raises(RecipeError, match="expected 'prompt' and 'left' and 'right', "):
        load_rows(DataSection(path=write(tmp_path / "c.jsonl", {"x": "y"})))


def test_a_source_has_knobs_a_seed_and_inputs(counting):
    section = DataSection(path="counting:row", config={"until": 2}, seed=4)
    assert load_rows(section).rows == [{"text": "row 4"}, {"text": "row 5"}]
    assert list(section.inputs()) == ["a-file"]
    shuffled = load_rows(DataSection(path="counting:row", config={"until": 50}, shuffle=True, size=10)).rows
    assert len(shuffled) == 10 and shuffled != sorted(shuffled, key=str)
    with pytest.raises(RecipeError, match="^counting:row: config: data source 'counting': unknown key 'untill'. Did"):
        load_rows(DataSection(path="counting:row", config={"untill": 2}))


def test_a_source_that_makes_rows_is_taken_as_it_is(counting):
    @source("ready")
    def ready(section, name):
        return Rows("text", [{"text": "b"}, {"text": "a"}], normalization="squad")

    rows = load_rows(DataSection(path="ready:", size=1, shuffle=True))
    assert len(rows) == 2 and rows.normalization == "squad"


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_system_message_of_the_section_comes_first_unless_a_chat_has_its_own(tmp_path, kind):
    said, own = {"role": "user", "content": "hi"}, {"role": "system", "content": "Mine."}
    given = [{"messages": [said]}, {"messages": [own, said]}]
    if kind == "completion":
        given = [{"prompt": "hi", "completion": "ho"}]
    rows = load_rows(DataSection(path=write(tmp_path / "a.jsonl", *given), system="Be kind.")).rows
    if kind == "completion":
        assert rows == [{"system": "Be kind.", "prompt": "hi", "completion": "ho"}]
    else:
        assert rows == [{"messages": [{"role": "system", "content": "Be kind."}, said]}, {"messages": [own, said]}]


def test_a_mixture_of_sources_is_a_source_too(counting, tmp_path):
    @source(
        "blend", inputs=lambda section, _: (i for part in section.config["parts"] for i in DataSection(**part).inputs())
    )
    def mix(section, name, *, parts: list[dict], seed: int):
        read = [load_rows(DataSection(**part), seed=seed) for part in parts]
        return Rows("text", [row for rows in read for row in rows.rows][: section.size])

    section = DataSection(path="blend:", config={"parts": [{"path": "counting:a"}, {"path": "counting:b"}]}, size=5)
    assert [row["text"] for row in load_rows(section, seed=1).rows] == ["a 1", "a 2", "a 3", "b 1", "b 2"]
    assert list(section.inputs()) == ["a-file", "a-file"]


@pytest.mark.parametrize("table", [source, row_kind], ids=lambda table: table.kind)
def test_every_entry_is_found_by_its_name_alone(table):
    assert {*table} >= {"text", "chat", "completion"} or {*table} >= {"file", "hub", "builtin", "task", "reasoning-gym"}
    assert all(table[name].name == name for name in table)


def test_names_that_no_table_has_are_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="^builtn:x: there is no data source 'builtn'. Did you mean 'builtin'?"):
        load_rows(DataSection(path="builtn:x"))
    with pytest.raises(ValueError, match="'chats' is no kind of rows. Did you mean 'chat'?"):
        DataSection(path="x", format="chats")
    with pytest.raises(ValueError, match="unknown field 'promt'. Did you mean 'prompt'?"):
        DataSection(path="x", fields={"promt": "q"})


@given(
    row=st.dictionaries(st.sampled_from(["text", "messages", "prompt", "completion", "id"]), st.just("x"), min_size=1)
)
def test_a_row_is_of_the_first_kind_whose_fields_it_has(row):
    from modicum.jobs.data.rows import _kind

    order = MappingProxyType({"chat": {"messages"}, "completion": {"prompt", "completion"}, "text": {"text"}})
    expected = next((kind for kind, fields in order.items() if fields <= row.keys()), None)
    if expected is None:
        with pytest.raises(RecipeError, match="Name yours"):
            _kind(DataSection(path="x"), [row])
    else:
        assert _kind(DataSection(path="x"), [row]).name == expected
