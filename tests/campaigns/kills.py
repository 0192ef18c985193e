"""Random kills: a run that is ended at any moment, and started again, ends with the bytes of one that ran in peace.

``python tests/campaigns/kills.py [--seconds 600] [--seed 0] [--only WORDS]`` runs every job, and every method of the
tables of merging, averaging, training and coordination, on tiny models. A run is ended one to three times: by SIGKILL,
SIGTERM or SIGINT, of the process, of one of its workers, or of all together, at any time; or by SIGKILL right before it
opens a file for writing, or makes, moves or removes a name. After each time no process of it may
be left, a record that says ``done`` must be true, and a result that has its name must be whole. At the end the outputs
must be those of the run in peace, and nothing else may lie around. ``--changes`` tries every change of every job, once.
Counts go into ``benchmarks/results/kills.json``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip

from campaigns import forked, frame, workshop  # noqa: E402 - after the settings of their libraries

RESULT = ROOT / "benchmarks/results/kills.json"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
Case: TypeAlias = tuple[str, int | None]
RARE = ("attack", "synthesize")  # seconds each


def recipes() -> dict[str, dict[str, Any]]:
    """Return a recipe of every job, and of every method that runs without further inputs."""
    from modicum.registry import REGISTRIES

    known = workshop.recipes()
    found = dict(known)

    def vary(table: str, base: str, key: str, **more: Any) -> None:
        for name in REGISTRIES[table]:
            found[f"{base}: {name}"] = known[base] | {key: {"name": name}} | more

    vary("merge_methods", "merge", "method", shard_bytes=10_000_000)
    vary("averagers", "average-search", "method", compare=[])
    vary("gradient_rules", "train", "gradient")
    vary("objectives", "train-text", "objective")
    vary("expert_stores", "route", "store")
    for name in REGISTRIES["zeroth_order"]:
        found[f"train-tezo: {name}"] = known["train-tezo"] | {"optimizer": {"name": name, "lr": 1e-4}}
    for name in REGISTRIES["adapter_inits"]:
        found[f"train-adapter: {name}"] = known["train-adapter"] | {"adapter": {"rank": 2, "init": {"name": name}}}
    for name in REGISTRIES["policies"]:
        found[f"coordinate: {name}"] = known["coordinate"] | {"policies": [name]}
    return found


Made: TypeAlias = tuple[dict[str, Any], dict[str, Any]]


def made(run: Path) -> Made:
    """Return size and hash of every output of a finished run, and what it measured; stages count too."""
    record = json.loads((run / "record.json").read_text())
    files = dict(record.get("files") or {})
    for inner in sorted(run.glob("stages/*/record.json")):
        known = json.loads(inner.read_text())["files"]
        files |= {f"{inner.parent.name}/{name}": value for name, value in known.items()}
    return files, _steady(record["metrics"])


def difference(found: Made, peace: Made) -> str:
    """Return in words in what two runs differ."""
    files = [name for name in found[0].keys() | peace[0].keys() if found[0].get(name) != peace[0].get(name)]
    metrics = [name for name in found[1].keys() | peace[1].keys() if found[1].get(name) != peace[1].get(name)]
    return f"other results: files {sorted(files)[:3]}, metrics {sorted(metrics)[:3]}"


def _steady(value: Any) -> Any:
    """Leave out what a clock says."""
    words = ("seconds", "time", "speed", "per_second", "runtime", "memory", "peak", "cpu")
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if not any(word in str(key) for word in words)}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def children(pid: int) -> list[int]:
    """Return the living descendants of a process, by its session."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split() if path.name.isdigit() else []
        except OSError:
            continue
        if fields and int(fields[3]) == pid and fields[0] not in "ZX" and int(path.name) != pid:
            found.append(int(path.name))
    return found


def end(run: forked.Attempt, rng: random.Random) -> str:
    """End a process in one of several ways; return which."""
    number = rng.choice(SIGNALS)
    way = rng.choice(("process", "process", "worker", "all"))
    workers = children(run.pid)
    if way == "worker" and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
        return "worker killed"
    run.kill(number, group=way == "all")
    return f"{signal.Signals(number).name} to {'all' if way == 'all' else 'the process'}"


def unlawful(run: Path, peace: Made) -> list[str]:
    """Return what no run may leave behind at any moment."""
    from modicum.errors import ModicumError
    from modicum.stored import damage, read_record

    found = []
    if (run / "record.json").exists():
        try:
            record = read_record(run)
            if record.get("status") == "done":
                found += [f"done, but {name} {why}" for name, why in damage(run, record, cached=False).items()]
        except ModicumError as error:
            found.append(str(error))
    for name in ("model", "adapter", "base", "statistics"):
        whole = {key for key in peace[0] if key.partition("/")[0] == name}
        if (run / name).is_dir() and (lost := [key for key in whole if not (run / key).exists()]):
            found.append(f"{name} has its name, and lacks {lost[0]}")
    return found


def leftovers(run: Path) -> list[str]:
    """Return hidden names in a finished run's folder, and beside it."""
    inside = [str(path.relative_to(run)) for path in run.rglob(".*")]
    return [*inside, *(path.name for path in run.parent.iterdir() if path.name.startswith("."))]


