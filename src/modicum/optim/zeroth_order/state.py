"""Whether an optimizer can continue a saved state: its numbers must mean the same there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from modicum.errors import CheckpointError

if TYPE_CHECKING:
    from modicum.optim.zeroth_order.step import ZerothOrder

ADVICE = "Make the optimizer with the knobs that the state was written with, or start anew without the state."


def identity(optimizer: ZerothOrder) -> dict[str, Any]:
    """Return the settings that decide the meaning of the numbers in a state.

    Coordinates are those of certain factors (method, lift, seed, tensors with their ranks, refreshes), moments those of
    a certain update, and what an adapter engine learned is not in the weights.
    """
    settings = optimizer.settings
    return {
        "method": type(optimizer).__name__,
        "variant": settings.variant,
        "engine": settings.engine,
        "seed": settings.seed,
        "lift": None if settings.lift is None else type(settings.lift).__name__,
        "scale": settings.scale,
        "refresh_every": settings.refresh_every,
        "shapes": {leaf.name: tuple(leaf.param.shape) for leaf in optimizer.leaves},
        "ranks": {leaf.name: leaf.rank for leaf in optimizer.leaves},
        "order": [leaf.name for leaf in optimizer.leaves],
        "size": sum(leaf.coordinates.stop - leaf.coordinates.start for leaf in optimizer.leaves),
    }


def check(optimizer: ZerothOrder, state: Mapping[str, Any], *, counts: tuple[str, ...]) -> None:
    """Raise unless ``optimizer`` can go on with ``state``; changes neither.

    Raises:
        CheckpointError: The state was written by another optimizer, or is not whole.
    """
    mine: Mapping[str, Any] | None = state.get("zeroth_order")
    if mine is None:
        raise CheckpointError("This optimizer state was not written by a zeroth-order optimizer.")
    here = identity(optimizer)
    for name in here:
        if name in mine and (found := _difference(mine[name], here[name])):
            place, theirs, ours = found
            raise CheckpointError(
                f"The optimizer state has {name} {theirs!r}{place}, this optimizer has {ours!r}. {ADVICE}"
            )
    own = {"memory": optimizer.memory, "position": optimizer.position, **optimizer._more_state()}
    dense = {leaf.name: optimizer._fresh_dense_memory(leaf) for leaf in optimizer.leaves if not leaf.rank}
    missing = [name for name in ("method", "seed", "dense_memory", *counts, *own) if name not in mine]
    if missing:
        raise CheckpointError(f"The optimizer state lacks {', '.join(missing)}. {ADVICE}")
    if not mine["updates"]:  # moments are made when they are first needed
        dense = {name: memory for name, memory in dense.items() if name in mine["dense_memory"]}
    groups = ([len(g["params"]) for g in side] for side in (state["param_groups"], optimizer.param_groups))
    theirs = {name: mine[name] for name in own} | {"dense_memory": mine["dense_memory"], "parameters": next(groups)}
    if found := _difference(_layout(theirs), _layout(own | {"dense_memory": dense, "parameters": next(groups)})):
        place, there, ours = found
        raise CheckpointError(f"The optimizer state has {there}{place}, this optimizer has {ours}. {ADVICE}")
    if unsaid := [name for name in here if name not in mine]:
        warnings.warn(
            f"The optimizer state, written by an older version, does not say its {', '.join(unsaid)}. It fits this "
            "optimizer in names and shapes; make sure that it was written with the same knobs.",
            UserWarning,
            stacklevel=4,
        )


def _layout(value: Any) -> Any:
    """Return the shapes of all tensors in a state, in its structure."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return {name: _layout(part) for name, part in value.items()}
    if isinstance(value, list):
        return [*map(_layout, value)]
    return "nothing" if value is None else value


def _difference(theirs: Any, ours: Any, *path: Any) -> tuple[str, Any, Any] | None:
    """Return the place where two structures first differ, and both values there."""
    theirs, ours = (dict(enumerate(side)) if isinstance(side, list) else side for side in (theirs, ours))
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        inside = (_difference(theirs.get(name), ours.get(name), *path, name) for name in [*theirs, *ours])
        return next(filter(None, inside), None)
    place = f" for {'.'.join(map(str, path))}" if path else ""
    return None if theirs == ours else (place, theirs, ours)
