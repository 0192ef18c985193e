"""A run that diverged or did nothing is not done, and one that gets no better may end before its last step."""

import json
import math

import pytest
import torch

from modicum.errors import RecipeError, TrainingError
from modicum.jobs import execute, plan
from modicum.jobs.training.trainer import PartsTrainer
from modicum.jobs.training.watch import LossWatch, infinite_weights
from modicum.recipe import parse
from modicum.record import Run, read_log, read_record

MEZO = {"name": "mezo", "lr": 1e-3}
KINDS = {
    "adapter": {"adapter": {"rank": 2}},
    "all weights": {},
    "gradient": {"gradient": {"name": "adagc", "warmup": 1}},
    "objective": {"adapter": {"rank": 2}, "objective": "meap"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "abc"}) + "\n" for n in range(8)))
    return path


def recipe(model, rows, /, trainer=None, **changes):
    data = {"path": str(rows), "max_length": 64}
    trainer = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1} | (trainer or {})
    return parse({"job": "train", "model": str(model), "data": data, "trainer": trainer} | changes)


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.fixture
def spoil(monkeypatch):
    """Make losses NaN from one step on, and optionally the weights."""

    def at(steps, *, weights=False):
        training_step = PartsTrainer.training_step

        def spoilt(self, model, inputs, *more):
            if self.state.global_step + 1 in steps:
                see, self.watchers = self.watchers, []
                loss = training_step(self, model, inputs, *more) * math.nan
                self.watchers = see
                for watch in see:
                    watch(loss)
                if weights:
                    trained = next(p for p in model.parameters() if p.requires_grad)
                    with torch.no_grad():
                        trained.fill_(math.nan)
                return loss
            return training_step(self, model, inputs, *more)

        monkeypatch.setattr(PartsTrainer, "training_step", spoilt)

    return at


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_end_the_run_and_its_checkpoints_stay_good(tiny_model, rows, tmp_path, spoil, kind):
    spoil({3, 4, 5, 6}, weights=True)
    with pytest.raises(TrainingError) as caught:
        execute(recipe(tiny_model, rows, **KINDS[kind]), tmp_path / "r", quiet=True)
    text = str(caught.value)
    assert "Step 3: the weight " in text and "since step 3" in text and "\n" not in text
    assert "last good checkpoint is" in text and "checkpoint-2." in text
    assert ("gradient: adagc" in text) == (kind != "gradient") and "a lower trainer.learning_rate" in text
    assert read_record(tmp_path / "r")["status"] == "failed"
    assert not any((tmp_path / "r" / name).exists() for name in ("adapter", "model"))
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_rate_that_is_far_too_high_is_an_error(tiny_model, rows, tmp_path):
    wild = {"learning_rate": 1e38, "max_grad_norm": 0.0, "max_steps": 4, "logging_steps": 10, "save_strategy": "no"}
    with pytest.raises(TrainingError, match="There is no checkpoint from before. Try gradient: adagc"):
        execute(recipe(tiny_model, rows, trainer=wild, adapter={"rank": 2}), tmp_path / "r", quiet=True)


def test_a_loss_that_is_not_finite_in_the_last_step_is_an_error(tiny_model, rows, tmp_path, spoil):
    spoil({5, 6})
    with pytest.raises(TrainingError, match="Step 6, the last one: the loss is NaN or infinite, since step 5"):
        execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)


