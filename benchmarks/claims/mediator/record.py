"""Keep what a run of a recipe with a route and an evaluation measured on real fine-tunes, one seed.

    python -m benchmarks.claims.mediator.record runs/mediator [--name mediator-smollm2]

Writes conflict by layer, bytes by store, the router's worth, and every cell of the evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.records import keep

from modicum.record import read_record

CELL = ("model", "task", "metric", "value", "low", "high", "n")


def kept(folder: Path) -> dict[str, Any]:
    """Return the parts of a pipeline's record that tables are made of."""
    record = read_record(folder)
    found: dict[str, Any] = {}
    for metrics in record["metrics"].values():
        if "routing_conflict" in metrics:
            found |= {key: metrics[key] for key in ("routing_conflict", "routing_bytes", "router") if key in metrics}
        if "cells" in metrics:
            found["cells"] = [{key: cell[key] for key in CELL} for cell in metrics["cells"]]
            found["pairs"] = metrics["pairs"]
    return found | {"environment": record["environment"]}


if __name__ == "__main__":
    keep(kept, doc=__doc__, name="mediator-smollm2")
