"""Gradients for every rule: which there are, their norms, and scaling them in place.

Nothing here reads a number back from an accelerator. On the CPU, where a gradient's factor lies in the same memory as
the program, tensors whose factor is one are not touched at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from modicum.errors import UnsupportedError
from modicum.layout import unwrapped

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SLAB = 1 << 18  # elements of a gradient measured at once on the CPU


def named_tensors(params: Iterable[Any]) -> dict[str, Tensor]:
    """Return the tensors of ``params`` by name; tensors without a name are called by their position.

    Args:
        params: Tensors, or pairs of a name and a tensor such as ``model.named_parameters()``. One tensor under several
            names is kept once, under its first.

    Raises:
        UnsupportedError: There is no tensor, something that is not a tensor, or two tensors of one name.

    Example:
        >>> list(named_tensors(torch.nn.Linear(2, 3).named_parameters()))
        ['weight', 'bias']
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for position, item in enumerate([params] if isinstance(params, Tensor) else params):
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (str(position), item)
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(
                f"Parameter {name!r} is a {type(tensor).__name__}, expected a tensor. "
                "Pass model.parameters() or model.named_parameters()."
            )
        if id(tensor) in seen:
            continue
        # torch.compile and data-parallel wrappers prefix the names; the state must not depend on them.
        name = unwrapped(str(name))
        if name in found:
            raise UnsupportedError(f"Two different parameters are called {name!r}. Give each its own name.")
        seen.add(id(tensor))
        found[name] = tensor
    if not found:
        raise UnsupportedError("There are no parameters. Pass model.parameters() before the iterator is used up.")
    return found


def gradients(params: Iterable[tuple[str, Tensor]]) -> list[Tensor | None]:
    """Return each parameter's gradient, or ``None``; refuse sparse and complex ones.

    Raises:
        UnsupportedError: A gradient is sparse or complex.
    """
    found: list[Tensor | None] = []
    for name, param in params:
        grad = param.grad
        if grad is not None and (grad.layout is not torch.strided or grad.is_complex()):
            kind = "complex" if grad.is_complex() else "sparse"
            raise UnsupportedError(f"The gradient of {name!r} is {kind}, expected a dense real one. Leave it out.")
        if grad is not None and is_sharded(grad) and any(place.is_partial() for place in grad.placements):
            # Sums that are still owed have no norm yet; the optimiser would pay them in the next line anyway.
            param.grad = grad = _settled(grad)
        found.append(grad)
    return found


def tensor_norms(
    grads: Sequence[Tensor], *, dtype: torch.dtype = torch.float32, shards: bool = False
) -> Float[Tensor, " n"]:
    """Return the length of each gradient, accumulated in ``dtype``, on the device of the first.

    A sharded gradient (a ``DTensor``, as under FSDP2 or tensor parallelism) counts as the whole tensor: one all-reduce
    of the vector of squares for every dimension of the mesh over which it is split.

    Args:
        grads: Dense gradients of any floating type, on any devices.
        dtype: float32, or float64 for studies.
        shards: Leave the sum over ranks out, and measure this rank's part alone.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.ones(4)])
        tensor([5., 2.])

    Cost:
        One read of the gradients.
    """
    parts = [local(grad) for grad in grads]
    groups, meshes = _grouped(range(len(parts)), parts), {} if shards else _meshes(grads)
    if len(groups) == 1 and not meshes:
        return _local_norms(parts, dtype)
    norms = list(parts)
    for group in groups:
        for place, norm in zip(group, _local_norms([parts[i] for i in group], dtype).unbind()):
            norms[place] = norm
    for (mesh, dims), members in meshes.items():
        squares = torch.stack([norms[i] for i in members]).square()
        for dim in dims:
            dist.all_reduce(squares, group=mesh.get_group(dim))
        for place, norm in zip(members, squares.sqrt().unbind()):
            norms[place] = norm
    first = norms[0].device
    return torch.stack([norm.to(first, non_blocking=True) for norm in norms])


