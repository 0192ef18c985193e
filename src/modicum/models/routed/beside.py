"""LoRA experts beside the dense weights: rows of one batch may have different experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from modicum.weights.experts import ExpertSet


class SidePath:
    r"""Adds to every routed module the weighted products of the experts' factors.

    .. math::
        y = x D^\top + \sum_t w_t\, s_t\, (x A_t^\top) B_t^\top

    The factors of all experts stand side by side, so that a batch of any mixture costs two thin products a module.

    Args:
        host: The model; its routed weights must be the dense ones while the path is in use.
        experts: Experts whose parts are all factors.
        names: Names of the routed tensors, with the host's names of them.
    """

    def __init__(self, host: nn.Module, experts: ExpertSet, names: dict[str, str]) -> None:
        self.rows: Tensor | None = None
        self.factors: dict[nn.Module, tuple[Tensor, Tensor, list[int]]] = {}
        for name, own in names.items():
            module = host.get_submodule(own.rpartition(".")[0])
            found = [experts.reader(name, t) for t in range(len(experts.about.names))]
            like: Any = module.weight
            a = [r.parts["A"] if r else None for r in found]
            b = [r.parts["B"] * r.scale if r else None for r in found]  # type: ignore[attr-defined]
            if isinstance(module, Conv1D):  # stores its weight as (inputs, outputs)
                a, b = [None if x is None else x.T for x in b], [None if x is None else x.T for x in a]
            ranks = [0 if x is None else x.shape[0] for x in a]
            down = torch.cat([x for x in a if x is not None]).to(like)
            up = torch.cat([x for x in b if x is not None], 1).to(like)
            self.factors[module] = (down, up, ranks)

    @staticmethod
    def fits(experts: ExpertSet) -> bool:
        """Whether all that differs between the experts is matrices with factors."""
        return experts.about.dense == "base" and all(
            {"A", "B"} <= set(reader.parts)
            for name in experts.routed
            for t in range(len(experts.about.names))
            if (reader := experts.reader(name, t)) is not None
        )

    def _add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self.rows is not None  # noqa: S101
        x = args[0]
        down, up, ranks = self.factors[module]
        if (down.dtype, down.device) != (x.dtype, x.device):  # the model was moved
            down, up = down.to(x), up.to(x)
            self.factors[module] = down, up, ranks
        each = self.rows.to(x).repeat_interleave(torch.tensor(ranks, device=x.device), dim=1)
        if len(each) != len(x):  # beams and samples of one request are rows of their own
            each = each.repeat_interleave(len(x) // len(each), dim=0)
        thin = functional.linear(x, down) * each[:, None, :]
        return (
            output.add_(functional.linear(thin, up))
            if not output.requires_grad
            else output + functional.linear(thin, up)
        )

    @contextmanager
    def __call__(self, rows: Tensor | Sequence[Sequence[float]]) -> Iterator[None]:
        """Answer each row of a batch by its own weights of the experts while the block runs."""
        self.rows = torch.as_tensor(rows)
        # Only as long as they are needed: a hook in Python costs every step of a plain request, too.
        handles = [module.register_forward_hook(self._add) for module in self.factors]
        try:
            yield
        finally:
            self.rows = None
            for handle in handles:
                handle.remove()
