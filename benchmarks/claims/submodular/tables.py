"""Write the tables of the guide from the results: python -m benchmarks.claims.submodular.tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from benchmarks.tables import GUIDE, interval, load, markdown


def cells_of(study: str) -> list[dict[str, Any]]:
    """Return the cells of a study."""
    return list(load(f"submodular-{study}.json").get("cells", {}).values())


def tracking() -> str:
    """Return utilities by policy and graph, a column for each mixture."""
    cells = cells_of("tracking")
    mixtures = list(dict.fromkeys(c["mixture"] for c in cells))
    rows = []
    for label, graph in dict.fromkeys((c["label"], c["graph"]) for c in cells):
        own = {c["mixture"]: c for c in cells if (c["label"], c["graph"]) == (label, graph)}
        steps = "/".join(f"{own[m]['step']:g}" for m in mixtures if m in own and own[m]["step"] is not None)
        values = [interval(own[m]["utility"], 2) if m in own else "" for m in mixtures]
        rows.append([label, graph, steps, *values])
    rows.sort(key=lambda row: row[1] != "none")
    return markdown(["policy", "graph", "step", *mixtures], rows)


def paired() -> str:
    """Return the differences that the claims are about, world by world."""
    cells = {(c["mixture"], c["graph"], c["label"]): c for c in cells_of("tracking")}
    wanted = (
        ("hint 10 against none, ma_spl", "ma_spl, hint 10", "ma_spl"),
        ("surrogate against the plain gradient", "ma_osma", "ma_osma, plain gradient"),
    )
    rows = []
    for (mixture, graph, label), cell in cells.items():
        for name, one, other in wanted:
            if label == one and (mixture, graph, other) in cells:
                rows.append([name, mixture, graph, _difference(cell, cells[mixture, graph, other])])
        if label in ("ma_spl", "ma_spl, hint 10") and graph == "ring" and (mixture, "complete", label) in cells:
            rows.append(
                [f"ring against complete, {label}", mixture, "", _share(cell, cells[mixture, "complete", label])]
            )
        if label == "ma_spl, hint 10" and (mixture, "none", "last_greedy, hint") in cells:
            central = cells[mixture, "none", "last_greedy, hint"]
            rows.append([f"{label} of central greedy on the same prediction", mixture, graph, _share(cell, central)])
    return markdown(["question", "mixture", "graph", "paired, 95 %"], rows)


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    return interval([a - b for a, b in zip(one["utility"], other["utility"])], 2)


def _share(one: dict[str, Any], other: dict[str, Any]) -> str:
    return interval([100 * a / b for a, b in zip(one["utility"], other["utility"])], 1) + " %"


def gadgets() -> str:
    """Return the share of the optimum in the last quarter, static and flipping."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for key, cell in load("submodular-gadgets.json").get("cells", {}).items():
        kind, graph, label = key.split("|", 2)
        rows.setdefault((label.replace("|", ", "), graph), {})[kind] = interval(cell["last"])
    body = [
        [label, graph, found.get("static", ""), found.get("flipping", "")] for (label, graph), found in rows.items()
    ]
    return markdown(["policy", "graph", "labels stay", "labels flip"], body)


def sensitivity() -> str:
    """Return the utility of each variation."""
    cells = load("submodular-sensitivity.json").get("cells", {})
    return markdown(
        ["variation", "utility"], [[key.replace("|", ", "), interval(c["utility"], 2)] for key, c in cells.items()]
    )


def horizon() -> str:
    """Return regrets by the number of rounds, and the slope of their logarithm."""
    cells = cells_of("horizon")
    counts = sorted({c["T"] for c in cells})
    rows = []
    for policy, graph in dict.fromkeys((c["policy"], c["graph"]) for c in cells):
        own = {c["T"]: c for c in cells if (c["policy"], c["graph"]) == (policy, graph)}
        means = {t: sum(c["regret"]) / len(c["regret"]) for t, c in own.items()}
        beta = next(iter(own.values()))["beta"]
        shown = [interval(own[t]["regret"], 1) if t in own else "" for t in counts]
        rows.append([policy, graph, f"{1 - beta:.3f}", *shown, _slope(means)])
    return markdown(["policy", "graph", "1 - β", *map(str, counts), "slope"], rows)


def _slope(means: dict[int, float]) -> str:
    points = [(math.log(t), math.log(v)) for t, v in means.items() if v > 0]
    if len(points) < 2:
        return "–"
    x, y = (sum(part) / len(points) for part in zip(*points))
    return f"{sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points):.2f}"


def training() -> str:
    """Return objective and losses of each arm, and what it differs from choosing evenly, paired by seed."""
    cells = {(c["arm"], c["seed"]): c for c in cells_of("training")}
    rows = []
    for arm in dict.fromkeys(name for name, _ in cells):
        even = "uniform" + (f", {kind}" if (kind := cells_kind(arm)) else "")
        seeds = [seed for name, seed in cells if name == arm and (even, seed) in cells]
        objective = interval([cells[arm, seed]["objective"] for seed in seeds])
        differences = [
            interval([cells[arm, seed][key] - cells[even, seed][key] for seed in seeds], 4) if arm != even else
            interval([cells[arm, seed][key] for seed in seeds], 4)
            for key in ("test", "worst")
        ]  # fmt: skip
        rows.append([arm, str(len(seeds)), objective, *differences])
    return markdown(["arm", "seeds", "objective", "test loss", "worst domain's"], rows)


def cells_kind(arm: str) -> str:
    """Return which control of the domains an arm belongs to."""
    return next((kind for kind in ("duplicate", "identical") if arm.endswith(kind)), "")


def speed() -> str:
    """Return the milliseconds of every part."""
    rows = []
    for part, found in load("submodular-speed.json").get("parts", {}).items():
        items: Iterable[tuple[str, Any]] = found.items() if isinstance(found, dict) else ()
        flat = {"": found} if "cpu_ms" in found or "cpu_s" in found else dict(items)
        for name, cell in flat.items():
            if isinstance(cell, dict) and "cpu_ms" in cell:
                best = f"{cell['fastest_cpu_ms']:.2f}" if "fastest_cpu_ms" in cell else ""
                rows.append([part, name, f"{cell['cpu_ms']:.2f}", best])
    return markdown(["part", "case", "median ms", "fastest ms"], rows)


def main() -> None:
    """Write all tables."""
    parts = {
        "Moving targets": tracking(),
        "Moving targets: what the claims are about": paired(),
        "Gadgets, share of the optimum in the last quarter": gadgets(),
        "Variations": sensitivity(),
        "Regret by rounds": horizon(),
        "Data selection while training, at equal tokens": training(),
        "Speed, one thread": speed(),
    }
    text = "\n".join(f"### {title}\n\n{body}" for title, body in parts.items())
    (GUIDE / "coordinate-tables.inc").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
