import sys
from dataclasses import MISSING, dataclass, fields
from types import MappingProxyType
from typing import Annotated, ClassVar, TypedDict, Unpack, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Le
from beartype.door import is_bearable

from modicum import registry
from modicum.errors import RecipeError
from modicum.facts import Facts
from modicum.knobs import documentation, fields_of, known, parameters, unpacked
from modicum.registry import Entry, Registry
from modicum.types import Fraction, PositiveInt


@dataclass(frozen=True, kw_only=True)
class ThingFacts(Facts):
    known_laws = MappingProxyType({"scale": "it scales"})

    scope: str = "tensor"


def table():
    return Registry("things", "thing", "package_that_does_not_exist", ThingFacts)


def test_keyword_only_parameters_are_the_schema():
    things = table()

    @things("shrink", paper="arXiv:1", laws={"scale"}, scope="element")
    def shrink(delta: list[float], *, density: Fraction, scale: float = 1.0, rng: object = None) -> list[float]:
        return delta

    entry = things["shrink"]
    assert list(entry.schema.model_fields) == ["density", "scale"]
    assert entry.knobs({"density": "0.5"}) == {"density": 0.5, "scale": 1.0}
    assert entry.facts.scope == "element" and entry.paper == "arXiv:1"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"density": 0.0}, "density: Input should be greater than 0, got 0.0."),
        ({"density": 1.5}, "density: Input should be less than or equal to 1, got 1.5."),
        ({}, "'density' is missing. Set it."),
        ({"density": 0.5, "scal": 2}, "unknown key 'scal'. Did you mean 'scale'?"),
        ({"density": 0.5, "rng": 2}, "unknown key 'rng'."),
    ],
)
def test_wrong_knobs_are_one_clear_line(knobs, message):
    things = table()

    @things("shrink")
    def shrink(delta: list[float], *, density: Fraction, scale: float = 1.0, rng: object = None) -> list[float]:
        return delta

    with pytest.raises(RecipeError) as caught:
        things["shrink"].knobs(knobs)
    assert str(caught.value).startswith(f"thing 'shrink': {message}")
    assert "\n" not in str(caught.value)


def test_all_errors_are_reported_together():
    things = table()

    @things("f")
    def f(x: int, *, a: int, b: Annotated[int, Ge(0), Le(3)] = 1) -> int:
        return x

    with pytest.raises(RecipeError) as caught:
        things["f"].knobs({"b": 9, "c": 1})
    assert len(str(caught.value).splitlines()) == 3


def test_everything_after_a_class_s_first_parameter_is_a_knob():
    things = table()

    @things("Opt")
    class Opt:
        def __init__(self, params: list[int], lr: float, eps: float = 1e-3, *, rank: int = 2) -> None: ...

    assert things["Opt"].knobs({"lr": 0.1}) == {"lr": 0.1, "eps": 1e-3, "rank": 2}


@pytest.mark.parametrize("table", registry.REGISTRIES.values(), ids=lambda table: table.kind)
@pytest.mark.parametrize("wrong", [{"bsae": False}, {"matrx": True}, {"laws": {"permuttation"}}])
def test_a_misspelt_fact_or_law_fails_where_it_is_stated(table: Registry, wrong):
    required = {f.name: None for f in fields(table.facts) if f.default is MISSING and f.default_factory is MISSING}
    with pytest.raises(TypeError, match=next(iter(wrong.get("laws", wrong)))):
        table("misspelt", **required, **wrong)
    assert "misspelt" not in table


@pytest.mark.parametrize("entry", [e for t in registry.REGISTRIES.values() for e in t.values()], ids=lambda e: e.name)
def test_facts_have_the_types_that_their_table_declares(entry: Entry):
    for name, hint in get_type_hints(type(entry.facts)).items():
        if get_origin(hint) is not ClassVar:
            assert is_bearable(getattr(entry.facts, name), hint), f"{entry.name}: {name}"


def test_an_unannotated_knob_is_refused():
    things = table()

    @things("f")
    def f(x, *, knob=1):
        return x

    with pytest.raises(TypeError, match="knob 'knob' needs"):
        _ = things["f"].schema


def test_two_methods_of_one_name_are_refused():
    things = table()
    things("f")(len)
    with pytest.raises(TypeError, match="registered twice"):
        things("f")(max)


def test_a_misspelt_name_is_answered_with_the_closest():
    things = table()
    things("linear")(len)
    with pytest.raises(RecipeError, match="There is no thing 'liner'. Did you mean 'linear'?"):
        _ = things["liner"]


def test_a_new_file_in_the_package_is_all_that_a_method_needs(tmp_path, monkeypatch):
    package = tmp_path / "thing_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "first.py").write_text(
        "from test_registry import LIVE\n@LIVE('first')\ndef first(x, *, a: int = 1): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    assert list(LIVE) == ["first"]


