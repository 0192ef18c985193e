"""A run that was killed anywhere and started again is the run that was not: weights, optimiser, log and sums."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from modicum import registry
from modicum.jobs import execute
from modicum.jobs.data.sources import suite
from modicum.recipe import parse
from modicum.record import read_lines, read_record
from support import byte_tokenizer, safety_rows, tiny_llama

STEPS = 5  # the second and the fourth end an epoch
LETTERS = {"path": "task:letters", "size": 14, "max_length": 64}
KNOBS = {
    "aggc": {"steps": STEPS},
    "fixed_norm": {"limit": 0.1},
    "value": {"limit": 0.1},
    "hrp": {"preheat_rank": 4, "preheat_steps": 1},
    "lora_squeeze": {"preheat_rank": 4, "preheat_steps": 1},
    "adalora": {"warmup": 0.0, "settled": 0.2},
    "meap_sft": {"min_answer_tokens": 0},
    "tezo": {"rank": 2, "variant": "adam"},
}
INITS = sorted({*registry.adapter_init} - {"loftq"})  # which needs a CUDA device
MEZO = {"name": "mezo", "lr": 1e-3}


def choice(name, **more):
    return {"name": name, **KNOBS.get(name, {}), **more}


def gradient_rules():
    for name, entry in registry.gradient_rule.items():
        heavy = entry.facts.weight_sized_state
        yield name, {"gradient": choice(name, **({heavy: 0} if heavy else {}))}


def objectives():
    for name, entry in registry.objective.items():
        changes = {"objective": choice(name)}
        if entry.facts.acts_on == "answers":
            changes |= {"data": LETTERS} | ({} if entry.facts.differentiable else {"optimizer": MEZO})
        if entry.facts.acts_on == "pairs":
            changes |= {"data": {"path": "preference:unanswerable", "size": 7}}
        if entry.facts.acts_on in ("reasoning", "contrasts"):
            changes |= safety_rows(entry.facts.acts_on)
        yield name, changes


def zeroth_order():
    for name in registry.zeroth_order:
        yield name, {"optimizer": choice(name, lr=1e-3)}
    yield "tezo as an adapter", {"optimizer": choice("tezo", lr=1e-3, engine="adapter")}
    yield "mezo in two passes", {"optimizer": MEZO | {"passes": 2}}
    yield "mezo on an adapter", {"optimizer": MEZO, "adapter": {"rank": 2}}


CASES = {
    **{f"gradient {name}": changes for name, changes in gradient_rules()},
    **{f"objective {name}": changes for name, changes in objectives()},
    **{f"init {name}": {"adapter": {"rank": 2, "init": choice(name)}} for name in INITS},
    **{f"optimizer {name}": changes for name, changes in zeroth_order()},
    "objective on an adapter": {"objective": "meap", "adapter": {"rank": 2, "config": {"lora_dropout": 0.2}}},
    "packed": {"packing": True},
    "several draws": {"objective": "dropout", "gradient": "adagc", "adapter": {"rank": 2, "init": "pissa"}},
    "rows by length": {"trainer": {"train_sampling_strategy": "group_by_length"}},
    "rows by torch's generator": {"trainer": {"accelerator_config": {"use_seedable_sampler": False}}},
    "noise of the Trainer's own": {"trainer": {"neftune_noise_alpha": 5.0}},
    "16 bits": {"model_dtype": "bfloat16", "adapter": {"rank": 2}},
}
EVALUATED = {"eval_strategy": "epoch", "logging_steps": 1}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
# What a run does beside learning: a line of the log, an evaluation, its end, its best weights.
AROUND = {
    "evaluation at the ends of epochs": {"trainer": EVALUATED},
    "evaluation before the first step": {"trainer": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}},
    "all at the ends of epochs": {"trainer": EVALUATED | {"save_strategy": "epoch", "logging_strategy": "epoch"}},
    "zeroth order at the ends of epochs": {"trainer": EVALUATED | {"save_strategy": "epoch"}, "optimizer": MEZO},
    "a rate that follows evaluations": {"trainer": {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau"}},
    "the best weights": {"trainer": BEST | {"learning_rate": 0.5}},
    "the best weights of an adapter": {"trainer": BEST | {"learning_rate": 0.5}, "adapter": {"rank": 2}},
    "an end by patience": {"trainer": BEST | {"learning_rate": 2.0}, "stop_on": {"patience": 1}},
    "an end by patience at an epoch's end": {
        "trainer": EVALUATED | {"learning_rate": 2.0, "num_train_epochs": 9, "max_steps": -1},
        "stop_on": {"patience": 1},
    },
}
QUICK = [
    "gradient adagc", "gradient spam", "objective dropout", "objective dpo", "objective neftune", "objective meap",
    "init adalora", "init hrp", "init lora_xs", "optimizer tezo", "optimizer mezo in two passes", "several draws",
    "rows by length",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def letters():
    render = suite._choice("{sentence}", ("a", "b"))
    rows = [{"sentence": f"row {n}", "label": n % 2} for n in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "TASKS", {**suite.TASKS, "letters": suite.Task("", None, render)})
        patch.setattr(suite, "_load", lambda *_: rows, raising=False)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that draws at random in training mode, so that torch's generator has to go on where it was."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_llama(num_hidden_layers=1, attention_dropout=0.1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "abc" * n}) + "\n" for n in range(1, 8)))
    return path


def recipe(model, rows, /, trainer=None, packing=False, model_dtype="float32", **changes):
    steps = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    steps |= {"logging_steps": 3, "save_steps": 1, "save_total_limit": 9}
    steps |= {} if "optimizer" in changes else {"learning_rate": 1e-2}  # it has a rate of its own
    data = {"path": str(rows), "max_length": 64, "packing": packing}
    settings = {"job": "train", "model": {"path": str(model), "dtype": model_dtype}, "data": data}
    if (trainer or {}).get("eval_strategy"):
        settings["eval_data"] = data | {"size": 3}
    return parse(settings | {"trainer": steps | (trainer or {})} | changes)


def killed(whole, folder, step):
    """Copy a run as if it had been killed after so many steps, or anywhere before the next checkpoint."""
    shutil.copytree(whole, folder)
    for path in folder.iterdir():
        if path.name in ("model", "adapter"):
            shutil.rmtree(path)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    record = read_record(folder) | {"status": "running", "metrics": {}, "outputs": {}}
    (folder / "record.json").write_text(json.dumps(record))


def told(folder):
    """Return everything that a run says, but for the time that it took."""
    timed = {"time", "seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    lines = [{k: v for k, v in line.items() if k not in timed} for line in read_lines(folder / "log.jsonl")]
    record = read_record(folder)
    return lines, record["metrics"], record["outputs"], sorted(record["notes"]), read_lines(folder / "clipping.jsonl")


def same(one, other):
    """Whether two values that ``torch.load`` may give are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or type(one).__name__ == "ndarray"


