"""Jobs of safety against a real server: ``transformers serve`` on this machine, with SmolLM2 behind it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from benchmarks.speed.endpoint import free_port, server

from modicum.errors import CheckpointError
from modicum.evaluate.chat import ChatRequest, GenParams, user
from modicum.jobs import attack_data, execute
from modicum.jobs.chat.openai import OpenAICompatible
from modicum.jobs.loading.references import resolve_model
from modicum.recipe import parse

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(900)]
MODEL = "builtin:smollm2-135m-instruct"
GUIDELINE = """- {id: harm, kind: safety, perspective: others, title: Harm, text: Decline what would hurt somebody.}"""


@pytest.fixture(scope="module")
def served():
    """Address and name of the model; the server ends with the tests."""
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip("pip install 'modicum[serve]'")
    folder = str(resolve_model(MODEL))
    with server(folder) as url:
        yield url, folder


@pytest.fixture(autouse=True)
def packages():
    try:
        attack_data.goals("strongreject")
    except CheckpointError as error:
        pytest.skip(str(error))


def attack_recipe(served, **more):
    """An attack whose target and whose judge are the server; a typed decision generates nothing."""
    url, name = served
    target = {"endpoint": url, "name": name, "concurrency": 2}
    data = {
        "job": "attack", "targets": {"served": target}, "judge": {"name": "decision", "backend": target},
        "suites": {"plain": "plain", "flip": "flip"}, "goals": {"path": "strongreject", "size": 2},
        "benign": {"path": "benign_edgy", "size": 2}, "samples": 2, "early_stop": False, "max_new_tokens": 6,
    }  # fmt: skip
    return data | more


def test_the_probe_finds_how_the_server_samples(served):
    client = OpenAICompatible(*served)
    assert client.probe() and "sampling" in client.caps and "generation_config" in client.extra_body
    asked = ChatRequest(user("Write one sentence about anything you like."), GenParams(max_tokens=8, seed=5, n=3))
    (first,), (again,) = client.generate([asked]), client.generate([asked])
    assert len({choice.text for choice in first.choices}) > 1 and first.choices == again.choices
    greedy = ChatRequest(asked.messages, GenParams(temperature=0.0, max_tokens=8))
    one, two = client.generate([greedy, greedy])
    assert one.choices == two.choices and one.choices[0].finish_reason in ("length", "stop")
    gone = OpenAICompatible(f"http://127.0.0.1:{free_port()}/v1", served[1], retries=0)
    (result,) = gone.generate([ChatRequest(user("hi"))])
    assert result.error and "\n" not in result.error and not result.choices


def test_a_run_that_is_killed_against_the_server_loses_and_repeats_nothing(served, tmp_path):
    """Killed twice and run to its end, it has drawn and judged each answer once; the server decides."""
    recipe = tmp_path / "attack.yaml"
    recipe.write_text(json.dumps(attack_recipe(served)))
    command = [sys.executable, "-m", "modicum", "run", str(recipe), "--out", str(tmp_path / "run")]
    lines = tmp_path / "run" / "verdicts" / "served.jsonl"
    seen: list[bytes] = []
    for wanted in (1, 9):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        now = [line for line in lines.read_bytes().splitlines() if line.endswith(b"}")]
        assert now[: len(seen)] == seen and len(now) >= wanted
        seen = now
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = [json.loads(line) for line in lines.read_bytes().splitlines() if line.endswith(b"}")]
    keys = [line["key"] for line in done]
    assert len(keys) == len(set(keys)) and {json.loads(line)["key"] for line in seen} <= set(keys)
    # Greedy and two samples of two harmful prompts, greedy of two harmless ones, in two suites.
    assert len(keys) == 2 * (2 + 2 * 2 + 2)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    cells = record["metrics"]["safety"]["cells"]
    assert [len(cell["asr_any"]) for cell in cells] == [2, 2] and all(cell["unparsed"] == 0 for cell in cells)
    assert all(0 <= cell["greedy"]["value"] <= 1 for cell in cells)


def test_a_teacher_behind_the_server_makes_rows_and_is_asked_once(served, tmp_path):
    """A model that small keeps to no form, so its replies are counted and dropped; the answers of the data are rows."""
    url, name = served
    (tmp_path / "guidelines.yaml").write_text(GUIDELINE)
    (tmp_path / "helpful.jsonl").write_text('{"prompt": "Two and two?", "completion": "Four."}\n')
    target = {"endpoint": url, "name": name, "concurrency": 2}
    recipe = parse(
        {
            "job": "synthesize", "teacher": target, "judge": {"name": "decision", "backend": target}, "minimum": 0,
            "guidelines": str(tmp_path / "guidelines.yaml"), "illegal": {"path": "adv_bench", "size": 2}, "k": 2,
            "helpful": str(tmp_path / "helpful.jsonl"), "helpful_mode": "answer_only", "max_tokens": 8,
            "arms": ["srg", "rt"],
        }
    )  # fmt: skip
    run = execute(recipe, tmp_path / "run", quiet=True)
    found = run.record["metrics"]["synthesis"]
    assert found["generated"] == 4 == sum(found["kept"].values()) + sum(found["dropped"].values())
    assert found["given"] == 1 and {path.name for path in (run.folder / "rows").iterdir()}
    before = (run.folder / "replies.jsonl").read_bytes()
    assert len(before.splitlines()) == 4
    (run.folder / "record.json").write_text((run.folder / "record.json").read_text().replace('"done"', '"running"'))
    execute(recipe, tmp_path / "run", quiet=True)
    assert (run.folder / "replies.jsonl").read_bytes() == before
