"""Mixtures: ratios, draws, filters by every kind of scorer, and what is refused in one line."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.evaluate.rows import Rows
from modicum.jobs import plan
from modicum.jobs.data.mixture import mixed_rows
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.data.scoring import of_function, score_pairs
from modicum.objectives.mixing import distinct_names, drawn, largest_total, split_by_ratio
from modicum.recipe import dump, parse
from support import byte_tokenizer, tiny_llama

PARTS = {"helpful": "task:instructions", "honest": "task:unanswerable"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))


def section(size=None, split="train", parts=PARTS, **mix):
    return DataSection.model_validate({"mix": {"parts": parts, **mix}, "size": size, "split": split})


def counts(rows):
    return Counter(row["dimension"] for row in rows.rows)


def test_rows_come_by_ratio_without_one_twice_and_repeat_by_seed():
    notes = []
    rows = load_rows(section(40, ratios=[3, 1]), note=notes.append)
    assert rows.kind == "preference" and counts(rows) == {"helpful": 30, "honest": 10}
    assert len({row["prompt"] for row in rows.rows}) == 40
    assert notes == ["mix:helpful+honest: 30 of 500 rows of helpful, 10 of 500 rows of honest"]
    assert rows == load_rows(section(40, ratios={"honest": 1, "helpful": 3}))
    assert rows != load_rows(section(40, ratios=[3, 1]), seed=1)
    assert [row["dimension"] for row in rows.rows] != sorted(row["dimension"] for row in rows.rows)
    test = load_rows(section(40, split="test"))
    assert not {row["prompt"] for row in test.rows} & {row["prompt"] for row in rows.rows}


def test_without_a_size_as_much_is_taken_as_the_ratios_allow():
    parts = PARTS | {"honest": {"path": "task:unanswerable", "size": 20}}
    assert counts(load_rows(section(parts=parts, ratios=[3, 1]))) == {"helpful": 60, "honest": 20}
    again = load_rows(section(80, parts=parts, repeat=True))
    assert counts(again) == {"helpful": 40, "honest": 40}
    assert {*Counter(row["prompt"] for row in again.rows if row["dimension"] == "honest").values()} == {2}
    with pytest.raises(RecipeError, match="mix: honest has 20 rows, and its share of 80 is 40"):
        load_rows(section(80, parts=parts))


@pytest.mark.parametrize("sizes", [(7, 9, 4), (1, 1, 1), (50, 3, 20)])
@pytest.mark.parametrize("ratios", [(1, 1, 1), (0.5, 0.3, 0.2), (3, 0, 1)])
def test_the_largest_total_fits_and_a_round_more_does_not(sizes, ratios):
    total = largest_total(sizes, ratios)
    assert all(count <= size for count, size in zip(split_by_ratio(total, ratios), sizes))
    assert any(count > size for count, size in zip(split_by_ratio(total + 10, ratios), sizes))


def test_draws_are_named():
    assert sorted(drawn(5, 5, 0, "a")) == [0, 1, 2, 3, 4] and drawn(5, 3, 0, "a") == drawn(5, 5, 0, "a")[:3]
    assert drawn(50, 50, 0, "a") != drawn(50, 50, 0, "b") and drawn(0, 3, 0, "a") == []
    assert sorted(drawn(2, 4, 0, "a")) == [0, 0, 1, 1]


@pytest.mark.parametrize("names", [("a", "a "), ("Ada", " ada"), ("a b", "a  b"), ("a", " ")])  # H17
def test_names_that_clash_are_refused(names):
    with pytest.raises(RecipeError, match="have one name. Rename one|cannot be the name"):
        distinct_names(names)
    with pytest.raises(ValueError, match="have one name|cannot be the name"):
        section(parts=dict.fromkeys(names, "task:instructions"))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"ratios": [1, -1]}, r"ratios are \[1.0, -1.0\], expected numbers of at least 0 that do not sum to 0"),
        ({"ratios": [0, 0]}, "expected numbers of at least 0 that do not sum to 0"),
        ({"ratios": [1]}, "1 ratios for 2 parts"),
        ({"ratios": {"helpful": 1, "harmless": 2}}, "ratios are of helpful, harmless, expected helpful, honest"),
        ({"parts": {"a": {"mix": PARTS}}}, "part 'a' is a mixture itself"),
        ({"parts": {}}, "at least 1 item"),
        ({"filter": {"scorer": {"file": "f", "model": "m"}}}, "got file and model, expected one of"),
        ({"filter": {"scorer": {}}}, "got none, expected one of"),
        ({"filter": {"scorer": "x.jsonl", "rank": "most"}}, "Input should be 'agree', 'min', 'mean' or 'gated'"),
        ({"filter": {"scorer": "x.jsonl", "keep": 0}}, "greater than 0"),
        ({"rounds": {"count": 1}}, "greater than or equal to 2"),
    ],
)
def test_mixtures_that_cannot_be_are_refused_as_recipes(mix, message):
    recipe = {"job": "train", "model": "m", "data": {"mix": {"parts": PARTS, **mix}}}
    with pytest.raises(RecipeError, match=message) as refused:
        parse(recipe)
    assert "\n" not in str(refused.value)


def test_a_recipe_with_a_mixture_reads_itself_back_and_knows_its_files(tmp_path):
    file, scores = tmp_path / "a.jsonl", tmp_path / "s.jsonl"
    mix = {"a": {"path": str(file)}, "b": "task:instructions", "filter": {"scorer": str(scores)}}
    file.write_text("")
    recipe = parse({"job": "train", "model": "m", "objective": "dpo", "data": {"mix": mix}})
    assert recipe.data.path == "mix:a+b" and parse(dump(recipe)) == recipe
    assert {str(file), str(scores)} <= {*recipe.inputs()}
    with pytest.raises(RecipeError, match="expected a path or a mix, and not both"):
        parse({"job": "train", "model": "m", "data": {"mix": mix, "path": "x"}})


# Filters


def pairs(n=4):
    return [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(n)]


@pytest.fixture
def files(tmp_path):
    for name in ("one", "two"):
        rows = [row | {"prompt": f"{name} {row['prompt']}"} for row in pairs()]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("one", "two")}


MARGINS = ((0.5, 0.2, 0.1), (0.9, -0.1, 0.4), (0.2, 0.2, 0.2), (-0.3, 0.8, 0.9))  # H7


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 2]),
        ({"rank": "min", "keep": 0.5}, [0, 2]),
        ({"rank": "mean", "keep": 0.5}, [1, 3]),
        ({"rank": "gated", "weights": [1, 0, 0], "keep": 0.25}, [1]),
    ],
)
@pytest.mark.parametrize("by", ["file", "function"])
def test_pairs_are_kept_by_what_a_file_or_a_function_says(settings, kept, by, files, tmp_path):
    if by == "file":
        lines = [
            {"prompt": f"{name} p{i}", "answer": f"{side}{i}", "scores": [x if side == "c" else 0.0 for x in row]}
            for name in files
            for i, row in enumerate(MARGINS)
            for side in "cr"
        ]
        scorer = tmp_path / "scores.jsonl"
        scorer.write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = settings | {"scorer": str(scorer)}
    else:
        code = tmp_path / "mine.py"
        code.write_text(
            f"MARGINS = {MARGINS}\n\ndef score(prompt, answer):\n    row = MARGINS[int(answer[1:])]\n"
            "    return {'abc'[i]: x if answer[0] == 'c' else 0 for i, x in enumerate(row)}\n"
        )
        settings = settings | {"scorer": f"{code}:score"}
    notes = []
    rows = load_rows(section(parts=files, filter=settings), note=notes.append)
    for name in files:
        found = sorted(int(row["prompt"][-1]) for row in rows.rows if row["dimension"] == name)
        assert found == kept
    assert f"mix: the filter keeps {len(kept)} of 4 pairs of one" in notes[0]


@pytest.mark.parametrize(
    ("answer", "heads", "message"),
    [
        ([1.0, float("nan")], None, r"the pairs, row 2 \('p2'\), chosen: head 1 of the scorer returned NaN"),  # H17
        ([1.0, float("inf")], None, "returned inf"),
        ([1.0], None, "row 2 .*: the scorer returned 1 heads, expected 2"),
        ([1.0, 2.0], 3, "row 0 .*: the scorer returned 2 heads, expected 3"),
        ([], None, "returned 0 heads, expected 2|expected one or more"),
        ([1.0, "high"], None, "head 1 of the scorer returned 'high', expected a number"),
        ([1.0, True], None, "returned True, expected a number"),
        (None, None, "returned None|expected a number"),
        ({"a": 1.0}, ["a", "b"], "no head 'b'; it has a"),
    ],
)
def test_scores_that_say_nothing_are_refused_with_their_row(answer, heads, message):
    usual = {"a": 1.0, "b": 2.0} if isinstance(answer, dict) else [1.0, 2.0]
    scorer = of_function(lambda prompt, _: answer if prompt == "p2" else usual)
    with pytest.raises(RecipeError, match=message) as refused:
        score_pairs(pairs(), scorer, heads=heads)
    assert "\n" not in str(refused.value)


def test_gates_of_a_scorer_weigh_its_heads():
    scorer = of_function(lambda prompt, answer: {"scores": [answer == "c0", answer == "c1"], "gates": [0.25, 0.75]})
    with pytest.raises(RecipeError, match="expected a number"):
        score_pairs(pairs(2), scorer)
    scorer = of_function(lambda _, answer: {"scores": [float(answer == "c0"), 1.0], "gates": [0.25, 0.75]})
    assert score_pairs(pairs(2), scorer) == ([[1.0, 0.0], [0.0, 0.0]], [[0.25, 0.75]] * 2)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("none.jsonl", "Cannot read the scores none.jsonl"),
        ("none.py:score", "There is no file none.py"),
        ({"function": "json:nothing"}, "cannot be loaded: .*nothing"),
        ({"function": "no_such_module:f"}, "cannot be loaded"),
    ],
)
def test_scorers_that_are_not_there_are_refused(scorer, message, files):
    with pytest.raises(ModicumError, match=message):
        load_rows(section(parts=files, filter={"scorer": scorer}))


def test_an_answer_without_scores_and_a_filter_that_keeps_nothing_are_refused(files, tmp_path):
    scores = tmp_path / "scores.jsonl"
    scores.write_text(json.dumps({"prompt": "one p0", "answer": "c0", "scores": [1]}) + "\n")
    with pytest.raises(RecipeError, match="has no scores of the answer 'r0' to 'one p0'"):
        load_rows(section(parts=files, filter={"scorer": str(scores)}))
    scores.write_text('{"prompt": 1}\n')
    with pytest.raises(CheckpointError, match="line 1: expected prompt, answer and scores"):
        load_rows(section(parts=files, filter={"scorer": str(scores)}))
    lines = [{"prompt": "p", "answer": "c", "scores": [score], "note": note} for note, score in enumerate((1, 1, 2))]
    scores.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(CheckpointError, match="line 3: the answer 'c' to 'p' has other scores in an earlier line"):
        load_rows(section(parts=files, filter={"scorer": str(scores)}))
    code = tmp_path / "flat.py"
    code.write_text("def score(prompt, answer):\n    return 0.0\n")
    with pytest.raises(RecipeError, match="the filter keeps none of the 4 pairs of one"):
        load_rows(section(parts=files, filter={"scorer": f"{code}:score"}))
    with pytest.raises(RecipeError, match="mix: one: rank 'gated' needs a weight for each scorer"):
        load_rows(section(parts=files, filter={"scorer": f"{code}:score", "rank": "gated"}))


def test_parts_of_different_kinds_are_refused(tmp_path, files):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with pytest.raises(RecipeError, match="rows of one kind, got one: preference, other: completion"):
        load_rows(section(parts={"one": files["one"], "other": str(file)}))


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_llama(initializer_range=0.3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_linear_heads_are_trained_on_other_prompts_and_remembered(base, monkeypatch):
    settings = {"scorer": {"heads_of": base}, "rank": "mean", "keep": 0.5}
    parts = {name: {"path": path, "size": 60} for name, path in PARTS.items()}
    notes = []
    rows = load_rows(section(parts=parts, filter=settings), note=notes.append)
    assert counts(rows) == {"helpful": 20, "honest": 20}
    assert "the head of helpful, trained on 20 pairs, agrees with" in notes[0] and "of 40 others" in notes[0]
    monkeypatch.setattr("modicum.jobs.data.scoring_models.load_model", None)  # all states are known by now
    assert load_rows(section(parts=parts, filter=settings)) == rows
    with pytest.raises(RecipeError, match="mix: helpful has 12 pairs, of which 4 would train its head; expected 8"):
        few = {name: {"path": path, "size": 12} for name, path in PARTS.items()}
        load_rows(section(parts=few, filter=settings))


def test_heads_read_each_answer_once_however_many_runs_ask(base, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from modicum.jobs.data import scoring_models

    usual, read = scoring_models._states, []
    monkeypatch.setattr(
        scoring_models, "_states", lambda *given: read.extend(map(json.dumps, given[2])) or usual(*given)
    )
    parts = {name: {"path": path, "size": 60} for name, path in PARTS.items()}
    asked = section(parts=parts, filter={"scorer": {"heads_of": base}, "rank": "mean", "keep": 0.5})
    with ThreadPoolExecutor(2) as pool:
        first, second = (each.result() for each in [pool.submit(load_rows, asked) for _ in range(2)])
    assert first == second and len(read) == len({*read}) == 240


def test_heads_of_a_part_learn_what_it_prefers():
    from modicum.jobs.data import scoring_models
    from modicum.jobs.data.section import ScorerSection

    rng = torch.Generator().manual_seed(0)
    rows = {
        "long": [{"prompt": f"p{i}", "chosen": "c" * (9 + i % 5), "rejected": "r" * (1 + i % 5)} for i in range(60)]
    }

    def states(_what, _reference, asked, _compute):
        noise = torch.randn(len(asked), 6, generator=rng)
        return [[float(len(answer)), *row] for (_, answer), row in zip(asked, noise.tolist())]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_models, "_remembered", states)
        scorer, rest = scoring_models.trained_heads(ScorerSection(heads_of="x"), rows, seed=0, note=print)
        margins, _ = score_pairs(rest["long"], scorer)
    assert len(rest["long"]) == 40 and all(margin > 0 for (margin,) in margins)


def test_a_local_classifier_scores(tmp_path, files):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_labels=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "rm")
    byte_tokenizer().save_pretrained(tmp_path / "rm")
    settings = {"scorer": {"model": str(tmp_path / "rm"), "batch_size": 3}, "rank": "mean", "keep": 0.5}
    rows = load_rows(section(parts=files, filter=settings))
    assert counts(rows) == {"one": 2, "two": 2}
    import shutil

    tiny_llama().save_pretrained(tmp_path / "lm")
    shutil.copy(tmp_path / "rm" / "tokenizer.json", tmp_path / "lm")
    settings["scorer"]["model"] = str(tmp_path / "lm")
    with pytest.raises(CheckpointError, match="no model that classifies sequences: it has no score.weight"):
        load_rows(section(parts=files, filter=settings))


def test_an_evaluation_on_a_mixture_tells_its_dimensions(base, tmp_path):
    from modicum.jobs import execute
    from modicum.record import read_record

    task = {"kind": "pairs", "data": {"mix": dict(PARTS), "size": 6, "split": "test"}}
    recipe = parse({"job": "evaluate", "model": base, "tasks": {"both": task}})
    execute(recipe, tmp_path / "run", quiet=True)
    [cell] = read_record(tmp_path / "run")["metrics"]["cells"]
    assert {*cell["dimensions"]} == {*PARTS} and cell["value"] == pytest.approx(
        sum(cell["dimensions"].values()) / 2, abs=1e-5
    )


def test_mixed_rows_is_a_function_of_its_own():
    found = mixed_rows(section(4), section(4).mix, seed=0, note=lambda _: None)
    assert isinstance(found, Rows) and len(found) == 4


def test_a_check_asks_no_model_for_scores_and_says_so(base, monkeypatch):
    monkeypatch.setattr("modicum.jobs.data.scoring_models.load_model", None)
    parts = {name: {"path": path, "size": 60} for name, path in PARTS.items()}
    mix = {"parts": parts, "filter": {"scorer": {"heads_of": base}}}
    recipe = {"job": "train", "model": base, "objective": "dpo", "data": {"mix": mix, "size": 20, "max_length": 400}}
    told = plan(parse(recipe))
    assert any("known once its model has scored them" in line for line in told)
