"""Passes over the checkpoints' own bits, compiled by numba: what :mod:`~modicum.weights.kernels.fused` calls.

A chunk of every tensor is widened to float32, taken through all steps of the arithmetic and stored, before the next one
is read, so that intermediate results stay in the processor's first cache. Additions and products are those of the torch
path, in its order, each rounded by itself: the results are the same bits.

Numba's cache looks at the file of a function alone: after a change here, delete what it stored of
:mod:`~modicum.weights.kernels.compiled_selected` and :mod:`~modicum.weights.kernels.compiled_few`, which use these
functions; the latter uses one of the former, too.

Tensors come as addresses, since their number and dtypes vary; whoever calls keeps them alive. The bit pattern of a
float32 without its sign is ordered like the magnitude, so that magnitudes are compared as integers.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from modicum.weights.kernels.compiled_rows import BFLOAT16, FLOAT16, INFINITY, MAGNITUDE, jit, pointer

CHUNK = 2048


@jit
def read(half):
    """Return the number whose bfloat16 has these bits."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@jit
def _widen(address, kind, start, out):
    """Read ``len(out)`` numbers from entry ``start`` on."""
    n = len(out)
    words = out.view(np.uint32)
    if kind == BFLOAT16:
        halves = carray(pointer(address + 2 * start), n, np.uint16)
        for i in range(n):
            out[i] = read(halves[i])
    elif kind == FLOAT16:
        halves = carray(pointer(address + 2 * start), n, np.uint16)
        for i in range(n):
            words[i] = np.uint32(halves[i] & np.uint16(0x7FFF)) << np.uint32(13)
        for i in range(n):
            out[i] *= np.float32(2.0**112)  # exact, also of subnormal ones
        for i in range(n):
            beyond = np.uint32(0x7F800000) if halves[i] & np.uint16(0x7C00) == np.uint16(0x7C00) else np.uint32(0)
            words[i] |= beyond | np.uint32(halves[i] & np.uint16(0x8000)) << np.uint32(16)
    else:
        numbers = carray(pointer(address + 4 * start), n, np.float32)
        for i in range(n):
            out[i] = numbers[i]


