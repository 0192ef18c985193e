"""What the campaigns work on: a folder of tiny models and data, and a recipe of every job, its paths relative."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

TEXTS = ("abababab", "cdcdcd", "the cat sat", "one two three four")
TRAINER = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2, "per_device_train_batch_size": 2,
           "logging_steps": 1, "learning_rate": 0.01}  # fmt: skip
ROWS = {"path": "rows.jsonl", "max_length": 32}


def build(root: Path) -> None:
    """Write the models and the data."""
    import torch
    from peft import LoraConfig, get_peft_model

    from modicum.models import convert_to_zero_token
    from support import byte_tokenizer, tiny_llama

    root.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()

    def save(model: Any, *places: str) -> None:
        for place in places:
            model.save_pretrained(root / place, max_shard_size="60KB")
            tokenizer.save_pretrained(root / place)

    def varied(seed: int) -> Any:
        model = tiny_llama(seed=0, max_position_embeddings=4096)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=rng))
        return model

    save(tiny_llama(seed=0, max_position_embeddings=4096), "base")
    for seed, name in enumerate(("one", "two"), 1):
        save(varied(seed), name)
    for step in range(1, 5):
        save(varied(step), f"run/checkpoint-{step}")
    looped = tiny_llama(seed=0, num_hidden_layers=4)
    save(convert_to_zero_token(looped, n_cycles=2, zero_layers="all"), "looped")
    save(tiny_llama(seed=3, initializer_range=0.3, max_position_embeddings=4096), "talker")
    wrapped = get_peft_model(varied(0), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for module in wrapped.modules():
        for factor in getattr(module, "lora_B", {}).values():
            torch.nn.init.normal_(factor.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    wrapped.peft_config["default"].base_model_name_or_path = "../base"
    wrapped.save_pretrained(root / "adapter")
    _write(root)


def _write(root: Path) -> None:
    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    lines("rows.jsonl", [{"prompt": f"say {i}", "completion": "abc"} for i in range(8)])
    lines("text.jsonl", [{"text": TEXTS[i % 4] * (1 + i % 2)} for i in range(8)])
    lines("chat.jsonl", [{"messages": [{"role": "user", "content": f"say {i}"},
                                       {"role": "assistant", "content": "abc"}]} for i in range(8)])  # fmt: skip
    lines("pairs.jsonl", [{"prompt": f"say {i}", "chosen": "abc", "rejected": "xyz"} for i in range(8)])
    shutil.copy(files("modicum.jobs.safety").joinpath("guidelines.yaml"), root / "guidelines.yaml")
    for name in ("harmful", "harmless", "wishes"):
        lines(f"{name}.jsonl", [{"prompt": f"A {name} wish, number {i}", "completion": "Here."} for i in range(4)])
    (root / "tracks.csv").write_text(
        "time,id,x,y\n" + "".join(f"{t},{i},{100 * i + t},{50 * i - t}\n" for t in range(0, 200, 10) for i in range(4))
    )


def recipes() -> dict[str, dict[str, Any]]:
    """Return recipes of every job by a name that begins with that of the job."""
    data = {"path": "text.jsonl", "max_length": 32}
    found: dict[str, dict[str, Any]] = {
        "merge": {"job": "merge", "base": "base", "experts": ["one", "two"], "shard_bytes": 40_000,
                  "method": {"name": "ties", "density": 0.5}},
        "merge-adapter": {"job": "merge", "base": "base", "experts": ["one", "adapter"],
                          "method": {"name": "task_arithmetic", "scale": 0.5}},
        "merge-mergekit": {"merge_method": "dare_ties", "base_model": "base", "dtype": "float32",
                           "parameters": {"density": 0.5, "weight": 0.5},
                           "models": [{"model": "one"}, {"model": "two"}]},
        "average": {"job": "average", "checkpoints": ["run"], "method": {"name": "lawa", "last": 3}},
        "average-search": {"job": "average", "checkpoints": ["run"], "method": {"name": "sewa", "k": 2, "iters": 6},
                           "data": data, "batch_size": 4, "compare": ["last", "greedy"]},
        "train": {"job": "train", "model": "base", "data": ROWS, "trainer": TRAINER},
        "train-adapter": {"job": "train", "model": "base", "data": {"path": "chat.jsonl", "max_length": 64},
                          "adapter": {"rank": 2, "init": {"name": "hrp"}}, "trainer": TRAINER},
        "train-text": {"job": "train", "model": "base", "data": data | {"packing": True}, "eval_data": data,
                       "objective": {"name": "meap"}, "gradient": {"name": "adagc"}, "trainer": TRAINER},
        "train-tezo": {"job": "train", "model": "base", "data": ROWS,
                       "optimizer": {"name": "tezo", "rank": 2, "lr": 1e-4},
                       "trainer": {key: value for key, value in TRAINER.items() if key != "learning_rate"}},
        "train-pairs": {"job": "train", "model": "base", "data": {"path": "pairs.jsonl", "max_length": 32},
                        "objective": {"name": "dpo"}, "adapter": {"rank": 2}, "trainer": TRAINER},
        "evaluate": {"job": "evaluate", "models": {"a": "one", "b": "adapter"},
                     "tasks": {"say": {"kind": "exact_match", "data": ROWS, "max_new_tokens": 4},
                               "read": {"kind": "perplexity", "data": data}}},
        "statistics": {"job": "statistics", "model": "one", "kind": "fisher", "data": ROWS},
        "statistics-gram": {"job": "statistics", "model": "one", "kind": "gram", "data": ROWS},
        "calibrate": {"job": "calibrate", "model": "looped", "data": data, "max_loss_increase": 0.5, "candidates": 2},
        "export": {"job": "export", "model": "looped"},
        "extract": {"job": "extract", "model": "one", "base": "base", "max_rank": 4},
        "route": {"job": "route", "base": "base", "experts": {"a": "one", "b": "two"},
                  "data": {"a": {"path": "rows.jsonl"}, "b": {"path": "harmless.jsonl"}},
                  "rule": "all", "store": "sign"},
        "coordinate": {"job": "coordinate", "application": {"name": "tracking", "agents": 3, "targets": 3},
                       "policies": ["ma_spl", "random"], "rounds": 4, "seeds": 1, "steps": [10, 100], "frames": 2},
        "coordinate-tracks": {"job": "coordinate",
                              "application": {"name": "tracking", "agents": 3, "tracks": "tracks.csv"},
                              "policies": ["osg", "random"], "rounds": 4, "seeds": 1, "steps": [10], "frames": 0},
        "attack": {"job": "attack", "targets": {"base": "talker"}, "suites": {"plain": "plain", "flip": "flip"},
                   "goals": {"path": "harmful.jsonl", "size": 3}, "benign": {"path": "harmless.jsonl", "size": 3},
                   "samples": 2, "max_new_tokens": 4},
        "synthesize": {"job": "synthesize", "teacher": "talker", "steer": True,
                       "illegal": {"path": "harmful.jsonl", "size": 3},
                       "helpful": {"path": "harmless.jsonl", "size": 3}, "k": 2, "max_tokens": 8, "min_words": 1,
                       "minimum": 0},
        "attack-judged": {"job": "attack", "targets": {"base": {"model": "talker", "guidelines": "guidelines.yaml"}},
                          "judge": {"name": "jbb", "backend": "talker"}, "attacker": "talker",
                          "suites": {"plain": "plain"}, "goals": {"path": "harmful.jsonl", "size": 2},
                          "benign": {"path": "harmless.jsonl", "size": 2},
                          "trained_on": {"path": "wishes.jsonl"}, "samples": 1, "max_new_tokens": 4},
        "represent": {"job": "represent", "targets": {"base": "talker"}, "suites": {"flip": "flip"}, "folds": 2,
                      "goals": {"path": "harmful.jsonl", "size": 4}, "benign": {"path": "harmless.jsonl", "size": 4}},
        "search": {"job": "search", "merge": {"base": "base", "experts": ["one", "two"], "method": "task_arithmetic"},
                   "knobs": {"scale": {"low": 0.1, "high": 1}}, "tasks": {"read": {"kind": "perplexity", "data": data}},
                   "trials": 5, "population": 4},
        "transplant": {"job": "transplant", "model": "one", "donor": "talker", "k": 2},
        "moe": {"job": "moe", "base_model": "base", "gate_mode": "random",
                "experts": [{"source_model": "one"}, {"source_model": "two"}]},
        "pipeline": {"job": "pipeline", "stages": [
            {"name": "tune", "job": "train", "model": "base", "data": ROWS, "adapter": {"rank": 2},
             "trainer": TRAINER | {"max_steps": 2}},
            {"name": "mix", "job": "merge", "base": "base", "experts": ["stage:tune", "one"], "method": "linear"},
            {"name": "score", "job": "evaluate", "models": {"m": "stage:mix"},
             "tasks": {"read": {"kind": "perplexity", "data": data}}}]},
        "grid": {"job": "grid",
                 "axes": {"rows": {"say": {"data": ROWS}, "text": {"data": data}},
                          "method": {"mean": {"method": "linear"},
                                     "sum": {"method": {"name": "task_arithmetic"},
                                             "tune": {"method.scale": [0.5, 1]}}}},
                 "choose": {"method": "choose"},
                 "stages": [
            {"name": "tune", "role": "expert", "over": ["rows"], "job": "train", "model": "base", "data": ROWS,
             "adapter": {"rank": 2}, "trainer": TRAINER | {"max_steps": 2}},
            {"name": "mix", "role": "merge", "over": ["method"], "job": "merge", "base": "base",
             "experts": ["stage:tune"], "method": "set by the axis"},
            {"name": "choose", "over": ["method"], "job": "evaluate", "models": {"m": "stage:mix"},
             "tasks": {"read": {"kind": "perplexity", "data": data}}},
            {"name": "score", "over": ["method"], "job": "evaluate", "models": {"m": "stage:mix"},
             "tasks": {"read": {"kind": "perplexity", "data": data | {"size": 4}}}}]},
    }  # fmt: skip
    return found


def write_recipes(root: Path) -> dict[str, Path]:
    """Write every recipe as ``NAME.yaml`` into the folder; JSON is YAML."""
    paths = {}
    for name, recipe in recipes().items():
        paths[name] = root / f"{name}.yaml"
        paths[name].write_text(json.dumps(recipe))
    return paths
