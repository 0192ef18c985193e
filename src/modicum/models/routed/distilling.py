"""The sizes of one-bit experts, fitted so that each expert answers as its whole fine-tune does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from modicum.errors import RecipeError
from modicum.random import generator
from modicum.types import NonNegativeInt, Positive, PositiveInt


class Distilled(NamedTuple):
    """What was fitted for one expert.

    Attributes:
        factors: By which each stored tensor's size is multiplied.
        before: Mean squared error of the logits on the texts held out, with the sizes as they were.
        after: The same, with the fitted ones.
    """

    factors: dict[str, float]
    before: float
    after: float


def distil_scales(
    model: Any,
    teacher: Any,
    texts: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    *,
    expert: NonNegativeInt,
    steps: PositiveInt = 100,
    batch_size: PositiveInt = 4,
    learning_rate: Positive = 0.01,
    seed: int = 0,
) -> Distilled:
    r"""Fit one factor for each stored tensor of an expert, so that its logits are those of the whole fine-tune.

    .. math::
        \min_r \operatorname{mean} \| z(D + r_i \alpha_i \operatorname{sign} \Delta_i) - z(\theta_t) \|^2

    over the tokens of the texts and the vocabulary, by Adam with cosine decay from r = 1.

    Args:
        model: A routed model in float32, of experts in the store ``sign``. It computes with the fitted sizes of the
            expert until another mixture is written; what is stored stays as it was.
        teacher: The whole fine-tune, of the host's architecture.
        texts: Token ids to fit on; no labels are read.
        held_out: Token ids to measure on.
        expert: Its number.
        steps: Steps of the optimiser.
        batch_size: Texts a step.
        learning_rate: Of the factors; 0.01 moves each by about a hundredth a step.
        seed: Of the order of the texts.

    Raises:
        RecipeError: An error is not finite.

    Example:
        >>> distil_scales(model, fine_tune, texts, held_out, expert=0).factors  # doctest: +SKIP

    Cost:
        A pass of the teacher and one forward and back of the model for each step; the gradient of one tensor at a time.

    Deviates:
        The published method fits α itself, with AdamW at 1e-4, on general text. A factor of α needs no other rate for
        fine-tunes that changed more or less, and here the text is what the expert is asked.

    Reference:
        Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", 2024, arXiv:2402.10193, section 3.1.
    """
    names = [
        name
        for name in model.working.targets
        if (reader := model.experts.reader(name, expert)) is not None and "alpha" in reader.parts
    ]

    def error() -> float:
        found = _error_of(model, teacher, held_out, batch_size)
        if not math.isfinite(found):
            raise RecipeError(
                f"expert {model.experts.about.names[expert]}: the error of its logits is {found}: the fine-tune's own "
                "numbers overflow, or learning_rate is too high. Lower it, or leave the fit out."
            )
        return found

    factors = torch.ones(len(names), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([factors], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    _write(model, expert, dict.fromkeys(names, 1.0))
    before = error()
    with _slopes(model, expert, names) as slopes:
        for batch in _batches(texts, steps, batch_size, generator(seed, "distil_scales", expert)):
            _write(model, expert, dict(zip(names, factors.tolist())))
            slopes.clear()  # a tensor that this batch does not reach has none
            torch.autograd.backward(_error(model, teacher, batch))
            factors.grad = torch.tensor([slopes.get(name, 0.0) for name in names], dtype=torch.float64)
            optimizer.step()
            schedule.step()
    fitted = dict(zip(names, factors.tolist()))
    _write(model, expert, fitted)
    return Distilled(fitted, before, error())


@torch.no_grad()
def _write(model: Any, expert: int, factors: dict[str, float]) -> None:
    """Let the host compute with the expert, each of the tensors with its own factor and all others as stored."""
    model.working.current = ()  # no mixture that is known by its weights
    for name, target in model.working.targets.items():
        coefficients = [0.0] * len(model.experts.about.names)
        coefficients[expert] = factors.get(name, 1.0)
        model.experts.write_(target.detach(), name, coefficients)


@contextmanager
def _slopes(model: Any, expert: int, names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Yield the slope of the last error in every factor; a weight's gradient is dropped as soon as it was read."""
    found: dict[str, float] = {}

    def read(name: str) -> Any:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None  # noqa: S101
            found[name] = float((weight.grad * model.experts.reader(name, expert).dense().to(weight.grad)).sum())
            weight.grad = None

        return take

    targets = [model.working.targets[name] for name in names]
    handles = [
        target.requires_grad_(True).register_post_accumulate_grad_hook(read(name))
        for name, target in zip(names, targets)
    ]
    try:
        yield found
    finally:
        for handle, target in zip(handles, targets):
            handle.remove()
            target.requires_grad_(False)


def _batches(
    texts: Sequence[Sequence[int]], steps: int, size: int, rng: torch.Generator
) -> Iterator[list[Sequence[int]]]:
    """Yield batches that go through all texts in a new order, again and again."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(texts), generator=rng).tolist()
        yield [texts[i] for i in order[:size]]
        del order[:size]


def _error(model: Any, teacher: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean squared error of the logits over all tokens of the texts."""
    length = max(map(len, texts))
    # Padding behind a text reaches no token of it, whatever the host makes of positions.
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=model.device)
    real = torch.arange(length) < torch.tensor([len(text) for text in texts])[:, None]
    with torch.no_grad():
        want = teacher(input_ids=ids, use_cache=False).logits[real].float()
    return functional.mse_loss(model.host(input_ids=ids, use_cache=False).logits[real].float(), want)


@torch.no_grad()
def _error_of(model: Any, teacher: Any, texts: Sequence[Sequence[int]], size: int) -> float:
    """Return the mean of the error over texts, batch by batch, each token counting alike."""
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    tokens = [sum(map(len, part)) for part in parts]
    errors = [float(_error(model, teacher, part)) for part in parts]
    return sum(e * n for e, n in zip(errors, tokens)) / sum(tokens)
