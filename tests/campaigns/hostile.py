"""Hostile inputs: whatever stands in the place of a file, a value or an argument, the answer is one line and soon.

``python tests/campaigns/hostile.py [--seconds 600] [--seed 0] [--only WORDS]`` puts what no honest input holds into
every file that a command reads, into every value of every recipe, and into the arguments, one at a time. A command may
work all the same; else it must say one line, without control characters, and end with status 2, after at most five
seconds of computing and within two gibibytes. No file outside its folders may be touched, and no code may run. Counts
go into ``benchmarks/results/hostile.json``, which a run with another seed adds to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "COLUMNS": "200"}  # fmt: skip

from campaigns import bombs, forked, frame, workshop  # noqa: E402 - after the settings of their libraries

RESULT = ROOT / "benchmarks/results/hostile.json"
Damage = Callable[[Path, random.Random], None]
Command = Sequence[str]


def run(*names: str) -> list[Command]:
    """Return the commands that check and run recipes; ``OUT`` stands for a new folder."""
    return [(verb, f"{name}.yaml", *(("--quiet", "--out", "OUT") if verb == "run" else ())) for name in names
            for verb in ("check", "run")]  # fmt: skip


MERGED = ("run", "merge.yaml", "--quiet", "--out", "done-merge")
AGAIN = ("run", "train-again.yaml", "--quiet", "--out", "done-train")
READ: dict[str, list[Command]] = {
    "base/config.json": run("merge", "train", "evaluate-base"),
    "base/generation_config.json": run("merge", "train"),
    "base/model.safetensors.index.json": run("merge", "train"),
    "base/tokenizer.json": run("merge-tokens", "train", "average-search"),
    "base/tokenizer_config.json": run("merge-tokens", "train-adapter"),
    "base/chat_template.jinja": run("train-adapter", "merge"),
    "base/model-00001-of-00002.safetensors": run("merge", "statistics-base"),
    "one/config.json": run("merge", "extract", "route"),
    "one/model.safetensors.index.json": run("merge", "extract", "evaluate"),
    "looped/config.json": run("export", "calibrate"),
    "talker/config.json": run("attack"),
    "run/checkpoint-2/model.safetensors.index.json": run("average", "average-search"),
    "run/checkpoint-2/config.json": run("average"),
    "adapter/adapter_config.json": run("merge-adapter", "evaluate"),
    "adapter/adapter_model.safetensors": run("merge-adapter", "evaluate"),
    "rows.jsonl": run("train", "evaluate", "statistics", "route"),
    "chat.jsonl": run("train-adapter"),
    "pairs.jsonl": run("train-pairs"),
    "text.jsonl": run("train-text", "average-search", "calibrate"),
    "rows.parquet": run("train-parquet"),
    "harmful.jsonl": run("attack", "synthesize"),
    "tracks.csv": run("coordinate-tracks"),
    "objective.safetensors": run("coordinate-objective"),
    "guidelines.yaml": run("synthesize"),
    "merge.yaml": run("merge"),
    "merge-mergekit.yaml": run("merge-mergekit"),
    "pipeline.yaml": run("pipeline"),
    "done-merge/record.json": [("verify", "done-merge"), ("report", "done-merge", "--out", "OUT.html"),
                               MERGED],
    "done-merge/recipe.yaml": [("report", "done-merge", "--out", "OUT.html"),
                               MERGED, ("run", "done-merge/recipe.yaml")],
    "done-train/record.json": [("verify", "done-train"), ("report", "done-train", "--out", "OUT.html")],
    "done-train/log.jsonl": [("report", "done-train", "--out", "OUT.html"),
                             ("run", "train.yaml", "--quiet", "--out", "done-train")],
    "done-train/checkpoints/checkpoint-4/trainer_state.json": [("verify", "done-train"),
                                                               AGAIN],
    "done-train/checkpoints/checkpoint-4/manifest.json": [("verify", "done-train"),
                                                          AGAIN],
    "done-coordinate/results.json": [("report", "done-coordinate", "--out", "OUT.html"), ("verify", "done-coordinate")],
    "done-coordinate/frames.json": [("report", "done-coordinate", "--out", "OUT.html")],
    "done-pipeline/record.json": [("verify", "done-pipeline"), ("report", "done-pipeline", "--out", "OUT.html"),
                                  ("run", "pipeline.yaml", "--quiet", "--out", "done-pipeline")],
    "done-pipeline/stages/tune/record.json": [("verify", "done-pipeline"),
                                              ("run", "pipeline.yaml", "--quiet", "--out", "done-pipeline")],
    "done-average-search/record.json": [("report", "done-average-search", "--out", "OUT.html")],
    "busy/.lock": [("run", "merge.yaml", "--quiet", "--out", "busy")],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One hostile input: what is damaged, how, and what reads it."""

    name: str
    path: str | None
    damage: Damage | None
    command: Command


