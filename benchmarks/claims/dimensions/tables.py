"""Write the guide's tables from the result files: python -m benchmarks.claims.dimensions.tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.claims.dimensions.conflict import METHODS, SEEDS, SHARES
from benchmarks.tables import interval, load, markdown, write

EQUAL, ONE = "mixture, steps of both experts", "mixture, steps of one expert"
MIXTURE = "mixed heuristic"
Arms = Mapping[str, Any]


def cells() -> dict[tuple[int, float], Arms]:
    """Return the arms of every seed that was measured at all shares."""
    found = load("dimensions-conflict.json").get("cells", {})
    known = {(cell["seed"], cell["q"]): cell["arms"] for cell in found.values()}
    return {key: arms for key, arms in known.items() if all((key[0], q) in known for q in SHARES)}


def seeds(known: Mapping[tuple[int, float], Arms]) -> list[int]:
    return [seed for seed in SEEDS if (seed, SHARES[0]) in known]


def best_single(arms: Arms) -> Sequence[float]:
    experts = [arm["test"] for name, arm in arms.items() if name.startswith("expert, ")]
    return max(experts, key=mean)


def scores(known: Mapping[tuple[int, float], Arms], name: str, q: float, of: Any) -> list[float]:
    """Return the mean or worst accuracy of an arm, for each seed."""
    found = []
    for seed in seeds(known):
        arms = known[seed, q]
        found.append(float(of(best_single(arms) if name == "the better expert" else arms[name]["test"])))
    return found


def slope(values: Sequence[float]) -> float:
    """Return the slope of least squares over the shares."""
    middle = mean(SHARES)
    top = sum((q - middle) * (value - mean(values)) for q, value in zip(SHARES, values))
    return top / sum((q - middle) ** 2 for q in SHARES)


def arms_table(known: Mapping[tuple[int, float], Arms]) -> str:
    first = next(iter(known.values()), {})
    names = ["base", *(n for n in first if n.startswith("expert, ")), "the better expert", EQUAL, ONE, *METHODS]
    rows = [[name, *(interval(scores(known, name, q, of), 3) for of in (mean, min) for q in SHARES)] for name in names]
    head = ["arm", *(f"mean, q = {q:g}" for q in SHARES), *(f"worst, q = {q:g}" for q in SHARES)]
    return markdown(head, rows if known else [])


def differences(known: Mapping[tuple[int, float], Arms], against: str) -> str:
    rows = []
    for name in METHODS:
        by_seed = [
            [mean(known[seed, q][name]["test"]) - mean(known[seed, q][against]["test"]) for q in SHARES]
            for seed in seeds(known)
        ]
        columns: Iterable[Sequence[float]] = zip(*by_seed)
        rows.append([name, *(interval(column, 3) for column in columns), interval([slope(v) for v in by_seed], 3)])
    return markdown(["merge", *(f"q = {q:g}" for q in SHARES), "slope over q"], rows if known else [])


def worst_of_resm(known: Mapping[tuple[int, float], Arms]) -> str:
    rows = []
    for other in ("TSV-M", "Task arithmetic"):
        columns = [
            [min(known[seed, q]["RESM"]["test"]) - min(known[seed, q][other]["test"]) for seed in seeds(known)]
            for q in SHARES
        ]
        rows.append([f"RESM minus {other}", *(interval(column, 3) for column in columns)])
    return markdown(["worst dimension", *(f"q = {q:g}" for q in SHARES)], rows if known else [])


def controls(known: Mapping[tuple[int, float], Arms]) -> str:
    first = next(iter(known.values()), {})
    names = [name for name in first if "first expert and" in name]
    rows = [[name, *(interval(scores(known, name, q, mean), 3) for q in SHARES)] for name in names]
    return markdown(["control", *(f"mean, q = {q:g}" for q in SHARES)], rows)


def language_model() -> str:
    """Return the table of one run of ``3h-quick``."""
    scores = load("3h-quick.json").get("scores", [])
    values: dict[str, dict[str, str]] = {}
    for score in scores:
        half = "" if score["low"] is None else f" ± {(score['high'] - score['low']) / 2:.2f}"
        values.setdefault(score["arm"], {})[score["task"]] = f"{score['value']:.2f}{half} ({score['n']})"
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    return markdown(["arm", *tasks], [[arm, *(row.get(task, "–") for task in tasks)] for arm, row in values.items()])


def five_dimensions() -> dict[str, dict[int, dict[str, float]]]:
    """Return the pair accuracies of ``3h`` by arm, seed and task."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for score in load("3h.json").get("scores", []):
        if score["metric"] == "pair_accuracy":
            found.setdefault(score["arm"], {}).setdefault(score["seed"], {})[score["task"]] = score["value"]
    return found


def real_pairs(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Means over seeds of every dimension, of all five, of the worst, and of the difference from the mixture."""
    mixture = found.get(MIXTURE, {})
    rows = []
    for arm, by_seed in found.items():
        whole = list(by_seed.values())
        pairs = [mean(v.values()) - mean(mixture[s].values()) for s, v in by_seed.items() if s in mixture]
        columns = [interval([v[task] for v in whole], 2) for task in whole[0]]
        columns += [interval([float(of(v.values())) for v in whole], 3) for of in (mean, min)]
        rows.append([arm, *columns, "–" if arm == MIXTURE else interval(pairs, 3)])
    tasks = list(next(iter(next(iter(found.values())).values()))) if found else []
    return markdown(["arm", *tasks, "mean", "worst", "mean less the mixture"], rows)


def main() -> None:
    known = cells()
    write(
        "dimensions-tables.inc",
        "benchmarks/claims/dimensions/tables.py",
        [
            f"Pair accuracy on {len(seeds(known))} seeds, with 95 % intervals over seeds.\n",
            arms_table(known),
            "A merge minus the mixture of as many steps as both experts together, paired by seed:\n",
            differences(known, EQUAL),
            "A merge minus the mixture of as many steps as one expert:\n",
            differences(known, ONE),
            "RESM beside the merges that it has to beat:\n",
            worst_of_resm(known),
            "Controls, which merge the first expert with what knows nothing of the second dimension:\n",
            controls(known),
            "`modicum run 3h-quick` on SmolLM2, one seed: pair accuracy on test pairs, half the width of its 95 %\n"
            "interval, and the number of pairs.\n",
            language_model(),
            "`modicum run 3h` on SmolLM2, three seeds: pair accuracy on 64, 64, 14, 60 and 41 test pairs, with 95 %\n"
            "intervals over seeds; the difference is paired by seed.\n",
            real_pairs(five_dimensions()),
        ],
    )


if __name__ == "__main__":
    main()
