"""The seam of objectives over answers: from a task's rows to a Trainer's batches, loss and accuracy.

An objective over answers judges whole answers of the model rather than each token, so it needs rows with candidates or
references (``data: task:NAME``), a collator that lays the candidates out, and a loss of its own. The facts ``answers``
and ``right_alone`` say how it gets the answers, so a new one is one file with a function of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.evaluate.measures.exact_match import score
from modicum.jobs.data.bad_rows import each
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.tokens import prompt_ids
from modicum.jobs.training.task_losses import Question, answer_batch, answer_scores, common_words
from modicum.registry import objective

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from modicum.evaluate.rows import Row
    from modicum.jobs.data.rows import DataSection, Rows
    from modicum.jobs.training.parts import Build


@dataclass(frozen=True)
class AnswerRows(Sequence[Any]):
    """A data set of questions, with the label words or scorers by which the answers are judged.

    Args:
        questions: The rows as tokens; for a reward, ``answer`` is the key of its scorer.
        words: Tokens of the label words that all of them share; empty for other objectives.
        scorers: Functions that score a generated answer, by the key of its row.
        one_line: Whether an answer ends with its line.
    """

    questions: Sequence[Question]
    words: Sequence[int]
    scorers: Mapping[int, Callable[[str], float]]
    one_line: bool

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        return self.questions[index]


def check_rows(rows: Rows, section: DataSection, name: str) -> None:
    """Refuse rows that lack a field that an objective over answers needs.

    Raises:
        RecipeError: Rows are packed, or have no candidates or no prompt.
    """
    if section.packing:
        raise RecipeError(f"{name} asks each row by itself: data.packing must be false.")
    generated = objective[name].facts.answers == "generated"
    for row in rows.rows:
        if not generated and not row.get("candidates"):
            raise RecipeError(
                f"{name} needs rows with candidates, which {section.path} has not. Use a task with candidates "
                "(data.path: task:NAME), or objective: reward."
            )
        if "prompt" not in row:
            raise RecipeError(f"{name} needs prompts and completions, {section.path} holds {rows.kind} rows.")


def answer_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    name: str,
    knobs: Mapping[str, Any],
    *,
    training: bool,
    note: Callable[[str], None],
) -> AnswerRows:
    """Return the rows as an objective over answers asks them.

    Args:
        rows: From :func:`modicum.jobs.data.rows.load_rows`.
        tokenizer: The model's own.
        section: ``max_length`` is read: longer prompts lose their beginning.
        name: The objective.
        knobs: Its knobs, complete.
        training: Whether these rows are learned from: a knob may then have the right candidate read alone.
        note: Told when prompts were cut or bad rows left out.

    Raises:
        RecipeError: The rows lack a field that the objective needs.
    """
    check_rows(rows, section, name)
    facts = objective[name].facts
    generated, words = facts.answers == "generated", facts.answers == "words"
    right_alone = training and facts.right_alone and facts.right_alone.items() <= knobs.items()
    scorers: dict[int, Callable[[str], float]] = {}
    cut = 0

    def make(index: int, row: Row) -> Question:
        nonlocal cut
        # Batches carry numbers only; the key also tells the scorers of the two data sets apart.
        texts, answer = ([], index if training else ~index) if generated else (row["candidates"], row["answer"])
        if right_alone:
            texts, answer = [texts[answer]], 0
        candidates = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        room = section.max_length - (knobs["max_new_tokens"] if generated else max(map(len, candidates)))
        if room < 1:
            raise RecipeError(f"{section.path}, row {index}: an answer alone fills max_length. Raise it.")
        prompt = prompt_ids(row, tokenizer)
        cut += len(prompt) > room
        if generated:
            scorers[answer] = partial(score, rows, index, metric=knobs["metric"])
        return Question(prompt[-room:], candidates, answer)

    asked = each(rows.rows, make, section, note)
    if cut:
        note(f"{cut} of {len(asked)} prompts exceed max_length {section.max_length}; they lost their beginning.")
    shared = common_words(asked) if words else []
    if words and not shared:
        raise RecipeError(
            f"{name} needs the same candidates of one token in every row; those of {section.path} differ or are "
            "longer. Use objective: multiple_choice."
        )
    return AnswerRows(asked, shared, scorers, one_line=any(row.get("plain") for row in rows.rows))


@dataclass(frozen=True)
class AnswerCollator:
    """Lay questions out as a batch; see :func:`~modicum.jobs.training.task_losses.answer_batch`.

    Args:
        pad: Token to fill rows with.
        alone: Whether one row of a prompt is enough: its candidates are label words, or it has none.
    """

    pad: int
    alone: bool

    def __call__(self, features: Sequence[Question]) -> dict[str, Any]:
        """Return the batch."""
        return answer_batch(features, pad=self.pad, words=self.alone)


class AnswerLoss:
    """The loss of a batch of questions: a :class:`~modicum.jobs.training.trainer.Loss`.

    Args:
        name: The objective.
        knobs: Its knobs, complete.
        sets: The data sets of the training.
        tokenizer: The model's own.
    """

    def __init__(self, name: str, knobs: Mapping[str, Any], *, sets: Sequence[AnswerRows], tokenizer: Any) -> None:
        entry = objective[name]
        # Knobs of generating and scoring answers are not the loss function's.
        gathering = {item.name for item in fields(entry.facts.gather)} if entry.facts.gather else set()
        self._loss = partial(entry.function, **{key: knobs[key] for key in knobs.keys() - gathering})
        self._generated, self._knobs = entry.facts.answers == "generated", knobs
        self.words, self.tokenizer = sets[0].words, tokenizer
        self._scorers = {key: scorer for each in sets for key, scorer in each.scorers.items()}
        self._one_line = sets[0].one_line

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], *, branches: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean loss of a batch, for several branches one for each, and the score of each answer."""
        if self._generated:
            rewards = self._rewards(model, inputs)
            return self._loss(rewards), {"scores": rewards}
        answers = inputs["labels"]
        points = answer_scores(model, inputs, words=self.words, branches=branches)
        found = [self._loss(scores, answers) for scores in points]
        right = (points[0].detach().argmax(-1) == answers).float()
        return (torch.stack(found) if branches > 1 else found[0]), {"scores": right}

    def _rewards(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        from modicum.evaluate import generate, stop_tokens

        base = getattr(model, "module", model)
        prompts = [row[real].tolist() for row, real in zip(inputs["input_ids"], inputs["attention_mask"].bool())]
        answers = generate(
            base,
            prompts,
            max_new_tokens=self._knobs["max_new_tokens"],
            stop=stop_tokens(base, self.tokenizer, line=self._one_line),
            pad=pad_id(self.tokenizer),
            batch_size=len(prompts),
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
        scored = [self._scorers[key](text) for key, text in zip(inputs["labels"].tolist(), texts, strict=True)]
        return torch.tensor(scored, dtype=torch.float32, device=inputs["labels"].device)


@dataclass(frozen=True)
class MeanScore:
    """The metric of an evaluation: the mean score of the rows; a ``compute_metrics`` of a Trainer.

    Args:
        name: The objective.
    """

    name: str

    @property
    def metric(self) -> str:
        """Name of the mean."""
        return "reward" if objective[self.name].facts.answers == "generated" else "accuracy"

    def __call__(self, evaluation: Any) -> dict[str, float]:
        """Return the mean."""
        return {self.metric: float(evaluation.predictions.mean(dtype="float64"))}


def use_answers(build: Build, name: str, knobs: Mapping[str, Any]) -> AnswerLoss:
    """Give a Trainer that is going to be made an objective over answers: collator, loss and accuracy.

    Args:
        build: The arguments of the Trainer; its data sets are :class:`AnswerRows`.
        name: The objective.
        knobs: Its knobs, complete.

    Raises:
        RecipeError: Training and evaluation rows have different label words.
    """
    sets = [rows for rows in (build.train_dataset, build.eval_dataset) if rows is not None]
    if len({tuple(rows.words) for rows in sets}) > 1:
        raise RecipeError("data and eval_data have different label words. Use two splits of one task.")
    loss = AnswerLoss(name, knobs, sets=sets, tokenizer=build.processing_class)
    alone = objective[name].facts.answers != "candidates"
    build.own_loss, build.compute_metrics = loss, MeanScore(name)
    build.data_collator = AnswerCollator(pad_id(build.processing_class), alone)
    return loss


def measured(metrics: Mapping[str, float], name: str) -> dict[str, float]:
    """Return the metrics of an evaluation that the record keeps."""
    kept = ("eval_loss", f"eval_{MeanScore(name).metric}")
    return {key: metrics[key] for key in kept if key in metrics}
