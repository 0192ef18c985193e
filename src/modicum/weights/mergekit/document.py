"""mergekit configurations, read as they are: which tensors meet, with which knobs, under which names.

A document is turned into the steps that our own merges are made of. Parameters may stand on a source, a slice, a module
or the document; they may be numbers, gradients over depth, or filtered by tensor name. What we do otherwise than
mergekit on purpose is said in the plan's notes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from modicum.errors import RecipeError, UnsupportedError, did_you_mean
from modicum.registry import merge_method
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec
from modicum.weights.mergekit.methods import METHODS, Getter, Made, method_of, parameters_of
from modicum.weights.mergekit.vocabulary import Vocabulary, with_vocabulary
from modicum.weights.plan import Plan, Source, Step, check_count, companion_files, parse_dtype

Opener = Callable[[str, str | None], Checkpoint]
LAYER = re.compile(r"^(?P<stem>.*?\b(?:layers|layer|h|blocks|block))\.(?P<index>\d+)\.(?P<rest>.+)$")
BEFORE = re.compile(r"(embed|wte|wpe|word_embeddings)")  # of the tensors outside the layers, those that come first
KEYS = {
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer", "tokenizer_source", "chat_template", "name",
}  # fmt: skip
Data = Mapping[str, Any]


@dataclass(frozen=True)
class Reference:
    """A model, perhaps with an adapter on it: ``model[@revision][+adapter[@revision]]``."""

    model: str
    adapter: str | None = None

    @classmethod
    def parse(cls, value: object, where: str) -> Reference:
        """Read the short form, or a mapping of ``model`` and ``lora``."""
        if isinstance(value, str) and value:
            model, _, adapter = value.partition("+")
            return cls(model, adapter or None)
        if isinstance(value, Mapping) and "model" in value:
            lora = value.get("lora")
            return cls(_path(value["model"], where), _path(lora, where) if lora else None)
        raise RecipeError(f"{where}: expected a model, got {value!r}. Write a path or a Hub id.")

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}" if self.adapter else self.model


def _path(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    raise RecipeError(f"{where}: expected a model's path, got {value!r}.")


@dataclass(frozen=True)
class Part:
    """One model in one slice: its layers, and the parameters written on it."""

    reference: Reference
    layers: tuple[int, int] | None
    parameters: Data


@dataclass(frozen=True)
class Slice:
    """Parts that are merged with each other, and parameters that hold for all of them, innermost first."""

    parts: tuple[Part, ...]
    base: Reference | None
    scopes: tuple[Data, ...]


def models_of(document: Data) -> list[str]:
    """Return every model and adapter that a document names, in order."""
    found: list[str] = []
    for piece in read_slices(document):
        for reference in [*(part.reference for part in piece.parts), *([piece.base] if piece.base else [])]:
            found += [reference.model, *([reference.adapter] if reference.adapter else [])]
    return list(dict.fromkeys(found))


def read_slices(document: Data) -> list[Slice]:
    """Return the slices of a document; a list of models is one slice of all layers.

    Raises:
        RecipeError: The document is malformed.
    """
    _check_keys(document, KEYS, "mergekit file")
    method = document.get("merge_method")
    if method not in METHODS and method not in merge_method:
        raise RecipeError(
            f"There is no merge method {method!r}. {did_you_mean(str(method), [*METHODS, *merge_method])}"
        )
    present = [key for key in ("models", "slices", "modules") if document.get(key)]
    if len(present) != 1:
        raise RecipeError(f"A mergekit file needs exactly one of models, slices and modules; got {present or 'none'}.")
    scopes: tuple[Data, ...] = (document.get("parameters") or {},)
    body = document
    if present == ["modules"]:
        modules = document["modules"]
        if len(modules) != 1:
            raise UnsupportedError(f"The file merges {len(modules)} modules; only models of one module are supported.")
        (body,) = modules.values()
        _check_keys(body, {"models", "slices", "parameters"}, "module")
        scopes = (body.get("parameters") or {}, *scopes)
    base = Reference.parse(document["base_model"], "base_model") if document.get("base_model") else None
    if body.get("models"):
        parts = tuple(_part(model, f"models[{i}]", ranged=False) for i, model in enumerate(body["models"]))
        return [Slice(parts, base, scopes)]
    return [_slice(piece, f"slices[{i}]", base, scopes) for i, piece in enumerate(body["slices"])]


def _slice(piece: Data, where: str, base: Reference | None, scopes: tuple[Data, ...]) -> Slice:
    _check_keys(piece, {"sources", "base_model", "parameters"}, where)
    parts = tuple(
        _part(part, f"{where}.sources[{i}]", ranged=True) for i, part in enumerate(piece.get("sources") or [])
    )
    lengths = {part.layers[1] - part.layers[0] for part in parts if part.layers}
    if len(lengths) != 1:
        raise RecipeError(f"{where}: its sources have layer ranges of lengths {sorted(lengths)}, expected one length.")
    if piece.get("base_model"):
        base = Reference.parse(piece["base_model"], f"{where}.base_model")
    return Slice(parts, base, (piece.get("parameters") or {}, *scopes))


def _part(value: Data, where: str, *, ranged: bool) -> Part:
    _check_keys(value, {"model", "layer_range", "parameters"} if ranged else {"model", "parameters"}, where)
    layers = value.get("layer_range")
    if ranged and not _is_range(layers):
        raise RecipeError(f"{where}: layer_range is {layers!r}, expected [first, end] with first < end.")
    reference = Reference.parse(value.get("model"), f"{where}.model")
    return Part(reference, (layers[0], layers[1]) if layers else None, value.get("parameters") or {})


def _is_range(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    first, end = value
    return isinstance(first, int) and isinstance(end, int) and 0 <= first < end


def _check_keys(value: object, known: set[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected a mapping, got {value!r}.")
    for key in value:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), known)}")


def evaluate(setting: object, tensor: str, t: float, where: str) -> object:
    """Return what a parameter is for a tensor at depth ``t``, or ``None`` when its filters do not speak of it.

    Args:
        setting: A value, a gradient (list of numbers over depth), or a list of ``{filter, value}``, first hit wins.
        tensor: Name of the tensor; a filter is a part of it.
        t: Depth within the slice, from 0 to 1.
        where: For messages.

    Example:
        >>> evaluate([0.0, 0.5, 1.0], "x", 0.25, "weight")
        0.25
        >>> evaluate([{"filter": "mlp", "value": 1}, {"value": 2}], "layers.0.self_attn.q_proj.weight", 0, "weight")
        2
    """
    if not isinstance(setting, list):
        return setting
    if not setting:
        raise RecipeError(f"{where}: the list is empty. Give a value, a gradient of values, or filters.")
    if isinstance(setting[0], Mapping):
        for choice in setting:
            _check_keys(choice, {"filter", "value"}, where)
            wanted = choice.get("filter")
            if wanted in (None, "*") or str(wanted) in tensor:
                return evaluate(choice.get("value"), tensor, t, where)
        return None
    if not all(isinstance(value, int | float) for value in setting):
        raise RecipeError(f"{where}: a gradient is a list of numbers, got {setting!r}.")
    position = t * (len(setting) - 1)
    index = min(int(position), max(0, len(setting) - 2))
    if len(setting) == 1:
        return setting[0]
    share = position - index
    return setting[index] * (1 - share) + setting[index + 1] * share


@dataclass(frozen=True)
class _Lookup:
    """The parameters of one tensor of a slice; remembers which names were asked for."""

    piece: Slice
    tensor: str
    t: float

    def shared(self, name: str, default: object) -> Any:
        """Return a parameter of the whole merge."""
        return self._first(name, self.piece.scopes, default)

    def each(self, name: str, parts: Sequence[Part], default: object) -> list[Any]:
        """Return a parameter of each model."""
        values = [self._first(name, (part.parameters, *self.piece.scopes), default) for part in parts]
        for part, value in zip(parts, values):
            if value is REQUIRED:
                raise RecipeError(f"{part.reference}: parameter {name!r} is missing for {self.tensor}. Set it.")
        return values

    def _first(self, name: str, scopes: Sequence[Data], default: object) -> object:
        for scope in scopes:
            if name in scope:
                value = evaluate(scope[name], self.tensor, self.t, f"parameter {name!r}")
                if value is not None:
                    return value
        return default


REQUIRED = object()


def plan_mergekit(document: Data, open_model: Opener) -> Plan:
    """Return the plan of a mergekit document.

    Args:
        document: The parsed file.
        open_model: Opens a model, folding an adapter into it when one is given.

    Raises:
        RecipeError: The document is malformed.
        CheckpointError: The models do not fit together.
    """
    slices = read_slices(document)
    opened: dict[Reference, Checkpoint] = {}
    for piece in slices:
        for reference in [*([piece.base] if piece.base else []), *(part.reference for part in piece.parts)]:
            if reference not in opened:
                opened[reference] = open_model(reference.model, reference.adapter)
    dtype = parse_dtype(document.get("out_dtype") or document.get("dtype"))
    first = slices[0].base or slices[0].parts[0].reference
    named = {str(reference): checkpoint for reference, checkpoint in opened.items()}
    vocabulary = with_vocabulary(document, named, str(first))
    tables = {reference: vocabulary.tables.get(str(reference), opened[reference]) for reference in opened}
    steps, depth = _steps(document, slices, tables)
    steps = [replace(step, spec=Spec(step.spec.shape, dtype)) if dtype and step.spec.dtype.is_floating_point else step
             for step in steps]  # fmt: skip
    changes: dict[str, Any] = dict(vocabulary.config)
    if any(part.layers for piece in slices for part in piece.parts):
        changes["num_hidden_layers"] = depth
    companions = companion_files(opened[first], dtype, **changes)
    companions = {name: text for name, text in companions.items() if name not in vocabulary.removed}
    companions |= vocabulary.files
    return Plan(steps, list(opened.values()), companions, _notes(document, slices, steps) + vocabulary.notes)


def _steps(
    document: Data, slices: Sequence[Slice], tables: Mapping[Reference, Checkpoint | Vocabulary]
) -> tuple[list[Step], int]:
    """Return the steps, and how many layers the result has."""
    make = method_of(str(document["merge_method"]))
    steps: list[Step] = []
    depth = 0
    for position, piece in enumerate(slices):
        references = [part.reference for part in piece.parts]
        reference = tables[piece.base or references[0]]
        ranges = {part.reference: part.layers for part in piece.parts}
        own = ranges.get(piece.base or references[0]) or (0, _depth(reference))
        length = own[1] - own[0]
        for part in piece.parts:
            if part.layers and part.layers[1] > _depth(tables[part.reference]):
                have = _depth(tables[part.reference])
                raise RecipeError(f"{part.reference} has {have} layers, layer_range asks for {list(part.layers)}.")
        for name in reference:
            match = LAYER.match(name)
            if match:
                offset = int(match["index"]) - own[0]
                if not 0 <= offset < length:
                    continue
                t = offset / (length - 1) if length > 1 else 1.0
                out = f"{match['stem']}.{depth + offset}.{match['rest']}"
            else:
                if position != (0 if BEFORE.search(name) else len(slices) - 1):
                    continue
                offset, out, t = None, name, 0.0 if BEFORE.search(name) else 1.0

            begins = {part.reference: (part.layers or own)[0] for part in piece.parts}
            locate = partial(_locate, tables=tables, begins=begins, default=own[0], name=name, offset=offset)
            steps.append(_step(make, piece, out, name, t, locate))
        depth += length
    return steps, depth


def _depth(tensors: Checkpoint | Vocabulary) -> int:
    return max((int(match["index"]) + 1 for name in tensors if (match := LAYER.match(name))), default=0)


def _locate(
    who: Reference,
    *,
    tables: Mapping[Reference, Checkpoint | Vocabulary],
    begins: Mapping[Reference, int],
    default: int,
    name: str,
    offset: int | None,
) -> Source:
    """Return a model's tensor that takes part in the step for ``name``: in layers, the one as deep in its own range."""
    match = LAYER.match(name)
    if match and offset is not None:
        name = f"{match['stem']}.{begins.get(who, default) + offset}.{match['rest']}"
    if name not in tables[who]:
        holder = next((str(other) for other, table in tables.items() if name in table), "another model")
        raise RecipeError(f"{who} has no tensor {name!r} ({holder} has it). Merge models of one architecture.")
    return Source(str(who), tables[who], name)


