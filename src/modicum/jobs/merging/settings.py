"""Settings that one ``config.json`` spells out and another leaves to the class, compared as the class reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError
from modicum.jobs.merging.layers import opened
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.configs import HEADS, differences, is_material

if TYPE_CHECKING:
    from modicum.weights.plan import Plan


def notes_on_unsaid(plan: Plan) -> list[str]:
    """Say where models compute otherwise by settings that only one of their configurations holds.

    Raises:
        CheckpointError: They have other heads.
    """
    models = [model for model in plan.models if isinstance(model, Checkpoint)]
    notes: list[str] = []
    for model in models[1:]:
        if not _one_sided(models[0].config, model.config):
            continue
        ours, theirs = opened(models[0].config), opened(model.config)
        if ours is None or theirs is None or type(ours) is not type(theirs):
            continue
        a, b = dict(_all(ours.to_dict())), dict(_all(theirs.to_dict()))
        said = differences(models[0].config, model.config)
        found = {
            key: (a.get(key), b.get(key))
            for key in a.keys() | b.keys()
            if a.get(key) != b.get(key) and is_material(key) and key not in said
        }
        for key, (expected, got) in found.items():
            if key.rpartition(".")[2] in HEADS:
                raise CheckpointError(
                    f"{model.name}: {key} is {got}, expected {expected} as in {models[0].name}. "
                    "Merge models of one architecture."
                )
        told = ", ".join(f"{key} ({got}, {expected})" for key, (expected, got) in sorted(found.items())[:5])
        if told:
            first = models[0].name
            notes.append(f"{model.name} differs from {first} in {told}: the result keeps {first}'s")
    return notes


def _one_sided(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one of two files holds, or empties, a setting that the other has not."""
    a, b = dict(_all(one)), dict(_all(other))
    different = {key for key in a.keys() | b.keys() if (key in a) != (key in b) or (a[key] is None) != (b[key] is None)}
    return any(is_material(key) or key.rpartition(".")[2] in HEADS for key in different)


def _all(config: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _all(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value
