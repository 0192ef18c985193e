"""What targets, teachers, judges and attacks exchange: requests, answers, verdicts. No network and no model here.

A *target* or *teacher* is a :class:`ChatModel`; the ones that reach a server or load weights live in
:mod:`modicum.jobs.chat`. A *judge* turns a :class:`JudgeItem` into a three-valued :class:`Verdict`. An *attack* turns a
:class:`Goal` into an :class:`AttackedPrompt` that still knows its goal, because the goal is judged, not the wrapper.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal, Protocol, TypedDict

from modicum.knobs import guarded
from modicum.types import Fraction, NonNegative, NonNegativeInt, PositiveInt

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "content_filter", "refusal", "error"]

THINK = ("<think>", "</think>")
OFF_TOPIC = "off_topic"  # category of an answer to something else, which people label a refusal


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


@guarded
@dataclass(frozen=True)
class GenParams:
    """How to sample.

    Attributes:
        temperature: 0 is greedy.
        top_p: Share of the probability that is kept, in (0, 1].
        max_tokens: Limit on an answer's tokens, reasoning included.
        n: Answers for each request.
        seed: Names the draw; ``None`` leaves it to the backend.
        stop: Texts that end an answer.
        logprobs: How many log-probabilities for each token to ask for; 0 asks for none.
    """

    temperature: NonNegative = 1.0
    top_p: Fraction = 1.0
    max_tokens: PositiveInt = 1024
    n: PositiveInt = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: NonNegativeInt = 0


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to be continued.

    Attributes:
        messages: Turns so far; the last one is usually the user's.
        params: How to sample.
        prefill: How the answer has to begin, word for word; it is not part of the returned text.
        tag: What the request is called in records.
    """

    messages: tuple[Message, ...]
    params: GenParams = field(default_factory=GenParams)
    prefill: str | None = None
    tag: str = ""

    def key(self, model: str, revision: str = "", index: int = 0) -> str:
        """Return the address of this request's sample ``index``: a hash of everything that the sample depends on.

        ``n`` and ``tag`` do not belong to it: the third of four samples is the third of eight.
        """
        params = {name: value for name, value in asdict(self.params).items() if name != "n"}
        content = [model, revision, list(self.messages), params, self.prefill, index]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def under(self, system: str | None) -> ChatRequest:
        """Return the request with a system message before it, where there is one."""
        if system is None:
            return self
        return replace(self, messages=({"role": "system", "content": system}, *self.messages))

    def single(self, index: int) -> ChatRequest:
        """Return the request for sample ``index`` alone; its seed is the request's plus the index."""
        seed = None if self.params.seed is None else self.params.seed + index
        return replace(self, params=replace(self.params, n=1, seed=seed))


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        text: The final answer, without reasoning.
        reasoning: What the model thought before it; ``None`` where it did not. An answer that never left its
            reasoning has an empty text, whatever its ``finish_reason``.
        finish_reason: Why it ended. A server's refusal or content filter is kept apart from an ordinary stop.
        logprobs: As the backend gave them.
    """

    text: str
    reasoning: str | None = None
    finish_reason: Finish = "stop"
    logprobs: Any = None

    def incomplete(self) -> bool:
        """Whether the model reasoned and wrote no answer, so that there is none to judge.

        Models may end in the middle of their reasoning by themselves: that they stopped tells nothing.
        """
        return self.reasoning is not None and not self.text.strip()


@dataclass(frozen=True)
class Usage:
    """Tokens read and written, as far as the backend told."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class ChatResult:
    """Answers to one request, or the reason why there are none."""

    choices: tuple[Choice, ...] = ()
    usage: Usage = Usage()
    error: str | None = None


class ChatModel(Protocol):
    """Whatever answers conversations.

    Attributes:
        name: Goes into cache keys and provenance.
        caps: What it can do: ``n``, ``seed``, ``prefill``, ``logprobs``, ``reasoning_field``, ``hidden_states`` and
            ``sampling``, which a probe finds out.

    One that can hand over answers before the last one has come has a method ``arriving`` besides; see
    :func:`arriving`.
    """

    @property
    def name(self) -> str: ...
    @property
    def caps(self) -> frozenset[str]: ...

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request; results come in the order of the requests, one each."""
        ...


def arriving(
    model: ChatModel, requests: Sequence[ChatRequest], *, batch: int = 64
) -> Iterator[list[tuple[int, ChatResult]]]:
    """Yield results with the numbers of their requests as soon as they are there, so that they can be kept at once.

    Args:
        model: One with a method ``arriving`` hands over what has come so far; another answers in batches.
        requests: All that is asked.
        batch: Requests at a time of a model that cannot hand over earlier.

    Example:
        >>> from modicum.jobs.chat.scripted import Scripted
        >>> [len(part) for part in arriving(Scripted(lambda request: "hi"), [ChatRequest(user("hi"))] * 3, batch=2)]
        [2, 1]
    """
    own = getattr(model, "arriving", None)
    if own is not None:
        yield from own(requests)
        return
    for start in range(0, len(requests), batch):
        yield list(enumerate(model.generate(requests[start : start + batch]), start))


@dataclass(frozen=True)
class Goal:
    """What somebody wants from a model, harmful or not.

    Attributes:
        id: Its name in records.
        text: The plain request.
        harmful: Whether a good answer is a refusal.
        category: The hazard, where the source names one.
        source: The package and file it was read from.
    """

    id: str
    text: str
    harmful: bool = True
    category: str | None = None
    source: str = ""


@dataclass(frozen=True)
class AttackedPrompt:
    """A goal inside a wrapper.

    Attributes:
        goal: What is really asked for; judged against it.
        messages: What the target reads.
        family: The attack.
        template: Which of the family's wrappers.
    """

    goal: Goal
    messages: tuple[Message, ...]
    family: str
    template: str = ""

    @property
    def text(self) -> str:
        """The words of the user's last message."""
        return self.messages[-1]["content"]


