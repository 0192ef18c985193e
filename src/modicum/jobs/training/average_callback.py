"""Averages of the weights while any Trainer trains: a callback that updates and evaluates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import TrainerCallback

from modicum.jobs.training.averages import Ring, evaluate, lora_factors
from modicum.jobs.training.parts.average import AverageSection, check_engine
from modicum.weights.moving import MovingAverage


class AverageCallback(TrainerCallback):
    """Keep averages of the trained weights, and evaluate them with every evaluation.

    Args:
        section: As ``average`` in a train recipe, such as ``{"moving": {"decay": 0.999}}``.
        seed: For rules that draw random numbers.
        loss: Of a model and a batch, for evaluations; the model's own when not given.
        tell: Called with the step and the losses of an evaluation; they join the Trainer's metrics when not given.

    Attributes:
        moving: The moving average, from the first step on.
        ring: The snapshots, likewise.

    Raises:
        RecipeError: A key of ``section`` is wrong.

    Example:
        >>> callback = AverageCallback({"moving": {"decay": 0.99}})  # Trainer(…, callbacks=[callback])
        >>> callback.moving is None  # trainer.train() makes it; then `with callback.moving.in_place(): …`
        True
    """

    def __init__(
        self,
        section: AverageSection | Mapping[str, Any],
        *,
        seed: int = 0,
        loss: Callable[[Any, Mapping[str, Any]], Tensor] | None = None,
        tell: Callable[[Any, dict[str, float]], None] | None = None,
    ) -> None:
        self.section, self.seed, self.tell = AverageSection.of(section), seed, tell
        self.loss = loss or (lambda model, batch: model(**batch).loss)
        self.moving: MovingAverage | None = None
        self.ring: Ring | None = None
        self.before: Mapping[str, Mapping[str, Tensor]] = {}

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        """Update the averages whose turn it is."""
        self.make(model)
        moving, ring, step = self.section.moving, self.section.snapshots, state.global_step
        if self.moving is not None and moving is not None and step > moving.start and step % moving.every == 0:
            self.moving.update()
        if self.ring is not None and ring is not None and step % ring.every == 0:
            self.ring.snapshots.take(step)

    def on_evaluate(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
        """Evaluate the averages on the data of the Trainer's own evaluation."""
        if (batches := given.get("eval_dataloader")) is None:
            return
        losses = {}
        for name, average in self.averages().items():
            with average.in_place():
                losses[f"eval_loss_{name}"] = evaluate(given["model"], batches, self.loss, args.device)
        if losses and self.tell is not None:
            self.tell(state, losses)
        elif given.get("metrics") is not None:
            given["metrics"].update(losses)

    def make(self, model: Any) -> None:
        """Make the averages, of the model that the Trainer has prepared; once.

        Raises:
            UnsupportedError: The engine keeps the weights to itself.
        """
        factors = None
        if self.section.moving is not None and self.moving is None:
            _check_launched(factors := lora_factors(model))
            self.moving = MovingAverage(model, decay=self.section.moving.decay, factors=factors)
            if state := self.before.get("moving"):
                self.moving.load_state_dict(state)
        if (ring := self.section.snapshots) is not None and self.ring is None:
            _check_launched(factors := lora_factors(model) if factors is None else factors)
            method: Any = ring.method
            self.ring = Ring(
                model, factors, keep=ring.keep, method=method.name, knobs=method.knobs | {"seed": self.seed}
            )
            if state := self.before.get("ring"):
                self.ring.load_state_dict(state)

    def averages(self) -> dict[str, Any]:
        """Return the averages that have seen enough, by name."""
        found: dict[str, Any] = {}
        if self.moving is not None and self.moving.updates:
            found["moving_average"] = self.moving
        if self.ring is not None and self.ring.ready:
            found["snapshots"] = self.ring
        return found

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the averages, of each process its own shards."""
        parts = {"moving": self.moving, "ring": self.ring}
        return {name: dict(part.state_dict()) for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`state_dict` returned, before the first step."""
        self.before = state


def _check_launched(factors: Mapping[str, Any]) -> None:
    """Refuse what ``accelerate launch`` brought along, which no argument of the Trainer tells."""
    state: Any = AcceleratorState() if AcceleratorState._shared_state else None
    if state is None:
        return
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    version = int(getattr(state.fsdp_plugin, "fsdp_version", 2)) if kind == "FSDP" else None
    check_engine(deepspeed=kind == "DEEPSPEED", fsdp=version, adapter=bool(factors))
