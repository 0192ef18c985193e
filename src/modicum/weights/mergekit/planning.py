"""The plan of a mergekit file: which tensors meet, with which knobs, under which names.

A file is turned into the steps that our own merges are made of. Each source of a slice is seen through a
:class:`~.windows.Window` of its layers, so the check of a plain merge decides about slices too. What we do otherwise
than mergekit on purpose is said in the plan's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modicum.errors import RecipeError, UnsupportedError
from modicum.layout import DEPTH_KEYS, LAYER_LISTS, comes_first, layer_of, modules, stacks
from modicum.references import find_model
from modicum.registry import merge_method
from modicum.weights.aliases import aligned
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.companions import companion_files
from modicum.weights.compatibility import Tensors, check_agreement, notes_on_configs, notes_on_zeros
from modicum.weights.configs import depth_keys, drafts, text_of
from modicum.weights.files import Spec
from modicum.weights.mergekit.document import (
    Data,
    Part,
    Reference,
    Slice,
    evaluate,
    has_gradient,
    read_slices,
    unknown_keys,
)
from modicum.weights.mergekit.methods import Getter, Translation, method_of, parameters_of
from modicum.weights.mergekit.tokenizers import Converter, notes_on_tokenizers
from modicum.weights.mergekit.vocabulary import companions_with, with_vocabulary
from modicum.weights.mergekit.windows import TEXT, Table, Window, by_module, renumbered
from modicum.weights.plan import Plan, Source, Step, attach_statistics, check_count, kept, parse_dtype
from modicum.weights.rehearsal import rehearse

Opener = Callable[[str, str | None], Checkpoint]
REQUIRED = object()


def plan_mergekit(
    document: Data,
    open_model: Opener,
    statistics: Sequence[Tensors] = (),
    *,
    find: Callable[[str], Path] = find_model,
    convert: Converter | None = None,
) -> Plan:
    """Return the plan of a mergekit document.

    Args:
        document: The parsed file.
        open_model: Opens a model, folding an adapter into it when one is given.
        statistics: For methods that weigh by data: of each model that is merged, in the file's order.
        find: Returns the folder of a tokenizer by reference.
        convert: Makes a ``tokenizer.json`` of a tokenizer's other files.

    Raises:
        RecipeError: The document is malformed.
        CheckpointError: The models do not fit together.
    """
    slices = read_slices(document)
    opened: dict[Reference, Checkpoint] = {}
    for piece in slices:
        for reference in piece.references:
            if reference not in opened:
                opened[reference] = open_model(reference.model, reference.adapter)
    opened = dict(zip(opened, aligned([*opened.values()])))
    dtype = parse_dtype(document.get("out_dtype") or document.get("dtype"))
    first = slices[0].references[0]
    named = {str(reference): checkpoint for reference, checkpoint in opened.items()}
    vocabulary = with_vocabulary(document, named, str(first), find=find, convert=convert)
    tables: dict[Reference, Table] = {
        reference: vocabulary.tables.get(str(reference), checkpoint) for reference, checkpoint in opened.items()
    }
    steps: list[Step] = []
    changes: dict[str, Any] = dict(vocabulary.config)
    for module, group in by_module(slices, tables[first]).items():
        sliced = any(part.layers for piece in group for part in piece.parts)
        if sliced:
            _check_slices(group, tables, module)
        made, depth = _steps(document, group, tables, module)
        steps += made
        if sliced and module in TEXT:
            stack = next(iter(stacks(Window(tables[first], None, module))), "")
            changes |= _layers_in_config(group, tables, stack, depth)
        elif sliced and depth != (have := max(stacks(Window(tables[first], None, module)).values(), default=0)):
            raise UnsupportedError(
                f"modules.{module}: its slices have {depth} layers, {first} has {have}. Only the number of the text's "
                "layers can change."
            )
    steps = [replace(step, spec=Spec(step.spec.shape, dtype)) if dtype and step.spec.dtype.is_floating_point else step
             for step in steps]  # fmt: skip
    companions = companion_files(opened[first], dtype, **changes)
    companions = companions_with(vocabulary, companions)
    notes = [*_notes(document, slices, steps), *vocabulary.notes, *notes_on_configs([*opened.values()], [*named])]
    if not vocabulary.tables:
        notes += notes_on_tokenizers(named)
    plan = attach_statistics(Plan(steps, list(opened.values()), companions, notes), statistics)
    rehearse(plan.steps)
    return plan


def _check_slices(slices: Sequence[Slice], tables: Mapping[Reference, Table], module: str | None) -> None:
    """Refuse ranges that a model does not have, and models that differ where their layers are not sliced.

    Tensors outside the layers come from the first or the last slice, and ``config.json`` from one model: all models
    must agree in them, and in the layers that all of them have.
    """
    depths = {}
    for reference, table in tables.items():
        found = stacks(Window(table, None, module))
        if len(found) > 1:
            parts = list(dict.fromkeys(modules(table).values()))
            raise UnsupportedError(
                f"{reference} has {len(found)} stacks of layers ({', '.join(found)}), and layer_range does not say "
                "which one it means. "
                + (f"Write them under modules ({', '.join(parts)}), or merge" if len(parts) > 1 else "Merge")
                + " whole models: list them under models."
            )
        depths[reference] = depth = next(iter(found.values()), 0)
        text = text_of(table.config)
        said = {text[key] for stack in found for key in depth_keys(text, stack)}
        if said - {depth} and module in TEXT:
            raise UnsupportedError(
                f"{reference} has {depth} layers, of which its config.json counts {', '.join(map(str, said))}: some "
                "draft further tokens, or are shared. layer_range cannot choose among them. Merge whole models: list "
                "them under models."
            )
    for piece in slices:
        for part in piece.parts:
            if part.layers and part.layers[1] > (have := depths[part.reference]):
                raise RecipeError(f"{part.reference} has {have} layers, layer_range asks for {list(part.layers)}.")
    common = (0, min(depths.values()))
    first, *others = (Window(table, common, module) for table in tables.values())
    check_agreement(first, others, names=[str(reference) for reference in tables])


def _steps(
    document: Data, slices: Sequence[Slice], tables: Mapping[Reference, Table], module: str | None
) -> tuple[list[Step], int]:
    """Return the steps, and how many layers the result has."""
    make, several = method_of(str(document["merge_method"])), len(slices) > 1 or module is not None
    steps: list[Step] = []
    depth = 0
    for position, piece in enumerate(slices):
        seen = [_Seen.of(part, tables, module) for part in piece.parts]
        base = _Seen.of(piece.base_part, tables, module) if piece.base_part else None
        members = [base, *(one for one in seen if one.part != base.part)] if base else seen
        labels = [str(member.part.reference) for member in members]
        names = check_agreement(members[0].window, [member.window for member in members[1:]], names=labels)
        lengths = stacks(names)
        for name in names:
            layer = layer_of(name)
            if layer:
                length = lengths[layer.stack]
                last = length - 1 - (0 if members[0].part.layers else drafts(members[0].table.config, length))
                t = min(1.0, layer.number / last) if last > 0 else 1.0
            else:
                if position != (0 if comes_first(name) else len(slices) - 1):
                    continue
                t = 0.0 if comes_first(name) else 1.0
            steps.append(_step(make, piece, base, seen, name, renumbered(name, depth), t, several))
        depth += max(lengths.values(), default=0)
    return steps, depth


@dataclass(frozen=True)
class _Seen:
    """A source of a slice, and its tensors by the names that all sources of the slice share."""

    part: Part
    table: Table
    window: Window

    @classmethod
    def of(cls, part: Part, tables: Mapping[Reference, Table], module: str | None) -> _Seen:
        """Open the window of a source."""
        table = tables[part.reference]
        return cls(part, table, Window(table, part.layers, module))

    def source(self, name: str) -> Source:
        """Return the tensor that the slice calls ``name``."""
        return Source(str(self.part.reference), self.table, self.window.own(name))


@dataclass(frozen=True)
class _Lookup:
    """The parameters of one tensor of a slice.

    As in mergekit, the filters of a parameter of the whole merge see the tensor's name in the result, those of a
    model's parameter see its name in that model.
    """

    piece: Slice
    everyone: Sequence[_Seen]
    experts: Sequence[_Seen]
    name: str
    out: str
    t: float

    def shared(self, key: str, default: object) -> Any:
        """Return a parameter of the whole merge."""
        return self._first(key, self.piece.scopes, self.out, default)

    def each(self, key: str, default: object = REQUIRED, *, with_base: bool = False) -> list[Any]:
        """Return a parameter of each expert, or of each source."""
        values = []
        for one in self.everyone if with_base else self.experts:
            own = one.window.own(self.name)
            value = self._first(key, (one.part.parameters, *self.piece.scopes), own, default)
            if value is REQUIRED:
                raise RecipeError(f"{one.part.reference}: parameter {key!r} is missing for {own}. Set it.")
            values.append(value)
        return values

    def _first(self, key: str, scopes: Sequence[Data], tensor: str, default: object) -> object:
        for scope in scopes:
            if key in scope:
                value = evaluate(scope[key], tensor, self.t, f"parameter {key!r}")
                if value is not None:
                    return value
        return default


def _step(
    make: Callable[[Getter], Translation],
    piece: Slice,
    base: _Seen | None,
    everyone: Sequence[_Seen],
    name: str,
    out: str,
    t: float,
    several: bool,
) -> Step:
    experts = [one for one in everyone if base is None or one.part != base.part]
    lookup = _Lookup(piece, everyone, experts, name, out, t)
    method, knobs, needs_base = make(Getter(lookup.shared, lookup.each))
    based = piece.base is not None if needs_base is None else needs_base
    if based and base is None:
        raise RecipeError(
            f"{piece.base} is the base of a slice whose sources have different layer ranges, and none of them. "
            "List it among the sources with its layer_range."
            if piece.base
            else f"{method} merges differences from a base model. Set base_model."
        )
    used = experts if based else everyone
    origin = base if based else None
    spec = (origin or used[0]).window.spec(name)
    if origin and not used and several:  # a module or slice of the base alone, beside others that merge
        return replace(kept(spec, origin.source(name)), name=out)
    check_count(merge_method[method], len(used))
    sources = tuple(one.source(name) for one in used)
    return Step(out, spec, method, origin.source(name) if origin else None, sources, merge_method[method].knobs(knobs))


def _layers_in_config(
    slices: Sequence[Slice], tables: Mapping[Reference, Table], stack: str, depth: int
) -> dict[str, Any]:
    """Return what ``config.json`` must say of the result's layers: their number, and lists with an entry for each."""
    config = text_of(tables[slices[0].references[0]].config)
    found: dict[str, Any] = dict.fromkeys(depth_keys(config, stack) or [DEPTH_KEYS[0]], depth)
    for name in (name for name in LAYER_LISTS if config.get(name)):
        found[name] = []
        for piece in slices:
            part = piece.base_part or piece.parts[0]
            kinds = text_of(tables[part.reference].config).get(name) or config[name] or []
            found[name] += kinds[slice(*(part.layers or (None,)))]
    if "attention_types" in config and "attention_layers" in found:  # GPT-Neo's short form of the same list
        found["attention_types"] = [[found["attention_layers"], 1]]
    return found


