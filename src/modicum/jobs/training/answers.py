"""The seam of objectives over answers: from a task's rows to a Trainer's batches, loss and accuracy.

Such an objective judges what the model answers rather than each token, so it needs rows with candidates or references
(``data: task:NAME``), a collator that lays the candidates out, and a loss of its own; the Trainer's is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modicum import processes
from modicum.errors import RecipeError, UnsupportedError
from modicum.evaluate.measures.exact_match import score
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.tokens import prompt_ids
from modicum.jobs.training.task_losses import Question, answer_batch, answer_scores, common_words
from modicum.registry import objective

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

    from modicum.jobs.data.rows import DataSection, Rows


def judges_answers(name: str) -> bool:
    """Whether the objective called ``name`` is one over answers."""
    return objective[name].facts.acts_on == "answers"


@dataclass(frozen=True)
class AnswerRows(Sequence[Any]):
    """A data set of questions, and what its batches are judged by.

    Args:
        questions: The rows as tokens; for a reward, ``answer`` is the key of its scorer.
        words: Tokens of the label words that all of them share; empty for other objectives.
        scorers: What scores a generated answer, by key.
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
        rows: What :func:`modicum.jobs.data.rows.load_rows` gave.
        tokenizer: The model's own.
        section: ``max_length`` is read: longer prompts lose their beginning.
        name: The objective.
        knobs: Its knobs, complete.
        training: Whether these rows are learned from: ``learn: likelihood`` then reads the right candidate alone.
        note: Told when prompts were cut.

    Raises:
        RecipeError: The rows do not have what the objective needs.
    """
    if section.packing:
        raise RecipeError(f"{name} asks each row by itself: data.packing must be false.")
    asked: list[Question] = []
    scorers, cut = {}, 0
    for index, row in enumerate(rows.rows):
        if name != "reward" and not row.get("candidates"):
            raise RecipeError(
                f"{name} needs rows with candidates, which {section.path} has not. Use a task with candidates "
                "(data.path: task:NAME), or objective: reward."
            )
        if "prompt" not in row:
            raise RecipeError(f"reward needs prompts and completions, {section.path} holds {rows.kind} rows.")
        # Batches carry numbers only; the key also tells the scorers of the two data sets apart.
        texts, answer = (row["candidates"], row["answer"]) if name != "reward" else ([], index if training else ~index)
        if training and knobs.get("learn") == "likelihood":
            texts, answer = [texts[answer]], 0
        candidates = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        room = section.max_length - (knobs["max_new_tokens"] if name == "reward" else max(map(len, candidates)))
        if room < 1:
            raise RecipeError(f"{section.path}, row {index}: an answer alone fills max_length. Raise it.")
        prompt = prompt_ids(row, tokenizer)
        cut += len(prompt) > room
        asked.append(Question(prompt[-room:], candidates, answer))
        if name == "reward":
            scorers[answer] = partial(score, rows, index, metric=knobs["metric"])
    if cut:
        note(f"{cut} of {len(asked)} prompts exceed max_length {section.max_length}; they lost their beginning.")
    words = common_words(asked) if name == "label_words" else []
    if name == "label_words" and not words:
        raise RecipeError(
            f"label_words needs the same candidates of one token in every row; those of {section.path} differ or are "
            "longer. Use objective: multiple_choice."
        )
    return AnswerRows(asked, words, scorers, one_line=any(row.get("plain") for row in rows.rows))


@dataclass(frozen=True)
class AnswerCollator:
    """Lay questions out as a batch; see :func:`~modicum.jobs.training.task_losses.answer_batch`."""

    pad: int
    name: str

    def __call__(self, features: Sequence[Question]) -> dict[str, Any]:
        """Return the batch."""
        return answer_batch(features, pad=self.pad, words=self.name != "multiple_choice")


class AnswerLoss:
    """What a Trainer calls instead of its own ``compute_loss``.

    Attributes:
        last: Sum of the scores of the last batch (right answers, or rewards) and how many there were.
    """

    def __init__(self, name: str, knobs: Mapping[str, Any], *, sets: Sequence[AnswerRows], tokenizer: Any) -> None:
        self.name, self.words, self.tokenizer = name, sets[0].words, tokenizer
        self._loss, self._knobs = objective[name].function, knobs
        self._scorers = {key: scorer for each in sets for key, scorer in each.scorers.items()}
        self._one_line = sets[0].one_line
        self.last: tuple[Tensor, int] = (torch.zeros(()), 0)

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, *, branches: int = 1, **_: Any
    ) -> Any:
        """Return the mean loss of a batch, and for several branches one for each."""
        if self.name == "reward":
            found = [self._loss(self._rewards(model, inputs))]
        else:
            answers = inputs["labels"]
            scores = answer_scores(model, inputs, words=self.words, branches=branches)
            self.last = ((scores[0].detach().argmax(-1) == answers).sum(), len(answers))
            found = [self._loss(part, answers, **self._knobs) for part in scores]
        loss = torch.stack(found) if branches > 1 else found[0]
        return (loss, {}) if return_outputs else loss

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
        self.last = (torch.tensor(scored).sum(), len(scored))
        return torch.tensor(scored, dtype=torch.float32, device=inputs["labels"].device)


def use_answers(trainer: Trainer, name: str, knobs: Mapping[str, Any]) -> AnswerLoss:
    """Give a Trainer whose data sets are :class:`AnswerRows` an objective over answers: collator, loss, accuracy.

    Raises:
        UnsupportedError: The objective has no gradient and the optimizer needs one, or the engine cannot generate.
        RecipeError: Training and evaluation rows have different label words.
    """
    from modicum.optim.zeroth_order.step import ZerothOrder

    optimizer: Any = trainer.optimizer
    if not objective[name].facts.differentiable:
        if not isinstance(optimizer, ZerothOrder):
            raise UnsupportedError(f"{name} has no gradient. Use a zeroth-order optimizer, such as optimizer: tezo.")
        if optimizer.settings.engine in ("paired", "jvp"):
            raise UnsupportedError(
                f"{name} generates its answers, which engine={optimizer.settings.engine!r} cannot. Use 'adapter'."
            )
    sets = [s for s in (trainer.train_dataset, trainer.eval_dataset) if s is not None]
    if len({tuple(s.words) for s in sets}) > 1:
        raise RecipeError("data and eval_data have different label words. Use two splits of one task.")
    loss = AnswerLoss(name, knobs, sets=sets, tokenizer=trainer.processing_class)
    trainer.compute_loss = loss
    trainer.data_collator = AnswerCollator(pad_id(trainer.processing_class), name)
    # The loss is a mean over answers, not tokens: the Trainer is to divide by the micro-batches, not by labels.
    trainer.model_accepts_loss_kwargs = False
    # First of all, so that the run's log tells the scores too.
    trainer.callback_handler.callbacks.insert(0, _score_callback(loss))
    return loss


def _score_callback(loss: AnswerLoss) -> TrainerCallback:
    from transformers import TrainerCallback

    key = "eval_reward" if loss.name == "reward" else "eval_accuracy"

    class ScoreCallback(TrainerCallback):
        """Add up the scores of an evaluation and put their mean into its log."""

        def __init__(self) -> None:
            self.total, self.count = 0.0, 0

        def on_prediction_step(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            self.total += float(loss.last[0])
            self.count += loss.last[1]

        def on_log(self, args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "eval_loss" not in logs or not self.count:
                return
            mean = processes.mean(torch.tensor([self.total], device=args.device), self.count)
            # The history has its copy already; the callbacks after this one read `logs`.
            logs[key] = state.log_history[-1][key] = float(mean)
            self.total, self.count = 0.0, 0

    return ScoreCallback()