def test_a_run_that_survived_such_a_loss_says_so_and_its_files_are_json(tiny_model, rows, tmp_path, spoil):
    spoil({3})
    run = execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    assert any("1 losses were NaN or infinite, the first at step 3" in note for note in run.record["notes"])
    lines = [strict(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["loss"] is None] == [3] and len(lines) == 6
    assert strict((run.folder / "record.json").read_text())["metrics"]["train_loss"] > 0


@pytest.mark.parametrize("optimizer", [None, MEZO])
def test_the_first_such_loss_ends_a_run_where_the_recipe_says_so(tiny_model, rows, tmp_path, spoil, optimizer):
    spoil({3})
    quiet = {"logging_steps": 100, "save_steps": 1}
    wanted = recipe(tiny_model, rows, trainer=quiet, stop_on={"nan": True}, optimizer=optimizer)
    with pytest.raises(TrainingError, match=r"Step 3: the loss is NaN .*checkpoint-2\. Try") as caught:
        execute(wanted, tmp_path / "r", quiet=True)
    assert ("a lower optimizer.lr" in str(caught.value)) == (optimizer is not None)


def test_a_run_of_no_step_is_refused_before_it_begins(tiny_model, rows, tmp_path):
    none = recipe(tiny_model, rows, trainer={"max_steps": -1, "num_train_epochs": 0.0})
    for start in (plan, lambda wanted: execute(wanted, tmp_path / "r", quiet=True)):
        with pytest.raises(RecipeError, match="makes no optimiser step of 8 rows. Raise it"):
            start(none)


def test_a_run_that_turns_out_to_do_no_step_is_an_error(tiny_model, rows, tmp_path, monkeypatch):
    # The only batch is not full, which is told before a run begins.
    monkeypatch.setattr("modicum.jobs.train.refuse_arguments", lambda *_, **__: None)
    dropped = {"per_device_train_batch_size": 16, "dataloader_drop_last": True}
    with pytest.raises(TrainingError, match="no optimiser step"):
        execute(recipe(tiny_model, rows, trainer=dropped), tmp_path / "r", quiet=True)


def test_patience_ends_a_run_whose_evaluations_get_no_better_also_after_a_resume(tiny_model, rows, tmp_path):
    still = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    data = {"path": str(rows), "size": 4, "max_length": 64}
    run = execute(
        recipe(tiny_model, rows, trainer=still, eval_data=data, stop_on={"patience": 2}), tmp_path / "r", quiet=True
    )
    assert run.record["metrics"]["steps"] == 3 and run.record["status"] == "done"
    assert any("Stopped at step 3: eval_loss got no better in 2 evaluations" in note for note in run.record["notes"])
    better = still | {"learning_rate": 1e-2}
    run = execute(
        recipe(tiny_model, rows, trainer=better, eval_data=data, stop_on={"patience": 2}), tmp_path / "b", quiet=True
    )
    assert run.record["metrics"]["steps"] == 6 and len(read_log(run.folder, "eval")) == 6


def test_patience_without_evaluations_is_refused(tiny_model, rows, tmp_path):
    with pytest.raises(RecipeError, match="stop_on.patience counts evaluations"):
        execute(recipe(tiny_model, rows, stop_on={"patience": 2}), tmp_path / "r", quiet=True)


def test_the_watch_names_the_first_step_of_several_micro_batches():
    watch = LossWatch()
    for step, loss in [(1, 1.0), (1, 2.0), (2, 3.0), (2, math.inf), (2, 4.0), (3, math.nan), (4, 1.0)]:
        watch.step = step
        watch(torch.tensor(loss))
    assert watch.look() and (watch.first, watch.count, watch.last_is_bad) == (2, 2, False)
    assert not watch.look() and watch.first == 2
    watch(torch.tensor([1.0, math.nan]))
    assert watch.look() and watch.count == 3 and watch.last_is_bad


def test_only_trained_weights_are_looked_at():
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0], layer.bias[0] = math.inf, math.nan
    layer.bias.requires_grad_(False)
    assert list(infinite_weights(layer)) == ["weight"]
    with torch.no_grad():
        layer.weight.fill_(3e38)  # the sum is infinite, no entry is
    assert list(infinite_weights(layer)) == []


def test_numbers_that_json_does_not_know_are_null_at_any_depth(tmp_path):
    with Run(tmp_path / "r", job="train", recipe={}, quiet=True) as run:
        run.log("train", loss=math.nan, more={"norms": [1.0, math.inf, (-math.inf,)]})
        run.record["metrics"]["loss"] = math.inf
    assert strict((run.folder / "log.jsonl").read_text())["more"] == {"norms": [1.0, None, [None]]}
    assert strict((run.folder / "record.json").read_text())["metrics"] == {"loss": None}
