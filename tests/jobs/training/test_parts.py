"""Training parts: their hooks, the keys that they add to the recipe, and the one Trainer that they put together."""

import inspect
import json
from dataclasses import replace
from functools import partial

import pytest

from modicum import registry
from modicum.errors import ModicumError
from modicum.jobs import execute, plan, train
from modicum.jobs.data.sources import suite
from modicum.jobs.training import recipe as schema
from modicum.jobs.training.parts import Part, parts_of
from modicum.jobs.training.trainer import PartsTrainer, build_trainer
from modicum.recipe import Section, parse
from modicum.record import read_log
from support import safety_rows, with_own_entries

MEZO = {"name": "mezo", "lr": 1e-3}
WORDS = {"path": "task:polarity", "size": 8}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {i % 7}", "completion": "abc" * 20}) for i in range(12)))
    return {"path": str(path), "max_length": 96}


@pytest.fixture(autouse=True)
def _letters(monkeypatch):
    """A task whose candidates are one byte each, which the test tokenizer takes for label words."""
    render = suite._choice("{sentence}", ("a", "b"))
    monkeypatch.setattr(suite, "TASKS", {**suite.TASKS, "letters": suite.Task("", None, render)})


def data(model, rows, /, **changes):
    trainer = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "use_cpu": True}
    trainer |= changes.pop("trainer", {})
    return {"job": "train", "model": str(model), "data": rows, "trainer": trainer} | changes


def objective_on(name):
    """Return what a recipe needs besides the objective."""
    answers = registry.objective[name].facts.answers
    if registry.objective[name].facts.acts_on == "pairs":
        return {"data": {"path": "preference:instructions", "size": 8}}
    if registry.objective[name].facts.acts_on in ("reasoning", "contrasts"):
        return safety_rows(registry.objective[name].facts.acts_on)
    if registry.objective[name].facts.acts_on != "answers":
        return {}
    knobs = {"name": name, "max_new_tokens": 2} if answers == "generated" else name
    rows = WORDS | {"path": "task:letters"} if answers == "words" else WORDS
    return {"data": rows, "eval_data": rows, "optimizer": MEZO, "objective": knobs}


KINDS = {
    "plain": {},
    "adapter": {"adapter": {"rank": 2}},
    "started": {"adapter": {"rank": 2, "init": {"name": "lora_plus", "ratio": 4.0}}},
    "gradient": {"gradient": {"name": "adagc", "warmup": 1}},
    "zeroth order": {"optimizer": MEZO},
    "all at once": {"adapter": {"rank": 2, "init": "pissa"}, "objective": "meap_sft", "gradient": "adagc"},
    **{name: {"objective": name} | objective_on(name) for name in registry.objective},
}


class BuiltError(Exception):
    """Ends a run when its Trainer stands."""


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_assigned_over_a_method_of_the_trainer(tiny_model, rows, tmp_path, monkeypatch, kind):
    def build(*values):
        raise BuiltError(build_trainer(*values))

    monkeypatch.setattr("modicum.jobs.training.trainer.build_trainer", build)
    with pytest.raises(BuiltError) as built:
        execute(parse(data(tiny_model, rows, **KINDS[kind])), tmp_path / "r", quiet=True)
    (trainer,) = built.value.args
    assert type(trainer) is PartsTrainer
    held = vars(trainer)
    assert [name for name, value in held.items() if inspect.isroutine(value)] == []
    assert [name for name in held if callable(getattr(type(trainer), name, None))] == []


def test_four_methods_are_overridden_and_each_says_so():
    own = {name for name, value in vars(PartsTrainer).items() if inspect.isfunction(value)} - {"__init__"}
    assert own == {"training_step", "compute_loss", "get_batch_samples", "get_decay_parameter_names"}
    assert all(f"``{name}``" in PartsTrainer.__doc__ for name in own)


@pytest.mark.parametrize("name", registry.objective)
def test_every_objective_is_served_by_one_part(tiny_model, rows, name):
    recipe = parse(data(tiny_model, rows, **{"objective": name} | objective_on(name)))
    assert len([part for part in parts_of(recipe) if part.section is recipe.objective]) == 1


@pytest.fixture
def table(monkeypatch):
    """The table of parts and the schema made of it, put back afterwards."""
    with_own_entries(monkeypatch, registry.training_part)
    list(registry.training_part.values())

    def use():
        made = schema._with_parts(schema.TrainRecipe.__base__)
        monkeypatch.setitem(train.train.__annotations__, "recipe", made)
        return made

    return use


class Toy(Section):
    factor: float = 1.0


