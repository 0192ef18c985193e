r"""Probing without touching the weights: each module adds its low-rank branch to what it computes.

For a linear layer :math:`y = xW^\top + ((xR)\,L^\top)`, where :math:`L R^\top` is what was learned so far plus the
perturbation. Two ways to compute the same: the branch beside the layer, or the sum of the matrices in a scratch buffer
for the length of one call, whichever is less work for the number of tokens.

With several branches (``paired``) the batch carries the rows of all points one after another, and every module gives
each block of rows its own coordinates, so that one forward pass answers all of a step's questions.

A weight is seen where its own module uses it. A module that reads another module's weight by hand stays unperturbed
there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modicum.errors import UnsupportedError
from modicum.optim.zeroth_order.leaves import Leaf
from modicum.optim.zeroth_order.lifts import Lift

Places: TypeAlias = list[tuple[nn.Module, str]]

SCRATCH = 1 << 24  # entries of the largest matrix that may be summed in a scratch buffer


@dataclass(frozen=True)
class Branch:
    """A point of the loss surface: coordinates of the low-rank part, and values of the dense tensors."""

    coordinates: Tensor | None
    dense: Mapping[Leaf, Tensor]


def dropouts(model: nn.Module) -> list[str]:
    """Return the modules of a model that drop at random in training mode, with the rates."""
    return [
        f"{name or 'the model'} ({type(module).__name__}, {rate})"
        for name, module in model.named_modules()
        if (rate := _dropout(module))
    ]


def require_deterministic(model: nn.Module) -> None:
    """Raise when a module would give two answers to one question.

    Raises:
        UnsupportedError: Dropout or batch normalization is in training mode.
    """
    for name, module in model.named_modules():
        if module.training and (_dropout(module) or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            raise UnsupportedError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode, so the two losses of a step "
                "would differ by chance. Call model.eval() first."
            )


def random_states(devices: Iterable[torch.device]) -> list[Tensor]:
    """Return where the global streams of random numbers stand, the processor's and those of some devices."""
    states = [torch.get_rng_state()]
    for device in devices:
        if device.type != "cpu" and hasattr(module := torch.get_device_module(device), "get_rng_state"):
            states.append(module.get_rng_state(device))
    return states


