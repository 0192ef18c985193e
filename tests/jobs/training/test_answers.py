import json

import pytest
import torch

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.data.sources import suite
from modicum.recipe import parse
from modicum.record import read_log
from support import byte_tokenizer

TEZO = {"name": "tezo", "lr": 3e-3, "rank": 4}


@pytest.fixture(autouse=True)
def _letters(monkeypatch):
    """A task whose candidates are one byte each, which the test tokenizer takes for label words."""
    render = suite._choice("{sentence}", ("a", "b"))
    monkeypatch.setattr(suite, "TASKS", {**suite.TASKS, "letters": suite.Task("", None, render)})


def recipe(model, objective=None, /, task="letters", **changes):
    trainer = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 2}
    if changes.get("optimizer", TEZO) is None:  # a zeroth-order optimizer has a rate of its own
        trainer["learning_rate"] = 1e-2
    data = {
        "job": "train",
        "model": str(model),
        "data": {"path": f"task:{task}", "size": 40},
        "eval_data": {"path": f"task:{task}", "split": "test", "size": 10},
        "optimizer": TEZO,
        "trainer": trainer | changes.pop("trainer", {}),
    }
    return parse(data | ({"objective": objective} if objective else {}) | changes)


def run(folder, *args, **changes):
    return execute(recipe(*args, **changes), folder, quiet=True)


def test_label_words_are_trained_on_from_a_recipe_and_accuracy_is_reported(tiny_model, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 2}
    done = run(tmp_path / "r", tiny_model, "label_words", data="task:letters", trainer=steps)
    losses = [line["loss"] for line in read_log(done.folder, "train")]
    assert losses == pytest.approx([0.69, 0.69], abs=0.1)  # two words, not a vocabulary of 264
    lines = read_log(done.folder, "eval")
    assert {line["step"] for line in lines} == {2, 4} and all(0 <= line["eval_accuracy"] <= 1 for line in lines)
    assert done.record["metrics"]["eval_accuracy"] == lines[-1]["eval_accuracy"]


@pytest.mark.parametrize("objective", ["label_words", {"name": "multiple_choice", "learn": "choice"}])
def test_the_reported_accuracy_and_loss_are_those_of_the_saved_model(tiny_model, tmp_path, objective):
    from transformers import AutoModelForCausalLM

    done = run(tmp_path / "r", tiny_model, objective)
    model = AutoModelForCausalLM.from_pretrained(done.folder / "model", dtype=torch.float32).eval()
    rows, right, losses = load_rows(recipe(tiny_model).eval_data).rows, 0, []
    for row in rows:
        ids = byte_tokenizer()(row["prompt"] + "a")["input_ids"]
        scores = model(torch.tensor([ids])).logits[0, -2, [ids[-1], ids[-1] + 1]].detach()
        right += int(scores.argmax()) == row["answer"]
        losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(row["answer"])))
    metrics = done.record["metrics"]
    assert metrics["eval_accuracy"] == pytest.approx(right / len(rows))
    assert metrics["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "objective", ["label_words", "multiple_choice", {"name": "multiple_choice", "learn": "likelihood"}]
)
def test_a_first_order_adapter_takes_the_same_objectives(tiny_model, tmp_path, objective):
    steps = {"max_steps": 12, "gradient_accumulation_steps": 2}
    done = run(tmp_path / "r", tiny_model, objective, optimizer=None, adapter={"rank": 4}, trainer=steps)
    losses = [line["loss"] for line in read_log(done.folder, "train")]
    assert losses[-1] < losses[0]


