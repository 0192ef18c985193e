"""The tensors that a zeroth-order optimizer moves, and how each of them gets its part of a random direction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.layout import unwrapped
from modicum.optim.zeroth_order.lifts import Lift, Scale, scales
from modicum.patterns import Pattern
from modicum.random import generator

Distribution: TypeAlias = Literal["normal", "rademacher"]
Ranks: TypeAlias = Callable[[Mapping[str, Tensor]], Mapping[str, int]]

NONE_LEFT = "No parameter is left to train. Check requires_grad, include, exclude and vectors."
CHUNK = 1 << 20  # entries drawn at a time: no full-size temporary, and results that do not depend on shards


class Chunk(NamedTuple):
    """A run of rows of a dense tensor: where it lies here, and which part of which global chunk it is."""

    rows: slice
    number: int
    length: int
    part: slice


@dataclass(eq=False)
class Leaf:
    """One trainable tensor; ``rank`` 0 means that its direction is dense."""

    name: str
    param: Tensor
    group: dict[str, Any]
    rank: int = 0
    coordinates: slice = field(default_factory=lambda: slice(0, 0))
    probe_scale: float = 1.0
    update_scale: float = 1.0
    basis: tuple[Tensor, ...] = ()

    @property
    def stands_for_quantized(self) -> bool:
        """Whether the parameter only lends its shape to a weight that cannot be written."""
        return bool(getattr(self.param, "stands_for_quantized", False))

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 weights, else float32."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape as a matrix or a stack of matrices; a convolution kernel counts as (out, rest)."""
        shape = tuple(self.param.shape)
        return shape if len(shape) <= 3 else (shape[0], math.prod(shape[1:]))

    def local(self) -> Tensor:
        """This process's rows of the tensor, sharing its memory."""
        data = self.param.detach()
        return data.to_local() if hasattr(data, "to_local") else data

    def rows(self) -> slice:
        """Which rows (first dimension) of the global tensor lie in this process."""
        data: Any = self.param.detach()
        if not hasattr(data, "to_local"):
            return slice(0, data.shape[0] if data.dim() else 1)
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if any(not isinstance(p, Replicate) and p != Shard(0) for p in data.placements):
            raise UnsupportedError(f"{self.name} is sharded as {data.placements}, expected Shard(0) or Replicate().")
        shape, offset = compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements)
        return slice(offset[0], offset[0] + shape[0])

    def matrix(self) -> Tensor:
        """The local rows as a matrix or stack of matrices."""
        data = self.local()
        return data.view(data.shape[0], -1) if data.dim() > 3 else data

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The local rows, cut along the boundaries of the global chunks."""
        data, here = self.local(), self.rows()
        total = self.param.shape[0] if self.param.dim() else 1
        length = max(1, CHUNK // max(1, math.prod(data.shape[1:])))
        cut = []
        for index in range(here.start // length, math.ceil(here.stop / length)):
            start, stop = index * length, min((index + 1) * length, total)
            low, high = max(start, here.start), min(stop, here.stop)
            rows, part = slice(low - here.start, high - here.start), slice(low - start, high - start)
            cut.append(Chunk(rows, index, stop - start, part))
        return tuple(cut)

    def draw(
        self, chunk: Chunk, *, seed: int, step: int, query: int, purpose: str = "dense", how: Distribution = "normal"
    ) -> Tensor:
        """Draw the chunk of a dense direction, on the tensor's device."""
        data = self.local()
        shape = (chunk.length, *data.shape[1:])
        rng = generator(seed, purpose, step, query, self.name, chunk.number, device=data.device)
        options: dict[str, Any] = {"generator": rng, "device": data.device, "dtype": self.compute_dtype}
        if how == "normal":
            return torch.randn(shape, **options)[chunk.part]
        return torch.randint(0, 2, shape, **options).mul_(2).sub_(1)[chunk.part]

    def prepare(self, lift: Lift, *, seed: int, epoch: int) -> None:
        """Draw the kept factors of ``epoch``; whole, then cut to the local rows, so that shards agree."""
        data, here = self.local(), self.rows()
        factors = lift.basis(self.shape, rank=self.rank, seed=seed, name=self.name, epoch=epoch)
        stacked = len(self.shape) == 3
        # The row factor, when there are two, comes first; of a stack every factor is cut.
        cut = [f[here] if stacked or (len(factors) == 2 and i == 0) else f for i, f in enumerate(factors)]
        self.basis = tuple(f.to(data.device, data.dtype, copy=True) for f in cut)

    def factors(self, lift: Lift, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Lift the vector of all coordinates to this leaf's ``(left, right)``, for the local rows."""
        part = coordinates[self.coordinates].to(self.basis[0].device, self.compute_dtype)
        part = part.view(*self.shape[:-2], -1, self.rank)
        if lift.rowwise or len(self.shape) == 3:
            part = part[self.rows()]
        return lift.factors(self.basis, part)


def checked(params: Any) -> list[Any]:
    """Return the parameters as a list, refusing empty lists and duplicates."""
    if isinstance(params, Tensor):
        raise RecipeError("params is one tensor, expected an iterable of parameters such as model.named_parameters().")
    items = list(params)
    if not items:
        raise RecipeError("params is empty, expected parameters such as model.named_parameters().")
    flat: list[Any] = []
    for item in items:
        if isinstance(item, dict):
            if unread := sorted(item.keys() - {"params", "lr", "initial_lr", "param_names", "name"}):
                raise UnsupportedError(
                    f"A parameter group sets {', '.join(unread)}, which would be ignored: a zeroth-order optimizer has "
                    "lr alone for each group. Give it to the optimizer, or leave parameters out by exclude."
                )
            item["params"] = [item["params"]] if isinstance(item["params"], Tensor) else list(item["params"])
            flat += item["params"]
        else:
            flat.append(item)
    tensors = [item[1] if isinstance(item, tuple) else item for item in flat]
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise RecipeError("params holds a parameter twice. Give each one once; named_parameters() does.")
    return items


def collect(
    groups: Sequence[dict[str, Any]], *, include: Sequence[str] | None, exclude: Sequence[str], vectors: str
) -> list[Leaf]:
    """Return the leaves of an optimizer's parameter groups, in their order.

    Raises:
        RecipeError: Nothing is left to train, or two parameters share memory or a name.
        UnsupportedError: A tensor cannot be moved: integer, on the meta device, or an FSDP1 flat parameter.
    """
    leaves: list[Leaf] = []
    seen: dict[tuple[int, int], str] = {}
    count = 0
    for group in groups:
        names = group.get("param_names") or [str(count + i) for i in range(len(group["params"]))]
        count += len(names)
        # Directions and states are found by name: they must not depend on what surrounds the model.
        for name, param in zip(map(unwrapped, names), group["params"], strict=True):
            check(name, param)
            if not is_moved(name, param, include=include, exclude=exclude, vectors=vectors):
                continue
            where = (param.detach().data_ptr(), param.numel()) if not hasattr(param, "to_local") else (0, 0)
            if where[0] and where in seen:
                raise RecipeError(f"{seen[where]} and {name} share their memory. Give one Parameter to both modules.")
            seen[where] = name
            leaves.append(Leaf(name, param, group))
    if not leaves:
        raise RecipeError(NONE_LEFT)
    if len({leaf.name for leaf in leaves}) < len(leaves):
        raise RecipeError("Two parameters have the same name, so they would get the same direction. Rename one.")
    return leaves


def is_moved(name: str, param: Tensor, *, include: Sequence[str] | None, exclude: Sequence[str], vectors: str) -> bool:
    """Whether an optimizer of these knobs moves a parameter."""
    wanted = include is None or _matches(name, include, "include")
    frozen = vectors == "freeze" and param.dim() < 2
    return param.requires_grad and wanted and not frozen and not _matches(name, exclude, "exclude")


def check(name: str, param: Tensor) -> None:
    """Raise unless the tensor can be moved by a random direction."""
    if param.is_meta:
        raise UnsupportedError(f"{name} is on the meta device and holds no values. Load the model's weights first.")
    if type(param).__name__ == "FlatParameter" or hasattr(param, "_is_flat_param"):
        raise UnsupportedError(f"{name} is an FSDP1 flat parameter, which has no matrices. Use FSDP2 (fully_shard).")
    if not param.is_floating_point():
        raise UnsupportedError(
            f"{name} is {str(param.dtype).removeprefix('torch.')}: a quantized weight cannot be changed in place. "
            "Pass trainable_weights(model) as parameters, with engine='adapter'."
        )


def assign_ranks(leaves: Iterable[Leaf], lift: Lift, *, ranks: Ranks, dense: Sequence[str], scale: Scale) -> int:
    """Give each matrix its rank, scales and place in the vector of coordinates; return that vector's length."""
    matrices = {leaf.name: leaf for leaf in leaves if len(leaf.shape) >= 2 and not _matches(leaf.name, dense, "dense")}
    chosen = ranks({name: leaf.param.detach() for name, leaf in matrices.items()})
    clamped = []
    offset = 0
    for name, leaf in matrices.items():
        rank, limit = chosen[name], min(leaf.shape[-2:])
        if rank > limit:
            clamped.append(f"{name} ({leaf.shape[-2]} × {leaf.shape[-1]})")
        leaf.rank = min(rank, limit)
        leaf.probe_scale, leaf.update_scale = scales(scale, lift.energy(leaf.shape, rank=leaf.rank))
        size = lift.size(leaf.shape, rank=leaf.rank)
        leaf.coordinates = slice(offset, offset + size)
        offset += size
    if clamped:
        more = f" and {len(clamped) - 1} more" if len(clamped) > 1 else ""
        warnings.warn(
            f"The rank is larger than {clamped[0]}{more}; the smaller side is used there.", UserWarning, stacklevel=5
        )
    return offset


def _matches(name: str, patterns: Sequence[str], what: str) -> bool:
    return any(Pattern(pattern, what).finds(name) for pattern in patterns)
