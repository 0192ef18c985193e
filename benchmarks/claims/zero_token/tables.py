"""Write the guide's tables from the result files: python -m benchmarks.claims.zero_token.tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from benchmarks.claims.zero_token import hops as known
from benchmarks.claims.zero_token import p_hop, smollm2
from benchmarks.plots import Curve, curves
from benchmarks.tables import GUIDE, interval, load, markdown, write

Cell = dict[str, Any]
EXITS = {"zero_attention": "zero attention", "latent": "change of the state", "random": "at random"}
ALL_EXITS = EXITS | {"confidence": "confidence", "gate": "trained gate", "entropy": "entropy", "kl": "prediction"}
DRAWN = ("HTC", "ZTT")


def by_variant(name: str) -> dict[tuple[str, bool], list[Cell]]:
    """Return the cells of a study by variant, and by whether they were trained."""
    found: dict[tuple[str, bool], list[Cell]] = {}
    for cell in load(f"{name}.json").get("cells", {}).values():
        found.setdefault((cell["variant"], cell["steps"] > 0), []).append(cell)
    return found


def mean(values: Iterable[float | None], digits: int = 3) -> str:
    return interval([value for value in values if value is not None], digits)


def at(values: Sequence[float] | None, index: int) -> float | None:
    return None if values is None or index >= len(values) else values[index]


def induction() -> str:
    rows = [
        [
            variant,
            str(len(cells)),
            f"{cells[0]['parameters']:,}",
            str(cells[0]["visits"]),
            mean(c["accuracy"] for c in cells),
            *(mean(at(c.get("accuracy by cycles"), i) for c in cells) for i in range(2)),
        ]
        for (variant, _), cells in by_variant(p_hop.RESULT).items()
    ]
    head = ["model", "seeds", "parameters", "visits", "accuracy", "with 1 cycle", "with 2 cycles"]
    return markdown(head, rows)


def attention_by_cycle(name: str) -> str:
    rows = [
        [variant, *(mean(at(c["zero attention by cycle"], i) for c in cells) for i in range(3))]
        for (variant, trained), cells in by_variant(name).items()
        if trained and "zero attention by cycle" in cells[0]
    ]
    return markdown(["model", "cycle 1", "cycle 2", "cycle 3"], rows)


def on_curve(cell: Cell, criterion: str, cycles: float) -> float:
    """Return the accuracy of a criterion at a mean number of cycles, between the two nearest thresholds."""
    accuracies = cell["accuracy by cycles"]
    measured = [(p["mean cycles"], p["accuracy"]) for p in cell["exits"][criterion]]
    curve = sorted([(1.0, accuracies[0]), *measured, (float(len(accuracies)), accuracies[-1])])
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(curve) if pair[0][0] <= cycles <= pair[1][0])
    return y0 if x0 == x1 else y0 + (y1 - y0) * (cycles - x0) / (x1 - x0)


def exits() -> str:
    rows = [
        [variant, name, *(mean(on_curve(c, criterion, n) for c in cells) for n in (1.5, 2.0, 2.5))]
        for (variant, _), cells in by_variant(p_hop.RESULT).items()
        if "exits" in cells[0]
        for criterion, name in EXITS.items()
    ]
    return markdown(["model", "exit by", "1.5 cycles", "2 cycles", "2.5 cycles"], rows)


def fine_tuning() -> str:
    rows = [
        [
            variant if trained else f"{variant}, untrained",
            str(len(cells)),
            f"{cells[0].get('tokens', 0):,}",
            mean(c["loss"] for c in cells),
            mean((100 * c["accuracy"] for c in cells), 1),
            mean(c.get("with 1 cycle", {}).get("loss") for c in cells),
        ]
        for (variant, trained), cells in by_variant(smollm2.RESULT).items()
    ]
    return markdown(["model", "seeds", "tokens", "loss", "accuracy, %", "loss with 1 cycle"], rows)


def hops() -> list[Cell]:
    return list(load(f"{known.RESULT}.json").get("cells", {}).values())


def known_needs() -> str:
    """Accuracy by variant, and the paired difference from HTC."""
    plain = {c["seed"]: c["accuracy"] for c in hops() if c["variant"] == "HTC"}
    rows = []
    for variant in known.VARIANTS:
        cells = [c for c in hops() if c["variant"] == variant]
        if not cells:
            continue
        last = [c["accuracy by cycles and hops"][-1] for c in cells]
        pairs = [c["accuracy"] - plain[c["seed"]] for c in cells if c["seed"] in plain]
        rows.append([
            variant, str(len(cells)), f"{cells[0]['parameters']:,}", str(cells[0]["visits"]),
            mean(c["accuracy"] for c in cells), "–" if variant == "HTC" else mean(pairs),
            *(mean(by_hops[h] for by_hops in last) for h in range(known.HOPS)),
        ])  # fmt: skip
    hopped = [f"{h} hop{'s' * (h > 1)}" for h in range(1, known.HOPS + 1)]
    return markdown(["model", "seeds", "parameters", "visits", "accuracy", "less HTC", *hopped], rows)


def on_hops_curve(cell: Cell, criterion: str, cycles: float) -> float:
    by_cycles = cell["accuracy by cycles and hops"]
    ends = [(1.0, cell["accuracy after 1"]), (float(len(by_cycles)), cell["accuracy"])]
    curve = sorted([ends[0], *map(tuple, cell["exits"][criterion]["curve"]), ends[1]])
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(curve) if pair[0][0] <= cycles <= pair[1][0])
    return y0 if x0 == x1 else y0 + (y1 - y0) * (cycles - x0) / (x1 - x0)


def known_exits(variant: str) -> str:
    """AUROC and curve of each criterion."""
    cells = [c for c in hops() if c["variant"] == variant]
    rows = [
        [
            name,
            mean((c["exits"][criterion]["auroc"] for c in cells), 2),
            *(mean(on_hops_curve(c, criterion, n) for c in cells) for n in (1.5, 2.0, 2.5, 3.0)),
        ]
        for criterion, name in ALL_EXITS.items()
        if cells and criterion in cells[0]["exits"]
    ]
    oracle = [c["exits"]["oracle"]["curve"][0] for c in cells]
    if oracle:
        print(f"{variant}: oracle {mean(x for x, _ in oracle)} cycles, accuracy {mean(y for _, y in oracle)}")
    head = ["exit by", "AUROC after cycle 1", "1.5 cycles", "2 cycles", "2.5 cycles", "3 cycles"]
    return markdown(head, rows)


def refuting() -> str:
    """The differences that would refute the zero token, of models and of exits, paired by seed."""
    by = {variant: {c["seed"]: c for c in hops() if c["variant"] == variant} for variant in ("ZTT", "off-by-one key")}
    both = by["ZTT"].keys() & by["off-by-one key"].keys()
    kept = [by["ZTT"][seed]["accuracy"] - by["off-by-one key"][seed]["accuracy"] for seed in both]
    rows = [["ZTT less the off-by-one key", "–", "–", "–", "–", mean(kept)]]
    for other in ("latent", "random"):
        gaps = [
            [on_hops_curve(c, "zero_attention", n) - on_hops_curve(c, other, n) for c in by["ZTT"].values()]
            for n in (1.5, 2.0, 2.5, 3.0)
        ]
        rows.append([f"exits of ZTT: zero attention less {ALL_EXITS[other]}", *map(mean, gaps), "–"])
    return markdown(["accuracy", "1.5 cycles", "2 cycles", "2.5 cycles", "3 cycles", "all cycles"], rows)


def draw() -> None:
    """Draw accuracy by cycles for each need of depth, and accuracy against mean cycles for each criterion."""
    needs: dict[str, dict[str, list[Curve]]] = {}
    leaves: dict[str, dict[str, list[Curve]]] = {}
    for variant in DRAWN:
        cells = [c for c in hops() if c["variant"] == variant]
        if not cells:
            return
        for need in range(known.HOPS):
            lines = [[row[need] for row in c["accuracy by cycles and hops"]] for c in cells]
            panel = needs.setdefault(variant, {})
            panel[f"needs {need + 1}"] = [(list(range(1, len(line) + 1)), line) for line in lines]
        places = [1 + 0.25 * i for i in range(4 * known.CYCLES - 3)]
        for criterion, name in ALL_EXITS.items():
            if criterion in cells[0]["exits"]:
                values = [fmean(on_hops_curve(c, criterion, x) for c in cells) for x in places]
                leaves.setdefault(f"{variant}, mean of {len(cells)} seeds", {})[name] = [(places, values)]
    curves(GUIDE / "zero-token-hops.svg", needs, x="cycles", y="accuracy")
    curves(GUIDE / "zero-token-exits.svg", leaves, x="mean cycles", y="accuracy")


def routes() -> str:
    rows = [
        [name, *(f"{row['table'][route]['processor / plain']:.2f}" for route in ("lse", "concat", "query_row"))]
        for name, row in speed("attention").items()
    ]
    return markdown(["call", "lse", "concat", "query_row"], rows)


def training() -> str:
    rows = [
        [name, *(f"{row['table']['ztt'][f'processor / {peer}']:.3f}" for peer in ("htc", "llama"))]
        for name, row in speed("train").items()
    ]
    return markdown(["training step", "ZTT / HTC", "ZTT / Llama of equal depth"], rows)


def decoding() -> str:
    rows = [
        [name, *(f"{row['table'][model]['processor / llama']:.3f}" for model in ("htc", "ztt"))]
        for name, row in speed("decode").items()
        if "ztt" in row["table"]
    ]
    return markdown(["token", "HTC / Llama of equal depth", "ZTT / Llama of equal depth"], rows)


def by_cycles() -> str:
    table = speed("decode").get("by cycles", {}).get("table", {})
    rows = [
        [
            name,
            str(row.get("layer visits", "–")),
            str(row.get("tokens/s of processor time", "–")),
            f"{row['key-value bytes a token']:,}",
        ]
        for name, row in table.items()
    ]
    return markdown(["cycles", "layer visits", "tokens/s", "key-value bytes a token"], rows)


def leaving() -> str:
    columns = {
        "layer calls": "layer calls saved",
        "wall, as a share of the calls": "of that, wall time of the step",
        "processor, as a share of the calls": "processor time of the step",
        "wall of the layers, as a share of the calls": "wall time of the layers",
        "processor of the layers, as a share of the calls": "processor time of the layers",
    }
    rows = [
        [name, *(f"{100 * row['table']['saved'][key]:.0f} %" for key in columns if key in row["table"]["saved"])]
        for name, row in speed("exit").items()
    ]
    return markdown(["cycles", *columns.values()], rows)


def serving() -> str:
    """Time saved against visits saved, by how depths are mixed."""
    found = load("zero-token-serving.json").get("rows", {})
    rows = [
        [
            name.removeprefix("depths, "),
            how,
            *(f"{100 * row[key]:.0f} %" for key in ("visits saved", "time saved", "of the visits")),
        ]
        for name, part in found.items()
        if name.startswith("depths")
        for how, row in part.items()
        if isinstance(row, dict) and "visits saved" in row
    ]
    return markdown(["cycles", "a batch of 8", "visits saved", "time saved", "of the visits"], rows)


def drafts() -> str:
    found, keys = load("zero-token-serving.json").get("rows", {}), ("tokens/s of processor time", "times no draft")
    rows = [
        [name.removeprefix("draft, "), way, *(str(row[key]) for key in keys)]
        for name, part in found.items()
        if name.startswith("draft")
        for way, row in part["ways"].items()
    ]
    return markdown(["model", "generation", *keys], rows)


def speed(part: str) -> dict[str, Any]:
    found: dict[str, Any] = load("zero-token-speed.json").get("parts", {}).get(part, {})
    return found


def main() -> None:
    draw()
    write(
        "zero-token-tables.inc",
        "benchmarks/claims/zero_token/tables.py",
        [
            "### p-hop induction\n",
            induction(),
            "Mean attention on the zero token:\n",
            attention_by_cycle(p_hop.RESULT),
            "Accuracy when tokens leave, at equal mean cycles (read between the two nearest thresholds):\n",
            exits(),
            "### Hops with known needs\n",
            known_needs(),
            "Differences that would refute the zero token, paired by seed:\n",
            refuting(),
            "Accuracy of ZTT when tokens leave, at equal mean cycles:\n",
            known_exits("ZTT"),
            "The same of HTC:\n",
            known_exits("HTC"),
            "### SmolLM2-135M, layers 11 to 20 run twice\n",
            fine_tuning(),
            "Mean attention on the zero token:\n",
            attention_by_cycle(smollm2.RESULT),
            "### Attention by route, processor time against attention without a zero token\n",
            routes(),
            "### Models of the widths of SmolLM2, processor time\n",
            training(),
            decoding(),
            by_cycles(),
            "### Leaving after the first cycle, batch 1\n",
            leaving(),
            "### Mixed depths in a batch of eight, processor time\n",
            serving(),
            "### Drafts by fewer cycles, processor time\n",
            drafts(),
        ],
    )


if __name__ == "__main__":
    main()