def _step(
    make: Callable[[Getter], Made],
    piece: Slice,
    out: str,
    name: str,
    t: float,
    locate: Callable[[Reference], Source],
) -> Step:
    experts = [part for part in piece.parts if part.reference != piece.base]
    lookup = _Lookup(piece, name, t)
    getter = Getter(
        shared=lookup.shared,
        each=lambda key, default=REQUIRED, everyone=False: lookup.each(
            key, piece.parts if everyone else experts, default
        ),
    )
    method, knobs, based = make(getter)
    if based is None:
        based = piece.base is not None
    if based and piece.base is None:
        raise RecipeError(f"{method} merges differences from a base model. Set base_model.")
    used = experts if based else list(piece.parts)
    base = locate(piece.base) if based and piece.base else None
    sources = tuple(locate(part.reference) for part in used)
    check_count(merge_method[method], len(sources))
    all_sources = [*([base] if base else []), *sources]
    specs = [spec_of_source(source) for source in all_sources]
    for source, spec in zip(all_sources[1:], specs[1:]):
        if spec.shape != specs[0].shape:
            vocabulary = BEFORE.search(name) or "lm_head" in name
            hint = "Set tokenizer: {source: union}." if vocabulary else "Merge models of one size."
            raise RecipeError(
                f"{source.model}: tensor {source.name!r} has shape {list(spec.shape)}, "
                f"expected {list(specs[0].shape)} as in {all_sources[0].model}. {hint}"
            )
    checked = merge_method[method].knobs(knobs)
    return Step(out, specs[0], method, base, sources, checked)


