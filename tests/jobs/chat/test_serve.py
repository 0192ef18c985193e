"""Jobs of safety against a real server: ``transformers serve`` on this machine, with SmolLM2 behind it."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from modicum.errors import CheckpointError
from modicum.evaluate.chat import ChatRequest, GenParams, user
from modicum.jobs import attack_data, execute
from modicum.jobs.chat.openai import OpenAICompatible
from modicum.jobs.loading.references import resolve_model
from modicum.recipe import parse

pytestmark = [pytest.mark.server, pytest.mark.slow]
MODEL = "builtin:smollm2-135m-instruct"


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Address and name of the model; the server ends with the tests."""
    if importlib.util.find_spec("fastapi") is None:
        pytest.skip("pip install 'modicum[serve]'")
    folder, port = resolve_model(MODEL), free_port()
    command = [sys.executable, "-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())"]
    options = [
        "serve",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    process = subprocess.Popen([*command, *options], stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                if process.poll() is not None:
                    pytest.fail(f"the server ended: {Path(log.name).read_text()[-600:]}")
                time.sleep(1)
        else:
            pytest.fail("the server did not start within four minutes")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(autouse=True)
def packages():
    try:
        attack_data.goals("strongreject")
    except CheckpointError as error:
        pytest.skip(str(error))


def attack_recipe(served, **more):
    url, name = served
    data = {
        "job": "attack", "targets": {"served": {"endpoint": url, "name": name, "concurrency": 2}},
        "suites": {"plain": "plain", "flip": "flip"}, "goals": {"path": "strongreject", "size": 3},
        "benign": {"path": "benign_edgy", "size": 3}, "samples": 3, "early_stop": False, "max_new_tokens": 8,
    }  # fmt: skip
    return data | more


def test_the_probe_finds_how_the_server_samples(served):
    client = OpenAICompatible(*served)
    assert client.probe() and "sampling" in client.caps and "generation_config" in client.extra_body
    asked = ChatRequest(user("Write one sentence about anything you like."), GenParams(max_tokens=12, seed=5, n=3))
    (first,), (again,) = client.generate([asked]), client.generate([asked])
    assert len({choice.text for choice in first.choices}) > 1 and first.choices == again.choices
    greedy = ChatRequest(asked.messages, GenParams(temperature=0.0, max_tokens=12))
    one, two = client.generate([greedy, greedy])
    assert one.choices == two.choices and one.choices[0].finish_reason in ("length", "stop")


def test_a_run_that_is_killed_against_the_server_loses_and_repeats_nothing(served, tmp_path):
    """Killed a few times at moments of its own, and run to its end, it judges each answer once."""
    recipe = tmp_path / "attack.yaml"
    recipe.write_text(json.dumps(attack_recipe(served)))
    command = [sys.executable, "-m", "modicum", "run", str(recipe), "--out", str(tmp_path / "run")]
    lines = tmp_path / "run" / "verdicts" / "served.jsonl"
    seen: list[bytes] = []
    for wanted in (1, 7, 13):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(1800):
            count = len(lines.read_bytes().splitlines()) if lines.exists() else 0
            if count >= wanted or process.poll() is not None:
                break
            time.sleep(0.1)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        now = [line for line in lines.read_bytes().splitlines() if line.endswith(b"}")]
        assert now[: len(seen)] == seen
        seen = now
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    done = [json.loads(line) for line in lines.read_bytes().splitlines() if line.endswith(b"}")]
    keys = [line["key"] for line in done]
    assert len(keys) == len(set(keys)) and {json.loads(line)["key"] for line in seen} <= set(keys)
    # Greedy and three samples of three harmful prompts, greedy of three harmless ones, in two suites.
    assert len(keys) == 2 * (3 + 3 * 3 + 3)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert [len(cell["asr_any"]) for cell in record["metrics"]["safety"]["cells"]] == [2, 2]


def test_a_teacher_behind_the_server_makes_rows_or_says_why_not(served, tmp_path):
    url, name = served
    recipe = parse(
        {
            "job": "synthesize", "teacher": {"endpoint": url, "name": name, "concurrency": 2}, "minimum": 0,
            "illegal": {"path": "adv_bench", "size": 2}, "helpful": {"path": "benign_expanded", "size": 2}, "k": 2,
            "max_tokens": 24, "arms": ["srg", "rt"],
        }
    )  # fmt: skip
    run = execute(recipe, tmp_path / "run", quiet=True)
    found = run.record["metrics"]["synthesis"]
    assert found["generated"] == 8 == sum(found["kept"].values()) + sum(found["dropped"].values())
    before = (run.folder / "replies.jsonl").read_bytes()
    (run.folder / "record.json").write_text((run.folder / "record.json").read_text().replace('"done"', '"running"'))
    execute(recipe, tmp_path / "run", quiet=True)
    assert (run.folder / "replies.jsonl").read_bytes() == before


def test_typed_decisions_of_the_server_judge_answers(served, tmp_path):
    url, name = served
    judge = {"name": "decision", "backend": {"endpoint": url, "name": name}}
    recipe = attack_recipe(served, judge=judge, samples=1, temperature=0, suites={"plain": "plain"})
    cell = execute(parse(recipe), tmp_path / "run", quiet=True).record["metrics"]["safety"]["cells"][0]
    assert cell["unparsed"] == 0 and 0 <= cell["greedy"]["value"] <= 1


def test_a_server_that_goes_away_is_one_line(served):
    client = OpenAICompatible(f"http://127.0.0.1:{free_port()}/v1", served[1], retries=0)
    (result,) = client.generate([ChatRequest(user("hi"))])
    assert result.error and "\n" not in result.error and not result.choices
