"""Training parts: each mechanism of the train job is one file here, which ``train`` never calls by its name.

A part registers itself, and with a ``section`` it adds a key of its name to the recipe::

    @training_part("freeze", section=FreezeSection, description="parameters that stay as they are")
    class Freeze(Part):
        def start(self, model, batches): ...

``train`` calls the hooks of :class:`Part` in the order in which they stand there, each for all parts by the fact
``order``. A hook that takes a value returns the value that the next part gets. Files here are imported to know what a
recipe may say, so they import their engines when a hook runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import RecipeError
from modicum.jobs.data.rows import tokenize
from modicum.registry import Entry, training_part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.evaluate.rows import Rows
    from modicum.facts import PartFacts
    from modicum.jobs.data.section import DataSection
    from modicum.jobs.training.batches import Batches
    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.trainer import Loss, PartsTrainer, Step
    from modicum.record import Run


@dataclass(frozen=True)
class Data:
    """Rows that are to become a data set.

    Args:
        rows: The rows.
        section: Where they come from.
        training: Whether they are learned from, and not for evaluation.
        encode: ``(rows, tokenizer, section, *, note)`` gives the data set.
    """

    rows: Rows
    section: DataSection
    training: bool
    encode: Callable[..., Any] = tokenize


@dataclass
class Build:
    """Arguments of the Trainer to come, under the names that the Trainer gives to its arguments and attributes.

    A function that uses ``model``, ``args``, ``data_collator``, ``compute_loss_func`` and ``add_callback`` alone works
    on a user's finished Trainer too.

    Args:
        optimizer: Brought by a part; ``None`` for the Trainer's own.
        own_loss: See :class:`~modicum.jobs.training.trainer.PartsTrainer`.
        own_step: Likewise.
        watchers: Likewise.
        parts: All parts of the run; no argument of the Trainer.
    """

    model: Any
    args: TrainingArguments
    processing_class: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any = None
    callbacks: list[Any] = field(default_factory=list)
    compute_loss_func: Callable[..., Any] | None = None
    compute_metrics: Callable[..., Any] | None = None
    optimizer: Any = None
    own_loss: Loss | None = None
    own_step: Step | None = None
    watchers: list[Callable[[Tensor], None]] = field(default_factory=list)
    parts: Sequence[Part] = ()

    def add_callback(self, callback: Any) -> None:
        """Add a callback; callbacks of earlier parts are called first."""
        self.callbacks.append(callback)


class Part:
    """A mechanism of training. Every hook does nothing until a part overrides it.

    The constructor runs when a recipe is parsed and refuses keys that do not fit each other. ``arguments``, ``check``
    and ``data`` run for ``modicum check`` too, ``foresee`` for it alone, and must not write anything.

    Attributes:
        name: Its name in the table, which is its key in the recipe.
        recipe: The whole recipe.
        section: The value of its key; ``None`` for a part without a key.
        run: The open run; set by :meth:`begin`.
        keeps_dtype: Weights may be trained as they were stored: they are frozen, or move by more than rounding hides.
        needs_gradients: The key of the recipe that reads or changes gradients.
        brings: Elements of the Trainer that it replaces (``optimizer``, ``loss``, ``training step``); two parts cannot
            replace the same. Label smoothing, which belongs to the model's own loss, is refused beside a ``loss``.
        trains: Name of the trained weights, where they are not all weights.
        output: Name of the result where that is not a ``model``.
        own_tokens: Tokens that only the training knows; set by the time of :meth:`finish`.
    """

    run: Run
    keeps_dtype: bool = False
    needs_gradients: str | None = None
    brings: Collection[str] = ()
    trains: str | None = None
    output: str | None = None
    own_tokens: Collection[int] = ()

    def __init__(self, name: str, recipe: TrainRecipe, section: Any = None) -> None:
        self.name, self.recipe, self.section = name, recipe, section

    @classmethod
    def wanted(cls, _recipe: TrainRecipe) -> bool:
        """Whether a recipe asks for the part; where the part has a key, the key is known to be there."""
        return True

    def fit(self, parts: Sequence[Part]) -> None:
        """Refuse other parts of the recipe that this one cannot work with."""

    def inputs(self) -> Iterator[str]:
        """Yield models and files that the part reads."""
        yield from ()

    def arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of ``TrainingArguments``; the recipe's own should win: ``{"mine": 1} | fields``."""
        return fields

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse arguments, and knobs under them, that cannot work."""

    def foresee(self, _note: Callable[[str], None], _model: Any, _tokenizer: Any) -> None:
        """Refuse, for ``modicum check`` and once ``data`` is read, what the run would refuse on meeting the model.

        The model has no numbers, and is ``None`` where it starts from random ones.
        """

    def begin(self, run: Run) -> None:
        """Keep the run, whose folder, notes and log the part may use from now on."""
        self.run = run

    def data(self, data: Data) -> Data:
        """Return the rows, or how they become a data set, changed; called for training and evaluation data."""
        return data

    def model(self, model: Any, _tokenizer: Any) -> Any:
        """Return the model, changed before any adapter surrounds it."""
        return model

    def adapter(self, fields: dict[str, Any], _model: Any) -> dict[str, Any]:
        """Return the fields of ``LoraConfig``, which count where an adapter is trained."""
        return fields

    def wrap(self, model: Any, _fields: Mapping[str, Any]) -> Any:
        """Return the model inside its adapter."""
        return model

    def start(self, model: Any, batches: Batches) -> None:
        """Set the model up for training, with a look at the data where the part wants one."""

    def trainer(self, build: Build) -> None:
        """Add or replace collator, callbacks, optimiser, loss or training step of the Trainer to come."""

    def around(self) -> AbstractContextManager[None]:
        """Return a context in which the Trainer trains."""
        return nullcontext()

    def remember(self) -> dict[str, Tensor]:
        """Return what a resumed run has to know, beside weights and optimiser; called in every process at a save."""
        return {}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Take what :meth:`remember` gave; empty for a checkpoint of a version in which it gave nothing."""

    def finish(self, _trainer: PartsTrainer) -> dict[str, Any]:
        """Bring the trained model into the form in which it is saved; return metrics for the record."""
        return {}

    def variant_names(self) -> Sequence[str]:
        """Return the names of all outputs that :meth:`variants` may give."""
        return ()

    def variants(self) -> dict[str, AbstractContextManager[None]]:
        """Return contexts that put other weights in place, which are saved as outputs of these names too."""
        return {}

    def save(self, folder: Path) -> None:
        """Complete the saved folder; called in the first process alone."""

    def verify(self, folder: Path, parts: Sequence[Part]) -> None:
        """Refuse the saved folder, once all parts have completed it; called in the first process alone."""


