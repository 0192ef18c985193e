"""Write the tables of the guide from the results: python -m benchmarks.claims.meap.tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.tables import interval, load, markdown, write


def cells_of(study: str) -> list[dict[str, Any]]:
    """Return the cells of a study."""
    return list(load(f"meap-{study}.json").get("cells", {}).values())


def table(study: str, columns: dict[str, Callable[[dict[str, Any]], float | None]]) -> str:
    """Return a table of one study, a row for each arm."""
    cells = cells_of(study)
    rows = []
    for arm in dict.fromkeys(c["arm"] for c in cells):
        own = [c for c in cells if c["arm"] == arm]
        found = [[value for c in own if (value := read(c)) is not None] for read in columns.values()]
        rows.append([arm, str(len(own)), *map(interval, found)])
    return markdown(["arm", "seeds", *columns], rows)


def recall() -> str:
    """Return the table of recall, by seed: it is found or not, and a mean says neither."""
    rows = []
    cells = cells_of("recall")
    for arm in dict.fromkeys(c["arm"] for c in cells):
        own = [c for c in cells if c["arm"] == arm]
        accuracies, steps = (", ".join(shown) for shown in zip(*map(_outcome, own)))
        rows.append([arm, accuracies, steps, interval([c["filler_nll"] for c in own])])
    return markdown(["arm", "accuracy, by seed", "found at step, by seed", "filler nats"], rows)


def _outcome(cell: dict[str, Any]) -> tuple[str, str]:
    return f"{cell['accuracy']:.2f}", str(cell["found_at"] or "never")


def speed() -> str:
    """Return the table of costs."""
    found, rows = load("meap-speed.json"), {}
    if part := found.get("collator"):
        rows["collator, added per 1000 tokens"] = f"{part['added_us_per_1k_tokens']:.0f} µs"
    if part := found.get("step"):
        rows["collator, share of a training step of SmolLM2-135M"] = f"{100 * part['collator_share_of_step']:.3f} %"
        rows["tokens per second, MEAP / plain, in turns"] = f"{part['tokens_per_second_ratio']:.3f}"
    if part := found.get("head"):
        rows["peak memory of the head on masked rows, gathered / plain"] = f"{part['peak_mb_ratio']:.3f}"
        rows["time of the head on masked rows, gathered / plain"] = f"{part['seconds_ratio']:.3f}"
    return markdown(["what", "value"], rows.items())


def attention(kind: str, figure: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda c: c.get("attention_against_ntp", {}).get(kind, {}).get(figure)


def nats_at(cell: dict[str, Any], *, length: int) -> float:
    """Return the mean nats per answer token at one length, over tasks and depths."""
    found = [row[grid["lengths"].index(length)] for grid in cell["grids"].values() for row in grid["answer_nats"]]
    return math.fsum(found) / len(found)


def main() -> None:
    """Write the file."""
    masked = {f"{share} masked": (lambda c, s=share: c["corruption"][s]) for share in ("0.05", "0.1", "0.15")}
    parts = [
        "### Many epochs over little text",
        "",
        "Nats per byte on held-out text; means with 95 % intervals over seeds, at equal tokens and epochs.",
        "",
        table("epochs", {"best": lambda c: c["best"], "final": lambda c: c["final"], **masked,
                          "training": lambda c: c["train_last_100"]}),
        "Attention against plain training, on inputs with 15 % masked (score decay on masked keys, relative growth of "
        "the variance on the others):",
        "",
        table("epochs", {
            "decay, two models": attention("models", "score_decay"),
            "variance, two models": attention("models", "variance_increase"),
            "decay, two inputs": attention("inputs", "score_decay"),
            "variance, two inputs": attention("inputs", "variance_increase"),
        }),
        "### Key-value recall from scratch",
        "",
        "Accuracy on clean inputs, where a guess among the values in context is right one time in eight, and the first "
        "step at which it passed 0.9, looked at every 50 steps, of 1200 in all.",
        "",
        recall(),
        "### Fine-tuning SmolLM2-135M on long contexts",
        "",
        "Questions of three kinds at the trained length and at twice that: share of answers that are right, and nats "
        "per token of the answer.",
        "",
        table("smollm2", {
            "recall": lambda c: c["recall"],
            "nats": lambda c: c["answer_nats"],
            **{f"nats, {n} tokens": partial(nats_at, length=n) for n in (256, 512)},
        }),
        "### Cost",
        "",
        speed(),
    ]  # fmt: skip
    write("masking-tables.inc", "benchmarks/claims/meap/tables.py", parts)


if __name__ == "__main__":
    main()
