"""How an adapter's first factors are found on a whole PEFT model, and how they are put into it."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from modicum.errors import ModicumError, listed
from modicum.facts import AdapterFacts
from modicum.registry import SUPPLIED, Entry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from modicum.adapters.preheat import Batch, Loss, MakeOptimizer
    from modicum.jobs.training.adapter_files import Pairs


@dataclass(frozen=True)
class Start:
    """The first factors of an adapter.

    Attributes:
        factors: ``lora_A`` and ``lora_B`` by module.
        spectra: Singular values of what preheating learned, by module.
        notes: What the user should know.
    """

    factors: Pairs
    spectra: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def resolved(
    peft_model: Any, entry: Entry[AdapterFacts], knobs: Mapping[str, Any], total_steps: int | None, adapter: str
) -> dict[str, int]:
    """Return the rank and number of steps of preheating where the recipe leaves them to the run."""
    stage, _ = _gathering(entry, knobs)
    return {
        "preheat_rank": stage.rank_for(_highest_rank(peft_model, adapter)),
        "preheat_steps": stage.steps_for(total_steps),
    }


def from_preheating(
    peft_model: Any,
    entry: Entry[AdapterFacts],
    knobs: Mapping[str, Any],
    *,
    batches: Callable[[], Iterable[Batch]],
    lr: float,
    seed: int,
    accumulation: int,
    loss: Loss | None,
    optimizer: MakeOptimizer | None,
    adapter: str,
) -> Start:
    """Train an adapter of higher rank, and start the model's own from its leading directions."""
    from modicum.adapters.layers import factors_of, lora_layers
    from modicum.adapters.preheat import get_hrp_state_dict, initialize_lora_hrp_weights

    stage, knobs = _gathering(entry, knobs)
    # Ranks that are shared out anew may need any of the directions; else the adapter's own are enough.
    keep = None if stage.rank_redistribution != "none" else _highest_rank(peft_model, adapter)
    state = get_hrp_state_dict(
        peft_model,
        _cycle(batches, peft_model.device),
        config=stage,
        lr=lr,
        accumulation=accumulation,
        loss=loss,
        optimizer=optimizer,
        keep=keep,
        seed=seed,
        adapter=adapter,
    )
    left = initialize_lora_hrp_weights(
        peft_model,
        state,
        **knobs | dict(entry.facts.preheated or {}),
        train_factors=stage.train_factors,
        rank_redistribution=stage.rank_redistribution,
        seed=seed,
        adapter=adapter,
    )
    spectra = {key.removesuffix(".S"): S.cpu() for key, S in state.items() if key.endswith(".S")}
    notes = []
    if clipped := sum(len(S) < stage.preheat_rank for S in spectra.values()):
        notes.append(
            f"{entry.name}: preheating rank {stage.preheat_rank} was clipped to the short side of {clipped} modules."
        )
    if left:
        notes.append(f"{entry.name} left {len(left)} modules at their default start: {listed(left)}.")
    factors: Pairs = {}
    for name, layer in lora_layers(peft_model, adapter).items():
        A, B = factors_of(layer, adapter)
        factors[name] = A.detach().clone(), B.detach().clone()
    return Start(factors, spectra, notes)


def from_data(
    peft_model: Any,
    entry: Entry[AdapterFacts],
    knobs: Mapping[str, Any],
    *,
    batches: Callable[[], Iterable[Batch]],
    loss: Loss | None,
    seed: int,
    adapter: str,
) -> Start:
    """Call the method on every module, with the weight, gradient or moment that its parameters name."""
    import torch

    from modicum.adapters.calibrate import base_weight, input_moments, weight_gradients
    from modicum.adapters.layers import lora_layers
    from modicum.adapters.ranks import redistribute
    from modicum.random import generator

    stage, knobs = _gathering(entry, knobs)
    layers = lora_layers(peft_model, adapter)
    wanted = entry.parameters[0]
    sample = list(itertools.islice(_cycle(batches, peft_model.device), stage.batches)) if stage is not None else []
    gradients = weight_gradients(peft_model, sample, adapter=adapter, loss=loss) if "gradient" in wanted else {}
    moments = input_moments(peft_model, sample, adapter=adapter) if "moment" in wanted else {}
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    if getattr(stage, "rank_redistribution", "none") != "none":
        spectra = {name: torch.linalg.eigvalsh(C.double()).flip(0).clamp_min(0).sqrt() for name, C in moments.items()}
        ranks = redistribute(spectra, budget=sum(ranks.values()), most=int(stage.rho * max(ranks.values())))
    takes = inspect.signature(entry.function).parameters
    factors = {}
    for name, layer in layers.items():
        data = {"gradient": gradients.get(name), "moment": moments.get(name)}
        if "weight" in wanted:
            # A quantised weight has another shape than its module, and most starts need no more than the shape.
            data["weight"] = (
                torch.empty(layer.out_features, layer.in_features, device="meta")
                if entry.facts.shape_only
                else base_weight(layer, name).detach()
            )
        supplied: dict[str, Any] = {"rank": ranks[name]}
        if "scaling" in takes:
            supplied["scaling"] = layer.scaling[adapter]
        supplied |= {source: generator(seed, entry.name, name) for source in SUPPLIED & takes.keys()}
        try:
            factors[name] = entry.function(*(data[key] for key in wanted), **supplied, **knobs)
        except ModicumError as error:
            raise type(error)(f"{name}: {error}") from None
    return Start(factors)


