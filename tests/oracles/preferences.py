"""Losses over pairs and figures over dimensions in NumPy float64, one number after the other."""

from __future__ import annotations

import math

import numpy as np


def dpo(rows, *, beta, variant="sigmoid", smoothing=0.0, means=False, sft=0.0):
    """Return the mean loss of rows (log-probabilities w, l, reference w, l, tokens w, l)."""
    losses = []
    for won, lost, won_before, lost_before, long, other in rows:
        gained, shifted = won - won_before, lost - lost_before
        if means:
            gained, shifted = gained / long, shifted / other
        margin = beta * (gained - shifted)

        def loss(m):
            if variant == "ipo":
                return (m / beta - 1 / (2 * beta)) ** 2
            if variant == "hinge":
                return max(0.0, 1 - m)
            return math.log1p(math.exp(-m)) if m > -500 else -m

        losses.append((1 - smoothing) * loss(margin) + smoothing * loss(-margin) - sft * won / long)
    return float(np.mean(losses))


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def answer_log_probability(logits, ids, prompt):
    """Return the summed log-probability of ``ids[prompt:]`` under the logits of every place of a row of its own."""
    return float(sum(log_softmax(logits[i - 1])[ids[i]] for i in range(prompt, len(ids))))