LIVE = Registry("live", "live thing", "thing_package")


@pytest.mark.parametrize("entry", [e for t in registry.REGISTRIES.values() for e in t.values()], ids=lambda e: e.name)
def test_every_registered_method_is_annotated_and_described(entry: Entry):
    if entry.noun != registry.job.noun:
        assert entry.schema.model_fields.keys() == entry.parameters[1].keys()
    assert entry.summary.endswith(".")


@pytest.mark.parametrize("table", registry.REGISTRIES.values(), ids=lambda table: table.kind)
def test_what_the_sources_say_is_what_importing_them_registers(table: Registry):
    assert table.summaries() == {name: entry.summary for name, entry in table.items()}


def test_facts_keep_supplied_parameters_out_of_the_knobs_and_add_those_of_gathering():
    @dataclass(frozen=True)
    class Sample:
        batches: PositiveInt = 8

    things = table()

    @things("edge", supplied={"rank"}, gather=Sample)
    def edge(weight: list[float], *, rank: int, scale: float = 1.0) -> list[float]:
        return [scale * rank * w for w in weight]

    assert things["edge"].knobs({"batches": 2}) == {"scale": 1.0, "batches": 2}
    with pytest.raises(RecipeError, match="unknown key 'rank'"):
        things["edge"].knobs({"rank": 4})
    with pytest.raises(RecipeError, match="batches"):
        things["edge"].knobs({"batches": 0})


@dataclass(frozen=True)
class Common:
    """What things share.

    Attributes:
        step: How far,
            see :func:`~there.walk`.
        seed: Seed of all draws.
        hidden: No knob.
    """

    step: float
    seed: int = 7
    hidden: str = ""


WALK = """Walk.

Args:
    x: From here.
    scale: Of the step.
    seed: Seed of all draws.
    step: How far,
        see :func:`~there.walk`.

Returns:
    What was given."""


@fields_of(Common)
class Seeded(TypedDict, total=False):
    seed: PositiveInt


@fields_of(Common)
class Stepped(Seeded, total=False):
    step: Fraction


def test_unpacked_knobs_are_knobs_with_the_types_of_the_keys_and_the_defaults_of_the_fields():
    things = table()

    @things("walk")
    def walk(x: float, *, scale: float = 1.0, **shared: Unpack[Stepped]) -> Common:
        """Walk.

        Args:
            x: From here.
            scale: Of the step.
            **shared: Fields
                of Common.

        Returns:
            What was given.
        """
        return Common(**known(walk, shared))

    entry = things["walk"]
    assert entry.knobs({"step": 0.5}) == {"scale": 1.0, "seed": 7, "step": 0.5}
    for wrong, message in (
        ({"step": 0.5, "seed": 0}, "seed: Input should be greater than 0, got 0."),
        ({}, "'step' is missing. Set it."),
        ({"step": 0.5, "sed": 1}, "unknown key 'sed'. Did you mean 'seed'?"),
        ({"step": 0.5, "hidden": "x"}, "unknown key 'hidden'."),
    ):
        with pytest.raises(RecipeError) as caught:
            entry.knobs(wrong)
        assert str(caught.value).startswith(f"thing 'walk': {message}")
    assert documentation(walk) == WALK
    with pytest.raises(TypeError, match=r"walk\(\) got an unexpected keyword argument 'hidden'"):
        walk(1.0, step=0.5, hidden="x")


def test_unpacked_keys_without_a_field_behind_them_are_refused():
    things = table()

    @fields_of(Common)
    class Strange(TypedDict, total=False):
        colour: str

    class Loose(TypedDict, total=False):
        colour: str

    for keys, message in ((Strange, "Common has no field colour"), (Loose, "without defaults: mark it")):

        @things("paint")
        def paint(x: int, **shared: Unpack[keys]) -> None: ...

        with pytest.raises(TypeError, match=message):
            _ = things["paint"].schema


UNPACKING = [e for t in registry.REGISTRIES.values() for e in t.values() if unpacked(e.function)]


@pytest.mark.parametrize("entry", UNPACKING, ids=lambda e: e.name)
def test_a_misspelt_keyword_is_refused_with_the_closest_wherever_keywords_are_unpacked(entry: Entry):
    data, knobs = entry.parameters
    required = {k: 1.0 for k, p in knobs.items() if p.default is p.empty}
    seam = {k: p for k, p in parameters(entry.function).items() if k in entry.facts.supplied}
    required |= {k: None for k, p in seam.items() if p.default is p.empty}
    for knob in knobs:
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{knob}_'\. Did you mean '{knob}'\?"):
            entry.function(*data, **required, **{f"{knob}_": None})
