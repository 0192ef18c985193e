"""The sections of a recipe of job ``route``: conflict, rule, router, and sizes of one-bit experts fitted to them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt
from pydantic import Field

from modicum.recipe import Section
from modicum.types import Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt

RULES = Literal[
    "mean_std", "topk", "quantile", "absolute", "chance", "budget_bytes", "all", "none", "first", "least", "random"
]


class ConflictSection(Section):
    """How conflict is measured; see :func:`modicum.weights.mediator.layer_conflict`."""

    aggregate: Literal["pairwise_mean", "any"] = Field(
        default="pairwise_mean",
        description="pairwise_mean: over pairs of experts; any: entries on which both signs occur",
    )
    weight: Literal["count", "magnitude"] = Field(
        default="count", description="count entries alike, or weigh each by its magnitude"
    )
    denoise: Literal["topk", "sigma", "none"] = Field(
        default="topk",
        description="entries that count: each expert's largest, those above a multiple of their root mean "
        "square, or all",
    )
    keep: Fraction = Field(default=0.2, description="share of the entries that topk keeps")
    sigma: Positive = Field(default=1.0, description="the multiple of sigma")
    scope: Literal["tensor", "unit"] = Field(
        default="tensor", description="where the threshold is taken: in each tensor, or over the whole unit"
    )
    unit: Literal["block", "sublayer", "matrix"] = Field(
        default="block", description="what a layer is: a block, attention or feed-forward, or a single matrix"
    )


class RuleSection(Section):
    """Which layers are routed; see :func:`modicum.weights.mediator.select_layers`."""

    alone: ClassVar[str | None] = "name"
    name: RULES = Field(
        default="mean_std",
        description="mean_std: conflict above the mean; topk: the k highest; first, least and random are controls",
    )
    c: NonNegative = Field(
        default=1.0,
        description="factor of mean_std and chance: standard deviations above the mean, or multiples of the "
        "chance level",
    )
    k: Positive | None = Field(
        default=None, description="number of layers of topk, first, least and random; below 1 their share"
    )
    q: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.8, description="quantile of the conflict above which quantile takes layers"
    )
    threshold: float = Field(default=0.5, description="conflict above which absolute takes layers")


class RouterSection(Section):
    """How the router is fitted and what it sees; see :func:`modicum.models.router.fit_router`."""

    kind: Literal["linear", "mlp", "subspace", "entropy"] = Field(
        default="linear",
        description="linear or mlp: a classifier; subspace: residuals of each task's directions; entropy: "
        "nothing is fitted",
    )
    tap: NonNegativeInt | Literal["auto"] = Field(
        default="auto", description="block whose input is looked at; auto: the first routed one"
    )
    pooling: Literal["mean", "last"] = Field(
        default="mean", description="feature of a prompt: the mean over its tokens, or its last token"
    )
    second_prefill: bool = Field(default=False, description="read each prompt by the dense weights first")
    held_out: Annotated[float, Gt(0), Lt(1)] = Field(default=0.25, description="share of the prompts to calibrate on")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the target that is spread over all experts"
    )
    gate: Annotated[float, Gt(0), Lt(1)] | None = Field(
        default=None, description="quantile of the held-out distances beyond which a prompt is unknown"
    )
    u_lo: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="uncertainty up to which the likeliest expert stands alone"
    )
    u_hi: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9, description="uncertainty from which on the experts weigh alike"
    )
    nucleus: Fraction = Field(
        default=0.9, description="probability of the smallest set of experts that is kept in between"
    )
    centred: bool = Field(
        default=False,
        description="weigh each expert by its weight less 1/T, for T experts: equal weights are then the dense model",
    )
    batch_size: PositiveInt = Field(default=16, description="prompts at a time")
    least: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.2, description="smallest weight under standardised")
    rank: PositiveInt = Field(default=8, description="directions of each task, for subspace")
    epochs: PositiveInt = Field(default=50, description="for mlp")
    decay: NonNegative = Field(default=1e-3, description="weight decay, for linear and mlp")


class DistilSection(Section):
    """How the sizes of one-bit experts are fitted; see :func:`modicum.models.routed.distilling.distil_scales`."""

    steps: PositiveInt = Field(default=100, description="steps of the optimiser for each expert")
    batch_size: PositiveInt = Field(default=4, description="prompts of a step")
    learning_rate: Positive = Field(default=0.01, description="of the factors on the sizes")
    answer: NonNegativeInt = Field(default=16, description="most tokens that a fine-tune adds of its own to a prompt")