def in_order() -> list[Entry[PartFacts]]:
    """Return the table of parts in the order in which they are called."""
    return sorted(training_part.values(), key=lambda entry: (entry.facts.order, entry.name))


def parts_of(recipe: TrainRecipe) -> list[Part]:
    """Return the parts that a recipe asks for, in the order in which they are called."""
    made: list[Part] = []
    for entry in in_order():
        section = None if entry.facts.section is None else recipe.section(entry.name)
        asked = entry.facts.section is None or section is not None
        kind: Any = entry.function
        if asked and kind.wanted(recipe):
            made.append(kind(entry.name, recipe, section))
    return made


def check_fit(recipe: TrainRecipe, parts: Sequence[Part]) -> None:
    """Refuse parts that replace the same thing of the Trainer or refuse each other, and keys that no part serves.

    Raises:
        RecipeError: Two parts do not fit together, or a part is missing.
    """
    for entry in in_order():
        section = recipe.section(entry.name)
        if section is not None and not any(part.section is section for part in parts):
            raise RecipeError(f"{entry.name}: no training part serves {getattr(section, 'name', section)}.")
    for part in parts:
        part.fit(parts)
    owners: dict[str, str] = {}
    for part in parts:
        for thing in part.brings:
            if thing in owners:
                raise RecipeError(f"{owners[thing]} and {part.name} each bring their own {thing}. Drop one.")
            owners[thing] = part.name
