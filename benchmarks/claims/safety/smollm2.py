"""What do the arms of the recipe ``safety`` do on SmolLM2, beside each other and beside controls?

    python -m benchmarks.claims.safety.smollm2 [--minutes 60] [--seeds 3]

The shipped recipe is run for each seed, with three arms more: reasoning about other requests (``shuffled``), refusal
training without its harmful rows (``helpful``), which shows what best of N makes of a model that learned nothing of
harm, and the base with the guidelines in its prompt. Outcomes are foretold at the first generated token before and
after training. A seed is a cell of ``benchmarks/results/safety-smollm2.json``; its run lies in the cache, so that a
study that was stopped goes on inside it. ``python -m benchmarks.claims.safety.tables`` writes the table.

What would refute the claim: filler or shuffled reasoning refuses harmful requests in unseen wrappers as often as
safety reasoning, or safety reasoning refuses as many harmless ones more. A null result is likely at this size.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from typing import Any

from benchmarks.cells import resumable

from modicum.content import cache_folder

ARMS = {
    "rt": ("rt", False), "srg": ("srg", True), "filler": ("filler_neutral", True),
    "shuffled": ("filler_shuffled", True), "helpful": ("helpful", False),
}  # fmt: skip
ABOUT = {"arms": list(ARMS), "samples": 16, "wrapper": "jailbreakchat"}
KEPT = (
    "greedy", "greedy_low", "corrected", "refused", "over_refusal", "malformed", "incomplete", "escapes_malformed",
    "ns", "asr_all", "never_safe", "words", "tokens",
)  # fmt: skip


def recipe(seed: int) -> dict[str, Any]:
    """Return the shipped recipe with all arms, for one seed."""
    from modicum.recipe import read

    shipped = {stage["name"]: copy.deepcopy(stage) for stage in read("safety")["stages"]}
    train = shipped["rt"]
    synthesis = shipped["synthesis"] | {"arms": [rows for rows, _ in ARMS.values()]}
    stages = [synthesis]
    for arm, (rows, reasons) in ARMS.items():
        data = train["data"] | {"path": f"stage:synthesis/{rows}"}
        stages.append(train | {"name": arm, "data": data} | ({"objective": "safety_reasoning"} if reasons else {}))
    base = synthesis["teacher"]
    tuned = {arm: f"stage:{arm}" for arm in ARMS}
    targets = {"base": base, "guided": {"model": base, "guidelines": True}, **tuned}
    stages.append(shipped["attack"] | {"targets": targets, "samples": ABOUT["samples"]})
    stages.append(
        shipped["inside"]
        | {"targets": {"base": base, **tuned}, "position": "think_first", "judge": "linear", "folds": 2}
    )
    stages.append(shipped["helpfulness"] | {"models": {"base": base, **tuned}})
    return {"job": "pipeline", "stages": [stage | {"seed": seed} for stage in stages]}


def collected(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tables need of a pipeline's metrics: by arm, its suites, what was foretold, and what it costs."""
    safety = metrics["attack"]["safety"]
    found: dict[str, Any] = {"arms": {}, "judge": safety["judge"], "synthesis": metrics["synthesis"]["synthesis"]}
    for cell in safety["cells"]:
        arm = found["arms"].setdefault(cell["target"], {"suites": {}})
        arm["suites"][cell["suite"]] = {key: cell[key] for key in KEPT if key in cell}
    for cell in metrics["inside"]["representation"]["cells"]:
        found["arms"][cell["target"]]["foretold"] = cell.get("outcome")
        found["arms"][cell["target"]]["gap"] = {suite: one["gap"] for suite, one in cell["suites"].items()}
    for cell in metrics["helpfulness"]["cells"]:
        found["arms"][cell["model"]].setdefault("helpfulness", {})[cell["task"]] = cell["value"]
    return found


def measured(seed: int) -> dict[str, Any]:
    from modicum.jobs import execute
    from modicum.recipe import parse

    folder = cache_folder() / "studies" / f"safety-smollm2-{seed}"
    return collected(execute(parse(recipe(seed)), folder).record["metrics"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    recall = resumable("safety-smollm2", minutes=options.minutes, about=ABOUT)
    for seed in range(options.seeds):
        if recall(f"seed.{seed}", lambda s=seed: measured(s)) is None:  # type: ignore[misc]
            print("time is up; call again to go on")
            return


if __name__ == "__main__":
    main()
