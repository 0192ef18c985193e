"""A model whose tables of the vocabulary are made anew, and all of whose other tensors are its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from modicum.errors import UnsupportedError
from modicum.layout import is_vocabulary, layer_of
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


def rows_of(model: Checkpoint) -> int:
    """Return how many rows the tables of a model's vocabulary have; its tokenizer may know more or fewer tokens.

    Raises:
        UnsupportedError: It has no table, tables of several sizes, or something else with an entry for each token.
    """
    tables = {name: model.spec(name).shape for name in model if is_vocabulary(name)}
    if not tables:
        raise UnsupportedError(f"{model.name} has no embedding of tokens, whose rows another vocabulary could order.")
    (first, shape), *others = tables.items()
    for name, another in others:
        if another[0] != shape[0]:
            raise UnsupportedError(
                f"{model.name} has tables of several sizes, {first!r} of {shape[0]} rows and {name!r} of {another[0]}, "
                "which one vocabulary cannot order. Leave its vocabulary as it is: set no tokenizer."
            )
    for name in model:
        of_tokens = name not in tables and layer_of(name) is None and _entries(model.spec(name).shape) == shape[0]
        if of_tokens and shape[0] not in shape[1:]:  # else it may be of the tables' width
            raise UnsupportedError(
                f"{model.name}: {name!r} has {shape[0]} entries as its vocabulary, and which of its tokens they are of "
                "is not known. Leave its vocabulary as it is: set no tokenizer."
            )
    return int(shape[0])


def _entries(shape: Sequence[int]) -> int:
    """Return how many entries a tensor has along its first axis of more than one, as biases of logits have."""
    return next((size for size in shape if size != 1), 1)
