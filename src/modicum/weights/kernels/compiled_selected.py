"""Compiled passes over deltas of which only those entries count on which experts differ most: what SCE needs."""

from __future__ import annotations

import numpy as np

from modicum.weights.kernels.compiled import CHUNK, _delta, _keep, _mix, _narrow, _tally, _widen
from modicum.weights.kernels.compiled_rows import jit


@jit
def _variance(deltas, n, shares, work, mean, out):
    """Leave the variance of each entry between the experts in ``out``."""
    first = deltas[0, :n]
    for t in range(len(deltas)):
        row, centred = deltas[t, :n], work[t, :n]
        for i in range(n):
            centred[i] = row[i] - first[i]
    _mix(work, n, shares, mean)
    for t in range(len(deltas)):
        centred = work[t, :n]
        for i in range(n):
            centred[i] -= mean[i]
        for i in range(n):
            centred[i] *= centred[i]
    _mix(work, n, shares, out)


@jit
def _room(experts):
    rows, share = np.empty((2, experts, CHUNK), np.float32), np.full(experts, np.float32(1 / experts))
    singles = np.empty((3, CHUNK), np.float32)
    return rows[0], rows[1], singles[0], singles[1], singles[2], share


@jit
def tally_variances(spread, low, high, flags, inside, counts):
    """Count a row of variances around a bracket; return the largest pattern, and how many are not zero."""
    words, some = spread.view(np.int32), np.int32(0)
    for i in range(len(words)):
        some = np.int32(some + (words[i] > 0))
    return _tally(words, low, high, flags, inside, counts), some


@jit
def variances(tensors, kinds, size, low, high, inside):
    """Count around a bracket of the variances; return also the largest pattern, and how many are not zero."""
    n_experts, flags = len(tensors) - 1, np.zeros(CHUNK, np.uint8)
    deltas, work, origin, mean, spread, shares = _room(n_experts)
    counts, most, differing = np.zeros(4, np.int64), np.int32(0), np.int64(0)
    for start in range(0, size, CHUNK):
        n = min(CHUNK, size - start)
        _widen(tensors[0], kinds[0], start, origin[:n])
        for t in range(n_experts):
            _delta(tensors, kinds, t, start, n, origin, deltas[t])
        _variance(deltas, n, shares, work, mean, spread)
        top, some = tally_variances(spread[:n], low, high, flags, inside, counts)
        most = np.int32(max(most, top))
        differing += some
    return counts, most, differing


@jit
def _selected(tensors, kinds, start, n, cut, spares, room):
    """Read a chunk of deltas, with zeros for those whose variance is none or below a cut; -1 selects all."""
    deltas, work, origin, mean, spread, shares = room
    _widen(tensors[0], kinds[0], start, origin[:n])
    for t in range(len(deltas)):
        _delta(tensors, kinds, t, start, n, origin, deltas[t])
    if cut >= 0:
        _variance(deltas, n, shares, work, mean, spread)
        _keep(spread[:n].view(np.int32), cut, spares, 0, mean.view(np.int32))
        for t in range(len(deltas)):
            row = deltas[t, :n]
            for i in range(n):
                row[i] *= np.float32(1) if mean[i] > np.float32(0) else np.float32(0)


@jit
def squares(tensors, kinds, begin, size, cut, spares, rows):
    """Fill rows with the squares of the selected deltas' entries from ``begin`` on."""
    room = _room(len(rows))
    deltas = room[0]
    for start in range(0, size, CHUNK):
        n = min(CHUNK, size - start)
        _selected(tensors, kinds, begin + start, n, cut, spares, room)
        for t in range(len(rows)):
            row, out = deltas[t, :n], rows[t, start : start + n]
            for i in range(n):
                out[i] = row[i] * row[i]


@jit
def merge_selected(tensors, kinds, size, cut, spares, weights):
    """Merge the selected deltas as ``sce`` does; the last of the tensors is the result."""
    n_experts = len(tensors) - 2
    room = _room(n_experts)
    deltas, work, origin, mean, spread, _ = room
    ones = np.ones(n_experts, np.float32)
    one, zero, least = np.float32(1), np.float32(0), np.float32(2.0**-126)
    for start in range(0, size, CHUNK):
        n = min(CHUNK, size - start)
        _selected(tensors, kinds, start, n, cut, spares, room)
        _mix(deltas, n, ones, mean)
        for i in range(n):
            spread[i] = one if mean[i] >= zero else -one
        mean[:n] = zero
        for t in range(n_experts):
            row, weight = deltas[t, :n], weights[t]
            for i in range(n):
                row[i] = max(row[i] * spread[i], zero)
            for i in range(n):
                mean[i] += weight if row[i] > zero else zero
        _mix(deltas, n, weights, work[0])
        merged = work[0, :n]
        for i in range(n):
            origin[i] += merged[i] * spread[i] / max(mean[i], least)
        _narrow(origin[:n], mean, tensors[-1], kinds[-1], start)
