"""Three equal experts: methods that only average or trim nothing give that expert back, to one rounding (case H16)."""

from __future__ import annotations

import pytest
import torch

from modicum.weights import merge_state_dicts
from support import EQUAL_EXPERTS


@pytest.mark.parametrize("method", EQUAL_EXPERTS)
def test_three_equal_experts_are_that_expert(method):
    rng = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.mlp.up_proj.weight": (24, 16), "model.norm.weight": (16,)}
    base = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    expert = {name: value + 0.05 * torch.randn(value.shape, generator=rng) for name, value in base.items()}
    merged = merge_state_dicts(base, [expert] * 3, method=method, **EQUAL_EXPERTS[method])
    for name, value in expert.items():
        # Half a unit in the last place of the expert, and as much of each of base and delta where these are added.
        torch.testing.assert_close(merged[name], value, rtol=3e-7, atol=3e-7)
