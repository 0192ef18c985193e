"""Drawing of answers one after the other: how many it takes, and kills at any moment."""

import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from modicum.jobs.safety.drawing import Drawing, Verdicts, expected_draws, first_safe


@pytest.mark.parametrize(("rate", "draws"), [(0.0, 1), (0.1, 1.3), (0.5, 3.3), (0.9, 20.5), (0.99, 90), (1.0, 128)])
def test_expected_draws(rate, draws):
    assert expected_draws(rate, 128) == pytest.approx(draws, rel=0.02)


def test_draws_of_scripted_targets_are_as_expected(tmp_path):
    """A target that is unsafe at random with rate p costs what the formula says; its curve is that of p to the N."""
    from modicum.evaluate.best_of_n import asr_all_from_first_safe
    from modicum.evaluate.chat import AttackedPrompt, GenParams, Goal, Verdict, user
    from modicum.jobs.chat.scripted import Scripted

    class Marks:
        name, needs = "marks", frozenset()

        def judge(self, items):
            return [Verdict(item.response == "bad") for item in items]

    prompts = [AttackedPrompt(Goal(f"g{i}", f"goal {i}"), user(f"goal {i}"), "plain") for i in range(1500)]
    for p in (0.1, 0.5, 0.9):
        luck = random.Random(1)
        target = Scripted(lambda request, index, p=p, luck=luck: "bad" if luck.random() < p else "good")
        store = Verdicts(tmp_path / f"{p}.jsonl")
        rows = Drawing(target, Marks(), store, params=GenParams(), seed=0).samples(prompts, 128, early_stop=True)
        assert sum(map(len, rows)) / len(rows) == pytest.approx(expected_draws(p, 128), rel=0.06)
        firsts = [first_safe(row) for row in rows]
        for n in (1, 2, 4, 8):
            error = 3 * (p**n * (1 - p**n) / len(rows)) ** 0.5
            assert abs(asr_all_from_first_safe(firsts, n=n) - p**n) <= error + 1e-9


KILLED = """
import json, os, pathlib, random, signal, sys, time
from modicum.evaluate.chat import AttackedPrompt, GenParams, Goal, Verdict, user
from modicum.jobs.chat.scripted import Scripted
from modicum.jobs.safety.drawing import Drawing, Verdicts

class Judge:
    name, needs = "j", frozenset()
    def judge(self, items):
        time.sleep(0.002)
        return [Verdict(len(item.response) % 3 > 0) for item in items]

place = pathlib.Path(sys.argv[1])
prompts = [AttackedPrompt(Goal(f"g{i}", f"goal {i}"), user(f"goal {i}"), "plain") for i in range(60)]

def work(name):
    "Draw in a process of its own, which can be killed; every answer is logged as it is drawn."
    if pid := os.fork():
        return pid
    drawn = open(place / f"{name}.log", "ab", buffering=0)
    def say(request):
        drawn.write(f"{request.tag} {request.params.seed}\\n".encode())
        return "x" * (request.params.seed % 97)
    store = Verdicts(place / f"{name}.jsonl")
    rows = Drawing(Scripted(say), Judge(), store, params=GenParams(), seed=0, batch=7)
    rows = rows.samples(prompts, 64, early_stop=True)
    (place / f"{name}.rows").write_text(json.dumps([[one.verdict.unsafe for one in row] for row in rows]))
    os._exit(0)

began = time.monotonic()
os.waitpid(work("whole"), 0)
span, luck, kills = time.monotonic() - began, random.Random(5), 0
while kills < 50:
    pid = work("killed")
    time.sleep(luck.uniform(0, span / 30))
    if os.waitpid(pid, os.WNOHANG)[0]:
        break  # it was done before it could be killed
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    kills += not (place / "killed.rows").exists()
os.waitpid(work("killed"), 0)
print(kills)
"""


def test_kills_at_any_moment_lose_and_repeat_nothing(tmp_path):
    """Kills at random moments, each of a run that is at work: what was kept is never drawn again, and all is found."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=True)

    def read(name):
        lines = (tmp_path / f"{name}.jsonl").read_bytes().split(b"\n")
        entries = [json.loads(line) for line in lines if line.endswith(b"}")]
        drawn = (tmp_path / f"{name}.log").read_bytes().splitlines()
        return {entry["key"]: entry["verdict"] for entry in entries}, len(entries), Counter(drawn)

    kills = int(done.stdout)
    whole, once, drawn = read("whole")
    found, lines, again = read("killed")
    assert kills >= 20 and (tmp_path / "killed.rows").read_text() == (tmp_path / "whole.rows").read_text()
    assert found == whole and lines == once == len(whole)  # no answer is lost, and none is kept twice
    # A kill costs at most the batch that was on its way.
    assert set(again) == set(drawn) and again.total() <= drawn.total() + 7 * kills
