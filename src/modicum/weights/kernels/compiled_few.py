"""Compiled passes over the deltas of few experts in bfloat16: an entry goes through all steps in registers.

Nothing is stored between reading the checkpoints' numbers and writing the result's, so that a merge takes little more
time than its bytes do. The experts are a tuple, whose length the compiler knows: it unrolls the loops over them, and
computes many entries at a time. The arithmetic is that of :mod:`~modicum.weights.kernels.compiled`, step by step.

Rows are what numbers of two bytes are stored in; ``lows`` and ``tops`` say for each expert from which pattern on
deltas are kept, and beyond which they are outliers.
"""

from __future__ import annotations

import numpy as np

from modicum.weights.kernels.compiled import CHUNK, _keep, _tally, half_of, read
from modicum.weights.kernels.compiled_rows import MAGNITUDE, jit
from modicum.weights.kernels.compiled_selected import tally_variances


@jit
def _delta(half, origin, low, top):
    """Return the delta, or zero where it is not kept."""
    delta = np.float32(read(half) - origin)
    pattern = np.int32(delta.view(np.int32) & MAGNITUDE)
    outlier = delta if pattern > top else np.float32(0)
    return (delta if pattern >= low else np.float32(0)) - outlier


@jit
def summed(base, experts, out, lows, tops, weights, share):
    """Store ``share`` of the base plus the sum of the kept deltas, with a weight for each expert."""
    for i in range(len(base)):
        origin, merged = read(base[i]), np.float32(0)
        for t in range(len(experts)):
            merged += _delta(experts[t][i], origin, lows[t], tops[t]) * weights[t]
        out[i] = half_of(origin * share + merged)


@jit
def summed_masked(base, experts, out, masks, ratios, weights, share):
    """Store ``share`` of the base plus the sum of the deltas times factors of 0 and 1, a ratio and a weight."""
    for i in range(len(base)):
        origin, merged = read(base[i]), np.float32(0)
        for t in range(len(experts)):
            delta = (read(experts[t][i]) - origin) * np.float32(masks[t][i])
            merged += delta * ratios[t] * weights[t]
        out[i] = half_of(origin * share + merged)


@jit
def _vote(delta, total):
    """Return 1 for a delta that has the sign of the total and is not zero."""
    word = np.float32(delta).view(np.int32)
    agrees = (np.int32(word ^ np.float32(total).view(np.int32)) >= 0) & ((word & MAGNITUDE) != 0)
    return np.float32(1) if agrees else np.float32(0)


@jit
def _chosen(total, magnitudes, votes, normalize, scale):
    """Return what deltas of the elected sign come to, from half of all and half of their magnitudes."""
    one = np.float32(1)
    chosen = magnitudes + abs(total)
    if normalize:
        chosen /= votes if votes > one else one
    return (chosen if total >= np.float32(0) else -chosen) * scale


@jit
def elected(base, experts, out, lows, tops, weights, normalize, scale, share):
    """Store ``share`` of the base plus the kept deltas of the elected sign: their sum, or their mean."""
    zero, half = np.float32(0), np.float32(0.5)
    for i in range(len(base)):
        origin, total, votes, magnitudes = read(base[i]), zero, zero, zero
        for t in range(len(experts)):
            total += _delta(experts[t][i], origin, lows[t], tops[t]) * weights[t] * half
        for t in range(len(experts)):
            delta = _delta(experts[t][i], origin, lows[t], tops[t]) * weights[t]
            votes += _vote(delta, total)
            magnitudes += abs(delta) * half
        out[i] = half_of(origin * share + _chosen(total, magnitudes, votes, normalize, scale))


@jit
def elected_masked(base, experts, out, masks, ratios, weights, normalize, scale, share):
    """Store ``share`` of the base plus the deltas of the elected sign, after factors of 0 and 1, ratios and weights."""
    zero, half = np.float32(0), np.float32(0.5)
    for i in range(len(base)):
        origin, total, votes, magnitudes = read(base[i]), zero, zero, zero
        for t in range(len(experts)):
            delta = (read(experts[t][i]) - origin) * np.float32(masks[t][i])
            total += delta * ratios[t] * weights[t] * half
        for t in range(len(experts)):
            delta = (read(experts[t][i]) - origin) * np.float32(masks[t][i])
            delta = delta * ratios[t] * weights[t]
            votes += _vote(delta, total)
            magnitudes += abs(delta) * half
        out[i] = half_of(origin * share + _chosen(total, magnitudes, votes, normalize, scale))


@jit
def _patterns(base, expert, start, n, out):
    """Fill a row with the magnitudes' patterns of ``n`` deltas from ``start`` on."""
    for i in range(n):
        at = start + np.uint64(i)
        out[i] = np.int32(np.float32(read(expert[at]) - read(base[at])).view(np.int32) & MAGNITUDE)