def trainable_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return named parameters for an adapter engine, with a stand-in for each quantized linear weight.

    A stand-in has the weight's shape and takes no memory; the optimizer learns low-rank coordinates for it, and the
    quantized weight stays as it is. Everything else is frozen, as usual on a quantized base.
    """
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        sized = isinstance(getattr(module, "in_features", None), int) and isinstance(
            getattr(module, "out_features", None), int
        )
        if not sized:
            continue
        if isinstance(weight, nn.Parameter) and weight.is_floating_point():
            found.append((f"{name}.weight", weight))
            continue
        device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
        shape = (module.out_features, module.in_features)
        stand_in = nn.Parameter(torch.zeros((), device=device).expand(shape))
        stand_in.stands_for_quantized = True  # type: ignore[attr-defined]
        found.append((f"{name}.weight", stand_in))
    return found


class ProbeHooks:
    """Hooks that make a model compute at the points of :attr:`current`.

    Args:
        model: The model whose forward passes give the loss.
        leaves: The tensors to perturb.
        lift: How coordinates become directions.
        paired: Whether a batch will carry several points.
    """

    def __init__(self, model: nn.Module, leaves: Sequence[Leaf], lift: Lift | None, *, paired: bool) -> None:
        self.current: list[Branch] = [Branch(None, {})]
        self.model = model
        self.owners = owners(model, leaves)
        self._lift, self._paired = lift, paired
        self._seen: set[str] = set()
        self._probing = False
        self._handles: list[Any] = []
        self._swapped: dict[nn.Module, dict[str, Any]] = {}
        self._scratch: Tensor | None = None
        by_module: dict[nn.Module, dict[str, Leaf]] = {}
        for leaf, places in self.owners.items():
            for module, name in places:
                by_module.setdefault(module, {})[name] = leaf
        if lift is not None:
            for module, held in by_module.items():
                self._hook(module, held)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def run(self, branches: list[Branch], closure: Callable[[], Any]) -> Any:
        """Call ``closure`` with the model at these points.

        Raises:
            UnsupportedError: A leaf's module took no part, so its perturbation would have no effect.
        """
        self.current, self._probing = branches, True
        try:
            result = closure()
        finally:
            self._probing = False
        missing = [leaf.name for leaf in self.owners if leaf.name not in self._seen]
        if missing:
            raise UnsupportedError(
                f"The forward pass never called the module of {missing[0]}. Exclude that parameter, or use "
                "engine='mutate'."
            )
        return result

    def _hook(self, module: nn.Module, held: dict[str, Leaf]) -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._probing:
                self._seen.update(leaf.name for leaf in held.values())
            swap = self._values(module, held, inputs)
            if swap:
                self._swapped[module] = {name: module._parameters[name] for name in swap}
                for name, value in swap.items():
                    module._parameters[name] = value  # type: ignore[assignment]

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            swapped = self._swapped.pop(module, {})
            module._parameters.update(swapped)
            return None if output is None else self._add(module, held, inputs, output, set(swapped))

        kind = _kind(module)
        if self._paired and kind == "other":
            raise UnsupportedError(
                f"engine='paired' cannot give the rows of a batch different weights inside {type(module).__name__} "
                f"({next(iter(held.values())).name}). Use engine='adapter', or exclude it."
            )
        self._handles.append(module.register_forward_pre_hook(before))
        # always_call: a forward pass that fails must not leave a scratch weight behind.
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _values(self, module: nn.Module, held: dict[str, Leaf], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """Parameters to exchange for the length of this call."""
        kind, single = _kind(module), len(self.current) == 1
        values: dict[str, Tensor] = {}
        for name, leaf in held.items():
            dense = [branch.dense.get(leaf) for branch in self.current]
            if not leaf.rank:
                if dense[0] is None:
                    continue
                if single:
                    values[name] = dense[0]
                elif kind == "scale":
                    values[name] = _rowwise(_present(dense), inputs[0])
            elif single and self.current[0].coordinates is not None and self._sums(module, leaf, inputs):
                # Such a module is done with its only matrix, and with all inside it, before another begins.
                alone = kind in ("linear", "conv1d") and sum(leaf.rank > 0 for leaf in held.values()) == 1
                alone = alone and next(module.children(), None) is None
                values[name] = self._sum(leaf, *self._factors(leaf, self.current[0]), alone=alone)
        return values

    def _sum(self, leaf: Leaf, left: Tensor, right: Tensor, *, alone: bool) -> Tensor:
        """Return weight and direction together, for the length of a call."""
        weight = leaf.matrix()
        left, right = left.to(weight.dtype), right.to(weight.dtype)
        if weight.dim() == 3:
            return torch.baddbmm(weight, left, right.mT)
        # One buffer then serves all modules and stays in the cache. With gradients on, the result may be remembered
        # for a backward pass, and needs memory of its own.
        out = self._buffer(weight) if alone and not torch.is_grad_enabled() else None
        return torch.addmm(weight, left, right.mT, out=out).view(leaf.param.shape)

    def _buffer(self, like: Tensor) -> Tensor:
        """Return a matrix of this form whose content the next caller overwrites."""
        held = self._scratch
        if held is None or held.numel() < like.numel() or (held.dtype, held.device) != (like.dtype, like.device):
            with torch.inference_mode(False):  # made inside, it could not be written outside
                held = self._scratch = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
        return held[: like.numel()].view(like.shape)

    def _sums(self, module: nn.Module, leaf: Leaf, inputs: tuple[Any, ...]) -> bool:
        """Whether to add the direction to the weight in a scratch buffer rather than beside it."""
        kind = _kind(module)
        if kind not in ("linear", "conv1d"):
            return kind != "embedding"
        if leaf.stands_for_quantized or leaf.param.numel() > SCRATCH:
            return False
        tokens = math.prod(inputs[0].shape[:-1])
        # Multiplications of both ways, over the rank; a sum also goes through the weight once more.
        return tokens * (leaf.shape[0] + leaf.shape[1]) > 1.5 * leaf.shape[0] * leaf.shape[1]

    def _factors(self, leaf: Leaf, branch: Branch) -> tuple[Tensor, Tensor]:
        if self._lift is None or branch.coordinates is None:
            raise UnsupportedError(f"{leaf.name} has no coordinates to compute with.")
        return leaf.factors(self._lift, branch.coordinates)

    def _add(
        self, module: nn.Module, held: dict[str, Leaf], inputs: tuple[Any, ...], output: Tensor, done: set[str]
    ) -> Tensor:
        """Add the effect of a module's perturbed parameters to its output."""
        kind, blocks = _kind(module), len(self.current)
        x = inputs[0]
        if blocks > 1 and x.shape[0] % blocks:
            raise UnsupportedError(
                f"{type(module).__name__} got {x.shape[0]} rows, expected a multiple of the {blocks} branches. Repeat "
                "every input of the model, positions included, as expand_batch does."
            )
        weight = held.get("weight")
        beside = kind in ("linear", "conv1d", "embedding") and weight is not None and weight.rank
        if weight is not None and beside and "weight" not in done and self.current[0].coordinates is not None:
            output = self._low_rank(module, weight, x, output)
        if blocks == 1:
            return output
        if kind == "layer_norm":
            return self._layer_norm(module, held, x)
        for name in ("weight", "bias"):
            leaf = held.get(name)
            if leaf is None or leaf.rank or self.current[0].dense.get(leaf) is None or name in done:
                continue
            if name == "weight":
                raise UnsupportedError(f"engine='paired' cannot perturb {leaf.name} densely. Use engine='adapter'.")
            change = torch.stack(_present([b.dense.get(leaf) for b in self.current])) - leaf.param.detach()
            output = (output.view(blocks, -1, output.shape[-1]) + change.unsqueeze(1)).view(output.shape)
        return output

    def _low_rank(self, module: nn.Module, leaf: Leaf, x: Tensor, output: Tensor) -> Tensor:
        pairs = [self._factors(leaf, branch) for branch in self.current]
        blocks, width = len(pairs), output.shape[-1]
        left = pairs[0][0][None] if blocks == 1 else torch.stack([pair[0] for pair in pairs])
        left, right = left.to(output.dtype), pairs[0][1].to(output.dtype)
        flat = output.view(blocks, -1, width)
        if isinstance(module, nn.Embedding):
            ids = x.reshape(blocks, -1)
            rows = torch.stack([part[index] for part, index in zip(left, ids)])
            inner, outer = rows, right.mT.expand(blocks, -1, -1)
        elif _kind(module) == "conv1d":
            # Conv1D stores (in, out): its rows are the inputs.
            inner = torch.bmm(x.reshape(blocks, -1, x.shape[-1]).to(output.dtype), left)
            outer = right.mT.expand(blocks, -1, -1)
        else:
            inner = (x.reshape(-1, x.shape[-1]).to(output.dtype) @ right).view(blocks, -1, right.shape[-1])
            outer = left.mT
        # The output is fresh, so it is added to in place: no second activation of its size.
        if blocks == 1:
            flat[0].addmm_(inner[0], outer[0])
        else:
            flat.baddbmm_(inner, outer)
        return output

    def _layer_norm(self, module: nn.Module, held: dict[str, Leaf], x: Tensor) -> Tensor:
        norm: Any = module
        of = functional.layer_norm if isinstance(norm, nn.LayerNorm) else functional.rms_norm
        normal = of(x, norm.normalized_shape, eps=norm.eps)
        values: dict[str, Tensor | None] = {}
        for name in ("weight", "bias"):
            leaf, own = held.get(name), module._parameters.get(name)
            dense = [branch.dense.get(leaf) for branch in self.current] if leaf is not None else [None]
            values[name] = own if dense[0] is None else _rowwise(_present(dense), x)
        scaled = normal if values["weight"] is None else normal * values["weight"]
        return scaled if values["bias"] is None else scaled + values["bias"]


