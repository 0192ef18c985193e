"""A model as a slice sees it: some of its layers, numbered from zero, perhaps of one of its modules alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from modicum.errors import RecipeError
from modicum.layout import Layer, layer_of, module_called, modules
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.files import Spec
from modicum.weights.mergekit.document import Slice
from modicum.weights.mergekit.vocabulary import Vocabulary

Table = Checkpoint | Vocabulary
TEXT = (None, "text_decoder")  # the module whose layers config.json counts


class Window(Mapping[str, Tensor]):
    """Some layers of a model, numbered from zero, and all its tensors outside the layers.

    Args:
        tensors: The model.
        layers: The first layer and the one behind the last; all layers when not given.
        module: The module that alone is seen; all when not given.
    """

    def __init__(self, tensors: Table, layers: tuple[int, int] | None, module: str | None = None) -> None:
        self.tensors, self.name, self.config = tensors, tensors.name, tensors.config
        self.first, end = layers or (0, None)
        self._names: dict[str, str] = {}
        for name in tensors if module is None else _of_module(tensors, module):
            layer = layer_of(name)
            if layer is None or (self.first <= layer.number and (end is None or layer.number < end)):
                self._names[renumbered(name, -self.first)] = name

    def own(self, name: str) -> str:
        """Return what the model itself calls a tensor, or would call it."""
        return renumbered(name, self.first)

    def spec(self, name: str) -> Spec:
        """Return shape and dtype of a tensor."""
        return self.tensors.spec(self._names[name])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _of_module(names: Iterable[str], module: str) -> list[str]:
    return [name for name, found in modules(names).items() if found == module]


def renumbered(name: str, shift: int) -> str:
    """Return a tensor's name in a layer that many further on."""
    layer = layer_of(name)
    return Layer(layer.stack, layer.number + shift, layer.rest).name if layer and shift else name


def by_module(slices: Sequence[Slice], table: Table) -> dict[str | None, list[Slice]]:
    """Return the slices of each module of a model; of ``None`` where they are of all of it.

    Args:
        slices: Of the whole document.
        table: The model that gives the result its configuration.

    Raises:
        RecipeError: The document names a module that the model does not have, or leaves one out.
    """
    if slices[0].module is None:
        return {None: list(slices)}
    have = list(dict.fromkeys(modules(table).values()))
    groups: dict[str | None, list[Slice]] = {}
    for piece in slices:
        groups.setdefault(module_called(str(piece.module)), []).append(piece)
    if len(have) == 1 and len(groups) == 1:
        return {None: list(slices)}
    for module in groups:
        if module not in have:
            raise RecipeError(f"modules: {table.name} has no {module!r}, expected {' and '.join(have)}.")
    for module in have:
        if module not in groups:
            raise RecipeError(
                f"modules: {module!r} is not listed, so that the result would lack it. List it, with one model under "
                "models where it stays as it is."
            )
    return groups
