from __future__ import annotations

import json

import pytest

from modicum.errors import RecipeError
from modicum.evaluate import paired_proportions, wilson
from modicum.jobs import evaluate as module
from modicum.jobs import execute, plan
from modicum.recipe import dump, parse
from modicum.record import read_log, read_record
from support import byte_tokenizer, tiny_llama

TASK = "reasoning-gym:chain_sum"


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "model"
    tiny_llama(seed=5, initializer_range=0.3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def qa(tmp_path):
    file = tmp_path / "qa.jsonl"
    rows = [{"prompt": "a" * (1 + i % 5), "completion": str(i)} for i in range(11)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def data(tiny_model, other_model, qa, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("héllo wörld", "x" * 70, "日本語")))
    return {
        "job": "evaluate",
        "models": {"one": str(tiny_model), "two": str(other_model)},
        "tasks": {
            "qa": {"kind": "exact_match", "data": {"path": str(qa)}, "max_new_tokens": 4, "batch_size": 3},
            "text": {"kind": "perplexity", "data": {"path": str(texts), "max_length": 32}, "batch_size": 2},
        },
    }


def cells(folder):
    found = read_record(folder)["metrics"]["cells"]
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in found]


def items(folder, name):
    return [json.loads(line) for line in (folder / "items" / f"{name}.jsonl").read_text().splitlines()]


