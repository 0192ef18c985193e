"""Objectives: batch in, batch out, and where needed a loss."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.objectives.collator import MEAPCollator, ObjectiveCollator
    from modicum.objectives.mask_token import drop_mask_token, ensure_mask_token, suppress_mask_token
    from modicum.objectives.meap import mask_inputs, mask_ratio_at, reference_mask_positions
    from modicum.objectives.meap_sft import meap_sft_loss
    from modicum.objectives.sft_rows import chat_row, copies_attention, expand_sft, expand_sft_example

__all__ = [
    "MEAPCollator",
    "ObjectiveCollator",
    "chat_row",
    "copies_attention",
    "drop_mask_token",
    "ensure_mask_token",
    "expand_sft",
    "expand_sft_example",
    "mask_inputs",
    "mask_ratio_at",
    "meap_sft_loss",
    "reference_mask_positions",
    "suppress_mask_token",
]

face(__name__)
