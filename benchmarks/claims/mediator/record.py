"""Keep what a run of a recipe with a route and an evaluation measured on real fine-tunes, one seed.

    python -m benchmarks.claims.mediator.record runs/mediator [--name mediator-smollm2]

Writes conflict by layer, bytes by store, the router's worth, and every cell of the evaluation.
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

CELL = ("model", "task", "metric", "value", "low", "high", "n")


def kept(folder: Path) -> dict[str, Any]:
    """Return the parts of a pipeline's record that tables are made of."""
    record = read_record(folder)
    found: dict[str, Any] = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | origin()
    for metrics in record["metrics"].values():
        if "routing_conflict" in metrics:
            found |= {key: metrics[key] for key in ("routing_conflict", "routing_bytes", "router") if key in metrics}
        if "cells" in metrics:
            found["cells"] = [{key: cell[key] for key in CELL} for cell in metrics["cells"]]
            found["pairs"] = metrics["pairs"]
    return found | {"environment": record["environment"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", default="mediator-smollm2")
    arguments = parser.parse_args()
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(kept(arguments.run), indent=1) + "\n")


if __name__ == "__main__":
    main()
