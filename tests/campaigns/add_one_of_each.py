"""Add a toy of every kind to a copy of the repository, each by one source and one test, and run the contract tests.

``python tests/campaigns/add_one_of_each.py`` prints a table and writes ``benchmarks/results/one-of-each.json``; it
fails if a toy needs more than its two files or a contract test does not pass. ``--all`` runs the whole suite.
``toys/KIND.txt`` holds the two files of each kind, each after a line ``=== path``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import origin  # noqa: E402

PARTS = ("src", "tests", "docs", "benchmarks", "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile")
CONTRACTS = ("tests/contracts", "tests/test_registry.py", "tests/test_docs.py", "tests/test_cli.py")


def files_of(kind: Path) -> dict[str, str]:
    """Return path and text of a toy's files."""
    _, *parts = re.split(r"^=== (.+)\n", kind.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2]))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def changed(folder: Path) -> set[str]:
    """Return which files git sees as new or changed; the caches of Python are not among them."""
    lines = run(folder, "git", "status", "--porcelain", "--untracked-files=all").stdout.splitlines()
    return {line[3:] for line in lines}


def main() -> int:
    toys = {kind.stem: files_of(kind) for kind in sorted((Path(__file__).parent / "toys").glob("*.txt"))}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "modicum"
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis", "_build")
        for part in PARTS:
            source = ROOT / part
            shutil.copytree(source, copy / part, ignore=ignore) if source.is_dir() else shutil.copy(source, copy)
        (copy / ".gitignore").write_text("__pycache__/\n.hypothesis/\n*.pyc\n")
        run(copy, "git", "init", "-q")
        run(copy, "git", "add", "-A")
        identity = ("-c", "user.name=campaign", "-c", "user.email=campaign@localhost")
        run(copy, "git", *identity, "commit", "-qm", "before")

        counts = {}
        for kind, files in toys.items():
            before = changed(copy)
            for path, text in files.items():
                (copy / path).parent.mkdir(parents=True, exist_ok=True)
                (copy / path).write_text(text, encoding="utf-8")
            counts[kind] = len(changed(copy) - before)

        paths = [path for files in toys.values() for path in files if path.endswith(".py")]
        tests = ("tests", "src") if "--all" in sys.argv else (*CONTRACTS, *paths)
        done = run(copy, sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--tb=short", *tests)
        listed = json.loads(run(copy, sys.executable, "-m", "modicum", "list", "--json").stdout or "{}")
        style = run(copy, sys.executable, "-m", "ruff", "check", *paths)
        left = sorted(changed(copy) - {path for files in toys.values() for path in files})

    print(f"{'kind':<18}files")
    for kind, count in counts.items():
        print(f"{kind:<18}{count}")
    tables = sum(any("toy" in entry for entry in names) for names in listed.values())
    print(f"{tables} tables list a toy; pytest ends with {done.returncode}, ruff with {style.returncode}")
    if done.returncode or style.returncode or left or set(counts.values()) != {2}:
        print(done.stdout[-6000:], style.stdout, *left, sep="\n")
        return 1
    tests_run = "the whole suite" if "--all" in sys.argv else " ".join(CONTRACTS)
    result = origin() | {"files": counts, "tables": tables, "tests": tests_run}
    (ROOT / "benchmarks/results/one-of-each.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
