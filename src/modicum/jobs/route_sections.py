"""The sections of a recipe of job ``route``: conflict, rule, router, and sizes of one-bit experts fitted to them."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Lt
from pydantic import Field

from modicum.recipe import Section
from modicum.types import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt

RULES = Literal[
    "mean_std", "topk", "quantile", "absolute", "chance", "budget_bytes", "all", "none", "first", "least", "random"
]


class ConflictSection(Section):
    """How conflict is measured; see :func:`modicum.weights.mediator.layer_conflict`."""

    aggregate: Literal["pairwise_mean", "any"] = "pairwise_mean"
    weight: Literal["count", "magnitude"] = "count"
    denoise: Literal["topk", "sigma", "none"] = "topk"
    keep: Fraction = 0.2
    sigma: Positive = 1.0
    scope: Literal["tensor", "unit"] = "tensor"
    unit: Literal["block", "sublayer", "matrix"] = "block"


class RuleSection(Section):
    """Which layers are routed; see :func:`modicum.weights.mediator.select_layers`."""

    name: RULES = "mean_std"
    c: NonNegative = 1.0
    k: Positive | None = None
    q: Annotated[float, Field(ge=0, le=1)] = 0.8
    threshold: float = 0.5


class RouterSection(Section):
    """How the router is fitted and what it sees; see :func:`modicum.models.router.fit_router`."""

    kind: Literal["linear", "mlp", "subspace", "entropy"] = "linear"
    tap: NonNegativeInt | Literal["auto"] = Field(
        default="auto", description="block whose input is looked at; auto: the first routed one"
    )
    pooling: Literal["mean", "last"] = "mean"
    second_prefill: bool = Field(default=False, description="read each prompt by the dense weights first")
    held_out: Annotated[float, Gt(0), Lt(1)] = Field(default=0.25, description="share of the prompts to calibrate on")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gate: Annotated[float, Gt(0), Lt(1)] | None = Field(
        default=None, description="quantile of the held-out distances beyond which a prompt is unknown"
    )
    u_lo: Annotated[float, Field(ge=0, le=1)] = 0.1
    u_hi: Annotated[float, Field(ge=0, le=1)] = 0.9
    nucleus: Fraction = 0.9
    centred: bool = False
    batch_size: PositiveInt = 16
    least: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.2, description="smallest weight under standardised")
    rank: PositiveInt = Field(default=8, description="directions of each task, for subspace")
    epochs: PositiveInt = Field(default=50, description="for mlp")
    decay: NonNegative = Field(default=1e-3, description="weight decay, for linear and mlp")


class DistilSection(Section):
    """How the sizes of one-bit experts are fitted; see :func:`modicum.models.routed.distilling.distil_scales`."""

    steps: PositiveInt = 100
    batch_size: PositiveInt = 4
    learning_rate: Positive = 0.01
    answer: NonNegativeInt = Field(default=16, description="most tokens that a fine-tune adds of its own to a prompt")
