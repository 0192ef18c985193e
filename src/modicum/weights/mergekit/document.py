"""mergekit files as data: their models, slices and parameters, read as they are.

Parameters may stand on a source, a slice, a module or the document; they may be numbers, gradients over depth, or
filtered by tensor name. :mod:`.planning` turns what stands here into the steps of a merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from modicum.errors import RecipeError, did_you_mean
from modicum.layout import also_called
from modicum.registry import merge_method
from modicum.weights.mergekit.methods import METHODS

KEYS = {
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer", "tokenizer_source", "chat_template", "name",
}  # fmt: skip
MODULE_KEYS = {"models", "slices", "parameters"}
MODEL_KEYS = {"model", "parameters"}
SLICE_KEYS = {"sources", "base_model", "parameters"}
SOURCE_KEYS = {"model", "layer_range", "parameters"}
ALIKE = 0.7  # how much an unknown key looks like one that is read, from 0 to 1, to be taken for a slip
CARD_KEYS = {"license", "tags", "language", "library_name", "pipeline_tag"}  # of model cards, which people copy here
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
    module: str | None = None  # what the file calls the module that it is part of

    @property
    def references(self) -> list[Reference]:
        """The base, when there is one, and the models of the parts."""
        return [*([self.base] if self.base else []), *(part.reference for part in self.parts)]

    @property
    def base_part(self) -> Part | None:
        """The base as a part: the first part of its model, else its layers of the range that all parts have.

        ``None`` where there is no base, or its layers are not known because the ranges of the parts differ.
        """
        own = next((part for part in self.parts if part.reference == self.base), None)
        ranges = {part.layers for part in self.parts}
        return Part(self.base, ranges.pop(), {}) if own is None and self.base and len(ranges) == 1 else own


def models_of(document: Data) -> list[str]:
    """Return every model and adapter that a document names, in order, and whose tokenizer the result gets."""
    found: list[Reference] = []
    for piece in read_slices(document):
        found += [*(part.reference for part in piece.parts), *([piece.base] if piece.base else [])]
    found += tokenizer_of(document)
    return list(dict.fromkeys(name for each in found for name in (each.model, each.adapter) if name))


def tokenizer_of(document: Data) -> list[Reference]:
    """Return the model whose tokenizer a document's settings name; none where it is that of its models.

    Example:
        >>> tokenizer_of({"tokenizer": {"source": "x"}}), tokenizer_of({"tokenizer_source": "union"})
        ([Reference(model='x', adapter=None)], [])
    """
    setting = document.get("tokenizer") or document.get("tokenizer_source")
    source = setting.get("source") if isinstance(setting, Mapping) else setting
    return [] if source in (None, "", "union", "base") else [Reference.parse(source, "tokenizer.source")]


def read_slices(document: Data) -> list[Slice]:
    """Return the slices of a document; a list of models is one slice of all layers.

    Raises:
        RecipeError: The document is malformed.
    """
    _check_keys(document, KEYS, "mergekit file")
    method = document.get("merge_method")
    if method not in METHODS and method not in merge_method:
        raise RecipeError(
            f"There is no merge method {method!r}. {did_you_mean(str(method), {*METHODS, *merge_method})}"
        )
    present = [key for key in ("models", "slices", "modules") if document.get(key)]
    if len(present) != 1:
        raise RecipeError(f"A mergekit file needs exactly one of models, slices and modules; got {present or 'none'}.")
    scopes: tuple[Data, ...] = (_parameters(document, "mergekit file"),)
    tags = document.get("tags") or []
    if not isinstance(tags, str) and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        raise RecipeError(f"tags: expected a list of words, got {tags!r:.60}.")
    base = Reference.parse(document["base_model"], "base_model") if document.get("base_model") else None
    found = []
    for module, body in _bodies(document):
        where = f"modules.{module}." if module else ""
        inner = (_parameters(body, f"modules.{module}"), *scopes) if module else scopes
        if body.get("models"):
            models = _listed(body, "models", where)
            parts = tuple(_part(model, f"{where}models[{i}]", ranged=False) for i, model in enumerate(models))
            found.append(Slice(parts, base, inner, module))
        else:
            slices = _listed(body, "slices", where)
            found += [_slice(piece, f"{where}slices[{i}]", base, inner, module) for i, piece in enumerate(slices)]
    return found


def _bodies(document: Data) -> list[tuple[str | None, Data]]:
    """Return what holds models or slices: the document, or each of its modules, which have a name."""
    modules = document.get("modules")
    if not modules:
        return [(None, document)]
    if not isinstance(modules, Mapping):
        raise RecipeError(f"modules: expected a mapping, got {modules!r}.")
    for name, body in modules.items():
        _check_keys(body, MODULE_KEYS, f"modules.{name}")
        if bool(body.get("models")) == bool(body.get("slices")):
            raise RecipeError(f"modules.{name}: expected either models or slices.")
    return [(str(name), body) for name, body in modules.items()]


def unknown_keys(document: Data) -> list[str]:
    """Return the keys of a document, its slices and its sources that nobody reads, each with its place."""
    places: list[tuple[str, Data, set[str]]] = [("", document, KEYS | CARD_KEYS)]  # the model card has those
    for module, body in _bodies(document):
        at = f"modules.{module}." if module else ""
        places += [(at, body, MODULE_KEYS)] if module else []
        places += [(f"{at}models[{i}].", model, MODEL_KEYS) for i, model in enumerate(body.get("models") or [])]
        for i, piece in enumerate(body.get("slices") or []):
            places.append((f"{at}slices[{i}].", piece, SLICE_KEYS))
            places += [(f"{at}slices[{i}].sources[{j}].", part, SOURCE_KEYS) for j, part in enumerate(piece["sources"])]
    return [f"{where}{key}" for where, value, known in places for key in value if key not in known]


def _slice(
    piece: Data, where: str, base: Reference | None, scopes: tuple[Data, ...], module: str | None = None
) -> Slice:
    _check_keys(piece, SLICE_KEYS, where)
    sources = _listed(piece, "sources", f"{where}.")
    parts = tuple(_part(part, f"{where}.sources[{i}]", ranged=True) for i, part in enumerate(sources))
    lengths = {part.layers[1] - part.layers[0] for part in parts if part.layers}
    if len(lengths) != 1:
        raise RecipeError(f"{where}: its sources have layer ranges of lengths {sorted(lengths)}, expected one length.")
    if piece.get("base_model"):
        base = Reference.parse(piece["base_model"], f"{where}.base_model")
    return Slice(parts, base, (_parameters(piece, where), *scopes), module)


def _part(value: Data, where: str, *, ranged: bool) -> Part:
    _check_keys(value, SOURCE_KEYS if ranged else MODEL_KEYS, where)
    layers = value.get("layer_range")
    if ranged and not _is_range(layers):
        raise RecipeError(f"{where}: layer_range is {layers!r}, expected [first, end] with first < end.")
    if not ranged and layers is not None:  # mergekit merges all layers then, which nobody asks for who writes this
        raise RecipeError(f"{where}: layer_range stands among models, which give all their layers. Write slices.")
    reference = Reference.parse(value.get("model"), f"{where}.model")
    return Part(reference, (layers[0], layers[1]) if ranged and layers else None, _parameters(value, where))


def _listed(value: Data, key: str, where: str) -> list[Any]:
    found = value.get(key) or []
    if not isinstance(found, list):
        raise RecipeError(f"{where}{key}: expected a list, got {found!r:.60}.")
    return found


def _parameters(value: Data, where: str) -> Data:
    """Return the parameters that stand on a part of a file."""
    found = value.get("parameters") or {}
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise RecipeError(f"{where}: parameters is {found!r:.60}, expected a mapping of names to values.")
    return found


def _is_range(value: object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    first, end = value
    return type(first) is int and type(end) is int and 0 <= first < end


def _check_keys(value: object, known: set[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected a mapping, got {value!r}.")
    for key in value:
        # mergekit ignores a key that it does not know; one that looks like a slip of the pen is too much to ignore.
        if key not in known and key not in CARD_KEYS and get_close_matches(str(key), known, cutoff=ALIKE):
            raise RecipeError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), known)}")


def evaluate(setting: object, tensor: str, t: float, where: str) -> object:
    """Return what a parameter is for a tensor at depth ``t``, or ``None`` when its filters do not speak of it.

    Args:
        setting: A value, a gradient (list of numbers over depth), or one or a list of ``{filter, value}``, first hit
            wins. In a list of words, or of true and false, depth picks one of them. A number may stand in quotes.
        tensor: Name of the tensor; a filter is a part of it.
        t: Depth within the slice, from 0 to 1.
        where: For messages.

    Example:
        >>> evaluate([0.0, 0.5, 1.0], "x", 0.25, "weight")
        0.25
        >>> evaluate([{"filter": "mlp", "value": 1}, {"value": 2}], "layers.0.self_attn.q_proj.weight", 0, "weight")
        2
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _unquoted(setting)
    if not setting:
        raise RecipeError(f"{where}: the list is empty. Give a value, a gradient of values, or filters.")
    if isinstance(setting[0], Mapping):
        for choice in setting:
            _check_keys(choice, {"filter", "value"}, where)
            wanted = choice.get("filter")
            if wanted in (None, "*") or any(str(wanted) in name for name in also_called(tensor)):
                return evaluate(choice.get("value"), tensor, t, where)
        return None
    values: list[Any] = [_unquoted(value) for value in setting]
    words = [isinstance(value, str) for value in values]
    if not all(isinstance(value, bool | int | float | str) for value in values) or any(words) != all(words):
        raise RecipeError(f"{where}: a gradient is a list of numbers, got {setting!r:.120}.")
    position = t * (len(values) - 1)
    if any(isinstance(value, bool | str) for value in values):
        return values[int(position)]
    index = min(int(position), max(0, len(values) - 2))
    if len(values) == 1:
        return values[0]
    share = position - index
    try:
        return values[index] * (1 - share) + values[index + 1] * share
    except OverflowError:
        raise RecipeError(f"{where}: a number of the gradient is too large.") from None


def _unquoted(value: object) -> object:
    """Return the number that a text is, as mergekit reads it; all else as it is."""
    if isinstance(value, str) and value.isascii() and len(value) < 40:
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value


def has_gradient(scope: Data) -> bool:
    """Whether a parameter changes with depth."""

    def gradient(value: object) -> bool:
        if isinstance(value, Mapping):
            return gradient(value.get("value"))
        if not isinstance(value, list) or not value:
            return False
        return any(gradient(choice) for choice in value) if isinstance(value[0], Mapping) else len(value) > 1

    return any(gradient(value) for value in scope.values())
