"""Write the tables of the guide from the results: python benchmarks/claims/meap/tables.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy import stats

RESULTS = Path(__file__).parents[2] / "results"
OUT = Path(__file__).parents[3] / "docs" / "guide" / "masking-tables.inc"


def cell(values: list[float], digits: int = 3) -> str:
    """Return the mean and its 95 % Student interval."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f} (one seed)"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:.{digits}f} ± {stats.t.ppf(0.975, len(values) - 1) * spread:.{digits}f}"


def table(study: str, columns: dict[str, Callable[[dict[str, Any]], float | None]]) -> list[str]:
    """Return a table of one study, a row for each arm."""
    path = RESULTS / f"meap_{study}.json"
    if not path.exists():
        return ["Not measured yet."]
    cells = json.loads(path.read_text())["cells"]
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for arm in dict.fromkeys(c["arm"] for c in cells):
        own = [c for c in cells if c["arm"] == arm]
        found = [[value for c in own if (value := read(c)) is not None] for read in columns.values()]
        shown = [cell(values) if values else "–" for values in found]
        lines.append(f"| {arm} | {len(own)} | " + " | ".join(shown) + " |")
    return lines


def speed() -> list[str]:
    """Return the table of costs."""
    path = RESULTS / "meap_speed.json"
    if not path.exists():
        return ["Not measured yet."]
    found = json.loads(path.read_text())
    rows = {}
    if part := found.get("collator"):
        rows["collator, added per 1000 tokens"] = f"{part['added_us_per_1k_tokens']:.0f} µs"
    if part := found.get("step"):
        rows["collator, share of a training step of SmolLM2-135M"] = f"{100 * part['collator_share_of_step']:.3f} %"
        rows["tokens per second, MEAP / plain, in turns"] = f"{part['tokens_per_second_ratio']:.3f}"
    if part := found.get("head"):
        rows["peak memory of the head on masked rows, gathered / plain"] = f"{part['peak_mb_ratio']:.3f}"
        rows["time of the head on masked rows, gathered / plain"] = f"{part['seconds_ratio']:.3f}"
    return ["| what | value |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())]


def attention(kind: str, figure: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda c: c.get("attention_against_ntp", {}).get(kind, {}).get(figure)


def main() -> None:
    """Write the file."""
    masked = {f"{share} masked": (lambda c, s=share: c["corruption"][s]) for share in ("0.05", "0.1", "0.15")}
    parts = [
        "<!-- Written by benchmarks/claims/meap/tables.py from benchmarks/results; do not edit. -->",
        "### Many epochs over little text",
        "",
        "Nats per byte on held-out text; means with 95 % intervals over seeds, at equal tokens and epochs.",
        "",
        *table("epochs", {"best": lambda c: c["best"], "final": lambda c: c["final"], **masked,
                          "training": lambda c: c["train_last_100"]}),
        "",
        "Attention against plain training, on inputs with 15 % masked (score decay on masked keys, relative growth of "
        "the variance on the others):",
        "",
        *table("epochs", {
            "decay, two models": attention("models", "score_decay"),
            "variance, two models": attention("models", "variance_increase"),
            "decay, two inputs": attention("inputs", "score_decay"),
            "variance, two inputs": attention("inputs", "variance_increase"),
        }),
        "",
        "### Key-value recall from scratch",
        "",
        "Accuracy on clean inputs; a guess among the values in context is right one time in four.",
        "",
        *table("recall", {
            "accuracy": lambda c: c["accuracy"],
            "best": lambda c: c["best_accuracy"],
            "filler nats": lambda c: c["filler_nll"],
        }),
        "",
        "### Fine-tuning SmolLM2-135M on long contexts",
        "",
        *table("smollm2", {"recall": lambda c: c["recall"]}),
        "",
        "### Cost",
        "",
        *speed(),
        "",
    ]  # fmt: skip
    OUT.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
