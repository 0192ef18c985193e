"""The one seam between adapter initialisations and PEFT: start an adapter, and finish it.

::

    model = get_peft_model(base, peft_config("hrp", {}, rank=8, lora_alpha=16, target_modules="all-linear"))
    started = initialize(model, "hrp", {}, batches=lambda: loader, lr=2e-4)
    ...  # train with anything
    model.save_pretrained(folder)
    started.finish(folder)

What comes out is always a standard LoRA adapter for the original base whose configuration says
``init_lora_weights: true``; where it came from stands in ``adapter_init.json`` beside it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import ModicumError, UnsupportedError
from modicum.facts import AdapterFacts
from modicum.jobs.training.adapter_files import (
    GEOMETRY,
    ORIGIN,
    cached_start,
    factors_in,
    make_plain,
    remove_shift,
    write_start,
)
from modicum.jobs.training.adapter_geometry import geometry
from modicum.record import write_atomic
from modicum.registry import Entry, adapter_init

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from modicum.adapters.preheat import Batch, Loss, MakeOptimizer
    from modicum.jobs.training.adapter_files import Pairs
    from modicum.jobs.training.adapter_geometry import Change


@dataclass
class Started:
    """What an initialisation did, to be finished when the trained adapter has been saved.

    Attributes:
        origin: Name and knobs of the initialisation, for the record.
        initial: The factors that left the base, by module; empty when the base is as it was.
        start: The factors that training started from, by module, where they are known.
        spectra: Singular values of what preheating learned, by module.
        notes: What the user should know.
        consumed: Micro-batches that the main run should not see again (``reuse_data: continue``).
        adaptive: The saved adapter is AdaLoRA's, which is to become plain LoRA.
    """

    origin: dict[str, Any]
    initial: Pairs = field(default_factory=dict)
    start: Pairs = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    consumed: int = 0
    adaptive: bool = False

    def prepare(self, peft_model: Any, *, adapter: str = "default") -> None:
        """Make the trained parts plain weights again; call it before the model is saved."""
        from modicum.adapters.core import fold

        if self.adaptive:
            # PEFT would save modules without any rank left as empty tensors, and warn of them.
            peft_model.peft_config[adapter].rank_pattern = None
        if "core" in self.origin:
            fold(peft_model, adapter=adapter)

    def finish(self, folder: str | Path, *, change: Change | None = None) -> None:
        """Make the saved adapter independent of this run: for the original base, and with its origin beside it.

        Args:
            folder: Where the adapter was saved.
            change: Gives a full fine-tune's change of a module, to which the adapter's directions are compared.
        """
        folder = Path(folder)
        if self.start:
            saved = factors_in(folder)
            start = {name: factors for name, factors in self.start.items() if name in saved}
            found = {"name": self.origin["name"], **geometry(start, saved, self.spectra, change=change)}
            write_atomic(folder / GEOMETRY, json.dumps(found) + "\n")
        if self.initial:
            remove_shift(folder, self.initial)
        if self.adaptive:
            make_plain(folder)
        write_atomic(folder / ORIGIN, json.dumps(self.origin, indent=2) + "\n")


def config_fields(name: str) -> dict[str, Any]:
    """Return the fields of ``peft.LoraConfig`` that a method asks for.

    Example:
        >>> config_fields("rslora")
        {'use_rslora': True}
    """
    return dict(adapter_init[name].facts.config)


def peft_config(name: str, knobs: Mapping[str, Any], *, rank: int, **fields: Any) -> Any:
    """Return the configuration of PEFT that a method needs.

    Args:
        name: A registered adapter initialisation.
        knobs: Its knobs.
        rank: Rank of the adapter.
        **fields: Further fields of ``peft.LoraConfig``; they override what the method asks for.

    Raises:
        UnsupportedError: The method is PEFT's and needs what is not here.

    Example:
        >>> peft_config("rslora", {}, rank=4, lora_alpha=8).use_rslora
        True
    """
    from peft import AdaLoraConfig, LoraConfig

    entry = adapter_init[name]
    fields = config_fields(name) | fields
    if fields.get("init_lora_weights") == "loftq":
        _require_loftq()
    if not entry.facts.adaptive:
        return LoraConfig(r=rank, **fields)
    checked = entry.knobs(knobs)
    first = round(checked["spare"] * rank)
    # PEFT divides alpha by the rank to begin with. The length of the run is not known yet.
    fields["lora_alpha"] = fields.get("lora_alpha", 2 * rank) * first / rank
    return AdaLoraConfig(
        init_r=first, target_r=rank, orth_reg_weight=checked["orthogonality"], deltaT=checked["interval"],
        total_step=1, **fields,
    )  # fmt: skip


def _require_loftq() -> None:
    from importlib.util import find_spec

    import torch

    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise UnsupportedError(
            "loftq is PEFT's, which quantises with bitsandbytes on a CUDA device, and one of them is missing. Install "
            "and use them, or take hrp on a base that is quantised already."
        )


def initialize(
    peft_model: Any,
    name: str,
    knobs: Mapping[str, Any],
    *,
    batches: Callable[[], Iterable[Batch]],
    lr: float,
    seed: int = 0,
    total_steps: int | None = None,
    accumulation: int = 1,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    cache: Path | None = None,
    adapter: str = "default",
) -> Started:
    """Start the adapter of a PEFT model by the registered initialisation ``name``.

    Call it on every process; each must bring its own share of the data, and all get the same adapter.

    Args:
        peft_model: Made with :func:`peft_config`, and not yet wrapped or split over processes.
        name: A registered adapter initialisation.
        knobs: Its knobs.
        batches: Gives the training batches from the first one on, as mappings of tensors that the model takes.
        lr: The main run's learning rate.
        seed: Names every draw.
        total_steps: Length of the main run.
        accumulation: Micro-batches to an optimiser step.
        loss: ``(model, batch) -> scalar``; the model's own when not given.
        optimizer: ``(parameters, lr) -> optimizer`` of the main run, for preheating.
        cache: A file for the factors: written by the first call, read by the next, so that a resumed run starts from
            the same ones without preheating again.
        adapter: The adapter to start.

    Raises:
        ModicumError: A knob is wrong, or the method cannot be used on this model or data.
    """
    entry = adapter_init[name]
    knobs = entry.knobs(knobs)
    preheated = entry.parameters[0].keys() == {"A", "B"}
    if preheated:
        knobs |= _resolved(peft_model, entry, knobs, total_steps, adapter)
    started = Started({"name": name, **knobs, "seed": seed})
    if knobs.get("reuse_data") == "continue":
        started.consumed = knobs["preheat_steps"] * accumulation
    if entry.facts.adaptive:
        _schedule(peft_model, knobs, total_steps, adapter)
        started.adaptive = True
        return started
    if entry.facts.config or entry.facts.optimizer:
        _freeze(peft_model, entry, adapter)
        return started
    known = cached_start(cache)
    if known is not None:
        factors, started.spectra = known
    else:
        if preheated:
            options = {"lr": lr, "accumulation": accumulation, "seed": seed, "loss": loss, "optimizer": optimizer}
            factors = _preheat(peft_model, entry, knobs, started, batches, adapter, options)
        else:
            factors = _compute(peft_model, entry, knobs, batches, loss, seed, adapter)
        if cache is not None:
            write_start(cache, factors, started.spectra)
    _apply(peft_model, entry, factors, started, adapter)
    return started


def make_optimizer(
    peft_model: Any, name: str, knobs: Mapping[str, Any], *, lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer | None:
    """Return the optimiser that a method brings along (LoRA+, LoRA-FA), or ``None`` where it has none.

    Args:
        peft_model: The model to train.
        name: A registered adapter initialisation.
        knobs: Its knobs.
        lr: Learning rate (of A, for LoRA+).
        weight_decay: Decay of the weights.
    """
    import torch
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    entry = adapter_init[name]
    kind = entry.facts.optimizer
    if kind == "lora_plus":
        ratio = entry.knobs(knobs)["ratio"]
        return create_loraplus_optimizer(
            peft_model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay
        )
    if kind == "lora_fa":
        config = peft_model.peft_config["default"]
        return create_lorafa_optimizer(
            peft_model, r=config.r, lora_alpha=config.lora_alpha, lr=lr, weight_decay=weight_decay
        )
    return None


def after_backward(peft_model: Any, name: str, step: int) -> None:
    """Let an adaptive method (AdaLoRA) see the gradients of a step; call it before they are cleared.

    Args:
        peft_model: The model in training.
        name: A registered adapter initialisation; nothing happens for those that need none of this.
        step: Optimiser steps done before.
    """
    if adapter_init[name].facts.adaptive:
        peft_model.base_model.update_and_allocate(step)


def step_callback(name: str) -> Any:
    """Return the callback of ``transformers.Trainer`` that a method needs, or ``None``."""
    if not adapter_init[name].facts.adaptive:
        return None
    from transformers import TrainerCallback

    class Allocation(TrainerCallback):
        """See :func:`after_backward`."""

        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step:
                raise UnsupportedError(
                    f"{name} cannot go on from a checkpoint, which does not hold what it knows of the importance of "
                    "its ranks. Delete the run's checkpoints and start afresh."
                )

        def on_optimizer_step(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
            after_backward(model, name, state.global_step)

    return Allocation()


def _schedule(peft_model: Any, knobs: Mapping[str, Any], total_steps: int | None, adapter: str) -> None:
    """Tell PEFT's allocation the length of the run."""
    if total_steps is None:
        raise ModicumError("adalora plans its ranks over the whole run. Pass total_steps.")
    # The last step at least: without it PEFT ends before the budget is reached.
    warmup, settled = int(knobs["warmup"] * total_steps), max(1, int(knobs["settled"] * total_steps))
    if warmup + settled >= total_steps - 1:
        raise ModicumError(
            f"adalora has no step left to drop ranks in: warmup {knobs['warmup']} and settled {knobs['settled']} of "
            f"{total_steps} steps. Lower them, or train longer."
        )
    config = peft_model.peft_config[adapter]
    config.total_step, config.tinit, config.tfinal = total_steps, warmup, settled


