"""Hidden states of plain and wrapped prompts, from the recipe to the report."""

import json

import pytest
import torch

from modicum.errors import RecipeError
from modicum.evaluate.chat import ChatRequest, JudgeItem, Verdict, user
from modicum.evaluate.held_out import held_out
from modicum.evaluate.representation import hidden_states
from modicum.jobs import attack_data, execute, plan
from modicum.jobs.chat.local import LocalHF
from modicum.jobs.safety.suites import GoalSection
from modicum.recipe import parse
from modicum.report.runs import load
from modicum.report.sections.representation import representation
from support import byte_tokenizer, tiny_llama

GUIDELINE = "- {id: help, kind: safety, perspective: everybody, title: Help, text: Help who asks.}\n"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    tiny_llama(seed=3, initializer_range=0.3, max_position_embeddings=1024).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    for name in ("harmful", "harmless"):
        rows = [{"prompt": f"A {name} wish of number {i}"} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(parts, **more):
    goals, benign = ({"path": str(parts / f"{name}.jsonl"), "size": 10} for name in ("harmful", "harmless"))
    data = {
        "job": "represent", "targets": {"tiny": str(parts / "model")}, "suites": {"flip": "flip", "caesar": "caesar"},
        "goals": goals, "benign": benign,
    }  # fmt: skip
    return parse(data | more)


@pytest.mark.parametrize("position", ["prompt_end", "think_first"])
def test_a_cell_has_points_and_numbers_and_the_report_shows_them(parts, tmp_path, position):
    asked = recipe(parts, position=position)
    assert "1 targets × 60 prompts" in plan(asked)[0]
    run = execute(asked, tmp_path / "run", quiet=True)
    (cell,) = run.record["metrics"]["representation"]["cells"]
    assert set(cell["suites"]) == {"flip", "caesar"} and set(cell["points"]) == {"plain", "flip", "caesar"}
    assert 0 <= cell["distance"] <= 2 and 0 <= cell["suites"]["flip"]["auroc"] <= 1 and cell["layer"] == 1
    assert all(len(rows) == 10 for kinds in cell["points"].values() for rows in kinds.values())
    section = representation(load([run.folder]))
    assert "tiny" in str(section.body) and "second component" in str(section.body) and len(section.findings) == 1
    assert execute(asked, tmp_path / "run", quiet=True).record["metrics"] == run.record["metrics"]
    assert "wish" not in (run.folder / "record.json").read_text() + (run.folder / "cells.json").read_text()


def test_a_targets_guidelines_stand_before_every_prompt(parts, tmp_path):
    (tmp_path / "g.yaml").write_text(GUIDELINE)
    model = str(parts / "model")
    targets = {"plain": model, "guided": {"model": model, "guidelines": str(tmp_path / "g.yaml")}}
    asked = recipe(parts, targets=targets)
    assert plan(asked)
    plain, guided = execute(asked, tmp_path / "run", quiet=True).record["metrics"]["representation"]["cells"]
    assert plain["points"] != guided["points"]


def test_coordinates_are_those_of_the_states(parts, tmp_path):
    """Distances between the first two prompts, from the states themselves."""
    from modicum.evaluate.representation import fit_pca, project

    asked = recipe(parts)
    cell = execute(asked, tmp_path / "run", quiet=True).record["metrics"]["representation"]["cells"][0]
    model, tokenizer = tiny_llama(seed=3, initializer_range=0.3, max_position_embeddings=1024).eval(), byte_tokenizer()
    states = []
    for name, harmful in (("harmful", True), ("harmless", False)):
        goals = GoalSection(path=str(parts / f"{name}.jsonl"), size=10).load(harmful=harmful)
        rows = [LocalHF(model, tokenizer).tokens(ChatRequest(user(goal.text))) for goal in goals]
        one = [hidden_states(model, torch.tensor([r]), torch.ones(1, len(r)).long(), layers=[1])[0, 0] for r in rows]
        states.append(torch.stack(one))
    points = project(states[0], fit_pca(*states))
    assert torch.allclose(torch.tensor(cell["points"]["plain"]["harmful"]).double().abs(), points.abs(), atol=2e-4)


def test_outcomes_are_foretold_where_there_are_some_of_both(parts, tmp_path, monkeypatch):
    items = [JudgeItem(f"g{i}", "p", text) for i, text in enumerate(["I will not.", "Step one."] * 6)]
    monkeypatch.setattr(attack_data, "labelled", lambda name: (items, [False, True] * 6))
    asked = recipe(parts, judge="linear", max_new_tokens=4, folds=2)
    outcome = execute(asked, tmp_path / "run", quiet=True).record["metrics"]["representation"]["cells"][0]["outcome"]
    assert outcome["n"] == 30 and (outcome["unsafe"] in (0.0, 1.0) or "unsafe" in outcome)


def test_each_wrapper_has_an_area_of_its_own_and_requests_are_held_out_whole(parts, tmp_path, monkeypatch):
    """A judge that goes by the wrapper: over all of them the outcome is foretold, and within each there is none."""
    seen = []

    class ByWrapper:
        name, needs = "wrapper", frozenset()

        def judge(self, items):
            return [Verdict("harmful wish" in item.prompt) for item in items]

    def counted(*args, groups=None, **knobs):
        seen.append(groups)
        return real(*args, groups=groups, **knobs)

    real = held_out
    monkeypatch.setattr("modicum.evaluate.representation.held_out", counted)
    monkeypatch.setattr("modicum.jobs.chat.targets.open_judge", lambda section: (ByWrapper(), {}))
    asked = recipe(parts, judge="linear", max_new_tokens=1, folds=2)
    outcome = execute(asked, tmp_path / "run", quiet=True).record["metrics"]["representation"]["cells"][0]["outcome"]
    assert outcome["suites"] == {"plain": None, "flip": None, "caesar": None} and outcome["auroc"] > 0.9
    groups = next(groups for groups in seen if groups)
    assert len(groups) == 30 and all(groups.count(goal) == 3 for goal in groups)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": {"a": {"endpoint": "http://127.0.0.1:1/v1", "name": "m"}}}, "endpoint"),
        ({"suites": {"s": "persuasion"}}, "words goals anew"),
        ({"folds": 11}, "folds"),
        ({"depth": 0}, "depth"),
        ({"position": "middle"}, "position"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(parts, change, said):
    with pytest.raises(RecipeError, match=said):
        recipe(parts, **change)
