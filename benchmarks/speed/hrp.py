"""Speed of HRP: the factor decomposition beside a dense one, the start of whole models, the cost of preheating.

    python -m benchmarks.speed.hrp [--parts decomposition dense smollm2 peft 7b steps_smollm2 steps_7b_layer]

Adds the parts to ``benchmarks/results/hrp-speed.json``. Every figure stands there twice: ``wall`` seconds, which are
what a user waits on an idle machine, and ``cpu`` seconds of all threads, which a busy machine inflates less.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from benchmarks.provenance import origin
from benchmarks.speed.shapes import LLAMA_2_7B, SMOLLM2_135M, llama_shapes
from benchmarks.tables import RESULTS, load

from modicum.adapters import Preheat, hrp_factors
from modicum.adapters.hrp import factor_svd
from modicum.adapters.layers import factors_of, lora_layers
from modicum.adapters.preheat import hrp_state, initialize_lora_hrp_weights, preheating
from modicum.environment import environment
from modicum.random import generator
from modicum.record import write_atomic

NAME = "hrp-speed.json"
RANK, HIGH = 8, 128
Seconds: TypeAlias = dict[str, float]


def timed(work: Callable[[], Any]) -> Seconds:
    """Return the seconds that one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def best(work: Callable[[], Any], repeats: int = 5) -> Seconds:
    """Return the least of several calls: other programs can only add to it."""
    return least([timed(work) for _ in range(repeats)])


def least(found: list[Seconds]) -> Seconds:
    return {clock: min(seconds[clock] for seconds in found) for clock in ("wall", "cpu")}


def total(found: list[Seconds]) -> Seconds:
    return {clock: sum(seconds[clock] for seconds in found) for clock in ("wall", "cpu")}


def over(one: Seconds, other: Seconds) -> Seconds:
    return {clock: one[clock] / other[clock] for clock in ("wall", "cpu")}


def random_factors(out: int, width: int, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(0, "speed", name)
    return torch.randn(rank, width, generator=rng), torch.randn(out, rank, generator=rng) * 1e-3


def decomposition() -> dict[str, Any]:
    """A product of 4096 x 11008 at R = 128: the leading 8 directions and all of them, from the factors."""
    A, B = random_factors(4096, 11008, HIGH, "product")
    return {
        "leading": best(lambda: factor_svd(A, B, rank=RANK)),
        "all": best(lambda: factor_svd(A, B)),
        "randomised_of_product": best(lambda: torch.svd_lowrank(B @ A, q=4 * RANK, niter=4), 2),
    }


def dense() -> dict[str, Any]:
    """The same product formed and decomposed in float32, once: it takes minutes."""
    A, B = random_factors(4096, 11008, HIGH, "product")
    whole = timed(lambda: torch.linalg.svd(B @ A, full_matrices=False))
    leading = best(lambda: factor_svd(A, B, rank=RANK))
    return {"float32": whole, "leading": leading, "dense_over_leading": over(whole, leading)}


def start(config: dict[str, Any]) -> dict[str, Any]:
    """Decompose and start every linear module of a model's shape, a layer at a time to bound the memory."""
    shapes = {n: s for n, s in llama_shapes(config).items() if n.endswith("_proj.weight")}
    layers = []
    for layer in range(config["num_hidden_layers"]):
        names = [name for name in shapes if f".{layer}." in name]
        learned = {n: random_factors(*shapes[n], min(HIGH, *shapes[n]), n) for n in names}
        layers.append(timed(lambda learned=learned: hrp_state(learned, keep=RANK)))  # type: ignore[misc]
    return {"modules": len(shapes), "R": HIGH, "r": RANK, "decompose": total(layers)}


def peft() -> dict[str, Any]:
    """A real PEFT model of SmolLM2's shape: factors read from it, decomposed, and written into its adapter."""
    model = wrapped(SMOLLM2_135M, RANK)
    with preheating(model, config=Preheat(preheat_rank=HIGH)) as stage, torch.no_grad():
        for name, layer in stage.layers.items():
            factors_of(layer, stage.adapter)[1].normal_(generator=generator(0, name))
        decompose = best(lambda: stage.state(keep=RANK), 2)
        whole = timed(stage.state)
        state = stage.state(keep=RANK)
    write = best(lambda: initialize_lora_hrp_weights(model, state), 2)
    return {
        "modules": len(lora_layers(model)), "decompose": decompose, "decompose_all_directions": whole, "write": write,
        "sum": total([decompose, write]),
    }  # fmt: skip


def wrapped(config: dict[str, Any], rank: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**config)), options).train()


def steps(config: dict[str, Any], *, rows: int = 2, tokens: int = 128, rounds: int = 2) -> dict[str, Any]:
    """A preheating step (R = 128) beside a LoRA step (r = 8)."""
    ids = torch.randint(0, 256, (rows, tokens), generator=generator(0, "ids"))
    kinds = {"lora": stepper(wrapped(config, RANK), ids), "preheat": stepper(wrapped(config, HIGH), ids)}
    # In turns, so that a slow moment of the machine hits both; the first round, which allocates, does not count.
    found = {kind: [timed(step)] for kind, step in kinds.items()}
    for _ in range(rounds):
        for kind, step in kinds.items():
            found[kind].append(timed(step))
    seconds = {kind: least(times[1:]) for kind, times in found.items()}
    ratio = over(seconds["preheat"], seconds["lora"])
    length = 1000
    share = Preheat().steps_for(length) / length
    return {
        "tokens": rows * tokens, "rounds": rounds, **seconds, "preheat_over_lora": ratio,
        # The preheating steps of a run at the defaults, which come on top of its own.
        f"added_to_{length}_steps": {clock: share * value for clock, value in ratio.items()},
    }  # fmt: skip


def stepper(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "decomposition": decomposition,
    "dense": dense,
    "smollm2": lambda: start(SMOLLM2_135M),
    "peft": peft,
    "7b": lambda: start(LLAMA_2_7B),
    "steps_smollm2": lambda: steps(SMOLLM2_135M),
    "steps_7b_layer": lambda: steps(LLAMA_2_7B | {"num_hidden_layers": 1, "vocab_size": 256}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    hrp_factors(*random_factors(16, 16, 8, "warm up"), rank=2)  # the first call into the linear algebra loads it
    record = load(NAME) or {"parts": {}}
    for name in parser.parse_args().parts:
        conditions = {"threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 1)}
        record["parts"][name] = conditions | PARTS[name]() | origin()
        print(name, record["parts"][name], flush=True)
        write_atomic(RESULTS / NAME, json.dumps(record | {"environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