def _notes(document: Data, slices: Sequence[Slice], steps: Sequence[Step]) -> list[str]:
    """Say where the numbers differ from mergekit's on purpose, and what is easily overlooked."""
    notes = []
    name = str(document["merge_method"])
    if document.get("dtype") in ("bfloat16", "float16") or not document.get("dtype"):
        notes.append("arithmetic is in float32 with one cast at the end, where mergekit computes in the given dtype")
    sparse = [step for step in steps if "density" in step.knobs]
    scopes = [scope for piece in slices for scope in (*piece.scopes, *(part.parameters for part in piece.parts))]
    if sparse and not any("density" in scope for scope in scopes):
        notes.append(f"density is 1 (mergekit's default), so {name} drops nothing")
    if any(step.draws and not _all_kept(step.knobs["density"]) for step in sparse):
        notes.append("random masks come from the seed and the tensors' names: other entries than mergekit drops")
    if any(reference.adapter for piece in slices for reference in piece.references):
        notes.append("adapters are folded in while reading, in float32, where mergekit first writes a rounded model")
    if any("gamma" in step.knobs for step in sparse):
        notes.append("breadcrumbs keeps its share of small tensors too, which older mergekit set to zero")
    if any(has_gradient(scope) for scope in scopes):
        notes.append("gradients: the final norm and lm_head get the last value, where mergekit gives them the first")
    known = parameters_of(name)
    unread = {key for scope in scopes for key in scope} - known.keys()
    outside = any(piece.base and piece.base not in [part.reference for part in piece.parts] for piece in slices)
    if outside and not any(step.base for step in steps):
        notes.append(f"{name} has no base: base_model only gives config and tokenizer; mergekit merges it too")
    if unknown := unknown_keys(document):
        notes.append(f"{', '.join(unknown)}: unknown and ignored, as mergekit does")
    if "int8_mask" in unread:
        notes.append("int8_mask only saves memory in mergekit and has no effect here")
    if others := sorted(unread - {"int8_mask"}):
        notes.append(f"{name} does not read {', '.join(map(repr, others))} under parameters: no effect")
    notes += notes_on_zeros(steps)
    return [*notes, *_misplaced(slices, known, based=any(step.base for step in steps))]


def _misplaced(slices: Sequence[Slice], known: Mapping[str, bool], *, based: bool) -> list[str]:
    """Say which parameters stand on a model where nobody reads them: those of the whole merge, and a base's own."""
    parts = [(piece, part) for piece in slices for part in piece.parts]
    whole = sorted({key for _, part in parts for key in part.parameters if known.get(key) is False})
    notes = [f"{', '.join(map(repr, whole))} on a model: no effect, as it is the whole merge's"] if whole else []
    own = [part for piece, part in parts if part == piece.base_part and part.parameters.keys() & known.keys()]
    if based and own:
        said = sorted({key for part in own for key in part.parameters if known.get(key)})
        notes += [f"{', '.join(map(repr, said))} on {own[0].reference}: no effect, as it is the base"] if said else []
    return notes


def _all_kept(density: object) -> bool:
    return all(value == 1 for value in (density if isinstance(density, list) else [density]))