def test_micro_batches_give_the_gradient_of_the_whole(tiny_model, tmp_path):
    both = {"optimizer": None, "adapter": {"rank": 2}, "seed": 3}
    whole = run(tmp_path / "a", tiny_model, "label_words", trainer={"max_steps": 1, "logging_steps": 1}, **both)
    parts = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    split = run(tmp_path / "b", tiny_model, "label_words", trainer=parts, **both)
    first, second = (read_log(done.folder, "train")[0] for done in (whole, split))
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("objective", ["label_words", "multiple_choice"])
def test_the_paired_engine_sees_the_objective_at_both_points(tiny_model, tmp_path, objective):
    weights = []
    for engine in ("adapter", "paired"):
        done = run(tmp_path / engine, tiny_model, objective, optimizer=TEZO | {"engine": engine})
        weights.append([line["loss"] for line in read_log(done.folder, "train")])
    assert weights[0] == pytest.approx(weights[1], rel=1e-4)


def test_a_reward_without_a_gradient_is_raised_by_a_zeroth_order_optimizer(tiny_model, tmp_path, monkeypatch):
    # A reward that a few steps can move: the share of the answer's characters that lie early in the alphabet.
    monkeypatch.setattr(
        "modicum.jobs.data.sources.suite.exact_match", lambda answer, _, **__: sum(map(ord, answer)) / 1000 % 1
    )
    objective = {"name": "reward", "max_new_tokens": 3}
    knobs = {"name": "mezo", "lr": 1e-3, "eps": 0.1}
    done = run(tmp_path / "r", tiny_model, objective, optimizer=knobs)
    metrics = done.record["metrics"]
    assert metrics["eval_reward"] == pytest.approx(-metrics["eval_loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "answer", "expected"), [("own", "xa", 0.0), ("f1", "b", 1.0), ("exact_match", "B.", 1.0)]
)
def test_rewards_score_what_the_model_wrote(tiny_model, metric, answer, expected):
    from modicum.jobs.training.answers import AnswerCollator, AnswerLoss, answer_rows

    section = DataSection(path="task:letters", size=30)
    rows = load_rows(section)
    knobs = {"metric": metric, "max_new_tokens": 2}
    found = answer_rows(rows, byte_tokenizer(), section, "reward", knobs, training=False, note=print)
    loss = AnswerLoss("reward", knobs, sets=[found], tokenizer=byte_tokenizer())
    right = next(i for i, row in enumerate(rows.rows) if row["answer"] == 1)
    key = AnswerCollator(0, alone=True)([found[right]])["labels"].tolist()[0]
    assert loss._scorers[key](answer) == expected


def test_shots_are_chosen_by_seed_and_balanced():
    section = DataSection(path="task:polarity", config={"shots": 4})
    rows = load_rows(section, seed=1).rows
    assert sorted(row["answer"] for row in rows) == [0] * 4 + [1] * 4
    assert rows == load_rows(section, seed=1).rows != load_rows(section, seed=2).rows


def test_a_task_is_also_a_plain_completion_without_a_chat_template(tiny_model, tmp_path):
    from modicum.jobs.data.tokens import encode

    row = load_rows(DataSection(path="task:polarity", size=1, template="Film: {prompt}")).rows[0]
    ids, labels = encode(row, byte_tokenizer(chat=True), completion_only=True)
    text = byte_tokenizer().decode(ids)
    assert text == row["prompt"] + row["completion"] and text.startswith("Film: The")
    assert byte_tokenizer().decode([i for i in labels if i != -100]) == row["completion"]
    done = run(tmp_path / "r", tiny_model, task="polarity")
    assert done.record["metrics"]["steps"] == 4


def test_a_saved_data_set_is_a_task_s_rows_and_part_of_the_run(tmp_path):
    import datasets

    saved = [{"sentence": f"film {i}", "label": i % 2} for i in range(10)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(saved)}).save_to_disk(str(tmp_path / "sst2"))
    section = DataSection(path="task:sst2", config={"path": str(tmp_path / "sst2")})
    assert len(load_rows(section)) == 10 and list(section.inputs()) == [str(tmp_path / "sst2")]
    assert load_rows(section).score(0, load_rows(section).rows[0]["completion"]) == 1.0


