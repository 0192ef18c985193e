"""Write the trainer's logs to the run."""

from __future__ import annotations

from typing import Any

from modicum.jobs.training.parts import Build, Part
from modicum.registry import training_part


@training_part("log", order=100)
class Log(Part):
    """Write each line of the trainer's log to the run and print it; comes last, after parts that add to the line."""

    def trainer(self, build: Build) -> None:
        """Add the callback."""
        from transformers import TrainerCallback

        run = self.run

        class LogCallback(TrainerCallback):
            def on_log(self, args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
                if not state.is_world_process_zero:
                    return
                event = "eval" if "eval_loss" in logs else "train"
                if event == "train" and "loss" not in logs:
                    return
                run.log(event, step=state.global_step, **logs)
                if args.disable_tqdm:
                    shown = " ".join(f"{key} {value:.4g}" for key, value in logs.items() if isinstance(value, float))
                    run.say(f"step {state.global_step}/{state.max_steps} {shown}")

        build.add_callback(LogCallback())
