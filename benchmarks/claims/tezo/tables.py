"""Write the guide's tables from the result files: python -m benchmarks.claims.tezo.tables."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.claims.tezo.smollm2 import TASKS
from benchmarks.claims.tezo.study import SEEDS, SELECTION_SEED
from benchmarks.tables import interval, load, markdown, write

Cells = dict[float, dict[int, dict[str, Any]]]


def by_method(name: str, task: str | None = None) -> dict[str, Cells]:
    """Return the cells of a study: method, learning rate, seed."""
    found: dict[str, Cells] = defaultdict(lambda: defaultdict(dict))
    for cell in load(name).get("cells", {}).values():
        if "method" in cell and cell.get("task") == task:
            found[cell["method"]][cell["lr"]][cell["seed"]] = cell
    return found


def chosen(cells: Cells) -> list[tuple[str, list[dict[str, Any]], int]]:
    """Return the rates that every seed reports on, the cells there, and how many rates were tried."""
    tried = sorted(rate for rate in cells if SELECTION_SEED in cells[rate])
    return [
        (f"{lr:.0e}" + (" (edge)" if lr in (tried[0], tried[-1]) else ""), [seeds[seed] for seed in SEEDS], len(tried))
        for lr, seeds in cells.items()
        if all(seed in seeds for seed in SEEDS)
    ]


def study() -> str:
    rows = []
    for method, cells in by_method("tezo-study.json").items():
        for lr, own, tried in chosen(cells):
            state = own[0]["report"]["state_numbers"]
            rows.append([method, lr, str(tried), *_losses(own), f"{state:,}"])
    head = ["method", "learning rate", "rates tried", "dev loss", "dev accuracy, %", "state, numbers"]
    return markdown(head, rows)


def _losses(cells: list[dict[str, Any]]) -> list[str]:
    return [
        interval([cell["dev_loss"] for cell in cells if cell["dev_loss"] is not None]),
        interval([100 * cell["dev_accuracy"] for cell in cells], 1),
    ]


def real() -> str:
    """Return what each method makes of the time of 32 forward passes on SmolLM2."""
    stored = load("tezo-smollm2.json").get("cells", {})
    rows = []
    for task in TASKS:
        starts = [stored[f"{task}|start|{seed}"] for seed in SEEDS if f"{task}|start|{seed}" in stored]
        if starts:
            rows.append([task, "before", "", "", "", "", *_losses(starts)])
        for method, cells in by_method("tezo-smollm2.json", task).items():
            for lr, own, _ in chosen(cells):
                peak, cost = stored[f"memory|{method}"], stored[f"cost|{method}"]
                work = [f"{cost['batch']} × {own[0]['steps']}", f"{cost['forwards']:.2f}"]
                rows.append([task, method, lr, *work, f"{peak['peak_bytes'] / 1e6:,.0f}", *_losses(own)])
    head = ["task", "method", "learning rate", "batch × steps", "step, in forward passes", "peak, MB"]
    return markdown([*head, "dev loss", "dev accuracy, %"], rows)


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
            "### SmolLM2-135M, two tasks, the time of 32 forward passes\n",
            real(),
            "### A step of SmolLM2-135M, 8 × 64 tokens, float32\n",
            speed("time", TIMES),
            "### The same with the loss over the last position\n",
            speed("time", {**TIMES, "faster_than_published_logits_too": "and with its logits"}, last=True),
            "### Peak memory of a process\n",
            speed("memory", PEAKS),
            "### The same with the loss over the last position\n",
            speed("memory", PEAKS, last=True),
        ],
    )


if __name__ == "__main__":
    main()
