"""What methods for matrices average, and the stacks whose matrices they merge one by one."""

import pytest
import torch

from modicum.registry import merge_method
from modicum.weights import merge_state_dicts
from modicum.weights.methods import tsv

# Slices of a convolution have a row of inputs and a few taps, and the decays of a state space a row for each channel.
NO_MAPS = {
    "model.layers.0.mixer.conv1d.weight": (8, 1, 4),
    "model.layers.0.mixer.A_log": (8, 4),
    "visual.patch_embed.proj.weight": (8, 3, 2, 4, 4),
    "model.encoder.conv1.weight": (8, 4, 3),
    "query_tokens": (1, 4, 8),
}


@pytest.mark.parametrize("method", [n for n, entry in merge_method.items() if entry.facts.matrix and entry.facts.base])
@pytest.mark.parametrize("name", NO_MAPS)
def test_convolutions_are_averaged(method: str, name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    base, *experts = ({name: torch.randn(NO_MAPS[name], generator=rng)} for _ in range(3))
    found = merge_state_dicts(base, experts, method=method)[name]
    torch.testing.assert_close(found, (experts[0][name] + experts[1][name]) / 2)


@pytest.mark.parametrize(
    "name", ["h.0.mlp.experts.gate_up_proj", "h.0.mlp.input_linear.weight", "h.0.rg_lru.input_gate_weight"]
)
def test_of_stacks_each_matrix_is_merged(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    base, *experts = (torch.randn(3, 6, 5, generator=rng) for _ in range(3))
    found = merge_state_dicts({name: base}, [{name: expert} for expert in experts], method="tsv")[name]
    for i in range(3):
        torch.testing.assert_close(found[i], tsv(base[i], [expert[i] for expert in experts]))
