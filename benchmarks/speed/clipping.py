"""What clipping costs: AdaGC beside torch's clip_grad_norm_ and pytorch_optimizer's AdaGC, alternating in one run.

    python -m benchmarks.speed.clipping [--threads 1] [--rounds 15] [--parts smollm2 1.3b bf16 peer step] [--peer DIR]

``--peer`` names a folder that holds an unpacked pytorch_optimizer; without it an installed one is used, or the part is
left out. Gradients grow by five per cent between two calls, outside the clock, so that every tensor is clipped in every
call: on the CPU, AdaGC skips those that need no scaling, and what it costs then is a call of its own. Results with more
than one thread stand beside those with one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import origin
from benchmarks.speed.shapes import SMOLLM2_135M, llama_shapes
from torch.utils._python_dispatch import TorchDispatchMode

from modicum.environment import environment
from modicum.optim import AdaGC
from modicum.record import write_atomic

RESULTS = Path(__file__).parents[1] / "results" / "adagc-speed.json"
LLAMA_1_3B = {
    "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip


def parameters(config: dict, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Return parameters of these shapes with random gradients; their own memory is never touched."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for shape in llama_shapes(config).values():
        param = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
        param.grad = torch.empty(shape, dtype=dtype).normal_(std=1e-3, generator=rng)
        found.append(param)
    return found


def alternate(calls: dict[str, Callable[[], Any]], *, rounds: int, between: Callable[[], Any]) -> dict:
    """Time the calls in turn, wall clock and processor time, and give each as a ratio to the first."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            between()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if turn:  # the first round warms up
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    first = next(iter(calls))

    def summary(clock: int) -> dict:
        ms = {name: [1e3 * t[clock] for t in times] for name, times in taken.items()}
        return {
            name: {
                "median_ms": round(statistics.median(values), 2),
                "least_ms": round(min(values), 2),
                "ratio_of_medians": round(statistics.median(values) / statistics.median(ms[first]), 3),
                "ratio_of_least": round(min(values) / min(ms[first]), 3),
            }
            for name, values in ms.items()
        }

    return {"wall": summary(0), "processor": summary(1), "rounds": rounds}


class Reads(TorchDispatchMode):
    """Count how often a value is read back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def reads(call: Callable[[], Any]) -> int:
    with Reads() as watch:
        call()
    return watch.count


def clip_alone(config: dict, dtype: torch.dtype, rounds: int) -> dict:
    """Compare clip_() with clip_grad_norm_ on the same gradients."""
    params = parameters(config, dtype)
    grads = [p.grad for p in params]
    clipper = AdaGC(params, warmup=0, relative=1.0)
    clipper.clip_()
    # A limit that binds, so that both scale: half of the norm there is.
    limit = 0.5 * float(torch.linalg.vector_norm(clipper.state.gamma))
    torch_clip = lambda: torch.nn.utils.clip_grad_norm_(params, limit, foreach=True)  # noqa: E731

    def grow() -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
        torch._foreach_mul_(grads, float(2.2 * limit / norm))

    calls = {
        "clip_grad_norm_": torch_clip,
        "AdaGC.clip_": clipper.clip_,
        "AdaGC.clip_, nothing to cut": AdaGC(params, warmup=0, relative=math.inf).clip_,
    }
    found = alternate(calls, rounds=rounds, between=grow)
    grow()
    rate = float((clipper.clip_().factors < 1).float().mean())
    state = sum(v.numel() * v.element_size() for v in vars(clipper.state).values() if isinstance(v, torch.Tensor))
    return {
        **found,
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
        "dtype": str(dtype),
        "share_clipped": rate,
        "state_bytes_per_tensor": state / len(params),
        "host_reads": {"clip_grad_norm_": reads(torch_clip), "AdaGC.clip_": reads(clipper.clip_)},
    }


def without_clipping(module: Any) -> Callable[[Callable[[], Any]], Any]:
    """Return a function that calls another while the peer's module sees a torch that clips nothing, at no cost."""

    class Stub:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def _foreach_norm(self, tensors):
            return [torch.ones(()) for _ in tensors]

        def _foreach_mul(self, tensors, _):
            return tensors

    def call(function: Callable[[], Any]) -> Any:
        module.torch = Stub()
        try:
            return function()
        finally:
            module.torch = torch

    return call