def _resolved(
    peft_model: Any, entry: Entry[AdapterFacts], knobs: dict[str, Any], total_steps: int | None, adapter: str
) -> dict[str, int]:
    """Return the rank and number of steps of preheating where the recipe leaves them to the run."""
    from modicum.adapters.layers import lora_layers

    stage, _ = _gathering(entry, knobs)
    rank = max(layer.r[adapter] for layer in lora_layers(peft_model, adapter).values())
    return {"preheat_rank": stage.rank_for(rank), "preheat_steps": stage.steps_for(total_steps)}


def _preheat(
    peft_model: Any,
    entry: Entry[AdapterFacts],
    knobs: dict[str, Any],
    started: Started,
    batches: Callable[[], Iterable[Batch]],
    adapter: str,
    options: dict[str, Any],
) -> Pairs:
    from modicum.adapters.layers import factors_of, lora_layers
    from modicum.adapters.preheat import get_hrp_state_dict, initialize_lora_hrp_weights

    stage, knobs = _gathering(entry, knobs)
    layers = lora_layers(peft_model, adapter)
    # Ranks that are shared out anew may need any of the directions; else the adapter's own are enough.
    keep = None if stage.rank_redistribution != "none" else max(layer.r[adapter] for layer in layers.values())
    state = get_hrp_state_dict(
        peft_model, _cycle(batches, peft_model.device), config=stage, keep=keep, adapter=adapter, **options
    )
    left = initialize_lora_hrp_weights(
        peft_model,
        state,
        **{**knobs, **entry.facts.fixed},
        train_factors=stage.train_factors,
        rank_redistribution=stage.rank_redistribution,
        seed=options["seed"],
        adapter=adapter,
    )
    started.spectra = {key.removesuffix(".S"): state[key].cpu() for key in state if key.endswith(".S")}
    if clipped := sum(len(state[key]) < stage.preheat_rank for key in state if key.endswith(".S")):
        started.notes.append(
            f"{entry.name}: preheating rank {stage.preheat_rank} was clipped to the short side of {clipped} modules."
        )
    if left:
        started.notes.append(f"{entry.name} left {len(left)} modules at their default start: {', '.join(left)}.")
    layers = lora_layers(peft_model, adapter)
    return {
        name: tuple(factor.detach().clone() for factor in factors_of(layer, adapter))  # type: ignore[misc]
        for name, layer in layers.items()
    }


