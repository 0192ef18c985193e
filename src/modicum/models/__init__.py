"""Models: input ids to logits, as transformers models.

Importing this package makes ``AutoModelForCausalLM.from_pretrained`` know them.
"""

from modicum.models.zero_calibrate import ExitPoint, calibrate_threshold
from modicum.models.zero_config import ZeroTokenConfig
from modicum.models.zero_conversion import (
    CycleRange,
    choose_cycle_range,
    convert_to_zero_token,
    resize_pool,
)
from modicum.models.zero_exit import exit_decision
from modicum.models.zero_token import ZeroTokenForCausalLM, ZeroTokenOutput

__all__ = [
    "CycleRange",
    "ExitPoint",
    "ZeroTokenConfig",
    "ZeroTokenForCausalLM",
    "ZeroTokenOutput",
    "calibrate_threshold",
    "choose_cycle_range",
    "convert_to_zero_token",
    "exit_decision",
    "resize_pool",
]
