"""Losses of the tasks: choosing among label words, choosing among candidates, writing, and rewards without a gradient.

They are what a zeroth-order optimizer's closure returns; none of them needs to be differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from modicum.errors import RecipeError, UnsupportedError

if TYPE_CHECKING:
    from modicum.jobs.tasks import Example


def label_word_loss(
    logits: Float[Tensor, "b v"], answers: Int[Tensor, " b"], *, words: Sequence[int]
) -> Float[Tensor, ""]:
    """Return the cross-entropy over the label words' logits alone.

    For candidates of one token it equals the cross-entropy over the candidates' log-likelihoods: the normalizer of the
    whole vocabulary cancels.

    Args:
        logits: Logits at each prompt's last position.
        answers: Position of the right word in ``words``.
        words: Token of each label word.
    """
    return functional.cross_entropy(logits[:, list(words)].float(), answers)


def candidate_scores(
    logits: Float[Tensor, "b t v"], ids: Int[Tensor, "b t"], starts: Int[Tensor, " b"], lengths: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Return the mean log-likelihood of each row's candidate.

    Args:
        logits: Logits of prompt and candidate together.
        ids: Tokens, padded at the end.
        starts: First token of the candidate.
        lengths: Tokens of prompt and candidate together.
    """
    taken = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    positions = torch.arange(1, ids.shape[1], device=ids.device)
    mine = (positions >= starts[:, None]) & (positions < lengths[:, None])
    return (taken * mine).sum(1) / mine.sum(1).clamp_min(1)


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
        self.answers = torch.tensor([e.answer for e in examples])
        self.counts = [len(e.candidates) for e in examples]
        prompts = [tokenizer(e.prompt, add_special_tokens=True)["input_ids"] for e in examples]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

        def tokens(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        candidates = [[tokens(c) for c in e.candidates] for e in examples]
        self.words = self._label_words(candidates)
        rows, starts = [], []
        for example, prompt, options in zip(examples, prompts, candidates, strict=True):
            if train == "text":
                right = options[example.answer] if options else tokens(f" {example.references[0]}\n")
                options = [right]
            for option in [[]] if self.words else options:
                rows.append(prompt + option)
                starts.append(len(prompt))
        width = max(map(len, rows))
        device = next(model.parameters()).device
        self.ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        self.starts = torch.tensor(starts, device=device)
        self.mask = (torch.arange(width, device=device) < self.lengths[:, None]).long()
        self.answers = self.answers.to(device)

    def _label_words(self, candidates: Sequence[Sequence[Sequence[int]]]) -> list[int]:
        """The label words when every example has the same candidates of one token, else nothing."""
        first = candidates[0]
        same = self.train == "labels" and all(c == first for c in candidates) and all(len(c) == 1 for c in first)
        return [tokens[0] for tokens in first] if same else []

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Return a score for each candidate of each example, -inf where an example has fewer."""
        if self.words:
            # Logits where the answer is read, and for the label words: the rest of the output layer's work is not done.
            hidden = self.model.get_decoder()(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
            last = hidden[torch.arange(len(hidden), device=hidden.device), self.lengths - 1]
            return self.model.get_output_embeddings()(last)[:, self.words].float()
        logits = self.model(input_ids=self.ids, attention_mask=self.mask).logits
        each = candidate_scores(logits, self.ids, self.starts, self.lengths)
        counts = [1] * len(self.counts) if self.train == "text" else self.counts
        parts = [functional.pad(s, (0, max(counts) - len(s)), value=-torch.inf) for s in torch.split(each, counts)]
        return torch.stack(parts)

    def __call__(self) -> Tensor:
        """Return the loss."""
        scores = self.scores()
        return -scores.mean() if self.train == "text" else functional.cross_entropy(scores, self.answers)

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
