"""Evaluation: measures, estimators, generation, judges, attacks."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.evaluate.best_of_n import (
        BestOfNReport,
        asr_all,
        asr_all_from_first_safe,
        asr_any,
        best_of_n_report,
        refusal_rate,
        strongreject_score,
    )
    from modicum.evaluate.calibration import Calibration, calibrate, rogan_gladen, rogan_gladen_deviation
    from modicum.evaluate.generation import generate, stop_tokens
    from modicum.evaluate.intervals import Estimate, bootstrap, mean, paired_proportions, ratio, wilson
    from modicum.evaluate.likelihood import log_likelihoods, windows
    from modicum.evaluate.measures.exact_match import exact_match, extract, normalize
    from modicum.evaluate.measures.perplexity import bits_per_byte, perplexity
    from modicum.evaluate.representation import (
        centroid_gap,
        first_token_predictability,
        fit_pca,
        hidden_states,
        probe_transfer,
        project,
        proxy_a_distance,
    )

__all__ = [
    "BestOfNReport",
    "Calibration",
    "Estimate",
    "asr_all",
    "asr_all_from_first_safe",
    "asr_any",
    "best_of_n_report",
    "bits_per_byte",
    "bootstrap",
    "calibrate",
    "centroid_gap",
    "exact_match",
    "extract",
    "first_token_predictability",
    "fit_pca",
    "generate",
    "hidden_states",
    "log_likelihoods",
    "mean",
    "normalize",
    "paired_proportions",
    "perplexity",
    "probe_transfer",
    "project",
    "proxy_a_distance",
    "ratio",
    "refusal_rate",
    "rogan_gladen",
    "rogan_gladen_deviation",
    "stop_tokens",
    "strongreject_score",
    "wilson",
    "windows",
]

face(__name__)
