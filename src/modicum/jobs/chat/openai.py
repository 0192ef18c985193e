"""Any server that speaks the OpenAI chat protocol: vLLM, SGLang, llama.cpp, Ollama, ``transformers serve``.

Servers differ where the protocol is silent: some ignore ``n``, some write reasoning into a field and some into tags,
some do not sample unless told in a way of their own. The client evens that out, and says what it cannot even out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from modicum.borders import MALFORMED
from modicum.errors import RecipeError
from modicum.evaluate.chat import (
    THINK,
    ChatRequest,
    ChatResult,
    Choice,
    Finish,
    GenParams,
    Usage,
    split_reasoning,
    user,
)
from modicum.jobs.chat.http import Endpoint, FailedError, coming, together
from modicum.knobs import guarded
from modicum.types import NonNegativeInt, Positive, PositiveInt

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FINISH: Mapping[str, Finish] = {"length": "length", "content_filter": "content_filter"}  # others are ordinary stops
SAMPLING = "generation_config"  # the field by which ``transformers serve`` is told how to sample, as JSON
OPEN_QUESTION = "Write one sentence about anything you like."


@guarded
class OpenAICompatible:
    """Ask a server.

    Args:
        base_url: Up to and including ``/v1``.
        model: Its name there.
        api_key_env: Name of the environment variable that holds the key; ``None`` sends none. The key is never logged.
        concurrency: Most requests at a time; the number used adapts to what the server bears.
        timeout: Seconds to wait for one answer.
        retries: How often a request is sent again after 429, 5xx or a lost connection.
        extra_body: Further fields of every request.
        allow_remote: Whether a server on another machine may be asked.
        tags: How reasoning opens and closes where the server does not separate it.
        progress: Called with the number of requests just finished.

    Raises:
        RecipeError: There is no model, the address is no HTTP address, or another machine without ``allow_remote``, a
            field is malformed, or the key's variable is not set.

    Example:
        >>> OpenAICompatible("http://127.0.0.1:8000/v1", "smollm2").name
        'smollm2@127.0.0.1:8000'
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str = "",
        *,
        api_key_env: str | None = None,
        concurrency: PositiveInt = 16,
        timeout: Positive = 120.0,
        retries: NonNegativeInt = 5,
        extra_body: Mapping[str, Any] | None = None,
        allow_remote: bool = False,
        tags: tuple[str, str] = THINK,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        try:
            parts = urlsplit(base_url)
            parts.port  # noqa: B018 - read here, because it is looked at only when it is asked for
        except ValueError as error:
            raise RecipeError(f"base_url is no address: {error}.") from None
        if not model:
            raise RecipeError("model is empty, expected the name that the server knows the model by.")
        alone = not (parts.username or parts.password or parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not parts.hostname or not alone:
            raise RecipeError(
                "base_url is no address such as http://127.0.0.1:8000/v1, without a name, a password or a query in it."
            )
        if parts.hostname not in LOOPBACK and not allow_remote:
            raise RecipeError(
                f"base_url names another machine, {parts.hostname}. Prompts of an evaluation would leave this one: set "
                "allow_remote: true if that is wanted."
            )
        try:
            if not isinstance(json.loads((extra_body or {}).get(SAMPLING, "{}")), dict):
                raise ValueError
        except (TypeError, ValueError):
            raise RecipeError(f"extra_body has a {SAMPLING} that is no JSON object in a text, expected one.") from None
        key = None if api_key_env is None else _key_in(api_key_env, parts.netloc)
        self.model, self.name, self.tags, self.progress = model, f"{model}@{parts.netloc}", tags, progress
        self.extra_body, self.concurrency = dict(extra_body or {}), concurrency
        self.endpoint = Endpoint(base_url.rstrip("/"), key=key, timeout=timeout, retries=retries)
        self.samples: bool | None = None

    @property
    def caps(self) -> frozenset[str]:
        """What the server can do as far as is known; ``sampling`` only after :meth:`probe`."""
        return frozenset({"n", "seed", "logprobs", "reasoning_field", *({"sampling"} if self.samples else ())})

    def probe(self) -> bool:
        """Find out whether the server samples: answers at temperature 1 must differ.

        Two answers settle it where they differ; that four are equal by chance is out of the question for an open wish.
        ``transformers serve`` samples only when told so by a field of its own, which is tried second and kept if it
        helps. Such a server may hold on to how its first request sampled (``--continuous-batching``): then its greedy
        answers differ, and no temperature of a recipe means anything.

        Raises:
            RecipeError: The server does not answer, or samples when asked not to.
        """
        plain = self.extra_body
        own = {SAMPLING: json.dumps(self._fields | {"do_sample": True, "temperature": 1.0, "top_k": 0})}
        said: dict[bool, set[tuple[str, str | None]]] = {False: set(), True: set()}
        for told, seeds in ((False, (0, 1)), (True, (0, 1)), (False, (2, 3)), (True, (2, 3))):
            self.extra_body = plain | (own if told else {})
            request = ChatRequest(user(OPEN_QUESTION), GenParams(max_tokens=24))
            results = self.generate([replace(request, params=replace(request.params, seed=seed)) for seed in seeds])
            failed = next((result.error for result in results if result.error), None)
            if failed and not told:
                self.extra_body = plain
                raise RecipeError(f"{self.name} does not answer: {failed}.")
            if not failed:  # a server that refuses the field has no need of it
                said[told] |= {(result.choices[0].text, result.choices[0].reasoning) for result in results}
            self.samples = len(said[told]) > 1
            if self.samples:
                self._need_greedy()
                return True
        self.extra_body = plain
        return False

    def _need_greedy(self) -> None:
        if SAMPLING not in self.extra_body:
            return
        asked = ChatRequest(user(OPEN_QUESTION), GenParams(temperature=0.0, max_tokens=24))
        first, second = (result.choices for result in self.generate([asked, asked]))
        if first and second and first[0].text != second[0].text:
            raise RecipeError(
                f"{self.name} gives two answers at temperature 0: it samples every request as its first one, as "
                "transformers serve does with --continuous-batching. Start it anew without that option."
            )

    @property
    def _fields(self) -> dict[str, Any]:
        """What requests say to ``transformers serve`` about generation, as the recipe has it."""
        return dict(json.loads(self.extra_body.get(SAMPLING, "{}")))

    def reach(self) -> None:
        """Find out whether the server answers at all, by one token.

        Raises:
            RecipeError: It does not.
        """
        (result,) = self.generate([ChatRequest(user(OPEN_QUESTION), GenParams(temperature=0.0, max_tokens=1))])
        if result.error:
            raise RecipeError(f"{self.name} does not answer: {result.error}.")

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request; one that fails has an ``error`` and does not stop the others."""
        return together(self._answer, requests, most=self.concurrency, endpoint=self.endpoint, progress=self.progress)

    def arriving(self, requests: Sequence[ChatRequest]) -> Iterator[list[tuple[int, ChatResult]]]:
        """Yield results with the numbers of their requests, as they come."""
        yield from coming(self._answer, requests, most=self.concurrency, endpoint=self.endpoint, progress=self.progress)

    def decide(self, states: Sequence[str], questions: Mapping[str, str]) -> list[dict[str, float] | str]:
        """Return the probability of yes to each question about each text (``POST /v1/systemone``).

        A text that the server fails on has an error in words, and does not stop the others.
        """
        asked = {name: {"type": "noul", "instructions": text} for name, text in questions.items()}

        def one(state: str) -> dict[str, float] | str:
            body = {"model": self.model, "state": state, "questions": asked}
            try:
                found = self.endpoint.post("/systemone", body)
                return {name: float(answer["noul"]) for name, answer in found["answers"].items()}
            except FailedError as failed:
                return str(failed)
            except MALFORMED:
                return "the answer is no set of probabilities"

        return together(one, states, most=self.concurrency, endpoint=self.endpoint, progress=self.progress)

    def _answer(self, request: ChatRequest) -> ChatResult:
        choices: list[Choice] = []
        usage, seed = Usage(), request.params.seed
        try:
            while len(choices) < request.params.n:
                # A server that ignores `n` gives one answer: the others are asked for under other seeds.
                missing = request.params.n - len(choices)
                found = self.endpoint.post("/chat/completions", self._body(request, missing, seed, len(choices)))
                fresh = [self._choice(entry) for entry in found["choices"][:missing]]
                if not fresh:
                    raise FailedError("the answer has no choices")
                choices += fresh
                used = found.get("usage") or {}
                usage = Usage(
                    usage.prompt_tokens + int(used.get("prompt_tokens") or 0),
                    usage.completion_tokens + int(used.get("completion_tokens") or 0),
                )
        except FailedError as failed:
            return ChatResult(tuple(choices), usage, str(failed))
        except MALFORMED:
            return ChatResult(tuple(choices), usage, "the answer is no chat completion")
        return ChatResult(tuple(choices), usage)

    def _body(self, request: ChatRequest, n: int, seed: int | None, done: int) -> dict[str, Any]:
        params = request.params
        messages: list[Any] = list(request.messages)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_tokens,
        }
        if n > 1:
            body["n"] = n
        if seed is not None:
            body["seed"] = (seed + done) % 2**31  # servers keep it in 32 bits
        if params.stop:
            body["stop"] = list(params.stop)
        if params.logprobs:
            body |= {"logprobs": True, "top_logprobs": params.logprobs}
        if request.prefill is not None:
            messages.append({"role": "assistant", "content": request.prefill})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        extra = dict(self.extra_body)
        if SAMPLING in extra:
            fields = {
                name: value for name, value in self._fields.items() if name not in ("do_sample", "temperature", "top_p")
            }
            if params.temperature:
                own = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p}
                extra[SAMPLING] = json.dumps({"top_k": 0} | fields | own)
            elif fields.keys() - {"top_k"}:
                extra[SAMPLING] = json.dumps({**fields, "do_sample": False})
            else:
                del extra[SAMPLING]
        return body | extra

    def _choice(self, entry: Mapping[str, Any]) -> Choice:
        message = entry["message"]
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if not isinstance(text, str) or not isinstance(reasoning, str | None):
            raise TypeError  # some servers answer in parts
        finish = FINISH.get(str(entry.get("finish_reason")), "stop")
        if message.get("refusal"):
            text, finish = str(message["refusal"]), "refusal"
        if reasoning is None:
            reasoning, text, _ = split_reasoning(text, tags=self.tags)
        return Choice(text, reasoning, finish, _likely(entry.get("logprobs")))


def _key_in(variable: str, server: str) -> str:
    """Return the key that a variable of the environment holds; a line end, as files of keys have one, is none of it."""
    key = os.environ.get(variable, "").strip()
    if not key:
        # Who takes the variable's name for the key itself must not find it in a log.
        told = variable if variable.isidentifier() and variable.isupper() else "that api_key_env names"
        raise RecipeError(f"The environment variable {told} is not set. Put the key of {server} into it.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise RecipeError(f"The environment variable {variable} holds what no key does. Put the key alone into it.")
    return key


def _likely(given: Any) -> list[dict[str, float]] | None:
    """Return words and log-probabilities of each position, as the protocol nests them."""
    positions = given.get("content") if isinstance(given, Mapping) else None
    if not positions:
        return None
    return [{top["token"]: float(top["logprob"]) for top in at.get("top_logprobs") or [at]} for at in positions]
