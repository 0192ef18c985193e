"""Whether checkpoints can be merged: the same architecture, names, shapes and kinds of tensor.

One check for every way to ask for a merge: a recipe of ours hands it whole models, a mergekit file hands it the layers
of each slice, renumbered.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.layout import is_recomputed, is_vocabulary, layer_of, role, stacks, with_tokens
from modicum.patterns import Pattern, alternatives
from modicum.weights.checkpoint import PACKED, Checkpoint
from modicum.weights.configs import differences
from modicum.weights.files import Spec

if TYPE_CHECKING:
    from modicum.weights.plan import Step

Tensors = Mapping[str, Tensor]


def spec_of(tensors: Tensors, name: str) -> Spec:
    """Return shape and dtype of a tensor, without reading it where that is possible."""
    stored = getattr(tensors, "spec", None)
    if stored is not None:
        spec: Spec = stored(name)
        return spec
    tensor = tensors[name]
    return Spec(tuple(tensor.shape), tensor.dtype)


def label(tensors: Tensors, fallback: str) -> str:
    """Return what to call a model in a message."""
    return str(getattr(tensors, "name", fallback))


def labels(models: Sequence[Tensors], fallbacks: Sequence[str]) -> list[str]:
    """Return what to call each of several models: one that is listed again, or an adapter on another base, by a number.

    Example:
        >>> labels([{}, {}, {}], ["base", "a", "a"])
        ['base', 'a', 'a (2)']
    """
    found: dict[str, None] = {}  # in order; a list would be searched once for each number of each model
    numbers: dict[str, int] = {}
    for model, fallback in zip(models, fallbacks):
        own = name = label(model, fallback)
        while own in found:
            numbers[name] = numbers.get(name, 1) + 1
            own = f"{name} ({numbers[name]})"
        found[own] = None
    return list(found)


def check_agreement(
    reference: Tensors, others: Sequence[Tensors], *, names: Sequence[str], apart: Container[str] | None = None
) -> list[str]:
    """Refuse models that do not fit together.

    Args:
        reference: What the others must look like.
        others: The other models.
        names: What to call them all in messages, the reference first.
        apart: Tensors that stay as the reference has them, which the others may lack, have more of, or have in other
            shapes; ``None`` where nobody can ask for that.

    Returns:
        The names of the tensors to merge: all but buffers that some of the models lack, which transformers recomputes.

    Raises:
        CheckpointError: One differs in architecture, tensors, shapes or kinds.
    """
    kept = [name for name in reference if not _is_buffer(reference, name) or all(name in other for other in others)]
    for other, name in zip(others, names[1:]):
        _check_architecture(reference, other, names[0], name)
        _check_names(reference, other, names[0], name, apart)
        for tensor in kept:
            if apart is None or tensor not in apart:
                _check_spec(tensor, reference, other, names[0], name)
    return kept


def excluded(models: Iterable[Iterable[str]], pattern: str | None) -> set[str]:
    """Return the names of tensors, of any of the models, that a regular expression finds.

    Raises:
        RecipeError: It is malformed, or finds none.
    """
    if pattern is None:
        return set()
    expression = Pattern(pattern, "exclude")
    found = {name for model in models for name in model if expression.finds(name)}
    if not found:
        raise RecipeError(f"exclude {pattern!r} matches no tensor. Correct it, or leave it out.")
    return found


def check_remaining(left: Collection[str], pattern: str | None) -> None:
    """Refuse to exclude every weight: the result would be a copy of one model.

    Raises:
        RecipeError: No weight is left.
    """
    if pattern is not None and not left:
        raise RecipeError(f"exclude {pattern!r} leaves no weight. Correct it, or leave it out.")


def notes_on_left_out(models: Sequence[Tensors], names: Sequence[str], untouched: Collection[str]) -> Iterator[str]:
    """Say which excluded tensors the result lacks, as the model has none after which the others go."""
    for model, name in zip(models[1:], names[1:]):
        left = [tensor for tensor in model if tensor in untouched and tensor not in models[0]]
        if left:
            yield f"{len(left)} excluded tensors of {name}, such as {left[0]!r}, are left out: {names[0]} has none"


def notes_on_configs(models: Sequence[Tensors], names: Sequence[str]) -> list[str]:
    """Say what is to be known of the models, and where their configurations compute otherwise with the same weights.

    The result keeps the first one's configuration.

    Args:
        models: The first one gives the result its ``config.json``.
        names: What to call them.
    """
    notes = [note for model in models for note in getattr(model, "notes", [])]
    for model, name in zip(models[1:], names[1:]):
        found = differences(_config(models[0]), _config(model))
        told = ", ".join(f"{key} ({b}, {a})" for key, (a, b) in list(found.items())[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        if found:
            notes.append(f"{name} differs from {names[0]} in {told}{more}: the result keeps {names[0]}'s")
    return notes


def notes_on_exclusion(models: Iterable[Iterable[str]], pattern: str | None) -> Iterator[str]:
    """Say which of several alternatives in ``exclude`` no tensor has: a slip of the pen, or the name of a tied one."""
    ways = alternatives(pattern or "")
    if len(ways) < 2:
        return
    names = {name for model in models for name in model}
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    for way in ways:
        expression = Pattern(way, "exclude")
        if not any(expression.finds(name) for name in names):
            close = get_close_matches(way.replace("\\", ""), parts, n=1)
            yield f"exclude: {way!r} matches no tensor" + (f". Did you mean {close[0]!r}?" if close else "")


def notes_on_idle(base: Tensors | None, experts: Sequence[Tensors]) -> Iterator[str]:
    """Say which experts are the base itself."""
    if isinstance(base, Checkpoint) and not base.adapter:
        for expert in experts:
            same = isinstance(expert, Checkpoint) and expert.folder.resolve() == base.folder.resolve()
            if same and not expert.adapter:  # type: ignore[attr-defined]
                yield f"{label(expert, 'an expert')} is the base itself: it adds no difference"


def notes_on_zeros(steps: Iterable[Step]) -> Iterator[str]:
    """Say where scales and weights of 0 leave the base alone, or nothing at all."""
    listed = [
        (step.knobs, step.base is not None and step.entry.facts.base)
        for step in steps
        if step.spec.dtype.is_floating_point
    ]
    zero = [based for each, based in listed if _is_zero(each)]
    stays = sum(not based and each == {"scale": 1.0} for each, based in listed)  # of the base, such as what is excluded
    if zero and all(zero) and len(zero) + stays == len(listed):
        yield "the scale, or all weights, are 0: the result is the base"
    elif lost := len(zero) - sum(zero):
        yield f"the scale, or all weights, of {lost} of {len(listed)} tensors are 0, and so are these tensors"


def _is_zero(knobs: Mapping[str, Any]) -> bool:
    weights = knobs.get("weights")
    return knobs.get("scale") == 0 or bool(weights and not any(weights))


def _check_architecture(a: Tensors, b: Tensors, a_name: str, b_name: str) -> None:
    one, other = _config(a), _config(b)
    kind, another = one.get("model_type"), other.get("model_type")
    if kind and another and kind != another:
        raise CheckpointError(
            f"{b_name} is a {another} model, {a_name} a {kind} model. Merge models of one architecture."
        )
    for key, (expected, found) in differences(one, other, heads=True).items():
        raise CheckpointError(
            f"{b_name}: {key} is {found} in its config.json, expected {expected} as in {a_name}. "
            "Merge models of one architecture."
        )


def _config(tensors: Tensors) -> Mapping[str, Any]:
    config: Mapping[str, Any] = getattr(tensors, "config", {})
    return config


def is_weight(tensors: Tensors, name: str) -> bool:
    """Whether a tensor is one that methods change: a floating-point one that transformers does not recompute."""
    return spec_of(tensors, name).dtype.is_floating_point and not _is_buffer(tensors, name)


def _is_buffer(tensors: Tensors, name: str) -> bool:
    return is_recomputed(name, spec_of(tensors, name).shape)


def _own(tensors: Tensors, name: str) -> str:
    """Return what a model itself calls a tensor of a slice, whose layers are numbered from zero."""
    own = getattr(tensors, "own", None)
    return str(own(name)) if own else name


def _check_names(a: Tensors, b: Tensors, a_name: str, b_name: str, apart: Container[str] | None) -> None:
    ours, theirs = ({name for name in model if not _is_buffer(model, name)} for model in (a, b))
    missing, extra = (
        [name for name in sorted(lot) if name not in (apart or ())] for lot in (ours - theirs, theirs - ours)
    )
    if not missing and not extra:
        return
    name, more = (missing or extra)[0], len(missing or extra) - 1
    (holder, holds), (lacker, lacks) = ((a_name, a), (b_name, b)) if missing else ((b_name, b), (a_name, a))
    absent, present = _own(lacks, name), _own(holds, name)
    others = f" and {more} more" if more else ""
    shape = list(spec_of(holds, name).shape)
    raise CheckpointError(
        f"{lacker} has no tensor {absent!r}{others} ({holder} has {'it' if absent == present else repr(present)}, "
        f"{shape}). {_advice(name, holder, holds, lacker, lacks, apart is not None)}"
    )


def _advice(name: str, holder: str, holds: Tensors, lacker: str, lacks: Tensors, excludes: bool) -> str:
    layer = layer_of(name)
    if role(name) == "head":
        return "One of them ties its embeddings: untie or tie both."
    if layer and stacks(lacks).get(layer.stack) not in (None, (depth := stacks(holds)[layer.stack])):
        return (
            f"{holder} has {depth} layers, {lacker} {stacks(lacks)[layer.stack]}: merge models of one depth, or choose "
            "layers with slices in a mergekit file."
        )
    ways = ", or leave out what one of them lacks with exclude, a regular expression of names" if excludes else ""
    return f"Merge models of one architecture{ways}."


def _check_spec(tensor: str, one: Tensors, other: Tensors, a_name: str, b_name: str) -> None:
    a, b, own = spec_of(one, tensor), spec_of(other, tensor), _own(other, tensor)
    if a.shape != b.shape:
        hint = (
            "Vocabularies of different sizes? Set tokenizer: union to bring their tokens together."
            if is_vocabulary(tensor) and with_tokens(tensor, a.shape, 1) == with_tokens(tensor, b.shape, 1)
            else "Merge models of one size."
        )
        raise CheckpointError(
            f"{b_name}: tensor {own!r} has shape {list(b.shape)}, expected {list(a.shape)} as in {a_name}. {hint}"
        )
    if a.dtype.is_floating_point != b.dtype.is_floating_point:
        raise CheckpointError(f"{b_name}: tensor {own!r} is {b.dtype}, expected {a.dtype} as in {a_name}.")


def check_tensors(model: Tensors, owner: str) -> None:
    """Refuse what is no mapping of names to tensors, and a dictionary in which something else stands beside them.

    Raises:
        CheckpointError: It is no mapping, or an entry is no tensor.
    """
    if not isinstance(model, Mapping):
        raise CheckpointError(
            f"{owner} is of type {type(model).__name__}, expected a dictionary of tensors by name. Give a list of them."
        )
    if not isinstance(model, dict):
        return  # of files everything is a tensor
    for name, value in model.items():
        if not torch.is_tensor(value):
            raise CheckpointError(
                f"{owner}: entry {name!r} is of type {type(value).__name__}, expected a tensor. Leave it out."
            )


def refuse_packed(model: Tensors, owner: str) -> None:
    """Refuse a model whose tensors are packed numbers, which are no weights.

    Raises:
        UnsupportedError: A tensor has the name of one.
    """
    if packed := next((name for name in model if PACKED.search(name)), None):
        raise UnsupportedError(
            f"{owner} is quantised (tensor {packed!r}); its packed numbers cannot be averaged. Use the model "
            "that it was made from, or dequantise it first."
        )
