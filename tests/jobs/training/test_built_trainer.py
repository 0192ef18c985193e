"""What the parts of a recipe put into the Trainer, looked at before it trains."""

import itertools
import json

import pytest
from transformers import PrinterCallback

from modicum.jobs import execute, plan
from modicum.jobs.data.rows import LabelledLogits
from modicum.jobs.training.objective import LabelHead
from modicum.jobs.training.parts import parts_of
from modicum.jobs.training.trainer import build_trainer
from modicum.recipe import parse

MEZO = {"name": "mezo", "lr": 1e-3}
TASK = {"path": "task:polarity", "size": 6}
REWARD = {"name": "reward", "max_new_tokens": 2}


class BuiltError(Exception):
    """Ends a run when its Trainer stands."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "abc"}) for i in range(10)))
    return {"path": str(path), "max_length": 64}


@pytest.fixture
def recipe(tiny_model, rows):
    def make(**changes):
        trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}
        base = {"job": "train", "model": str(tiny_model), "data": rows}
        return parse(base | changes | {"trainer": trainer | changes.get("trainer", {})})

    return make


@pytest.fixture
def built(recipe, tmp_path, monkeypatch):
    count = itertools.count()

    def build(*values):
        raise BuiltError(build_trainer(*values))

    def make(**changes):
        with monkeypatch.context() as patched, pytest.raises(BuiltError) as caught:
            patched.setattr("modicum.jobs.training.trainer.build_trainer", build)
            execute(recipe(**changes), tmp_path / f"r{next(count)}", quiet=True)
        return caught.value.args[0]

    return make


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, True),
        ({"adapter": {"rank": 2}}, True),
        ({"objective": "meap"}, True),
        ({"trainer": {"label_smoothing_factor": 0.1}}, False),
        ({"objective": {"name": "meap_sft", "min_answer_tokens": 0}}, False),
        ({"objective": "multiple_choice", "data": TASK}, False),
    ],
)
def test_logits_are_sparse_where_only_the_models_own_loss_reads_them(built, changes, sparse):
    assert isinstance(built(**changes).data_collator, LabelledLogits) == sparse


def test_logits_are_whole_where_every_token_is_learned(built, rows):
    assert not isinstance(built(data=rows | {"completion_only": False}).data_collator, LabelledLogits)


def test_the_run_prints_its_log_once(built):
    callbacks = built().callback_handler.callbacks
    assert not any(isinstance(callback, PrinterCallback) for callback in callbacks)
    # Last, so that it tells what the others add, and nothing is written to a checkpoint after its manifest.
    assert [type(callback).__name__ for callback in callbacks[-2:]] == ["LogCallback", "CheckpointCallback"]


def test_the_recipes_seed_names_every_draw(built):
    trainer = built(objective="meap", seed=3)
    assert trainer.data_collator.inner.seed == 3 == trainer.args.seed == trainer.args.data_seed
    assert built(optimizer=MEZO, seed=3).own_step.optimizer.settings.seed == 3
    assert built(optimizer=MEZO | {"seed": 5}, seed=3).own_step.optimizer.settings.seed == 5


def test_a_new_adapter_depends_on_the_seed_alone(built):
    def factors(seed):
        model = built(adapter={"rank": 2}, seed=seed).model
        return next(p for n, p in model.named_parameters() if "lora_A" in n).tolist()

    first, other, again = (factors(seed) for seed in (0, 1, 0))
    assert first == again != other


@pytest.mark.parametrize(("objective", "learned"), [("meap", True), ("ntp", False)])
def test_an_adapter_learns_the_row_of_the_mask_token(built, objective, learned):
    model = built(objective=objective, adapter={"rank": 2}).model
    rows = [name for name, p in model.named_parameters() if "trainable_tokens" in name and p.requires_grad]
    assert bool(rows) == learned


def test_the_objectives_loss_reads_the_labelled_positions(built):
    trainer = built(objective={"name": "meap_sft", "min_answer_tokens": 0})
    assert isinstance(trainer.compute_loss_func, LabelHead) and trainer.data_collator.gather_labels
    assert built(objective="meap").compute_loss_func is None


def test_the_right_candidate_is_read_alone_in_training_only(built):
    likelihood = {"name": "multiple_choice", "learn": "likelihood"}
    trainer = built(objective=likelihood, data=TASK, eval_data=TASK)
    assert {len(question.candidates) for question in trainer.train_dataset} == {1}
    assert {len(question.candidates) for question in trainer.eval_dataset} == {2}
    whole = built(objective="multiple_choice", data=TASK, eval_data=TASK)
    assert {len(question.candidates) for question in whole.train_dataset} == {2}


def test_answers_in_training_and_evaluation_have_scorers_of_their_own(built):
    trainer = built(objective=REWARD, data=TASK, eval_data=TASK | {"split": "test"}, optimizer=MEZO)
    training, evaluation = (rows.scorers for rows in (trainer.train_dataset, trainer.eval_dataset))
    assert len(training) == len(evaluation) == 6 and not training.keys() & evaluation.keys()


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [({}, False), ({"gradient": "adagc"}, False), ({"adapter": {}}, True), ({"optimizer": MEZO}, True)],
)
def test_all_weights_are_trained_in_float32_unless_they_are_frozen_or_probed(recipe, changes, keeps):
    assert any(part.keeps_dtype for part in parts_of(recipe(**changes))) == keeps


@pytest.mark.parametrize(("batch", "accumulation", "epochs"), [(2, 2, 2), (4, 1, 1.5), (3, 2, 1)])
def test_the_plan_counts_the_steps_that_the_run_does(recipe, tmp_path, batch, accumulation, epochs):
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    asked = recipe(trainer=sizes | {"max_steps": -1, "num_train_epochs": epochs})
    steps = execute(asked, tmp_path / "r", quiet=True).record["metrics"]["steps"]
    assert f"{steps} optimiser steps of {batch * accumulation} rows" in plan(asked)[2]
