"""Compare a grid whose passes begin above cached blocks with the same one whose passes are whole.

    sed '/cached_blocks/d' src/modicum/recipes/3h-quick.yaml > whole.yaml
    python -m modicum run 3h-quick --out runs/above && python -m modicum run whole.yaml --out runs/whole
    python -m benchmarks.claims.dimensions.cached runs/above runs/whole

Trainings differ by the rounding of every step, so what is compared is what came of them: pair accuracies, the pairs on
which another answer wins, and margins of the mean log-probability. Writes ``results/dimensions-cached.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.provenance import origin
from benchmarks.tables import RESULTS

from modicum.record import read_lines, read_record


def scored(folder: Path) -> dict[tuple[str, str, Any], tuple[float, list[dict[str, Any]]]]:
    """Return the value and the items of each model, task and seed."""
    found = {}
    for score in json.loads((folder / "grid.json").read_text())["scores"]:
        key = (score["arm"], score["task"], score["axes"].get("seed"))
        found[key] = (score["value"], read_lines(folder / score["items"]))
    return found


def compared(above: Path, whole: Path) -> dict[str, Any]:
    """Return how far the scores of two finished grids are apart."""
    one, other = scored(above), scored(whole)
    if one.keys() != other.keys():
        raise SystemExit(f"The grids score other models: {sorted(map(str, one.keys() ^ other.keys()))[:3]}")
    gaps = {key: one[key][0] - other[key][0] for key in one}
    pairs = [pair for key in one for pair in zip(one[key][1], other[key][1], strict=True) if "margin" in pair[0]]
    margins = [abs(a["margin"] - b["margin"]) for a, b in pairs]
    return {
        "scores": len(gaps),
        "largest_difference_of_a_score": max(map(abs, gaps.values())),
        "mean_difference_of_scores": statistics.fmean(gaps.values()),
        "pairs": len(pairs),
        "pairs_decided_otherwise": sum(a["correct"] != b["correct"] for a, b in pairs),
        "median_difference_of_margins": statistics.median(margins),
        "median_margin": statistics.median(abs(b["margin"]) for _, b in pairs),
        "seconds": {name: read_record(folder)["seconds"] for name, folder in (("above", above), ("whole", whole))},
        "environment": read_record(above)["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("above", type=Path)
    parser.add_argument("whole", type=Path)
    given = parser.parse_args()
    found = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | origin() | compared(given.above, given.whole)
    (RESULTS / "dimensions-cached.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