def build(root: Path) -> None:
    """Make the world."""
    import torch
    from safetensors.torch import save_file

    workshop.build(root)
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")
    save_file({"V": torch.rand(4, 6)}, root / "objective.safetensors")
    shutil.copy(ROOT / "src/modicum/jobs/safety/guidelines.yaml", root / "guidelines.yaml")
    known = workshop.recipes()
    known["synthesize"]["guidelines"] = "guidelines.yaml"
    known |= {
        "train-again": known["train"] | {"trainer": workshop.TRAINER | {"max_steps": 6}},
        "train-parquet": known["train"] | {"data": {"path": "rows.parquet"}},
        "evaluate-base": known["evaluate"] | {"models": {"b": "base"}},
        "statistics-base": known["statistics"] | {"model": "base"},
        "merge-tokens": known["merge-mergekit"] | {"tokenizer": {"source": "union"}},
        "coordinate-objective": known["coordinate"] | {
            "application": {"name": "objective", "path": "objective.safetensors", "blocks": [3, 3]}},
    }  # fmt: skip
    for name, recipe in known.items():
        (root / f"{name}.yaml").write_text(json.dumps(recipe))
    (root / "busy").mkdir()
    (root / "busy/.lock").write_text("{}")


def finish(root: Path) -> dict[str, forked.Outcome]:
    """Make finished runs in the world, and import what they need."""
    names = [path.stem for path in sorted(root.glob("*.yaml")) if path.stem not in ("train-again", "guidelines")]
    commands = [("run", f"{name}.yaml", "--out", f"done-{name}", "--quiet") for name in names]
    others = [("report", "done-merge"), ("verify", "done-merge"), ("check", "merge.yaml")]
    return forked.warm([*commands, *others], root, root.parent / "modules")


def _bytes(content: bytes) -> Damage:
    def damage(path: Path, _: random.Random) -> None:
        path.write_bytes(content)

    return damage


def _instead(make: Callable[[Path], Any]) -> Damage:
    def damage(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


def _outside(path: Path) -> None:
    (path.parents[1] / "private.txt").write_text("mine")
    path.symlink_to(path.parents[1] / "private.txt")


def _truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) or 1)])


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def _splice(path: Path, rng: random.Random) -> None:
    content, piece = path.read_bytes(), rng.choice(bombs.PIECES)
    at = rng.randrange(len(content) + 1)
    path.write_bytes(content[:at] + piece + content[at + rng.choice((0, 0, 1, 8)) :])


def _encoded(name: str) -> Damage:
    def damage(path: Path, _: random.Random) -> None:
        path.write_bytes(path.read_bytes().decode("latin-1").encode(name, "ignore"))

    return damage


ANYWHERE: dict[str, Damage] = {
    "empty": _bytes(b""), "NUL": _bytes(bytes(5000)), "null": _bytes(b"null"), "number": _bytes(b"3"),
    "text": _bytes(b'"x"'), "list": _bytes(b"[1, 2]"), "object": _bytes(b"{}"), "deep list": _bytes(b"[" * 200_000),
    "deep object": _bytes(b'{"a":' * 200_000), "huge integer": _bytes(b"1" * 100_000), "half": _bytes(b'{"a": 1'),
    "control": _bytes(b'{"\x1b[2Jx": "\x1b]0;y\x07"}'), "surrogate": _bytes(b'{"\\ud800": "\\udfff"}'),
    "large": _bytes(b'{"a": "' + b"x" * (40 << 20) + b'"}'), "many keys": lambda p, _: p.write_text(
        "{" + ",".join(f'"k{i}": {i}' for i in range(400_000)) + "}"), "long line": _bytes(b"x" * (30 << 20)),
    "pipe": _instead(os.mkfifo), "socket": _instead(bombs.bind), "folder": _instead(Path.mkdir),
    "device": _instead(lambda p: p.symlink_to("/dev/zero")), "random device": _instead(
        lambda p: p.symlink_to("/dev/urandom")), "itself": _instead(lambda p: p.symlink_to(p.name)),
    "link out": _instead(_outside), "nowhere": _instead(lambda p: p.symlink_to("/nowhere/at/all")),
    "process": _instead(lambda p: p.symlink_to("/proc/self/mem")), "missing": _instead(lambda p: None),
    "utf-16": _encoded("utf-16"), "utf-32": _encoded("utf-32"), "bom": _encoded("utf-8-sig"),
    "truncated": _truncate, "flipped": _flip, "spliced": _splice,
}  # fmt: skip


def _value(path: Path, rng: random.Random) -> None:
    """Put something strange in the place of one value of a JSON file, or of a line of one, or of a header."""
    content = path.read_bytes()
    head, tail = b"", b""
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        content, tail = content[8 : 8 + length], content[8 + length :]
    elif path.suffix == ".jsonl":
        lines = content.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        head, content, tail = b"".join(lines[:at]), lines[at], b"\n" + b"".join(lines[at + 1 :])
    changed = bombs.strange(json.loads(content), rng)
    text = json.dumps(changed).encode("utf-8", "surrogatepass")
    if path.suffix == ".safetensors":
        head = len(text).to_bytes(8, "little")
    path.write_bytes(head + text + tail)