def owners(model: nn.Module, leaves: Sequence[Leaf]) -> dict[Leaf, Places]:
    """Find the modules that hold each leaf, all of them for a tied weight.

    Raises:
        UnsupportedError: The model does not hold a leaf.
    """
    by_id = {id(leaf.param): leaf for leaf in leaves}
    found: dict[Leaf, Places] = {leaf: [] for leaf in leaves}
    modules = dict(model.named_modules())
    for module in modules.values():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in by_id:
                found[by_id[id(parameter)]].append((module, name))
    for leaf, places in found.items():
        if leaf.stands_for_quantized:
            owner = leaf.name.removesuffix(".weight")
            if owner in modules:
                places.append((modules[owner], "weight"))
        if not places:
            raise UnsupportedError(
                f"The model does not hold {leaf.name}. Attach the model whose parameters were given."
            )
    return found


def expand_batch(batch: Mapping[str, Any], branches: int) -> dict[str, Any]:
    """Repeat every tensor of a batch for ``engine="paired"``, all rows once for each branch.

    Example:
        >>> expand_batch({"ids": torch.tensor([[1, 2], [3, 4]])}, 2)["ids"].tolist()
        [[1, 2], [3, 4], [1, 2], [3, 4]]
    """
    return {
        key: value.repeat(branches, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value
        for key, value in batch.items()
    }


def _dropout(module: nn.Module) -> str:
    """Return the rate at which a module drops in training mode; nothing where it does not."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return f"p {module.p:g}" if module.p > 0 else ""
    # Modules that call the function keep its rate under a name of their own.
    rates = ((key, rate) for key, rate in vars(module).items() if "drop" in key and isinstance(rate, float))
    return ", ".join(f"{key} {rate:g}" for key, rate in rates if rate > 0)


def _kind(module: nn.Module) -> str:
    """Return how a module uses its parameters; those of ``other`` modules are exchanged for a call."""
    name = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embedding" if module.max_norm is None and type(module).forward is nn.Embedding.forward else "other"
    if name == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "layer_norm"
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return "linear"
    return "scale" if name.endswith("RMSNorm") else "other"


def _rowwise(values: list[Tensor], x: Tensor) -> Tensor:
    """Give each row of the batch its branch's vector, shaped to broadcast over the dimensions between."""
    rows = torch.stack(values).repeat_interleave(x.shape[0] // len(values), dim=0)
    return rows.view(x.shape[0], *[1] * (x.dim() - 2), -1)


def _present(values: Sequence[Tensor | None]) -> list[Tensor]:
    return [value for value in values if value is not None]