@jit
def brackets(base, experts, rows, low, high, inside):
    """Count around brackets as :func:`~modicum.weights.kernels.compiled.brackets` does."""
    words, flags = np.empty(CHUNK, np.int32), np.zeros(CHUNK, np.uint8)
    counts, most = np.zeros((len(rows), 4), np.int64), np.int32(0)
    for start in range(0, len(base), CHUNK):
        n = min(CHUNK, len(base) - start)
        for b in range(len(rows)):
            if b == 0 or rows[b] != rows[b - 1]:
                _patterns(base, experts[rows[b]], np.uint64(start), n, words)
            most = np.int32(max(most, _tally(words[:n], low[b], high[b], flags, inside[b], counts[b])))
    return counts, most


@jit
def reach(base, expert, value, spare):
    """Return before which entry the last of so many deltas lies whose pattern is ``value``; the size if all do."""
    size, words = len(base), np.empty(CHUNK, np.int32)
    for start in range(0, size, CHUNK):
        n, equal = min(CHUNK, size - start), np.int32(0)
        _patterns(base, expert, np.uint64(start), n, words)
        for i in range(n):
            equal = np.int32(equal + (words[i] == value))
        if equal <= spare:
            spare -= equal
            continue
        for i in range(n):
            if words[i] == value:
                if spare == 0:
                    return start + i
                spare -= 1
    return size


@jit
def _spread(base, experts, start, n, out):
    """Fill a row with the variance between the experts of ``n`` entries from ``start`` on."""
    share = np.float32(1 / len(experts))
    for i in range(n):
        at, mean, spread = start + np.uint64(i), np.float32(0), np.float32(0)
        origin = read(base[at])
        first = read(experts[0][at]) - origin
        for t in range(len(experts)):
            mean += (read(experts[t][at]) - origin - first) * share
        for t in range(len(experts)):
            centred = read(experts[t][at]) - origin - first - mean
            spread += centred * centred * share
        out[i] = spread


@jit
def variances(base, experts, low, high, inside):
    """Count around a bracket of the variances; return also the largest pattern, and how many are not zero."""
    flags, spread = np.zeros(CHUNK, np.uint8), np.empty(CHUNK, np.float32)
    counts, most, differing = np.zeros(4, np.int64), np.int32(0), np.int64(0)
    for start in range(0, len(base), CHUNK):
        n = min(CHUNK, len(base) - start)
        _spread(base, experts, np.uint64(start), n, spread)
        top, some = tally_variances(spread[:n], low, high, flags, inside, counts)
        most = np.int32(max(most, top))
        differing += some
    return counts, most, differing


@jit
def _choose(base, experts, start, n, cut, spares, spread, out):
    """Fill a row with what the cut keeps of the variances; with ones where there is no cut."""
    if cut < 0:
        out[:n] = np.float32(1)
        return
    _spread(base, experts, start, n, spread)
    _keep(spread[:n].view(np.int32), cut, spares, 0, out.view(np.int32))


@jit
def _selected(half, origin, variance):
    return (read(half) - origin) * (np.float32(1) if variance > np.float32(0) else np.float32(0))


@jit
def squares(base, experts, begin, size, cut, spares, rows):
    """Fill rows with the squares of the selected deltas' entries from ``begin`` on; -1 selects all."""
    spread, chosen = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, size, CHUNK):
        n, first = min(CHUNK, size - start), np.uint64(begin + start)
        _choose(base, experts, first, n, cut, spares, spread, chosen)
        for t in range(len(experts)):
            row, expert = rows[t, start : start + n], experts[t]
            for i in range(n):
                at = first + np.uint64(i)
                delta = _selected(expert[at], read(base[at]), chosen[i])
                row[i] = delta * delta


@jit
def merge_selected(base, experts, out, cut, spares, weights):
    """Merge the selected deltas as ``sce`` does."""
    spread, chosen = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    one, zero, least = np.float32(1), np.float32(0), np.float32(2.0**-126)
    for start in range(0, len(base), CHUNK):
        n, first = min(CHUNK, len(base) - start), np.uint64(start)
        _choose(base, experts, first, n, cut, spares, spread, chosen)
        for i in range(n):
            at, total, merged, divisor = first + np.uint64(i), zero, zero, zero
            origin = read(base[at])
            for t in range(len(experts)):
                total += _selected(experts[t][at], origin, chosen[i])
            sign = one if total >= zero else -one
            for t in range(len(experts)):
                signed = _selected(experts[t][at], origin, chosen[i]) * sign
                agrees = signed > zero
                merged += (signed if agrees else zero) * weights[t]
                divisor += weights[t] if agrees else zero
            out[at] = half_of(origin + merged * sign / (divisor if divisor > least else least))
