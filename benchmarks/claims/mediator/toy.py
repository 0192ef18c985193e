"""Does conflict, and not position, tell which layers to keep apart? Which store is best? Is a router's doubt worth it?

Small decoders of six blocks trained from nothing, four experts, eight seeds.

    python -m benchmarks.claims.mediator.toy [--minutes 4]

A base learns five tasks on sequences of letters a little; four experts go on with one task each (reverse, sort, rotate,
add three). Nobody goes on with the fifth, copy. ``plain`` trains every block alike. Two arms take conflict and depth
apart: ``frozen`` keeps the first two blocks as they are, ``rising`` gives later blocks higher rates. Blocks that no
expert changed are in no order: a control that took them would be beaten by anything. Accuracy is the share of letters
that are right given those before them. The share of the gap is (accuracy − average) over (each expert on its own
task − average). Scales of merges are tuned on other prompts than those of the test. Resumable cell by cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

import torch
from benchmarks.cells import measure_all, resumable
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.layout import unit_of
from modicum.models.routed import RoutedForCausalLM, route_experts
from modicum.models.router import calibrate, expected_calibration_error, fit_router, routing_weights
from modicum.models.router_fitting import mahalanobis
from modicum.random import generator
from modicum.weights import merge_state_dicts
from modicum.weights.mediator import ExpertSet, build_experts, layer_conflict, select_layers

SEEDS = tuple(range(8))
ARMS = ("plain", "frozen", "rising")
LETTERS, LENGTH, BLOCKS = 12, 8, 6
TASKS = ("reverse", "sort", "rotate", "add three")
UNKNOWN = "copy"
ALL = (*TASKS, UNKNOWN)
SEPARATOR = LETTERS
BASE_STEPS, EXPERT_STEPS, BATCH, LR = 420, 160, 32, 1e-3
TESTED, ROUTED = 200, 64
DEEP_TAP = 3  # block whose input the dense weights reach in a second prefill
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
    "random 0.1, centred": {"sparsifier": "random_rescaled", "density": 0.1, "centred": True},
    "whole": {"sparsifier": "whole"},
    # of as many bytes as a bit for each weight, or half of them
    "sign": {"sparsifier": "sign"},
    "low rank 0.0625": {"sparsifier": "low_rank", "density": 0.0625},
    "random 0.0625, seed only": {"sparsifier": "random_rescaled", "density": 0.0625, "layout": "seed_only"},
    "random 0.0625, seed only, centred": {
        "sparsifier": "random_rescaled", "density": 0.0625, "layout": "seed_only", "centred": True,
    },
    "magnitude rescaled 1/48, numbers": {"sparsifier": "magnitude_rescaled", "density": 1 / 48, "layout": "int32"},
    "random 0.03125, seed only": {"sparsifier": "random_rescaled", "density": 0.03125, "layout": "seed_only"},
}  # fmt: skip
EQUAL = tuple(STORES)[tuple(STORES).index("sign") + 1 :]
MERGES: dict[str, tuple[str, dict[str, Any]]] = {  # what their scale is called, and their other knobs
    "task_arithmetic": ("scale", {}), "ties": ("scale", {"density": 0.2}), "tsv": ("alpha", {}),
}  # fmt: skip
SELECTIONS = ("top1", "soft", "nucleus", "entropy_gated", "uniform")
GATED = "gated by distance"
PROMPTS = ("known", "known, a letter blotted", "known, no mark", "unknown")
Weights = dict[str, Tensor]


def rows(task: str, count: int, *, seed: int, split: str, prompts: str = "known") -> Tensor:
    """Return sequences of the task's mark, letters, a separator, and the answer; the prompt perturbed where asked."""
    x = torch.randint(LETTERS, (count, LENGTH), generator=generator(seed, "toy", split, task))
    y = {
        "reverse": x.flip(1),
        "sort": x.sort(1).values,
        "rotate": x.roll(2, 1),
        "add three": (x + 3) % LETTERS,
        "copy": x,
    }[task]
    mark = torch.full((count, 1), SEPARATOR + 1 + ALL.index(task))
    if prompts == "known, no mark":
        mark = torch.full_like(mark, SEPARATOR)
    if prompts == "known, a letter blotted":
        place = torch.randint(LENGTH, (count, 1), generator=generator(seed, "toy", split, task, "blot"))
        x = x.scatter(1, place, SEPARATOR)
    return torch.cat([mark, x, torch.full((count, 1), SEPARATOR), y], 1)


