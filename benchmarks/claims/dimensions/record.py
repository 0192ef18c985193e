"""Keep what a run of a grid measured on a language model.

    python -m benchmarks.claims.dimensions.record runs/3h-quick [--name 3h-quick]

Writes the scores of ``grid.json`` with their intervals, and where and for how long the grid ran.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.provenance import origin
from benchmarks.tables import RESULTS

from modicum.record import read_record

SCORE = ("arm", "task", "metric", "value", "low", "high", "n")


def kept(folder: Path) -> dict[str, Any]:
    """Return the scores of a grid that ended."""
    record, grid = read_record(folder), json.loads((folder / "grid.json").read_text())
    scores = [{key: score[key] for key in SCORE} | {"role": score["of"]["role"]} for score in grid["scores"]]
    about = {key: grid[key] for key in ("axes", "seeds")} | {"seconds": record["seconds"], "cells": len(grid["cells"])}
    when = {"when": datetime.now(UTC).isoformat(timespec="seconds")}
    return about | when | origin() | {"scores": scores, "environment": record["environment"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="3h-quick")
    arguments = parser.parse_args()
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(kept(arguments.run), indent=1) + "\n")


if __name__ == "__main__":
    main()
