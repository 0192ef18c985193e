"""The one seam of objectives: from a name and its knobs to collator, callback, hooks and loss of a Trainer.

For a Trainer of one's own, TRL's included, a line after it is built is all::

    use_objective(trainer, "meap", ratio=0.15)

It wraps the trainer's collator, adds the callback that tells the collator the epoch and when an evaluation runs, and
for objectives that want it gathers the labelled positions before the language-model head. Where the mask token has to
be made before an adapter is put around the model, call :func:`complete_knobs` first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from modicum.errors import UnsupportedError
from modicum.jobs.training.partial_passes import base_of
from modicum.objectives.batch import Batch
from modicum.objectives.collator import ObjectiveCollator, check_mask_id, special_ids
from modicum.objectives.mask_token import check_causal, drop_mask_token, ensure_mask_token, suppress_mask_token
from modicum.philox import row_keys
from modicum.registry import objective
from modicum.types import IGNORED

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from modicum.jobs.training.parts import Build

BLOCKS = (
    "self_attn",
    "attn",
    "attention",
    "mlp",
    "feed_forward",
)  # usual names of modules that add to the residual stream


def complete_knobs(name: str, knobs: Mapping[str, Any], *, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Return the knobs of objective ``name``, completed from the model and the tokenizer.

    That is the mask token (found, or added to both), the protected ids and the size of the vocabulary. Call it before
    a LoRA adapter is put around the model; :func:`lora_options` then makes the mask's row trainable.

    Raises:
        ModicumError: A knob is wrong, the mask id cannot be used, or the model is not a causal decoder.
    """
    entry = objective[name]
    completed = entry.knobs(knobs)
    wanted = entry.parameters[1]
    if entry.facts.acts_on != "input_ids":
        return completed
    base = base_of(model)
    check_causal(base)
    if "vocab_size" in wanted and completed["vocab_size"] is None:
        completed["vocab_size"] = min(len(tokenizer), base.get_input_embeddings().weight.shape[0])
    if _writes_mask(completed):
        if completed["mask_token_id"] is None:
            completed["mask_token_id"] = ensure_mask_token(base, tokenizer)
        rows = base.get_input_embeddings().weight.shape[0]
        check_mask_id(completed["mask_token_id"], tokenizer, vocab_size=rows)
    if "protect_ids" in wanted and completed["protect_ids"] is None:
        protected = () if completed.get("scope") == "reference" else special_ids(tokenizer)
        completed["protect_ids"] = tuple(sorted({*protected} - {completed.get("mask_token_id")}))
    if completed.get("layout") == "concat" and completed.get("concat_attend") == "isolated":
        _require_sdpa(base)
    return completed


def build_collator(
    collator: Callable[..., Batch],
    name: str,
    knobs: Mapping[str, Any],
    *,
    seed: int,
    tokenizer: Any,
    model: Any,
    gather_labels: bool = False,
) -> ObjectiveCollator:
    """Wrap ``collator`` so that its training batches carry the objective; see :class:`ObjectiveCollator`."""
    entry = objective[name]
    completed = complete_knobs(name, knobs, tokenizer=tokenizer, model=model)
    return ObjectiveCollator(
        collator,
        # Objectives of the model's insides leave the batch alone: hooks on the model apply them.
        partial(_apply, name, completed if entry.facts.acts_on == "input_ids" else None),
        method=name,
        seed=seed,
        redraw=completed.get("redraw_each_epoch", True),
        gather_labels=gather_labels,
    )


def use_objective(trainer: Trainer | Build, name: str, *, seed: int | None = None, **knobs: Any) -> ObjectiveCollator:
    """Give a Trainer an objective: collator, callback, and hooks or a loss where the objective has them.

    Args:
        trainer: Any ``transformers.Trainer``, or TRL's ``SFTTrainer``, before training; or the
            arguments of one to come.
        name: Of the registered objective.
        seed: Of the draws; the trainer's own when not given.
        knobs: Of the objective.

    Returns:
        The collator that the trainer now has.
    """
    seed = trainer.args.seed if seed is None else seed
    entry = objective[name]
    if entry.facts.acts_on == "answers":
        raise UnsupportedError(
            f"{name} judges answers and needs rows with candidates. Use job: train with data.path: task:NAME, or "
            "modicum.jobs.training.answers.use_answers before a PartsTrainer is made."
        )
    if entry.facts.acts_on == "pairs":
        raise UnsupportedError(f"{name} compares two answers to a prompt. Use job: train with rows of preferences.")
    gather = entry.facts.loss_head and _takes_a_loss(trainer)
    collator = build_collator(
        trainer.data_collator,
        name,
        knobs,
        seed=seed,
        tokenizer=trainer.processing_class,
        model=trainer.model,
        gather_labels=gather,
    )
    trainer.data_collator = collator
    moment = Moment(process=trainer.args.process_index)
    trainer.add_callback(objective_callback(collator, moment))
    collator.eval()  # until training begins
    if gather:
        trainer.compute_loss_func = LabelHead(trainer.model)
    if entry.facts.acts_on != "input_ids":
        hook_model(base_of(trainer.model), name, entry.knobs(knobs), seed=seed, moment=moment)
    return collator