def assert_same_run(whole, again):
    assert told(again) == told(whole)
    last = max((whole / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2])).name
    for folder in ("model", "adapter", f"checkpoints/{last}"):
        for file in sorted((whole / folder).glob("*.safetensors")):
            tensors, others = load_file(file), load_file(again / folder / file.name)
            assert same(tensors, others), file
    for name in ("optimizer.pt", "scheduler.pt"):
        files = (path / "checkpoints" / last / name for path in (whole, again))
        assert same(*(torch.load(file, weights_only=True) for file in files)), name


def check(model, rows, folder, changes, steps):
    """Compare a run with those killed after so many steps."""
    wanted = recipe(model, rows, **changes)
    whole = execute(wanted, folder / "whole", quiet=True).folder
    for step in steps:
        killed(whole, folder / f"killed-{step}", step)
        assert_same_run(whole, execute(wanted, folder / f"killed-{step}", quiet=True).folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("number", "case"), enumerate(QUICK))
def test_a_killed_run_ends_as_the_whole_one(model, rows, tmp_path, number, case):
    check(model, rows, tmp_path, CASES[case], [(2, 4, STEPS)[number % 3]])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_after_any_step_ends_as_the_whole_one(model, rows, tmp_path, case):
    check(model, rows, tmp_path, CASES[case], range(1, STEPS + 1))


def test_patience_is_tried_on_runs_that_it_ends(model, rows, tmp_path):
    for case in (case for case in AROUND if "patience" in case):
        run = execute(recipe(model, rows, **AROUND[case]), tmp_path / case, quiet=True)
        assert any("got no better" in note for note in run.record["notes"]), case


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", AROUND)
def test_what_a_run_does_beside_learning_is_done_once(model, rows, tmp_path, case):
    check(model, rows, tmp_path, AROUND[case], [2, STEPS])
