"""Save on an interruption, and now and then without one, so that little is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modicum import processes
from modicum.jobs.training.parts import Build, Part
from modicum.registry import training_part

if TYPE_CHECKING:
    from modicum.jobs.training.recipe import TrainRecipe

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LONGEST, SHORTEST = 600.0, 60.0  # seconds between two saves: after the one always, before the other never
SHARE = 10  # between them, at each tenth of the run


@training_part("interruption", order=-30)
class Interruption(Part):
    """Save at the end of the step in which SIGINT or SIGTERM came, and about every ten minutes or tenth of the run.

    It comes first, since other parts look whether a step is going to be saved.
    """

    asked: int = 0
    build: Build

    def __init__(self, name: str, recipe: TrainRecipe, section: None = None) -> None:
        super().__init__(name, recipe, section)
        self.timed = not recipe.trainer.keys() & {"save_steps", "save_strategy"}

    def trainer(self, build: Build) -> None:
        """Add the callback."""
        from transformers import TrainerCallback

        part, self.build = self, build

        class InterruptionCallback(TrainerCallback):
            stopping = False

            def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
                self.last = time.monotonic()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                stop, due = part.agreed(part.asked > 0, part.due(time.monotonic() - self.last, state), args)
                self.stopping = stop
                if stop:
                    control.should_training_stop = control.should_save = True
                if due:
                    control.should_save = True

            def on_epoch_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
                if self.stopping and not float(state.epoch).is_integer():  # it goes on: its end is still to come
                    control.should_save = control.should_evaluate = control.should_log = False

            def on_save(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
                self.last = time.monotonic()

        build.add_callback(InterruptionCallback())

    def due(self, seconds: float, state: Any) -> bool:
        """Return whether to save after a step, the last save being so many seconds ago."""
        # A zeroth-order optimiser rounds its weights when it saves: the clock must not decide when.
        if not self.timed or self.build.own_step is not None:
            return False
        tenth = state.global_step % max(1, state.max_steps // SHARE) == 0
        return seconds >= (SHORTEST if tenth else LONGEST)

    def agreed(self, stop: bool, due: bool, args: Any) -> tuple[bool, bool]:
        """Return what any of the processes wants: all must save and stop at the same step."""
        if processes.world() == 1:
            return stop, due
        import torch

        wanted = processes.mean(torch.tensor([float(stop), float(due)], device=args.device), 1.0).tolist()
        return wanted[0] > 0, wanted[1] > 0

    @contextmanager
    def around(self) -> Iterator[None]:
        """Take the first signal as a wish, and end the run once the Trainer has saved and stopped."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python takes signals in its first thread alone
            return
        owner = os.getpid()

        def handle(number: int, _frame: Any) -> None:
            if os.getpid() != owner:
                return  # a worker that loads data: the first process stops it
            # A launcher answers Ctrl-C, which all processes get, by a SIGTERM to each.
            if self.asked and (processes.world() == 1 or number == self.asked):
                raise KeyboardInterrupt
            if self.asked:
                return
            self.asked = number
            self.run.say(f"{signal.Signals(number).name}: stopping after this step; once more stops at once.")

        before = [signal.signal(number, handle) for number in SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(SIGNALS, before):
                signal.signal(number, handler)
        if self.asked:
            raise KeyboardInterrupt
