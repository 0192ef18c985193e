"""Which code a figure comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def git(*words: str) -> str:
    """Return what git answers at the root; nothing where there is no repository."""
    done = subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def origin() -> dict[str, Any]:
    """Return the commit, and whether the code differs from it; results that are being written are not code."""
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")),
    }
