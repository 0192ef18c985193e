"""Making adapters that any server loads: one rank, one scaling, no dependence on a shifted base.

Servers such as vLLM read one rank and one alpha for the whole adapter and ignore the patterns of single modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modicum.adapters.hrp import Factors
from modicum.errors import ModicumError


def uniform(adapter: Mapping[str, tuple[Tensor, Tensor, float]], *, scaling: float = 1.0) -> dict[str, Factors]:
    """Pad every module with zeros to the largest rank, and move its scaling into B.

    Args:
        adapter: A (rank, in), B (out, rank) and scaling by module.
        scaling: The scaling that the result will be loaded with.

    Returns:
        Factors whose ``scaling * B @ A`` is each module's change as before.

    Raises:
        ModicumError: There is no module, or a change would not survive the round trip.

    Example:
        >>> one = (torch.ones(1, 2), torch.ones(3, 1), 4.0)
        >>> A, B = uniform({"one": one, "two": (torch.ones(2, 2), torch.ones(3, 2), 1.0)}, scaling=2.0)["one"]
        >>> A.shape, B
        (torch.Size([2, 2]), tensor([[2., 0.],
                [2., 0.],
                [2., 0.]]))
    """
    if not adapter:
        raise ModicumError("The adapter changes no module. Check that it was saved whole.")
    rank = max(A.shape[0] for A, _, _ in adapter.values())
    made = {}
    for name, (A, B, own) in adapter.items():
        missing = rank - A.shape[0]
        wide = torch.nn.functional.pad(A, (0, 0, 0, missing))
        tall = torch.nn.functional.pad((B.float() * (own / scaling)).to(B.dtype), (0, missing))
        before, after = own * (B.double() @ A.double()), scaling * (tall.double() @ wide.double())
        _check_same(name, before=before, after=after, dtype=B.dtype)
        made[name] = (wide, tall)
    return made


def without_shift(trained: Factors, initial: Factors) -> Factors:
    r"""Return factors that give on the original base what ``trained`` gives on the base that ``initial`` shifted.

    .. math::
        B A - B_0 A_0 = \begin{bmatrix} B & -B_0 \end{bmatrix} \begin{bmatrix} A \\ A_0 \end{bmatrix}

    Args:
        trained: Factors after training.
        initial: The factors that the adapter started from, which left the base.

    Returns:
        Factors of twice the rank, for the same scaling: alpha doubles, or grows by the root of 2 under rsLoRA.

    Example:
        >>> A, B = without_shift((torch.ones(1, 2), torch.ones(2, 1)), (torch.ones(1, 2), torch.ones(2, 1)))
        >>> float((B @ A).abs().max())
        0.0
    """
    (A, B), (A0, B0) = trained, initial
    return torch.cat([A, A0.to(A)]), torch.cat([B, -B0.to(B)], dim=1)


def alpha_for(scaling: float, rank: int, *, rslora: bool = False) -> float:
    """Return the alpha that gives ``scaling`` at ``rank``.

    Example:
        >>> alpha_for(2.0, 16), alpha_for(2.0, 16, rslora=True)
        (32.0, 8.0)
    """
    return scaling * (math.sqrt(rank) if rslora else rank)


def _check_same(name: str, *, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    # B is rounded once when its scaling moves into it: by up to 2^-9 of each entry in bfloat16.
    tolerance = 4 * torch.finfo(dtype).eps
    if not (after - before).norm() <= tolerance * before.norm():
        raise ModicumError(f"{name}: its change would not survive the export. Are its factors finite?")
