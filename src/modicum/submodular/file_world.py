"""Objectives that stand in a file, for comparisons on a user's own values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.borders import expanded
from modicum.errors import CheckpointError, RecipeError
from modicum.submodular.functions.facility import FacilityLocation


class FileWorld:
    """Facility location whose values are read from safetensors.

    Args:
        path: A file with ``V``, (rows, elements) for all rounds or (rounds, rows, elements), and if needed ``weights``.
        blocks: Number of actions of each agent.

    Raises:
        CheckpointError: The file cannot be read.
        RecipeError: It holds no ``V``, or other elements than the blocks.
    """

    def __init__(self, path: str, blocks: Sequence[int]) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(expanded(path), framework="pt") as file:
                names = sorted(file.keys())
                tensors = {name: file.get_tensor(name) for name in ("V", "weights") if name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"Cannot read {path}: {error}.") from None
        if "V" not in tensors:
            held = ", ".join([*names[:5], *(["…"] if names[5:] else [])]) or "nothing"
            raise RecipeError(f"{path} holds {held}, expected V (rows, elements).")
        self.V, self.weights = tensors["V"], tensors.get("weights")
        self.blocks = list(blocks)
        self.rounds = len(self.V) if self.V.ndim == 3 else None  # how many there can be
        if self.V.ndim not in (2, 3) or self.V.shape[-1] != sum(blocks):
            raise RecipeError(f"{path}: V has shape {tuple(self.V.shape)}, but blocks cover {sum(blocks)} elements.")
        self.round, self.count = 0, 0
        self._made: dict[int, FacilityLocation] = {}

    def of(self, seeds: Sequence[int]) -> FileWorld:
        """Return this world from its beginning; the objective is the same for every seed."""
        self.round, self.count = 0, len(seeds)
        return self

    def objective(self) -> FacilityLocation:
        """Return the objective of this round."""
        if self.V.ndim == 3 and self.round >= len(self.V):
            raise RecipeError(f"V has {len(self.V)} rounds, expected more: lower rounds.")
        number = self.round if self.V.ndim == 3 else 0
        if number not in self._made:
            V = self.V[number] if self.V.ndim == 3 else self.V
            self._made = {number: FacilityLocation(V, weights=self.weights)}
        return self._made[number]

    def step(self, actions: Tensor) -> None:  # noqa: ARG002
        """Go on to the next round."""
        self.round += 1
