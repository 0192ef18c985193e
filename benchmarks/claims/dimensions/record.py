"""Keep what a run of a grid measured on a language model.

    python -m benchmarks.claims.dimensions.record runs/3h-quick [--name 3h-quick]

Writes the scores of ``grid.json`` with their intervals, and where and for how long the grid ran.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.records import keep

from modicum.record import read_record

SCORE = ("arm", "task", "metric", "value", "low", "high", "n")


def kept(folder: Path) -> dict[str, Any]:
    """Return the scores of a grid that ended, but for those that only chose, with the seed of each."""
    record, grid = read_record(folder), json.loads((folder / "grid.json").read_text())
    judges = {choice["by"] for choice in grid["chosen"]}
    scores = [
        {key: score[key] for key in SCORE} | {"role": score["of"]["role"], "seed": score["axes"].get("seed")}
        for score in grid["scores"]
        if score["stage"] not in judges
    ]
    about = {key: grid[key] for key in ("axes", "seeds")} | {"seconds": record["seconds"], "cells": len(grid["cells"])}
    chosen = [{key: choice[key] for key in ("axis", "at", "value")} for choice in grid["chosen"]]
    by_job: dict[str, float] = {}
    for cell in grid["cells"]:
        by_job[cell["job"]] = round(by_job.get(cell["job"], 0.0) + read_record(folder / cell["folder"])["seconds"], 1)
    about |= {"seconds_of_cells": by_job, "chosen": chosen}
    return about | {"scores": scores, "environment": record["environment"]}


if __name__ == "__main__":
    keep(kept, doc=__doc__, name="3h-quick")
