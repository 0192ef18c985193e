"""Scorers that are models: a sequence classifier, and linear heads on the hidden states of a language model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import lock
from modicum.borders import MALFORMED, loads
from modicum.content import cache_folder
from modicum.durable import write_atomic
from modicum.errors import CheckpointError, RecipeError, first_line
from modicum.evaluate.rows import Row, answered, question_of
from modicum.inputs import look
from modicum.jobs.data.kinds.preference import SIDES
from modicum.jobs.data.section import ScorerSection
from modicum.jobs.data.tokens import encode
from modicum.jobs.loading.models import load_model, load_tokenizer, rehearse_model
from modicum.jobs.loading.references import resolve_model
from modicum.random import derive_seed
from modicum.record import NUMERICS
from modicum.shortage import pass_on
from modicum.types import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

FEWEST = 8  # pairs on which a head is trained
SOME = 64  # answers that a check encodes: the longest
EVERY = 0.1  # seconds between two looks at what another run computes


class Classifier:
    """A local model that classifies sequences: each of its outputs is a head.

    Args:
        section: ``model`` and ``max_length`` are read.
    """

    def __init__(self, section: ScorerSection) -> None:
        self.section = section

    def __call__(self, asked: Sequence[tuple[Row, str]]) -> list[list[float]]:
        """Return the outputs for some answers; those that were asked before are known."""
        reference = str(self.section.model)
        return _remembered("classifier", reference, asked, lambda: self._scores(reference, asked))

    def _scores(self, reference: str, asked: Sequence[tuple[Row, str]]) -> list[list[float]]:
        import torch

        model = _classifier(reference)
        tokenizer = load_tokenizer(reference)

        def score(ids: Tensor, _answer: Tensor) -> Tensor:
            found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            return found

        model.config.pad_token_id = model.config.pad_token_id or 0  # all rows of a batch are equally long
        return _by_length(model.eval(), tokenizer, asked, self.section, score)


def _classifier(reference: str, **options: Any) -> Any:
    """Return the model, loaded with further arguments of ``from_pretrained``."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = resolve_model(reference)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        pass_on(error)
        raise CheckpointError(f"{reference} is no model that classifies sequences: {first_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"{reference} is no model that classifies sequences: it has no {missing[0]}, and a random one says nothing."
        )
    return model


def rehearse(section: ScorerSection, rows: Mapping[str, Sequence[Row]], *, seed: int) -> None:
    """Do :func:`~modicum.jobs.data.scoring.rehearse_scorer` with a model's configuration, headers and tokenizer."""
    reference = str(section.model or section.heads_of)
    if section.model is not None:
        _classifier(reference, device_map="meta")
    else:
        rehearse_model(reference)
        _split(rows, section.share, seed)
    # Who is refused for an answer's length is refused for the longest.
    asked = [(row, row[side]) for part in rows.values() for row in part for side in SIDES]
    some = nlargest(SOME, asked, key=lambda one: len(question_of(one[0])) + len(one[1]))
    _encoded(load_tokenizer(reference), some, section)


def trained_heads(
    section: ScorerSection,
    rows: Mapping[str, Sequence[Row]],
    *,
    seed: int,
    note: Callable[[str], object],
) -> tuple[Callable[[Sequence[tuple[Row, str]]], list[list[float]]], dict[str, list[Row]]]:
    r"""Train a linear head for each part on the hidden states of a model, on some of its prompts.

    A head's score of an answer is :math:`w^\top \phi`, where :math:`\phi` is the mean of the last hidden states over
    the answer's tokens. :math:`w` minimises the penalised log-loss of the pairs' differences, and is scaled so that
    margins on the training pairs have a standard deviation of 1.

    Args:
        section: ``heads_of``, ``share``, ``l2`` and ``max_length`` are read.
        rows: The pairs of each part.
        seed: Names the choice of the training prompts.
        note: Told how often each head agrees with pairs that it was not trained on.

    Returns:
        The scorer, and the pairs whose prompts no head was trained on.

    Raises:
        RecipeError: A part has too few pairs.

    Cost:
        One forward pass over every answer, for all runs that ask the same.
    """
    import torch

    from modicum.evaluate.logistic import fit

    reference = str(section.heads_of)
    training, rest = _split(rows, section.share, seed)
    every = {_key(row, row[side]): (row, row[side]) for part in rows.values() for row in part for side in SIDES}
    asked = list(every.values())
    states = torch.tensor(_remembered("states", reference, asked, lambda: _states(reference, section, asked)))
    places = {key: place for place, key in enumerate(every)}

    def features(asked: Sequence[tuple[Row, str]]) -> Tensor:
        return states[[places[_key(row, answer)] for row, answer in asked]]

    heads = []
    for part in training.values():
        chosen, rejected = (features([(row, row[side]) for row in part]) for side in SIDES)
        gaps = (chosen - rejected).double()
        signs = torch.tensor([True] * len(gaps) + [False] * len(gaps))
        weight = fit(torch.cat([gaps, -gaps]), signs, l2=section.l2).weight
        spread = (gaps @ weight).square().mean().sqrt()
        heads.append(weight / spread.clamp(min=1e-12))
    matrix = torch.stack(heads, 1)

    def score(asked: Sequence[tuple[Row, str]]) -> list[list[float]]:
        found: list[list[float]] = (features(asked).double() @ matrix).tolist()
        return found

    for place, (name, part) in enumerate(rest.items()):
        chosen, rejected = (torch.tensor(score([(row, row[side]) for row in part])) for side in SIDES)
        margins = chosen - rejected
        right = (margins[:, place] > 0).double().mean()
        note(
            f"mix: the head of {name}, trained on {len(training[name])} pairs, agrees with {right:.0%} of {len(part)} "
            "others of its part."
        )
    return score, rest


