"""Whether a saved folder is the model that was trained: the logits of both, on a few rows of the training data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError, ModicumError
from modicum.jobs.loading.models import load_model
from modicum.shortage import pass_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS, TOKENS = 2, 64  # logits of a large vocabulary are large: 2 rows of 64 tokens take 50 MB at 100,000 words


def sample(examples: Any) -> list[list[int]]:
    """Return the beginning of the first examples of a data set as tokens, whatever kind of examples it holds."""
    found = []
    for index in range(min(ROWS, len(examples))):
        example = examples[index]
        ids = example["input_ids"] if isinstance(example, Mapping) else getattr(example, "prompt", [])
        found.append([int(token) for token in ids[:TOKENS]])
    return [ids for ids in found if ids]


def logits_of(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Return a model's logits of each row in float32 on the CPU; the model is left as it was.

    Rows go through one by one: no architecture's padding matters.
    """
    import torch

    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    found = []
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for ids in rows:
                inputs = torch.tensor([ids], device=device)
                found.append(model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits.float().cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    return found


def tolerance(dtype: torch.dtype) -> float:
    """Return how far logits may lie apart, as a share of their length, that models in ``dtype`` compute.

    Example:
        >>> import torch
        >>> tolerance(torch.float32), tolerance(torch.bfloat16)
        (0.001, 0.0625)
    """
    import torch

    # Some networks carry the rounding of the first layer through forty others.
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def check_saved(
    folder: Path, trained: list[Tensor], rows: list[list[int]], *, without: Collection[int] = (), **options: Any
) -> float:
    """Return how far the logits of a saved folder lie from those of the trained model, as a share of their length.

    Args:
        folder: A model, or an adapter that names its base; loaded as a user would, with stock PEFT.
        trained: Logits of the trained model, from :func:`logits_of`.
        rows: The tokens that they belong to.
        without: Tokens whose logits do not count, since the saved model is not to know them.
        **options: See :func:`modicum.jobs.loading.models.load_model`; ``dtype`` is the trained model's own.

    Raises:
        CheckpointError: The folder does not load, or is another model.
    """
    try:
        saved = load_model(folder, **options)
        found = logits_of(saved, rows)
    except (ModicumError, RuntimeError, IndexError) as error:
        pass_on(error)
        raise CheckpointError(f"What was saved does not load: {error}") from None
    off = size = furthest = 0.0
    for ours, theirs in zip(trained, found):
        words = [token for token in range(theirs.shape[-1]) if token not in without]
        # The mean of all logits has no effect.
        kept, theirs = (t - t.mean(-1, keepdim=True) for t in (ours[..., words], theirs[..., words]))
        off += float((kept - theirs).square().sum())
        size += float(kept.square().sum())
        furthest = max(furthest, float((kept - theirs).abs().max()))
    share = (off / size) ** 0.5 if size else off
    allowed = tolerance(next(p.dtype for p in saved.parameters() if p.is_floating_point()))
    if not share <= allowed:
        raise CheckpointError(
            f"What was saved is not what was trained: its logits lie {share:.2g} of their length away (up to "
            f"{furthest:.2g}), where rounding explains {allowed:.2g}."
        )
    return share
