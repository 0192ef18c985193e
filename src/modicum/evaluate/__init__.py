"""Evaluation: measures, estimators, generation, judges, attacks."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.evaluate.generation import generate, stop_tokens
    from modicum.evaluate.intervals import Estimate, mean, paired_proportions, ratio, wilson
    from modicum.evaluate.likelihood import log_likelihoods, windows
    from modicum.evaluate.measures.exact_match import exact_match, extract, normalize
    from modicum.evaluate.measures.perplexity import bits_per_byte, perplexity

__all__ = [
    "Estimate",
    "bits_per_byte",
    "exact_match",
    "extract",
    "generate",
    "log_likelihoods",
    "mean",
    "normalize",
    "paired_proportions",
    "perplexity",
    "ratio",
    "stop_tokens",
    "wilson",
    "windows",
]

face(__name__)