def test_every_model_is_measured_on_every_task(data, tmp_path, capsys):
    execute(parse(data), tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert [(c["model"], c["task"], c["metric"], c["n"]) for c in record["metrics"]["cells"]] == [
        ("one", "qa", "exact_match", 11),
        ("one", "text", "bits_per_byte", 3),
        ("two", "qa", "exact_match", 11),
        ("two", "text", "bits_per_byte", 3),
    ]
    assert all(c["low"] <= c["value"] <= c["high"] and c["seconds"] >= 0 for c in record["metrics"]["cells"])
    assert [(p["a"], p["b"], p["task"]) for p in record["metrics"]["pairs"]] == [
        ("two", "one", "qa"),
        ("two", "one", "text"),
    ]
    assert len(read_log(tmp_path / "run", "cell")) == 4
    assert capsys.readouterr().err.count(" on qa: exact_match ") == 2
    byte_counts = [item["bytes"] for item in items(tmp_path / "run", "one.text")]
    assert byte_counts == [len("héllo wörld".encode()), 70, 9]
    # The byte-level tokenizer makes each byte a token, and all of them are scored.
    assert [item["tokens"] for item in items(tmp_path / "run", "one.text")] == byte_counts


def test_the_result_depends_neither_on_the_batch_size_nor_on_company(data, tmp_path):
    execute(parse(data), tmp_path / "a", quiet=True)
    for task in data["tasks"].values():
        task["batch_size"] = 50
    data["models"] = dict(reversed(data["models"].items()))
    execute(parse(data), tmp_path / "b", quiet=True)
    numbers = [
        {(c["model"], c["task"]): [c["value"], c["low"], c["high"]] for c in cells(tmp_path / run)} for run in "ab"
    ]
    assert numbers[0].keys() == numbers[1].keys()
    for key, found in numbers[0].items():
        assert found == pytest.approx(numbers[1][key], rel=1e-4)
    for name in ("one.qa", "two.qa"):
        assert items(tmp_path / "a", name) == items(tmp_path / "b", name)


def test_right_answers_are_counted_with_wilsons_interval_and_compared_in_pairs(data, tmp_path, monkeypatch):
    answers = {"one": [str(i) for i in range(11)], "two": [str(i) if i % 2 else "Wrong." for i in range(11)]}
    tokenizer = byte_tokenizer()
    asked = iter(answers.values())

    def generate(model, prompts, **_):
        return [tokenizer(f" {answer}.\n").input_ids for answer in next(asked)]

    monkeypatch.setattr("modicum.evaluate.generate", generate)
    del data["tasks"]["text"]
    execute(parse(data), tmp_path / "run", quiet=True)
    metrics = read_record(tmp_path / "run")["metrics"]
    assert [(c["value"], c["low"], c["high"]) for c in metrics["cells"]] == [wilson(11, 11)[:3], wilson(5, 11)[:3]]
    solved = [bool(i % 2) for i in range(11)]
    expected = paired_proportions(solved, [True] * 11)
    assert metrics["pairs"] == [
        {
            "a": "two", "b": "one", "task": "qa", "metric": "exact_match", "better": "higher", "unit": "share",
            "difference": expected.value, "low": expected.low, "high": expected.high, "n": 11,
        }
    ]  # fmt: skip


def test_the_pattern_takes_the_answer_out_of_what_surrounds_it(data, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    text = [f"The answer is {i}, I think." for i in range(11)]
    monkeypatch.setattr("modicum.evaluate.generate", lambda *_, **__: [tokenizer(t).input_ids for t in text])
    data["models"].pop("two")
    del data["tasks"]["text"]
    data["tasks"]["qa"]["answer"] = r"answer is (\d+)"
    execute(parse(data), tmp_path / "run", quiet=True)
    assert cells(tmp_path / "run")[0]["value"] == 1.0
    assert items(tmp_path / "run", "one.qa")[3]["answer"] == "3"


def test_a_task_of_reasoning_gym_judges_by_its_own_rules(data, tmp_path, monkeypatch):
    from modicum.jobs.data.rows import DataSection, load_rows

    rows = load_rows(DataSection(path=TASK, size=4, split="test")).rows
    tokenizer = byte_tokenizer()
    texts = [rows[0]["completion"], f"It is {rows[1]['completion']}", "", "no"]
    monkeypatch.setattr("modicum.evaluate.generate", lambda *_, **__: [tokenizer(t).input_ids for t in texts])
    data["models"].pop("two")
    data["tasks"] = {"sums": {"kind": "exact_match", "data": {"path": TASK, "size": 4, "split": "test"}}}
    execute(parse(data), tmp_path / "run", quiet=True)
    found = items(tmp_path / "run", "one.sums")
    assert [item["correct"] for item in found] == [True, False, False, False]
    assert 0 < found[1]["score"] < 1


class Killed(BaseException):
    """Like kill -9: nothing may depend on handling it."""


@pytest.mark.parametrize("survived", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_stopped_and_ends_the_same(data, tmp_path, monkeypatch, survived):
    execute(parse(data), tmp_path / "whole", quiet=True)
    measure, calls = module._measure, []

    def dying(*arguments):
        if len(calls) == survived:
            raise Killed
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(module, "_measure", dying)
    with pytest.raises(Killed):
        execute(parse(data), tmp_path / "killed", quiet=True)
    assert len(read_record(tmp_path / "killed")["metrics"].get("cells", [])) == survived
    counted = []
    monkeypatch.setattr(module, "_measure", lambda *a: (counted.append(a), measure(*a))[1])
    execute(parse(data), tmp_path / "killed", quiet=True)
    assert len(counted) == 4 - survived
    assert cells(tmp_path / "killed") == cells(tmp_path / "whole")
    for file in (tmp_path / "whole" / "items").iterdir():
        assert (tmp_path / "killed" / "items" / file.name).read_bytes() == file.read_bytes()


def test_a_cell_that_was_logged_but_whose_items_are_gone_is_measured_again(data, tmp_path):
    recipe = parse(data)
    execute(recipe, tmp_path / "run", quiet=True)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    (tmp_path / "run" / "record.json").write_text(json.dumps(record | {"status": "running"}))
    (tmp_path / "run" / "items" / "two.text.jsonl").unlink()
    before = cells(tmp_path / "run")
    execute(recipe, tmp_path / "run", quiet=True)
    assert cells(tmp_path / "run") == before


def test_a_run_of_version_0_1_0_that_was_killed_goes_on(data, tmp_path, monkeypatch):
    """Its cells say nothing of direction and unit, and its items of retrieval nothing of their place."""
    recipe, folder = parse(data), tmp_path / "run"
    execute(recipe, folder, quiet=True)
    whole = read_record(folder)["metrics"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert not any("better" in line for line in lines)  # the log has the form that it had
    lines = [line for line in lines if line.get("model") != "two"]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "record.json").write_text(json.dumps(read_record(folder) | {"status": "failed", "metrics": {}}))
    execute(recipe, folder, quiet=True)

    def timeless(found):
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    again = read_record(folder)["metrics"]
    assert timeless(again["cells"]) == timeless(whole["cells"]) and again["pairs"] == whole["pairs"]
    assert {row["better"] for row in again["cells"]} == {"higher", "lower"}


def test_perplexity_is_read_with_overlap_and_from_the_beginning_when_asked(data, tmp_path):
    task = data["tasks"]["text"]
    data["tasks"] = {
        "blocks": task,
        "overlap": task | {"stride": 4},
        "start": task | {"max_bytes": 2},
        "ppl": task | {"metric": "perplexity"},
    }
    data["models"].pop("one")
    execute(parse(data), tmp_path / "run", quiet=True)
    found = {cell["task"]: cell for cell in cells(tmp_path / "run")}
    assert found["overlap"]["value"] != found["blocks"]["value"]
    # Two bytes of "日" are no character, and of "héllo" they are one.
    assert [item["bytes"] for item in items(tmp_path / "run", "two.start")] == [1, 2, 0]
    assert found["ppl"]["value"] == pytest.approx(2 ** found["blocks"]["value"])


def test_perplexities_are_compared_in_bits_per_byte_which_tokenizers_share(data, tmp_path):
    data["tasks"] = {"ppl": data["tasks"]["text"] | {"metric": "perplexity"}}
    execute(parse(data), tmp_path / "run", quiet=True)
    metrics = read_record(tmp_path / "run")["metrics"]
    assert {cell["metric"] for cell in metrics["cells"]} == {"perplexity"}
    assert [pair["metric"] for pair in metrics["pairs"]] == ["bits_per_byte"]


def test_one_model_needs_no_name(data):
    data["model"] = next(iter(data.pop("models").values()))
    recipe = parse(data)
    assert list(recipe.models) == ["model"]
    assert parse(dump(recipe)) == recipe


def test_the_resolved_recipe_reads_back(data):
    recipe = parse(data)
    assert parse(dump(recipe)) == recipe


def test_models_and_local_data_identify_the_run(data):
    recipe = parse(data)
    assert list(recipe.inputs()) == [*data["models"].values(), *(t["data"]["path"] for t in data["tasks"].values())]


def test_the_plan_counts_the_work_without_doing_it(data):
    lines = "\n".join(plan(parse(data)))
    assert "qa: 11 answers of at most 4 tokens from each of 2 models" in lines
    assert "text: bits_per_byte of 3 documents" in lines
    assert "read one from" in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {}}, "models"),
        ({"baseline": "on"}, "baseline 'on' is not among the models. Did you mean 'one'?"),
        ({"models": {"a/b": "x"}}, "'a/b' cannot be a name"),
        ({"models": {"a": "x", "a.b": "y"}, "tasks": {"b.c": {}, "c": {}}}, "Rename one"),
        ({"level": 1.0}, "level"),
        ({"tasks": {"t": {"kind": "exact"}}}, "exact_match"),
        ({"tasks": {"t": {"answer": "("}}}, "no regular expression"),
        ({"tasks": {"t": {"kind": "perplexity", "stride": 1024}}}, "stride 1024 must be less"),
        ({"tasks": {"t": {"max_tokens": 3}}}, "max_tokens"),
    ],
)
def test_a_wrong_recipe_is_refused(data, change, message):
    for task in change.get("tasks", {}).values():
        task.setdefault("kind", "exact_match")
        task.setdefault("data", {"path": TASK})
    with pytest.raises(RecipeError) as error:
        parse(data | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("qa", "text", "holds text rows; a task of kind exact_match needs prompt and completion"),
        ("text", "qa", "holds completion rows; a task of kind perplexity needs text"),
    ],
)
def test_data_that_does_not_fit_the_task_is_refused(data, tmp_path, task, change, message):
    data["tasks"][task]["data"]["path"] = data["tasks"][change]["data"]["path"]
    with pytest.raises(RecipeError, match=message):
        execute(parse(data), tmp_path / "run", quiet=True)


def test_a_device_that_is_not_there_is_refused(data, tmp_path):
    with pytest.raises(RecipeError, match="device is 'gpu', which cannot be used here"):
        execute(parse(data | {"device": "gpu"}), tmp_path / "run", quiet=True)


def test_an_unknown_reference_fails_before_anything_is_written(data, tmp_path):
    data["models"]["two"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="There is no model folder"):
        execute(parse(data), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "items").exists()