def _structured(path: str) -> bool:
    return path.endswith((".json", ".jsonl", ".safetensors")) or path in ("merge.yaml", "pipeline.yaml",
                                                                          "merge-mergekit.yaml")  # fmt: skip


def cases(rng: random.Random) -> Iterator[Case]:
    """Yield every special case once, and random ones without end."""
    yield from (Case(name, path, damage, command) for name, path, damage, commands in bombs.special() for command in
                [c for known in commands for c in run(known)])  # fmt: skip
    yield from (
        Case(f"argument {' '.join(map(ascii, command))[:60]}", None, None, command) for command in bombs.COMMANDS
    )
    for path, commands in READ.items():
        for name, damage in ANYWHERE.items():
            yield Case(f"{path}: {name}", path, damage, rng.choice(commands))
    names = [f"{name}.yaml" for name in workshop.recipes()]
    while True:
        kind = rng.random()
        if kind < 0.5:
            path = rng.choice([path for path in READ if _structured(path)])
            yield Case(f"{path}: a value", path, _value, rng.choice(READ[path]))
        elif kind < 0.75:
            path = rng.choice(names)
            verb = ("check", path) if rng.random() < 0.7 or path.startswith(("attack", "synth")) else (
                "run", path, "--quiet", "--out", "OUT")  # fmt: skip
            yield Case(f"{path}: a value", path, _value_of_recipe, verb)
        else:
            path = rng.choice(list(READ))
            name = rng.choice(("truncated", "flipped", "spliced"))
            yield Case(f"{path}: {name}", path, ANYWHERE[name], rng.choice(READ[path]))


def _value_of_recipe(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(bombs.strange(json.loads(path.read_text()), rng)), errors="surrogatepass")


def attempt(case: Case, root: Path, pristine: Path, rng: random.Random) -> tuple[forked.Outcome, str | None]:
    """Try one case on the world, which is put right again; return how it ended, and what is wrong with that."""
    if case.path is not None and case.damage is not None:
        case.damage(root / case.path, rng)
    before = _seen(root.parent)
    command = [str(root / "out" / "page.html") if part == "OUT.html" else str(root / "out" / "run") if part == "OUT"
               else part for part in case.command]  # fmt: skip
    try:
        outcome = forked.attempt(command, root, seconds=300.0, cpu=20)
        # A guard that learns from labelled answers takes its seconds.
        wrong = outcome.trouble(seconds=15.0 if "attack" in str(command) or "synth" in str(command) else 5.0)
        if _seen(root.parent) != before:
            wrong = "files outside its folders were touched"
        elif outcome.status == 2 and case.command[0] == "run" and (root / "out/run/model").exists():
            wrong = "a result of a refused run"
        elif (root.parent / "ran").exists():
            wrong = "code ran"
        return outcome, wrong
    finally:
        _restore(root, pristine, case)


def _seen(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name != "private.txt")


def _restore(root: Path, pristine: Path, case: Case) -> None:
    shutil.rmtree(root / "out", ignore_errors=True)
    shutil.rmtree(root / "runs", ignore_errors=True)
    touched = {first for part in (*case.command, case.path or "") for first in Path(part).parts[:1]}
    touched -= {"/", ".", ".."}
    for name in touched:
        whole, here = pristine / name, root / name
        try:
            if not whole.exists():
                continue
            shutil.rmtree(here) if here.is_dir() and not here.is_symlink() else here.unlink(missing_ok=True)
            shutil.copytree(whole, here) if whole.is_dir() else shutil.copy2(whole, here)
        except (OSError, ValueError):
            continue


def campaign(at: frame.Campaign) -> None:
    """Try one input at a time, on a world that is put right again after it."""
    root, pristine = at.work / "a" / "world", at.work / "pristine"
    if not pristine.exists():
        build(pristine)
    # What damages a file that is not there, or one that nobody reads, tries nothing.
    lost = {*READ, *(path for _, path, _, _ in bombs.special())}
    if failed := finish(pristine) or sorted(path for path in lost if not (pristine / path).exists()):
        raise RuntimeError(str(failed))
    shutil.rmtree(root.parent, ignore_errors=True)
    shutil.copytree(pristine, root)
    for number, case in at.cases(cases(random.Random(at.chosen.seed)), lambda case: case.name):
        outcome, wrong = attempt(case, root, pristine, at.rng(number))
        how = "worked" if outcome.status == 0 else "refused in one line"
        title = f"{case.name[:120]} ({' '.join(map(ascii, case.command))[:150]})"
        at.tell(number, title, how, wrong, said=outcome.said.strip(), seconds=outcome.cpu)


if __name__ == "__main__":
    raise SystemExit(frame.main(__doc__, RESULT, campaign))
