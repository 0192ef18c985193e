import re
import typing

import pytest
import yaml
from pydantic import ValidationError

from modicum import registry
from modicum.errors import RecipeError
from modicum.recipe import Section, dump, job_schema, override, parse, parse_yaml, read, sections, shipped


def test_yaml_reads_scientific_notation_as_a_number():
    assert parse_yaml("a: 1e-4\nb: 2E3\nc: -1.5e+2\nd: 1e4x\ne: 12") == {
        "a": 1e-4,
        "b": 2e3,
        "c": -150.0,
        "d": "1e4x",
        "e": 12,
    }


def test_yaml_refuses_a_key_that_stands_twice():
    with pytest.raises(RecipeError, match="r.yaml, line 3: key 'a' stands twice"):
        parse_yaml("a: 1\nb: 2\na: 3", "r.yaml")


def test_anchors_and_merge_keys_work():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_broken_yaml_is_one_line_with_its_place():
    with pytest.raises(RecipeError, match="r.yaml, line 2 is not valid YAML") as caught:
        parse_yaml("a: [1\nb: 2", "r.yaml")
    assert "\n" not in str(caught.value)


def test_yaml_builds_no_objects():
    with pytest.raises(RecipeError):
        parse_yaml("!!python/object/apply:os.system ['true']")


def test_override_sets_nested_values_and_list_items_by_name_or_position():
    data = {"stages": [{"name": "a", "seed": 1}, {"name": "b", "seed": 2}]}
    changed = override(data, ["stages.b.seed=5", "stages.0.seed=1e-1", "new.deep=[1, 2]"])
    assert [stage["seed"] for stage in changed["stages"]] == [0.1, 5]
    assert changed["new"] == {"deep": [1, 2]}
    assert data["stages"][1]["seed"] == 2


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("x", "expected key=value"),
        ("=1", "expected key=value"),
        ("stages.frist.seed=1", "no item 'frist' among 1. Did you mean 'first'?"),
        ("stages.1.seed=1", "no item '1' among 1. Known: first."),
        ("experts.2=c", "no item '2' among 2. Use a position from 0 to 1."),
        ("none.0=c", "no item '0' among 0. Set the whole list."),
        ("stages.first.seed.x=1", "expected a mapping"),
    ],
)
def test_a_wrong_override_says_so(assignment, told):
    with pytest.raises(RecipeError, match=f"--set .*{re.escape(told)}"):
        override({"stages": [{"name": "first", "seed": 1}], "experts": ["a", "b"], "none": []}, [assignment])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "'job' is missing. Set job to one of"),
        ({"jbo": "train"}, "'job' is missing. There is a key 'jbo'. Set job to one of"),
        ({"job": "trian"}, "There is no job 'trian'. Did you mean 'train'?"),
        ({"job": "pipeline", "stages": []}, "stages"),
        ({"job": "pipeline", "stagse": []}, "unknown key 'stagse'. Did you mean 'stages'?"),
        ({"job": "merge", "base": "b", "experts": ["e"], "method": {"name": "tise"}}, "Did you mean 'ties'?"),
        ({"job": "merge", "base": "b", "experts": ["e"], "method": {"name": "ties"}}, "'density' is missing"),
        (
            {"job": "merge", "base": "b", "experts": ["e"], "method": {"name": "ties", "density": 2}},
            "density: Input should be less than or equal to 1, got 2",
        ),
    ],
)
def test_a_wrong_recipe_says_what_came_and_what_to_do(data, message):
    with pytest.raises(RecipeError) as caught:
        parse(data)
    assert message in str(caught.value)


def test_every_line_about_a_method_says_where_it_belongs():
    data = {"job": "merge", "base": "a", "experts": ["b"], "method": {"name": "ties", "densty": 0.2}}
    with pytest.raises(RecipeError) as caught:
        parse(data, where="mine.yaml")
    assert str(caught.value).splitlines() == [
        "mine.yaml: method: merge method 'ties': 'density' is missing. Set it.",
        "mine.yaml: method: merge method 'ties': unknown key 'densty'. Did you mean 'density'?",
    ]


