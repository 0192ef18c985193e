"""Write the guide's tables from the result files: python -m benchmarks.claims.merging.tables."""

from __future__ import annotations

from benchmarks.claims.merging.synthetic import CUTOFFS, NOISE, SHAPES, SIZES
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
            f"{found['ratio']['memory']:.2f}",
        ]
        for method, found in load("merge.json").get("methods", {}).items()
    ]
    return markdown(["method", "modicum, s", "mergekit, s", "times faster", "memory, share of mergekit's"], rows)


def decompositions() -> str:
    rows = [
        [
            method,
            f"{found['seconds']:.1f}",
            f"{found['faster']:.1f}",
            f"{found['relative_difference_from_float64']:.0e}" if "relative_difference_from_float64" in found else "–",
        ]
        for method, found in load("merge-svd.json").get("results", {}).items()
    ]
    return markdown(["procedure", "seconds", "times faster", "difference from float64"], rows)


def main() -> None:
    write(
        "merge-tables.inc",
        "benchmarks/claims/merging/tables.py",
        [
            "### TSV-M of an expert and a noisy copy of it: relative error\n",
            parallel(),
            "### What bfloat16 leaves of a delta\n",
            cast(),
            "### Whole processes beside mergekit 0.1.5: a base and three experts of 135 M, two cores\n",
            speed(),
            "### Three experts of 1024 × 4096 beside the published full decompositions\n",
            decompositions(),
        ],
    )


if __name__ == "__main__":
    main()