def loss_of(model: Any, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).logits[:, LENGTH + 1 :]
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, LENGTH + 2 :].flatten())


@torch.no_grad()
def accuracy(
    model: Any, task: str, seed: int, *, split: str = "test", count: int = TESTED, prompts: str = "known", **more: Any
) -> float:
    batch = rows(task, count, seed=seed, split=split, prompts=prompts)
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


def score(built: ExpertSet, seed: int, *, centred: bool = False) -> float:
    """Return the mean accuracy of each expert's mixture on its own task."""
    model = fresh()
    values = []
    for t, task in enumerate(TASKS):
        state = built.state_dict([float(t == s) for s in range(len(TASKS))], centred=centred)
        model.load_state_dict(state, strict=False)
        values.append(accuracy(model, task, seed))
    return sum(values) / len(values)


def merged_score(state: Weights, seed: int, *, split: str = "test") -> float:
    model = fresh(state)
    return sum(accuracy(model, task, seed, split=split) for task in TASKS) / len(TASKS)


def layers_cell(seed: int, arm: str) -> dict[str, Any]:
    """Accuracy by which layers are kept apart, whole: conflict against position and chance."""
    base, experts = base_of(seed), experts_of(seed, arm)
    conflict = layer_conflict(base, experts)
    changed = {unit: d for unit, d in conflict.items() if d}
    built = build_experts(base, experts, list(conflict), sparsifier="whole", values="f32")

    @cache
    def kept(*chosen: str) -> float:
        parts = {key: part for key, part in built.parts.items() if unit_of(key.partition(".")[2], "block") in chosen}
        return score(ExpertSet(replace(built.about, routed=chosen), built.dense, parts), seed)

    average, best = kept(), kept(*conflict)

    def share(chosen: Sequence[str]) -> float:
        return (kept(*sorted(chosen)) - average) / (best - average)

    found: dict[str, Any] = {
        "average": average, "each expert": best, "conflict": list(conflict.values()),
        "share by block": [share([unit]) for unit in conflict],
    }  # fmt: skip
    for k in (1, 2):
        for rule in ("topk", "least", "first"):
            found[f"{rule} {k}"] = share(select_layers(changed, rule=rule, k=k))  # type: ignore[arg-type]
        every = [share(chosen) for chosen in combinations(changed, k)]
        found[f"random {k}"] = sum(every) / len(every)  # of all draws there are
    return found


def stores_cell(seed: int) -> dict[str, Any]:
    """Accuracy by store with all blocks routed, beside its bytes; and merges with a tuned scale."""
    base, experts = base_of(seed), experts_of(seed, "plain")
    units = list(layer_conflict(base, experts))
    whole = sum(2 * tensor.numel() for tensor in base.values())
    found: dict[str, Any] = {}
    for name, given in STORES.items():
        knobs = {key: value for key, value in given.items() if key != "centred"}
        built = build_experts(base, experts, units, seed=seed, **knobs)
        value = score(built, seed, centred="centred" in given)
        found[name] = {"accuracy": value, "stored / four models": built.nbytes / (4 * whole)}
    for method, (size, knobs) in MERGES.items():
        merged = {
            scale: merge_state_dicts(base, experts, method=method, **knobs, **{size: scale})
            for scale in (0.3, 0.5, 0.75, 1.0, 1.5)
        }
        tuned = {scale: merged_score(state, seed, split="tuning") for scale, state in merged.items()}
        scale = max(tuned, key=lambda s: tuned[s])
        found[method] = {"accuracy": merged_score(merged[scale], seed), "scale": scale}
    return found


