"""A model whose tables of the vocabulary are made anew, and all of whose other tensors are its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from modicum.layout import is_vocabulary
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec


class Retabled(Mapping[str, Tensor]):
    """A model with the tables of another vocabulary.

    Args:
        model: The model.
        size: Rows of the new tables.
        others: What else the new rows are made from.
    """

    def __init__(self, model: Checkpoint, size: int, others: Sequence[Checkpoint]) -> None:
        self.model, self.size, self.others = model, size, others
        self.name, self.config = model.name, model.config

    def __iter__(self) -> Iterator[str]:
        return iter(self.model)

    def __len__(self) -> int:
        return len(self.model)

    def spec(self, name: str) -> Spec:
        """Return shape and dtype of a tensor."""
        spec = self.model.spec(name)
        return Spec((self.size, *spec.shape[1:]), spec.dtype) if is_vocabulary(name) else spec

    @property
    @abstractmethod
    def identity(self) -> list[object]:
        """What its tensors depend on; see :attr:`modicum.weights.checkpoint.Checkpoint.identity`."""

    def check(self) -> None:
        """Raise unless the models are what they were; see :meth:`modicum.weights.checkpoint.Checkpoint.check`."""
        for model in (self.model, *self.others):
            model.check()

    def __getitem__(self, name: str) -> Tensor:
        own = self.model[name]
        return self.table(name, own) if is_vocabulary(name) else own

    @abstractmethod
    def table(self, name: str, own: Tensor) -> Tensor:
        """Return the new table of a name, from the model's own."""
