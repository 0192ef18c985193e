"""The job that compares policies, and its report."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from modicum.errors import ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.jobs.coordinate import differences
from modicum.recipe import parse, read, shipped
from modicum.record import read_record
from modicum.report import write

SMALL = {
    "job": "coordinate",
    "application": {"name": "tracking", "agents": 4, "targets": 5},
    "policies": ["ma_spl", {"name": "osg", "scale": 100.0}, "last_greedy", "random"],
    "graphs": ["ring", "star"],
    "hints": [0, 2],
    "rounds": 8,
    "seeds": 2,
    "steps": [10, 1000],
    "frames": 4,
}
KEPT = ("results.json", "frames.json", "animation.gif")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coordinate") / "run"
    execute(parse(SMALL), folder, quiet=True)
    return folder


def test_every_policy_plays_on_the_same_worlds(done):
    results = json.loads((done / "results.json").read_text())
    labels = [(cell["graph"], cell["label"]) for cell in results["cells"]]
    assert labels == [
        ("ring", "ma_spl"),
        ("ring", "ma_spl, hint 2"),
        ("ring", "osg, scale 100.0"),
        ("ring", "last_greedy"),
        ("ring", "last_greedy, hint"),
        ("ring", "random"),
        ("star", "ma_spl"),
        ("star", "ma_spl, hint 2"),
    ]
    spl = results["cells"][0]
    assert len(spl["utility"]) == 2 and spl["step"] in (10, 1000) and set(spl["tuning"]) == {"10", "1000"}
    assert spl["bytes"] == 8 * 8 * 2 * 4 * 4 * 24 and spl["evaluations"] and len(spl["ratio"]) == 2
    assert results["cells"][2]["step"] is None and "tuning" not in results["cells"][2]
    assert len(results["differences"]) == 7 and results["differences"][0]["from"] == "ma_spl"
    assert read_record(done)["outputs"]["results"] == "results.json"


def test_an_interrupted_comparison_goes_on_with_the_same_bytes(done, tmp_path, monkeypatch):
    from modicum.jobs import coordinate

    calls = []
    play = coordinate.Comparison.play

    def stops(self, graph, variant, tuned):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(variant.label)
        return play(self, graph, variant, tuned)

    monkeypatch.setattr(coordinate.Comparison, "play", stops)
    with pytest.raises(KeyboardInterrupt):
        execute(parse(SMALL), tmp_path / "run", quiet=True)
    monkeypatch.undo()
    again = []
    monkeypatch.setattr(
        coordinate.Comparison, "play", lambda self, g, v, t: (again.append(v.label), play(self, g, v, t))[1]
    )
    execute(parse(SMALL), tmp_path / "run", quiet=True)
    assert len(calls) == 3 and len(again) == 5
    for name in KEPT:
        assert (tmp_path / "run" / name).read_bytes() == (done / name).read_bytes(), name


DIES = """
import os, signal, sys
from modicum.jobs import coordinate, execute
from modicum.recipe import parse
play, calls = coordinate.Comparison.play, []
def dies(*given):
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return play(*given)
coordinate.Comparison.play = dies
execute(parse(__import__("json").loads(sys.argv[1])), sys.argv[2], quiet=True)
"""


def test_a_killed_comparison_goes_on_with_the_same_bytes(done, tmp_path):
    command = [sys.executable, "-c", DIES, json.dumps(SMALL), str(tmp_path / "run")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "run" / "cells").glob("*play*"))) == 3
    execute(parse(SMALL), tmp_path / "run", quiet=True)
    for name in KEPT:
        assert (tmp_path / "run" / name).read_bytes() == (done / name).read_bytes(), name


def test_the_report_moves_without_script_or_network(done):
    page = write([done]).read_text()
    assert page.count("<animate ") > 20 and "<script" not in page and "http" not in re.sub(r"http-equiv", "", page)
    charts = ("Utility, ring graph", "Regret, ring graph", "a greedy that sees the objective")
    for text in ("Coordination", *charts, "paired differences", "β = ", "hint 2", "Steps"):
        assert text in page


def test_the_plan_tells_rounds_bytes_and_memory():
    lines = "\n".join(plan(parse(SMALL)))
    for text in (
        "4 agents with 96 actions",
        "8 variants",
        "rounds with a hint play up to 2 more, 576 evaluations and messages of 3 rounds in all",
        "evaluations",
        "kB",
        "MB",
        "graph ring: 4 links, β = 0.333, 6.1 kB",
    ):
        assert text in lines


def test_of_a_file_of_many_tensors_only_the_values_are_read_and_few_are_named(tmp_path):
    from modicum.submodular.file_world import FileWorld

    save_file({f"t{i}": torch.zeros(0) for i in range(3000)}, tmp_path / "v.safetensors")
    with pytest.raises(ModicumError, match=r"holds t0, t1, t10, t100, t1000, …, expected V") as caught:
        FileWorld(str(tmp_path / "v.safetensors"), [2, 2])
    assert "\n" not in str(caught.value)


def test_values_of_a_file(tmp_path):
    V = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(0))
    save_file({"V": V}, tmp_path / "v.safetensors")
    recipe = SMALL | {
        "application": {"name": "objective", "path": str(tmp_path / "v.safetensors"), "blocks": [2, 2]},
        "policies": ["ma_osma", "oracle_greedy"],
        "graphs": ["complete"],
        "rounds": 6,
    }
    run = execute(parse(recipe), tmp_path / "run", quiet=True)
    cells = json.loads((run.folder / "results.json").read_text())["cells"]
    assert [cell["label"] for cell in cells] == ["ma_osma", "oracle_greedy"]
    # Four joint moves are few: the best of all is known, and regret against it is drawn.
    assert {cell["optimum"] for cell in cells} == {"exact"}
    assert all(
        regret[-1] == pytest.approx(cell["regret"][i], abs=1e-5)
        for cell in cells
        for i, regret in enumerate(cell["course"]["regret"])
    )
    page = write([run.folder]).read_text()
    assert "Regret, complete graph" in page and "the best of all joint moves would have had" in page
    assert not (run.folder / "frames.json").exists() and "no prediction" in run.record["notes"][0]
    with pytest.raises(ModicumError, match="rounds is 9, but the file has enough for 6"):
        plan(parse(recipe | {"rounds": 9}))
    with pytest.raises(ModicumError, match="rounds is 9, but the file has enough for 6"):
        execute(parse(recipe | {"rounds": 9}), tmp_path / "long", quiet=True)
    for change, message in (
        ({"blocks": [3, 2]}, "blocks cover 5 elements"),
        ({"path": str(tmp_path / "none.safetensors")}, "Cannot read"),
    ):
        with pytest.raises(ModicumError, match=message):
            plan(parse(recipe | {"application": recipe["application"] | change}))


def test_needs_of_data_selection(tmp_path):
    recipe = SMALL | {
        "application": {"name": "selection", "workers": 3, "similarity": [[1, 0.2, 0], [0.1, 1, 0], [0, 0, 1]]},
        "policies": ["ma_spl", "odm", "fixed", "random"],
        "graphs": ["ring"],
    }
    assert "2 of them tuned" not in plan(parse(recipe))[1] and "3 of them tuned" in plan(parse(recipe))[1]
    run = execute(parse(recipe), tmp_path / "run", quiet=True)
    assert {cell["label"] for cell in run.record["metrics"]["coordination"]["cells"]} == {
        "ma_spl", "ma_spl, hint 2", "odm", "fixed", "random",
    }  # fmt: skip
    results = json.loads((run.folder / "results.json").read_text())
    cells = {cell["label"]: cell for cell in results["cells"]}
    assert results["domains"] == ["0", "1", "2"]
    assert list(cells["fixed"]["tuning"]) == ["-1", "0", "1", "2"] and cells["fixed"]["knob"] == "favourite"
    chosen = cells["odm"]["choices"]
    assert chosen["rounds"] == list(range(1, 9)) and [len(row) for row in chosen["shares"]] == [8, 8, 8]
    assert all(sum(shares) == pytest.approx(1, abs=1e-5) for shares in zip(*chosen["shares"]))
    page = write([run.folder]).read_text()
    for text in ("Domains under odm, ring graph", "1 further picture", "Utility by favourite", 'class="band'):
        assert text in page


def test_a_ragged_similarity_is_one_line():
    ragged = {"name": "selection", "workers": 2, "similarity": [[1, 0], [0]]}
    with pytest.raises(ModicumError, match="similarity: .* is no array. Expected numbers, in rows of one length"):
        plan(parse(SMALL | {"application": ragged}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"application": "sailing"}, "application: expected one of tracking, selection, objective"),
        ({"application": {"name": "tracking", "agents": 0}}, "agents"),
        ({"application": {"name": "tracking", "fish": 0}}, "unknown key"),
        ({"policies": ["ma_spll"]}, "Did you mean 'ma_spl'"),
        ({"policies": [{"name": "ma_spl", "eta": 0}]}, "eta"),
        ({"policies": [{"name": "ma_spl", "speed": 1}]}, "unknown key 'speed'"),
        ({"policies": []}, "policies"),
        ({"graphs": ["torus"]}, "graphs"),
        ({"rounds": 1}, "rounds"),
        ({"application": "selection"}, "give either similarity or packages"),
        ({"drop": 2}, "drop"),
        ({"policies": ["ma_spl", {"name": "ma_spl"}]}, "ma_spl stands twice with the same knobs"),
    ],
)
def test_a_wrong_recipe_is_refused(change, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse(SMALL | change)


def test_missing_tracks_are_found_by_check():
    with pytest.raises(ModicumError, match="Cannot read"):
        plan(parse(SMALL | {"application": {"name": "tracking", "tracks": "no-such.csv"}}))


def test_check_refuses_what_cannot_be_played(tmp_path):
    with pytest.raises(ModicumError, match="delay is 3, but RAG's agents wait"):
        plan(parse(SMALL | {"policies": ["rag"], "delay": 3}))
    (tmp_path / "tracks.csv").write_text("time,id,x,y\n0,a,0,0\n100,a,1,1\n")
    tracks = {"name": "tracking", "agents": 2, "tracks": str(tmp_path / "tracks.csv"), "step": 10}
    with pytest.raises(ModicumError, match="rounds is 11, but the file has enough for 10"):
        plan(parse(SMALL | {"application": tracks, "rounds": 11}))
    execute(parse(SMALL | {"application": tracks, "policies": ["random"], "rounds": 10}), tmp_path / "run", quiet=True)


def test_differences_are_paired():
    cells = [
        {"graph": "g", "label": label, "utility": values} for label, values in (("a", [1.0, 3.0]), ("b", [2.0, 4.0]))
    ]
    (found,) = differences(cells)
    assert found["value"] == found["low"] == found["high"] == 1.0


def test_shipped_recipes_are_valid():
    for name in ("tracking", "tracking-csv", "data-selection"):
        assert name in shipped() and parse(read(name)).job == "coordinate"


def test_packages_of_the_standard_library_are_domains():
    names = ["json", "email", "unittest"]
    recipe = SMALL | {"application": {"name": "selection", "packages": names}, "policies": ["random"]}
    table = parse(recipe).application.world()([0]).similarity
    # What a package is needed for is served best by its own text.
    assert table.argmax(1).tolist() == [0, 1, 2] and float(table.diagonal().min()) > 0
    with pytest.raises(ModicumError, match="'nosuch' is no package"):
        plan(parse(recipe | {"application": {"name": "selection", "packages": ["nosuch"]}}))
