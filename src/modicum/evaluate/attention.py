"""What masking does to attention: less on what was masked, more spread on the rest, mass on the answer's span.

The published figures compare two models on one masked input; a reading of their formula compares clean and masked
input of one model. :func:`measure_contrast` does either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from modicum.errors import ModicumError

Between: TypeAlias = Literal["models", "inputs"]


class Contrast(NamedTuple):
    """How attention b differs from attention a.

    Args:
        score_decay: Share of the mean attention on selected keys that b has lost against a.
        variance_increase: Relative growth of the variance of attention over the other keys.
    """

    score_decay: float
    variance_increase: float


def attention_contrast(
    attn_a: Float[Tensor, "*layers b h q k"],
    attn_b: Float[Tensor, "*layers b h q k"],
    selected: Bool[Tensor, "b k"],
    *,
    key_mask: Bool[Tensor, "b k"] | None = None,
) -> Contrast:
    r"""Compare two attentions on selected keys and on the rest.

    .. math::
        \frac{\bar A_a - \bar A_b}{\bar A_a} \text{ over selected keys}, \qquad
        \frac{V_b - V_a}{V_a} \text{ with } V \text{ the variance over the other keys}

    Each query counts once: its mean over the selected keys it can see and its variance over the others. Queries that
    do not see at least one of each are left out; heads, layers and queries are averaged. The published variance
    figure is a difference given in per cent; taking it relative to a is our reading.

    Args:
        attn_a: Attention weights to compare with, keys causal.
        attn_b: Attention weights that are compared.
        selected: Keys that were masked.
        key_mask: Keys that are not padding.

    Example:
        >>> a = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0.4, 0.4, 0.2]]]])
        >>> b = torch.tensor([[[[1.0, 0, 0], [0.75, 0.25, 0], [0.6, 0.2, 0.2]]]])
        >>> decay = attention_contrast(a, b, torch.tensor([[False, True, False]])).score_decay
        >>> round(decay, 3)
        0.5
    """
    if attn_a.shape != attn_b.shape:
        raise ModicumError(
            f"Attentions have shapes {tuple(attn_a.shape)} and {tuple(attn_b.shape)}, expected the same."
        )
    queries, keys = attn_a.shape[-2:]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=attn_a.device).tril(keys - queries)[None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, :] & key_mask[:, None, keys - queries :].mT
    chosen, others = visible & selected[:, None, :], visible & ~selected[:, None, :]
    usable = (chosen.any(-1) & others.any(-1))[:, None]  # (b, 1, q): heads and layers share it
    if not bool(usable.any()):
        raise ModicumError("No query sees both a selected and another key. Select keys before the last position.")
    (mean_a, var_a), (mean_b, var_b) = (_moments(x, chosen[:, None], others[:, None], usable) for x in (attn_a, attn_b))
    return Contrast(float((mean_a - mean_b) / mean_a), float((var_b - var_a) / var_a))


def attention_mass(
    attn: Float[Tensor, "*layers b h q k"], segments: Mapping[str, Bool[Tensor, "b k"]], *, query: int = -1
) -> dict[str, float]:
    """Return the share of attention that one query gives to each segment, over heads, layers and rows.

    Example:
        >>> attn = torch.tensor([[[[0.1, 0.7, 0.2]]]])
        >>> mass = attention_mass(attn, {"answer": torch.tensor([[False, True, False]])})
        >>> round(mass["answer"], 3)
        0.7
    """
    row = attn[..., query, :].double()
    return {name: float((row * mark[:, None]).sum(-1).mean()) for name, mark in segments.items()}


@torch.no_grad()
def attention_of(
    model: Any, input_ids: Int[Tensor, "b t"], *, attention_mask: Int[Tensor, "b t"] | None = None
) -> Float[Tensor, "l b h t t"]:
    """Return the attention weights of every layer; the model must run its eager attention."""
    found = model(input_ids=input_ids, attention_mask=attention_mask, output_attentions=True).attentions
    if not found or found[0] is None:
        raise ModicumError(
            "The model gave no attention weights. Load it with attn_implementation='eager': the fast kernels keep none."
        )
    return torch.stack(tuple(found)).float()


def measure_contrast(
    model: Any,
    other: Any,
    input_ids: Int[Tensor, "b t"],
    masked_ids: Int[Tensor, "b t"],
    *,
    between: Between = "models",
    attention_mask: Int[Tensor, "b t"] | None = None,
) -> Contrast:
    """Compare attention between two models on the masked input, or between clean and masked input of the second.

    Args:
        model: The model to compare with, such as one trained without masks; unused between inputs.
        other: The model that was trained with masks.
        input_ids: Clean ids.
        masked_ids: The same ids, some masked; where they differ are the selected keys.
        between: ``models`` or ``inputs``.
        attention_mask: Marks padding with 0.
    """
    first = (model, masked_ids) if between == "models" else (other, input_ids)
    attn_a = attention_of(*first, attention_mask=attention_mask)
    attn_b = attention_of(other, masked_ids, attention_mask=attention_mask)
    key_mask = None if attention_mask is None else attention_mask.bool()
    return attention_contrast(attn_a, attn_b, input_ids != masked_ids, key_mask=key_mask)


def _moments(attn: Tensor, chosen: Tensor, others: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    weights = attn.double()
    mean = _mean(weights, chosen)
    center = _mean(weights, others)
    variance = _mean((weights - center[..., None]) ** 2, others)
    return _mean_over(mean, usable), _mean_over(variance, usable)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum(-1) / where.sum(-1).clamp(min=1)


def _mean_over(values: Tensor, usable: Tensor) -> Tensor:
    shared = usable.expand(values.shape)
    return values[shared].mean()
