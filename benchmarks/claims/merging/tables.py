"""Write the guide's tables from the result files: python -m benchmarks.claims.merging.tables."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from benchmarks.claims.merging.experts import METHODS, SEEDS, TASKS, shares
from benchmarks.claims.merging.synthetic import CUTOFFS, NOISE, SHAPES, SIZES
from benchmarks.speed.merging import SHAPED
from benchmarks.tables import interval, load, markdown, write


def parallel() -> str:
    shape = list(SHAPES[-1])
    cells = [c for c in load("merging-synthetic.json").get("cells", []) if c.get("shape") == shape]
    rows = []
    for noise in NOISE:
        found = [
            [c["error"] for c in cells if c["noise"] == noise and c["rtol"] == cutoff] for cutoff in CUTOFFS if cells
        ]
        rows.append([f"copy with noise {noise:g}", *map(interval, found)])
    unrelated = [
        [c["changes_unrelated"] for c in cells if c["rtol"] == cutoff and not c["noise"]] for cutoff in CUTOFFS
    ]
    rows.append(["unrelated experts: change by the cut-off", *map(interval, unrelated)])
    return markdown(["second expert", *(f"cut-off {cutoff:g}" if cutoff else "none" for cutoff in CUTOFFS)], rows)


def experts() -> str:
    """Shares of the experts' own gains, on the test split."""
    cells = load("merging-experts.json").get("cells", {})
    whole = [seed for seed in SEEDS if all(f"{seed}|{name}" in cells for name in ("start", *TASKS))]
    known = {seed: {name: cells[f"{seed}|{name}"] for name in ("start", *TASKS)} for seed in whole}
    names = {"start": "as delivered", "mixed": "trained on mixed data"} | {t: f"expert of {t}" for t in TASKS}
    rows = []
    for name in (*names, *METHODS):
        found = {seed: cells[f"{seed}|{name}"] for seed in whole if f"{seed}|{name}" in cells}
        reached = [shares(cell["test"], known[seed], "test") for seed, cell in found.items()]
        right = [[cell["test"][task]["accuracy"] for task in TASKS] for cell in found.values()]
        rows.append(
            [
                names.get(name, name),
                interval([mean(each) for each in reached], 2),
                interval([min(each) for each in reached], 2),
                interval([mean(each) for each in right], 2),
                interval([min(each) for each in right], 2),
                ", ".join(f"{cell['scale']:g}" for cell in found.values() if "scale" in cell) or "–",
            ]
        )
    head = ["model", "gain, mean", "gain, worst task", "accuracy, mean", "accuracy, worst task", "scales chosen"]
    return markdown(head, rows if whole else [])


def cast() -> str:
    cells = [c for c in load("merging-synthetic.json").get("cells", []) if c["study"] == "cast"]
    columns = ("share_of_entries_changed", "relative_error_of_delta", "cosine")
    rows = [
        [f"{size:g}", *(interval([c[column] for c in cells if c["size"] == size]) for column in columns)]
        for size in SIZES
    ]
    return markdown(["delta / weight", "entries that change", "relative error of the delta", "cosine"], rows)


def speed() -> str:
    rows = [
        [
            method,
            f"{found['modicum']['seconds']['median']:.1f}",
            f"{found['mergekit']['seconds']['median']:.1f}",
            f"{found['ratio']['seconds']:.1f}",
            _figure(found["ratio"], "seconds_without_imports", ".1f"),
            _figure(found.get("inside", {}), "over_floor", ".1f"),
            f"{found['ratio']['memory']:.2f}",
        ]
        for method, found in load("merge.json").get("methods", {}).items()
    ]
    head = ["method", "modicum, s", "mergekit, s", "times faster", "without imports", "over reading and writing"]
    return markdown([*head, "memory, share of mergekit's"], rows)


def _figure(found: Mapping[str, float], name: str, form: str) -> str:
    return format(found[name], form) if name in found else "–"


def large() -> str:
    layers = load("merge-large.json").get("layers", {})
    rows = [
        [
            f"{number} layers",
            method,
            f"{one['inside']['seconds']:.1f}",
            f"{one['inside']['read_and_write']:.1f}",
            f"{one['inside']['over_floor']:.1f}",
            f"{one['goal']:.1f}" if "goal" in one else "–",
            _figure(one, "ratio", ".1f"),
        ]
        for number, found in layers.items()
        for method, one in found["methods"].items()
    ]
    head = ["method", "merge, s", "reading and writing the bytes, s", "ratio", "goal", "times faster than mergekit"]
    return markdown(["shape", *head], rows)


def memory() -> str:
    rows = []
    for shape, methods in load("merge.json").get("shapes", {}).items():
        for method in SHAPED:
            found = methods[method]
            peaks = [f"{run['above_imports_mb']:.0f}" for key, run in found.items() if key != "ratio"]
            rows.append([shape, method, *peaks, f"{found['ratio']['memory']:.2f}"])
    return markdown(
        ["shape", "method", "few layers, MB", "mergekit, few layers", "all layers", "share of mergekit's"], rows
    )


def decompositions() -> str:
    columns = ("relative_difference_from_float64", "relative_difference_from_float64_with_cut_off_0.01")
    rows = [
        [
            method,
            f"{found['seconds']:.1f}",
            f"{found['faster']:.1f}",
            *(f"{found[column]:.0e}" if column in found else "–" for column in columns),
        ]
        for method, found in load("merge-svd.json").get("results", {}).items()
    ]
    header = ["procedure", "seconds", "times faster", "difference from float64", "from float64 with a cut-off of 0.01"]
    return markdown(header, rows)


def main() -> None:
    write(
        "merge-tables.inc",
        "benchmarks/claims/merging/tables.py",
        [
            "### TSV-M of an expert and a noisy copy of it: relative error\n",
            parallel(),
            "### Real experts of SmolLM2: share of each expert's own gain that one model keeps\n",
            experts(),
            "### What bfloat16 leaves of a delta\n",
            cast(),
            "### Whole processes beside mergekit 0.1.5: a base and three experts of 135 M, two cores\n",
            speed(),
            "### Compiled passes on two cores, without imports: a base and three experts of 1.5 B's shape\n",
            large(),
            "### Peak memory above the imports, by the number of layers\n",
            memory(),
            "### Three experts of 1024 × 4096 beside the published full decompositions\n",
            decompositions(),
        ],
    )


if __name__ == "__main__":
    main()
