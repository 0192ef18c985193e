"""Run folders with realistic contents, for the tests of the report and for looking at it.

``python tests/report_runs.py FOLDER`` writes them and their reports.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MODELS = ("base", "spelling", "arithmetic", "linear", "ties", "tsv")
TASKS = ("spell_backward", "chain_sum")
SCORES = {
    "spell_backward": (0.04, 0.912, 0.05, 0.43, 0.664, 0.82),
    "chain_sum": (0.075, 0.06, 0.86, 0.472, 0.598, 0.742),
}
MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
ENVIRONMENT = {
    "python": "3.11.2",
    "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
    "processor": "AMD EPYC 9B14 96-Core Processor",
    "cpus": 2,
    "versions": {"modicum": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0"},
}


def write_run(
    folder: Path,
    job: str,
    *,
    status: str = "done",
    seconds: float = 9.4,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    log: Sequence[Mapping[str, Any]] = (),
    **record: Any,
) -> Path:
    """Write one run folder as a job would."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "job": job,
        "hash": "0f3c9a77d0b15e2c",
        "status": status,
        "inputs": {},
        "metrics": metrics or {},
        "outputs": {},
        "notes": [],
        "seconds": seconds,
        "environment": ENVIRONMENT,
    }
    (folder / "record.json").write_text(json.dumps(content | record))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"job": job, "seed": 0, **(recipe or {})}, sort_keys=False))
    if log:
        (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    return folder


def training_log(
    steps: int, start: float, end: float, *, seed: int = 0, spike: int | None = None
) -> list[dict[str, Any]]:
    """A loss that falls as losses do, with noise, held-out losses and the usual side figures."""
    rng = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = step / steps
        loss = end + (start - end) * math.exp(-5 * done) + rng.gauss(0, 0.06 * (end + 0.4))
        loss += 2.2 * math.exp(-(step - spike) / 4) if spike and step >= spike else 0.0
        lines.append(
            {
                "event": "train",
                "time": 1_700_000_000 + step,
                "step": step,
                "epoch": round(2 * done, 3),
                "loss": max(0.02, loss),
                "learning_rate": 2e-4 * min(1.0, step / (0.06 * steps)) * (1 + math.cos(math.pi * done)) / 2,
                "grad_norm": 0.5 + 1.8 * math.exp(-4 * done) + abs(rng.gauss(0, 0.15)),
                "tokens_per_second": 520 + rng.gauss(0, 12),
            }
        )
        if step % max(1, steps // 4) == 0:
            lines.append({"event": "eval", "step": step, "eval_loss": max(0.05, loss) * 1.06 + 0.02})
    return lines


def cells(n: int = 500) -> list[dict[str, Any]]:
    """Six models on two tasks, with Wilson intervals."""
    found = []
    for task in TASKS:
        for model, value in zip(MODELS, SCORES[task], strict=True):
            low, high = wilson(value, n)
            found.append(
                {
                    "model": model,
                    "task": task,
                    "metric": "exact_match",
                    "value": value,
                    "low": low,
                    "high": high,
                    "n": n,
                    "seconds": 14.2,
                }
            )
    return found


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def merge_layers(experts: Sequence[str] = ("spelling", "arithmetic"), layers: int = 30) -> dict[str, Any]:
    """Norms and cosines over a model of ``layers`` layers with seven matrices each."""
    rng = random.Random(7)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{m}.weight" for i in range(layers) for m in MATRICES] + ["model.norm.weight"]

    def depth(name: str) -> float:
        parts = name.split(".")
        return int(parts[2]) / max(1, layers - 1) if parts[1] == "layers" else 0.5

    def size(name: str, expert: int) -> float:
        if ".layers." not in name:
            return 0.0
        kind = [m in name for m in MATRICES].index(True)
        hump = math.exp(-(((depth(name) - 0.35 - 0.35 * expert) / 0.3) ** 2))
        return (0.25 + 0.7 * hump) * (0.5 + 0.12 * kind) * (1 + 0.08 * rng.random())

    def cosine(name: str) -> float:
        if ".layers." not in name:
            return 0.0
        return 0.16 * math.sin(5 * depth(name)) - 0.04 + rng.gauss(0, 0.02)

    pairs = [f"{a}|{b}" for i, a in enumerate(experts) for b in experts[i + 1 :]]
    return {
        "names": names,
        "norms": {expert: [size(name, i) for name in names] for i, expert in enumerate(experts)},
        "cosines": {pair: [cosine(name) for name in names] for pair in pairs},
        "conflict": [0.5 - 0.4 * cosine(name) if ".layers." in name else 0.0 for name in names],
    }


def quickstart(folder: Path) -> Path:
    """The pipeline that a newcomer sees: two experts, three merges, one evaluation."""
    stages: list[dict[str, Any]] = []

    def stage(name: str, job: str, seconds: float, **rest: Any) -> None:
        write_run(folder / "stages" / name, job, seconds=seconds, **rest)
        stages.append({"name": name, "job": job, "status": "done", "seconds": seconds, "folder": f"stages/{name}"})

    stage(
        "spelling",
        "train",
        71.8,
        log=training_log(160, 2.31, 0.21, seed=1),
        outputs={"model": "adapter"},
        metrics={"tokens": 38_400, "peak_bytes": 1_900_000_000},
        notes=["The processor has no fast bfloat16: training in float32."],
    )
    stage(
        "arithmetic",
        "train",
        84.1,
        log=training_log(160, 1.74, 0.33, seed=2),
        outputs={"model": "adapter"},
        metrics={"tokens": 41_900, "peak_bytes": 1_900_000_000},
        notes=["The processor has no fast bfloat16: training in float32."],
    )
    for method, seconds in (("linear", 2.1), ("ties", 4.9), ("tsv", 11.3)):
        stage(method, "merge", seconds, outputs={"model": "model"}, metrics={"layers": merge_layers(), "tensors": 272})
    stage("scores", "evaluate", 101.0, metrics={"cells": cells(), "pairs": pairs()})
    return write_run(
        folder,
        "pipeline",
        seconds=276.4,
        stages=stages,
        recipe={"stages": [{"name": s["name"], "job": s["job"]} for s in stages]},
    )


def pairs() -> list[dict[str, Any]]:
    """Differences on the same items."""
    return [
        {
            "task": t,
            "metric": "exact_match",
            "a": a,
            "b": b,
            "difference": d,
            "low": d - 0.042,
            "high": d + 0.042,
            "n": 500,
        }
        for t, a, b, d in (
            ("spell_backward", "tsv", "ties", 0.156),
            ("spell_backward", "tsv", "linear", 0.39),
            ("spell_backward", "tsv", "spelling", -0.092),
            ("chain_sum", "tsv", "ties", 0.144),
            ("chain_sum", "tsv", "linear", 0.27),
            ("chain_sum", "arithmetic", "base", 0.031),
        )
    ]


def broken_pipeline(folder: Path) -> Path:
    """A pipeline whose second stage failed; the third never began."""
    write_run(folder / "stages" / "first", "train", log=training_log(40, 2.0, 0.8), outputs={"model": "adapter"})
    write_run(
        folder / "stages" / "second",
        "merge",
        status="failed",
        error="experts[1] has no tensor 'lm_head.weight' (base has it, 49152 × 576). Tied embeddings? Set tie: true.",
    )
    return write_run(
        folder,
        "pipeline",
        status="failed",
        error="experts[1] has no tensor 'lm_head.weight'",
        stages=[{"name": "first", "job": "train", "status": "done", "seconds": 9.4, "folder": "stages/first"}],
        recipe={
            "stages": [
                {"name": n, "job": j} for n, j in (("first", "train"), ("second", "merge"), ("third", "evaluate"))
            ]
        },
    )


def long_training(folder: Path, *, seed: int = 0, spike: int | None = None, status: str = "done") -> Path:
    """A pre-training run of many steps."""
    log = training_log(2400, 9.8, 3.1, seed=seed, spike=spike)
    return write_run(folder, "train", status=status, seconds=5130.0, log=log)


def perplexities(folder: Path) -> Path:
    """An evaluation on text, where lower is better, of models with long names."""
    values = ((12.4, 31.0, 18.2), (11.1, 33.5, 17.9), (10.8, 29.2, 19.4))
    models = ("HuggingFaceTB/SmolLM2-135M-Instruct", "runs/stdlib-meap-0.15/model", "runs/stdlib-plain/model")
    found = [
        {"model": m, "task": t, "metric": "perplexity", "value": v, "low": v * 0.97, "high": v * 1.03, "n": 210}
        for m, row in zip(models, values, strict=True)
        for t, v in zip(("python-stdlib", "topics", "held-out letters"), row, strict=True)
    ]
    return write_run(folder, "evaluate", metrics={"cells": found})


def main(target: Path) -> None:
    """Write examples of every kind, with their reports."""
    from modicum.report import write

    many = merge_layers(("code", "math", "law", "chat", "german"), layers=24)
    sets = {
        "quickstart": [quickstart(target / "quickstart")],
        "broken": [broken_pipeline(target / "nightly")],
        "pretraining": [
            long_training(target / "adamw", seed=1, spike=900, status="running"),
            long_training(target / "adagc", seed=2),
        ],
        "text": [perplexities(target / "text")],
        "many": [write_run(target / "many", "merge", metrics={"layers": many}, outputs={"model": "model"})],
    }
    for name, runs in sets.items():
        print(write(runs, target / f"{name}.html"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
