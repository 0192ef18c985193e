"""What serving several experts from one model costs: bytes, memory, switches, decoding, mixed batches, routing.

    python -m benchmarks.speed.routed [--part disk|memory|switch|decode|batch|route|conflict] [--rounds 5] [--again]

A base and four experts of SmolLM2-135M's shape with made-up numbers; four LoRA adapters of rank 8 on all linear maps.
Beside them: the plain merged model in the same process, four models loaded side by side, PEFT with one active adapter
and with a batch of different ones, and our own ``ties`` merge of the same five models. Memory is anonymous memory as
the kernel counts it, in a process of its own. Ratios are medians of ratios within a turn, of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from benchmarks.memory import status
from benchmarks.provenance import origin
from benchmarks.speed.shapes import LLAMA_2_7B, QWEN_1_5B, SMOLLM2_135M, write_checkpoint, write_repeated
from benchmarks.speed.zero_token import Calls, ratios, timed

from modicum.environment import environment
from modicum.record import write_atomic

RESULT = Path(__file__).parents[1] / "results" / "routed-speed.json"
WORK = Path(tempfile.gettempdir()) / "modicum-routed-speed"
EXPERTS, RANK = 4, 8
PARTS = ("disk", "memory", "switch", "decode", "batch", "route", "conflict")
GOALS = {
    "disk": "at most 0.379 of four bf16 models at density 0.1, 0.30 with sign; stated to the byte",
    "memory": "at most 1.15 of one plain model of that dtype, at least 3 times less than four loaded",
    "switch": "at most 4 ms a routed block and 2.5 times the plain copy; no allocation",
    "decode": "at least 0.98 of the plain model's speed, 1.1 of PEFT's with one active adapter",
    "batch": "at least as fast as PEFT's batch of different adapters, never slower than one expert after the other",
    "route": "at most 5 % of an answer of 64 tokens",
    "conflict": "at most 1.3 times our ties merge, 100 MB above the imports, whatever the number of layers",
}


def models() -> tuple[Path, list[Path]]:
    base = write_checkpoint(WORK / "base", SMOLLM2_135M, seed=0)
    return base, [write_checkpoint(WORK / f"expert{t}", SMOLLM2_135M, seed=t + 1, base=base) for t in range(EXPERTS)]


def adapters() -> list[Path]:
    """Four adapters of rank 8 on all linear maps, written by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, _ = models()
    folders = [WORK / f"adapter{t}" for t in range(EXPERTS)]
    if not all((folder / "adapter_model.safetensors").exists() for folder in folders):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
        for t, folder in enumerate(folders):
            rng = torch.Generator().manual_seed(t)
            with torch.no_grad():
                for name, p in peft.named_parameters():
                    if "lora_" in name:
                        p.copy_(0.01 * torch.randn(p.shape, generator=rng))
            peft.save_pretrained(folder)
            config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
            (folder / "adapter_config.json").write_text(json.dumps(config))
    return folders


def routed_folder(store: str, *, layers: int, lora: bool = False) -> Path:
    """Build a routed model of the first layers, or of all, and return its folder."""
    from modicum.jobs import execute
    from modicum.recipe import parse

    out = WORK / f"routed-{store}-{layers}"
    base, experts = models()
    chosen = adapters() if lora else experts
    recipe = {
        "job": "route",
        "base": str(base),
        "experts": {f"e{t}": str(path) for t, path in enumerate(chosen)},
        "rule": "all" if layers == 30 else {"name": "first", "k": layers},
        "store": store,
        "dense": "base" if lora else "average",
        "router": None,
    }
    execute(parse(recipe), out, quiet=True)
    return out / "model"


