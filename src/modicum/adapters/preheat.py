"""HRP on a PEFT model: preheat an adapter of higher rank, decompose it, start the real one from it.

The quick way, in anyone's loop::

    state = get_hrp_state_dict(model, batches, rank=8, lr=2e-4)
    initialize_lora_hrp_weights(model, state)

With another trainer, ``preheating`` gives the temporary adapter to train as one likes. The state holds U, S and V of
every module at the preheating rank, so it can be saved (it is a flat dictionary of tensors) and the final rank be
chosen later. Base weights, modes, flags and random state are left as they were, and no trace of the stage stays.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from modicum import processes
from modicum.adapters.hrp import (
    Deficient,
    InitFactor,
    Preheat,
    Redistribution,
    Scale,
    Tolerance,
    Trained,
    factor_svd,
    factors_from_svd,
    resolve_factor,
)
from modicum.adapters.layers import factors_of, lora_layers, other_layers, store, store_factors, whole
from modicum.adapters.ranks import change_ranks, redistribute
from modicum.errors import ModicumError
from modicum.knobs import guarded
from modicum.linalg import SVD
from modicum.random import generator
from modicum.types import Positive, PositiveInt

TEMPORARY = "_hrp"
STACK = 16  # modules that a device decomposes at once, which bounds the memory of the stage

State: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = Mapping[str, Any]
Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
MakeOptimizer: TypeAlias = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Stage:
    """The temporary adapter while it is being trained."""

    model: nn.Module
    adapter: str
    layers: Mapping[str, Any]

    def parameters(self) -> list[nn.Parameter]:
        """Return the factors that are trained."""
        pairs = (factors_of(layer, self.adapter) for layer in self.layers.values())
        return [factor for pair in pairs for factor in pair if factor.requires_grad]

    def state(self, *, keep: int | None = None) -> State:
        """Decompose the products that the factors have by now; see :func:`hrp_state`."""
        learned = {}
        for name, layer in self.layers.items():
            A, B = factors_of(layer, self.adapter)
            learned[name] = (whole(A, name), whole(B, name) * layer.scaling[self.adapter])
        return hrp_state(learned, keep=keep)


@guarded
@contextmanager
def preheating(
    peft_model: Any,
    *,
    rank: PositiveInt | None = None,
    config: Preheat = Preheat(),  # noqa: B008 - frozen
    seed: int = 0,
    adapter: str = "default",
) -> Iterator[Stage]:
    """Add the temporary adapter, active and trainable; on leaving, remove it and restore the model.

    Args:
        peft_model: A PEFT model whose ``adapter`` is plain LoRA.
        rank: Rank of the adapter to be started, which bounds the preheating rank from below; that of ``adapter``
            when not given.
        config: Knobs of the stage.
        seed: Names the random start of the temporary adapter.
        adapter: The adapter to be started.

    Raises:
        ModicumError: There is no such adapter, it is not plain LoRA, or the preheating rank is below its rank.
    """
    targets = lora_layers(peft_model, adapter)
    settings = copy.deepcopy(peft_model.peft_config[adapter])
    high = config.rank_for(rank or max(layer.r[adapter] for layer in targets.values()))
    clipped = {
        name: short for name, layer in targets.items() if (short := min(layer.in_features, layer.out_features)) < high
    }
    settings.r = high
    settings.rank_pattern = {re.escape(name): short for name, short in clipped.items()}
    settings.init_lora_weights = True
    settings.bias = "none"
    settings.inference_mode = False
    if settings.modules_to_save:
        # Nothing is saved with the temporary adapter, so nothing is to be tied to it.
        settings.ensure_weight_tying, settings.modules_to_tie = False, None
    settings.modules_to_save = settings.trainable_token_indices = None
    with _restored(peft_model):
        peft_model.add_adapter(TEMPORARY, settings)
        peft_model.set_adapter(TEMPORARY)
        # PEFT leaves the main adapter's biases trainable, and their gradients would wait for the first step of the run.
        peft_model.requires_grad_(False)
        layers = lora_layers(peft_model, TEMPORARY)
        for name, layer in layers.items():
            _start(layer, name, adapter=adapter, config=config, seed=seed)
        yield Stage(peft_model, TEMPORARY, layers)


@guarded
def get_hrp_state_dict(
    peft_model: Any,
    batches: Iterable[Batch],
    *,
    lr: Positive,
    rank: PositiveInt | None = None,
    config: Preheat = Preheat(),  # noqa: B008 - frozen
    total_steps: PositiveInt | None = None,
    accumulation: PositiveInt = 1,
    loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None,
    keep: PositiveInt | None = None,
    seed: int = 0,
    adapter: str = "default",
) -> State:
    """Preheat with a plain loop and return U, S and V of every module.

    Several processes must each bring their own share of the data; gradients are averaged over them.

    Args:
        peft_model: A PEFT model whose ``adapter`` is plain LoRA.
        batches: Micro-batches: mappings of tensors that the model takes. Endless, or long enough for the stage.
        lr: The main run's learning rate, unless ``config`` sets one. It warms up over min(10, steps/5) steps.
        rank: See :func:`preheating`.
        config: Knobs of the stage.
        total_steps: Length of the main run, from which the default number of steps follows.
        accumulation: Micro-batches to a step.
        loss: ``(model, batch) -> scalar``; the model's own when not given.
        optimizer: ``(parameters, lr) -> optimizer`` of the main run; AdamW without weight decay when not given.
        keep: Leading directions to keep, where the final rank is known already; ``None`` for all.
        seed: Names the random start.
        adapter: The adapter to be started.

    Raises:
        ModicumError: The data end too early, the loss is not finite, or nothing was learned.
    """
    steps = config.steps_for(total_steps)
    with preheating(peft_model, rank=rank, config=config, seed=seed, adapter=adapter) as stage:
        parameters = stage.parameters()
        engine = _optimizer(config, optimizer)(parameters, config.preheat_lr or lr)
        warmup = max(1, min(10, steps // 5))
        schedule = torch.optim.lr_scheduler.LambdaLR(engine, lambda step: min(1.0, (step + 1) / warmup))
        peft_model.train()
        source, sum_of_losses = iter(batches), torch.zeros((), device=parameters[0].device)
        for step in range(steps):
            micro = list(itertools.islice(source, accumulation))
            if len(micro) < accumulation:
                raise ModicumError(
                    f"The data end after {step} of {steps} preheating steps. Give more, cycle them, or lower "
                    "preheat_steps."
                )
            for batch in micro:
                value = (loss or own_loss)(peft_model, batch) / accumulation
                value.backward()  # type: ignore[no-untyped-call]
                sum_of_losses += value.detach()
            # A DTensor's gradient is reduced by FSDP itself.
            processes.average([p.grad for p in parameters if p.grad is not None and not hasattr(p.grad, "full_tensor")])
            engine.step()
            schedule.step()
            engine.zero_grad(set_to_none=True)
        if not torch.isfinite(sum_of_losses):  # read once: a look at every step would wait for the device
            raise ModicumError("The preheating loss became NaN or infinite. Lower preheat_lr, or check the data.")
        return stage.state(keep=keep)


def hrp_state(learned: Mapping[str, tuple[Tensor, Tensor]], *, keep: int | None = None) -> State:
    """Decompose preheated factors: on a device modules of one shape together, on a processor one to a thread.

    Args:
        learned: A (R, in) and B (out, R) by module, the scaling multiplied into one of them.
        keep: Leading directions to keep, the highest rank that the state can start; ``None`` for all.

    Returns:
        ``NAME.U`` (out, keep), ``NAME.S`` (R,) and ``NAME.V`` (in, keep) by module, float32.

    Raises:
        ModicumError: A factor is not finite, or no module has learned anything.
    """
    shapes: dict[tuple[Any, ...], list[str]] = {}
    for name, (A, B) in learned.items():
        shapes.setdefault((A.shape, B.shape, A.device), []).append(name)
    stacks = []
    for (*_, device), names in shapes.items():
        size = 1 if device.type == "cpu" else STACK
        stacks += [names[start : start + size] for start in range(0, len(names), size)]

    @torch.no_grad()
    def decompose(names: list[str]) -> State:
        A, B = (_stacked([learned[name][side] for name in names]).double() for side in (0, 1))
        finite = (A.sum((1, 2)) + B.sum((1, 2))).isfinite()  # float64 sums of float32 numbers do not overflow
        if not finite.all():
            bad = names[int(finite.int().argmin())]
            raise ModicumError(f"{bad}: a preheated factor is NaN or infinite. Lower preheat_lr.")
        parts = factor_svd(A, B, rank=keep)
        return {
            f"{name}.{key}": part[index].float().contiguous()
            for index, name in enumerate(names)
            for key, part in zip("USV", parts)
        }

    state = {key: part for made in _side_by_side(decompose, stacks) for key, part in made.items()}
    if not any(state[f"{name}.S"][0] > 0 for name in learned):
        raise ModicumError(
            "Every preheated product is zero: nothing was trained. Check that the temporary adapter is active and has "
            "gradients."
        )
    return {f"{name}.{key}": state[f"{name}.{key}"] for name in learned for key in "USV"}


def _stacked(parts: list[Tensor]) -> Tensor:
    """Stack without a copy where there is one."""
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _side_by_side(work: Callable[[list[str]], State], stacks: list[list[str]]) -> list[State]:
    """Give each thread a matrix of its own: several threads on one small matrix mostly wait for each other."""
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(work, stacks))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, stacks))
    finally:
        torch.set_num_threads(threads)


@guarded
@torch.no_grad()
def initialize_lora_hrp_weights(
    peft_model: Any,
    state: Mapping[str, Tensor],
    *,
    init_factor: InitFactor = "A",
    scale: Scale = "match",
    rtol: Tolerance = 1e-6,
    on_deficient: Deficient = "complete",
    train_factors: Trained = "both",
    rank_redistribution: Redistribution = "none",
    seed: int = 0,
    adapter: str = "default",
) -> list[str]:
    """Start an adapter of a PEFT model from preheated directions.

    Parameters stay the same objects (unless ranks are redistributed), and the saved configuration says
    ``init_lora_weights: true``, so the adapter loads in any PEFT.

    Args:
        peft_model: The model; its adapter's rank may be any up to the preheating rank.
        state: What :func:`get_hrp_state_dict` returned.
        init_factor: See :func:`modicum.adapters.hrp_factors`, as for the next four.
        scale: Length of the vectors.
        rtol: What counts as a missing direction.
        on_deficient: What to do about one.
        train_factors: Which factors the preheating trained.
        rank_redistribution: ``eva`` gives each module a rank by its share of the spectrum.
        seed: Names the random directions that complete a deficient module.
        adapter: The adapter to start.

    Returns:
        Modules left at their default start, because they learned nothing, are not in ``state``, or are embeddings or
        convolutions; also a warning.

    Raises:
        ModicumError: The state fits no module, or its rank is below the adapter's.
    """
    layers = lora_layers(peft_model, adapter)
    known = {name: layer for name, layer in layers.items() if f"{name}.S" in state and state[f"{name}.S"][0] > 0}
    if not known:
        raise ModicumError("The state fits no LoRA layer of this model. Was it made on another one?")
    factor = resolve_factor(init_factor, train_factors)
    if rank_redistribution == "eva":
        spectra = {name: state[f"{name}.S"] for name in known}
        ranks = redistribute(spectra, budget=sum(layer.r[adapter] for layer in known.values()))
        change_ranks(peft_model, ranks, adapter=adapter)
    for name, layer in known.items():
        svd = SVD(*(state[f"{name}.{key}"].double() for key in "USV"))
        rank, known_rank = layer.r[adapter], svd.U.shape[1]
        if rank > known_rank:
            raise ModicumError(
                f"{name}: rank is {rank}, but the state holds {known_rank} directions. Preheat at a higher rank, or "
                "keep more."
            )
        try:
            factors = factors_from_svd(
                svd._replace(S=svd.S / layer.scaling[adapter]),
                rank=rank,
                init_factor=factor,
                scale=scale,
                rtol=rtol,
                on_deficient=on_deficient,
                rng=generator(seed, "hrp", name, "complete"),
            )
        except ModicumError as error:
            raise ModicumError(f"{name}: {error}") from None
        store_factors(layer, adapter, factors, name)
    peft_model.peft_config[adapter].init_lora_weights = True
    left = sorted({*layers, *other_layers(peft_model, adapter)} - known.keys())
    if left:
        warnings.warn(f"HRP left {len(left)} modules at their default start: {', '.join(left)}", stacklevel=4)
    return left


def _start(layer: Any, name: str, *, adapter: str, config: Preheat, seed: int) -> None:
    """Give the temporary adapter its scaling, its named random numbers and its flags."""
    if config.keep_scaling:
        layer.scaling[TEMPORARY] = layer.scaling[adapter]
    A, B = factors_of(layer, TEMPORARY)
    random, zero = (B, A) if config.train_factors == "A" else (A, B)
    drawn = torch.rand(random.shape, generator=generator(seed, "hrp", name, "start"))
    store(random, (2 * drawn - 1) / math.sqrt(random.shape[1]), name)
    store(zero, torch.zeros(zero.shape), name)
    A.requires_grad_(config.train_factors != "B")
    B.requires_grad_(config.train_factors != "A")


@contextmanager
def _restored(peft_model: Any) -> Iterator[None]:
    """Put flags, modes and the active adapter back, and remove the temporary adapter, whatever happens inside."""
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    modes = [(module, module.training) for module in peft_model.modules()]
    active = peft_model.active_adapter
    try:
        # PEFT draws the new adapter's first values from the global generator.
        with torch.random.fork_rng():
            yield
    finally:
        peft_model.set_adapter(active)
        if TEMPORARY in peft_model.peft_config:
            peft_model.delete_adapter(TEMPORARY)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that the model computes itself from the batch's labels."""
    loss: Tensor | None = model(**batch).loss
    if loss is None:
        raise ModicumError("The model returned no loss: the batch holds no labels. Add them, or pass loss=.")
    return loss


def _optimizer(config: Preheat, given: MakeOptimizer | None) -> MakeOptimizer:
    if config.preheat_optimizer == "same" and given is not None:
        return given
    if config.preheat_optimizer == "sgd":
        return lambda parameters, lr: torch.optim.SGD(parameters, lr=lr)
    return lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
