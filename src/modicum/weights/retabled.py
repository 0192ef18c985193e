"""A model whose tables of the vocabulary are made anew, and all of whose other tensors are its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from modicum.errors import UnsupportedError
from modicum.layout import is_vocabulary, layer_of, token_axis, with_tokens
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec

_ADVICE = "Keep the vocabulary that it has; a merge does without tokenizer."


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
        return Spec(with_tokens(name, spec.shape, self.size), spec.dtype)

    @property
    @abstractmethod
    def identity(self) -> list[object]:
        """What its tensors depend on; see :attr:`modicum.weights.checkpoint.Checkpoint.identity`."""

    def check(self) -> None:
        """Raise unless the models are what they were; see :meth:`modicum.weights.checkpoint.Checkpoint.check`."""
        for model in (self.model, *self.others):
            model.check()

    def __getitem__(self, name: str) -> Tensor:
        if not is_vocabulary(name):
            return self.model[name]
        return self.table(name, by_token(self.model, name)).view(self.spec(name).shape)

    @abstractmethod
    def table(self, name: str, own: Tensor) -> Tensor:
        """Return the new table of a name, from the model's own; tokens stand along the first axis of both."""


def by_token(model: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor of the vocabulary with tokens along its first axis: a row of biases as a vector."""
    tensor = model[name]
    return tensor.flatten() if token_axis(name) else tensor


def rows_of(model: Checkpoint) -> int:
    """Return how many rows the tables of a model's vocabulary have; its tokenizer may know more or fewer tokens.

    Raises:
        UnsupportedError: It has no table, tables of several sizes, or something else with an entry for each token.
    """
    tables = {name: model.spec(name).shape for name in model if is_vocabulary(name)}
    sizes = {name: shape[axis] for name, shape in tables.items() if (axis := token_axis(name)) is not None}
    if not any(len(shape) > 1 and not token_axis(name) for name, shape in tables.items()):
        raise UnsupportedError(f"{model.name} has no embedding of tokens, whose rows another vocabulary could order.")
    (first, size), *others = sizes.items()
    for name, another in others:
        if another != size:
            raise UnsupportedError(
                f"{model.name} has tables of several sizes, {first!r} of {size} tokens and {name!r} of {another}, "
                f"which one vocabulary cannot order. {_ADVICE}"
            )
    for name in model:
        of_tokens = name not in tables and layer_of(name) is None and _entries(model.spec(name).shape) == size
        if of_tokens and size not in tables[first][1:]:  # else it may be of the tables' width
            raise UnsupportedError(
                f"{model.name}: {name!r} has {size} entries as its vocabulary, and which of its tokens they are of is "
                f"not known. {_ADVICE}"
            )
    return size


def _entries(shape: Sequence[int]) -> int:
    """Return how many entries a tensor has along its first axis of more than one, as biases of logits have."""
    return next((size for size in shape if size != 1), 1)