def apply_start(peft_model: Any, facts: AdapterFacts, factors: Pairs, adapter: str) -> Pairs:
    """Put the factors into the model, and return what left the base, by module: nothing where no base is shifted."""
    import torch

    from modicum.adapters.calibrate import base_weight
    from modicum.adapters.core import train_core
    from modicum.adapters.layers import factors_of, lora_layers, store_factors
    from modicum.adapters.ranks import change_ranks

    if facts.shifts_base:
        _untie(peft_model, factors, adapter)
    change_ranks(peft_model, {name: len(A) for name, (A, _) in factors.items()}, adapter=adapter)
    layers = lora_layers(peft_model, adapter)
    gone: Pairs = {}
    for name, values in factors.items():
        layer = layers[name]
        store_factors(layer, adapter, values, name)
        if facts.shifts_base:
            # What leaves the base is what the layer computes, in the dtype that it stores.
            A, B = (factor.detach().clone() for factor in factors_of(layer, adapter))
            weight = base_weight(layer, name)
            with torch.no_grad():
                weight.copy_(weight.float() - layer.scaling[adapter] * (B.float() @ A.float()))
            gone[name] = (A.cpu(), B.cpu())
    if facts.core:
        train_core(peft_model, {name: B for name, (_, B) in factors.items()}, adapter=adapter)
    freeze(peft_model, facts.frozen, adapter)
    peft_model.peft_config[adapter].init_lora_weights = True
    return gone


def clip_ranks(peft_model: Any, name: str, facts: AdapterFacts, adapter: str) -> list[str]:
    """Lower the ranks of modules that are narrower than what the method needs, at their scaling; return a note."""
    if facts.most_rank is None:
        return []
    from modicum.adapters.layers import lora_layers
    from modicum.adapters.ranks import change_ranks

    layers = lora_layers(peft_model, adapter)
    most = {name: max(1, facts.most_rank(layer.out_features, layer.in_features)) for name, layer in layers.items()}
    clipped = {name: most[name] for name, layer in layers.items() if layer.r[adapter] > most[name]}
    if not clipped:
        return []
    change_ranks(peft_model, clipped, adapter=adapter)
    kinds = sorted({f"{module.rpartition('.')[2]} {rank}" for module, rank in clipped.items()})
    return [f"{name}: the rank of {len(clipped)} narrow modules was clipped to what they can have: {', '.join(kinds)}."]


def _untie(peft_model: Any, names: Iterable[str], adapter: str) -> None:
    """Give each layer whose base is going to shift a weight of its own: a tied embedding must stay as it is."""
    import torch

    from modicum.adapters.layers import lora_layers

    layers, owners = lora_layers(peft_model, adapter), Counter[int]()
    for _, parameter in peft_model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] += 1
    for name in names:
        base = layers[name].get_base_layer()
        if owners[id(base.weight)] > 1:
            base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)


def freeze(peft_model: Any, frozen: Literal["A", "B"] | None, adapter: str) -> None:
    """Freeze the factor that a method does not train."""
    from modicum.adapters.layers import factors_of, lora_layers

    if frozen is None:
        return  # before any look at the layers: those of AdaLoRA are no LoRA
    for layer in lora_layers(peft_model, adapter).values():
        factors_of(layer, adapter)["AB".index(frozen)].requires_grad_(False)


def _highest_rank(peft_model: Any, adapter: str) -> int:
    from modicum.adapters.layers import lora_layers

    return max(layer.r[adapter] for layer in lora_layers(peft_model, adapter).values())


def _gathering(entry: Entry[AdapterFacts], knobs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split the knobs into those of collecting the data, as their dataclass, and those of the function."""
    gather = entry.facts.gather
    names = {item.name for item in fields(gather)} if gather is not None else set()
    stage = gather(**{key: value for key, value in knobs.items() if key in names}) if gather is not None else None
    return stage, {key: value for key, value in knobs.items() if key not in names}


def _cycle(batches: Callable[[], Iterable[Batch]], device: torch.device) -> Iterable[Batch]:
    """Give the batches again and again, on the model's device."""
    while True:
        empty = True
        for batch in batches():
            empty = False
            yield {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
        if empty:
            raise ModicumError("The training data give no batch to start the adapter from. Check data.path and size.")
