"""Counter-based random numbers: the word at a place depends on the row's key and on the place alone.

Philox4x32-10 in integer tensor arithmetic. The same key gives the same numbers on every device, in any order and in
any batch, without a generator that must be advanced, and :func:`torch.compile` sees constant shapes only.

Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3 and table 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from modicum.random import derive_seed

WORD = (1 << 32) - 1
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def row_keys(names: Iterable[str | int], *, seed: int, method: str, epoch: int = 0) -> Int64[Tensor, " b"]:
    """Return the key of every row: a function of ``(seed, method, epoch, name of the row)`` and of nothing else.

    Example:
        >>> a, b = row_keys(["x", "y"], seed=0, method="meap"), row_keys(["y"], seed=0, method="meap")
        >>> bool(a[1] == b[0]), bool(a[0] == b[0])
        (True, False)
    """
    return torch.tensor([derive_seed(seed, method, epoch, name) for name in names], dtype=torch.int64)


VERSION = 1  # of the words: what stores a seed in place of the numbers drawn stores this beside it


def words(keys: Int64[Tensor, " b"], count: int, *, stream: int = 0, start: int = 0) -> Int64[Tensor, "b count"]:
    """Return ``count`` independent 32-bit words for each key.

    Args:
        keys: One 64-bit key per row.
        count: How many words; word ``i`` does not depend on it.
        stream: Number of an independent sequence under the same key.
        start: Number of the first word; a multiple of 4.

    Example:
        >>> [hex(int(w)) for w in words(torch.zeros(1, dtype=torch.int64), 4)[0]]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    blocks, first = (count + 3) // 4, start // 4
    device = keys.device
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(_host_words(keys.numpy(), blocks, stream, first))[:, :count]
    multipliers = torch.tensor(MULTIPLIERS, device=device)[:, None, None]
    # Both multiplications of a round, and both halves of the key, go as one tensor of two: half as many operations.
    key = torch.stack((keys & WORD, (keys >> 32) & WORD))[:, :, None]
    step = torch.tensor(INCREMENTS, device=device)[:, None, None]
    even = torch.zeros(2, keys.shape[0], blocks, dtype=torch.int64, device=device)
    odd = torch.zeros_like(even)
    even[0] = torch.arange(first, first + blocks, device=device)
    odd[0] = stream
    for _ in range(10):
        # A product of two 32-bit words may pass 2^63; the wrapped sign bit does no harm, because both halves are cut
        # out of the bit pattern.
        product = (even * multipliers).flip(0)
        even, odd = ((product >> 32) & WORD) ^ odd ^ key, product & WORD
        key = (key + step) & WORD
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=-1).reshape(keys.shape[0], 4 * blocks)[:, :count]


def _host_words(keys: NDArray[np.int64], blocks: int, stream: int, first: int) -> NDArray[np.int64]:
    """Return the same words from NumPy, whose many small operations cost less to call than those of tensors."""
    multipliers = np.array(MULTIPLIERS, np.uint64)[:, None, None]
    key = np.stack((keys & WORD, (keys >> 32) & WORD)).astype(np.uint32)[:, :, None]
    step = np.array(INCREMENTS, np.uint32)[:, None, None]
    even = np.zeros((2, keys.size, blocks), np.uint32)
    odd = np.zeros_like(even)
    even[0] = np.arange(first, first + blocks)
    odd[0] = stream
    for _ in range(10):
        product = even * multipliers
        even = (product >> 32).astype(np.uint32)[::-1] ^ odd ^ key
        odd = product.astype(np.uint32)[::-1]
        key = key + step
    found = np.empty((keys.size, blocks, 4), np.int64)
    found[..., 0], found[..., 1], found[..., 2], found[..., 3] = even[0], odd[0], even[1], odd[1]
    return found.reshape(keys.size, 4 * blocks)


def dense_uniform(keys: Int64[Tensor, " b"], shape: Sequence[int], *, device: torch.device) -> Float[Tensor, "b ..."]:
    """Return uniform numbers in [0, 1) for each key, from a generator of its own.

    For noise on every entry of a hidden state, where counting words one by one would cost more than the model. Equal
    on devices of one type only.

    Example:
        >>> a = dense_uniform(torch.tensor([3, 4]), (2, 5), device=torch.device("cpu"))
        >>> b = dense_uniform(torch.tensor([4]), (2, 5), device=torch.device("cpu"))
        >>> a.shape, torch.equal(a[1], b[0])
        (torch.Size([2, 2, 5]), True)
    """
    rows = (torch.Generator(device).manual_seed(key) for key in keys.tolist())
    return torch.stack([torch.rand(tuple(shape), generator=generator, device=device) for generator in rows])
