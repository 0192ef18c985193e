"""Cost of drawing answers: samples that share one reading of their prompt, early stopping, judged items from a cache,
and clients of a server.

    PEERS=/venv/with/garak/bin/python python -m benchmarks.speed.sampling [--rounds 5] [--parts samples endpoint ...]

Writes ``benchmarks/results/sampling-speed.json``. Ways of sampling take turns in one run and are compared by processor
time on one thread, so that other work on the machine is busy for all of them. Clients of a server are compared by the
clock, which wants a machine that does nothing else; see :mod:`benchmarks.speed.endpoint` for what that part needs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import origin
from benchmarks.speed.endpoint import endpoint

RESULTS = Path(__file__).parents[1] / "results" / "sampling-speed.json"
PROMPT, NEW, SAMPLES = 300, 12, 8


def spent(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def samples(rounds: int) -> dict[str, Any]:
    """Draw 8 samples of a prompt of 300 tokens in three ways."""
    from modicum.evaluate.generation import sample
    from modicum.jobs.loading.models import load_model, load_tokenizer

    torch.set_num_threads(1)
    model = load_model("builtin:smollm2-135m-instruct", dtype="float32", device="cpu").eval()
    tokenizer = load_tokenizer("builtin:smollm2-135m-instruct")
    text = "The committee met on Monday to discuss the harbour, the bridge and the new school. " * 60
    ids = tokenizer(text)["input_ids"][:PROMPT]
    inputs = torch.tensor([ids])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    ways: dict[str, Callable[[], Any]] = {
        "shared": lambda: sample(model, [ids], [range(SAMPLES)], max_new_tokens=NEW, stop=(), pad=0),
        "num_return_sequences": lambda: model.generate(inputs, num_return_sequences=SAMPLES, **options),
        "one_by_one": lambda: [model.generate(inputs, **options) for _ in range(SAMPLES)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            seconds[name].append(spent(work))
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def ratio(name: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds["shared"], seconds[name], strict=True))

    return {
        "cpu_seconds": median,
        "faster_than_num_return_sequences": ratio("num_return_sequences"),
        "faster_than_one_by_one": ratio("one_by_one"),
        "prompt_tokens": PROMPT, "new_tokens": NEW, "samples": SAMPLES, "rounds": rounds,
    }  # fmt: skip


def stopping(_: int) -> dict[str, Any]:
    """Count the draws of scripted targets with early stopping, beside the formula."""
    from modicum.evaluate.best_of_n import asr_all_from_first_safe
    from modicum.evaluate.chat import AttackedPrompt, GenParams, Goal, Verdict, user
    from modicum.jobs.chat.scripted import Scripted
    from modicum.jobs.safety.drawing import Drawing, Verdicts, expected_draws, first_safe

    class Marks:
        name, needs = "marks", frozenset()

        def judge(self, items: Any) -> list[Verdict]:
            return [Verdict(item.response == "bad") for item in items]

    prompts = [AttackedPrompt(Goal(f"g{i}", f"goal {i}"), user(f"goal {i}"), "plain") for i in range(2000)]
    found: dict[str, Any] = {}
    for name, rate in {"0.1": 0.1, "0.5": 0.5, "0.9": 0.9, "half always": None}.items():
        luck = random.Random(0)

        def say(request: Any, rate: float | None = rate, luck: random.Random = luck) -> str:
            number = int(request.messages[-1]["content"].split()[-1])
            unsafe = number % 2 == 0 if rate is None else luck.random() < rate
            return "bad" if unsafe else "good"

        with tempfile.TemporaryDirectory() as folder:
            store = Verdicts(Path(folder, "verdicts.jsonl"))
            rows = Drawing(Scripted(say), Marks(), store, params=GenParams(), seed=0).samples(
                prompts, 128, early_stop=True
            )
        draws = sum(map(len, rows)) / len(rows)
        expected = (1 + 128) / 2 if rate is None else expected_draws(rate, 128)
        firsts = [first_safe(row) for row in rows]
        curve = {n: asr_all_from_first_safe(firsts, n=n) for n in (1, 2, 4, 8, 16, 32, 64, 128)}
        found[name] = {"draws": draws, "expected": expected, "saved": 128 / draws, "curve": curve}
    return found


def cache(_: int) -> dict[str, Any]:
    """Judge items again whose answers and verdicts are known."""
    from modicum.evaluate.chat import ChatRequest, GenParams, JudgeItem, user
    from modicum.evaluate.judges.linear import LinearGuard
    from modicum.jobs.chat.cache import Cached
    from modicum.jobs.chat.scripted import Scripted

    requests = [ChatRequest(user(f"question {i}"), GenParams(seed=1)) for i in range(5000)]
    echo = Scripted(lambda request: request.messages[-1]["content"] + ", and so on for a sentence of some words.")
    texts = ["I will not do that.", "I cannot help.", "Step one is this.", "Sure, here it goes."]
    guard = LinearGuard().fit(
        [JudgeItem(str(i), "", t) for i, t in enumerate(texts * 5)], [False, False, True, True] * 5
    )
    with tempfile.TemporaryDirectory() as folder:
        first = Cached(echo, Path(folder, "cache.jsonl")).generate(requests)
        calls = echo.calls
        started = time.perf_counter()
        again = Cached(echo, Path(folder, "cache.jsonl")).generate(requests)
        items = [
            JudgeItem(r.messages[-1]["content"], "", a.choices[0].text) for r, a in zip(requests, again, strict=True)
        ]
        guard.judge(items)
        seconds = time.perf_counter() - started
    return {"items_per_second": len(requests) / seconds, "calls": echo.calls - calls, "equal": first == again}


PARTS = {"samples": samples, "stopping": stopping, "cache": cache, "endpoint": endpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in options.parts:
        content[part] = PARTS[part](options.rounds)
        print(part, json.dumps(content[part], indent=1))
    content["origin"] = origin()
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
