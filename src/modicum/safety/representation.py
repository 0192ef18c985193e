"""How a model sees prompts from inside; see :mod:`modicum.evaluate.representation`."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.evaluate.representation import (
        centroid_gap,
        distance_of_error,
        first_token_predictability,
        fit_pca,
        hidden_states,
        probe_transfer,
        project,
        proxy_a_distance,
    )

__all__ = [
    "centroid_gap",
    "distance_of_error",
    "first_token_predictability",
    "fit_pca",
    "hidden_states",
    "probe_transfer",
    "project",
    "proxy_a_distance",
]

face(__name__)
