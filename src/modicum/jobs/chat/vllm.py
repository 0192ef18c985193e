"""A model on this machine's accelerators by vLLM, which answers many requests at a time: ``pip install vllm``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from modicum.errors import UnsupportedError
from modicum.evaluate.chat import THINK, ChatRequest, ChatResult, Choice, Usage, split_reasoning


@dataclass
class VLLMOffline:
    """Answer with vLLM in this process.

    Each sample is a request of its own with its own seed, so that the third of four is the third of eight; prompts that
    they share are read once through the prefix cache. Seeds reproduce on one machine and version alone.

    Args:
        model: Folder or Hub id.
        options: Further arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.
        tags: How reasoning opens and closes.

    Raises:
        UnsupportedError: vLLM is not installed.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, str] = THINK

    def __post_init__(self) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere
        try:
            vllm = import_module("vllm")
        except ImportError:
            raise UnsupportedError("vLLM is not installed. pip install vllm, or use LocalHF or an endpoint.") from None
        self._params = vllm.SamplingParams
        self._engine = vllm.LLM(model=self.model, **{"enable_prefix_caching": True, **self.options})

    @property
    def name(self) -> str:
        """The reference of the model."""
        return f"{self.model}@vllm"

    @property
    def caps(self) -> frozenset[str]:
        """Everything but a reasoning field and hidden states."""
        return frozenset({"n", "seed", "prefill", "logprobs", "sampling"})

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request; one that is too long has an ``error`` and does not stop the others."""
        tokenizer = self._engine.get_tokenizer()
        limit = self._engine.llm_engine.model_config.max_model_len
        found: list[list[Choice]] = [[] for _ in requests]
        errors: dict[int, str] = {}
        prompts: list[Any] = []
        params: list[Any] = []
        owners: list[int] = []
        read = [0] * len(requests)
        for index, request in enumerate(requests):
            text = tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
            text += request.prefill or ""
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            read[index] = len(ids)
            if len(ids) + request.params.max_tokens > limit:
                errors[index] = f"{len(ids)} tokens and {request.params.max_tokens} new ones exceed {limit} positions"
                continue
            opened = text.rfind(self.tags[0]) > text.rfind(self.tags[1]) and text.rstrip().endswith(self.tags[0])
            for sample in range(request.params.n):
                prompts.append({"prompt_token_ids": ids})
                params.append(self._sampling(request, sample))
                owners.append(index if not opened else ~index)
        written = [0] * len(requests)
        for owner, output in zip(owners, self._engine.generate(prompts, params, use_tqdm=False) if prompts else []):
            index, opened = (owner, False) if owner >= 0 else (~owner, True)
            said = output.outputs[0]
            reasoning, answer, _ = split_reasoning(said.text, tags=self.tags, opened=opened)
            finish = "length" if said.finish_reason == "length" else "stop"
            found[index].append(Choice(answer, reasoning, finish, _words(said.logprobs)))  # type: ignore[arg-type]
            written[index] += len(said.token_ids)
        return [
            ChatResult(tuple(choices), Usage(read[i], written[i]), errors.get(i)) for i, choices in enumerate(found)
        ]

    def _sampling(self, request: ChatRequest, sample: int) -> Any:
        params = request.params
        return self._params(
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=params.max_tokens,
            seed=None if params.seed is None else (params.seed + sample) % 2**63,
            stop=list(params.stop) or None,
            logprobs=params.logprobs or None,
        )


def _words(given: Any) -> list[dict[str, float]] | None:
    if not given:
        return None
    return [{entry.decoded_token: float(entry.logprob) for entry in position.values()} for position in given]
