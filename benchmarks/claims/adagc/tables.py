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

    def compare(what: str, ours: float, theirs: float, ratio: str) -> None:
        rows.append([what, f"{ours:.1f} ms", f"{theirs:.1f} ms", ratio])

    shapes = {"smollm2": "SmolLM2-135M, float32", "1.3b": "1.3 B, float32", "bf16": "SmolLM2-135M, bfloat16"}
    for title, part in parts.items():
        name, _, threads = title.partition(", ")
        more = f", {threads}" if threads else ""
        if name in shapes:
            for clock in ("wall", "processor"):
                for call, how in (("AdaGC.clip_", ""), ("AdaGC.clip_, nothing to cut", " when nothing needs cutting")):
                    if call in part[clock]:
                        ours, theirs = part[clock][call], part[clock]["clip_grad_norm_"]["median_ms"]
                        what = f"`clip_()`{how} over `clip_grad_norm_`, {shapes[name]}{more}, {clock} time"
                        compare(what, ours["median_ms"], theirs, f"{ours['ratio_of_medians']:.2f}")
        elif name == "peer":
            times = {call: found["median_ms"] for call, found in part["processor"].items()}
            ours, whole = times["AdaGC.clip_"], times["AdaGC.clip_ + torch AdamW"]
            theirs = times["pytorch_optimizer AdaGC step"]
            added = theirs - times["the same step without its clipping"]
            peer = f"pytorch_optimizer {part['version']}{more}, processor time"
            compare(f"clipping alone: ours, and that of {peer}", ours, added, f"{ours / added:.2f}")
            compare(f"clipping and AdamW: ours, and that of {peer}", whole, theirs, f"{whole / theirs:.2f}")
        elif name == "step":
            for clock, step in {"wall": part, "processor": part.get("processor", {})}.items():
                if not step:
                    continue
                what = f"`clip_()`, and a training step of {part['tokens']} tokens, SmolLM2-135M{more}, {clock} time"
                compare(what, step["clip_ms"], 1e3 * step["step_s"], f"{100 * step['overhead']:.2f} %")
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
