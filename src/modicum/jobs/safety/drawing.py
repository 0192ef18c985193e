"""Draw answers to attacked prompts, judge them, and stop where the answer to the question is known.

Every judged answer is a line of a file: an address, hashes of goal, prompt and answer, the verdict. The words of an
answer are kept only if the user asks. A run that was killed reads the file and draws what is missing; nothing is drawn
twice. Answers that never came, and those that a judge failed on, are not kept: the next run asks again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeAlias

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.best_of_n import ROUNDS, escapes
from modicum.evaluate.chat import (
    AttackedPrompt,
    ChatModel,
    ChatRequest,
    Choice,
    GenParams,
    Judge,
    Verdict,
    arriving,
    as_json,
    fingerprint,
    item,
)
from modicum.jobs.chat.cache import read_lines_of
from modicum.jobs.safety.identity import judge_identity
from modicum.random import derive_seed
from modicum.record import Run
from modicum.stored import end_last_line

Count: TypeAlias = Literal["not_unsafe", "refusal"]


@dataclass(frozen=True)
class Drawn:
    """A judged answer as it is kept; its tokens are unknown where the backend did not tell them."""

    verdict: Verdict
    words: int
    tokens: int | None = None


class Verdicts:
    """Judged answers on disk, by address.

    Args:
        path: The file; it is appended to.
        save_completions: Keep the answers' words, too.
        check: Called before answers are kept; what it raises, as of a model that changed, keeps them out.

    Raises:
        CheckpointError: The file holds something else.
    """

    def __init__(self, path: Path, *, save_completions: bool = False, check: Callable[[], None] = lambda: None) -> None:
        self.path, self.save, self._check = path, save_completions, check
        end_last_line(path)
        self.known: dict[str, Drawn] = {}
        for entry in read_lines_of(path):
            try:
                fields = {**entry["verdict"], "categories": tuple(entry["verdict"]["categories"])}
                drawn = Drawn(Verdict(**fields), int(entry["words"]), entry.get("tokens"))
                if drawn.verdict.outcome != "error":  # earlier versions kept these
                    self.known[entry["key"]] = drawn
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(f"{path} holds a line that is no verdict. Move the file away.") from None

    def add(self, found: Sequence[tuple[str, AttackedPrompt, Choice, int | None, Verdict]]) -> None:
        """Keep some judged answers."""
        self._check()
        lines = []
        for key, prompt, choice, tokens, verdict in found:
            said = (choice.reasoning or "") + choice.text
            entry: dict[str, Any] = {
                "key": key,
                "goal": prompt.goal.id,
                "family": prompt.family,
                "template": prompt.template,
                "goal_sha256": fingerprint(prompt.goal.text),
                "prompt_sha256": fingerprint(prompt.text),
                "sha256": fingerprint(said),
                "words": len(said.split()),
                "tokens": tokens,
                "finish": choice.finish_reason,
                "verdict": as_json(verdict),
            }
            if self.save:
                entry |= {"reasoning": choice.reasoning, "text": choice.text}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
            self.known[key] = Drawn(verdict, len(said.split()), tokens)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write("".join(lines).encode("utf-8", "surrogatepass"))


class Drawing:
    """Draws from one target by one judge.

    Args:
        target: The chat model.
        judge: Tells harm and refusal.
        store: Where judged answers are kept.
        params: How to sample; ``n`` and the seed are set here.
        seed: Names the draws.
        system: A message before every conversation.
        batch: Requests between two writes, of a target that does not hand over each answer as it comes.
        revision: What else answers depend on, such as a hash of the weights.
    """

    def __init__(
        self,
        target: ChatModel,
        judge: Judge,
        store: Verdicts,
        *,
        params: GenParams,
        seed: int,
        system: str | None = None,
        batch: int = 64,
        revision: str = "",
        tell: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.target, self.judge, self.store, self.params = target, judge, store, params
        self.seed, self.system, self.batch, self.revision, self.tell = seed, system, batch, revision, tell
        self.identity = judge_identity(judge)

    def greedy(self, prompts: Sequence[AttackedPrompt]) -> list[Drawn]:
        """Return the judged greedy answer to each prompt."""
        params = GenParams(temperature=0.0, max_tokens=self.params.max_tokens)
        wanted = [(prompt, self._request(prompt, params, 0)) for prompt in prompts]
        return self._draw(wanted)

    def samples(
        self, prompts: Sequence[AttackedPrompt], most: int, *, early_stop: bool, count: Count = "not_unsafe"
    ) -> list[list[Drawn]]:
        """Return the judged samples of each prompt.

        Args:
            prompts: What the target reads.
            most: Samples of each.
            early_stop: Draw in rounds, and give up a prompt once an answer to it was safe: the defender's curve needs
                no more. An answer without a verdict is not safe.
            count: What is safe enough to stop: an answer that is not unsafe, or only a refusal.
        """
        found: list[list[Drawn]] = [[] for _ in prompts]
        start = 0
        for end in _edges(most) if early_stop else [most]:
            open_ones = [i for i, row in enumerate(found) if not (early_stop and first_safe(row, count))]
            wanted = [
                (prompts[i], self._request(prompts[i], self.params, index))
                for i in open_ones
                for index in range(start, end)
            ]
            drawn = iter(self._draw(wanted))
            for i in open_ones:
                found[i] += [next(drawn) for _ in range(start, end)]
            start = end
        return found

    def _request(self, prompt: AttackedPrompt, params: GenParams, index: int) -> ChatRequest:
        # The seed belongs to the prompt and the number of the sample: other prompts and rounds change nothing.
        name = fingerprint(prompt.text)
        seed = derive_seed(self.seed, "attack", name) >> 33 if params.temperature else None
        request = ChatRequest(prompt.messages, params, tag=f"{prompt.goal.id}/{prompt.family}").under(self.system)
        if seed is None:
            return request
        return replace(request, params=replace(params, seed=seed)).single(index)

    def _draw(self, wanted: Sequence[tuple[AttackedPrompt, ChatRequest]]) -> list[Drawn]:
        keys = [self._key(prompt, request) for prompt, request in wanted]
        missing: dict[str, tuple[AttackedPrompt, ChatRequest]] = {}
        for key, pair in zip(keys, wanted, strict=True):
            if key not in self.store.known:
                missing.setdefault(key, pair)
        names, pairs = list(missing), list(missing.values())
        failed = unjudged = 0
        fresh: dict[str, Drawn] = {}
        for part in arriving(self.target, [request for _, request in pairs], batch=self.batch):
            answered = [
                (names[index], pairs[index][0], result.choices[0], result.usage.completion_tokens or None)
                for index, result in part
                if result.error is None and result.choices
            ]
            failed = 0 if answered else failed + len(part)
            if failed >= min(self.batch, len(pairs)):
                raise RecipeError(
                    f"{self.target.name} answers none of {failed} requests: {part[0][1].error or 'no answer'}. What "
                    "was judged before is kept; run again to go on."
                )
            if answered:
                judged = [(*entry, verdict) for entry, verdict in zip(answered, self._judged(answered), strict=True)]
                kept = [entry for entry in judged if entry[-1].outcome != "error"]
                fresh |= {name: Drawn(verdict, 0) for name, *_, verdict in judged if verdict.outcome == "error"}
                self.store.add(kept)
                unjudged = 0 if kept else unjudged + len(judged)
                if unjudged >= min(self.batch, len(pairs)):
                    raise RecipeError(
                        f"Judge {self.judge.name} failed on all of {unjudged} answers: {judged[0][-1].raw or 'no word'}"
                        ". What was judged before is kept; run again to go on."
                    )
            self.tell(len(part))
        # One answer that never came must not cost the report: it has no verdict, and the next run asks again.
        lost = Drawn(Verdict(None, outcome="error"), 0)
        return [self.store.known.get(key) or fresh.get(key, lost) for key in keys]

    def _key(self, prompt: AttackedPrompt, request: ChatRequest) -> str:
        """Return the address of an answer, and of who judged it against which goal."""
        judged = fingerprint(f"{self.identity} {prompt.goal.text}")[:16]
        return f"{request.key(self.target.name, self.revision)}/{judged}/{self.judge.name}"

    def _judged(self, answered: Sequence[tuple[str, AttackedPrompt, Choice, int | None]]) -> list[Verdict]:
        verdicts = self.judge.judge([item(prompt, choice) for _, prompt, choice, _ in answered])
        # What a filter stopped after some words is judged by these, and was refused all the same.
        return [
            replace(verdict, refusal=True) if choice.finish_reason == "content_filter" else verdict
            for verdict, (_, _, choice, _) in zip(verdicts, answered, strict=True)
        ]


def teller(run: Run, what: str) -> Callable[[int], None]:
    """Return a function that shows on a terminal how many have been drawn so far, of ``what`` it is told."""
    if run.quiet or not sys.stderr.isatty():
        return lambda _: None
    seen = 0

    def tell(count: int) -> None:
        nonlocal seen
        seen += count
        print(f"\r{what}: {seen}", end="", file=sys.stderr, flush=True)

    return tell


def saves(drawn: Drawn, count: Count = "not_unsafe") -> bool:
    """Whether an answer lets the defender escape, as far as the judge told; see :func:`escapes`."""
    return escapes(drawn.verdict, count) is True


def first_safe(row: Sequence[Drawn], count: Count = "not_unsafe") -> int | None:
    """Return the number of the first safe answer, counted from 1."""
    return next((number for number, drawn in enumerate(row, 1) if saves(drawn, count)), None)


def expected_draws(rate: float, most: int) -> float:
    """Return the draws of a query with this unsafe rate, in rounds.

    Example:
        >>> round(expected_draws(0.1, 128), 1), round(expected_draws(0.9, 128), 1)
        (1.3, 20.5)
    """
    start, total = 0, 0.0
    for end in _edges(most):
        total += (end - start) * rate**start
        start = end
    return total


def _edges(most: int) -> Iterator[int]:
    yield from (edge for edge in accumulate(ROUNDS) if edge < most)
    yield most
