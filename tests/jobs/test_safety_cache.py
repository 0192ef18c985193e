"""A warm cache of a synthesis makes no call and the same bytes; and equal rows are one."""

from __future__ import annotations

import json
from collections import Counter

from modicum.evaluate.chat import Goal, Verdict
from modicum.jobs import execute
from modicum.jobs.chat.scripted import Scripted
from modicum.jobs.safety_data import build_srg_rows, load_guidelines
from modicum.recipe import parse
from support import byte_tokenizer, tiny_llama

SAID = "<think>\nIt asks for {}.\nVerdict: {}\n</think>\n\n{}"


class Marks:
    name, needs = "marks", frozenset()

    def judge(self, items):
        return [Verdict(False, refusal=item.response.startswith("NO")) for item in items]


def say(request, index):
    harmful = "harmful" in request.tag
    return SAID.format(f"thing {index}", "refuse" if harmful else "comply", "NO, I decline." if harmful else "Here.")


def test_a_synthesis_that_is_run_again_asks_nobody_and_writes_the_same_bytes(tmp_path, monkeypatch):
    tiny_llama(max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("harmful", "harmless"):
        rows = [{"prompt": f"A {name} wish, number {i}"} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = Scripted(say)
    monkeypatch.setattr("modicum.jobs.chat.targets.open_target", lambda *a, **k: teacher)
    monkeypatch.setattr("modicum.jobs.chat.targets.open_judge", lambda section: (Marks(), {}))
    data = {
        "job": "synthesize", "teacher": str(tmp_path / "model"), "illegal": str(tmp_path / "harmful.jsonl"), "k": 2,
        "helpful": str(tmp_path / "harmless.jsonl"), "arms": ["srg", "rt"],
    }  # fmt: skip

    def made(**more):
        run = execute(parse(data | more), tmp_path / "run", quiet=True)
        return {file.name: file.read_bytes() for file in (run.folder / "rows").iterdir()}, teacher.calls

    first, calls = made()
    (tmp_path / "run/rows/srg.parquet").unlink()  # an output is gone: the run makes it again, from what is stored
    assert calls == 12 and made() == (first, 12)
    guidelines = tmp_path / "other.yaml"
    guidelines.write_text(
        "- {id: a, kind: safety, perspective: others, title: Of harm, text: Decline all of it now.}\n"
    )
    run = execute(parse(data | {"guidelines": str(guidelines)}), tmp_path / "other", quiet=True)
    assert teacher.calls == 24 and run.record["metrics"]["synthesis"]["generated"] == 12


def test_rows_of_the_same_words_are_one_and_counted():
    """Two requests that differ in case alone get the same words: the second row is a duplicate."""
    goals = [Goal("harmful-a", "Do a bad thing"), Goal("harmful-b", "do a BAD thing"), Goal("harmful-c", "Do another")]
    teacher = Scripted(lambda request: say(request, 0))
    rows, drops = build_srg_rows(goals, [], load_guidelines(), teacher=teacher, judge=Marks(), k=2, seed=0)
    assert [row["meta"]["id"] for row in rows] == ["harmful-a", "harmful-c"]
    assert drops == Counter(not_selected=3, duplicate=1) and len(rows) + sum(drops.values()) == 6
