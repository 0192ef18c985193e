"""Write the guide's tables from the result files: python -m benchmarks.claims.hrp.tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeAlias

from benchmarks.claims.hrp import smollm2, transformer
from benchmarks.tables import interval, load, markdown, write

Cells: TypeAlias = list[dict[str, Any]]  # what names a cell and what it found
SEEDS = 3


def cells(name: str) -> Cells:
    return [json.loads(key) | found for key, found in load(name).get("cells", {}).items()]


def method_of(cell: dict[str, Any]) -> str:
    preheated = "R" in cell and cell["method"] not in ("random", "exact")
    return f"{cell['method']} R={cell['R']}" if preheated else str(cell["method"])


def sweep(some: Cells, metric: str, fixed: float, digits: int = 4) -> str:
    """One line for each method: at the fixed learning rate and at its best one."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in some:
        values[method_of(cell)][cell["lr"]].append(cell[metric])
    rows = []
    for name, by_rate in values.items():
        # A rate that one seed tried in order to select another is not compared.
        compared = {rate: found for rate, found in by_rate.items() if len(found) >= SEEDS}
        if not compared:
            continue
        best = min(compared, key=lambda rate: _finite(math.fsum(compared[rate]) / len(compared[rate])))
        edge = best in (min(by_rate), max(by_rate))
        rows.append(
            [
                name,
                interval(compared.get(fixed, []), digits),
                interval(compared[best], digits),
                f"{best:g}" + (" (edge)" if edge else ""),
                str(len(compared[best])),
            ]
        )
    return markdown(["method", f"at {fixed:g}", "at its best rate", "which is", "seeds"], rows)


def optimal(some: Cells) -> str:
    """Residual energy by preheating rank."""
    columns = ("right_to_A", "left_to_B", "best")
    by_rank: dict[int, Cells] = defaultdict(list)
    for cell in some:
        by_rank[cell["R"]].append(cell)
    rows = [
        [str(R), *(interval([cell[name] for cell in found]) for name in columns), str(len(found))]
        for R, found in sorted(by_rank.items())
    ]
    return markdown(["R", "right vectors to A", "left vectors to B", "best of rank 8", "seeds"], rows)


def geometry(some: Cells) -> str:
    """How much of the teacher's change the rows of A hold, and how far training turned them; at the fixed rate."""
    by_method: dict[str, Cells] = defaultdict(list)
    for cell in some:
        if cell["lr"] == FIXED["transformer"] and cell.get("captured_at_start") is not None:
            by_method[cell["method"]].append(cell)
    rows = []
    for method, found in by_method.items():
        shares = [interval([cell[f"captured_at_{when}"] for cell in found]) for when in ("start", "end")]
        angle = interval([math.degrees(cell["angle_start_to_end"]) for cell in found], 0)
        rows.append([method, *shares, angle, str(len(found))])
    head = ["method", "captured at the start", "captured at the end", "turned by, in degrees", "seeds"]
    return markdown(head, rows)


def speed() -> str:
    parts, rows = load("hrp-speed.json").get("parts", {}), []
    goals = (
        ("dense", "dense_over_leading", "dense SVD over that of the factors, 4096 × 11008, R = 128", "≥ 50"),
        ("peft", "sum", "start of SmolLM2 through PEFT, 210 modules", "≤ 1 s"),
        ("7b", "decompose", "decomposition of a 7B model's 224 modules", "≤ 10 s"),
        ("steps_smollm2", "preheat_over_lora", "preheating step over a LoRA step, SmolLM2", "≤ 1.15"),
        ("steps_7b_layer", "preheat_over_lora", "preheating step over a LoRA step, a layer of 7B", "≤ 1.15"),
        ("steps_smollm2", "added_to_1000_steps", "preheating at the defaults, share of 1000 steps", "≤ 0.03"),
    )
    for part, key, what, goal in goals:
        if part in parts:
            found = parts[part]
            clocks = [f"{found[key][clock]:.3g}" for clock in ("wall", "cpu")]
            rows.append([what, goal, *clocks, f"{found['threads']}", f"{found['load_before']:g}"])
    return markdown(["what", "goal", "wall", "processor", "threads", "load before"], rows)


FIXED = {"matrix": 1e-3, "transformer": 3e-3, "smollm2": smollm2.FIXED}


def parts() -> Iterator[str]:
    matrix = cells("hrp-matrix.json")
    yield "### Matrix model: residual after the best main stage, by preheating rank\n"
    yield optimal([cell for cell in matrix if cell["study"] == "optimal"])
    yield "### Matrix model: residual after 130 steps, by learning rate\n"
    yield sweep([cell for cell in matrix if cell["study"] == "trained"], "residual", FIXED["matrix"])
    yield f"### Tiny transformer: divergence from the teacher after {transformer.TOTAL} steps, by learning rate\n"
    found = cells("hrp-transformer.json")
    yield sweep(found, "kl", FIXED["transformer"])
    yield f"### Tiny transformer: directions, at {FIXED['transformer']:g}\n"
    yield geometry(found)
    found = cells("hrp-smollm2.json")
    for task in smollm2.TASKS:
        yield f"### SmolLM2-135M, `{task}`: loss of unseen answers after {smollm2.TOTAL} steps\n"
        yield sweep([cell for cell in found if cell["task"] == task], "loss", FIXED["smollm2"], 3)
    yield "### Speed on a CPU\n"
    yield speed()


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def main() -> None:
    write("adapters-tables.inc", "benchmarks/claims/hrp/tables.py", parts())


if __name__ == "__main__":
    main()
