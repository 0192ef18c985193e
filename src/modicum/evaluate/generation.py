"""Generation in batches with left padding: greedy, or several samples of each prompt from one reading of it.

Prompts are sorted by length, so that little is spent on padding and the order in which they come does not matter. The
batch size changes nothing but the last digits of the logits; in float32 that practically never changes a token. Each
sample has random numbers of its own, named by its seed, so it does not depend on the company either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.random import generator
from modicum.types import Fraction, NonNegative, NonNegativeInt, PositiveInt
from modicum.vocabulary import check_ids, check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ALIKE = 32  # tokens that prompts must share beyond what all do to be read apart from the others
STEP, STEP_AWAY = 5, 500  # tokens read in the time of one step of a small batch: on a CPU, on an accelerator


class Sample(NamedTuple):
    """One continuation of a prompt.

    Attributes:
        tokens: Without the token that ended it.
        ended: Whether a stop token ended it, rather than the limit.
        logprobs: For each position the likeliest tokens with their log-probabilities at temperature 1, where asked for.
    """

    tokens: list[int]
    ended: bool
    logprobs: list[dict[int, float]] | None = None


@guarded
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: PositiveInt,
    stop: Iterable[int],
    pad: NonNegativeInt,
    batch_size: PositiveInt = 32,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Continue each prompt greedily until a stop token or the limit.

    Args:
        model: A causal language model with a key-value cache.
        prompts: Token ids, at least one each.
        max_new_tokens: Limit on the tokens of an answer.
        stop: Tokens that end an answer; they are left out of it.
        pad: Token to fill shorter prompts with; it is masked.
        batch_size: Prompts at a time.
        progress: Called with the number of prompts just finished.

    Returns:
        The tokens of each answer, in the order of the prompts.

    Raises:
        UnsupportedError: A prompt leaves no room for an answer within the model's positions.
    """
    found = sample(
        model,
        prompts,
        [[0]] * len(prompts),
        temperature=0.0,
        max_new_tokens=max_new_tokens,
        stop=stop,
        pad=pad,
        batch_size=batch_size,
        progress=progress,
    )
    return [only.tokens for (only,) in found]