@jit
def half_of(number):
    """Return the bits of the bfloat16 nearest to a float32, of the even one of two."""
    word = np.float32(number).view(np.uint32)
    rounded = np.uint32(word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    nan = word & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
    return np.uint16(0x7FC0) if nan else np.uint16(rounded)


@jit
def _narrow(row, spare, address, kind, start):
    """Store a row from entry ``start`` on, rounded to the nearest, to the even one of two."""
    n = len(row)
    words = row.view(np.uint32)
    if kind == BFLOAT16:
        halves = carray(pointer(address + 2 * start), n, np.uint16)
        for i in range(n):
            halves[i] = half_of(row[i])
    elif kind == FLOAT16:
        halves = carray(pointer(address + 2 * start), n, np.uint16)
        tiny = spare[:n].view(np.uint32)
        for i in range(n):
            spare[i] = abs(row[i]) + np.float32(0.5)  # whose last bit is that of the subnormal halves
        for i in range(n):
            word = words[i] & np.uint32(0x7FFFFFFF)
            rounded = np.uint32(word + np.uint32(0xFFF) + (word >> np.uint32(13) & np.uint32(1)) - np.uint32(112 << 23))
            half = np.uint16(rounded >> np.uint32(13))
            half = np.uint16(tiny[i] - np.uint32(0x3F000000)) if word < np.uint32(0x38800000) else half
            half = np.uint16(0x7C00) if word >= np.uint32(0x47800000) else half
            half = np.uint16(0x7E00) if word > np.uint32(0x7F800000) else half
            halves[i] = half | np.uint16(words[i] >> np.uint32(16) & np.uint32(0x8000))
    else:
        numbers = carray(pointer(address + 4 * start), n, np.float32)
        for i in range(n):
            numbers[i] = row[i]


@jit
def _delta(tensors, kinds, t, start, n, origin, out):
    if kinds[t + 1] == BFLOAT16:
        halves = carray(pointer(tensors[t + 1] + 2 * start), n, np.uint16)
        for i in range(n):
            out[i] = read(halves[i]) - origin[i]
    else:
        _widen(tensors[t + 1], kinds[t + 1], start, out[:n])
        for i in range(n):
            out[i] -= origin[i]


@jit
def deltas(tensors, kinds, start, n, origin, rows):
    """Fill a block with the base's ``n`` entries from ``start`` on, and one with the experts' deltas."""
    for begin in range(0, n, CHUNK):
        m = min(CHUNK, n - begin)
        _widen(tensors[0], kinds[0], start + begin, origin[begin : begin + m])
        for t in range(len(rows)):
            _delta(tensors, kinds, t, start + begin, m, origin[begin:], rows[t, begin:])


@jit
def _tally(words, low, high, flags, inside, count):
    """Count the patterns above, at the ends of a bracket, and between; append those between to ``inside``.

    Returns the largest pattern, which tells of NaN.
    """
    n = len(words)
    above, from_high, from_low, most = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for i in range(n):
        word = np.int32(words[i] & MAGNITUDE)
        above = np.int32(above + (word > high))
        from_high = np.int32(from_high + (word >= high))
        from_low = np.int32(from_low + (word >= low))
        most = np.int32(max(most, word))
        flags[i] = (word > low) & (word < high)
    found = count[3]
    # Few lie between: eight at a time are passed over. Which of eight do, no branch could foresee.
    flags[n : -(-n // 8) * 8] = 0
    eights = flags.view(np.uint64)
    for group in range(-(-n // 8)):
        if eights[group]:
            for i in range(8 * group, 8 * group + 8):
                inside[found] = np.int32(words[i] & MAGNITUDE)
                found += flags[i]
    count[0] += above
    count[1] += from_high - above
    if low != high:
        count[2] += from_low - from_high - (found - count[3])
    count[3] = found
    return most


@jit
def brackets(tensors, kinds, size, rows, low, high, inside):
    """Count around brackets ``(low, high)`` of the magnitudes of experts' deltas: the experts that ``rows`` names.

    Returns for each bracket how many are above, at its higher end, at its lower, and between; and the largest pattern.
    """
    origin, delta = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    flags = np.zeros(CHUNK, np.uint8)
    counts = np.zeros((len(rows), 4), np.int64)
    most = np.int32(0)
    for start in range(0, size, CHUNK):
        n = min(CHUNK, size - start)
        _widen(tensors[0], kinds[0], start, origin[:n])
        for b in range(len(rows)):
            if b == 0 or rows[b] != rows[b - 1]:
                _delta(tensors, kinds, rows[b], start, n, origin, delta)
            words = delta[:n].view(np.int32)
            most = np.int32(max(most, _tally(words, low[b], high[b], flags, inside[b], counts[b])))
    return counts, most


@jit
def _until(words, value, spares, t):
    """Return up to which entry magnitudes that equal ``value`` are kept; -1 spare ones stand for all."""
    n, spare = len(words), spares[t]
    if spare <= 0:
        return 0 if spare == 0 else n
    equal = np.int32(0)
    for i in range(n):
        equal = np.int32(equal + (np.int32(words[i] & MAGNITUDE) == value))
    if equal <= spare:
        spares[t] = spare - equal
        return n
    spares[t] = 0
    for i in range(n):
        if np.int32(words[i] & MAGNITUDE) == value:
            if spare == 0:
                return i
            spare -= 1
    return n


@jit
def _keep(words, value, spares, t, out):
    """Copy what is above ``value`` in magnitude, or equal to it as far as that is kept; zeros for the rest."""
    until, n = _until(words, value, spares, t), len(words)
    for i in range(until):
        out[i] = words[i] if np.int32(words[i] & MAGNITUDE) >= value else np.int32(0)
    words, out = words[until:], out[until:]
    for i in range(n - until):
        out[i] = words[i] if np.int32(words[i] & MAGNITUDE) > value else np.int32(0)


@jit
def _mix(rows, n, shares, out):
    """Sum rows with a share of each, in their order, from zero on."""
    out[:n] = np.float32(0)
    for t in range(len(rows)):
        row, share = rows[t, :n], shares[t]
        for i in range(n):
            out[i] += row[i] * share


@jit
def _elect(deltas, n, weights, halves, weighted, normalize, least, scale, total, divisor, merged):
    """Merge the deltas of the elected sign; as ``combine.Election`` does, step by step."""
    zero, one = np.float32(0), np.float32(1)
    if weighted:
        for t in range(len(deltas)):
            row, weight = deltas[t, :n], weights[t]
            for i in range(n):
                row[i] *= weight
    _mix(deltas, n, halves, total)
    if normalize and weighted:
        _agreeing(deltas, n, weights, least, total, divisor, merged)
    elif normalize:
        divisor[:n] = zero
        for t in range(len(deltas)):
            row = deltas[t, :n]
            for i in range(n):
                agrees = row[i] > zero if total[i] >= zero else row[i] < zero
                divisor[i] += one if agrees else zero
        for i in range(n):
            divisor[i] = divisor[i] if divisor[i] > one else one
    merged[:n] = zero
    for t in range(len(deltas)):
        row, half = deltas[t, :n], halves[t]
        for i in range(n):
            merged[i] += abs(row[i]) * half
    if normalize:
        for i in range(n):
            magnitude = (merged[i] + abs(total[i])) / divisor[i]
            merged[i] = (magnitude if total[i] >= zero else -magnitude) * scale
    else:
        for i in range(n):
            magnitude = merged[i] + abs(total[i])
            merged[i] = (magnitude if total[i] >= zero else -magnitude) * scale


@jit
def _agreeing(deltas, n, weights, least, total, divisor, spare):
    zero = np.float32(0)
    divisor[:n] = zero
    spare[:n] = zero
    for t in range(len(deltas)):
        row, weight = deltas[t, :n], weights[t]
        for i in range(n):
            present = weight if row[i] != zero else zero
            spare[i] += present
            divisor[i] += present if row[i] >= zero else -present
    words = total[:n].view(np.int32)
    for i in range(n):
        divisor[i] = ((divisor[i] if words[i] >= 0 else -divisor[i]) + spare[i]) * np.float32(0.5)
    for i in range(n):
        low = divisor[i] < least if least > zero else abs(divisor[i]) < np.float32(1e-8)
        divisor[i] = (least if least > zero else np.float32(1)) if low else divisor[i]


@jit
def store(origin, n, share, merged, spare, address, kind, start):
    """Store ``share * origin + merged`` from entry ``start`` on; both rows may be overwritten."""
    if kind == BFLOAT16:
        halves = carray(pointer(address + 2 * start), n, np.uint16)
        for i in range(n):
            halves[i] = half_of(origin[i] * share + merged[i])
    else:
        for i in range(n):
            origin[i] = origin[i] * share + merged[i]
        _narrow(origin[:n], spare, address, kind, start)


@jit
def merge(tensors, kinds, begin, end, cuts, spares, factors, ratios, weights, election, scale, share):
    """Merge entries ``begin`` to ``end``; the first of the tensors is the base, the last one the result.

    ``cuts`` and ``spares`` hold for each expert the pattern from which deltas are kept, and that from which they are
    outliers; ``factors`` where a block's factors of 0 and 1 lie, or zero; ``election`` whether signs are elected,
    whether weights differ from 1, whether to divide by those that took part, and the least one.
    """
    elected, weighted, normalize, least = election
    experts = len(tensors) - 2
    origin, total = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    divisor, merged = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    summed = np.empty(CHUNK, np.float32)
    # Only an election looks at all deltas; a sum takes one after another, which stays in the nearest cache.
    deltas = np.empty((experts if elected else 1, CHUNK), np.float32)
    halves = np.full(experts, 0.5, np.float32)
    for start in range(begin, end, CHUNK):
        n = min(CHUNK, end - start)
        _widen(tensors[0], kinds[0], start, origin[:n])
        summed[:n] = np.float32(0)
        for t in range(experts):
            row = deltas[t if elected else 0, :n]
            if cuts[t, 0] == 0 and spares[t, 0] < 0 and cuts[t, 1] > INFINITY:
                _delta(tensors, kinds, t, start, n, origin, row)
            else:
                _delta(tensors, kinds, t, start, n, origin, total)
                words = total[:n].view(np.int32)
                _keep(words, cuts[t, 0], spares[t], 0, row.view(np.int32))
                if cuts[t, 1] <= INFINITY:
                    _keep(words, cuts[t, 1], spares[t], 1, merged.view(np.int32))
                    for i in range(n):
                        row[i] -= merged[i]
            ratio = ratios[t]
            if factors[t]:
                mask = carray(pointer(factors[t] + start - begin), n, np.uint8)
                for i in range(n):
                    row[i] = row[i] * np.float32(mask[i]) * ratio
            elif ratio != 1:
                for i in range(n):
                    row[i] *= ratio
            if not elected:
                weight = weights[t]
                for i in range(n):
                    summed[i] += row[i] * weight
        if elected:
            _elect(deltas, n, weights, halves, weighted, normalize, least, scale, total, divisor, summed)
        store(origin, n, share, summed, total, tensors[-1], kinds[-1], start)


@jit(fastmath={"reassoc", "contract", "nsz"})
def _dot(row, other, n):
    total = np.float32(0)
    for i in range(n):
        total += row[i] * other[i]
    return total


@jit
def products(tensors, kinds, gradient, size, sums):
    """Add the inner products with a float32 gradient: of the base in the last place, of the deltas before it."""
    origin, delta = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    last = len(tensors) - 1
    for start in range(0, size, CHUNK):
        n = min(CHUNK, size - start)
        part = carray(pointer(gradient + 4 * start), n, np.float32)
        _widen(tensors[0], kinds[0], start, origin[:n])
        for t in range(last):
            _delta(tensors, kinds, t, start, n, origin, delta)
            sums[t] += _dot(delta, part, n)
        sums[last] += _dot(origin, part, n)
