"""A model on this machine as a chat model: one reading of each prompt, whatever the number of its samples."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError, UnsupportedError
from modicum.evaluate.chat import (
    THINK,
    ChatRequest,
    ChatResult,
    Choice,
    GenParams,
    JudgeItem,
    Usage,
    split_reasoning,
    user,
)
from modicum.evaluate.generation import Sample, sample, stop_tokens
from modicum.jobs.data import chat_template

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GOAL_TOKENS, STATES_AT_ONCE = 256, 8
LONGEST = 4  # requests, by letters, of which tokens are counted before any is answered


@dataclass(frozen=True)
class LocalHF:
    """Answer with a model of transformers.

    Requests that begin with the same tokens and differ in their seeds share one reading of the prompt. Each sample has
    random numbers of its own, so it does not depend on the batch.

    Attributes:
        model: A causal language model.
        tokenizer: Its own, with a chat template.
        name: Goes into records and cache keys.
        batch_size: Samples at a time.
        progress: Called with the number of samples just finished.
        tags: How reasoning opens and closes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "local"
    batch_size: int = 32
    progress: Callable[[int], None] = lambda _: None
    tags: tuple[str, str] = THINK

    @property
    def caps(self) -> frozenset[str]:
        """Everything but a reasoning field of its own."""
        return frozenset({"n", "seed", "prefill", "logprobs", "hidden_states", "sampling"})

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request.

        Raises:
            CheckpointError: The tokenizer has no chat template.
            UnsupportedError: A request asks for texts that end an answer, which this backend does not look for.
        """
        prompts = [self._prompt(request) for request in requests]
        answers: list[list[Sample | None]] = [[None] * request.params.n for request in requests]
        results: dict[int, str] = {}
        groups: dict[tuple[Any, ...], dict[tuple[int, ...], list[tuple[int, int, int]]]] = defaultdict(dict)
        for index, (request, (ids, _)) in enumerate(zip(requests, prompts, strict=True)):
            params = request.params
            if params.stop:
                raise UnsupportedError("A local model does not look for `stop` texts. Leave them out.")
            if (told := self._without_room(ids, params)) is not None:
                results[index] = told
                continue
            same = groups[(params.temperature, params.top_p, params.max_tokens, params.logprobs)]
            wanted = same.setdefault(tuple(ids), [])
            wanted += [(index, i, self._seed(params, i)) for i in range(params.n)]
        for (temperature, top_p, max_tokens, logprobs), asked in groups.items():
            found = sample(
                self.model,
                list(asked),
                [[seed for _, _, seed in places] for places in asked.values()],
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=max_tokens,
                logprobs=logprobs,
                stop=stop_tokens(self.model, self.tokenizer),
                pad=self.tokenizer.pad_token_id or 0,
                batch_size=self.batch_size,
                progress=self.progress,
            )
            for places, samples in zip(asked.values(), found, strict=True):
                for (index, place, _), drawn in zip(places, samples, strict=True):
                    answers[index][place] = drawn
        return [
            ChatResult(error=results[index])
            if index in results
            else self._result(prompts[index], [drawn for drawn in answers[index] if drawn is not None])
            for index in range(len(requests))
        ]

    def arriving(self, requests: Sequence[ChatRequest]) -> Iterator[list[tuple[int, ChatResult]]]:
        """Yield results with the numbers of their requests, a batch of samples at a time."""

        def alike(index: int) -> tuple[int, str]:  # what is read in one batch begins alike and is as long
            text = requests[index].messages[-1]["content"] + (requests[index].prefill or "")
            return -len(text), text

        part: list[int] = []
        for index in sorted(range(len(requests)), key=alike):
            if part and sum(requests[i].params.n for i in [*part, index]) > self.batch_size:
                yield list(zip(part, self.generate([requests[i] for i in part]), strict=True))
                part = []
            part.append(index)
        if part:
            yield list(zip(part, self.generate([requests[i] for i in part]), strict=True))

    def answer_states(self, items: Sequence[JudgeItem], *, depth: float, tokens: int) -> Tensor:
        """Return what the model holds in mind while it reads answers to goals, (n, width).

        Args:
            items: Answers, with the goals that they belong to.
            depth: Share of the blocks after which the states are read.
            tokens: Most tokens of an answer that are read, from its beginning; a goal keeps its last 256.

        Raises:
            CheckpointError: The tokenizer has no chat template.
        """
        import torch

        from modicum.evaluate.answer_states import answer_states
        from modicum.evaluate.likelihood import right_padded

        layer = max(1, round(depth * self.model.config.num_hidden_layers))
        positions = getattr(self.model.config, "max_position_embeddings", None) or 2**40
        rows = []
        for item in items:
            asked = self._prompt(ChatRequest(user(item.asked)))[0]
            said = self.tokenizer(item.response, add_special_tokens=False, verbose=False)["input_ids"] or asked[-1:]
            said = said[: min(tokens, positions - 1)]
            rows.append((asked[-min(GOAL_TOKENS, positions - len(said)) :], said))
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))  # so that little is padding
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), STATES_AT_ONCE):
            part = order[start : start + STATES_AT_ONCE]
            ids, mask = right_padded([[*asked, *said] for asked, said in (rows[i] for i in part)], 0, self.model.device)
            begins = torch.tensor([[len(rows[i][0])] for i in part], device=ids.device)
            answer = mask * (torch.arange(ids.shape[1], device=ids.device) >= begins)
            read = answer_states(self.model, ids, mask, answer, layer=layer)
            found |= dict(zip(part, read.cpu().unbind(), strict=True))
            self.progress(len(part))
        return torch.stack([found[i] for i in range(len(rows))])

    def tokens(self, request: ChatRequest) -> list[int]:
        """Return the ids of a request's prompt, generation header included."""
        return self._prompt(request)[0]

    def check_room(self, requests: Iterable[ChatRequest]) -> None:
        """Refuse requests that the model has no positions for, as far as the longest ones tell.

        Raises:
            UnsupportedError: A prompt and the longest answer to it exceed them.
        """
        for request in nlargest(
            LONGEST, requests, key=lambda request: sum(len(m["content"]) for m in request.messages)
        ):
            if (told := self._without_room(self.tokens(request), request.params)) is not None:
                raise UnsupportedError(f"{self.name}: {told}. Lower the limit on an answer, or shorten the prompts.")

    def _without_room(self, ids: Sequence[int], params: GenParams) -> str | None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is None or len(ids) + params.max_tokens <= limit:
            return None
        return f"a prompt of {len(ids)} tokens and {params.max_tokens} new ones exceed the model's {limit} positions"

    def _prompt(self, request: ChatRequest) -> tuple[list[int], bool]:
        """Return the ids of a prompt, and whether it ends inside the reasoning."""
        need_template(self.tokenizer, self.name)
        text = chat_template.apply(self.tokenizer, request.messages, prompt=True)
        text += request.prefill or ""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start, end = self.tags
        return ids, text.rfind(start) > text.rfind(end) and text.rstrip().endswith(start)

    def _seed(self, params: GenParams, index: int) -> int:
        return secrets.randbits(62) if params.seed is None else params.seed + index

    def _result(self, prompt: tuple[list[int], bool], samples: Sequence[Sample]) -> ChatResult:
        ids, opened = prompt
        choices = []
        for drawn in samples:
            text = self.tokenizer.decode(drawn.tokens, skip_special_tokens=True)
            reasoning, answer, _ = split_reasoning(text, tags=self.tags, opened=opened)
            choices.append(Choice(answer, reasoning, "stop" if drawn.ended else "length", self._words(drawn.logprobs)))
        written = sum(len(drawn.tokens) for drawn in samples)
        return ChatResult(tuple(choices), Usage(len(ids), written))

    def _words(self, likely: list[dict[int, float]] | None) -> list[dict[str, float]] | None:
        if likely is None:
            return None
        return [{self.tokenizer.decode([token]): value for token, value in position.items()} for position in likely]


def need_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that cannot write a conversation.

    Raises:
        CheckpointError: It has no chat template.
    """
    if not tokenizer.chat_template:
        raise CheckpointError(f"The tokenizer of {name} has no chat template. Use an instruction-tuned model.")
