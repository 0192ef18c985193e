"""An interruption loses at most a step, and a kill about ten minutes."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest

from modicum.jobs import execute
from modicum.jobs.training.parts import parts_of
from modicum.jobs.training.parts.interruption import SIGNALS
from modicum.jobs.training.trainer import PartsTrainer
from modicum.recipe import parse
from modicum.record import read_log, read_record

MEZO = {"name": "mezo", "lr": 1e-3}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "abc"}) + "\n" for n in range(8)))
    return path


def recipe(model, rows, /, trainer=None, **changes):
    data = {"path": str(rows), "max_length": 64}
    rate = {} if "optimizer" in changes else {"learning_rate": 1e-2}
    trainer = {"max_steps": 6, "per_device_train_batch_size": 2} | rate | (trainer or {})
    return parse({"job": "train", "model": str(model), "data": data, "trainer": trainer} | changes)


def signalled(monkeypatch, step, *numbers):
    """Send signals in the middle of a step."""
    training_step = PartsTrainer.training_step

    def interrupted(self, *inputs):
        if self.state.global_step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return training_step(self, *inputs)

    monkeypatch.setattr(PartsTrainer, "training_step", interrupted)


def weights(folder):
    return next(folder.glob("*.safetensors")).read_bytes()


# Both signals take one path, so each kind of training needs only one of them.
@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (SIGNALS[0], {"adapter": {"rank": 2}}),
        (SIGNALS[1], {"optimizer": MEZO}),
        (SIGNALS[1], {"trainer": {"save_strategy": "no"}}),
    ],
)
def test_a_signal_saves_at_the_end_of_its_step_and_the_run_goes_on_from_there(
    tiny_model, rows, tmp_path, monkeypatch, number, changes
):
    before = [signal.getsignal(known) for known in SIGNALS]
    name = "adapter" if "adapter" in changes else "model"
    whole = execute(recipe(tiny_model, rows, **changes), tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        signalled(patched, 3, number)
        execute(recipe(tiny_model, rows, **changes), tmp_path / "r", quiet=True)
    record = read_record(tmp_path / "r")
    assert record["status"] == "interrupted" and "error" not in record
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert not (tmp_path / "r" / name).exists()
    assert [signal.getsignal(known) for known in SIGNALS] == before
    resumed = execute(recipe(tiny_model, rows, **changes), tmp_path / "r", quiet=True)
    assert resumed.done and weights(resumed.folder / name) == weights(whole.folder / name)


@pytest.mark.parametrize("step", [2, 3, 4])  # the second ends an epoch of four batches
def test_an_interruption_is_no_end_of_an_epoch(tiny_model, rows, tmp_path, monkeypatch, step):
    trainer = {"gradient_accumulation_steps": 2, "save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 1}
    wanted = recipe(tiny_model, rows, trainer=trainer, eval_data={"path": str(rows), "max_length": 64, "size": 3})
    whole = execute(wanted, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        signalled(patched, step, SIGNALS[0])
        execute(wanted, tmp_path / "r", quiet=True)
    resumed = execute(wanted, tmp_path / "r", quiet=True)
    assert weights(resumed.folder / "model") == weights(whole.folder / "model")
    lines = [
        [(x["event"], x["step"], x.get("loss"), x.get("eval_loss")) for x in read_log(r.folder)]
        for r in (resumed, whole)
    ]
    assert lines[0] == lines[1] and [line[1] for line in lines[0] if line[0] == "eval"] == [2, 4, 6]


@pytest.mark.parametrize("numbers", [SIGNALS, SIGNALS[::-1], SIGNALS[:1] * 2])
def test_a_second_signal_stops_at_once(tiny_model, rows, tmp_path, monkeypatch, numbers):
    signalled(monkeypatch, 3, *numbers)
    with pytest.raises(KeyboardInterrupt):
        execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    assert read_record(tmp_path / "r")["status"] == "interrupted"
    assert not (tmp_path / "r" / "checkpoints" / "checkpoint-3").exists()


def test_a_training_in_another_thread_leaves_signals_alone(tiny_model, rows, tmp_path):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)))
    thread.start()
    thread.join()
    assert runs[0].done


@pytest.mark.parametrize(
    ("trainer", "own_step", "seconds", "step", "due"),
    [
        ({}, None, 601, 7, True),
        ({}, None, 599, 7, False),
        ({}, None, 61, 20, True),  # a tenth of the run
        ({}, None, 59, 20, False),
        ({"save_steps": 50}, None, 601, 20, False),
        ({"save_strategy": "no"}, None, 601, 20, False),
        ({}, "a zeroth-order step", 601, 20, False),  # its result would follow the clock
    ],
)
def test_what_a_kill_costs_is_bounded_unless_the_recipe_says_when_to_save(
    tiny_model, rows, trainer, own_step, seconds, step, due
):
    part = next(part for part in parts_of(recipe(tiny_model, rows, trainer=trainer)) if part.name == "interruption")
    part.build = SimpleNamespace(own_step=own_step)
    assert part.due(seconds, SimpleNamespace(global_step=step, max_steps=200)) is due


def test_saving_by_the_clock_changes_no_result(tiny_model, rows, tmp_path, monkeypatch):
    plain = execute(recipe(tiny_model, rows), tmp_path / "plain", quiet=True)
    monkeypatch.setattr("modicum.jobs.training.parts.interruption.LONGEST", 0.0)
    monkeypatch.setattr("modicum.jobs.training.parts.interruption.SHORTEST", 0.0)
    often = execute(recipe(tiny_model, rows), tmp_path / "often", quiet=True)
    names = sorted(path.name for path in (often.folder / "checkpoints").iterdir())
    assert names == ["checkpoint-5", "checkpoint-6"] and often.hash == plain.hash
    assert weights(often.folder / "model") == weights(plain.folder / "model")
