"""Write the guide's tables from the result files: python -m benchmarks.claims.mediator.tables."""

from __future__ import annotations

from typing import Any

from benchmarks.claims.mediator.toy import ARMS, SEEDS, SELECTIONS, STORES
from benchmarks.tables import interval, load, markdown, write


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
    for method in ("task_arithmetic", "ties", "tsv") if found else ():
        rows.append([f"merge: {method}, tuned scale", interval([c[method]["accuracy"] for c in found]), "–"])
    return markdown(["all blocks routed", "accuracy on the own tasks", "stored / four models"], rows)


def selections() -> str:
    found = cells("router")
    rows = []
    for store in ("sign", "random_rescaled") if found else ():
        for name in (*SELECTIONS, "gated by distance"):
            values = (interval([c[f"{store}, {name}, {kind}"] for c in found]) for kind in ("known", "unknown"))
            rows.append([store, name, *values])
    return markdown(["store", "selection", "known tasks", "task nobody was trained on"], rows)


def routers() -> str:
    found = cells("router")
    rows = [
        [
            kind,
            str(count),
            interval([c[f"{kind} {count}"]["accuracy"] for c in found]),
            interval([c[f"{kind} {count}"]["error before"] for c in found]),
            interval([c[f"{kind} {count}"]["error after"] for c in found]),
        ]
        for kind in ("linear", "mlp", "subspace")
        for count in ((50, 200, 1000) if found else ())
    ]
    return markdown(["router", "prompts", "accuracy", "calibration error", "calibrated"], rows)


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
        "Small decoders, three seeds, mean and 95 % interval; see `benchmarks/claims/mediator`. Share of the gap",
        "between averaging all and each expert on its own task, by which blocks are kept apart, whole:\n",
        layers(),
        "Conflict, and what a single block gives:\n",
        blocks(),
        "Accuracy with all blocks routed, by store:\n",
        stores(),
        "Accuracy by selection:\n",
        selections(),
        "Routers:\n",
        routers(),
        "Real fine-tunes of SmolLM2-135M, one seed, 16 steps each; see `benchmarks/claims/mediator/record.py`:\n",
        real("mediator-smollm2"),
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
