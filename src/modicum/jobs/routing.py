"""The folder and the router of the job ``route``: files put together, a router fitted, calibrated and measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import RecipeError
from modicum.jobs.data.rows import load_rows
from modicum.jobs.data.tokens import prompt_ids
from modicum.jobs.loading.models import load_model, load_tokenizer, native_bfloat16
from modicum.layout import layer_of

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.evaluate.rows import Rows
    from modicum.jobs.data.section import DataSection
    from modicum.jobs.route import Build, RouteRecipe
    from modicum.weights.expert_plan import Experts

BINS = 20  # of the histogram of uncertainty
Prompts = dict[str, dict[str, list[Any]]]


def check_tap(recipe: RouteRecipe, about: Experts) -> int:
    """Return the block that the router looks at.

    Raises:
        RecipeError: It lies behind a routed block, so that what it sees would depend on what it decides.
    """
    first = min((layer.number for unit in about.routed if (layer := layer_of(f"{unit}.weight"))), default=0)
    section = recipe.router
    if section is None or section.tap == "auto":
        return first
    if section.tap > first and about.routed and not section.second_prefill and section.kind != "entropy":
        raise RecipeError(
            f"router.tap is block {section.tap}, behind the first routed block {first}: what it sees would depend on "
            f"the experts. Tap block {first} or an earlier one, or set router.second_prefill: true."
        )
    return section.tap


def prompts_of(recipe: RouteRecipe, note: Callable[[str], None]) -> Prompts:
    """Return the rows of every known and unknown task."""

    def read(section: DataSection) -> list[Any]:
        rows: Rows = load_rows(section, seed=recipe.seed, note=note)
        if rows.kind == "text":
            raise RecipeError(f"{section.path} holds text rows; a router needs prompts: rows with prompt or messages.")
        return rows.rows

    return {
        "known": {name: read(recipe.data[name]) for name in recipe.experts if name in recipe.data},
        "unknown": {name: read(section) for name, section in recipe.unknown.items()},
    }


def fit(recipe: RouteRecipe, folder: Path, rows: Prompts, note: Callable[[str], None]) -> dict[str, Any]:
    """Fit, calibrate and write the router of a folder; return what it is worth on held-out prompts."""
    import torch

    from modicum.models.routed.config import RoutedConfig
    from modicum.models.routed.folder import write_router
    from modicum.models.router import calibrate, expected_calibration_error, fit_router
    from modicum.models.router_fitting import mahalanobis

    section = recipe.router
    assert section is not None  # noqa: S101
    config = RoutedConfig.from_pretrained(folder)
    config.routing = {
        **config.routing, "kind": section.kind, "tap": check_tap(recipe, config.expert_set), "pooling": section.pooling,
        "second_prefill": section.second_prefill, "selection": recipe.selection, "u_lo": section.u_lo,
        "u_hi": section.u_hi, "nucleus": section.nucleus, "centred": section.centred,
    }  # fmt: skip
    config.save_pretrained(folder)
    features = _features(folder, rows, section.batch_size)
    held: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, found in features["known"].items():
        last = max(1, round(section.held_out * len(found)))
        if len(found) - last < 2:
            raise RecipeError(f"data.{name} has {len(found)} prompts, expected at least 3. Give more.")
        kept[name], held[name] = found[:-last], found[-last:]
    router = fit_router(*_joined(kept), kind=section.kind, label_smoothing=section.label_smoothing, seed=recipe.seed)
    x, y = _joined(held)
    logits = router.logits(x)
    bad = int((~torch.isfinite(logits).all(1)).sum())
    if bad:
        note(f"The router's logits of {bad} held-out prompts are not finite: the dense model answers such prompts.")
        x, y, logits = (
            x[torch.isfinite(logits).all(1)],
            y[torch.isfinite(logits).all(1)],
            logits[torch.isfinite(logits).all(1)],
        )
    temperature = calibrate(logits, y)
    threshold = None
    if section.gate is not None and "centers" in router.tensors:
        apart = mahalanobis(x, router.tensors["centers"], router.tensors["precision"])
        threshold = float(torch.quantile(apart, section.gate))
    config.routing = {**config.routing, "temperature": temperature, "threshold": threshold}
    config.save_pretrained(folder)
    write_router(folder, router)
    router = type(router)(router.kind, router.experts, router.tensors, temperature, threshold)
    guesses = logits.argmax(1)
    names = list(recipe.experts)
    confusion = [[int(((y == a) & (guesses == b)).sum()) for b in range(len(names))] for a in range(len(names))]
    return {
        "kind": section.kind,
        "tap": config.routing["tap"],
        "prompts": {name: len(found) for name, found in features["known"].items()},
        "held_out": len(y),
        "accuracy": float((guesses == y).double().mean()),
        "calibration_error": {
            "before": expected_calibration_error(logits.softmax(1), y),
            "after": expected_calibration_error((logits / temperature).softmax(1), y),
        },
        "temperature": temperature,
        "threshold": threshold,
        "confusion": {"names": names, "counts": confusion},
        "uncertainty": _uncertainty(router, held | features["unknown"], set(held)),
    }


def _joined(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    import torch

    labels = [torch.full((len(found),), t) for t, found in enumerate(parts.values())]
    return torch.cat(list(parts.values())), torch.cat(labels)


def _uncertainty(router: Any, parts: Mapping[str, Tensor], known: set[str]) -> list[dict[str, Any]]:
    """Return for every task the histogram of the router's uncertainty, and how many prompts the gate calls unknown."""
    import torch

    from modicum.models.router import uncertainty

    found = []
    for name, x in parts.items():
        u = uncertainty(router.logits(x), temperature=router.temperature).nan_to_num(1.0)
        far = router.distance(x)
        found.append(
            {
                "task": name,
                "known": name in known,
                "counts": torch.histc(u, bins=BINS, min=0, max=1).int().tolist(),
                "mean": float(u.mean()),
                "gated": None if far is None else float((far > 1).double().mean()),
            }
        )
    return found


