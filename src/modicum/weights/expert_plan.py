"""What will be stored of several experts, decided and checked before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from modicum import philox
from modicum.errors import CheckpointError, RecipeError, did_you_mean
from modicum.layout import Unit, natural, unit_of
from modicum.model_facts import check_centred
from modicum.random import derive_seed
from modicum.registry import expert_store
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import Tensors, check_agreement, label, refuse_packed, spec_of
from modicum.weights.files import Spec
from modicum.weights.mergekit.tokenizers import clashes
from modicum.weights.stores.base import Store

Dense: TypeAlias = Literal["average", "base"]
UNIFORM = 1e-6  # weights that differ by less are uniform


@dataclass(frozen=True)
class Experts:
    """What is known of the stored experts besides their numbers; ``config.json`` holds it.

    Attributes:
        names: Of the experts.
        routed: The routed layers.
        unit: What a layer is.
        dense: What the dense weights of routed layers are: the average of the experts, or the base.
        store: Name of the store.
        knobs: Its knobs.
        seed: Of what is drawn.
        generator: Version of the words that masks are drawn by.
    """

    names: Sequence[str]
    routed: Sequence[str]
    unit: Unit = "block"
    dense: Dense = "average"
    store: str = "random_rescaled"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    generator: int = philox.VERSION

    def __post_init__(self) -> None:
        if self.generator != philox.VERSION:
            raise CheckpointError(
                f"The experts' masks were drawn by version {self.generator} of the generator, this is version "
                f"{philox.VERSION}. Build the experts again."
            )

    def key(self, expert: int, name: str) -> int:
        """Return the key of what is drawn for one tensor of one expert."""
        return derive_seed(self.seed, "expert_store", expert, name)

    def store_of(self, expert: int, name: str, shape: Sequence[int], *, whole: bool) -> Store:
        """Return the store of one tensor of one expert, before anything is in it."""
        kind, knobs = ("whole", _values_of(self.knobs)) if whole else (self.store, dict(self.knobs))
        made: Store = expert_store[kind].function(shape, **knobs, key=self.key(expert, name))
        return made

    @property
    def even(self) -> list[float]:
        """Equal weights of all experts."""
        return [1 / len(self.names)] * len(self.names)

    def coefficients(self, weights: Sequence[float], *, centred: bool = False) -> list[float]:
        """Return the factor of every stored difference under these weights of the experts.

        Uniform weights mean the dense weights themselves where these are the average: a pruned difference is not zero
        on average over the experts, but noise.

        Raises:
            RecipeError: There is not one weight for each expert, one is negative or no number, or they do not sum to 1;
                or ``centred`` is not for such experts.
        """
        if centred:
            check_centred(self.dense, self.store, expert_store[self.store].facts)
        n, values = len(self.names), [float(w) for w in weights]
        if len(values) != n or not all(w >= 0 for w in values) or abs(sum(values) - 1) > 1e-3:
            raise RecipeError(f"weights are {values}, expected {n} that are not negative and sum to 1.")
        if self.dense == "average" and max(values) - min(values) < UNIFORM:
            return [0.0] * n
        return [w - 1 / n for w in values] if centred else values


def _values_of(knobs: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": "f32"} if knobs.get("values") == "f32" else {}


def part_name(expert: int, name: str, part: str) -> str:
    """Return what a part of a stored tensor is called in a file."""
    return f"{expert}.{name}.{part}"


def knobs_of(store: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the given knobs that a store has, checked; one that is ``None`` was not given."""
    entry = expert_store[store]
    known = entry.parameters[1]
    return entry.knobs({name: value for name, value in given.items() if name in known and value is not None})


def refuse_idle(store: str, **given: tuple[Any, Any]) -> None:
    """Refuse a knob that was given another value than its usual one, and that the store does not have."""
    known = expert_store[store].parameters[1]
    for name, (value, usual) in given.items():
        if value != usual and name not in known:
            raise RecipeError(f"store {store} has no {name}, and {name} is {value!r}. Leave it out.")


def describe(
    base: Tensors,
    experts: Sequence[Tensors],
    routed: Iterable[str],
    *,
    dense: Dense,
    store: str,
    knobs: Mapping[str, Any],
    unit: Unit,
    seed: int,
    names: Sequence[str] | None = None,
) -> Experts:
    """Check that the experts fit together and the routed layers exist; see :func:`build_experts`."""
    if len(experts) < 2:
        raise RecipeError(f"experts: got {len(experts)}, expected at least 2. A single expert needs no route: load it.")
    if dense not in ("average", "base"):
        raise RecipeError(f"dense {dense!r} is not known. {did_you_mean(str(dense), ('average', 'base'))}")
    called = list(names or (label(model, f"expert {t}") for t, model in enumerate(experts)))
    if len(called) != len(experts) or len(set(called)) < len(called):
        raise RecipeError(f"names are {called}, expected {len(experts)} different ones.")
    check_experts([base, *experts], ["base", *called])
    layers = {unit_of(name, unit) or name for name in base}
    chosen = sorted(routed, key=natural)
    for layer in chosen:
        if layer not in layers:
            raise RecipeError(f"routed names {layer!r}, no layer of the model. {did_you_mean(layer, layers)}")
    if expert_store[store].facts.factors:
        check_adapters(base, experts, called, dense)
    return Experts(called, chosen, unit, dense, store, dict(knobs), seed)


