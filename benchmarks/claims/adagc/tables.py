"""Write the guide's tables and pictures from the result files: python -m benchmarks.claims.adagc.tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import Curve, curves
from scipy.stats import t as student

RESULTS = Path(__file__).parents[2] / "results"
GUIDE = Path(__file__).parents[3] / "docs" / "guide"
OUT = GUIDE / "gradients-tables.inc"
DRAWN = ("none", "global", "zclip", "adagc min (published)", "adagc ema (default)")


def load(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def interval(values: Sequence[float]) -> str:
    """Write mean and half width of the 95 % Student-t interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.4f} (one seed)"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return f"{mean:.4f} ± {student.ppf(0.975, len(values) - 1) * spread / math.sqrt(len(values)):.4f}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def faults() -> str:
    cells = load("adagc-faults.json").get("cells", {}).values()
    arms = dict.fromkeys((c["optimizer"], c["arm"]) for c in cells)
    rows = []
    for optimizer, arm in arms:
        mine = [c for c in cells if (c["optimizer"], c["arm"]) == (optimizer, arm)]
        clean = {c["seed"]: c for c in mine if not c["with_faults"]}
        hit = {c["seed"]: c for c in mine if c["with_faults"]}
        both = sorted(clean.keys() & hit.keys())
        if not both:
            continue
        rates = [c["clip_rate"] for c in mine if c["clip_rate"] is not None]
        rows.append(
            [
                optimizer,
                arm,
                str(len(both)),
                interval([clean[s]["held_out_loss"] for s in both]),
                interval([hit[s]["held_out_loss"] for s in both]),
                interval([hit[s]["held_out_loss"] - clean[s]["held_out_loss"] for s in both]),
                f"{100 * sum(rates) / len(rates):.0f} %" if rates else "–",
            ]
        )
    return markdown(["optimizer", "rule", "seeds", "clean", "with faults", "degradation", "clipped"], rows)


def draw() -> None:
    """Draw the training losses of the main arms, without and with faults."""
    panels: dict[str, dict[str, list[Curve]]] = {"without faults": {}, "with faults": {}}
    for cell in load("adagc-faults.json").get("cells", {}).values():
        if cell["optimizer"] == "adamw0.999" and cell["arm"] in DRAWN:
            losses = cell["train_loss"][4:]  # the first hundred steps would flatten the rest
            steps = [20.0 * (number + 5) for number in range(len(losses))]
            panel = panels["with faults" if cell["with_faults"] else "without faults"]
            panel.setdefault(cell["arm"], []).append((steps, losses))
    curves(GUIDE / "gradients-faults.svg", panels, x="step", y="training loss")


def smollm2() -> str:
    rows = [
        [
            c["arm"],
            f"{c['lr']:g}",
            str(c["steps"]),
            f"{c['held_out_before']:.3f}",
            f"{c['held_out_after']:.3f}",
            f"{c['worst_train_loss']:.2f}",
            str(c["spikes"]),
            "–" if c["clip_rate"] is None else f"{100 * c['clip_rate']:.0f} %",
        ]
        for c in load("adagc-smollm2.json").get("cells", {}).values()
    ]
    head = ["rule", "lr", "steps", "held-out before", "held-out after", "worst training loss", "spikes", "clipped"]
    return markdown(head, rows)


def speed() -> str:
    parts, rows = load("adagc-speed.json").get("parts", {}), []
    for name, title in (
        ("smollm2", "SmolLM2-135M, float32"),
        ("1.3b", "1.3 B, float32"),
        ("bf16", "SmolLM2-135M, bfloat16"),
    ):
        if name in parts:
            for clock in ("wall", "processor"):
                ours, theirs = (parts[name][clock][k] for k in ("AdaGC.clip_", "clip_grad_norm_"))
                rows.append(
                    [
                        f"`clip_()` over `clip_grad_norm_`, {title}, {clock} time",
                        f"{ours['median_ms']:.1f} ms",
                        f"{theirs['median_ms']:.1f} ms",
                        f"{ours['ratio_of_medians']:.2f}",
                    ]
                )
    if "peer" in parts:
        part = parts["peer"]["processor"]
        ours = part["AdaGC.clip_"]
        added = (
            part["pytorch_optimizer AdaGC step"]["median_ms"] - part["the same step without its clipping"]["median_ms"]
        )
        rows.append(
            [
                f"clipping of pytorch_optimizer {parts['peer']['version']} over `clip_()`, processor time",
                f"{ours['median_ms']:.1f} ms",
                f"{added:.1f} ms",
                f"{ours['peer_clipping_over_ours_median']:.1f}",
            ]
        )
    if "step" in parts:
        step = parts["step"]
        rows.append(
            [
                f"`clip_()` within a training step of {step['tokens']} tokens, SmolLM2-135M",
                f"{step['clip_ms']:.0f} ms",
                f"{1e3 * step['step_s']:.0f} ms",
                f"{100 * step['overhead']:.2f} %",
            ]
        )
    return markdown(["what", "AdaGC", "the other", "ratio"], rows)


def main() -> None:
    text = "\n".join(
        [
            "<!-- Written by benchmarks/claims/adagc/tables.py from benchmarks/results; do not edit. -->",
            "### Faults on a byte-level model\n",
            faults(),
            "### SmolLM2-135M with an aggressive learning rate\n",
            smollm2(),
            "### Speed on a CPU\n",
            speed(),
        ]
    )
    OUT.write_text(text.rstrip() + "\n", encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
