import pytest

from modicum.recipe import job_schema, sections
from modicum.registry import REGISTRIES, job
from modicum.schema import Noun, fields, in_yaml
from modicum.shown import PLACES, fitted, show_entry


@pytest.mark.parametrize("width", ["60", "80", "200"])
@pytest.mark.parametrize(
    ("kind", "name"), [("merge_methods", "ties"), ("zeroth_order", "lozo"), ("measures", "choice")]
)
def test_every_knob_is_explained_once_at_every_width(monkeypatch, capsys, kind, name, width):
    monkeypatch.setenv("COLUMNS", width)
    entry = REGISTRIES[kind][name]
    show_entry(entry, kind)
    shown, _, rest = capsys.readouterr().out.partition("Returns:")
    assert not [knob for knob in entry.schema.model_fields if f"    {knob}:" in shown]
    words = " ".join(shown.split())
    if name == "ties":
        assert "Share of entries that each expert keeps, by magnitude" in words and "required" in words
        assert "base: The tensor that the experts were trained from." in words
        assert "the key method of the job merge" in words
    # A line may be longer than the terminal only where it is a formula or an example.
    assert all(len(line) <= int(width) or line.startswith("    ") for line in (shown + rest).splitlines())


def test_defaults_are_written_as_a_recipe_would(capsys):
    told = {name: default for name, _, default, _ in fields(REGISTRIES["merge_methods"]["ties"].schema)}
    assert told == {
        "density": "required", "scale": "1.0", "weights": "null", "normalize": "true", "trim_scope": "tensor"
    }  # fmt: skip


def test_every_default_reads_back_as_itself():
    from modicum.documents import parse_yaml

    for table in REGISTRIES.values():
        for entry in table.values():
            for name, field in entry.schema.model_fields.items():
                if field.is_required() or entry.noun == job.noun:
                    continue
                default = field.get_default(call_default_factory=True)
                wanted = list(default) if isinstance(default, tuple) else default
                assert parse_yaml(in_yaml(default)) == wanted, f"{entry.name}: {name}"


def test_sections_and_methods_are_written_as_in_a_recipe():
    suites = job_schema("attack").model_fields["suites"].get_default(call_default_factory=True)
    assert in_yaml(suites) == "{plain: {attack: plain}}"


def nouns_in(field):
    left, found = [*field.metadata, field.annotation], set()
    for part in left:  # which grows
        found |= {part.word} if isinstance(part, Noun) else set()
        left += [*getattr(part, "__metadata__", ()), *getattr(part, "__args__", ())]
    return found


@pytest.mark.parametrize("kind", PLACES)
def test_the_places_of_methods_are_those_of_the_schemas(kind):
    stated = [(task, key) for task, key in PLACES[kind].items()]
    found = {}
    for name in job:
        schema = job_schema(name)
        for section, places in [(schema, [""]), *sections(schema).items()]:
            for key, field in section.model_fields.items():
                if REGISTRIES[kind].noun in nouns_in(field):
                    found.setdefault(name, set()).update(f"{place}.{key}".lstrip(".") for place in places)
    if kind != "measures":  # whose key is a name that the recipe chooses
        assert found.keys() == PLACES[kind].keys()
    assert all(key in found[task] for task, key in stated if kind != "measures")


def test_formulas_and_examples_keep_their_lines():
    text = "Words that go\non.\n\n    a = b\n    c = d\n\nArgs:\n    x: One\n        thing.\n    y: Other.\n"
    text += "\nExample:\n    >>> 1 + 1\n    2\n"
    assert list(fitted(text, 40)) == [
        "Words that go on.", "", "    a = b", "    c = d", "", "Args:", "    x: One thing.", "    y: Other.", "",
        "Example:", "    >>> 1 + 1", "    2", "",
    ]  # fmt: skip