def check_experts(models: Sequence[Tensors], names: Sequence[str]) -> None:
    """Refuse experts that do not fit the base, which comes first, and packed numbers that have no signs to compare.

    Raises:
        CheckpointError: They differ in architecture, tensors, shapes, or in the token that a row is of.
        UnsupportedError: A model is quantised.
    """
    for model, name in zip(models, names):
        refuse_packed(model, name)
    check_agreement(models[0], models[1:], names=names)
    if told := clashes(dict(zip(names, models))):
        raise CheckpointError(
            f"{told[0]}. Train the experts with one vocabulary, or transplant their tokenizers first."
        )


def check_adapters(base: Tensors, experts: Sequence[Tensors], names: Sequence[str], dense: Dense) -> None:
    """Refuse to store the factors of what has none, or of another base, or against an average."""
    for model, name in zip(experts, names):
        if not isinstance(model, Checkpoint) or model.adapter is None:
            raise RecipeError(f"store lora keeps adapters' factors, and {name} is a whole model. Use sign.")
        if isinstance(base, Checkpoint) and model.base.folder.resolve() != base.folder.resolve():
            raise RecipeError(f"{name} is an adapter of {model.base.name}, not of {base.name}. Use sign.")
    if dense != "base":
        raise RecipeError("store lora needs dense: base, because an expert less the average has no thin factors.")


def method_of(average: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the merge method that ``average`` names, and its knobs."""
    if isinstance(average, str):
        return ("linear" if average == "uniform" else average), {}
    knobs = {key: value for key, value in average.items() if key != "name"}
    return str(average.get("name", "linear")), knobs


def plan_stores(base: Tensors, experts: Sequence[Tensors], about: Experts) -> dict[str, dict[int, Store]]:
    """Return the store of every tensor of the routed layers, for every expert that changes it.

    Norms and biases beside a matrix are stored whole: they are few, and pruning them costs much.
    """
    routed = set(about.routed)
    layers: dict[str, list[str]] = {}
    for name in sorted(base, key=natural):
        if (layer := unit_of(name, about.unit) or name) in routed and spec_of(base, name).dtype.is_floating_point:
            layers.setdefault(layer, []).append(name)
    found: dict[str, dict[int, Store]] = {}
    factors = expert_store[about.store].facts.factors
    for members in layers.values():
        shapes = {name: spec_of(base, name).shape for name in members}
        matrices = any(len(shape) > 1 for shape in shapes.values())
        for name, shape in shapes.items():
            for t, model in enumerate(experts):
                store = (
                    _factors_of(model, about, t, name, shape)
                    if factors
                    else about.store_of(t, name, shape, whole=matrices and len(shape) < 2)
                )
                if store is not None:
                    found.setdefault(name, {})[t] = store
    return found


def _factors_of(model: Tensors, about: Experts, t: int, name: str, shape: Sequence[int]) -> Store | None:
    """Return the store of what an adapter does to a tensor; ``None`` where it does nothing."""
    adapter = model.adapter if isinstance(model, Checkpoint) else None
    if adapter is None or not (name in adapter.factors or name in adapter.replaced):
        return None
    if name in adapter.replaced or not adapter.factors[name].plain:
        return about.store_of(t, name, shape, whole=True)
    change = adapter.factors[name]
    a, b = (change.B.T, change.A.T) if change.transposed else (change.A, change.B)
    store: Any = about.store_of(t, name, shape, whole=False)
    made: Store = store.with_factors(a, b, change.scale)
    return made


def specs_of(stores: Mapping[str, Mapping[int, Store]]) -> dict[str, Spec]:
    """Return shape and dtype of every part of every store, by the part's name in a file."""
    return {
        part_name(t, name, part): spec
        for name, of_expert in stores.items()
        for t, store in of_expert.items()
        for part, spec in store.specs.items()
    }


def bytes_by_layer(stores: Mapping[str, Mapping[int, Store]], about: Experts) -> dict[str, int]:
    """Return the bytes that each routed layer of all experts takes."""
    found: dict[str, int] = {}
    for name, of_expert in stores.items():
        layer = unit_of(name, about.unit) or name
        found[layer] = found.get(layer, 0) + sum(store.nbytes for store in of_expert.values())
    return found
