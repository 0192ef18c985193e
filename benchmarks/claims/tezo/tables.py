"""Write the guide's tables from the result files: python -m benchmarks.claims.tezo.tables."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.claims.tezo.study import SEEDS, SELECTION_SEED
from benchmarks.tables import interval, load, markdown, write

Cells = dict[float, dict[int, dict[str, Any]]]


def by_method(name: str) -> dict[str, Cells]:
    """Return the cells of a study: method, learning rate, seed."""
    found: dict[str, Cells] = defaultdict(lambda: defaultdict(dict))
    for cell in load(name).get("cells", {}).values():
        found[cell["method"]][cell["lr"]][cell["seed"]] = cell
    return found


def study() -> str:
    rows = []
    for method, cells in by_method("tezo-study.json").items():
        reported = {lr: seeds for lr, seeds in cells.items() if all(seed in seeds for seed in SEEDS)}
        for lr, seeds in reported.items():
            own = [seeds[seed] for seed in SEEDS]
            tried = sorted(rate for rate in cells if SELECTION_SEED in cells[rate])
            state = own[0]["report"]["state_numbers"]
            rows.append(
                [
                    method,
                    f"{lr:.0e}" + (" (edge)" if lr in (tried[0], tried[-1]) else ""),
                    str(len(tried)),
                    interval([c["dev_loss"] for c in own if c["dev_loss"] is not None]),
                    interval([100 * c["dev_accuracy"] for c in own], 1),
                    f"{state:,}",
                ]
            )
    head = ["method", "learning rate", "rates tried", "dev loss", "dev accuracy, %", "state, numbers"]
    return markdown(head, rows)


def speed(part: str, columns: dict[str, str], *, last: bool = False) -> str:
    rows = []
    for name, cell in load("tezo-speed.json").items():
        if name.startswith(part) and cell["settings"].get("last", False) == last:
            rows += [[method, *(str(row.get(key, "–")) for key in columns)] for method, row in cell["results"].items()]
    return markdown(["method", *columns.values()], rows)


TIMES = {
    "over_two_forwards": "wall / two forwards",
    "over_two_forwards_processor": "processor / two forwards",
    "faster_than_published": "faster than MeZO as published",
}
PEAKS = {
    "peak_bytes": "bytes",
    "over_inference": "over inference",
    "over_inference_twice_the_rows": "over inference on twice the rows",
    "over_mezo_adam": "over MeZO-Adam",
}


def main() -> None:
    write(
        "zeroth-order-tables.inc",
        "benchmarks/claims/tezo/tables.py",
        [
            "### A toy whose labels are turned round, 2000 forwards\n",
            study(),
            "### A step of SmolLM2-135M, 8 × 64 tokens, float32\n",
            speed("time", TIMES),
            "### The same with the loss over the last position\n",
            speed("time", TIMES, last=True),
            "### Peak memory of a process\n",
            speed("memory", PEAKS),
            "### The same with the loss over the last position\n",
            speed("memory", PEAKS, last=True),
        ],
    )


if __name__ == "__main__":
    main()
