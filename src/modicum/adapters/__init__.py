"""Initialisations of low-rank adapters."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.adapters.hrp import Preheat, hrp_factors
    from modicum.adapters.preheat import get_hrp_state_dict, initialize_lora_hrp_weights, preheating

__all__ = ["Preheat", "get_hrp_state_dict", "hrp_factors", "initialize_lora_hrp_weights", "preheating"]

face(__name__)
