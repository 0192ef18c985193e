"""The Zero Token Transformer: layers that are visited several times, with early exit."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.models.zero_token.model import ZeroTokenForCausalLM, ZeroTokenOutput

__all__ = ["ZeroTokenForCausalLM", "ZeroTokenOutput"]

face(__name__)
