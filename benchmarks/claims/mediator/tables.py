"""Write the guide's tables from the result files: python -m benchmarks.claims.mediator.tables."""

from __future__ import annotations

from typing import Any

from benchmarks.claims.mediator.toy import ARMS, EQUAL, GATED, MERGES, PROMPTS, SEEDS, SELECTIONS, STORES
from benchmarks.tables import interval, load, markdown, side, write


def cells(kind: str) -> list[dict[str, Any]]:
    """Return a study's cells of all seeds that have been measured."""
    stored = load("mediator-toy.json").get("cells", {})
    return [stored[f"{kind} {seed}"] for seed in SEEDS if f"{kind} {seed}" in stored]


def layers() -> str:
    rows = []
    for arm in ARMS:
        found = cells(f"layers {arm}")
        if not found:
            continue
        gap = interval([c["average"] for c in found]) + " → " + interval([c["each expert"] for c in found])
        for k in (1, 2):
            rows.append(
                [
                    arm if k == 1 else "",
                    gap if k == 1 else "",
                    str(k),
                    *(interval([c[f"{rule} {k}"] for c in found], 2) for rule in ("topk", "random", "first", "least")),
                ]
            )
    head = ["arm", "average → each expert", "blocks", "most conflict", "random", "first", "least conflict"]
    return markdown(head, rows)


def blocks() -> str:
    rows = []
    for arm in ARMS:
        for key, what in (("conflict", "conflict"), ("share by block", "share of the gap, this block alone")):
            found = cells(f"layers {arm}")
            if found:
                rows.append([arm, what, *(interval([c[key][i] for c in found], 2) for i in range(6))])
    return markdown(["arm", "", *(f"block {i}" for i in range(6))], rows)


def stores() -> str:
    found = cells("stores")
    rows = [
        [name, interval([c[name]["accuracy"] for c in found]), f"{found[0][name]['stored / four models']:.3f}"]
        for name in (STORES if found else ())
    ]
    for method in MERGES if found else ():
        rows.append([f"merge: {method}, tuned scale", interval([c[method]["accuracy"] for c in found]), "–"])
    return markdown(["all blocks routed", "accuracy on the own tasks", "stored / four models"], rows)


def selections() -> str:
    found = cells("router")
    rows = [
        [store, name, *(interval([c[f"{store}, {name}, {prompts}"] for c in found]) for prompts in PROMPTS)]
        for store in ("sign", "random_rescaled")
        for name in ((*SELECTIONS, GATED, "entropy, top1", "entropy, soft") if found else ())
    ]
    return markdown(["store", "selection", *PROMPTS], rows)


def routers() -> str:
    found = cells("router")
    counts = dict.fromkeys(("linear", "mlp", "subspace", "linear, second prefill"), (50, 200, 1000))
    rows = [
        [name, str(n), *(interval([c[f"{name} {n}"][key] for c in found]) for key in COLUMNS)]
        for name, numbers in (counts | {"entropy": (0,)}).items()
        for n in (numbers if found else ())
    ]
    return markdown(["router", "prompts", "accuracy", "calibration error", "calibrated"], rows)


def compared(found: list[dict[str, Any]], one: str, other: str) -> tuple[str, str]:
    """Return the difference of two figures paired by seed, and on which side of zero it lies."""
    apart = [_number(c[one]) - _number(c[other]) for c in found]
    return interval(apart), side(apart)


def _number(cell: Any) -> float:
    return float(cell["accuracy"] if isinstance(cell, dict) else cell)