def spec_of_source(source: Source) -> Spec:
    """Return shape and dtype of a source's tensor."""
    tensors: Any = source.tensors
    spec: Spec = tensors.spec(source.name)
    return spec


def _notes(document: Data, slices: Sequence[Slice], steps: Sequence[Step]) -> list[str]:
    """Say where the numbers differ from mergekit's on purpose, and what is easily overlooked."""
    notes = []
    name = str(document["merge_method"])
    if document.get("dtype") in ("bfloat16", "float16") or not document.get("dtype"):
        notes.append("arithmetic is in float32 with one cast at the end, where mergekit computes in the given dtype")
    sparse = [step for step in steps if "density" in step.knobs]
    if sparse and all(_all_kept(step.knobs["density"]) for step in sparse):
        notes.append(f"density is 1 (mergekit's default), so {name} drops nothing and adds the deltas")
    if any(step.method in ("dare", "della") and not _all_kept(step.knobs["density"]) for step in sparse):
        notes.append("random masks come from the seed and the tensors' names: other entries than mergekit drops")
    if any(r.adapter for piece in slices for r in (piece.base, *(part.reference for part in piece.parts)) if r):
        notes.append("adapters are folded in while reading, in float32, where mergekit first writes a rounded model")
    if any("gamma" in step.knobs for step in sparse):
        notes.append("breadcrumbs keeps its share of small tensors too, which older mergekit set to zero")
    if any(_has_gradient(scope) for piece in slices for scope in (*piece.scopes, *(p.parameters for p in piece.parts))):
        notes.append("gradients: the final norm and lm_head get the last value, where mergekit gives them the first")
    scopes = [scope for piece in slices for scope in (*piece.scopes, *(part.parameters for part in piece.parts))]
    unread = {key for scope in scopes for key in scope} - parameters_of(name)
    if "int8_mask" in unread:
        notes.append("int8_mask only saves memory in mergekit and has no effect here")
    if others := sorted(unread - {"int8_mask"}):
        notes.append(f"{name} does not read {', '.join(map(repr, others))} under parameters: no effect")
    return notes


def _all_kept(density: object) -> bool:
    return all(value == 1 for value in (density if isinstance(density, list) else [density]))


def _has_gradient(scope: Data) -> bool:
    def gradient(value: object) -> bool:
        if not isinstance(value, list) or not value:
            return False
        if isinstance(value[0], Mapping):
            return any(gradient(choice.get("value")) for choice in value)
        return len(value) > 1

    return any(gradient(value) for value in scope.values())