def _split(
    rows: Mapping[str, Sequence[Row]], share: float, seed: int
) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the pairs on which heads are trained, and the others; no prompt has pairs in both."""
    training: dict[str, list[Row]] = {}
    rest: dict[str, list[Row]] = {}
    for name, part in rows.items():
        prompts = sorted({question_of(row) for row in part}, key=lambda text: derive_seed(seed, "heads", text))
        taken = {*prompts[: round(share * len(prompts))]}
        training[name] = [row for row in part if question_of(row) in taken]
        rest[name] = [row for row in part if question_of(row) not in taken]
        if len(training[name]) < FEWEST or not rest[name]:
            raise RecipeError(
                f"mix: {name} has {len(part)} pairs, of which {len(training[name])} would train its head; expected "
                f"{FEWEST} or more, and some to keep. Give it more rows, or another share."
            )
    return training, rest


def _states(reference: str, section: ScorerSection, asked: Sequence[tuple[Row, str]]) -> list[list[float]]:
    model = load_model(reference, dtype="float32", device="cpu").eval()
    tokenizer = load_tokenizer(reference)

    def read(ids: Tensor, answer: Tensor) -> Tensor:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        found: Tensor = (states * answer[..., None]).sum(1) / answer.sum(1, keepdim=True)
        return found

    return _by_length(model, tokenizer, asked, section, read)


@dataclass(frozen=True)
class _Encoded:
    place: int
    ids: list[int]
    answer: list[bool]


def _encoded(tokenizer: Any, asked: Sequence[tuple[Row, str]], section: ScorerSection) -> list[_Encoded]:
    """Return answers as tokens.

    Raises:
        RecipeError: One is too long.
    """
    rows = []
    for place, (row, answer) in enumerate(asked):
        ids, labels = encode(answered(row, answer), tokenizer, completion_only=True, where=f"answer {place}")
        end = max(i for i, label in enumerate(labels) if label != IGNORED) + 1
        if end > section.max_length:
            raise RecipeError(
                f"scorer: the answer {answer!r:.40} to {question_of(row)!r:.40} ends after {end} tokens, more than its "
                f"max_length {section.max_length}. Raise scorer.max_length."
            )
        rows.append(_Encoded(place, ids[:end], [label != IGNORED for label in labels[:end]]))
    return rows


def _by_length(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[Row, str]],
    section: ScorerSection,
    read: Callable[[Tensor, Tensor], Tensor],
) -> list[list[float]]:
    """Return ``read(ids, whether a token is the answer's)`` of every answer, in batches of equally long rows."""
    import torch

    rows = _encoded(tokenizer, asked, section)
    found: list[list[float]] = [[] for _ in asked]
    with torch.inference_mode():
        for _, group in groupby(sorted(rows, key=lambda each: len(each.ids)), key=lambda each: len(each.ids)):
            alike = list(group)
            for start in range(0, len(alike), section.batch_size):
                batch = alike[start : start + section.batch_size]
                tokens, asked_for = (
                    torch.tensor([getattr(each, field) for each in batch], device=model.device)
                    for field in ("ids", "answer")
                )
                for each, values in zip(batch, read(tokens, asked_for).float().tolist()):
                    found[each.place] = values
    return found


def _key(row: Row, answer: str) -> str:
    """Return what tells an answer from all others."""
    return json.dumps(answered(row, answer), sort_keys=True)


def _remembered(
    what: str,
    reference: str,
    asked: Sequence[tuple[Row, str]],
    compute: Callable[[], list[list[float]]],
) -> list[list[float]]:
    """Return what was computed for these answers before, or compute and keep it: runs of a grid share it.

    Of runs that ask at the same time one computes, and the others wait for it.
    """
    from xxhash import xxh3_128_hexdigest

    # An adapter's answers are also those of the model beneath.
    models = list(look([str(resolve_model(reference))]).hashes.values())
    key = [what, NUMERICS, models, [[answered(row, answer) for row, answer in asked]]]
    file = cache_folder() / "scores" / f"{xxh3_128_hexdigest(json.dumps(key).encode())}.json"
    if (known := _read(file, len(asked))) is not None:
        return known
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        while not lock.enter(locks, file.with_name(f".{file.stem}.lock"), file.parent):
            time.sleep(EVERY)
        if (known := _read(file, len(asked))) is not None:
            return known
        found = compute()
        write_atomic(file, json.dumps(found))
        return found


def _read(file: Path, count: int) -> list[list[float]] | None:
    """Return what a file holds; what is no table of numbers for so many answers is computed again."""
    try:
        known = [[float(number) for number in row] for row in loads(file.read_text())]
        return known if len(known) == count and all(map(math.isfinite, chain(*known))) else None
    except (OSError, *MALFORMED):
        return None
