"""Run the cells that have no result yet: python -m benchmarks.claims.meap.study STUDY [--minutes 7].

Run it again to go on; the result file grows by one cell at a time and finished cells are never run again.
"""

from __future__ import annotations

import argparse
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from benchmarks.cells import measure_all, resumable

STUDIES = ("epochs", "recall", "smollm2")


def main() -> None:
    """Run cells until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    module = import_module(f"benchmarks.claims.meap.{options.study}")
    recall = resumable(f"meap-{options.study}", minutes=options.minutes, about=constants(module))
    wanted = [(arm, seed) for seed in range(options.seeds) for arm in module.ARMS]
    measure_all(recall, {f"{arm}|{seed}": partial(measure, module, arm, seed) for arm, seed in wanted})


def measure(module: ModuleType, arm: str, seed: int) -> dict[str, Any]:
    """Measure one cell."""
    return {"arm": arm, "seed": seed, **module.run(arm, seed)}


def constants(module: ModuleType) -> dict[str, Any]:
    """Return the sizes that a study is run with."""
    return {k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, (int, float, str, tuple))}


if __name__ == "__main__":
    main()
