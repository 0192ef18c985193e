"""What is measured of a model on data, by hand in NumPy float64: a table of embeddings, one linear layer, a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def fisher(table: Array, weight: Array, rows: Sequence[Sequence[int]], ignored: int = 0) -> tuple[Array, Array]:
    """Matena and Raffel 2022, Equation 3: the mean over rows of the squared gradient of a row's log-likelihood.

    The model predicts token t + 1 from the logits ``weight @ table[token t]``; the first ``ignored`` targets of a row
    have no label.
    """
    squares = np.zeros_like(table), np.zeros_like(weight)
    for row in rows:
        of_table, of_weight = np.zeros_like(table), np.zeros_like(weight)
        for now, following in list(pairwise(row))[ignored:]:
            logits = weight @ table[now]
            p = np.exp(logits - logits.max())
            error = -p / p.sum()
            error[following] += 1
            of_weight += np.outer(error, table[now])
            of_table[now] += weight.T @ error
        squares[0][:] += of_table**2
        squares[1][:] += of_weight**2
    return squares[0] / len(rows), squares[1] / len(rows)


def gram(table: Array, rows: Sequence[Sequence[int]]) -> Array:
    """Jin et al. 2023, Equation 2: the sum over all tokens of the outer product of a layer's input with itself."""
    total = np.zeros((table.shape[1], table.shape[1]))
    for row in rows:
        for token in row:
            total += np.outer(table[token], table[token])
    return total
