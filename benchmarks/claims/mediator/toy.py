"""Does conflict, and not position, tell which layers to keep apart? Which store is best? Is a router's doubt worth it?

Small decoders of six blocks trained from nothing, four experts, three seeds.

    python -m benchmarks.claims.mediator.toy [--minutes 4]

A base learns five tasks on sequences of letters a little; four experts go on with one task each (reverse, sort, rotate,
add three). Nobody goes on with the fifth, copy. ``plain`` trains every block alike. Two arms take conflict and depth
apart: ``frozen`` keeps the first two blocks as they are, ``rising`` gives later blocks higher rates. Accuracy is the
share of letters that are right given those before them. The share of the gap is (accuracy − average) over
(each expert on its own task − average). Resumable cell by cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from benchmarks.cells import measure_all, resumable
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.models.routed import RoutedForCausalLM, route_experts
from modicum.models.router import calibrate, expected_calibration_error, fit_router, routing_weights
from modicum.models.router_fitting import mahalanobis
from modicum.random import generator
from modicum.weights import merge_state_dicts
from modicum.weights.mediator import ExpertSet, build_experts, layer_conflict, select_layers

SEEDS = (0, 1, 2)
ARMS = ("plain", "frozen", "rising")
LETTERS, LENGTH, BLOCKS = 12, 8, 6
TASKS = ("reverse", "sort", "rotate", "add three")
UNKNOWN = "copy"
ALL = (*TASKS, UNKNOWN)
SEPARATOR = LETTERS
BASE_STEPS, EXPERT_STEPS, BATCH, LR = 420, 160, 32, 1e-3
TESTED, ROUTED = 200, 64
CONFIG = {
    "vocab_size": LETTERS + 1 + len(ALL), "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
STORES: dict[str, dict[str, Any]] = {
    "random 0.1": {"sparsifier": "random_rescaled", "density": 0.1},
    "random 0.05": {"sparsifier": "random_rescaled", "density": 0.05},
    "magnitude 0.1": {"sparsifier": "magnitude", "density": 0.1},
    "magnitude 0.05": {"sparsifier": "magnitude", "density": 0.05},
    "magnitude rescaled 0.1": {"sparsifier": "magnitude_rescaled", "density": 0.1},
    "magnitude rescaled 0.05": {"sparsifier": "magnitude_rescaled", "density": 0.05},
    "low rank 0.1": {"sparsifier": "low_rank", "density": 0.1},
    "sign": {"sparsifier": "sign"},
    "whole": {"sparsifier": "whole"},
}
SELECTIONS = ("top1", "soft", "nucleus", "entropy_gated", "uniform")
Weights = dict[str, Tensor]


def rows(task: str, count: int, *, seed: int, split: str) -> Tensor:
    """Return sequences of the task's mark, letters, a separator, and the answer."""
    x = torch.randint(LETTERS, (count, LENGTH), generator=generator(seed, "toy", split, task))
    y = {
        "reverse": x.flip(1),
        "sort": x.sort(1).values,
        "rotate": x.roll(2, 1),
        "add three": (x + 3) % LETTERS,
        "copy": x,
    }[task]
    mark = torch.full((count, 1), SEPARATOR + 1 + ALL.index(task))
    return torch.cat([mark, x, torch.full((count, 1), SEPARATOR), y], 1)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).logits[:, LENGTH + 1 :]
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, LENGTH + 2 :].flatten())


@torch.no_grad()
def accuracy(model: Any, task: str, seed: int, count: int = TESTED, **more: Any) -> float:
    batch = rows(task, count, seed=seed, split="test")
    guess = model(batch[:, :-1], **more).logits[:, LENGTH + 1 :].argmax(-1)
    return float((guess == batch[:, LENGTH + 2 :]).double().mean())


