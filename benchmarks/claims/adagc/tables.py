"""Write the guide's tables and pictures from the result files: python -m benchmarks.claims.adagc.tables."""

from __future__ import annotations

from benchmarks.plots import Curve, curves
from benchmarks.tables import GUIDE, interval, load, markdown, write

DRAWN = ("none", "global", "zclip", "adagc min (published)", "adagc ema (default)")


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
                interval([clean[s]["held_out_loss"] for s in both], 4),
                interval([hit[s]["held_out_loss"] for s in both], 4),
                interval([hit[s]["held_out_loss"] - clean[s]["held_out_loss"] for s in both], 4),
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
    cells = load("adagc-smollm2.json").get("cells", {}).values()
    clean = {
        (c["lr"], c["steps"], c["arm"], c["seed"]): c["held_out_after"] for c in cells if not c["fault_probability"]
    }
    groups: dict[tuple, list[dict]] = {}
    for c in cells:
        groups.setdefault((c["lr"], c["steps"], c["fault_probability"], c["arm"]), []).append(c)
    rows = []
    for (lr, steps, faults, arm), mine in groups.items():
        pairs = [(c["held_out_after"], clean.get((lr, steps, arm, c["seed"]))) for c in mine]
        rates = [100 * c["clip_rate"] for c in mine if c["clip_rate"] is not None]
        rows.append(
            [
                f"{lr:g}",
                str(steps),
                str(sum(c["faults"] for c in mine)) if faults else "–",
                arm,
                str(len(mine)),
                interval([c["held_out_after"] for c in mine]),
                interval([hit - without for hit, without in pairs if without is not None]) if faults else "–",
                interval([c["worst_train_loss"] for c in mine], 2),
                f"{sum(rates) / len(rates):.0f} %" if rates else "–",
            ]
        )
    head = [
        "rate",
        "steps",
        "faults",
        "rule",
        "seeds",
        "held-out after",
        "degradation",
        "worst training loss",
        "clipped",
    ]
    start = f"Held-out loss before: {next(iter(cells))['held_out_before']:.3f}.\n\n" if cells else ""
    return start + markdown(head, rows)


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
    write(
        "gradients-tables.inc",
        "benchmarks/claims/adagc/tables.py",
        [
            "### Faults on a byte-level model\n",
            faults(),
            "### SmolLM2-135M with an aggressive learning rate\n",
            smollm2(),
            "### Speed on a CPU\n",
            speed(),
        ],
    )
    draw()


if __name__ == "__main__":
    main()
