"""Self-speculation: a looped model drafts tokens with few cycles and verifies them with all, in one cache.

The draft is the model itself: same weights, same head and tail, the first cycles alone. It reads the prompt from the
slots that the full passes filled, and what it writes is taken out of every slot before the drafted tokens are verified
in one pass. transformers' assisted decoding decides what is kept, so that greedy text is the same as without a draft,
and sampled text has the same distribution (Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative
Decoding", 2023, arXiv:2211.17192, algorithm 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.candidate_generator import CandidateGenerator

from modicum.errors import RecipeError

DRAFTED = 4  # tokens at first, where the generation configuration names no number
SURE = 0.4  # a token less likely than this ends the draft: it would rarely be kept


class CycleCandidates(CandidateGenerator):
    """Drafts by running ``cycles`` cycles; see ``transformers.generation.CandidateGenerator``.

    The number of tokens grows by two after a draft that was kept whole and falls by one after another, unless the
    generation configuration sets ``num_assistant_tokens_schedule="constant"``.
    """

    requires_model_outputs = True  # this is how the cache is handed over
    model_kwargs_overrides: dict[str, Any] = {}  # noqa: RUF012 - transformers reads it off the class

    def __init__(self, model: Any, cycles: int, config: GenerationConfig, processors: Any) -> None:
        if not 1 <= cycles < model.depth:
            raise RecipeError(
                f"assistant_early_exit is {cycles}: a draft runs fewer cycles than the model, 1 to {model.depth - 1}."
            )
        self.model, self.cycles, self.config, self.processors = model, cycles, config, processors
        self.count = config.num_assistant_tokens or DRAFTED
        sure = config.assistant_confidence_threshold
        self.sure = SURE if sure is None else sure

    @torch.no_grad()
    def get_candidates(
        self, input_ids: Tensor, model_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the text with drafted tokens behind it, and the logits that they were drawn by."""
        kwargs = model_kwargs or {}
        cache, past = kwargs.get("cache"), input_ids.shape[1] - 1
        # One more token comes from the pass that verifies.
        most = min(self.count, self.config.max_length - past - 2)
        if cache is None or cache.get_seq_length() != past or most < 1:
            return input_ids, None  # the prompt is read by a full pass
        call = {name: value for name, value in kwargs.items() if name.startswith(("exit_", "min_cycles"))}
        call |= {"cache": cache, "use_cache": True, "n_cycles": self.cycles, "logits_to_keep": 1, "return_dict": True}
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        drawn: list[Tensor] = []
        for i in range(most):
            if mask is not None:
                call["attention_mask"] = torch.nn.functional.pad(mask, (0, past + 1 + i - mask.shape[1]), value=1)
            if positions is not None:
                call["position_ids"] = positions[:, -1:] + i
            out = self.model(input_ids=input_ids[:, -1:], **call)
            logits = self.processors(input_ids, out.logits[:, -1].float())
            chances = logits.softmax(-1)
            token = torch.multinomial(chances, 1) if self.config.do_sample else logits.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], 1)
            drawn.append(logits)
            if self.sure and float(chances.gather(1, token)) < self.sure:
                break
        cache.crop(-len(drawn))
        return input_ids, torch.stack(drawn, 1)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:  # noqa: ARG002
        """Draft more where all was kept, fewer elsewhere."""
        if self.config.num_assistant_tokens_schedule != "constant":
            whole = num_matches == scores.shape[1] - 1
            self.count = self.count + 2 if whole else max(1, self.count - 1)
