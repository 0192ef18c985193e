"""Speed of HRP: the factor decomposition beside a dense one, the start of whole models, the cost of preheating.

    python -m benchmarks.speed.hrp [--skip-dense]

Writes ``benchmarks/results/hrp-speed.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.claims.hrp.result import write_result
from benchmarks.speed.shapes import LLAMA_2_7B, SMOLLM2_135M, llama_shapes

from modicum.adapters import Preheat
from modicum.adapters.hrp import factor_svd, factors_from_svd
from modicum.adapters.layers import factors_of, lora_layers
from modicum.adapters.preheat import hrp_state, initialize_lora_hrp_weights, preheating
from modicum.linalg import SVD, truncated_svd
from modicum.random import generator


def timed(work: Callable[[], Any], repeats: int) -> list[float]:
    """Return the seconds of each repeat; the first, which warms caches, is left out when there are several."""
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return seconds[repeats > 1 :]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def random_factors(out: int, width: int, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(0, "speed", name)
    return torch.randn(rank, width, generator=rng), torch.randn(out, rank, generator=rng) * 1e-3


def decompositions(*, dense: bool) -> dict[str, Any]:
    """A product of 4096 x 11008 at R = 128, r = 8."""
    A, B = random_factors(4096, 11008, 128, "product")
    found: dict[str, Any] = {
        "shape": [4096, 11008],
        "R": 128,
        "factors_float64_s": timed(lambda: factor_svd(A, B), 5),
        "randomised_of_product_s": timed(lambda: torch.svd_lowrank(B @ A, q=32, niter=4), 3),
    }
    if dense:
        found["gram_of_product_s"] = timed(lambda: truncated_svd(B @ A, 8), 1)
        found["dense_float32_s"] = timed(lambda: torch.linalg.svd(B @ A, full_matrices=False), 1)
        found["dense_over_factors"] = median(found["dense_float32_s"]) / median(found["factors_float64_s"])
    return found


def starts(config: dict[str, Any], *, rank: int = 8, high: int = 128) -> dict[str, Any]:
    """Decompose and start every linear module of a model's shape, a layer at a time to bound the memory."""
    shapes = {n: s for n, s in llama_shapes(config).items() if n.endswith("_proj.weight")}
    seconds, modules = 0.0, 0
    for layer in range(config["num_hidden_layers"]):
        names = [name for name in shapes if f".{layer}." in name]
        learned = {n: random_factors(*shapes[n], min(high, *shapes[n]), n) for n in names}
        begin = time.perf_counter()
        state = hrp_state(learned)
        for name in names:
            svd = SVD(*(state[f"{name}.{key}"].double() for key in "USV"))
            factors_from_svd(svd, rank=rank, init_factor="A")
        seconds += time.perf_counter() - begin
        modules += len(names)
    return {"modules": modules, "R": high, "r": rank, "seconds": seconds}


def peft_start() -> dict[str, Any]:
    """The same on a real PEFT model of SmolLM2's shape, with the factors read from and written into it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    )
    with preheating(model, config=Preheat(preheat_rank=128)) as stage, torch.no_grad():
        for name, layer in stage.layers.items():
            factors_of(layer, stage.adapter)[1].normal_(generator=generator(0, name))
        begin = time.perf_counter()
        state = stage.state()
        decomposed = time.perf_counter() - begin
    begin = time.perf_counter()
    initialize_lora_hrp_weights(model, state)
    written = time.perf_counter() - begin
    return {
        "modules": len(lora_layers(model)), "decompose_s": decomposed, "start_s": written, "sum_s": decomposed + written
    }  # fmt: skip


def step_seconds(model: Any, adapter_rank: int, batch: dict[str, torch.Tensor], repeats: int) -> float:
    """Median seconds of a training step with an adapter of this rank."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=adapter_rank, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        output = wrapped(**batch)
        (output.loss if hasattr(output, "loss") else output.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, repeats)
    wrapped.unload()
    return median(seconds)


def preheating_steps() -> dict[str, Any]:
    """A preheating step (R = 128) beside a LoRA step (r = 8), on SmolLM2's shape and on one layer of a 7B's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = {}
    one_layer = LLAMA_2_7B | {"num_hidden_layers": 1, "vocab_size": 256}
    for name, config, rows, tokens in (
        ("smollm2-135m", SMOLLM2_135M, 4, 128),
        ("one layer of 7b", one_layer, 2, 128),
    ):
        ids = torch.randint(0, 256, (rows, tokens), generator=generator(0, "ids"))
        seconds: dict[int, list[float]] = {8: [], 128: []}
        for _ in range(2):  # alternate, so that a slow moment of the machine hits both
            for rank in seconds:
                model = LlamaForCausalLM(LlamaConfig(**config))
                seconds[rank].append(step_seconds(model, rank, {"input_ids": ids, "labels": ids}, 3))
        lora, preheat = min(seconds[8]), min(seconds[128])
        found[name] = {"lora_r8_s": lora, "preheat_R128_s": preheat, "ratio": preheat / lora}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-dense", action="store_true", help="leave out the dense decomposition (minutes)")
    options = parser.parse_args()
    result = {
        "threads": torch.get_num_threads(),
        "decomposition": decompositions(dense=not options.skip_dense),
        "start_smollm2_shape": starts(SMOLLM2_135M),
        "start_smollm2_peft": peft_start(),
        "start_7b_shape": starts(LLAMA_2_7B),
        "steps": preheating_steps(),
    }
    write_result("hrp-speed", result)


if __name__ == "__main__":
    main()
