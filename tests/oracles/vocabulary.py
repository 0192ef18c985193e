"""Rows of a unified vocabulary, token by token in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def unified(
    tokens: Sequence[str | None],
    tables: Mapping[str, np.ndarray],
    ids: Mapping[str, Mapping[str, int]],
    base: str,
    model: str,
    chosen: Mapping[str, Any] = {},
) -> np.ndarray:
    """Return ``model``'s table for ``tokens``: its own row, else the base's, else the mean of all others that have it.

    ``None`` stands for a row of no token, which gets the mean of the rows that are made. ``chosen`` maps tokens to
    ``(donor, row, force)``, a donor ``None`` meaning zeros.
    """
    out = []
    for token in tokens:
        if token is None:
            continue
        donor, row, force = chosen.get(token, ("", 0, False))
        if token in ids[model] and not force:
            out.append(tables[model][ids[model][token]])
        elif token in chosen:
            out.append(np.zeros(tables[model].shape[1:]) if donor is None else tables[donor][row])
        elif token in ids[base]:
            out.append(tables[base][ids[base][token]])
        else:
            rows = [tables[name][ids[name][token]] for name in tables if token in ids[name]]
            out.append(np.mean(rows, 0) if rows else tables[model].mean(0))
    return np.stack([*out, *[np.mean(out, 0)] * sum(token is None for token in tokens)])
