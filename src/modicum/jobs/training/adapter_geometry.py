"""How far an adapter's directions turned in training, and where they lie beside the change of a full fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.jobs.training.adapter_files import Pairs
    from modicum.weights.checkpoint import Checkpoint

    Change: TypeAlias = Callable[[str], Tensor]

SIDES = "AB"


def change_between(base: Checkpoint, full: Checkpoint, *, transposed: bool = False) -> Change:
    """Return a function that gives the change of a module's weight between two models, (out, in) and in float32.

    Args:
        base: The model before the fine-tune.
        full: The fine-tuned model, of the same shapes.
        transposed: The models store their weights as (in, out), as GPT-2 does.
    """

    def change(name: str) -> Tensor:
        delta = full[f"{name}.weight"].float() - base[f"{name}.weight"].float()
        return delta.mT if transposed else delta

    return change


def geometry(
    start: Pairs, final: Pairs, spectra: Mapping[str, Tensor], *, change: Change | None = None
) -> dict[str, Any]:
    """Measure an adapter's directions, module by module.

    Args:
        start: The factors that training started from.
        final: The trained factors of the same modules.
        spectra: Singular values of what preheating learned, where there was any.
        change: Gives a full fine-tune's change of a module.

    Returns:
        ``turned_A`` and ``turned_B``, mean principal angles in degrees between start and end (``None`` beside a zero
        factor); with ``spectra`` the share of their squares that the rank ``held``, and how the ``shares`` rise; with
        ``change`` the angles ``start_A``, ``end_A``, ``start_B`` and ``end_B`` to as many of its leading singular
        vectors.

    Cost:
        Without ``change``, thin decompositions of the factors; with it, one of each whole matrix.
    """
    from modicum.adapters.angles import mean_angle

    names = list(start)
    found: dict[str, Any] = {"modules": names}
    for place, side in enumerate(SIDES):
        pairs = [(_directions(start[name], place), _directions(final[name], place)) for name in names]
        found[f"turned_{side}"] = [mean_angle(before, after) for before, after in pairs]
    if change is not None:
        found |= _beside(start, final, change)
    learned = {name: S.double().square() for name, S in spectra.items() if name in start and S.any()}
    return found | _held(learned, {name: len(A) for name, (A, _) in start.items()}) if learned else found


def _directions(factors: tuple[Tensor, Tensor], place: int) -> Tensor:
    """Return the rows that span what a factor can reach: of the input for A, of the output for B."""
    return factors[1].mT if place else factors[0]


def _beside(start: Pairs, final: Pairs, change: Change) -> dict[str, list[float | None]]:
    from modicum.adapters.angles import mean_angle
    from modicum.linalg import truncated_svd

    found: dict[str, list[float | None]] = {f"{when}_{side}": [] for when in ("start", "end") for side in SIDES}
    for name in start:
        leading = truncated_svd(change(name), len(start[name][0]))
        # By their lengths, so that a direction in which nothing changed does not count.
        for place, wanted in enumerate(((leading.V * leading.S).mT, (leading.U * leading.S).mT)):
            for when, factors in (("start", start), ("end", final)):
                found[f"{when}_{SIDES[place]}"].append(mean_angle(_directions(factors[name], place), wanted))
    return found


def _held(learned: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Say which share of the preheated squares each rank holds, and how the shares rise with it over all modules."""
    import torch

    shares = {name: energy.cumsum(0) / energy.sum() for name, energy in learned.items()}
    # Short sides clip the spectra of some modules, which then hold everything.
    longest = max(map(len, shares.values()))
    whole = torch.stack([torch.nn.functional.pad(s, (0, longest - len(s)), value=1.0) for s in shares.values()])
    return {
        "held": [round(float(shares[n][rank - 1]), 4) if n in shares else None for n, rank in ranks.items()],
        "shares": {
            label: [round(value, 4) for value in torch.quantile(whole, at, dim=0).tolist()]
            for label, at in (("least", 0.0), ("median", 0.5), ("most", 1.0))
        },
    }