def load(folder: Path, dtype: Any = torch.float32, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    import modicum.models  # noqa: F401 - makes the class known

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def with_router(folder: Path) -> Path:
    """Return a copy of a folder with a linear router and its gate; weights and experts are the same files."""
    from modicum.models.router import fit_router

    out = folder.parent / "gated"
    if not out.exists():
        shutil.copytree(
            folder, out, copy_function=lambda a, b: (os.link if a.endswith("tensors") else shutil.copy2)(a, b)
        )
    model = load(out)
    prompts = torch.randint(5, 40_000, (40, 48), generator=torch.Generator().manual_seed(0))
    router = fit_router(model.features(prompts), [i % EXPERTS for i in range(40)])
    model.router = replace(router, threshold=1.0)
    model.save_pretrained(out)
    return out


def part_disk(_: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    from modicum.models.router_fitting import stored_bytes

    found = {}
    whole = (models()[0] / "model.safetensors").stat().st_size
    router = stored_bytes("linear", experts=EXPERTS, width=SMOLLM2_135M["hidden_size"], rank=8, gate=True)
    for store in ("random_rescaled", "magnitude", "sign"):
        plain = routed_folder(store, layers=30)
        record = json.loads((plain.parent / "record.json").read_text())
        stated = record["metrics"]["routing_bytes"]["stored"] + router
        folder = with_router(plain)
        files = (folder / "experts.safetensors", folder / "router.safetensors")
        written = sum(t.nbytes for file in files for t in load_file(file).values())
        total = sum(path.stat().st_size for path in folder.iterdir())
        found[store] = {"stated bytes": stated, "written bytes": written, "folder / four models": total / (4 * whole)}
    return found


SERVE = """
import json, sys
import torch
from benchmarks.memory import Polled, status
from benchmarks.speed.routed import load
import modicum.models
torch.set_num_threads(1)
kind, dtype, folders = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3:]
import transformers.models.llama.modeling_llama
before = status("RssAnon")
ids = torch.arange(2, 34)[None]
with Polled() as peak:
    models = [load(f, dtype=dtype) for f in folders]
    for turn in range(4):
        more = {"weights": [float(turn == t) for t in range(4)]} if kind == "routed" else {}
        models[turn % len(models)].generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1, **more)
print(json.dumps({"bytes": peak.bytes - before, "resident": status("RssAnon") - before}))
"""


def part_memory(_: int) -> dict[str, Any]:
    base, experts = models()
    sign = routed_folder("sign", layers=30)
    found = {}
    for dtype in ("float32", "bfloat16"):
        sizes = {}
        for kind, folders in (("plain", [base]), ("routed", [sign]), ("four", experts)):
            command = [sys.executable, "-c", SERVE, kind, dtype, *map(str, folders)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            sizes[kind] = json.loads(done.stdout.splitlines()[-1])
        peak = {kind: size["bytes"] for kind, size in sizes.items()}
        found[dtype] = {
            **{f"{kind} MB": round(size / 1e6, 1) for kind, size in peak.items()},
            "routed / plain": round(peak["routed"] / peak["plain"], 3),
            "four / routed": round(peak["four"] / peak["routed"], 3),
        }
    return found


def _switch_and_copy(model: Any, hot: list[list[float]]) -> Calls:
    turns = cycle(hot)
    targets = list(model.working.targets.values())
    dense = [model.experts.dense[name] for name in model.working.targets]

    def copy() -> None:
        for target, source in zip(targets, dense):
            target.copy_(source)

    return {"switch": lambda: model.materialise(next(turns)), "copy": copy}


def part_switch(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    blocks = 6
    for store in ("sign", "random_rescaled", "magnitude"):
        model = load(routed_folder(store, layers=blocks))
        hot = [[float(t == s) for s in range(EXPERTS)] for t in range(EXPERTS)]
        for weights in hot:
            model.materialise(weights)
        before = status("RssAnon")
        seconds = timed(_switch_and_copy(model, hot), rounds=4 * rounds)
        table = ratios(seconds, "copy")
        found[store] = {
            "processor ms a block": round(table["switch"]["processor ms"] / blocks, 3),
            "processor / plain copy": table["switch"]["processor / copy"],
            "anonymous MB gained": round((status("RssAnon") - before) / 1e6, 2),
        }
    return found


def answer(model: Any, ids: torch.Tensor, tokens: int, **more: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)


def plain_of(model: Any, weights: list[float]) -> Any:
    plain = load(models()[0])
    plain.load_state_dict(model.experts.state_dict(weights), strict=False)
    return plain


def part_decode(rounds: int) -> dict[str, Any]:
    from peft import PeftModel

    ids = torch.arange(2, 50)[None]
    hot = [1.0, 0.0, 0.0, 0.0]
    lora = load(routed_folder("lora", layers=30, lora=True))
    plain = plain_of(lora, hot)
    peft = PeftModel.from_pretrained(load(models()[0]), adapters()[0], adapter_name="a0")
    lora.materialise(hot)
    calls = {
        "plain": lambda: answer(plain, ids, 16),
        "routed": lambda: answer(lora, ids, 16, weights=hot),
        "peft": lambda: answer(peft, ids, 16),
    }
    table = ratios(timed(calls, rounds=rounds), "plain")
    same = bool((answer(plain, ids, 16) == answer(lora, ids, 16, weights=hot)).all())
    return {
        **table,
        "routed speed / plain": round(1 / table["routed"]["processor / plain"], 3),
        "routed speed / peft": round(table["peft"]["processor / plain"] / table["routed"]["processor / plain"], 3),
        "same tokens": same,
    }


def part_batch(rounds: int) -> dict[str, Any]:
    from peft import PeftModel

    ids = torch.stack([torch.arange(2 + i, 50 + i) for i in range(8)])
    lora = load(routed_folder("lora", layers=30, lora=True))
    peft = PeftModel.from_pretrained(load(models()[0]), adapters()[0], adapter_name="a0")
    for t in range(1, EXPERTS):
        peft.load_adapter(adapters()[t], adapter_name=f"a{t}")
    rows = torch.eye(EXPERTS).repeat(2, 1)
    names = [f"a{i % EXPERTS}" for i in range(8)]

    def by(way: str) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            lora.mixed.way = way
            return answer(lora, ids, 10, weights=rows)

        return run

    by("measured")()  # what both ways cost is measured once
    calls = {
        "peft": lambda: answer(peft, ids, 10, adapter_names=names),
        "side path": by("beside"),
        "grouped": by("grouped"),
        "the cheaper": by("measured"),
        "one expert": lambda: answer(lora, ids, 10, weights=[1.0, 0, 0, 0]),
    }
    table = ratios(timed(calls, rounds=rounds), "peft")
    return {**table, "side path speed / peft": round(1 / table["side path"]["processor / peft"], 3)}


def part_route(rounds: int) -> dict[str, Any]:
    from modicum.models.router import fit_router

    model = load(routed_folder("sign", layers=6))
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 40_000, (40, 48), generator=rng)
    model.router = fit_router(model.features(prompts), [i % EXPERTS for i in range(40)])
    one = prompts[:1]
    weights = model.route(one).weights[0].tolist()
    calls = {"route": lambda: model.route(one), "answer": lambda: answer(model, one, 64, weights=weights)}
    found: dict[str, Any] = ratios(timed(calls, rounds=rounds), "answer")
    model.config.routing = {**model.config.routing, "second_prefill": True, "tap": 15}
    calls = {"route behind 15 blocks": lambda: model.route(one), "answer": calls["answer"]}
    return found | ratios(timed(calls, rounds=rounds), "answer")


CONFLICT = """
import json, sys
import torch
from benchmarks.memory import Polled, status
from modicum.weights.mediator import layer_conflict
from modicum.weights.checkpoint import Checkpoint
torch.set_num_threads(1)
before = status("RssAnon")
with Polled() as peak:
    d = layer_conflict(Checkpoint(sys.argv[1]), [Checkpoint(f) for f in sys.argv[2:]], workers=1)
print(json.dumps({"MB above imports": round((peak.bytes - before) / 1e6, 1), "layers": len(d)}))
"""


def part_conflict(rounds: int) -> dict[str, Any]:
    from modicum.weights import Checkpoint, merge
    from modicum.weights.mediator import layer_conflict

    base, experts = models()
    opened = Checkpoint(base), [Checkpoint(path) for path in experts]
    out = WORK / "ties"

    def ties() -> None:
        shutil.rmtree(out, ignore_errors=True)
        merge(*opened, out, method="ties", density=0.2, workers=1, progress=False)

    seconds = timed({"conflict": lambda: layer_conflict(*opened, workers=1), "ties": ties}, rounds=max(2, rounds // 2))
    found: dict[str, Any] = ratios(seconds, "ties")
    for name, config in (("135m", None), ("1.5b", QWEN_1_5B), ("7b", LLAMA_2_7B)):
        for layers in (2, 4) if config else (30,):
            folders = [base, *experts]
            if config:
                made = write_repeated(WORK / f"{name}-{layers}", {**config, "num_hidden_layers": layers}, experts=4)
                folders = [made[0], *made[1]]
            command = [sys.executable, "-c", CONFLICT, *map(str, folders)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[f"{name}, {layers} layers"] = json.loads(done.stdout.splitlines()[-1])
            if config:
                shutil.rmtree(WORK / f"{name}-{layers}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.part or PARTS:
        if part in _stored()["parts"] and not arguments.again:
            continue
        found = globals()[f"part_{part}"](arguments.rounds)
        when = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | origin()
        stored = _stored()  # another process may have measured another part meanwhile
        stored["parts"][part] = {"goal": GOALS[part], **found, **when}
        stored["environment"] = environment()
        write_atomic(RESULT, json.dumps(stored, indent=1) + "\n")
        print(part, json.dumps(found, indent=1), flush=True)


def _stored() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"study": "routed-speed", "parts": {}}


if __name__ == "__main__":
    main()