def test_a_new_part_is_a_key_of_the_recipe_and_every_hook_is_called_in_order(tiny_model, rows, tmp_path, table):
    from modicum.registry import training_part

    calls = []

    @training_part("toy", section=Toy, description="a toy", order=60)
    class ToyPart(Part):
        """A part that counts its calls."""

    expected = ["inputs", "begin", "arguments", "check", "data", "model", "adapter", "wrap", "start", "trainer"]
    hooks = [name for name, value in vars(Part).items() if inspect.isfunction(value) and not name.startswith("_")]

    def watched(name, self, *values):
        calls.append(name)
        return getattr(Part, name)(self, *values)

    for name in hooks:

        def hook(self, *values, name=name):
            return watched(name, self, *values)

        setattr(ToyPart, name, hook)
    table()
    with pytest.raises(ModicumError, match=r"unknown key 'toy.factr'. Did you mean 'factor'\?"):
        parse(data(tiny_model, rows, toy={"factr": 2}))
    recipe = parse(data(tiny_model, rows, toy={"factor": 2}))
    assert recipe.toy.factor == 2 and list(type(recipe).model_fields)[-2:] == ["toy", "trainer"]
    calls.clear()
    plan(recipe)
    assert [name for name in calls if name not in ("fit", "inputs")] == ["arguments", "check", "data", "foresee"]
    calls.clear()
    execute(recipe, tmp_path / "r", quiet=True)
    assert list(dict.fromkeys(calls)) == [*expected, "around", "finish", "save", "verify", "variants"]
    # The last ones where there are checkpoints, and where another recipe refers to what is made.
    assert {*calls, "fit", "foresee", "remember", "recall", "variant_names"} == {*hooks}


