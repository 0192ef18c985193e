"""Loss of power at random moments: what the disk held then is mounted, looked at, and the run is started again on it.

``python tests/campaigns/power_loss.py [--moments 20] [--seed 0] [--jobs merge train]`` needs Linux and root, for loop
devices. A run writes to a file system in a file. At a random moment all its processes are stopped and the file is
copied: what was still in memory is not in it, as after a loss of power. The copy is mounted, so that the file system
replays its own journal, and

* a record that says ``done`` must be true: every output is there with its hash, and equal to that of a run in peace;
* the same command must end with the bytes of a run in peace.

``--control`` makes ``fsync`` and ``fdatasync`` do nothing, and looks right after the run has ended: if that finds
nothing wrong, the campaign proves nothing. Results go into ``benchmarks/results/power-loss.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip

from campaigns import forked  # noqa: E402 - after the settings of its libraries

RESULT = ROOT / "benchmarks/results/power-loss.json"
SIZE = 256 << 20
END = 600.0  # seconds; every run has ended by then


def prepare(root: Path) -> dict[str, dict[str, Any]]:
    """Write models and data; return the recipes."""
    from support import byte_tokenizer, tiny_llama

    for seed, name in enumerate(("base", "one", "two")):
        tiny_llama(seed=seed, hidden_size=256, intermediate_size=1024, num_hidden_layers=8).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    tiny_llama(seed=0, hidden_size=64, num_hidden_layers=4).save_pretrained(root / "small")
    byte_tokenizer().save_pretrained(root / "small")
    rows = ({"prompt": f"say {i}", "completion": "abc"} for i in range(16))
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = {name: str(root / name) for name in ("base", "one", "two")}
    trainer = {"max_steps": 6, "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 2}
    return {
        "merge": {"job": "merge", "base": models["base"], "experts": [models["one"], models["two"]],
                  "method": {"name": "ties", "density": 0.5}, "shard_bytes": 8_000_000},
        "train": {"job": "train", "model": str(root / "small"),
                  "data": {"path": str(root / "rows.jsonl"), "max_length": 32},
                  "trainer": trainer},
    }  # fmt: skip


@contextmanager
def mounted(image: Path, place: Path, *, fresh: bool) -> Iterator[Path]:
    """Mount a file as an ext4 file system."""
    if fresh:
        with image.open("wb") as file:
            file.truncate(SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,commit=600", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def start(recipe: Path, out: Path, *, control: bool = False) -> forked.Attempt:
    """Start a run, whose processes form a group."""
    variables = {"CAMPAIGN_NO_SYNC": "1"} if control else {}
    return forked.Attempt(command_of(recipe, out), recipe.parent, variables=variables)


def command_of(recipe: Path, out: Path) -> list[str]:
    """Return the arguments of a run."""
    return ["run", str(recipe), "--out", str(out), "--quiet"]


def fails(run: forked.Attempt) -> str | None:
    """Wait for the end of a run; return what it said if that is a failure."""
    ended = run.wait(END)
    if ended is None:
        run.kill(signal.SIGKILL, group=True)
        run.wait()
        return "it does not end"
    return f"status {ended.status}: {ended.said.strip()[-300:]}" if ended.status != 0 else None


def results(run: Path) -> dict[str, bytes]:
    """Return the tensors that a run made, byte by byte."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("model/*.safetensors"))}


def lose_power(recipe: Path, work: Path, moment: float, *, control: bool, names_first: bool) -> Path:
    """Run until the moment, or to the end; return a copy of what the disk holds then."""
    image, copy = work / "disk.img", work / "copy.img"
    with mounted(image, work / "disk", fresh=True) as disk:
        process = start(recipe, disk / "run", control=control)
        if (ended := process.wait(moment)) is None:
            process.kill(signal.SIGSTOP, group=True)
        if names_first:
            # The journal of the file system is written for somebody else's sake: names and sizes are there, bytes not.
            with (disk / "other").open("w") as file:
                file.write("x")
                file.flush()
                os.fsync(file.fileno())
        # Not through the file system: only what it has written.
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        if ended is None:
            process.kill(signal.SIGKILL, group=True)
            process.wait()
        time.sleep(0.2)  # the workers end by themselves
    return copy


def look(copy: Path, recipe: Path, work: Path, expected: dict[str, bytes]) -> tuple[str, list[str]]:
    """Return the state in which the run was found, and what is wrong with it."""
    from modicum.errors import CheckpointError
    from modicum.stored import damage, read_record

    wrong = []
    with mounted(copy, work / "after", fresh=False) as disk:
        run = disk / "run"
        try:
            state = str(read_record(run).get("status"))
        except CheckpointError:
            state = "no record" if not (run / "record.json").exists() else "bad record"
        if state == "bad record":
            wrong.append("the record cannot be read")
        if state == "done":
            wrong += [f"done, but {name} {problem}" for name, problem in damage(run, cached=False).items()]
            if results(run) != expected:
                wrong.append("done, but of other bytes")
        elif (run / "model").exists() and results(run) != expected:
            wrong.append("a model that is not whole has its name")
        if failed := fails(start(recipe, run)):
            wrong.append(f"the same command fails: {failed}")
        elif results(run) != expected:
            wrong.append("the same command ends with other bytes")
    return state, wrong


def campaign(jobs: list[str], moments: int, seed: int, *, control: bool = False) -> dict[str, Any]:
    """Lose power at so many moments of each job."""
    work = Path(tempfile.mkdtemp(prefix="power-"))
    rng, found = random.Random(seed), {}
    try:
        recipes = prepare(work)
        files = {job: work / f"{job}.yaml" for job in jobs}
        for job, recipe in files.items():
            recipe.write_text(json.dumps(recipes[job]))
        forked.warm([command_of(recipe, work / f"{job}-warm") for job, recipe in files.items()], work, work / "modules")
        for job, recipe in files.items():
            began = time.monotonic()
            if failed := fails(start(recipe, work / f"{job}-peace")):
                raise RuntimeError(f"{job} fails in peace: {failed}")
            lasts, expected = time.monotonic() - began, results(work / f"{job}-peace")
            states: dict[str, int] = {}
            wrong: list[str] = []
            for i in range(moments):
                # A loss right after the end is the likeliest to find what was not waited for.
                moment = END if control or i % 4 == 0 else rng.uniform(0.0, 1.1) * lasts
                copy = lose_power(recipe, work, moment, control=control, names_first=control or i % 3 != 2)
                state, problems = look(copy, recipe, work, expected)
                if moment == END and state != "done" and not control:
                    problems.append(f"{state} after its end")
                states[state] = states.get(state, 0) + 1
                wrong += [f"after {moment:.2f} s ({state}): {problem}" for problem in problems]
                print(job, f"{i + 1}/{moments}", state, problems or "sound", flush=True)
            found[job] = {"moments": moments, "states": states, "wrong": wrong, "seconds_in_peace": round(lasts, 1)}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def possible() -> bool:
    """Whether file systems in files can be mounted here."""
    return (
        sys.platform == "linux"
        and os.geteuid() == 0
        and Path("/dev/loop-control").exists()
        and all(shutil.which(tool) for tool in ("mkfs.ext4", "mount", "umount"))
    )


def main() -> int:
    """Run the campaign; returns 1 if anything was wrong."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--moments", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--jobs", nargs="+", default=["merge", "train"])
    arguments.add_argument("--control", action="store_true")
    arguments.add_argument("--trial", action="store_true", help="count nothing")
    chosen = arguments.parse_args()
    if not possible():
        print("needs Linux, root and loop devices", file=sys.stderr)
        return 2
    began = time.monotonic()
    found = campaign(chosen.jobs, chosen.moments, chosen.seed, control=chosen.control)
    if not chosen.trial:
        keep(found, chosen.seed, time.monotonic() - began, "control" if chosen.control else "campaign")
    wrong = [problem for job in found.values() for problem in job["wrong"]]
    if chosen.control:
        print(f"without waiting for the disk, {len(wrong)} things were wrong")
        return 0 if wrong else 1
    return 1 if wrong else 0


def keep(found: dict[str, Any], seed: int, seconds: float, part: str) -> None:
    """Write what was found beside what is known of other jobs."""
    from benchmarks.provenance import origin

    from modicum.durable import write_atomic
    from modicum.environment import environment

    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    about = {"seed": seed, "seconds": round(seconds), "environment": environment(), **origin()}
    known.setdefault(part, {}).update({job: result | about for job, result in found.items()})
    write_atomic(RESULT, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
