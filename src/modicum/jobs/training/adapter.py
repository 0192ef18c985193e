"""The one seam between adapter initialisations and PEFT: start an adapter, and finish it.

::

    model = get_peft_model(base, peft_config("hrp", {}, rank=8, lora_alpha=16, target_modules="all-linear"))
    started = initialize(model, "hrp", {}, batches=lambda: loader, lr=2e-4)
    ...  # train with anything
    model.save_pretrained(folder)
    started.finish(folder)

What comes out is always a standard LoRA adapter for the original base whose configuration says
``init_lora_weights: true``; where it came from stands in ``adapter_init.json`` beside it. The seam reads a method's
facts (:class:`modicum.facts.AdapterFacts`) and knows none by its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.durable import write_atomic
from modicum.errors import UnsupportedError
from modicum.facts import AdapterFacts
from modicum.jobs.training.adapter_files import (
    GEOMETRY,
    ORIGIN,
    by_name,
    cached_start,
    digest,
    factors_in,
    remove_shift,
    rewrite,
    write_start,
)
from modicum.jobs.training.adapter_geometry import geometry
from modicum.jobs.training.adapter_start import apply_start, clip_ranks, freeze, from_data, from_preheating, resolved
from modicum.layout import natural
from modicum.registry import adapter_init

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from modicum.adapters.preheat import Batch, Loss, MakeOptimizer
    from modicum.jobs.training.adapter_files import Pairs
    from modicum.jobs.training.adapter_geometry import Change


@dataclass
class Started:
    """The result of an initialisation, to be finished when the trained adapter has been saved.

    Attributes:
        origin: Name and knobs of the initialisation, for the record.
        facts: Facts of the initialisation.
        initial: The factors that left the base, by module; empty when the base is as it was.
        start: The factors that training started from, by module, where they are known.
        spectra: Singular values of what preheating learned, by module.
        notes: What the user should know.
        consumed: Micro-batches that the main run should not see again (``reuse_data: continue``).
    """

    origin: dict[str, Any]
    facts: AdapterFacts
    initial: Pairs = field(default_factory=dict)
    start: Pairs = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    consumed: int = 0

    @cached_property
    def digest(self) -> Tensor:
        """The hash of the factors that training started from; of nothing where PEFT drew them."""
        return digest(by_name(self.start))

    def prepare(self, peft_model: Any, *, adapter: str = "default") -> None:
        """Make the trained parts plain weights again; call it before the model is saved."""
        from modicum.adapters.core import fold

        if self.facts.before_save is not None:
            self.facts.before_save(peft_model.peft_config[adapter])
        if self.facts.core:
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
            # In an order of its own: a run that went on has the factors as its file lists them.
            start = {name: self.start[name] for name in sorted(self.start, key=natural) if name in saved}
            found = {"name": self.origin["name"], **geometry(start, saved, self.spectra, change=change)}
            write_atomic(folder / GEOMETRY, json.dumps(found) + "\n")
        if self.initial:
            remove_shift(folder, self.initial)
        if self.facts.plain is not None:
            rewrite(folder, self.facts.plain)
        write_atomic(folder / ORIGIN, json.dumps(self.origin, indent=2) + "\n")


def peft_config(name: str, knobs: Mapping[str, Any], *, rank: int, **fields: Any) -> Any:
    """Return the configuration of PEFT that a method needs.

    Args:
        name: A registered adapter initialisation.
        knobs: Its knobs.
        rank: Rank of the adapter.
        **fields: Further fields of ``peft.LoraConfig``; they override what the method asks for.

    Raises:
        UnsupportedError: The machine lacks something that the method needs.

    Example:
        >>> peft_config("rslora", {}, rank=4, lora_alpha=8).use_rslora
        True
    """
    from peft import LoraConfig

    entry = adapter_init[name]
    if entry.facts.requires is not None:
        entry.facts.requires()
    config = entry.facts.config
    if callable(config):
        return config(entry.knobs(knobs), rank=rank, **fields)
    return LoraConfig(r=rank, **dict(config) | fields)


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
    facts, knobs = entry.facts, entry.knobs(knobs)
    clipped = clip_ranks(peft_model, name, facts, adapter)
    if facts.preheated is not None:
        knobs |= resolved(peft_model, entry, knobs, total_steps, adapter)
    started = Started({"name": name, **knobs, "seed": seed}, facts, notes=clipped)
    if knobs.get("reuse_data") == "continue":
        started.consumed = knobs["preheat_steps"] * accumulation
    if facts.schedule is not None:
        facts.schedule(peft_model.peft_config[adapter], knobs, total_steps=total_steps)
    if facts.stock:
        freeze(peft_model, facts.frozen, adapter)
        return started
    known = cached_start(cache, note=started.notes.append)
    if known is not None:
        factors, started.spectra = known
    else:
        if facts.preheated is not None:
            found = from_preheating(
                peft_model,
                entry,
                knobs,
                batches=batches,
                lr=lr,
                seed=seed,
                accumulation=accumulation,
                loss=loss,
                optimizer=optimizer,
                adapter=adapter,
            )
        else:
            found = from_data(peft_model, entry, knobs, batches=batches, loss=loss, seed=seed, adapter=adapter)
        factors, started.spectra = found.factors, found.spectra
        started.notes += found.notes
        if cache is not None:
            write_start(cache, factors, started.spectra)
    started.initial = apply_start(peft_model, facts, factors, adapter)
    started.start = {name: (A.cpu(), B.cpu()) for name, (A, B) in factors.items()}
    if facts.core:
        started.origin["core"] = True
    if facts.shifts_base:
        started.notes.append(
            f"{name} shifts the base weights: checkpoints of this run belong to the shifted base, the finished "
            "adapter to the original one, at twice the rank."
        )
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
    entry = adapter_init[name]
    if entry.facts.optimizer is None:
        return None
    made: torch.optim.Optimizer = entry.facts.optimizer(
        peft_model, entry.knobs(knobs), lr=lr, weight_decay=weight_decay
    )
    return made


def after_backward(peft_model: Any, name: str, step: int) -> None:
    """Let a method (AdaLoRA) see the gradients of a step; call it before they are cleared.

    Args:
        peft_model: The model in training.
        name: A registered adapter initialisation; nothing happens for those that need none of this.
        step: Optimiser steps done before.
    """
    see = adapter_init[name].facts.after_backward
    if see is not None:
        see(peft_model, step)


def step_callback(name: str, *, resumes: bool = False) -> Any:
    """Return the callback of ``transformers.Trainer`` that a method needs, or ``None``.

    Args:
        name: A registered adapter initialisation.
        resumes: Somebody keeps with each checkpoint what the method remembers (``memory`` and ``recall`` of its facts).
    """
    if adapter_init[name].facts.after_backward is None:
        return None
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        """See :func:`after_backward`."""

        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step and not resumes:
                raise UnsupportedError(
                    f"{name} cannot go on from a checkpoint, which does not hold what it remembers of the gradients. "
                    "Delete the run's checkpoints and start afresh."
                )

        def on_optimizer_step(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
            after_backward(model, name, state.global_step)

    return StepCallback()
