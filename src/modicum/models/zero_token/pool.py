"""The parameters that looping adds to a model, in one module, so that PEFT and optimisers can name it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from modicum.errors import CheckpointError
from modicum.models.zero_token.config import ZeroTokenConfig
from modicum.models.zero_token.hosts import zero_key_shape
from modicum.random import generator

OTHER_CYCLES = (
    "Was it made for another number of cycles? Load it with its own n_cycles, then call "
    "modicum.models.resize_pool(model, n_cycles)."
)


class ZeroTokenPool(nn.LayerNorm):
    """Zero keys, biases, gates, embeddings of cycles and low-rank terms.

    Weight decay would shut a gate, or shrink a key whose length is its meaning. Trainers know what to spare by the
    class ``LayerNorm`` and by parts of names, and by nothing else; so the pool is one, although it norms nothing.

    Args:
        config: The model's configuration.
        linears: For each middle layer, the shape (in, out) of every linear map in it by name; for the low-rank terms.
    """

    # What no pre-trained model brings: training lets it out of weight decay, and trains and saves it with any adapter.
    is_addition = True
    draws: Tensor

    def __init__(self, config: ZeroTokenConfig, linears: dict[int, dict[str, tuple[int, int]]]) -> None:
        nn.Module.__init__(self)
        rows, depth = 1 + max(config.rows.values(), default=-1), config.depth
        heads = config.num_attention_heads
        groups, width = zero_key_shape(config.host)
        self.std, self.seed = config.zero_key_init_std, config.seed
        if rows and config.zero_kind == "key":
            self.zero_key = nn.Parameter(torch.empty(rows, groups, width))
        if rows and (config.zero_bias or config.zero_kind == "sink"):
            self.zero_bias = nn.Parameter(torch.empty(rows, heads))
        if config.cycle_embedding:
            self.cycle_embedding = nn.Parameter(torch.empty(depth, config.hidden_size))
            self.neutral = 1.0 if config.cycle_embedding == "multiply" else 0.0
        if config.cycle_gate:
            self.cycle_gate = nn.Parameter(torch.empty(depth - 1))
        if config.lora_rank:
            rank = config.lora_rank
            self.lora = nn.ParameterDict()
            for layer, shapes in linears.items():
                for name, (wide_in, wide_out) in shapes.items():
                    key = f"{layer}:{name.replace('.', '/')}"  # a parameter's name may hold no dot
                    self.lora[f"{key}:A"] = nn.Parameter(torch.empty(depth, rank, wide_in))
                    self.lora[f"{key}:B"] = nn.Parameter(torch.empty(depth, wide_out, rank))

        if config.exit_gate:
            self.add_gate(depth - 1, config.hidden_size)
        self.follow(config)

    def add_gate(self, decisions: int, width: int) -> Tensor:
        """Make the exit gate, or return the one that is there: weights and bias for each decision."""
        if "exit_gate" not in self._parameters:
            other = next(self.parameters(), torch.empty(0))
            self.exit_gate = nn.Parameter(torch.empty(decisions, width + 1, device=other.device, dtype=other.dtype))
        return self.exit_gate

    def follow(self, config: ZeroTokenConfig) -> None:
        """Make what the configuration's training needs."""
        if config.train_cycles == "random" and "draws" not in self._buffers:
            # Passes made in training, by which the next draw is named: a checkpoint holds it, so that training goes on
            # exactly. A tensor, because tensors are what checkpoints hold.
            self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def extra_repr(self) -> str:
        """Return nothing: there are no sizes to tell."""
        return ""

    def count(self, draws: int) -> None:
        """Say how many passes were made in training."""
        if "draws" in self._buffers:
            self.draws.fill_(draws)

    def next_count(self) -> int:
        """Return how many passes were made in training, and count one more."""
        count = int(self.draws)
        self.draws.add_(1)
        return count

    def forward(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parameters by name; through a call, so that wrappers of modules (PEFT, FSDP) see it."""
        return dict(self.named_parameters())

    def initialize(self) -> None:
        """Draw the zero keys and the low-rank inputs by name; set the rest to what changes nothing."""
        for buffer in self.buffers():
            init.zeros_(buffer)
        for name, parameter in self.named_parameters():
            if name == "cycle_embedding":
                init.constant_(parameter, self.neutral)
            elif name == "zero_key" or name.endswith(":A"):
                std = self.std if name == "zero_key" else parameter.shape[-1] ** -0.5
                # The draw is made on the CPU, whatever the device, so that it depends on its name alone.
                draw = torch.randn(parameter.shape, generator=generator(self.seed, "zero_token", name)) * std
                init.copy_(parameter, draw.to(parameter.device, parameter.dtype))
            else:
                init.zeros_(parameter)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.named_parameters():
            given = state_dict.get(prefix + name)
            if given is not None and given.shape != parameter.shape:
                raise CheckpointError(
                    f"{prefix}{name} has shape {tuple(given.shape)}, expected {tuple(parameter.shape)}. {OTHER_CYCLES}"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