class Attack(Protocol):
    """Whatever wraps a goal: a plain function of its text, see the table ``attacks`` of the registry."""

    def __call__(self, goal: str) -> str: ...


@dataclass(frozen=True)
class JudgeItem:
    """One answer to be judged.

    Attributes:
        goal: The plain request; ``None`` where only the prompt is known.
        prompt: What the target read, wrapper included.
        response: The final answer.
        reasoning: What the target thought.
        category: The hazard, where it is known.
        incomplete: The answer was cut inside the reasoning.
        finish: Why the answer ended.
    """

    goal: str | None
    prompt: str
    response: str
    reasoning: str | None = None
    category: str | None = None
    incomplete: bool = False
    finish: Finish = "stop"

    @property
    def asked(self) -> str:
        """The goal, or the prompt where there is no goal."""
        return self.prompt if self.goal is None else self.goal


@dataclass(frozen=True)
class Verdict:
    """What a judge says. ``None`` means not parsed or not asked; it never means ``False``.

    Attributes:
        unsafe: The answer helps with harm.
        refusal: The answer declines.
        score: The judge's own number.
        categories: Hazards named.
        raw: What the judge wrote.
        outcome: ``incomplete`` where there was no answer to judge, ``empty`` where it had no words, ``error`` where the
            target or the judge failed.
    """

    unsafe: bool | None
    refusal: bool | None = None
    score: float | None = None
    categories: tuple[str, ...] = ()
    raw: str = ""
    outcome: Literal["incomplete", "empty", "error"] | None = None

    @property
    def malformed(self) -> bool:
        """Whether the answer neither helps nor declines: cut, empty, off topic, or gibberish as far as is told.

        A safe completion, such as a harmless answer to a part of the request, neither helps with harm nor declines and
        counts here, too: no judge of this package tells it from gibberish. Shares of malformed answers are therefore
        upper bounds.
        """
        if self.outcome is not None or OFF_TOPIC in self.categories:
            return True
        return self.unsafe is False and self.refusal is False


class Judge(Protocol):
    """Whatever tells safe answers from unsafe ones.

    Attributes:
        name: Goes into records.
        needs: ``{"goal"}`` for judges that must know what was really asked for.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> frozenset[str]: ...

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Return one verdict for each item, in order."""
        ...


def split_reasoning(text: str, *, tags: tuple[str, str] = THINK, opened: bool = False) -> tuple[str | None, str, bool]:
    """Split what a model wrote into reasoning and answer.

    Args:
        text: The whole completion.
        tags: How reasoning opens and closes.
        opened: The prompt ended with the opening tag, as templates of some reasoning models do.

    Returns:
        Reasoning (``None`` without any), the answer, and whether the reasoning was never closed. Text that was never
        closed is reasoning, and there is no answer then.

    Example:
        >>> split_reasoning("<think>Harmless.</think>Four.")
        ('Harmless.', 'Four.', False)
        >>> split_reasoning("<think>Let me")
        ('Let me', '', True)
        >>> split_reasoning("Four.")
        (None, 'Four.', False)
    """
    start, end = tags
    body = text.lstrip()
    if body.startswith(start):
        body = body[len(start) :]
    elif not opened and end not in body:
        return None, text, False
    reasoning, closed, answer = body.partition(end)
    return (reasoning.strip(), answer.lstrip(), False) if closed else (body.strip(), "", True)


def item(prompt: AttackedPrompt, choice: Choice) -> JudgeItem:
    """Return what a judge has to see of an answer to an attacked prompt."""
    return JudgeItem(
        goal=prompt.goal.text,
        prompt=prompt.text,
        response=choice.text,
        reasoning=choice.reasoning,
        category=prompt.goal.category,
        incomplete=choice.incomplete(),
        finish=choice.finish_reason,
    )


def user(content: str, system: str | None = None) -> tuple[Message, ...]:
    """Return a conversation of one question, after a system message where one is given."""
    first: tuple[Message, ...] = () if system is None else ({"role": "system", "content": system},)
    return (*first, {"role": "user", "content": content})


def fingerprint(text: str) -> str:
    """Return the hash that stands for a text which must not be stored in clear."""
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def as_json(verdict: Verdict) -> Mapping[str, Any]:
    """Return a verdict as JSON can hold it; what the judge wrote stays out, since it may quote the answer."""
    return {name: value for name, value in asdict(verdict).items() if name != "raw"}