def lora_options(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field of ``peft.LoraConfig`` that makes the mask token's row trainable; empty without a mask token."""
    mask = knobs.get("mask_token_id")
    return {} if mask is None else {"trainable_token_indices": [mask]}


def finish_model(model: Any, *, mask_token_id: int, rows: int) -> None:
    """Take the mask token out of the trained model: no row of its own, no mask in generation.

    A LoRA adapter loses its trainable token row, so that it fits the base model again.

    Args:
        model: The trained model, possibly wrapped by PEFT.
        mask_token_id: The mask token.
        rows: Embedding rows before training.
    """
    base = base_of(model)
    _remove_token_adapters(model, base)
    drop_mask_token(base, mask_token_id=mask_token_id, rows=rows)
    if mask_token_id < rows and getattr(base, "generation_config", None) is not None:
        suppress_mask_token(base.generation_config, mask_token_id=mask_token_id)


@dataclass
class Moment:
    """Which micro-batch is being learned: the name of draws inside the model.

    Args:
        step: Optimiser steps that are done.
        micro_batch: Its number within the step.
        process: Number of the process, which has rows of its own.
    """

    step: int = 0
    micro_batch: int = 0
    process: int = 0


def objective_callback(collator: ObjectiveCollator, moment: Moment) -> TrainerCallback:
    """Return the callback that tells ``collator`` and ``moment`` of epoch, step and micro-batch, and of evaluations."""
    from transformers import TrainerCallback

    class ObjectiveCallback(TrainerCallback):
        """The trainer uses one collator for everything and tells it nothing; this does."""

        def on_init_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            collator.eval()

        def on_train_begin(self, args: Any, _state: Any, _control: Any, **_: Any) -> None:
            collator.train(not args.eval_on_start)

        def on_epoch_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
            collator.train()
            collator.start_epoch(
                # A resumed epoch is the whole part; a finished one may fall short of it by rounding.
                int((state.epoch or 0) + 1e-6),
                step=state.global_step,
                total_steps=state.max_steps,
                accumulation_steps=args.gradient_accumulation_steps,
            )

        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            moment.step, moment.micro_batch = state.global_step, 0

        def on_substep_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            moment.micro_batch += 1

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            if control.should_evaluate:
                collator.eval()

        def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            if control.should_evaluate:
                collator.eval()

        def on_evaluate(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            collator.train(not control.should_training_stop and state.global_step < state.max_steps)

        def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
            collator.eval()

    return ObjectiveCallback()


@dataclass
class LabelHead:
    """Compute logits only where there is a label, and the loss of these logits.

    A masked copy has labels on about a tenth of its answer; the head, which in a small model is most of the memory,
    need not see the rest. The collator names the positions (``gather_labels=True``), a hook takes them off the
    model's inputs, and a second one gathers the hidden states before the head. Batches without positions pass as
    always.

    Args:
        model: The causal language model, or PEFT's wrapper of it.
    """

    model: Any
    _positions: Tensor | None = field(default=None, repr=False)
    _weights: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # PEFT calls the forward of the model it wraps, not the model: only the outer one's hooks run.
        self._handles = [
            self.model.register_forward_pre_hook(self._take, with_kwargs=True),
            base_of(self.model).get_output_embeddings().register_forward_pre_hook(self._gather),
        ]

    def _take(self, _: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._positions, self._weights = kwargs.pop("label_positions", None), kwargs.pop("label_weights", None)
        return args, kwargs

    def _gather(self, _: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._positions is None:
            return None
        return (args[0].flatten(0, 1).index_select(0, self._positions)[None],)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the weighted sum of the token losses over the tokens of the whole step: a ``compute_loss_func``."""
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if self._positions is None or self._weights is None:
            targets, logits = labels[:, 1:].flatten(), logits[:, :-1].flatten(0, 1)
            weights = (targets != IGNORED).float()
        else:
            targets, logits, weights = labels.flatten()[self._positions + 1], logits[0], self._weights
        losses = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
        return (losses * weights).sum() / (weights.sum() if num_items_in_batch is None else num_items_in_batch)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def hook_model(
    model: Any, name: str, knobs: Mapping[str, Any], *, seed: int, moment: Moment | None = None
) -> list[Any]:
    """Apply an objective of embeddings or hidden states inside ``model`` while it trains; return the hooks' handles.

    A draw is named ``(seed, objective, module, step, micro-batch, process, row)``. It does not count how often a module
    is called: gradient checkpointing calls a module again for the backward pass and needs the same draw, and a resumed
    run goes on where the interrupted one ended.

    Args:
        model: The model itself, without a wrapper.
        name: Of the objective.
        knobs: Of the objective, complete.
        seed: Of the draws.
        moment: Kept up to date by :func:`objective_callback`. Without one, every training forward of the embedding is
            a step; this is for a loop of one's own.
    """
    entry = objective[name]
    key = entry.facts.acts_on
    embedding = model.get_input_embeddings()
    modules = {"": embedding}
    if key == "hidden_states":
        modules = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in BLOCKS}
        if not modules:
            raise UnsupportedError(
                f"{type(model).__name__} has no blocks named {', '.join(BLOCKS)}: cannot use {name}."
            )
    now = moment or Moment()

    def advance(module: Any, _: Any) -> None:
        now.step += module.training

    def change(place: str, module: Any, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        batch = f"{now.step}/{now.micro_batch}/{now.process}"
        rows = [f"{batch}/{row}" for row in range(hidden.shape[0])]
        changed = entry.function({key: hidden}, **knobs, rng=row_keys(rows, seed=seed, method=f"{name}/{place}"))[key]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    # The embedding lies outside whatever is computed again.
    handles = [embedding.register_forward_pre_hook(advance)] if moment is None else []
    return handles + [module.register_forward_hook(partial(change, place)) for place, module in modules.items()]


def _apply(
    name: str, knobs: Mapping[str, Any] | None, batch: Batch, step: int, total_steps: int, *, rng: Tensor
) -> Batch:
    """Call the objective with the data it takes; a module-level function, so that loader workers can be spawned."""
    if knobs is None:
        return batch
    entry = objective[name]
    progress = {"step": step, "total_steps": total_steps}
    taken = {key: value for key, value in progress.items() if key in entry.parameters[0]}
    changed: Batch = entry.function(batch, **taken, **knobs, rng=rng)
    return changed


def _writes_mask(knobs: Mapping[str, Any]) -> bool:
    uses = knobs.get("mask_share", 1) and knobs.get("replacement", "mask") == "mask"
    return "mask_token_id" in knobs and bool(uses)


def _require_sdpa(model: Any) -> None:
    used = getattr(model.config, "_attn_implementation", None)
    if used != "sdpa":
        raise UnsupportedError(
            f"concat_attend 'isolated' needs attention with a free mask: the model uses {used!r}, expected 'sdpa'. "
            "Load it with attn_implementation='sdpa', or use layout 'separate', which gives the same loss."
        )


def _takes_a_loss(trainer: Trainer | Build) -> bool:
    """Whether ``compute_loss_func`` is called on logits. TRL has a loss of its own, which gathers positions itself."""
    from transformers import Trainer

    from modicum.jobs.training.parts import Build
    from modicum.jobs.training.trainer import PartsTrainer

    return isinstance(trainer, Build | PartsTrainer) or type(trainer).compute_loss is Trainer.compute_loss


def _remove_token_adapters(model: Any, base: Any) -> None:
    if base is model:
        return
    from peft.utils.other import TrainableTokensWrapper

    for name, module in list(base.named_modules()):
        if isinstance(module, TrainableTokensWrapper):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, module.token_adapter.get_base_layer())
    for config in model.peft_config.values():
        if getattr(config, "trainable_token_indices", None) is not None:
            config.trainable_token_indices = None
