r"""Several experts as one dense model and small stored differences, and every mixture of them.

Outside the routed layers all experts share one average. In a routed layer expert t is

.. math::
    \theta_t \approx D + \tilde S_t, \qquad \theta(w) = D + \sum_t w_t \tilde S_t

with the dense weights D and what a store (:data:`modicum.registry.expert_store`) keeps of the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.layout import Unit, is_number, natural, unit_of
from modicum.registry import expert_store
from modicum.weights.aliases import aligned
from modicum.weights.compatibility import Tensors, spec_of
from modicum.weights.expert_plan import (
    Dense,
    Experts,
    describe,
    knobs_of,
    method_of,
    part_name,
    plan_stores,
    refuse_idle,
)
from modicum.weights.merge import merge_state_dicts, open_checkpoint
from modicum.weights.stores.reading import Reader, reader_of


class ExpertSet:
    """Stored experts with their dense weights: what :func:`build_experts` makes and a routed model serves.

    Args:
        about: Names, routed layers and store.
        dense: The dense weights, by the names of the host's tensors; at least those of the routed layers.
        parts: What the stores wrote, by :func:`part_name`.
    """

    def __init__(self, about: Experts, dense: Tensors, parts: Mapping[str, Tensor]) -> None:
        self.about, self.dense, self.parts = about, dense, parts
        grouped: dict[str, dict[int, dict[str, str]]] = {}
        for key in parts:
            expert, _, rest = key.partition(".")
            name, _, part = rest.rpartition(".")
            if not is_number(expert) or int(expert) >= len(about.names) or name not in dense:
                raise CheckpointError(
                    f"The experts hold {key!r}, which does not belong to this model. Build them again."
                )
            grouped.setdefault(name, {}).setdefault(int(expert), {})[part] = key
        self._grouped = {name: grouped[name] for name in sorted(grouped, key=natural)}
        held = {unit_of(name, about.unit) or name for name in grouped}
        if empty := next((layer for layer in about.routed if layer not in held and not _may_lack(about)), None):
            raise CheckpointError(f"The experts hold nothing of {empty!r}, which is to be routed. Build them again.")
        self._readers: dict[tuple[str, int], Reader] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored differences."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def routed(self) -> list[str]:
        """Names of the tensors that differ between the experts."""
        return list(self._grouped)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every routed tensor."""
        return {name: spec_of(self.dense, name).shape for name in self._grouped}

    def reader(self, name: str, expert: int) -> Reader | None:
        """Return what reads one tensor of one expert; ``None`` where it equals the dense one."""
        found = self._grouped[name].get(expert)
        if found is None:
            return None
        if (name, expert) not in self._readers:
            parts = {part: self.parts[key] for part, key in found.items()}
            key, density = self.about.key(expert, name), self.about.knobs.get("density")
            try:
                self._readers[name, expert] = reader_of(parts, self.shapes[name], key=key, density=density)
            except (KeyError, RuntimeError, ValueError, IndexError) as error:
                raise CheckpointError(f"expert {self.about.names[expert]}: tensor {name!r}: {error}") from None
        return self._readers[name, expert]

    def write_(self, out: Tensor, name: str, coefficients: Sequence[float]) -> None:
        """Overwrite ``out`` by the dense weights plus the weighted differences; summed in float32, cast once.

        Args:
            out: The tensor that the model computes with; of the dense one's shape.
            name: Which tensor.
            coefficients: See :meth:`Experts.coefficients`.
        """
        dense = self.dense[name].detach().reshape(-1)
        used = [(reader, c) for t, c in enumerate(coefficients) if c and (reader := self.reader(name, t)) is not None]
        flat = out.detach().view(-1)
        if not used:
            flat.copy_(dense)
            return
        block = used[0][0].block
        direct = flat.dtype == torch.float32 and flat.device.type == "cpu"
        scratch = None if direct else torch.empty(min(block, len(flat)))
        for start in range(0, len(flat), block):
            here = flat[start : start + block]
            sums = here if scratch is None else scratch[: len(here)]
            sums.copy_(dense[start : start + block])
            for reader, factor in used:
                reader.add_(sums, start, factor)
            if scratch is not None:
                here.copy_(sums)

    def tensor(self, name: str, weights: Sequence[float], *, centred: bool = False) -> Tensor:
        """Return a routed tensor under these weights of the experts, in the dense one's dtype."""
        out = torch.empty_like(self.dense[name], memory_format=torch.contiguous_format)
        self.write_(out, name, self.about.coefficients(weights, centred=centred))
        return out

    def state_dict(self, weights: Sequence[float], *, centred: bool = False) -> dict[str, Tensor]:
        """Return all tensors of the model under these weights of the experts.

        Args:
            weights: One for each expert, not negative, of sum 1.
            centred: Add ``weights`` − 1/T in place of ``weights``: exact at uniform weights, with less noise elsewhere,
                for T times the work. For the dense average and unbiased stores.
        """
        routed = set(self._grouped)
        return {
            name: self.tensor(name, weights, centred=centred) if name in routed else self.dense[name]
            for name in self.dense
        }