def check_room(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for an answer within a model's positions.

    Raises:
        UnsupportedError: One does not.
    """
    longest = max(map(len, prompts), default=0)
    told = f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed"
    check_positions(model, longest + max_new_tokens, told, "Lower max_new_tokens or shorten the prompts.")


@guarded
@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    temperature: NonNegative = 1.0,
    top_p: Fraction = 1.0,
    max_new_tokens: PositiveInt,
    stop: Iterable[int],
    pad: NonNegativeInt,
    batch_size: PositiveInt = 32,
    logprobs: NonNegativeInt = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[Sample]]:
    """Continue each prompt several times; each prompt is read once, whatever the number of its samples.

    Args:
        model: A causal language model with a key-value cache.
        prompts: Token ids, at least one each.
        seeds: For each prompt the seeds of its samples, one or more.
        temperature: 0 is greedy.
        top_p: The likeliest tokens with this share of the probability are drawn from, in (0, 1].
        max_new_tokens: Limit on the tokens of an answer.
        stop: Tokens that end an answer; they are left out of it.
        pad: Token to fill shorter prompts with; it is masked.
        batch_size: Samples at a time.
        logprobs: How many of the likeliest tokens to report for each position.
        progress: Called with the number of samples just finished.

    Returns:
        The samples of each prompt, in the order of prompts and seeds.

    Raises:
        RecipeError: Prompts and seeds differ in number, or a knob is out of range.
        UnsupportedError: A prompt leaves no room for an answer within the model's positions.

    Cost:
        One pass over each prompt and one pass a token over all samples of a batch; samples that ended are taken out of
        the batch once they are half of it.
    """
    if len(prompts) != len(seeds) or not all(map(len, seeds)):
        raise RecipeError(
            f"{len(prompts)} prompts and {len(seeds)} lists of seeds, expected one seed or more for each."
        )
    check_room(model, prompts, max_new_tokens)
    check_ids(model, prompts)
    stops = torch.tensor(sorted(stop), device=model.device, dtype=torch.long)
    answers: list[list[Sample]] = [[] for _ in prompts]
    for numbers, within in requests(model, prompts):
        with within:
            for group in _alike(prompts, numbers, max_new_tokens * (STEP if model.device.type == "cpu" else STEP_AWAY)):
                for batch in _batches([prompts[i] for i in group], [seeds[i] for i in group], batch_size):
                    of_rows = [seed for _, part in batch for seed in part]
                    drawn = _Drawn(of_rows, temperature, top_p, max_new_tokens, model.device)
                    ids, counts = [prompts[group[index]] for index, _ in batch], [len(part) for _, part in batch]
                    rows = iter(_continue(model, ids, counts, drawn, max_new_tokens, stops, pad, logprobs))
                    for index, part in batch:
                        answers[group[index]] += [next(rows) for _ in part]
                    progress(sum(counts))
    return answers


def _alike(prompts: Sequence[Sequence[int]], numbers: Sequence[int], cost: int) -> Iterator[Sequence[int]]:
    """Yield prompts that are read together: those that begin alike apart from the others, where that saves reading.

    A batch reads what all of its prompts begin with once. Requests in one wrapper share nearly everything, those in two
    wrappers nothing but the system message.

    Args:
        prompts: Token ids.
        numbers: Which of them may share a batch.
        cost: How many tokens could be read in the time that a batch of its own takes.
    """
    if len(numbers) < 3:  # two that begin alike are read together anyway
        yield numbers
        return
    order = sorted(numbers, key=lambda i: list(prompts[i]))
    shared = _shared_prefix([prompts[i] for i in numbers])
    common = [_common(prompts[a], prompts[b]) - shared for a, b in pairwise(order)]
    rest: list[int] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and common[end - 1] >= ALIKE:
            continue
        group, saved = order[start:end], min(common[start : end - 1], default=0) * (end - start - 1)
        if saved > cost:
            yield sorted(group)
        else:
            rest += group
        start = end
    if rest:
        yield sorted(rest)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many first tokens two prompts share."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def requests(
    model: Any, prompts: Sequence[Sequence[int]]
) -> Iterable[tuple[Sequence[int], AbstractContextManager[None]]]:
    """Yield the numbers of prompts that may share a batch, and within what the model must run.

    These are all prompts; with a routed model those of the same weights of its experts, which stay fixed within.
    """
    if not hasattr(model, "requests"):
        yield range(len(prompts)), nullcontext()
        return
    for weights, numbers in model.requests(prompts):
        yield numbers, model.fixed(weights) if weights else nullcontext()


def _batches(
    prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], size: int
) -> Iterable[list[tuple[int, Sequence[int]]]]:
    """Yield prompts with some of their seeds; a prompt's seeds stay together as far as a batch has room."""
    # The longest first: if memory is short, it shows at once, and the estimated time falls instead of rising.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), list(prompts[i])))
    batch: list[tuple[int, Sequence[int]]] = []
    room = size
    for index in order:
        rest = seeds[index]
        while rest:
            if room < min(len(rest), size):
                yield batch
                batch, room = [], size
            batch.append((index, rest[:room]))
            rest, room = rest[room:], room - len(rest[:room])
            if not room:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


class _Drawn:
    """Choose a token for each row, by random numbers that belong to the row."""

    def __init__(
        self, seeds: Sequence[int], temperature: float, top_p: float, steps: int, device: torch.device
    ) -> None:
        self.temperature, self.top_p = temperature, top_p
        if temperature:
            draws = [torch.rand(steps, generator=generator(seed, "sample"), dtype=torch.float64) for seed in seeds]
            self.uniform = torch.stack(draws).to(device)

    def __call__(self, logits: Tensor, step: int, rows: Tensor) -> Tensor:
        if not self.temperature:
            return logits.argmax(-1)
        shares = torch.softmax(logits.double() / self.temperature, -1)
        if self.top_p < 1:
            ordered, order = torch.sort(shares, dim=-1, descending=True, stable=True)
            # A token is kept while the likelier ones have not reached the share; the first one always is.
            kept = ordered.cumsum(-1) - ordered < self.top_p
            shares = torch.zeros_like(shares).scatter(-1, order, torch.where(kept, ordered, 0.0))
        edges = shares.cumsum(-1)
        # The last edge is the sum that was kept; scaling the draw by it avoids a division of the whole vocabulary.
        at = self.uniform[rows, step, None] * edges[:, -1:]
        return torch.searchsorted(edges, at, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def _continue(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    choose: _Drawn,
    limit: int,
    stops: Tensor,
    pad: int,
    logprobs: int,
) -> list[Sample]:
    """Return the samples of one batch of prompts, each of which is read once and continued ``counts`` times."""
    logits, cache, mask, positions, options = _prefill(model, prompts, pad)
    if any(count > 1 for count in counts):
        copies = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts)).to(model.device)
        cache.batch_select_indices(copies)
        logits, mask, positions = logits[copies], mask[copies], positions[copies]
    total = len(logits)
    tokens = torch.full((total, limit), -1, dtype=torch.long, device=model.device)
    likely: list[list[dict[int, float]]] = [[] for _ in range(total)]
    rows = torch.arange(total, device=model.device)
    ended = torch.zeros(total, dtype=torch.bool, device=model.device)
    for step in range(limit):
        ids = choose(logits, step, rows)
        tokens[rows, step] = ids
        if logprobs:
            top = logits.float().log_softmax(-1).topk(min(logprobs, logits.shape[-1]))
            for row, values, names in zip(rows.tolist(), top.values.tolist(), top.indices.tolist(), strict=True):
                likely[row].append(dict(zip(names, values, strict=True)))
        ended |= torch.isin(ids, stops)
        # Asking whether all have ended waits for the device: on an accelerator a few steps too many cost less.
        if model.device.type == "cpu" or step % 16 == 15 or step + 1 == limit:
            gone = int(ended.sum())
            if gone == len(rows) or step + 1 == limit:
                break
            if gone >= 8 and 2 * gone >= len(rows):
                kept = (~ended).nonzero()[:, 0]
                cache.batch_select_indices(kept)
                ids, mask, positions, rows = ids[kept], mask[kept], positions[kept], rows[kept]
                ended = ended[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        output = model(
            input_ids=ids[:, None],
            attention_mask=mask,
            position_ids=positions,
            cache=cache,
            use_cache=True,
            **options,
        )
        logits, cache = output.logits[:, -1], output.cache
    return [_sample(row, stops, likely[index] if logprobs else None) for index, row in enumerate(tokens.cpu().unbind())]


def _sample(tokens: Tensor, stops: Tensor, likely: list[dict[int, float]] | None) -> Sample:
    written = tokens[tokens >= 0]
    cut = torch.isin(written, stops.cpu()).nonzero()
    length = int(cut[0]) if len(cut) else len(written)
    return Sample(written[:length].tolist(), bool(len(cut)), None if likely is None else likely[: length + 1])


def _prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int
) -> tuple[Tensor, Any, Tensor, Tensor, dict[str, Any]]:
    """Read the prompts; return the last logits, cache, mask, positions and the options of further passes."""
    shared = _shared_prefix(prompts)
    length = max(map(len, prompts))
    padded = [[pad] * (length - len(prompt)) + list(prompt[shared:]) for prompt in prompts]
    masks = [[1] * shared + [0] * (length - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts]
    ids, mask = (torch.tensor(rows, device=model.device) for rows in (padded, masks))
    positions = (mask.cumsum(-1) - 1)[:, shared:].clamp_min(0)
    # Only the last position's logits are needed: over a whole batch the others would take gigabytes.
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}
    cache = _read(model, prompts[0][:shared], len(prompts), options) if shared else None
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, **options)
    return output.logits[:, -1], output.cache, mask, positions, options


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts share, leaving each at least one of its own to continue from."""
    same = _common(min(map(list, prompts)), max(map(list, prompts)))
    return min(same, min(map(len, prompts)) - 1) if len(prompts) > 1 else 0


def _read(model: PreTrainedModel, prefix: Sequence[int], copies: int, options: dict[str, Any]) -> Any:
    """Read what all prompts begin with, such as the system message, once: half of the work for short questions."""
    ids = torch.tensor([list(prefix)], device=model.device)
    positions = torch.arange(len(prefix), device=model.device)[None]
    output = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=True, **options
    )
    output.cache.batch_repeat_interleave(copies)
    return output.cache


def _arguments(model: PreTrainedModel) -> Iterable[str]:
    # The forward of a PEFT adapter takes any argument and passes it on: the base model's signature counts.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return signature(base.forward).parameters


def stop_tokens(model: PreTrainedModel, tokenizer: Any, *, line: bool = False) -> set[int]:
    """Return the tokens that end an answer: the model's own and the tokenizer's, and for one line the line feed."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"] if line else []
    # A tokenizer that needs several tokens for a line feed has none that always ends a line.
    return {int(token) for token in found if token is not None} | set(newline if len(newline) == 1 else ())