def scale_(grads: Sequence[Tensor], factors: Float[Tensor, " n"]) -> None:
    """Multiply each gradient by its factor, in place; a factor of zero erases it, even where it holds infinities.

    Example:
        >>> grads = [torch.ones(2), torch.tensor([float("inf")])]
        >>> scale_(grads, torch.tensor([0.5, 0.0])); grads
        [tensor([0.5000, 0.5000]), tensor([0.])]

    Cost:
        One read and write of the gradients that change; on an accelerator of all of them, and a second for the erasing.
    """
    parts = [local(grad) for grad in grads]
    on_host = factors.device.type == "cpu" and all(part.device.type == "cpu" for part in parts)
    (_scale_on_host if on_host else _scale_on_device)(parts, factors)


def _scale_on_host(parts: Sequence[Tensor], factors: Tensor) -> None:
    """Scale what needs it; the factors lie in the program's own memory, so reading them waits for nothing."""
    values, each = factors.tolist(), factors.unbind()
    for part, value in zip(parts, values):
        if value == 0:
            part.zero_()
    changed = [i for i, value in enumerate(values) if value not in (0, 1)]
    for group in _grouped(changed, parts):
        # Tensors without dimensions are multiplied faster than Python numbers.
        torch._foreach_mul_([parts[i] for i in group], [each[i] for i in group])


def _scale_on_device(parts: Sequence[Tensor], factors: Tensor) -> None:
    """Scale everything, whatever the factors are: to look at them would wait for the device."""
    for group in _grouped(range(len(parts)), parts):
        here = factors.to(parts[group[0]].device, non_blocking=True)
        each, erased = here.unbind(), (here == 0).unbind()
        torch._foreach_mul_([parts[i] for i in group], [each[i] for i in group])
        for i in group:
            # Zero times infinity is not zero.
            parts[i].masked_fill_(erased[i], 0)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing memory; any other tensor as it is."""
    if is_sharded(tensor):
        part: Tensor = tensor.to_local()
        return part
    return tensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Tell whether ``tensor`` is a DTensor, without importing that machinery where no process group exists."""
    # Asked of every gradient in every step: the plain answer must be quick.
    if type(tensor) is Tensor or not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _settled(grad: DTensor) -> Tensor:
    from torch.distributed.tensor import Replicate

    settled: Tensor = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
    return settled


def _local_norms(grads: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, " n"]:
    """Return the norms of tensors on one device and of one type."""
    wide = torch.promote_types(dtype, grads[0].dtype)
    if grads[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(grads), 2, dtype=wide)).to(dtype)
    # On the CPU this function adds up 28 million float32 squares with an error of 1e-3, and copies a whole tensor that
    # it must convert. Slabs of this size are exact to a few 1e-6, and their copies stay in the cache.
    slabs: list[Tensor] = []
    owners: list[int] = []
    for owner, grad in enumerate(grads):
        long = grad.numel() > SLAB and grad.is_contiguous()
        parts = torch.split(grad.view(-1), SLAB) if long else (grad,)
        slabs.extend(parts)
        owners.extend([owner] * len(parts))
    norms = torch.stack(torch._foreach_norm(slabs, 2, dtype=wide))
    if len(slabs) > len(grads):
        norms = norms.new_zeros(len(grads)).index_add_(0, torch.tensor(owners), norms.square()).sqrt_()
    return norms.to(dtype)


def _grouped(places: Iterable[int], tensors: Sequence[Tensor]) -> list[list[int]]:
    """Group positions by device and type, which is what the many-tensor operations ask for."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place in places:
        groups.setdefault((tensors[place].device, tensors[place].dtype), []).append(place)
    return list(groups.values())


def _meshes(grads: Sequence[Tensor]) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    """Group the sharded gradients by mesh and by the dimensions of it over which they are split."""
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for place, grad in enumerate(grads):
        if is_sharded(grad):
            dims = tuple(d for d, p in enumerate(grad.placements) if not p.is_replicate())
            if dims:
                groups.setdefault((grad.device_mesh, dims), []).append(place)
    return groups