def test_long_prompts_lose_their_beginning(tiny_model, tmp_path):
    done = run(tmp_path / "r", tiny_model, "label_words", data={"path": "task:letters", "size": 8, "max_length": 10})
    assert "8 of 8 prompts exceed max_length 10; they lost their beginning." in done.record["notes"]


@pytest.mark.parametrize(
    ("objective", "changes", "error", "message"),
    [
        ("label_words", {"task": "polarity"}, RecipeError, "needs the same candidates of one token"),
        ("multiple_choice", {"data": "reasoning-gym:spell_backward"}, RecipeError, "needs rows with candidates"),
        ("reward", {"optimizer": None}, UnsupportedError, "reward has no gradient. Use a zeroth-order"),
        ("reward", {"optimizer": TEZO | {"engine": "paired"}}, UnsupportedError, "engine='paired' cannot"),
        ("label_words", {"data": {"path": "task:letters", "packing": True}}, RecipeError, "packing must be false"),
        ("label_words", {"data": {"path": "task:letters", "max_length": 1}}, RecipeError, "an answer alone fills"),
        (None, {"data": {"path": "task:letters", "system": "Be kind."}}, RecipeError, "without a system message"),
        (None, {"data": {"path": "task:letters", "config": {"shot": 1}}}, RecipeError, "Did you mean 'shots'"),
        (None, {"data": {"path": "task:letters", "config": {"shots": 0}}}, RecipeError, "expected a whole number"),
        (None, {"data": "task:leters"}, RecipeError, "Did you mean 'letters'"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tiny_model, tmp_path, objective, changes, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path / "r", tiny_model, objective, **changes)


def test_the_plan_counts_a_task_s_rows(tiny_model):
    assert any("on 40 rows of task:letters" in line for line in plan(recipe(tiny_model, "label_words")))


def test_a_trainer_of_one_s_own_is_told_where_to_go(tiny_model):
    from types import SimpleNamespace

    from modicum.jobs.training.objective import use_objective

    with pytest.raises(UnsupportedError, match="label_words judges answers and needs rows with candidates"):
        use_objective(SimpleNamespace(args=SimpleNamespace(seed=0)), "label_words")


def test_two_tasks_with_different_words_do_not_mix(tiny_model, tmp_path, monkeypatch):
    render = suite._choice("{sentence}", ("b", "a"))
    monkeypatch.setattr(suite, "TASKS", {**suite.TASKS, "turned": suite.Task("", None, render)})
    with pytest.raises(RecipeError, match="different label words"):
        run(tmp_path / "r", tiny_model, "label_words", eval_data="task:turned")


def test_a_run_writes_json(tiny_model, tmp_path):
    done = run(tmp_path / "r", tiny_model, "multiple_choice", task="polarity")
    assert 0 <= json.loads((done.folder / "record.json").read_text())["metrics"]["eval_accuracy"] <= 1


def test_questions_that_cannot_be_asked_are_left_out_and_the_others_keep_their_scorers(tmp_path):
    from modicum.errors import CheckpointError
    from modicum.jobs.training.answers import answer_rows

    tokenizer = byte_tokenizer()
    refuse = "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    path, knobs, notes = tmp_path / "rows.jsonl", {"max_new_tokens": 2, "metric": "own"}, []
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in ("ab", "xc", "de")))
    for choice in ("stop", "skip"):
        section = DataSection(path=str(path), on_bad_row=choice)
        if choice == "stop":
            with pytest.raises(CheckpointError, match="no x"):
                answer_rows(load_rows(section), tokenizer, section, "reward", knobs, training=True, note=notes.append)
            continue
        asked = answer_rows(load_rows(section), tokenizer, section, "reward", knobs, training=True, note=notes.append)
    assert len(asked) == 2 and "1 of 3 rows were left out" in notes[0]
    scores = [asked.scorers[question.answer](text) for question, text in zip(asked, "be")]
    assert scores == [1.0, 1.0]