def test_a_part_may_bring_a_loss_a_collator_state_in_checkpoints_and_another_order(tiny_model, rows, tmp_path, table):
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    from modicum.registry import training_part

    order = []

    class Counter(TrainerCallback, ExportableState):
        def __init__(self, steps=0):
            self.steps = steps

        def on_step_end(self, _args, _state, _control, **_):
            self.steps += 1

        def state(self):
            return {"args": {"steps": self.steps}, "attributes": {}}

    class Watched:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, features):
            order.extend(len(row["input_ids"]) for row in features)
            return self.inner(features)

    @training_part("toy", section=Toy, order=60)
    class ToyPart(Part):
        """A part that replaces the loss, and reads the rows from the shortest to the longest."""

        brings = ("loss",)

        def arguments(self, fields):
            return {"train_sampling_strategy": "sequential"} | fields

        def data(self, data):
            def encode(rows, tokenizer, section, *, note):
                return sorted(data.encode(rows, tokenizer, section, note=note), key=lambda row: len(row["input_ids"]))

            return replace(data, encode=encode)

        def trainer(self, build):
            build.data_collator = Watched(build.data_collator)
            build.own_loss = partial(self.loss)
            build.add_callback(Counter())

        def loss(self, model, inputs, *, branches=1):
            loss = model(**inputs).loss * self.section.factor
            return loss, {"losses": loss.detach().expand(len(inputs["labels"]))}

    table()
    lines = [json.dumps({"prompt": "say " * (i % 5), "completion": "abc"}) for i in range(12)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    mixed = {"path": str(tmp_path / "mixed.jsonl"), "max_length": 96}
    trainer = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 2}
    recipe = data(tiny_model, mixed, trainer=trainer)
    losses = []
    for factor in (1.0, 3.0):
        run = execute(parse(recipe | {"toy": {"factor": factor}}), tmp_path / str(factor), quiet=True)
        losses.append(read_log(run.folder, "train")[0]["loss"])
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-4)
    assert order[:8] == sorted(order[:8]) and order[0] < order[7]
    state = json.loads((run.folder / "checkpoints" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Counter"]["args"] == {"steps": 2}


@pytest.mark.parametrize("answers", ["candidates", "generated"])
def test_a_new_objective_over_answers_is_its_function_and_facts(tiny_model, rows, tmp_path, monkeypatch, answers):
    with_own_entries(monkeypatch, registry.objective)
    gather = registry.objective["reward"].facts.gather if answers == "generated" else None

    @registry.objective("toy", acts_on="answers", answers=answers, gather=gather)
    def toy(scores, answers=None, *, factor: float = 2.0):
        """Return a constant that the scores reach with a gradient."""
        return (scores * 0).nan_to_num().sum() + factor

    changes = {"objective": {"name": "toy", "factor": 5.0}, "data": WORDS, "eval_data": WORDS, "optimizer": MEZO}
    run = execute(parse(data(tiny_model, rows, **changes)), tmp_path / "r", quiet=True)
    assert run.record["metrics"]["eval_loss"] == 5.0 == run.record["metrics"]["train_loss"]
    assert ("eval_reward" in run.record["metrics"]) == (answers == "generated")


def test_an_objective_that_no_part_serves_is_refused(tiny_model, rows, monkeypatch):
    with_own_entries(monkeypatch, registry.objective)

    @registry.objective("toy", acts_on="nothing")
    def toy(batch):
        """Return the batch."""
        return batch

    with pytest.raises(ModicumError, match="objective: no training part serves toy"):
        parse(data(tiny_model, rows, objective="toy"))


SMOOTH = {"label_smoothing_factor": 0.1}
PAIRED = {"name": "tezo", "lr": 1e-3, "rank": 2, "engine": "paired"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"rank": 2, "config": {"lora_alfa": 1}}}, "Did you mean 'lora_alpha'"),
        ({"adapter": {"rank": 2, "config": {"r": 1}}}, "Use adapter.rank"),
        (
            {"adapter": {"rank": 2, "init": "lora_plus"}, "optimizer": MEZO},
            "adapter and optimizer each bring their own optimizer",
        ),
        ({"gradient": "adagc", "optimizer": MEZO}, "no gradients for `gradient` to act on"),
        ({"adapter": {"rank": 2, "init": "adalora"}, "optimizer": MEZO}, "no gradients for `adapter.init` to act on"),
        ({"adapter": {"rank": 2, "init": "adalora"}}, "no step left to drop ranks"),
        ({"adapter": {"rank": 2, "init": "rslora", "compare": "full"}}, "the start of rslora is PEFT's own"),
        ({"gradient": {"name": "zclip"}, "trainer": {"max_grad_norm": 1.0}}, "max_grad_norm"),
        ({"optimizer": MEZO, "trainer": {"fsdp": "full_shard"}}, "one process or with DDP"),
        ({"optimizer": PAIRED | {"engine": "adapter", "passes": 2}}, "passes=2 needs engine='mutate'"),
        ({"optimizer": PAIRED, "trainer": SMOOTH}, "engine='paired' computes the model's own loss"),
        ({"optimizer": PAIRED, "objective": "meap_sft"}, "engine='paired' computes the model's own loss"),
        ({"objective": "meap_sft", "trainer": SMOOTH}, "label_smoothing_factor smooths the model's own loss"),
        ({"objective": "multiple_choice", "data": WORDS, "trainer": SMOOTH}, "label_smoothing_factor smooths"),
        ({"objective": "meap_sft", "data": {"path": "rows.jsonl", "packing": True}}, "copies whole rows"),
        ({"objective": "reward"}, "reward has no gradient"),
        ({"objective": "reward", "optimizer": PAIRED}, "engine='paired' cannot"),
        ({"objective": "multiple_choice"}, "needs rows with candidates"),
        ({"objective": "dropout", "optimizer": {"name": "mezo", "lr": 1e-3}}, "it would change nothing. Drop one"),
        ({"objective": "neftune", "optimizer": {"name": "fzoo", "lr": 1e-3}}, "it would change nothing. Drop one"),
        ({"objective": "label_words", "data": WORDS | {"packing": True}}, "packing must be false"),
        ({"objective": "label_words", "data": WORDS, "trainer": {"batch_eval_metrics": True}}, "as one list"),
        ({"eval_data": "no/such/file.jsonl"}, "no/such/file.jsonl"),
        ({"trainer": {"eval_strategy": "steps"}}, "there is no eval_data"),
    ],
)
def test_check_refuses_what_a_run_would_refuse(tiny_model, rows, tmp_path, changes, message):
    with pytest.raises(ModicumError, match=message) as told:
        plan(parse(data(tiny_model, rows, **changes)))
    assert "\n" not in str(told.value)
    with pytest.raises(ModicumError, match=message):
        execute(parse(data(tiny_model, rows, **changes)), tmp_path / "r", quiet=True)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("sizes", [(8, 4), (3, 2), (1, 4)])
def test_the_accuracy_of_an_evaluation_counts_every_row_once(tiny_model, rows, tmp_path, sizes):
    size, batch = sizes
    changes = {"objective": "multiple_choice", "data": WORDS, "eval_data": WORDS | {"size": size}, "optimizer": MEZO}
    trainer = {"per_device_eval_batch_size": batch}
    run = execute(parse(data(tiny_model, rows, **changes, trainer=trainer)), tmp_path / "r", quiet=True)
    accuracy = run.record["metrics"]["eval_accuracy"]
    assert accuracy * size == pytest.approx(round(accuracy * size)) and 0 <= accuracy <= 1
