"""Whether checkpoints can be merged: the same architecture, names, shapes and kinds of tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from modicum.errors import CheckpointError
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec

Tensors = Mapping[str, Tensor]


def spec_of(tensors: Tensors, name: str) -> Spec:
    """Return shape and dtype of a tensor, without reading it where that is possible."""
    if isinstance(tensors, Checkpoint):
        return tensors.spec(name)
    tensor = tensors[name]
    return Spec(tuple(tensor.shape), tensor.dtype)


def label(tensors: Tensors, fallback: str) -> str:
    """Return what to call a model in a message."""
    return tensors.name if isinstance(tensors, Checkpoint) else fallback


def check_agreement(reference: Tensors, others: Sequence[Tensors], *, names: Sequence[str]) -> None:
    """Refuse models that do not fit together.

    Args:
        reference: What the others must look like.
        others: The other models.
        names: What to call them all in messages, the reference first.

    Raises:
        CheckpointError: One differs in architecture, tensors, shapes or kinds.
    """
    for other, name in zip(others, names[1:]):
        _check_architecture(reference, other, names[0], name)
        _check_names(reference, other, names[0], name)
        for tensor in reference:
            _check_spec(tensor, spec_of(reference, tensor), spec_of(other, tensor), names[0], name)


def _check_architecture(a: Tensors, b: Tensors, a_name: str, b_name: str) -> None:
    if not (isinstance(a, Checkpoint) and isinstance(b, Checkpoint)):
        return
    one, other = a.config.get("model_type"), b.config.get("model_type")
    if one and other and one != other:
        raise CheckpointError(f"{b_name} is a {other} model, {a_name} a {one} model. Merge models of one architecture.")


def _check_names(a: Tensors, b: Tensors, a_name: str, b_name: str) -> None:
    missing, extra = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    if not missing and not extra:
        return
    holder, lacker, name = (a_name, b_name, missing[0]) if missing else (b_name, a_name, extra[0])
    shape = list(spec_of(a if missing else b, name).shape)
    more = len(missing or extra) - 1
    others = f" and {more} more" if more else ""
    hint = (
        "One of them ties its embeddings: untie or tie both."
        if name == "lm_head.weight"
        else "Merge models of one architecture."
    )
    raise CheckpointError(f"{lacker} has no tensor {name!r}{others} ({holder} has it, {shape}). {hint}")


def _check_spec(tensor: str, a: Spec, b: Spec, a_name: str, b_name: str) -> None:
    if a.shape != b.shape:
        vocabulary = len(a.shape) == len(b.shape) == 2 and a.shape[1:] == b.shape[1:]
        hint = (
            "Vocabularies of different sizes? Set tokenizer: union."
            if vocabulary and _is_vocabulary(tensor)
            else ("Merge models of one size.")
        )
        raise CheckpointError(
            f"{b_name}: tensor {tensor!r} has shape {list(b.shape)}, expected {list(a.shape)} as in {a_name}. {hint}"
        )
    if a.dtype.is_floating_point != b.dtype.is_floating_point:
        raise CheckpointError(f"{b_name}: tensor {tensor!r} is {b.dtype}, expected {a.dtype} as in {a_name}.")


def _is_vocabulary(tensor: str) -> bool:
    return tensor.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight"))