def attempt(
    name: str, world: Path, peace: Peaceful, rng: random.Random, change: int | None = None
) -> Iterator[tuple[str, str | None]]:
    """End one run several times, or once right before a change of the disk; yield each time how, and what was wrong."""
    place = world / "out"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    run, command = place / "run", ["run", f"{file_of(name)}.yaml", "--out", "out/run", "--quiet"]
    for _ in range(1 if change else rng.choice((1, 1, 2, 3))):
        number = change or rng.choice((0, rng.randint(1, peace.changes)))
        started, how = forked.Attempt(command, world, variables=_counted(place / "changes", number)), "over before"
        outcome = started.wait(300.0 if number else rng.uniform(0.0, 1.1) * peace.seconds, reap=False)
        if outcome is None:
            how = end(started, rng)
            outcome = started.wait(time.monotonic() - started.began + 300.0, reap=False)
        elif outcome.status == -signal.SIGKILL:
            how = "SIGKILL before a change"
        wrong = None
        if outcome is None:
            started.kill(signal.SIGKILL, group=True)
            outcome, wrong = started.wait(), "did not end"
        elif how != "over before":
            wrong = _outlived(started.pid)
        problems = unlawful(run, peace.made)
        if outcome is not None and outcome.status is not None and outcome.status > 0 and "Traceback" in outcome.said:
            problems.append(f"a traceback: {outcome.said.splitlines()[-1][:200]}")
        yield how, wrong or "; ".join(problems) or None
        if how == "over before":
            break
    last = forked.attempt(command, world, seconds=300)
    if last.status != 0:
        yield "run again", f"exit status {last.status}: {last.said.strip()[-300:]}"
    elif made(run) != peace.made:
        yield "run again", difference(made(run), peace.made)
    elif left := leftovers(run):
        yield "run again", f"leftovers: {left[:3]}"
    else:
        yield "run again", None


def _counted(path: Path, last: int) -> dict[str, str]:
    """Return the variables that count changes of the disk, and end the command right before the last one, if not 0."""
    path.unlink(missing_ok=True)
    return {"CAMPAIGN_CHANGES": f"{last}:{path}"}


def _outlived(pid: int, seconds: float = 10.0) -> str | None:
    deadline = time.monotonic() + seconds
    while left := children(pid):
        if time.monotonic() > deadline:
            for one in left:
                os.kill(one, signal.SIGKILL)
            return f"{len(left)} workers outlived it by {seconds:.0f} s"
        time.sleep(0.05)
    return None


def file_of(name: str) -> str:
    """Return a recipe's name as that of a file."""
    return name.replace(": ", "--")


@dataclass(frozen=True)
class Peaceful:
    """A run that nobody disturbed: how long it took, how often it changed the disk, and what it ended with."""

    seconds: float
    changes: int
    made: Made


class Peace:
    """Runs that nobody disturbs, made when they are first asked for.

    Args:
        world: Where; made when it is not there.
        known: The recipes by name.
    """

    def __init__(self, world: Path, known: dict[str, dict[str, Any]]) -> None:
        self.world, self.known = world, dict(known)
        if not world.exists():
            workshop.build(world)
        for name, recipe in known.items():
            (world / f"{file_of(name)}.yaml").write_text(json.dumps(recipe))
        first = [["run", f"{name}.yaml", "--out", f"warm/{name}", "--quiet"] for name in known if ": " not in name]
        forked.warm(first, world, world.parent / "modules")
        self._found: dict[str, Peaceful] = {}

    def names(self) -> list[str]:
        """Return the recipes that have not failed."""
        return sorted(self.known)

    def __call__(self, name: str) -> Peaceful | None:
        """Return the run of a recipe; ``None`` where it needs what is not there."""
        if name not in self._found and name in self.known:
            command = ["run", f"{file_of(name)}.yaml", "--out", f"peace/{file_of(name)}", "--quiet"]
            counted = self.world / f"{file_of(name)}.changes"
            ended = forked.attempt(command, self.world, seconds=300, variables=_counted(counted, 0))
            if ended.status != 0:
                print("left out:", name, ended.said.strip()[-160:], flush=True)
                del self.known[name]
            else:
                found = made(self.world / "peace" / file_of(name))
                self._found[name] = Peaceful(ended.seconds, counted.stat().st_size, found)
        return self._found.get(name)


def any_moment(peace: Peace, seed: int) -> Iterator[Case]:
    """Yield names of recipes without end, long ones seldom."""
    rng = random.Random(seed)
    known = list(peace.known)
    while True:
        name = rng.choice(known)
        if not name.startswith(RARE) or rng.random() < 0.1:
            yield name, None


def every_change(peace: Peace) -> Iterator[Case]:
    """Yield the name of each job's recipes, with the number of each change of the disk."""
    for name in [name for name in peace.known if ": " not in name]:
        for change in range(1, (found.changes if (found := peace(name)) else 0) + 1):
            yield name, change


def campaign(at: frame.Campaign) -> None:
    """Kill one run at a time, and start it again."""
    for name in ("out", "peace"):
        shutil.rmtree(at.work / "world" / name, ignore_errors=True)
    peace = Peace(at.work / "world", {name: recipe for name, recipe in recipes().items() if at.chosen.only in name})
    if at.chosen.changes:
        at.key = f"{at.chosen.seed}: changes"
    every: Iterator[Case] = every_change(peace) if at.chosen.changes else any_moment(peace, at.chosen.seed)
    for number, (name, change) in at.cases(every, lambda case: case[0]):
        if (found := peace(name)) is not None:
            for how, wrong in attempt(name, peace.world, found, at.rng(number), change):
                at.tell(number, f"{name}, case {number}, change {change}, {how}", how, wrong)


if __name__ == "__main__":
    raise SystemExit(frame.main(__doc__, RESULT, campaign, changes=(False, "every change of the disk of every job")))
