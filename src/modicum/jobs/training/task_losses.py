"""Losses of the tasks: choosing among label words, choosing among candidates, writing, and rewards without a gradient.

The closure of a zeroth-order optimizer returns them. All but the reward can be differentiated too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.objectives.answers import candidate_scores, label_words, multiple_choice
from modicum.optim.zeroth_order.engines import expand_batch
from modicum.types import IGNORED

if TYPE_CHECKING:
    from modicum.jobs.data.sources.suite import Example


@dataclass(frozen=True)
class Question:
    """An example as tokens."""

    prompt: Sequence[int]
    candidates: Sequence[Sequence[int]]
    answer: int = 0


def common_words(questions: Sequence[Question]) -> list[int]:
    """Return the label words when every question has the same candidates, each of one token, else nothing."""
    first = questions[0].candidates
    if any(q.candidates != first for q in questions) or not first or any(len(c) != 1 for c in first):
        return []
    return [tokens[0] for tokens in first]


def answer_batch(questions: Sequence[Question], *, pad: int, words: bool) -> dict[str, Any]:
    """Return the inputs of the model, and the targets and counts that :func:`answer_scores` needs to judge its logits.

    Rows are padded on the left, so that all predicted tokens lie in the last columns and no other logits are computed.
    A candidate's last token predicts nothing and is not read.

    Args:
        questions: The examples.
        pad: Token to fill rows with; it is masked.
        words: Whether the candidates are label words, so that one row of a prompt serves them all.
    """
    pairs = [(q.prompt, c) for q in questions for c in ([[IGNORED]] if words else q.candidates)]
    for prompt, candidate in pairs:
        if not candidate or not prompt:
            raise CheckpointError(f"An example's {'prompt' if candidate else 'candidate'} has no tokens.")
    rows = [[*prompt, *candidate[:-1]] for prompt, candidate in pairs]
    mask = _left([[1] * len(row) for row in rows], 0)
    batch: dict[str, Any] = {
        "input_ids": _left(rows, pad),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0),
        "labels": torch.tensor([q.answer for q in questions]),
    }
    if not words:
        batch["targets"] = _left([list(candidate) for _, candidate in pairs], IGNORED)
        batch["counts"] = [len(q.candidates) for q in questions]
    return batch


def answer_scores(
    model: Any, batch: Mapping[str, Any], *, words: Sequence[int], branches: int = 1
) -> list[Float[Tensor, "b c"]]:
    """Return a score for each candidate of each example, -inf where an example has fewer; once for each branch.

    Args:
        model: A causal language model.
        batch: From :func:`answer_batch`.
        words: The label words; empty where candidates have rows of their own.
        branches: Points that an optimizer with ``engine="paired"`` evaluates at once.
    """
    targets = batch.get("targets")
    kept = 1 if targets is None else targets.shape[1]
    read = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
    options = {"logits_to_keep": kept} if takes_positions(model) else {}
    logits = model(**expand_batch(read, branches), use_cache=False, **options).logits[:, -kept:]
    if targets is None:
        return [part[:, -1, list(words)].float() for part in logits.chunk(branches)]
    counts = batch["counts"]
    widest = max(counts)
    return [
        torch.stack(
            [
                functional.pad(scores, (0, widest - len(scores)), value=-torch.inf)
                for scores in torch.split(candidate_scores(part, targets), counts)
            ]
        )
        for part in logits.chunk(branches)
    ]


def takes_positions(model: Any) -> bool:
    """Whether the model can be asked for some logits only."""
    base = getattr(model, "module", model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    return "logits_to_keep" in inspect.signature(base.forward).parameters


class TaskLoss:
    """Loss and accuracy of examples under a model.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        examples: The batch.
        train: ``labels`` compares the candidates; ``text`` is the language-model loss of the right one.
    """

    def __init__(self, model: Any, tokenizer: Any, examples: Sequence[Example], *, train: str = "labels") -> None:
        if not examples:
            raise RecipeError("The batch holds no examples.")
        if any(not e.candidates for e in examples) and train == "labels":
            raise UnsupportedError("A generated task has no candidates to compare. Use train='text' or a reward.")
        self.model, self.train = model, train
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

        def question(example: Example) -> Question:
            right = example.candidates[example.answer] if example.candidates else f" {example.references[0]}\n"
            texts, answer = ([right], 0) if train == "text" else (example.candidates, example.answer)
            candidates = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return Question(tokenizer(example.prompt)["input_ids"], candidates, answer)

        questions = [question(example) for example in examples]
        self.words = common_words(questions) if train == "labels" else []
        device = next(model.parameters()).device
        batch = answer_batch(questions, pad=pad, words=bool(self.words))
        self.batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.answers: Tensor = self.batch["labels"]

    def scores(self) -> Tensor:
        """Return a score for each candidate of each example, -inf where an example has fewer."""
        return answer_scores(self.model, self.batch, words=self.words)[0]

    def __call__(self) -> Tensor:
        """Return the loss."""
        if self.words:
            return label_words(self.scores(), self.answers)
        return multiple_choice(self.scores(), self.answers, learn="choice" if self.train == "labels" else "likelihood")

    @torch.no_grad()
    def correct(self) -> Tensor:
        """Return for each example whether the right candidate scores best."""
        return self.scores().argmax(-1) == self.answers


def reward_loss(
    generate: Callable[[Sequence[str]], Sequence[str]],
    examples: Sequence[Example],
    reward: Callable[[str, Sequence[str]], float],
) -> Callable[[], float]:
    """Return a closure of minus the mean reward of generated answers, such as exact match, F1, or any function.

    Args:
        generate: Answers prompts; greedy, or sampling with the same seeds at every call, so that the two signs of a
            probe meet the same chance.
        examples: The batch, with references.
        reward: Scores an answer against its references.
    """
    prompts = [example.prompt for example in examples]

    def loss() -> float:
        answers = generate(prompts)
        return -sum(reward(a, e.references) for a, e in zip(answers, examples, strict=True)) / len(examples)

    return loss


def _left(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[fill] * (width - len(row)) + list(row) for row in rows])