def router_cell(seed: int) -> dict[str, Any]:
    """Accuracy by selection on known prompts, perturbed ones and those that nobody was trained on; and routers."""
    base, experts = base_of(seed), experts_of(seed, "plain")
    units = list(layer_conflict(base, experts))
    found: dict[str, Any] = {}
    for store in ("sign", "random_rescaled"):
        model: RoutedForCausalLM = route_experts(fresh(), build_experts(base, experts, units, sparsifier=store))
        looks = {"": _router(model, 200, seed), "entropy, ": _router(model, 200, seed, kind="entropy")}
        for prompts in PROMPTS:
            tasks = (UNKNOWN,) if prompts == "unknown" else TASKS
            for task in tasks:
                asked = {"task": task, "seed": seed, "prompts": prompts, "count": ROUTED}
                ids = rows(task, ROUTED, seed=seed, split="test", prompts=prompts)[:, : LENGTH + 2]
                for name, w in _selected(model, looks, ids).items():
                    key = f"{store}, {name}, {prompts}"
                    found[key] = found.get(key, 0.0) + accuracy(model, weights=w, **asked) / len(tasks)
    kinds = {"linear": {}, "mlp": {}, "subspace": {}, "linear, second prefill": {"kind": "linear", "tap": DEEP_TAP}}
    for name, knobs in kinds.items():
        for count in (50, 200, 1000):
            fit = _router(model, count, seed, **({"kind": name} | knobs))
            found[f"{name} {count}"] = {key: fit[key] for key in ("accuracy", "error before", "error after")}
    fit = looks["entropy, "]
    found["entropy 0"] = {key: fit[key] for key in ("accuracy", "error before", "error after")}
    return found


def _selected(model: RoutedForCausalLM, looks: dict[str, dict[str, Any]], ids: Tensor) -> dict[str, Tensor]:
    """Return the experts' weights by router and selection."""
    found = {}
    for look, fit in looks.items():
        _look(model, fit["kind"], fit["tap"])
        x = model.features(ids)
        logits = fit["router"].logits(x)
        for name in SELECTIONS:
            # Entropies have no scale that prompts of known tasks could fit: DaWin takes them as they are.
            temperature = 1.0 if look else fit["temperature"]
            found[look + name] = routing_weights(logits, temperature=temperature, selection=name)  # type: ignore[arg-type]
        if not look:
            far = mahalanobis(x, fit["centers"], fit["precision"]) / fit["threshold"]
            found[GATED] = routing_weights(logits, temperature=fit["temperature"], distance=far)
    return found


def _look(model: RoutedForCausalLM, kind: str, tap: int) -> None:
    model.config.routing = {**model.config.routing, "kind": kind, "tap": tap, "second_prefill": tap > 0}


def _router(model: RoutedForCausalLM, count: int, seed: int, *, kind: str = "linear", tap: int = 0) -> dict[str, Any]:
    """Fit a router on ``count`` prompts, and measure it on others."""
    _look(model, kind, tap)

    def features(split: str, n: int) -> tuple[Tensor, Tensor]:
        parts = [rows(task, n, seed=seed, split=split)[:, : LENGTH + 2] for task in TASKS]
        return model.features(torch.cat(parts)), torch.arange(len(TASKS)).repeat_interleave(n)

    held, truth = features("held out", 50)
    # Entropies have nothing to fit.
    x, y = (held, truth) if kind == "entropy" else features("router", max(2, count // len(TASKS)))
    router = fit_router(x, y, kind=kind, seed=seed)  # type: ignore[arg-type]
    temperature = calibrate(router.logits(held), truth)
    asked, truth = features("asked", 50)
    logits = router.logits(asked)
    found = {
        "router": router,
        "kind": kind,
        "tap": tap,
        "temperature": temperature,
        "accuracy": float((logits.argmax(1) == truth).double().mean()),
        "error before": expected_calibration_error(logits.softmax(1), truth),
        "error after": expected_calibration_error((logits / temperature).softmax(1), truth),
    }
    if kind != "entropy":
        places = {name: router.tensors[name] for name in ("centers", "precision")}
        found |= places | {"threshold": float(torch.quantile(mahalanobis(held, **places), 0.99))}
    return found


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