def verdicts() -> str:
    """Return what each claim rests on: differences paired by seed, and whether it stands."""
    rows: list[list[str]] = []
    told: dict[str, bool] = {}

    def ask(claim: str, what: str, found: list[dict[str, Any]], one: str, other: str, *, good: set[str]) -> None:
        if found:
            value, where = compared(found, one, other)
            rows.append([claim, what, value, where])
            told[claim] = told.get(claim, True) and where in good

    for arm in ARMS:
        for k in (1, 2):
            for other in ("random", "first", "least"):
                # The claim is decided where conflict and position are apart.
                claim = "conflict, not position" if arm != "plain" and other != "least" else BESIDE
                what = f"{arm}, {k} of 6 blocks: most conflict − {other}"
                # Equal are choices of the same blocks: they say nothing of either.
                ask(claim, what, cells(f"layers {arm}"), f"topk {k}", f"{other} {k}", good={"above", "equal"})
    for name in EQUAL:
        ask("one bit is best at its bytes", f"{name} − sign", cells("stores"), name, "sign", good=NOT_ABOVE)
    for store in ("sign", "random_rescaled"):
        for prompts in PROMPTS:
            for gate in ("entropy_gated", GATED):
                for other in ("top1", "uniform"):
                    decides = {("known", "top1"): "no loss if known", ("unknown", "uniform"): "safe if unknown"}
                    claim = f"{gate}: {decides[prompts, other]}" if (prompts, other) in decides else BESIDE
                    one, beside = (f"{store}, {name}, {prompts}" for name in (gate, other))
                    ask(claim, f"{store}, {prompts}: {gate} − {other}", cells("router"), one, beside, good=NOT_BELOW)
    lines = [f"* {claim}: {'stands' if good else 'falls'}" for claim, good in told.items() if claim != BESIDE]
    return "\n".join([markdown(["claim", "difference", "paired by seed", "side of zero"], rows), *lines])


BESIDE = "–"  # no claim rests on it
COLUMNS = ("accuracy", "error before", "error after")
NOT_ABOVE, NOT_BELOW = {"below", "not apart", "equal"}, {"above", "not apart", "equal"}


def real(name: str) -> str:
    """Return the evaluation of a run on real fine-tunes: models by tasks."""
    cells = load(f"{name}.json").get("cells", [])
    tasks, models = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("task", "model"))
    told = {(c["model"], c["task"]): f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in cells}
    return markdown(["exact match", *tasks], ([model, *(told[model, task] for task in tasks)] for model in models))


def real_layers() -> str:
    found = load("mediator-smollm2.json").get("routing_conflict", {})
    rows = [
        [name.rpartition(".")[2], f"{value:.3f}"]
        for name, value in zip(found.get("layers", []), found.get("values", []))
    ]
    return markdown(["block", "conflict"], rows[::3])


def speed() -> str:
    rows = []
    for part, found in load("routed-speed.json").get("parts", {}).items():
        told = {key: value for key, value in found.items() if key not in ("goal", "when", "commit", "dirty")}
        for i, (key, value) in enumerate(told.items()):
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in pairs)
            rows.append([part if not i else "", found["goal"] if not i else "", key, shown.strip()])
    return markdown(["part", "goal", "what", "measured"], rows)


def main() -> None:
    environment = load("routed-speed.json").get("environment", {})
    parts = (
        "## Measured\n",
        f"Small decoders, {len(cells('layers plain'))} seeds, mean and 95 % interval: `benchmarks/claims/mediator`.",
        "Share of the gap",
        "between averaging all and each expert on its own task, by which blocks are kept apart, whole:\n",
        layers(),
        "Conflict, and what a single block gives:\n",
        blocks(),
        "Accuracy with all blocks routed, by store:\n",
        stores(),
        "Accuracy by selection:\n",
        selections(),
        "Routers (`second prefill` looks at the input of the fourth block, the others at the embeddings):\n",
        routers(),
        "What the claims rest on. A claim that a difference is above zero falls where it is not, beyond the interval; "
        "one that it is not below falls where it is:\n",
        verdicts(),
        "Four fine-tunes of SmolLM2-135M in 30 % of the bytes of four models, one seed (`modicum run mediator`):\n",
        real("mediator-smollm2"),
        "The same experts: blocks by other rules, other stores, and merges (`modicum run mediator-controls`):\n",
        real("mediator-controls"),
        "Four LoRA adapters of rank 8 in 29 % of the bytes of four models, one seed (`modicum run mediator-lora`):\n",
        real("mediator-lora"),
        "Conflict of every third block of the first of these:\n",
        real_layers(),
        f"Speed, SmolLM2-135M's shape, one thread ({environment.get('cpu', 'CPU')}), ratios of processor time:\n",
        speed(),
    )
    write("route-tables.inc", "benchmarks/claims/mediator/tables.py", parts)


if __name__ == "__main__":
    main()
