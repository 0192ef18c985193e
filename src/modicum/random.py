"""Random numbers that depend on names only: never on order, threads, shards, ranks or world size."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed for the draw called ``names`` in the run seeded with ``seed``.

    Example:
        >>> derive_seed(0, "dare", 1) == derive_seed(0, "dare", 1) != derive_seed(0, "dare", 2)
        True
    """
    # repr keeps the int 1 and the string "1" apart; the separator keeps ("ab", "c") and ("a", "bc") apart.
    key = "\x1f".join(map(repr, (seed, *names))).encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for the draw called ``names``, for example ``(0, "dare", expert, tensor)``.

    Example:
        >>> import torch
        >>> a = torch.rand(3, generator=generator(0, "dare", 1, "lm_head"))
        >>> torch.equal(a, torch.rand(3, generator=generator(0, "dare", 1, "lm_head")))
        True
    """
    import torch  # seeds alone, of a retrieval suite for one, need no torch

    return torch.Generator(device).manual_seed(derive_seed(seed, *names))
