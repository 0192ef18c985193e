"""Speed of clients of one chat server: fixed numbers of requests at a time, the adaptive client, and garak's.

The last one is its REST generator. All ask ``transformers serve --continuous-batching`` for the same answers, of the
same length, in turns, in one run. The server needs the extra ``serve``. ``PEERS`` names the Python of an environment
with garak (``pip install garak==0.17.1``); without it garak is left out, and the result says so.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FIXED = (1, 2, 4, 8, 16)
TOKENS = 16
# The server would else take most of the memory that is free, and mask all of it at every step.
BATCHING = ("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "512")
SERVE = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
GARAK = """
import json, sys, time
from multiprocessing import Pool
from garak.attempt import Conversation, Message, Turn
from garak.generators.rest import RestGenerator
job = json.load(sys.stdin)
asker = RestGenerator(config_root={"generators": {"rest": {"RestGenerator": job["options"]}}})
asked = [Conversation([Turn("user", Message(text))]) for text in job["prompts"]]
started = time.perf_counter()
if job["at_once"] > 1:  # as garak's probes do with parallel_attempts
    with Pool(job["at_once"]) as pool:
        said = list(pool.imap_unordered(asker.generate, asked))
else:
    said = [asker.generate(one) for one in asked]
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "answers": sum(bool(one and one[0] and one[0].text) for one in said)}))
"""


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextmanager
def server(folder: str, *flags: str) -> Iterator[str]:
    """Serve a model on this machine with ``transformers serve``; yields the address, and ends the server."""
    port = free_port()
    words = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-c", SERVE, *words, *flags], stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(f"the server ended: {log.read()[-600:].decode(errors='replace')}") from None
                    time.sleep(1)
            else:
                raise RuntimeError("the server did not start within five minutes")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()  # it keeps nothing, and takes half a minute to end by itself
            process.wait()


def endpoint(rounds: int, *, count: int = 96) -> dict[str, Any]:
    """Compare the clients on so many prompts, each answered by as many tokens.

    The server keeps what it read of a prompt, and samples as its first request says: all prompts are asked once before.
    """
    from modicum.evaluate.chat import ChatRequest, GenParams, user
    from modicum.jobs.chat.http import Endpoint
    from modicum.jobs.chat.openai import OpenAICompatible
    from modicum.jobs.loading.references import resolve_model

    folder = str(resolve_model("builtin:smollm2-135m-instruct"))
    prompts = [f"Write a long story about the {number}th house of a street." for number in range(count)]
    # Without an end token of its own every answer is as long as the others.
    sampling = {"generation_config": json.dumps({"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0})}
    fields = {"model": folder, "temperature": 1.0, "top_p": 1.0, "max_tokens": TOKENS, **sampling}

    with server(folder, *BATCHING) as url:
        plain = Endpoint(url, key=None, timeout=600, retries=5)

        def ask(text: str) -> int:
            found = plain.post("/chat/completions", {**fields, "messages": user(text)})
            return int(found["usage"]["completion_tokens"])

        def fixed(at_once: int) -> int:
            with ThreadPoolExecutor(at_once) as pool:
                return sum(pool.map(ask, prompts))

        def adaptive() -> int:
            client = OpenAICompatible(url, folder, timeout=600, extra_body=sampling)
            answers = client.generate([ChatRequest(user(text), GenParams(max_tokens=TOKENS)) for text in prompts])
            if failed := [answer.error for answer in answers if answer.error]:
                raise RuntimeError(failed[0])
            return sum(answer.usage.completion_tokens for answer in answers)

        peers: dict[str, Callable[[], float]] = {}
        if python := os.environ.get("PEERS"):
            options = {
                "uri": f"{url}/chat/completions",
                "req_template_json_object": {**fields, "messages": user("$INPUT")},
                "headers": {"Content-Type": "application/json"},
                "response_json": True,
                "response_json_field": "$.choices[0].message.content",
                "request_timeout": 600,
            }
            for at_once in (1, 8):  # its default, and its own way of asking for several at a time
                job = {"options": options, "prompts": prompts, "at_once": at_once}
                peers[f"garak_{at_once}"] = lambda job=job: _garak(python, job)  # type: ignore[misc]
        ways: dict[str, Callable[[], int]] = {f"fixed_{n}": lambda n=n: fixed(n) for n in FIXED}  # type: ignore[misc]
        ways["adaptive"] = adaptive
        fixed(8)
        tokens: set[int] = set()
        seconds: dict[str, list[float]] = {name: [] for name in [*ways, *peers]}
        for _ in range(rounds):
            for name, work in ways.items():
                started = time.perf_counter()
                tokens.add(work())
                seconds[name].append(time.perf_counter() - started)
            for name, timed in peers.items():
                seconds[name].append(timed())
        plain.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in ways if name != "adaptive"), key=lambda name: median[name])

    def faster(name: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds["adaptive"], seconds[name], strict=True))

    return {
        "seconds": median, "best_fixed": best, "of_best_fixed": faster(best),
        "faster_than_garak": {name: faster(name) for name in peers} or "PEERS is not set",
        "prompts": count, "new_tokens": TOKENS, "tokens": sorted(tokens), "rounds": rounds,
        "each": seconds,
    }  # fmt: skip


def _garak(python: str, job: dict[str, Any]) -> float:
    """Return the seconds that garak's generator takes, without those for starting it."""
    with tempfile.TemporaryDirectory() as home:  # where it writes its log
        folders = dict.fromkeys(("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), home)
        done = subprocess.run(
            [python, "-c", GARAK], input=json.dumps(job), capture_output=True, text=True, check=False,
            cwd=Path(home), env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | folders,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"garak ended: {done.stderr.strip()[-600:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["answers"] != len(job["prompts"]):
        raise RuntimeError(f"garak got {found['answers']} of {len(job['prompts'])} answers")
    return float(found["seconds"])
