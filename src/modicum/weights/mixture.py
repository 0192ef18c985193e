"""A mixture of experts put together from dense models: attention, norms and embeddings of one, feed-forwards of all.

Each layer's router gets a row for each expert; where a row comes from is the caller's. The result has the names of
published files, one tensor for each expert, which transformers reads into its own class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.layout import layer_of, stacks
from modicum.weights.aliases import aligned
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.companions import companion_files
from modicum.weights.compatibility import check_agreement, labels, notes_on_configs
from modicum.weights.configs import text_of
from modicum.weights.files import Spec
from modicum.weights.mergekit.tokenizers import notes_on_tokenizers
from modicum.weights.plan import Plan, Source, Step, kept, parse_dtype

ROUTERS = "routers"  # what the rows of the routers are called in messages


class Kind(NamedTuple):
    """What a dense architecture becomes.

    Attributes:
        model_type: Of the result.
        architecture: Class of the result.
        block: What the feed-forward is called in the result.
        parts: Names of the matrices of one expert, by their names in the dense model.
        shared: Whether the class has an expert that sees every token: the name, and that of its gate.
    """

    model_type: str
    architecture: str
    block: str
    parts: Mapping[str, str]
    shared: tuple[str, str] | None = None


_SAME = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
_MIXTRAL = Kind(
    "mixtral", "MixtralForCausalLM", "block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
)
KINDS: Mapping[str, Kind] = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen2": Kind("qwen2_moe", "Qwen2MoeForCausalLM", "mlp", _SAME, ("shared_expert", "shared_expert_gate")),
    "qwen3": Kind("qwen3_moe", "Qwen3MoeForCausalLM", "mlp", _SAME),
}


@dataclass(frozen=True)
class Expert:
    """A dense model whose feed-forwards become an expert.

    Attributes:
        model: The model.
        scale: Factor on what the expert adds to the residual stream.
    """

    model: Checkpoint
    scale: float = 1.0


def plan_mixture(
    base: Checkpoint,
    experts: Sequence[Expert],
    routers: Mapping[int, Tensor],
    *,
    shared: Expert | None = None,
    shared_gates: Mapping[int, Tensor] | None = None,
    experts_per_token: int = 2,
    dtype: str | torch.dtype | None = None,
) -> Plan:
    """Return the plan of a mixture; see :func:`modicum.weights.merge.run_plan`.

    Args:
        base: Gives everything but the experts.
        experts: At least two.
        routers: For each layer, a row for each expert ``(experts, width)``.
        shared: An expert that sees every token, where the result's class has one.
        shared_gates: For each layer, the row of the shared expert's gate ``(1, width)``; zeros when not given.
        experts_per_token: How many experts a token goes through.
        dtype: Of the result; that of the base when not given.

    Raises:
        CheckpointError: The models do not fit together.
        RecipeError: There are too few experts.
        UnsupportedError: The architecture has no mixture.
    """
    kind = kind_of(base)
    if len(experts) < max(2, experts_per_token):
        raise RecipeError(
            f"{len(experts)} experts, expected at least {max(2, experts_per_token)}: two, and as many as a token goes "
            "through. Add some, or lower experts_per_token."
        )
    if (shared is not None) != (kind.shared is not None):
        said = "needs one shared expert" if kind.shared else "has no shared expert"
        raise RecipeError(f"{kind.architecture} {said}. Set shared_experts to {'one' if kind.shared else 'none'}.")
    everyone = [*experts, *([shared] if shared else [])]
    opened = aligned([base, *(each.model for each in everyone)])
    names = labels(opened, [model.name for model in opened])
    check_agreement(opened[0], opened[1:], names=names)
    made, wanted = _Made(kind, opened[0], routers, shared_gates or {}), parse_dtype(dtype)
    tables = [(Expert(model, each.scale), model) for each, model in zip(everyone, opened[1:])]
    steps = [step for name in opened[0] for step in made.steps(name, tables, shared is not None)]
    steps += made.gates()
    steps = [replace(s, spec=Spec(s.spec.shape, wanted)) if wanted and s.spec.dtype.is_floating_point else s
             for s in steps]  # fmt: skip
    config = _config(base.config, kind, len(experts), experts_per_token)
    companions = companion_files(opened[0], wanted, **config)
    notes = notes_on_configs(opened, names)
    notes += notes_on_tokenizers(dict(zip(names, opened)), "and all read the base's tokens")
    return Plan(steps, opened, companions, notes)


def kind_of(base: Checkpoint) -> Kind:
    """Return what a model becomes.

    Raises:
        UnsupportedError: Nothing that is known here.
    """
    found = KINDS.get(str(base.config.get("model_type")))
    if found is None:
        raise UnsupportedError(
            f"{base.name} is a {base.config.get('model_type')} model, expected one of {', '.join(KINDS)}, of which a "
            "mixture of experts can be made."
        )
    return found


def depth_of(base: Checkpoint) -> int:
    """Return how many layers a model has."""
    return max(stacks(base).values(), default=0)


def width_of(base: Checkpoint) -> int:
    """Return the size of a model's hidden states.

    Raises:
        UnsupportedError: No mixture can be made of the model.
    """
    kind_of(base)
    return int(text_of(base.config)["hidden_size"])


@dataclass(frozen=True)
class _Made:
    kind: Kind
    base: Checkpoint
    routers: Mapping[int, Tensor]
    shared_gates: Mapping[int, Tensor]

    def steps(self, name: str, experts: Sequence[tuple[Expert, Checkpoint]], shared: bool) -> list[Step]:
        """Return the steps that a tensor of the dense model becomes."""
        layer, spec = layer_of(name), self.base.spec(name)
        block, _, rest = (layer.rest if layer else "").partition(".")
        part, _, kind = rest.partition(".")
        if layer is None or block != "mlp":
            return [kept(spec, Source(self.base.name, self.base, name))]
        if part not in self.kind.parts or kind != "weight":
            raise CheckpointError(f"{self.base.name}: {name!r} has no place in {self.kind.architecture}.")
        found = []
        for number, (expert, model) in enumerate(experts):
            last = shared and number == len(experts) - 1
            place = f"experts.{number}.{self.kind.parts[part]}"
            if last and self.kind.shared:
                place = f"{self.kind.shared[0]}.{part}"
            out = f"{layer.stack}.{layer.number}.{self.kind.block}.{place}.weight"
            step = replace(kept(spec, Source(model.name, model, name)), name=out)
            if part == "down_proj" and expert.scale != 1:
                step = replace(step, knobs={"scale": expert.scale})
            found.append(step)
        return found

    def gates(self) -> list[Step]:
        """Return the steps of the routers, and of the shared expert's gate."""
        stack = next(iter(stacks(self.base)))
        tensors: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for number in range(depth_of(self.base)):
            at = f"{stack}.{number}.{self.kind.block}"
            dtypes[at] = self.base.spec(f"{stack}.{number}.mlp.gate_proj.weight").dtype  # of the experts beside it
            tensors[f"{at}.gate.weight"] = self.routers[number]
            if self.kind.shared:
                zero = torch.zeros(1, width_of(self.base))
                tensors[f"{at}.{self.kind.shared[1]}.weight"] = self.shared_gates.get(number, zero)
        return [
            kept(Spec(tuple(tensor.shape), dtypes[name.rsplit(".", 2)[0]]), Source(ROUTERS, tensors, name))
            for name, tensor in tensors.items()
        ]


def _config(before: Mapping[str, Any], kind: Kind, experts: int, per_token: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model_type": kind.model_type,
        "architectures": [kind.architecture],
        "num_experts_per_tok": per_token,
        "output_router_logits": False,
    }
    inner = before["intermediate_size"]
    if kind.model_type == "mixtral":
        found |= {"num_local_experts": experts, "sliding_window": before.get("sliding_window")}
    else:
        found |= {"num_experts": experts, "moe_intermediate_size": inner, "decoder_sparse_step": 1,
                  "norm_topk_prob": True, "mlp_only_layers": []}  # fmt: skip
    if kind.shared:
        found |= {"shared_expert_intermediate_size": inner}
    return found
