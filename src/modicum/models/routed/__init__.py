"""Several experts served as one model, which picks or blends them for each request."""

from modicum.models.routed.build import route_experts
from modicum.models.routed.config import RoutedConfig
from modicum.models.routed.model import RoutedForCausalLM
from modicum.models.routed.requests import Routes

__all__ = ["RoutedConfig", "RoutedForCausalLM", "Routes", "route_experts"]
