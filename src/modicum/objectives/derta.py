r"""Decoupled refusal training: learn to refuse at any point of a harmful answer, not at its beginning alone.

It is a baseline of safety reasoning, made of labels: a safe answer after a random beginning of a harmful one, and the
refusal token as the label of every position of the harmful one.

Reference:
    Y. Yuan et al., "Refuse Whenever You Feel Unsafe", 2024, arXiv:2407.09121.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modicum.errors import RecipeError
from modicum.registry import objective
from modicum.types import IGNORED, UnitInterval


@objective("derta", paper="arXiv:2407.09121", acts_on="contrasts", supplied={"refusal_token"})
def derta_rows(
    prompt: Sequence[int],
    safe: Sequence[int],
    harmful: Sequence[int],
    *,
    refusal_token: int,
    plain_share: UnitInterval = 1 / 3,
    rng: torch.Generator,
) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Return both rows of a harmful request, each as ids and labels.

    The first row is prompt, the beginning of the harmful answer without labels, and the safe answer. The second is
    prompt and harmful answer, where each position's label is the refusal token.

    Args:
        prompt: Token ids of the rendered prompt.
        safe: Token ids of the refusal, one or more, with the token that ends it.
        harmful: Token ids of the harmful answer, one or more.
        refusal_token: The token with which a refusal begins.
        plain_share: Share of rows whose beginning is empty, from 0 to 1.
        rng: Draws the length of the beginning, uniformly from 1 to all of it.

    Raises:
        RecipeError: An answer is empty, or the share is out of range.

    Example:
        >>> import torch
        >>> rows = derta_rows([1], [8, 9], [4, 5], refusal_token=8, plain_share=1.0, rng=torch.Generator())
        >>> rows[0], rows[1]
        (([1, 8, 9], [-100, 8, 9]), ([1, 4, 5], [-100, 8, 8]))

    Cost:
        Two rows for each harmful request, in place of one.

    Reference:
        Y. Yuan et al., 2024, arXiv:2407.09121, section 3.
    """
    if not len(safe) or not len(harmful) or not 0 <= plain_share <= 1:
        raise RecipeError(
            f"{len(safe)} safe and {len(harmful)} harmful tokens with plain_share {plain_share}, expected one or more "
            "of each and a share from 0 to 1."
        )
    plain = float(torch.rand((), generator=rng)) < plain_share
    length = 0 if plain else int(torch.randint(1, len(harmful) + 1, (), generator=rng))
    beginning = [*prompt, *harmful[:length]]
    first = ([*beginning, *safe], [IGNORED] * len(beginning) + list(safe))
    second = ([*prompt, *harmful], [IGNORED] * len(prompt) + [refusal_token] * len(harmful))
    return first, second