def _features(folder: Path, rows: Prompts, batch_size: int) -> dict[str, dict[str, Tensor]]:
    import torch

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder, dtype="auto" if native_bfloat16(device) else "float32", device=device)
    return {
        kind: {
            name: _of(model, [prompt_ids(row, tokenizer) for row in prompts], batch_size)
            for name, prompts in parts.items()
        }
        for kind, parts in rows.items()
    }


def _of(model: Any, prompts: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[0] * (length - len(prompts[i])) + list(prompts[i]) for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        for i, row in zip(chosen, model.features(ids, mask.to(model.device))):
            found[i] = row
    return torch.stack([found[i] for i in range(len(prompts))])


def summary(recipe: RouteRecipe, build: Build, stores: Mapping[str, int]) -> dict[str, Any]:
    """Return what the record says of conflict and bytes."""
    from modicum.weights.mediator import chance_level

    section = recipe.conflict
    return {
        "routing_conflict": {
            "layers": list(build.conflict),
            "values": [round(d, 6) for d in build.conflict.values()],
            "routed": list(build.about.routed),
            "chance": chance_level(
                len(build.experts), aggregate=section.aggregate, denoise=section.denoise, keep=section.keep
            ),
            "rule": "budget_bytes" if recipe.budget_bytes or recipe.budget_share else recipe.rule.name,
        },
        "routing_bytes": {
            "experts": len(build.experts),
            "whole_model": build.whole,
            "dense": build.whole,
            "stored": build.stored,
            "share": (build.whole + build.stored) / (len(build.experts) * build.whole),
            "store": build.about.store,
            "by_store": dict(stores),
        },
    }


def assemble(work: Path, folder: Path, build: Build) -> None:
    """Put all files in one folder, with a configuration that transformers opens."""
    from transformers import AutoConfig

    from modicum.models.routed.config import RoutedConfig

    for path in sorted((work / "dense").iterdir()):
        _link(path, folder / path.name)
    if (work / "experts").is_dir():
        for path in sorted((work / "experts").iterdir()):
            _link(path, folder / path.name.replace("model.safetensors.index", "experts.safetensors.index"))
    host = AutoConfig.from_pretrained(work / "dense")
    (folder / "config.json").unlink()
    RoutedConfig(host=host, experts=asdict(build.about)).save_pretrained(folder)


def _link(source: Path, target: Path) -> None:
    """Give a finished file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def finish_config(folder: Path) -> None:
    """Name the class and the checksum of every file in the configuration."""
    from modicum.models.routed.config import RoutedConfig
    from modicum.models.routed.folder import checksums

    config = RoutedConfig.from_pretrained(folder)
    config.architectures = ["RoutedForCausalLM"]
    config.checksums = checksums(folder)
    config.save_pretrained(folder)


def variant(model: Path, folder: Path, selection: str) -> None:
    """Make a folder whose selection decides alone, without the gate of distances; its weights are the same files."""
    from modicum.models.routed.config import RoutedConfig

    for path in sorted(model.iterdir()):
        if path.name != "config.json":
            _link(path, folder / path.name)
    config = RoutedConfig.from_pretrained(model)
    config.routing = {**config.routing, "selection": selection, "threshold": None}
    config.save_pretrained(folder)
