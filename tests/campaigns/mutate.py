"""Mutation testing of the numeric cores: change one operator or number at a time, and see that a test fails.

``python tests/campaigns/mutate.py [FILE …] [--most N]`` needs ``pip install cosmic-ray``, whose operators it applies. A
process of its own for each mutant would spend its time on importing torch, so a process that has imported the
libraries, but nothing of modicum, forks for each and serves the changed source from memory. Results go into
``benchmarks/results/mutation.json``; a survivor is a mutant that no test of its file's list notices. ``EQUIVALENT``
explains survivors that change nothing that can be seen.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
RESULT = ROOT / "benchmarks/results/mutation.json"

LIBRARIES = ("torch", "scipy", "hypothesis", "jaxtyping", "beartype", "pydantic", "transformers", "peft", "pytest")
BINARY = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul", "BitAnd_BitOr",
          "BitXor_BitAnd", "LShift_RShift", "RShift_LShift")  # fmt: skip
COMPARISON = ("Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt",
              "Is_IsNot", "IsNot_Is")  # fmt: skip
OTHER = ("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "NumberReplacer",
         "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_Invert",
         "ReplaceBreakWithContinue", "ZeroIterationForLoop")  # fmt: skip
OPERATORS = [
    *(f"core/ReplaceBinaryOperator_{pair}" for pair in BINARY),
    *(f"core/ReplaceComparisonOperator_{pair}" for pair in COMPARISON),
    *(f"core/{name}" for name in OTHER),
]

MERGING = ["tests/weights/test_method_oracles.py", "tests/weights/test_methods.py", "tests/weights/kernels"]
STEPS = [f"tests/optim/zeroth_order/test_{name}.py"
         for name in ("tezo", "mezo", "lozo", "subzero", "zeroth_order_family", "zeroth_order_statistics")]  # fmt: skip
TARGETS: dict[str, list[str]] = {
    "weights/kernels/combine.py": MERGING,
    "weights/methods/linear.py": MERGING,
    "weights/methods/ties.py": MERGING,
    "weights/methods/dare.py": MERGING,
    "weights/averagers/wsm.py": ["tests/weights/test_averagers.py"],
    "optim/gradient/norms.py": ["tests/optim/gradient/test_clipping.py"],
    "optim/gradient/adagc.py": ["tests/optim/gradient/test_adagc.py"],
    "optim/zeroth_order/moments.py": STEPS,
    "optim/zeroth_order/lifts.py": STEPS,
    "adapters/hrp.py": ["tests/adapters/test_hrp.py"],
    "philox.py": ["tests/test_philox.py", "tests/objectives/test_objective_oracles.py"],
    "objectives/meap.py": ["tests/objectives/test_meap.py", "tests/objectives/test_objective_oracles.py"],
    "linalg.py": ["tests/weights/test_method_oracles.py", "tests/adapters/test_hrp.py"],
    "models/zero_token/schedule.py": ["tests/models/zero_token/test_zero_schedule.py"],
    "models/zero_token/exit.py": ["tests/models/zero_token/test_zero_exit.py"],
}

# By file and changed line: why no test can see it.
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "weights/kernels/combine.py",
        'if not self.weighted and deltas.device.type != "cpu" and len(deltas) < 256:',
    ): "both ways count the same; this one is faster on the CPU",
    (
        "weights/kernels/combine.py",
        "trimmed = [t for t, share in enumerate(density) if kept_of(n, share) <= n]",
    ): "a cut that keeps all entries drops nothing, after a pass for nothing",
    ("weights/methods/ties.py", "BUCKETS = 1 << 17"): "patterns have 16 bits a half; further buckets stay empty",
    ("weights/methods/ties.py", "above = histogram.flip( -1).cumsum(0)"): "a histogram has one dimension",
    (
        "weights/methods/ties.py",
        "cuts = [Cut(value, -1, exhaustive=True) for value in threshold]",
    ): "an exhaustive cut does not read how many are spare",
    (
        "weights/methods/dare.py",
        "return draw_mask(size, levels[t], sources[t]) if levels[t] <= LEVELS else None",
    ): "a mask of probability 1 keeps all, after draws for nothing",
    (
        "optim/zeroth_order/moments.py",
        '{"sgd": (sgd, -1), "momentum": (momentum, 1), "adam": (adam, 2), "lion": (lion, 1)}',
    ): "less than no vector is no vector",
    (
        "optim/gradient/norms.py",
        "target = (mean + z * deviation * z / score).where(score >= z, total)",
    ): "where the score is exactly z both targets are the same up to eps",
}


class Served(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Gives one module a source of its own."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_source(self, fullname: str) -> str:
        return self.source

    def get_filename(self, fullname: str) -> str:
        return str(self.path)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield the operator and the changed source of every mutant that compiles."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    for name in OPERATORS:
        operator, occurrence = get_operator(name)(), 0
        while (changed := mutate_code(source, operator, occurrence)) is not None:
            occurrence += 1
            line = changed_line(source, changed).partition(": ")[2]
            # The words of an error; and a star in a signature made a slash, which calls by keyword do not see.
            if line.startswith(('f"', "f'")) or line == "/," or ", /, " in line or "(/, " in line:
                continue
            yield name.removeprefix("core/").removeprefix("Replace"), changed


def passes(file: str, source: str, *, limit: float) -> tuple[bool, float]:
    """Run the tests of ``file`` with this source in a fork; tell whether they pass, and how long they took."""
    import pytest

    start, pid = time.monotonic(), os.fork()
    if not pid:
        signal.setitimer(signal.ITIMER_REAL, limit)  # kills a mutant that loops
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        path = ROOT / "src/modicum" / file
        module = "modicum." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        sys.meta_path.insert(0, Served(module, path, source))
        os.chdir(ROOT)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--assert=plain"]
        os._exit(int(pytest.main([*options, *TARGETS[file]])) != 0)
    _, status = os.waitpid(pid, 0)
    return status == 0, time.monotonic() - start


def changed_line(before: str, after: str) -> str:
    pairs = zip(before.splitlines(), after.splitlines())
    return next((f"{number}: {new.strip()}" for number, (old, new) in enumerate(pairs, 1) if old != new), "")


def campaign(file: str, most: int, known: list[dict[str, str]] | None = None) -> dict[str, Any]:
    """Try mutants, or those alone that survived before."""
    source = (ROOT / "src/modicum" / file).read_text(encoding="utf-8")
    clean, seconds = passes(file, source, limit=600)
    if not clean:
        raise SystemExit(f"The tests of {file} fail without any mutant: {' '.join(TARGETS[file])}")
    every = list(mutants(source))
    again = {(one["operator"], one["line"].partition(": ")[2]) for one in known or ()}
    chosen = every[:: max(1, -(-len(every) // most))]
    if known is not None:
        chosen = [(name, new) for name, new in every if (name, changed_line(source, new).partition(": ")[2]) in again]
    survivors: list[dict[str, str]] = []
    for operator, changed in chosen:
        if passes(file, changed, limit=3 * seconds + 20)[0]:
            line = changed_line(source, changed)
            why = EQUIVALENT.get((file, line.partition(": ")[2]), "")
            survivors.append({"operator": operator, "line": line} | ({"equivalent": why} if why else {}))
            print(f"  {file} {operator:<28} {line}", flush=True)
    return {"mutants": len(every), "tried": len(chosen), "killed": len(chosen) - len(survivors), "survivors": survivors}


def read() -> dict[str, Any]:
    """Return what was found before, by file."""
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))["files"] if RESULT.exists() else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=list(TARGETS), help="below src/modicum")
    parser.add_argument("--again", action="store_true", help="try those alone that survived before")
    parser.add_argument("--most", type=int, default=10**6, help="mutants of a file, spread evenly over all")
    arguments = parser.parse_args()
    for library in (
        "torch",
        "numpy",
        "scipy",
        "hypothesis",
        "jaxtyping",
        "beartype",
        "pydantic",
        "transformers",
        "peft",
    ):
        importlib.import_module(library)
    from benchmarks.provenance import origin

    for file in arguments.files:
        start, before = time.monotonic(), read().get(file)
        if arguments.again and before is None:
            continue
        found = campaign(file, arguments.most, before["survivors"] if arguments.again and before else None)
        if arguments.again and before:
            # What was a survivor and is no mutant any more was not killed.
            tried = before["tried"] - len(before["survivors"]) + found["tried"]
            found |= {"tried": tried, "killed": tried - len(found["survivors"])}
        print(f"{file}: {found['killed']} of {found['tried']} killed, {time.monotonic() - start:.0f} s", flush=True)
        files = dict(sorted((read() | {file: origin() | found}).items()))
        RESULT.write_text(json.dumps({"operators": "cosmic-ray 8", "files": files}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
