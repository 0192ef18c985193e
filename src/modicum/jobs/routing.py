"""The folder and the router of the job ``route``: files put together, a router fitted, calibrated and measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.rows import Rows
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.rows import load_rows
from modicum.jobs.data.tokens import prompt_ids
from modicum.jobs.data.trial import on_some
from modicum.jobs.loading.models import load_model, load_tokenizer, native_bfloat16, rehearse_loading
from modicum.jobs.route_sections import RouterSection
from modicum.layout import layer_of, stacks
from modicum.registry import expert_store
from modicum.vocabulary import check_ids

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.jobs.data.section import DataSection
    from modicum.jobs.route import Build, RouteRecipe
    from modicum.models.router import Router
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.expert_plan import Experts

BINS = 20  # of the histogram of uncertainty
LEAST = 2  # prompts of a task that a router is fitted on
Prompts = dict[str, dict[str, list[Any]]]


def router_bytes(recipe: RouteRecipe, base: Checkpoint) -> int:
    """Return the bytes of the router's numbers, which its kind and the width of the model decide."""
    from transformers import AutoConfig

    from modicum.models.router_fitting import stored_bytes

    section = recipe.router
    if section is None:
        return 0
    given = dict(base.config)
    if "model_type" not in given:
        raise CheckpointError(
            f"{base.name} has no model_type in its config.json. Save the model with transformers first."
        )
    width = AutoConfig.for_model(given.pop("model_type"), **given).get_text_config().hidden_size
    gate, n = section.gate is not None, len(recipe.experts)
    return stored_bytes(section.kind, experts=n, width=width, rank=section.rank, gate=gate)


def tap_of(section: RouterSection, about: Experts) -> int:
    """Return the block that the router looks at."""
    return _first_routed(about) if section.tap == "auto" else section.tap


def _first_routed(about: Experts) -> int:
    return min((layer.number for unit in about.routed if (layer := layer_of(f"{unit}.weight"))), default=0)


def check_tap(recipe: RouteRecipe, build: Build) -> None:
    """Refuse a router that looks at no block of the model, or behind a routed one.

    Raises:
        RecipeError: What it sees would depend on what it decides.
    """
    section = recipe.router
    if section is None or section.tap == "auto":
        return
    depth = max(stacks(build.base).values(), default=1)
    if section.tap >= depth:
        raise RecipeError(
            f"router.tap is block {section.tap}, and the model has {depth}. Tap one from 0 to {depth - 1}."
        )
    first = _first_routed(build.about)
    if section.tap > first and build.about.routed and not section.second_prefill and section.kind != "entropy":
        raise RecipeError(
            f"router.tap is block {section.tap}, behind the first routed block {first}: what it sees would depend on "
            f"the experts. Tap block {first} or an earlier one, or set router.second_prefill: true."
        )


def prompts_of(recipe: RouteRecipe, note: Callable[[str], None]) -> Prompts:
    """Return the rows of every known and unknown task; none where nothing is fitted on them."""
    if recipe.router is None and recipe.distil is None:
        return {"known": {}, "unknown": {}}

    def read(section: DataSection) -> list[Any]:
        rows: Rows = load_rows(section, seed=recipe.seed, note=note)
        if rows.kind == "text":
            raise RecipeError(f"{section.path} holds text rows; a router needs prompts: rows with prompt or messages.")
        return rows.rows

    known = {name: read(recipe.data[name]) for name in recipe.experts if name in recipe.data}
    for name, rows in known.items():
        if len(rows) - held_out(recipe, len(rows)) < LEAST:
            raise RecipeError(f"data.{name} has {len(rows)} prompts, expected at least 3. Give more.")
    return {"known": known, "unknown": {name: read(section) for name, section in recipe.unknown.items()}}


def try_prompts(recipe: RouteRecipe, rows: Prompts) -> None:
    """Encode some prompts as the router will read them, so that what it would refuse is refused before hours of work.

    Args:
        recipe: Whose base reads them; it is loaded without its numbers.
        rows: Of :func:`prompts_of`.

    Raises:
        ModicumError: The base cannot be loaded; a prompt has no tokens, needs a chat template that is not there, or
            tokens that the base lacks.
    """
    model = rehearse_loading(recipe.base, allow_pickle=recipe.allow_pickle)
    tokenizer = load_tokenizer(recipe.base) if any(rows.values()) else None
    if recipe.distil is not None:
        pad_id(tokenizer)  # answers to prompts are read in batches

    def encode(name: str, some: Rows) -> None:
        found = [prompt_ids(row, tokenizer) for row in some.rows]
        if not all(found):
            raise RecipeError(f"A prompt of {name} has no tokens. Take it out.")
        check_ids(model, found)

    for name, prompts in chain(*(parts.items() for parts in rows.values())):
        on_some(Rows("prompt", list(prompts)), partial(encode, name))


