"""Evaluation: measures, estimators, generation, judges, attacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.evaluate.generation import generate, stop_tokens
    from modicum.evaluate.intervals import Estimate, mean, paired_proportions, ratio, wilson
    from modicum.evaluate.likelihood import log_likelihoods, windows
    from modicum.evaluate.measures.exact_match import exact_match, extract, normalize
    from modicum.evaluate.measures.perplexity import bits_per_byte, perplexity

# Names are loaded when asked for: a report of an old run reads facts of measures, and should not wait for torch.
_HOMES = {
    "generation": ("generate", "stop_tokens"),
    "intervals": ("Estimate", "mean", "paired_proportions", "ratio", "wilson"),
    "likelihood": ("log_likelihoods", "windows"),
    "measures.exact_match": ("exact_match", "extract", "normalize"),
    "measures.perplexity": ("bits_per_byte", "perplexity"),
}

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


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
