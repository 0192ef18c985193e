"""Models: input ids to logits, as transformers models.

Importing this package makes ``AutoModelForCausalLM.from_pretrained`` know them.
"""

from modicum.models.routed import RoutedConfig, RoutedForCausalLM
from modicum.models.zero_token.calibrate import ExitPoint, calibrate_threshold, fit_exit_gate
from modicum.models.zero_token.config import ZeroTokenConfig
from modicum.models.zero_token.conversion import (
    CycleRange,
    choose_cycle_range,
    convert_to_zero_token,
    resize_pool,
)
from modicum.models.zero_token.exit import exit_decision
from modicum.models.zero_token.importance import Importance, skip_visits, visit_importance
from modicum.models.zero_token.model import (
    ZeroTokenForCausalLM,
    ZeroTokenForSequenceClassification,
    ZeroTokenForTokenClassification,
    ZeroTokenModel,
    ZeroTokenOutput,
)
from modicum.models.zero_token.training import TrainingStep, parameter_groups

__all__ = [
    "CycleRange",
    "ExitPoint",
    "Importance",
    "RoutedConfig",
    "RoutedForCausalLM",
    "TrainingStep",
    "ZeroTokenConfig",
    "ZeroTokenForCausalLM",
    "ZeroTokenForSequenceClassification",
    "ZeroTokenForTokenClassification",
    "ZeroTokenModel",
    "ZeroTokenOutput",
    "calibrate_threshold",
    "choose_cycle_range",
    "convert_to_zero_token",
    "exit_decision",
    "fit_exit_gate",
    "parameter_groups",
    "resize_pool",
    "skip_visits",
    "visit_importance",
]
