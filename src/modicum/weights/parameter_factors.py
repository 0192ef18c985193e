"""Adapters of parameters that are no modules of their own, as PEFT makes them by ``target_parameters``.

The experts of a layer are one parameter, and each has factors of its own in two tensors: ``A (rank * experts,
inputs)``, expert after expert, and ``B (outputs, rank * experts)``, rank after rank. Of several parameters of one
module, the first is the innermost: its factors lie under a ``base_layer`` more for each parameter that follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from modicum.architectures import are_experts_turned, unfused
from modicum.errors import CheckpointError, UnsupportedError
from modicum.weights.adapter import LowRank

if TYPE_CHECKING:
    from modicum.weights.checkpoint import Checkpoint

Pair = Mapping[str, Tensor]
Shape = tuple[int, ...]
FIRST = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")  # in the order of the classes


def resolve(
    base: Checkpoint,
    module: str,
    pairs: Sequence[Pair],
    parameters: Sequence[str],
    *,
    called: Callable[[str], str],
    scale: Callable[[str, int], float],
    owner: str,
) -> dict[str, LowRank] | None:
    """Return the changes of a module's parameters, by the names of the base's tensors.

    ``None`` where the base has none of the parameters there: then the module itself is meant.

    Args:
        base: The adapter's base.
        module: Whose parameters are changed.
        pairs: The factors of each parameter, the innermost first.
        parameters: What the adapter may change there.
        called: From a name to that of the base.
        scale: From a parameter's name and rank to the factor on its change.
        owner: The adapter, for messages.

    Raises:
        UnsupportedError: It cannot be told which factors belong to which parameter.
    """
    kind = str(base.config.get("model_type") or "")
    shapes = {name: shape for name in parameters if (shape := _shape(base, f"{module}.{name}", kind, called))}
    if not shapes and len(pairs) == 1:
        return None
    order = sorted(shapes, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    known = all(name in FIRST for name in order) or len(order) == 1
    if len(order) != len(pairs) or not known:
        raise UnsupportedError(
            f"{owner}: the adapter changes {len(pairs)} parameters of {module!r} and its base has {order or 'none'} of "
            "these. Merge it into its base with PEFT first."
        )
    found: dict[str, LowRank] = {}
    for name, pair in zip(order, pairs):
        changes = _changes(
            f"{module}.{name}", shapes[name], pair, kind, called(f"{module}.{name}") in base, scale, owner
        )
        found |= {called(own): change for own, change in changes.items()}
    return found


def _shape(base: Checkpoint, name: str, kind: str, called: Callable[[str], str]) -> Shape | None:
    """Return the shape that a parameter has in the model's class, also where each expert is stored by itself."""
    if called(name) in base:
        return base.spec(called(name)).shape
    parts = list(unfused(name, (1, 2, 1), kind))
    if parts == [name] or any(called(part) not in base for part in parts):
        return None
    rows, columns = base.spec(called(parts[0])).shape
    experts = 1
    while all(called(each) in base for each in list(unfused(name, (experts + 1, 2, 1), kind))[len(parts) * experts :]):
        experts += 1
    return (experts, rows * len(parts), columns)


def _changes(
    name: str,
    shape: Shape,
    pair: Pair,
    kind: str,
    stacked: bool,
    scale: Callable[[str, int], float],
    owner: str,
) -> dict[str, LowRank]:
    A, B = pair["A"], pair["B"]
    experts, rows, columns = shape if len(shape) == 3 else (1, *shape)
    ways = [(rows, columns, False), (columns, rows, True)]
    if rows == columns and are_experts_turned(kind) and len(shape) == 3:
        ways.reverse()
    turned = next((way for o, i, way in ways if (B.shape[0], A.shape[1]) == (o, i)), None)
    if turned is None or A.shape[0] != B.shape[1] or A.shape[0] % experts:
        raise CheckpointError(
            f"{owner}: the adapter changes {name!r} of shape {list(shape)} by lora_A {list(A.shape)} and lora_B "
            f"{list(B.shape)}, which do not fit. Use the base that it was trained on."
        )
    rank = A.shape[0] // experts
    factor = scale(name, rank)
    if not math.isfinite(factor):
        raise CheckpointError(f"{owner}: {name} has a scale of {factor}, expected a finite number.")
    if len(shape) == 2:
        return {name: LowRank(A, B, factor, transposed=turned, parameter=True)}
    a = A.reshape(experts, rank, -1)
    b = B.reshape(len(B), rank, experts).permute(2, 0, 1)
    if stacked:
        return {name: LowRank(a, b, factor, transposed=turned, parameter=True)}
    found = {}
    for own, (expert, *part) in unfused(name, shape, kind).items():  # stored by themselves: outputs first
        start, end = part[0] if part else (0, rows)  # type: ignore[misc]
        found[own] = LowRank(a[expert], b[expert, start:end], factor, parameter=True)
    return found