def peer(config: dict, rounds: int) -> dict:
    """Compare whole steps with pytorch_optimizer's AdaGC, and our clip with what its clipping adds to its step."""
    from pytorch_optimizer.optimizer import adagc as module

    ours, theirs = parameters(config), parameters(config)
    for p in (*ours, *theirs):
        torch.nn.init.constant_(p, 0.01)
    # Their gradients are ours: both only read or scale them in place.
    for a, b in zip(ours, theirs):
        b.grad = a.grad
    clipper = AdaGC(ours, warmup=0, relative=1.0)
    adamw = torch.optim.AdamW(ours, lr=1e-6, foreach=True)
    other = module.AdaGC(theirs, lr=1e-6, weight_decay=0.01, warmup_steps=1, lambda_rel=1.0)
    grads = [p.grad for p in ours]
    stubbed = without_clipping(module)

    def both() -> None:
        clipper.clip_()
        adamw.step()

    calls = {
        "AdaGC.clip_": clipper.clip_,
        "AdaGC.clip_ + torch AdamW": both,
        "pytorch_optimizer AdaGC step": other.step,
        "the same step without its clipping": lambda: stubbed(other.step),
    }
    other.step()  # its first step takes another path
    found = alternate(calls, rounds=rounds, between=lambda: torch._foreach_mul_(grads, 1.05))
    for clock in ("wall", "processor"):
        part = found[clock]
        for kind in ("median_ms", "least_ms"):
            added = part["pytorch_optimizer AdaGC step"][kind] - part["the same step without its clipping"][kind]
            part["AdaGC.clip_"][f"peer_clipping_over_ours_{kind.removesuffix('_ms')}"] = round(
                added / part["AdaGC.clip_"][kind], 2
            )
    # The warm-up of the peer goes tensor by tensor.
    warming = module.AdaGC(theirs, lr=1e-6, warmup_steps=10**6)
    started = AdaGC(ours, warmup=10**6)
    warm = alternate(
        {"AdaGC.clip_ + torch AdamW": lambda: (started.clip_(), adamw.step()), "pytorch_optimizer AdaGC": warming.step},
        rounds=max(3, rounds // 3),
        between=lambda: torch._foreach_mul_(grads, 1.05),
    )
    return {
        **found,
        "during_the_warmup": warm,
        "version": version("pytorch_optimizer"),
        "host_reads": {"pytorch_optimizer AdaGC step": reads(other.step), "AdaGC.clip_": reads(clipper.clip_)},
    }


def whole_step(rounds: int) -> dict:
    """Measure clipping inside real training steps of a SmolLM2-135M with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    clipper = AdaGC(model.named_parameters(), warmup=0)
    ids = torch.randint(49152, (4, 256))
    taken: dict[str, list[tuple[float, float]]] = {"wall": [], "processor": []}
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    for turn in range(rounds + 1):
        began = {name: clock() for name, clock in clocks.items()}
        model(input_ids=ids, labels=ids).loss.backward()
        before = {name: clock() for name, clock in clocks.items()}
        clipper.clip_()
        after = {name: clock() for name, clock in clocks.items()}
        optimizer.step()
        optimizer.zero_grad()
        if turn:  # the first round warms up
            for name, clock in clocks.items():
                taken[name].append((clock() - began[name], after[name] - before[name]))

    def summary(clock: str) -> dict:
        step, clip = (statistics.median(part) for part in zip(*taken[clock]))
        return {"step_s": round(step, 3), "clip_ms": round(1e3 * clip, 1), "overhead": round(clip / (step - clip), 5)}

    return {"tokens": ids.numel(), **summary("wall"), "processor": summary("processor"), "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", nargs="*", default=["smollm2", "1.3b", "bf16", "peer", "step"])
    parser.add_argument("--peer", default="")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peer:
        sys.path.insert(0, given.peer)
    rounds = given.rounds
    parts = {
        "smollm2": lambda: clip_alone(SMOLLM2_135M, torch.float32, rounds),
        "1.3b": lambda: clip_alone(LLAMA_1_3B, torch.float32, max(3, rounds // 3)),
        "bf16": lambda: clip_alone(SMOLLM2_135M, torch.bfloat16, rounds),
        "peer": lambda: peer(SMOLLM2_135M, rounds),
        "step": lambda: whole_step(3),
    }
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"benchmark": "clipping", "parts": {}}
    for name in given.parts:
        found = parts[name]()
        title = name if given.threads == 1 else f"{name}, {given.threads} threads"
        data["parts"][title] = found | {"threads": given.threads} | origin()
        data["environment"] = environment()
        write_atomic(RESULTS, json.dumps(data, indent=1) + "\n")
        print(json.dumps({name: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
