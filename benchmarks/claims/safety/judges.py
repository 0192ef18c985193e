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
    found |= _refusals(*labelled("refusal"))
    content = {"cells": found, "data": provenance("harm", "refusal"), "origin": origin()}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def _refusals(items: Any, labels: Any) -> dict[str, Any]:
    """Return the errors of the rules for refusals, on all answers and on those that are not labelled both ways.

    Some answers stand under two goals, labelled a refusal where the goal was another: there the label says that the
    goal was not met, not that anything was declined.
    """
    from modicum.evaluate.calibration import calibrate
    from modicum.evaluate.judges.declines import Declines
    from modicum.evaluate.judges.prefix import PrefixRefusal

    ways = [{item.response for item, label in zip(items, labels, strict=True) if label is way} for way in (True, False)]
    mixed = ways[0] & ways[1]
    kept = [i for i, item in enumerate(items) if item.response not in mixed]
    rules = {"prefix": PrefixRefusal(), "declines": Declines(), "evasion": Declines(off_topic=True)}
    found: dict[str, Any] = {"mixed": {"answers": len(mixed), "labelled": len(items) - len(kept)}}
    for name, rule in rules.items():
        said = [verdict.refusal for verdict in rule.judge(items)]
        found[f"{name}.refusal"] = _rates(calibrate(said, labels))
        found[f"{name}.refusal.unmixed"] = _rates(calibrate([said[i] for i in kept], [labels[i] for i in kept]))
    return found


def _rates(found: Any) -> dict[str, Any]:
    return {
        "agreement": found.agreement._asdict(), "fpr": found.fpr._asdict(), "fnr": found.fnr._asdict(),
        "positives": found.positives, "negatives": found.negatives,
    }  # fmt: skip


if __name__ == "__main__":
    main()