def train(model: Any, tasks: Sequence[str], steps: int, *, seed: int, name: str, arm: str = "plain") -> Any:
    groups = []
    for key, p in model.named_parameters():
        block = int(key.split(".")[2]) if ".layers." in key else None
        rate = LR
        if arm == "frozen" and block in (0, 1):
            continue
        if arm == "rising" and block is not None:
            rate = LR * 2 * (block + 0.5) / BLOCKS
        groups.append({"params": [p], "lr": rate, "initial": rate})
    solver = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(steps):
        for group in solver.param_groups:
            group["lr"] = group["initial"] * min(1, (step + 1) / 20, (steps - step) / 40)
        parts = [rows(task, BATCH // len(tasks) + 1, seed=seed, split=f"{name} {step}") for task in tasks]
        solver.zero_grad()
        loss_of(model, torch.cat(parts)).backward()
        solver.step()
    return model.eval()


def weights(model: Any) -> Weights:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if not k.startswith("lm_head")}


def fresh(state: Weights | None = None, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    if state is not None:
        model.load_state_dict(state, strict=False)
    return model


@cache
def base_of(seed: int) -> Weights:
    return weights(train(fresh(seed=seed), ALL, BASE_STEPS, seed=seed, name="base"))


@cache
def experts_of(seed: int, arm: str) -> list[Weights]:
    base = base_of(seed)
    return [
        weights(train(fresh(base), [task], EXPERT_STEPS, seed=seed, name=f"{arm} {task}", arm=arm)) for task in TASKS
    ]


def score(built: ExpertSet, seed: int) -> float:
    """Return the mean accuracy of each expert's mixture on its own task."""
    model = fresh()
    values = []
    for t, task in enumerate(TASKS):
        model.load_state_dict(built.state_dict([float(t == s) for s in range(len(TASKS))]), strict=False)
        values.append(accuracy(model, task, seed))
    return sum(values) / len(values)


def merged_score(state: Weights, seed: int) -> float:
    model = fresh(state)
    return sum(accuracy(model, task, seed) for task in TASKS) / len(TASKS)


def layers_cell(seed: int, arm: str) -> dict[str, Any]:
    """Accuracy by which layers are kept apart, whole: conflict against position and chance."""
    base, experts = base_of(seed), experts_of(seed, arm)
    conflict = layer_conflict(base, experts)
    units = list(conflict)

    def kept(chosen: Sequence[str]) -> float:
        return score(build_experts(base, experts, chosen, sparsifier="whole", values="f32"), seed)

    average, best = kept([]), kept(units)

    def share(value: float) -> float:
        return (value - average) / (best - average)

    single = {unit: share(kept([unit])) for unit in units}
    found: dict[str, Any] = {
        "average": average, "each expert": best, "routed all": best,
        "conflict": list(conflict.values()), "share by block": list(single.values()),
    }  # fmt: skip
    for rule in ("topk", "least", "first"):
        found[f"{rule} 1"] = single[select_layers(conflict, rule=rule, k=1)[0]]
        found[f"{rule} 2"] = share(kept(select_layers(conflict, rule=rule, k=2)))
    found["random 1"] = sum(single.values()) / len(single)
    draws = [select_layers(conflict, rule="random", k=2, seed=s) for s in range(3)]
    found["random 2"] = sum(share(kept(d)) for d in draws) / len(draws)
    return found


def stores_cell(seed: int) -> dict[str, Any]:
    """Accuracy by store with all blocks routed, beside its bytes; and merges with a tuned scale."""
    base, experts = base_of(seed), experts_of(seed, "plain")
    units = list(layer_conflict(base, experts))
    whole = sum(2 * tensor.numel() for tensor in base.values())
    found: dict[str, Any] = {}
    for name, knobs in STORES.items():
        built = build_experts(base, experts, units, seed=seed, **knobs)
        found[name] = {"accuracy": score(built, seed), "stored / four models": built.nbytes / (4 * whole)}
    for method, knobs in (("task_arithmetic", {}), ("ties", {"density": 0.2}), ("tsv", {})):
        values = {}
        for scale in (0.3, 0.5, 0.75, 1.0, 1.5):
            state = merge_state_dicts(base, experts, method=method, scale=scale, **knobs)
            values[scale] = merged_score(state, seed)
        found[method] = {"accuracy": max(values.values()), "scale": max(values, key=lambda s: values[s])}
    return found


def router_cell(seed: int) -> dict[str, Any]:
    """Accuracy by selection on known tasks and on the one that nobody was trained on; routers by number of prompts."""
    base, experts = base_of(seed), experts_of(seed, "plain")
    units = list(layer_conflict(base, experts))
    found: dict[str, Any] = {}
    for store in ("sign", "random_rescaled"):
        model: RoutedForCausalLM = route_experts(fresh(), build_experts(base, experts, units, sparsifier=store))
        fit = _router(model, 200, seed)
        for task in (*TASKS, UNKNOWN):
            x = model.features(rows(task, ROUTED, seed=seed, split="test")[:, : LENGTH + 2])
            distance = mahalanobis(x, fit["centers"], fit["precision"]) / fit["threshold"]
            for name in (*SELECTIONS, "gated by distance"):
                selection = "entropy_gated" if name == "gated by distance" else name
                w = routing_weights(
                    fit["router"].logits(x),
                    temperature=fit["temperature"],
                    selection=selection,  # type: ignore[arg-type]
                    distance=distance if name == "gated by distance" else None,
                )
                kind = "unknown" if task == UNKNOWN else "known"
                key = f"{store}, {name}, {kind}"
                found[key] = found.get(key, 0.0) + accuracy(model, task, seed, weights=w) / (
                    1 if kind == "unknown" else 4
                )
    for kind in ("linear", "mlp", "subspace"):
        for count in (50, 200, 1000):
            fit = _router(model, count, seed, kind=kind)
            found[f"{kind} {count}"] = {key: fit[key] for key in ("accuracy", "error before", "error after")}
    return found


def _router(model: RoutedForCausalLM, count: int, seed: int, *, kind: str = "linear") -> dict[str, Any]:
    def features(split: str, n: int) -> tuple[Tensor, list[int]]:
        parts = [rows(task, n, seed=seed, split=split)[:, : LENGTH + 2] for task in TASKS]
        return model.features(torch.cat(parts)), [t for t in range(len(TASKS)) for _ in range(n)]

    x, y = features("router", max(2, count // len(TASKS)))
    held, labels = features("held out", 50)
    router = fit_router(x, y, kind=kind, seed=seed)  # type: ignore[arg-type]
    logits, truth = router.logits(held), torch.tensor(labels)
    temperature = calibrate(logits, truth)
    centers, precision = router.tensors["centers"], router.tensors["precision"]
    return {
        "router": router,
        "temperature": temperature,
        "centers": centers,
        "precision": precision,
        "threshold": float(torch.quantile(mahalanobis(held, centers, precision), 0.99)),
        "accuracy": float((logits.argmax(1) == truth).double().mean()),
        "error before": expected_calibration_error(logits.softmax(1), truth),
        "error after": expected_calibration_error((logits / temperature).softmax(1), truth),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = {"base steps": BASE_STEPS, "expert steps": EXPERT_STEPS, "batch": BATCH, "blocks": BLOCKS, "lr": LR}
    recall = resumable("mediator-toy", minutes=arguments.minutes, about=about)
    wanted: dict[str, Any] = {}
    for seed in SEEDS:
        wanted |= {f"layers {arm} {seed}": lambda seed=seed, arm=arm: layers_cell(seed, arm) for arm in ARMS}
        wanted |= {f"stores {seed}": lambda seed=seed: stores_cell(seed)}
        wanted |= {f"router {seed}": lambda seed=seed: router_cell(seed)}
    measure_all(recall, wanted)


if __name__ == "__main__":
    main()
