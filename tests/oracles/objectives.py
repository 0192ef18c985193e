"""Objectives in Python integers and NumPy float64, one row and one token after the other; draws are MEAP's words."""

from __future__ import annotations

import numpy as np

from oracles.meap import selected, word

IGNORED = -100


def places(real):
    """Number a row's tokens, its padding left out."""
    return [sum(real[:i]) for i in range(len(real))]


def meap(ids, real, protected, key, *, ratio, least, keep_last, mask):
    may = [bool(r) and i not in protected for i, r in zip(ids, real)]
    if keep_last:
        may[max(i for i, r in enumerate(real) if r)] = False
    hidden = selected(may, real, key, ratio, least)
    return [mask if i in hidden else token for i, token in enumerate(ids)]


def token_dropout(ids, real, protected, key, *, ratio, mask_share, random_share, mask, vocabulary):
    chosen = selected([r and i not in protected for i, r in zip(ids, real)], real, key, ratio)
    out = list(ids)
    for position in chosen:
        token = places(real)[position]
        lot = word(key, token, stream=2) / 2**32
        if lot < mask_share:
            out[position] = mask
        elif lot < mask_share + random_share:
            out[position] = word(key, token, stream=3) % vocabulary
    return out


def masked_thought(ids, labels, real, protected, key, *, share, mask=None, vocabulary=None):
    out = list(ids)
    for position, token in enumerate(places(real)):
        hidden = word(key, token) < round(share * 2**32)
        if real[position] and labels[position] != IGNORED and ids[position] not in protected and hidden:
            out[position] = mask if vocabulary is None else word(key, token, stream=3) % vocabulary
    return out


def meap_sft(ids, labels, protected, key, *, ratio, least, mask):
    """Return the clean row, and the masked one with its labels at the masks if an answer is longer than ``least``."""
    answers, run = [], []
    for position in [*range(len(ids)), None]:
        if position is not None and labels[position] != IGNORED:
            run.append(position)
        elif run:
            plain = [i for i in run if ids[i] not in protected]
            answers += plain if len(plain) > least else []
            run = []
    if not answers or ratio == 0:
        return [(list(ids), list(labels))]
    may = [i in answers for i in range(len(ids))]
    hidden = selected(may, may, key, ratio)  # words go by the number of maskable tokens before a place
    masked = [mask if i in hidden else token for i, token in enumerate(ids)]
    return [(list(ids), list(labels)), (masked, [ids[i] if i in hidden else IGNORED for i in range(len(ids))])]


def dropout(hidden, uniform, ratio):
    """Divide what stays by the probability that it does."""
    return np.where(uniform < ratio, 0.0, np.asarray(hidden, np.float64) / (1 - ratio))


def label_words(scores, answers):
    losses = [np.log(np.sum(np.exp(row))) - row[answer] for row, answer in zip(np.asarray(scores, np.float64), answers)]
    return np.mean(losses)


def likelihood(scores, answers):
    return -np.mean([row[answer] for row, answer in zip(np.asarray(scores, np.float64), answers)])


def reward(rewards):
    return -sum(float(r) for r in rewards) / len(rewards)
