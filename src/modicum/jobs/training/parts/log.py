"""Write the trainer's logs to the run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modicum.durable import write_atomic
from modicum.jobs.training.parts import Build, Part
from modicum.record import read_log
from modicum.registry import training_part

if TYPE_CHECKING:
    from torch import Tensor

EVENTS = ("train", "eval")  # events of the trainer


@training_part("log", order=100)
class Log(Part):
    """Write each line of the trainer's log to the run and print it; comes last, after parts that add to the line."""

    def trainer(self, build: Build) -> None:
        """Add the callback."""
        from transformers import TrainerCallback

        run, part = self.run, self

        class LogCallback(TrainerCallback):
            def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
                if not state.global_step:
                    part.forget(0)  # what a run wrote that was killed before it saved
                self.begun = (state.global_step, time.monotonic())

            def on_log(self, args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
                if not state.is_world_process_zero:
                    return
                event = "eval" if "eval_loss" in logs else "train"
                if event == "train" and "loss" not in logs:
                    return
                run.log(event, step=state.global_step, **logs)
                if args.disable_tqdm:
                    shown = " ".join(f"{key} {value:.4g}" for key, value in logs.items() if isinstance(value, float))
                    left = self.left(state.global_step, state.max_steps)
                    run.say(f"step {state.global_step}/{state.max_steps} {shown}{left}")

            def left(self, step: int, last: int) -> str:
                first, since = self.begun
                if not first < step < last:
                    return ""
                seconds = (time.monotonic() - since) / (step - first) * (last - step)
                minutes = round(seconds / 60)
                told = f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min"
                return f" · about {told if minutes < 100 else f'{minutes / 60:.1f} h'} left"

        build.add_callback(LogCallback())

    def remember(self) -> dict[str, Tensor]:
        """Return how many lines there are."""
        import torch

        return {"lines": torch.tensor(sum(line.get("event") in EVENTS for line in read_log(self.run.folder)))}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Take out the lines of steps that are done again."""
        if state:
            self.forget(int(state["lines"]))

    def forget(self, after: int) -> None:
        """Take the trainer's lines but for the first so many out of the log."""
        lines, kept = read_log(self.run.folder), []
        for line in lines:
            after -= (known := line.get("event") in EVENTS)
            if not known or after >= 0:
                kept.append(line)
        if self.run.main and len(kept) < len(lines):
            write_atomic(self.run.folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