def _may_lack(about: Experts) -> bool:
    """Whether a routed layer may be alike in all experts: adapters need not reach every layer."""
    return bool(expert_store[about.store].facts.factors)


def build_experts(
    base: Tensors | str | Path,
    experts: Sequence[Tensors | str | Path],
    routed: Iterable[str],
    *,
    dense: Dense = "average",
    sparsifier: str = "random_rescaled",
    density: float = 0.1,
    layout: str = "bitmask",
    values: str = "bf16",
    average: str | Mapping[str, Any] = "uniform",
    unit: Unit = "block",
    seed: int = 0,
    names: Sequence[str] | None = None,
    rank: int | None = None,
) -> ExpertSet:
    r"""Keep the routed layers of several experts apart, and average the rest, in memory.

    Args:
        base: The model that the experts were trained from: tensors by name, a ``Checkpoint``, or a reference to one.
        experts: At least two models of its architecture.
        routed: Names of the layers to keep apart; see :func:`modicum.weights.mediator.select_layers`.
        dense: What the routed layers' dense weights are: the average of the experts, or the base.
        sparsifier: Name of an expert store; ``modicum list expert_stores`` names them.
        density: Share of the entries that a store keeps, in (0, 1].
        layout: How a store writes the places of what it keeps.
        values: Dtype of the values: ``bf16``, ``int8`` or ``f32``.
        average: How the other layers are averaged: ``uniform``, or the name of a merge method, or a mapping with its
            ``name`` and knobs.
        unit: What a layer is; as the conflict was measured by.
        seed: Of what is drawn.
        names: What to call the experts.
        rank: Of ``low_rank``, in place of ``density``. A store has no use for ``density``, ``layout``, ``values`` or
            ``rank`` that is not among its knobs: all but ``density`` are refused then.

    Returns:
        The dense weights and the stored experts; ``state_dict(weights)`` gives a mixture.

    Raises:
        ModicumError: The models do not fit together, a layer is not there, or a knob is wrong.

    Example:
        >>> base = {"w": torch.zeros(4)}
        >>> models = [{"w": torch.tensor([1.0, -2, 0, 3])}, {"w": torch.tensor([1.0, 2, 0, 3])}]
        >>> built = build_experts(base, models, ["w"], dense="base", sparsifier="sign")
        >>> built.state_dict([1, 0])["w"].tolist(), built.nbytes
        ([1.5, -1.5, 1.5, 1.5], 10)

    Cost:
        One pass over all models for the average, and one over the routed layers.

    Reference:
        "Mediator", 2025, arXiv:2502.04411.
    """
    base, *experts = aligned([m if isinstance(m, Mapping) else open_checkpoint(m) for m in (base, *experts)])
    given = {"density": density, "layout": layout, "values": values, "rank": rank}
    refuse_idle(sparsifier, layout=(layout, "bitmask"), values=(values, "bf16"), rank=(rank, None))
    about = describe(
        base,
        experts,
        routed,
        dense=dense,
        store=sparsifier,
        knobs=knobs_of(sparsifier, given),
        unit=unit,
        seed=seed,
        names=names,
    )
    dense_weights = _dense(base, experts, about, average)
    parts: dict[str, Tensor] = {}
    for name, stores in plan_stores(base, experts, about).items():
        for t, store in stores.items():
            for part, tensor in store.encode(dense_weights[name], experts[t][name]).items():
                parts[part_name(t, name, part)] = tensor
    return ExpertSet(about, dense_weights, parts)


def _dense(
    base: Tensors, experts: Sequence[Tensors], about: Experts, average: str | Mapping[str, Any]
) -> dict[str, Tensor]:
    method, knobs = method_of(average)
    merged = merge_state_dicts(base, list(experts), method=method, **knobs, seed=about.seed)
    keep = set(about.routed) if about.dense == "base" else set()
    return {name: base[name] if (unit_of(name, about.unit) or name) in keep else merged[name] for name in merged}