def test_a_missing_file_and_a_misspelt_recipe_are_told_apart():
    with pytest.raises(RecipeError, match="There is no file nowhere.yaml"):
        read("nowhere.yaml")
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        read("quickstrat")


TRAIN = {"job": "train", "model": "m", "data": {"path": "d"}}
ROUTE = {"job": "route", "base": "b", "experts": {"a": "one", "b": "two"}, "store": "sign"}


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ({"job": "merge", "base": "b", "experts": ["a"], "method": {"name": "resm", "bounds": None}}, "method.bounds"),
        (TRAIN | {"average": {"moving": {"decay": None}}}, "average.moving.decay"),
        (ROUTE | {"router": None}, "router"),
    ],
)
def test_nothing_in_the_place_of_a_default_survives_a_round_trip(data, place):
    parsed = parse(data)
    told = dump(parsed)
    assert parse(yaml.safe_load(yaml.safe_dump(told))) == parsed
    for part in place.split("."):
        told = told[part]
    assert told is None


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(name):
    written = dump(parse(read(name), name))
    assert dump(parse(written)) == written


@pytest.mark.parametrize(("text", "told"), [("", "empty"), ("a b", "a text"), ("- 1", "a list"), ("3", "one value, 3")])
def test_a_file_that_is_no_mapping_is_told_in_words(tmp_path, text, told):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=f"is {told}, expected a mapping that begins with"):
        read(str(tmp_path / "r.yaml"))


def sections_of(kind):
    for inner in typing.get_args(kind):
        yield from sections_of(inner)
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
        for field in kind.model_fields.values():
            yield from sections_of(field.annotation)


def validated(kind, value):
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        return [fault["msg"] for fault in error.errors()]


@pytest.mark.parametrize("name", registry.job)
def test_a_text_alone_stands_for_the_one_key_that_a_section_needs(name):
    for kind in {*sections_of(job_schema(name))} - {job_schema(name)}:
        needed = [key for key, field in kind.model_fields.items() if field.is_required()]
        assert kind.alone is not None or needed != ["path"], kind
        if kind.alone:
            assert validated(kind, "plain") == validated(kind, {kind.alone: "plain"})


def test_data_is_a_path_alone_wherever_it_is_asked_for():
    for recipe in (
        {"job": "statistics", "model": "m", "kind": "fisher", "data": "rows.jsonl"},
        {"job": "calibrate", "model": "m", "data": "rows.jsonl"},
        {"job": "average", "checkpoints": ["a", "b"], "method": "best", "data": "rows.jsonl"},
        {"job": "train", "model": "m", "data": {"mix": {"a": "rows.jsonl", "b": {"path": "other.jsonl"}}}},
    ):
        data = parse(recipe).data
        assert "rows.jsonl" in (data.mix.parts["a"].path if data.mix else data.path)


def test_what_acts_with_another_key_is_one_of_the_section_and_can_be_left_out():
    for name in registry.job:
        for section in (job_schema(name), *sections(job_schema(name))):
            for key, other in (*section.acts_with.items(), *section.acts_without.items()):
                assert not section.model_fields[key].is_required(), key
                assert section.model_fields[other].default is None, other


def test_a_key_set_in_vain_is_refused_and_a_resolved_recipe_is_not():
    data = {"job": "average", "checkpoints": ["a", "b"], "batch_size": 4}
    with pytest.raises(RecipeError, match="batch_size changes nothing where data is not given. Set data, or remove"):
        parse(data)
    assert dump(parse(dump(parse(data | {"data": "rows.jsonl"})))) == dump(parse(data | {"data": "rows.jsonl"}))
    left = dump(parse({"job": "average", "checkpoints": ["a", "b"]}))
    assert left["batch_size"] == 8 and dump(parse(left)) == left