def _compute(
    peft_model: Any,
    entry: Entry[AdapterFacts],
    knobs: dict[str, Any],
    batches: Callable[[], Iterable[Batch]],
    loss: Loss | None,
    seed: int,
    adapter: str,
) -> Pairs:
    import inspect

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
        if "rng" in takes:
            supplied["rng"] = generator(seed, entry.name, name)
        try:
            factors[name] = entry.function(*(data[key] for key in wanted), **supplied, **knobs)
        except ModicumError as error:
            raise type(error)(f"{name}: {error}") from None
    return factors


def _apply(peft_model: Any, entry: Entry[AdapterFacts], factors: Pairs, started: Started, adapter: str) -> None:
    import torch

    from modicum.adapters.calibrate import base_weight
    from modicum.adapters.core import train_core
    from modicum.adapters.layers import factors_of, lora_layers, store_factors
    from modicum.adapters.ranks import change_ranks

    change_ranks(peft_model, {name: len(A) for name, (A, _) in factors.items()}, adapter=adapter)
    layers = lora_layers(peft_model, adapter)
    for name, values in factors.items():
        layer = layers[name]
        store_factors(layer, adapter, values, name)
        if entry.facts.shifts_base:
            # What left the base is what the layer computes, in the dtype that it stores.
            A, B = (factor.detach().clone() for factor in factors_of(layer, adapter))
            weight = base_weight(layer, name)
            with torch.no_grad():
                weight.copy_(weight.float() - layer.scaling[adapter] * (B.float() @ A.float()))
            started.initial[name] = (A.cpu(), B.cpu())
    started.start = {name: (A.cpu(), B.cpu()) for name, (A, B) in factors.items()}
    if entry.facts.core:
        started.origin["core"] = True
        train_core(peft_model, {name: B for name, (_, B) in factors.items()}, adapter=adapter)
    else:
        _freeze(peft_model, entry, adapter)
    if started.initial:
        started.notes.append(
            f"{entry.name} shifts the base weights: checkpoints of this run belong to the shifted base, the finished "
            "adapter to the original one, at twice the rank."
        )
    peft_model.peft_config[adapter].init_lora_weights = True


def _freeze(peft_model: Any, entry: Entry[AdapterFacts], adapter: str) -> None:
    """Freeze the factors that the method does not train."""
    frozen = entry.facts.frozen
    if not frozen:
        return
    from modicum.adapters.layers import factors_of, lora_layers

    for layer in lora_layers(peft_model, adapter).values():
        for side, factor in zip("AB", factors_of(layer, adapter)):
            if side in frozen:
                factor.requires_grad_(False)


def _gathering(entry: Entry[AdapterFacts], knobs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split the knobs into those of collecting the data, as their dataclass, and those of the function."""
    gather = entry.facts.gather
    if gather is None:
        return None, knobs
    names = {item.name for item in fields(gather)}
    stage = gather(**{key: value for key, value in knobs.items() if key in names})
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
