"""How often do judges without a large guard err on answers that people have labelled?

    python -m benchmarks.claims.safety.judges

Writes ``benchmarks/results/safety-judges.json``: the small guard on held-out goals with three draws of the folds, and
the rule of first words, both on harm and on refusals. What would refute the small guard: errors that add up to 1, or an
area under the curve near one half.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.provenance import origin

RESULTS = Path(__file__).parents[2] / "results" / "safety-judges.json"


def main() -> None:
    from modicum.evaluate.calibration import calibrate
    from modicum.evaluate.judges.linear import LinearGuard
    from modicum.evaluate.judges.prefix import PrefixRefusal
    from modicum.jobs.attack_data import labelled, provenance

    found: dict[str, Any] = {}
    for name, knobs in {"harm": {}, "refusal": {"tells": "refusal", "l2": 0.1, "features": 2048}}.items():
        items, labels = labelled(name)
        for seed in range(3):
            guard = LinearGuard(**knobs).fit(items, labels, seed=seed)
            found[f"linear.{name}.{seed}"] = {"auroc": guard.area, **_rates(guard.calibration)}
        # As a judge of harm, the rule calls harmful whatever does not begin as a refusal.
        refused = [bool(verdict.refusal) for verdict in PrefixRefusal().judge(items)]
        said = refused if name == "refusal" else [not value for value in refused]
        found[f"prefix.{name}"] = _rates(calibrate(said, labels))
    content = {"cells": found, "data": provenance("harm", "refusal"), "origin": origin()}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _rates(found: Any) -> dict[str, Any]:
    return {
        "agreement": found.agreement._asdict(), "fpr": found.fpr._asdict(), "fnr": found.fnr._asdict(),
        "positives": found.positives, "negatives": found.negatives,
    }  # fmt: skip


if __name__ == "__main__":
    main()