def held_out(recipe: RouteRecipe, count: int) -> int:
    """Return how many of a task's prompts are held out: the last ones, to calibrate and measure on."""
    share = RouterSection().held_out if recipe.router is None else recipe.router.held_out
    return max(1, round(share * count))


def fit(recipe: RouteRecipe, folder: Path, rows: Prompts, note: Callable[[str], None]) -> dict[str, Any]:
    """Fit, calibrate and write the router of a folder; return what it is worth on held-out prompts."""
    from modicum.models.routed.config import RoutedConfig
    from modicum.models.routed.folder import write_router
    from modicum.models.router import Router, calibrate, fit_router

    section = recipe.router
    assert section is not None  # noqa: S101
    config = RoutedConfig.from_pretrained(folder)
    config.routing = {
        **config.routing, "kind": section.kind, "tap": tap_of(section, config.expert_set), "pooling": section.pooling,
        "second_prefill": section.second_prefill, "selection": recipe.selection, "u_lo": section.u_lo,
        "u_hi": section.u_hi, "nucleus": section.nucleus, "least": section.least, "centred": section.centred,
    }  # fmt: skip
    config.save_pretrained(folder)
    features = _features(folder, rows, section.batch_size)
    names = list(recipe.experts)
    ends = {name: len(found) - held_out(recipe, len(found)) for name, found in features["known"].items()}
    held = {name: found[ends[name] :] for name, found in features["known"].items()}
    if section.kind == "entropy":
        router = Router("entropy", len(names))
    else:
        kept = {name: found[: ends[name]] for name, found in features["known"].items()}
        router = fit_router(
            *_joined(kept),
            kind=section.kind,
            label_smoothing=section.label_smoothing,
            decay=section.decay,
            rank=section.rank,
            epochs=section.epochs,
            seed=recipe.seed,
        )
    said: dict[str, Any] = {"kind": section.kind, "tap": config.routing["tap"]}
    if held:
        x, y = _finite(router, *_joined(held), note)
        router = replace(router, temperature=calibrate(router.logits(x), y))
        router = replace(router, threshold=_threshold(router, x, section.gate))
        said |= _worth(router, x, y, names)
    config.routing = {**config.routing, "temperature": router.temperature, "threshold": router.threshold}
    config.save_pretrained(folder)
    write_router(folder, router)
    return said | {
        "prompts": {name: len(found) for name, found in features["known"].items()},
        "temperature": router.temperature,
        "threshold": router.threshold,
        "uncertainty": _uncertainty(router, held | features["unknown"], set(held)),
    }


def _finite(router: Router, x: Tensor, y: Tensor, note: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """Return the held-out prompts of which the router says anything."""
    import torch

    fine = torch.isfinite(router.logits(x)).all(1)
    if bad := int((~fine).sum()):
        note(f"The router's logits of {bad} held-out prompts are not finite: the dense model answers such prompts.")
    return x[fine], y[fine]


def _threshold(router: Router, x: Tensor, gate: float | None) -> float | None:
    """Return the distance that this share of the held-out prompts is within; none without a gate."""
    import torch

    if gate is None:
        return None
    apart = replace(router, threshold=1.0).distance(x)
    assert apart is not None  # noqa: S101
    return float(torch.quantile(apart, gate))


def _worth(router: Router, x: Tensor, y: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Return how well held-out prompts are told apart."""
    from modicum.models.router import expected_calibration_error

    logits = router.logits(x)
    guesses = logits.argmax(1)
    numbers = range(len(names))
    return {
        "held_out": len(y),
        "accuracy": float((guesses == y).double().mean()),
        "calibration_error": {
            "before": expected_calibration_error(logits.softmax(1), y),
            "after": expected_calibration_error((logits / router.temperature).softmax(1), y),
        },
        "confusion": {
            "names": list(names),
            "counts": [[int(((y == a) & (guesses == b)).sum()) for b in numbers] for a in numbers],
        },
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
    if not any(rows.values()):
        return {kind: {} for kind in rows}
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

    from modicum.models.routed.features import left_padded

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found |= zip(chosen, model.features(*left_padded([prompts[i] for i in chosen], model.device)))
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
            "share": build.total / (len(build.experts) * build.whole),
            "router": build.router,
            "store": build.about.store,
            "by_store": dict(stores),
        },
    }


def bytes_by_store(build: Build) -> dict[str, int]:
    """Return what the routed layers take, and what they would in each other store; random entries as expected.

    Factors are an adapter's own and no choice beside the others.
    """
    from modicum.weights.expert_plan import knobs_of, plan_stores

    found = {build.about.store: build.stored}
    density = dict(build.about.knobs).get("density", 0.1)
    for name in expert_store:
        if name not in found and not expert_store[name].facts.factors:
            about = replace(build.about, store=name, knobs=knobs_of(name, {"density": density}))
            stores = plan_stores(build.base, build.experts, about)
            found[name] = sum(store.expected_nbytes for of_expert in stores.values() for store in of_expert.values())
    return found


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
