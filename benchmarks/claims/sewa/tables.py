"""Write the guide's tables from the result files: python -m benchmarks.claims.sewa.tables."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import interval, load, markdown, write

STUDIES = {
    "byte model": "sewa-byte-model.json", "digits": "sewa-digits.json", "packages": "sewa-packages.json",
    "cloning": "sewa-cloning.json", "SmolLM2": "sewa-smollm2.json",
}  # fmt: skip
SHOWN = (
    "last", "decay over the window", "uniform", "lawa, tuned", "ema, tuned", "wsm sqrt, tuned", "random 5, mean of 5",
    "best", "window", "greedy", "greedy, with the forwards of sewa", "sewa, k 5", "sewa, k auto, no exchanges",
    "sewa, k auto",
    "sewa, k auto, guard", "sewa, k auto, tuned guard", "sewa, k auto, on held-out data", "sewa published, k 5",
    "simplex", "quadratic", "quadratic, k auto", "quadratic, k 5",
)  # fmt: skip
GOALS = (
    ("iteration", ("512 tokens", "ratio"), "one sewa step, n = 20, over forward and backward of 512 tokens", "≤ 1.4"),
    ("iteration", ("2048 tokens", "ratio"), "the same, of 2,048 tokens", "≤ 1.15"),
    ("quadratic", ("training steps",), "a whole quadratic search, n = 20, in training steps of 512 tokens", "≤ 26"),
    ("memory", ("share of allowed",), "peak memory of a search over mean, gradient, activations and 0.3 GB", "≤ 1"),
    ("memory", ("stack over search",), "peak memory of a stack of 20 under autograd over that of a search", "≥ 5"),
    ("mean", ("ratios", "torch.load and sum"), "load and sum by torch over our mean of 20 checkpoints", "≥ 2"),
    ("mean", ("ratios", "mergekit, with its start"), "mergekit's linear over ours", "≥ 2"),
    ("mean", ("ratios", "read and write"), "reading and writing the bytes over ours", "≥ 0.67"),
    ("mean", ("share of memory",), "memory of our mean over that of load and sum by torch", "≤ 0.125"),
    ("moving", ("ratio",), "an update of the moving average over torch's own", "≤ 1.05"),
    ("moving", ("share of step",), "an update over a training step of 2,048 tokens", "≤ 0.01"),
)


def differences(study: str, figure: str = "loss", digits: int = 4) -> str:
    """Tabulate, for each regime, the paired difference in a figure to the tuned mean of the latest."""
    cells: list[dict[str, Any]] = list(load(STUDIES[study]).get("cells", {}).values())
    regimes = list(dict.fromkeys(cell["regime"] for cell in cells))
    rows = []
    for arm in SHOWN:
        row = [f"`{arm}`" if arm == "sewa, k auto, guard" else arm]
        for regime in regimes:
            mine = [cell["arms"] for cell in cells if cell["regime"] == regime and arm in cell["arms"]]
            if arm == "lawa, tuned":
                row.append(interval([arms[arm][figure] for arms in mine], digits))
            else:
                row.append(interval([arms[arm][figure] - arms["lawa, tuned"][figure] for arms in mine], digits))
        if any(cell != "–" for cell in row[1:]):
            rows.append(row)
    counts = [sum(cell["regime"] == regime for cell in cells) for regime in regimes]
    heads = [f"{regime}, {count} seeds" for regime, count in zip(regimes, counts)]
    return markdown(["rule", *heads], rows)


def speed() -> str:
    parts = load("averaging-speed.json").get("parts", {})
    rows = []
    for part, path, what, goal in GOALS:
        found: Any = parts.get(part)
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict):
            found = found["wall"]
        rows.append([what, goal, "not measured" if found is None else f"{found:.3g}"])
    return markdown(["what", "goal", "measured"], rows)


def main() -> None:
    parts = []
    for study in STUDIES:
        if load(STUDIES[study]).get("cells"):
            parts += [
                f"\n### Measured: {study}\n",
                "Loss on data that no rule has seen: of the tuned mean of the latest (`lawa, tuned`) itself, of all "
                "others the difference to it, paired by seed, with 95 % intervals. Negative is better.\n",
                differences(study),
            ]
    if load(STUDIES["cloning"]).get("cells"):
        parts += ["\nThe same as returns of 50 episodes; positive is better.\n", differences("cloning", "return", 2)]
    parts += ["\n### Measured: costs\n", "SmolLM2-135M's shape, one thread of a shared two-core machine.\n", speed()]
    write("average-tables.inc", "benchmarks/claims/sewa/tables.py", parts)


if __name__ == "__main__":
    main()
