"""The seam of all objectives: a collator around anyone's collator, which changes the batch after the labels are made.

The draw for a row is named ``(seed, method, epoch, sample)``, where the sample is the feature's ``sample_id`` when the
data has that column and the row's own tokens otherwise. So the masks are the same for any number of workers and ranks,
for any batch size, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from modicum.errors import RecipeError, UnsupportedError
from modicum.knobs import guarded
from modicum.objectives.batch import Batch, documents
from modicum.objectives.meap import Schedule, Scope, meap
from modicum.objectives.selection import Sampling
from modicum.philox import row_keys
from modicum.types import IGNORED, NonNegativeInt, PositiveInt, UnitInterval

SAMPLE_ID = "sample_id"


@runtime_checkable
class Transform(Protocol):
    """An objective with its knobs filled in."""

    def __call__(self, batch: Batch, step: int, total_steps: int, *, rng: Tensor) -> Batch: ...


@guarded
class ObjectiveCollator:
    """Collate with ``collator``, then apply an objective; only in training.

    The Trainer uses one collator for training and evaluation and tells it neither the epoch nor the step:
    ``modicum.jobs.training.objective.use_objective`` sees to that. In a loop of one's own, call :meth:`start_epoch`
    before each epoch and :meth:`eval` around evaluations.

    Args:
        collator: Makes the clean batch, labels included.
        transform: The objective.
        method: Name in the draws.
        seed: Of the run.
        total_steps: Length of training in optimizer steps, for schedules.
        accumulation_steps: Batches per optimizer step.
        redraw: Draw anew in each epoch.
        gather_labels: Add ``label_positions`` and ``label_weights``, which a head that only computes labelled
            positions wants.
    """

    def __init__(
        self,
        collator: Callable[..., Batch],
        transform: Transform,
        *,
        method: str,
        seed: int = 0,
        total_steps: PositiveInt = 1,
        accumulation_steps: PositiveInt = 1,
        redraw: bool = True,
        gather_labels: bool = False,
    ) -> None:
        self.collator, self.transform, self.method, self.seed = collator, transform, method, seed
        self.redraw, self.gather_labels = redraw, gather_labels
        # Of this process alone: workers of the training loader run ahead while the main process evaluates.
        self.training = True
        # Shared memory, so that loader workers that outlive an epoch see it begin: epoch, first step, total steps,
        # batches per step, and how often an epoch has begun.
        self._shared: Tensor = torch.tensor([0, 0, total_steps, accumulation_steps, 0])
        self._shared.share_memory_()  # type: ignore[no-untyped-call]
        self._calls, self._start = 0, 0

    def train(self, mode: bool = True) -> None:
        """Change batches from now on, or with ``False`` pass them through."""
        self.training = mode

    def eval(self) -> None:
        """Pass batches through."""
        self.train(False)

    def start_epoch(
        self, epoch: int, *, step: int = 0, total_steps: int | None = None, accumulation_steps: int | None = None
    ) -> None:
        """Name the epoch, and the optimizer step at which it begins or is resumed."""
        self._shared[0], self._shared[1] = epoch, step
        if total_steps is not None:
            self._shared[2] = total_steps
        if accumulation_steps is not None:
            self._shared[3] = accumulation_steps
        self._shared[4] += 1

    def __call__(self, features: Sequence[Any], *args: Any, **options: Any) -> Batch:
        features, names = _without_sample_ids(features)
        batch = self.collator(features, *args, **options)
        if not self.training:
            return batch
        step, total_steps, epoch = self._step(), int(self._shared[2]), int(self._shared[0])
        rng = row_keys(_names(batch, names), seed=self.seed, method=self.method, epoch=epoch if self.redraw else 0)
        return self._finish(dict(self.transform(batch, step, total_steps, rng=rng)))

    def _step(self) -> int:
        """Return the optimizer step that this batch belongs to.

        Loaders run ahead of training, so the step is counted here: worker w of n makes batches w, w + n, w + 2n, …
        """
        if self._start != int(self._shared[4]):
            self._start, self._calls = int(self._shared[4]), 0
        worker = get_worker_info()
        batches = self._calls if worker is None else worker.id + worker.num_workers * self._calls
        self._calls += 1
        return int(self._shared[1]) + batches // int(self._shared[3])

    def _finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        weights = batch.pop("loss_weights", None)
        if self.gather_labels:
            # The logit at one position predicts the label at the next; rows never run into each other, because the
            # first label of a row is never a target.
            labels = batch["labels"].clone()
            labels[:, 0] = IGNORED
            targets = (labels.flatten() != IGNORED).nonzero().flatten()
            batch["label_positions"] = targets - 1
            ones = torch.ones(targets.numel())
            batch["label_weights"] = ones if weights is None else weights.flatten()[targets]
        elif weights is not None and not bool(((weights == 0) | (weights == 1)).all()):
            raise UnsupportedError(
                "masked_weight weighs single tokens, which the model's own loss cannot. Use the loss of LabelHead "
                "(modicum.jobs.training.objective), or leave masked_weight out for the plain mean over tokens."
            )
        return batch


@guarded
class MEAPCollator(ObjectiveCollator):
    """Mask-enhanced next-token prediction for any Trainer or TRL loop: wraps the collator that is there.

    Args:
        collator: Makes the clean batch with its labels, such as ``DataCollatorForLanguageModeling(tokenizer,
            mlm=False)`` or TRL's.
        mask_token_id: Id to write, from :func:`~modicum.objectives.ensure_mask_token`.
        ratio: Share of eligible tokens that is masked, in [0, 1].
        scope: Who shares a draw: ``row``, ``batch_shared`` or ``reference``.
        sampling: ``fixed_count`` or ``bernoulli``.
        min_masks: Least count for a row that has eligible positions.
        exclude_last: Never mask a document's last token.
        protect_ids: Ids that are never masked. By default the special ids of the collator's tokenizer, as far as it
            shows them; none for ``reference``.
        spans: Length of a masked stretch.
        schedule: ``constant`` or ``linear_warmup``.
        vocab_size: Rows of the embedding; the mask id must lie below.
        seed: Of the run.
        total_steps: Length of training in optimizer steps, for the schedule.
        accumulation_steps: Batches per optimizer step.

    Raises:
        RecipeError: A knob is out of range, or the mask id is pad, bos or eos, or not in the vocabulary.

    Example:
        >>> clean = lambda rows: {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}
        >>> batch = MEAPCollator(clean, mask_token_id=99, ratio=0.5)([[1, 2, 3, 4, 5]])
        >>> int((batch["input_ids"] == 99).sum()), batch["labels"].tolist()
        (2, [[1, 2, 3, 4, 5]])
    """

    def __init__(
        self,
        collator: Callable[..., Batch],
        *,
        mask_token_id: NonNegativeInt,
        ratio: UnitInterval = 0.15,
        scope: Scope = "row",
        sampling: Sampling = "fixed_count",
        min_masks: NonNegativeInt = 1,
        exclude_last: bool = True,
        protect_ids: Sequence[int] | None = None,
        spans: PositiveInt = 1,
        schedule: Schedule = "constant",
        vocab_size: PositiveInt | None = None,
        seed: int = 0,
        total_steps: PositiveInt = 1,
        accumulation_steps: PositiveInt = 1,
    ) -> None:
        check_mask_id(mask_token_id, collator, vocab_size=vocab_size)
        if protect_ids is None:
            protect_ids = [] if scope == "reference" else sorted(special_ids(collator) - {mask_token_id})

        transform = partial(
            meap,
            mask_token_id=mask_token_id,
            ratio=ratio,
            scope=scope,
            sampling=sampling,
            min_masks=min_masks,
            exclude_last=exclude_last,
            protect_ids=tuple(protect_ids),
            spans=spans,
            schedule=schedule,
        )
        super().__init__(
            collator,
            transform,
            method="meap",
            seed=seed,
            total_steps=total_steps,
            accumulation_steps=accumulation_steps,
        )


def special_ids(source: object) -> frozenset[int]:
    """Return the special ids of a tokenizer, or of the tokenizer that a collator holds; TRL's holds pad alone.

    Control tokens that have no role of their own, such as those of chat templates, are special too.
    """
    tokenizer = getattr(source, "tokenizer", None) or getattr(source, "processing_class", None) or source
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = [*getattr(tokenizer, "all_special_ids", ()), *(i for i, token in added.items() if token.special)]
    ids.append(getattr(tokenizer, "pad_token_id", None))
    return frozenset(i for i in ids if i is not None)


def check_mask_id(mask_token_id: int, source: object, *, vocab_size: int | None = None) -> None:
    """Refuse a mask id that is pad, bos or eos of the tokenizer that ``source`` is or holds, or has no embedding."""
    tokenizer = getattr(source, "tokenizer", None) or getattr(source, "processing_class", None) or source
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) == mask_token_id:
            raise RecipeError(
                f"mask_token_id {mask_token_id} is the tokenizer's {name}. Choose an id of its own; "
                "ensure_mask_token(model, tokenizer) finds or adds one."
            )
    if vocab_size is not None and not 0 <= mask_token_id < vocab_size:
        raise RecipeError(
            f"mask_token_id {mask_token_id} has no embedding: the model has {vocab_size} rows. Resize it with "
            "ensure_mask_token(model, tokenizer), or choose an id below."
        )


def _without_sample_ids(features: Sequence[Any]) -> tuple[Sequence[Any], list[str | int] | None]:
    if not all(isinstance(f, Mapping) and SAMPLE_ID in f for f in features):
        return features, None
    return [{k: v for k, v in f.items() if k != SAMPLE_ID} for f in features], [f[SAMPLE_ID] for f in features]


def _names(batch: Batch, given: list[str | int] | None) -> list[str | int]:
    """Name each document of the batch: by its sample id when documents and samples agree in number, else by content."""
    if "input_ids" not in batch:
        raise UnsupportedError(f"The batch has no input_ids (it has {', '.join(sorted(batch))}).")
    found = documents(batch)
    if given is not None and len(given) == found.index.shape[0]:
        return given
    ids = batch["input_ids"]
    rows: Tensor = ids if "position_ids" not in batch else ids.flatten()[found.index]
    # Padding is left out, so that the name does not depend on the longest row of the batch.
    parts = zip(rows.to("cpu", torch.int64).numpy(), found.real.cpu().numpy())
    return [blake2b(row[real].tobytes(), digest_size=16).hexdigest() for row, real in parts]
