"""Losses of safety reasoning and of its baselines, and the rows that they learn from."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.jobs.safety.prompts import render_row
    from modicum.objectives.circuit_breakers import breaker_coefficients, circuit_breaker_loss, lat_inner_step
    from modicum.objectives.derta import derta_rows
    from modicum.objectives.dpo import dpo_loss
    from modicum.objectives.latent_adversarial import latent_adversarial
    from modicum.objectives.safety_reasoning import (
        completion_cross_entropy,
        safety_reasoning,
        srg_reward,
        topk_distillation_kl,
    )

__all__ = [
    "breaker_coefficients",
    "circuit_breaker_loss",
    "completion_cross_entropy",
    "derta_rows",
    "dpo_loss",
    "lat_inner_step",
    "latent_adversarial",
    "render_row",
    "safety_reasoning",
    "srg_reward",
    "topk_distillation_kl",
]

face(__name__)
