"""Print the studies' tables from their JSON files.

python -m benchmarks.claims.hrp.table [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

from benchmarks.claims.hrp.result import interval, read_result

SEEDS = 3


def sweep(cells: dict[str, dict[str, Any]], metric: str, fixed: float) -> list[str]:
    """One line for each method: mean and 95 % interval at the fixed learning rate and at its best one."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, found in cells.items():
        cell = json.loads(key)
        preheated = "R" in cell and cell["method"] not in ("random", "exact")
        name = f"{cell['method']} R={cell['R']}" if preheated else cell["method"]
        values[name][cell["lr"]].append(found[metric])
    lines = [f"| method | lr {fixed:g} | best lr | at | seeds |", "|---|---|---|---|---|"]
    for name, by_rate in values.items():
        # A rate that one seed tried in order to select another is not compared.
        enough = min(SEEDS, max(map(len, by_rate.values())))
        means = {rate: interval(some) for rate, some in by_rate.items() if len(some) >= enough}
        best = min(means, key=lambda rate: means[rate][0])
        at_fixed = "{:.4f} ± {:.4f}".format(*means[fixed]) if fixed in means else "–"
        shown = "{:.4f} ± {:.4f}".format(*means[best])
        lines.append(f"| {name} | {at_fixed} | {shown} | {best:g} | {len(by_rate[best])} |")
    return lines


def optimal(cells: dict[str, dict[str, Any]]) -> list[str]:
    """Residual energy by preheating rank."""
    by_rank: dict[int, list[dict[str, float]]] = defaultdict(list)
    for key, found in cells.items():
        by_rank[json.loads(key)["R"]].append(found)
    lines = ["| R | right vectors to A | left vectors to B | best | seeds |", "|---|---|---|---|---|"]
    for R, some in sorted(by_rank.items()):
        means = [interval([found[name] for found in some])[0] for name in ("right_to_A", "left_to_B", "best")]
        lines.append(f"| {R} | " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {len(some)} |")
    return lines


def shown(name: str, cells: dict[str, dict[str, Any]]) -> list[str]:
    """The tables of one study."""
    if name == "hrp-matrix":
        parts = _split(cells, "study")
        return [*optimal(parts.get("optimal", {})), "", *sweep(parts.get("trained", {}), "residual", 1e-3)]
    if name == "hrp-transformer":
        return sweep(cells, "kl", 3e-3)
    lines = []
    for task, some in _split(cells, "task").items():
        lines += [task, "", *sweep(some, "loss", 1e-3), ""]
    return lines


def _split(cells: dict[str, dict[str, Any]], part: str) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, value in cells.items():
        found.setdefault(json.loads(key)[part], {})[key] = value
    return found


def main() -> None:
    for name in sys.argv[1:] or ["hrp-matrix", "hrp-transformer", "hrp-smollm2"]:
        cells = read_result(name).get("cells", {})
        print(f"\n{name}: {len(cells)} cells\n")
        print("\n".join(shown(name, cells)))


if __name__ == "__main__":
    main()
