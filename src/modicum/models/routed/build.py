"""A routed model around a host that is in memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from modicum.models.routed.config import RoutedConfig
from modicum.models.routed.model import RoutedForCausalLM
from modicum.models.router import Router
from modicum.registry import model
from modicum.types import NonNegativeInt
from modicum.weights.compatibility import Tensors
from modicum.weights.experts import ExpertSet


@model("routed", paper="arXiv:2502.04411", several=True)
def route_experts(
    host: Any, experts: ExpertSet, router: Router | None = None, *, memory_bytes: NonNegativeInt = 0
) -> RoutedForCausalLM:
    """Serve several experts in one host model, which picks or blends them for each request.

    Args:
        host: A causal language model of the experts' architecture. Its weights become the dense ones, in place.
        experts: What :func:`modicum.weights.mediator.build_experts` made.
        router: What weighs the experts by a prompt; see :func:`modicum.models.router.fit_router`.
        memory_bytes: How much copies of mixtures used before may take.

    Returns:
        The routed model.

    Example:
        >>> from modicum.weights.mediator import build_experts
        >>> from transformers import AutoModelForCausalLM
        >>> host = AutoModelForCausalLM.from_pretrained("base")  # doctest: +SKIP
        >>> experts = build_experts("base", ["one", "two"], ["model.layers.0"], sparsifier="sign")  # doctest: +SKIP
        >>> route_experts(host, experts).generate(prompts, weights=[1, 0])  # doctest: +SKIP

    Cost:
        The host's memory and the stored differences; writing another mixture costs a copy of the routed weights and the
        reading of the differences.

    Deviates:
        The published system adds sparse experts on a GPU by atomic operations and prefetches them. Here mixtures are
        made on the processor, a block at a time; to a CUDA device one tensor travels while the next is made.

    Reference:
        "Mediator: Memory-efficient LLM Merging with Less Parameter Conflicts and Uncertainty Based Routing", 2025,
        arXiv:2502.04411.
    """
    routing = (
        {}
        if router is None
        else {"kind": router.kind, "temperature": router.temperature, "threshold": router.threshold}
    )
    config = RoutedConfig(host=host.config, experts=asdict(experts.about), routing=routing)
    fill_host(host, experts.dense)
    return RoutedForCausalLM(config, host=host, experts=experts, router=router, memory_bytes=memory_bytes)


def fill_host(host: Any, tensors: Tensors) -> None:
    """Load a checkpoint's tensors into a host, whose prefix their names may lack."""
    missing = host.load_state_dict(dict(tensors), strict=False).unexpected_keys
    if missing:
        host.base_model.load_state_dict({name: tensors[name] for name in missing})
