"""Build one routed model of several fine-tunes: measure their conflict, store what must stay apart, fit the router."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from modicum.durable import remove, whole_folder
from modicum.errors import RecipeError
from modicum.jobs.data.section import DataSection
from modicum.jobs.loading.references import model_and_adapter
from modicum.jobs.route_sections import ConflictSection, DistilSection, RouterSection, RuleSection
from modicum.model_facts import check_centred
from modicum.recipe import Recipe, choice
from modicum.record import Run, digest
from modicum.registry import expert_store, job, merge_method
from modicum.types import Fraction, PositiveInt

if TYPE_CHECKING:
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.expert_plan import Experts
    from modicum.weights.plan import Plan
    from modicum.weights.stores.base import Store

BUILDING = ".building"
Selection = Literal["entropy_gated", "soft", "top1", "nucleus", "uniform", "standardised"]


class RouteRecipe(Recipe):
    """A base, its experts, prompts of each expert's task, and how much memory they may take."""

    job: Literal["route"] = "route"
    base: str = Field(description="model that the experts were trained from")
    experts: dict[str, str] = Field(description="name: folder, Hub id or adapter; at least two")
    data: dict[str, DataSection] = Field(default={}, description="prompts of each expert's task, by the expert's name")
    unknown: dict[str, DataSection] = Field(default={}, description="prompts that no expert knows, to look at only")
    conflict: ConflictSection = Field(
        default=ConflictSection(), description="how the conflict of experts in a layer is measured"
    )
    rule: RuleSection = Field(default=RuleSection(), description="which layers are routed: a rule's name, or a section")
    budget_bytes: PositiveInt | None = Field(
        default=None, description="bytes of all stored experts; layers of most conflict come first"
    )
    budget_share: Fraction | None = Field(
        default=None, description="the same, as the whole folder's share of all experts as whole models"
    )
    store: choice(expert_store) = Field(  # type: ignore[valid-type]
        default_factory=lambda: {"name": "random_rescaled"},
        validate_default=True,
        description="how the experts of routed layers are stored",
    )
    dense: Literal["average", "base"] = Field(
        default="average",
        description="weights of the routed layers beneath the experts' differences: the experts' average, or the base",
    )
    average: choice(merge_method) = Field(  # type: ignore[valid-type]
        default_factory=lambda: {"name": "linear"}, validate_default=True, description="how all other layers are merged"
    )
    distil: DistilSection | None = Field(
        default=None, description="fit the sizes of one-bit experts to each fine-tune's logits; needs store: sign"
    )
    router: RouterSection | None = Field(
        default=RouterSection(),
        description="what weighs the experts by a prompt; null for none, so that they weigh alike",
    )
    selection: Selection = Field(
        default="entropy_gated", description="how weights follow from the router's probabilities"
    )
    variants: list[Selection] = Field(
        default=[], description="further folders, each with a selection that decides alone, without the gate: controls"
    )
    shard_bytes: PositiveInt = 5_000_000_000
    allow_pickle: bool = False

    @model_validator(mode="after")
    def _fits(self) -> RouteRecipe:
        if len(self.experts) < 2:
            raise RecipeError(f"experts: got {len(self.experts)}, expected at least 2. A single one needs no route.")
        if bad := [name for name in self.experts if not name or set(name) & set("/\\\0.")]:
            raise RecipeError(f"experts: {bad[0]!r} cannot be a name, expected letters, digits, - and _.")
        budgets = [value for value in (self.budget_bytes, self.budget_share) if value is not None]
        if len(budgets) > 1 or (budgets and self.rule.name not in ("mean_std", "budget_bytes")):
            raise RecipeError("budget_bytes, budget_share and another rule exclude each other. Keep one.")
        if self.rule.name == "budget_bytes" and not budgets:
            raise RecipeError("rule budget_bytes needs budget_bytes or budget_share. Set one.")
        if self.rule.name in ("topk", "first", "least", "random") and self.rule.k is None:
            raise RecipeError(f"rule {self.rule.name} needs k, a number of layers or a share below 1. Set rule.k.")
        if self.router is not None:
            self._fits_router(self.router)
        elif self.variants or self.selection != "entropy_gated":
            raise RecipeError(
                "selection and variants say how a router's word is used, and router is null. Leave them out, or set it."
            )
        store: Any = self.store
        if expert_store[store.name].facts.factors and self.dense != "base":
            raise RecipeError("store lora needs dense: base, because an expert less the average has no thin factors.")
        if self.distil is not None and not expert_store[store.name].facts.scales:
            raise RecipeError(f"distil fits the sizes that store: sign keeps, and the store is {store.name}. Drop one.")
        if self.distil is not None:
            self._fits_prompts("set distil: null")
        return self

    def _fits_router(self, router: RouterSection) -> None:
        """Refuse a router that lacks prompts, or is asked for what it cannot do."""
        # Entropies have nothing to learn: their prompts only tell how good they are.
        if router.kind != "entropy" or self.data:
            self._fits_prompts("set router: null")
        if router.kind == "entropy" and router.gate is not None:
            raise RecipeError(
                "router.gate is a distance of features, which an entropy router has none of. Leave it out."
            )
        if router.u_lo > router.u_hi:
            raise RecipeError(f"router.u_lo is {router.u_lo}, above u_hi {router.u_hi}. Turn them round.")
        if router.centred:
            store: Any = self.store
            check_centred(self.dense, store.name, expert_store[store.name].facts)

    def _fits_prompts(self, otherwise: str) -> None:
        """Refuse data that lack prompts of an expert, or have those of another."""
        if set(self.data) != set(self.experts):
            raise RecipeError(
                f"data has prompts of {', '.join(self.data) or 'nothing'}, expected one entry for each expert: "
                f"{', '.join(self.experts)}. Add them, or {otherwise}."
            )

    def inputs(self) -> Iterator[str]:
        """Yield the models and the data."""
        yield self.base
        for expert in self.experts.values():
            yield from (part for part in model_and_adapter(expert) if part is not None)
        for section in (*self.data.values(), *self.unknown.values()):
            yield from section.inputs()


@dataclass(frozen=True)
class Build:
    """What will be built: decided, before anything is written."""

    base: Checkpoint
    experts: list[Checkpoint]
    conflict: dict[str, float]
    about: Experts
    stores: dict[str, dict[int, Store]]
    merge: Plan
    sizes: dict[str, int]  # bytes of each layer, were it routed
    router: int  # bytes of the router's numbers

    @property
    def stored(self) -> int:
        """Bytes of all stored differences."""
        return sum(store.nbytes for of_expert in self.stores.values() for store in of_expert.values())

    @property
    def whole(self) -> int:
        """Bytes of one whole model."""
        return sum(step.spec.nbytes for step in self.merge.steps)

    @property
    def total(self) -> int:
        """Bytes of all numbers in the folder."""
        return self.whole + self.stored + self.router


def plan_build(recipe: RouteRecipe) -> Build:
    """Open the models, measure their conflict and choose the routed layers."""
    from modicum.jobs.routing import router_bytes
    from modicum.weights.aliases import aligned
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.expert_plan import bytes_by_layer, describe, plan_stores
    from modicum.weights.mediator import chance_level, layer_conflict, select_layers, units_of
    from modicum.weights.plan import plan_merge

    def opened(reference: str) -> Checkpoint:
        model, adapter = model_and_adapter(reference)
        source, base = (model, None) if adapter is None else (adapter, model)
        return Checkpoint(source, base=base, allow_pickle=recipe.allow_pickle)

    base, *experts = aligned([opened(recipe.base), *map(opened, recipe.experts.values())])
    store: Any = recipe.store
    average: Any = recipe.average
    unit = recipe.conflict.unit
    about = describe(
        base,
        experts,
        [],
        dense=recipe.dense,
        store=store.name,
        knobs=store.knobs,
        unit=unit,
        seed=recipe.seed,
        names=list(recipe.experts),
    )
    merge = plan_merge(base, experts, method=average.name, knobs=average.knobs, seed=recipe.seed)
    units = list(units_of(base, unit=unit))
    # Stand-ins of a check are the base itself: nothing is read to find that they agree.
    alike = all(expert.folder == base.folder for expert in experts)
    conflict = dict.fromkeys(units, 0.0) if alike else layer_conflict(base, experts, **recipe.conflict.model_dump())
    everything = replace(about, routed=units)
    sizes = bytes_by_layer(plan_stores(base, experts, everything), everything)
    whole = sum(step.spec.nbytes for step in merge.steps)
    router = router_bytes(recipe, base)
    rule = recipe.rule.model_dump()
    budget = recipe.budget_bytes
    if recipe.budget_share is not None:
        budget = _share_of(recipe.budget_share, conflict, sizes, whole + router, len(experts) * whole)
    if budget is not None:
        rule["name"] = "budget_bytes"
    chance = chance_level(
        len(experts), aggregate=recipe.conflict.aggregate, denoise=recipe.conflict.denoise, keep=recipe.conflict.keep
    )
    routed = select_layers(
        conflict,
        rule=rule.pop("name"),
        **rule,
        chance=chance,
        budget=budget,
        unit_bytes={unit: sizes.get(unit, 0) for unit in conflict},
        seed=recipe.seed,
    )
    about = replace(about, routed=sorted(routed, key=units.index))
    if recipe.dense == "base" and routed:
        pattern = "^(" + "|".join(re.escape(unit) for unit in routed) + r")(\.|$)"
        merge = plan_merge(base, experts, method=average.name, knobs=average.knobs, seed=recipe.seed, exclude=pattern)
    return Build(base, experts, conflict, about, plan_stores(base, experts, about), merge, sizes, router)


def _share_of(share: float, conflict: Mapping[str, float], sizes: Mapping[str, int], shared: int, all_: int) -> int:
    """Return the bytes that a share of all experts as whole models leaves for their differences."""
    budget = int(share * all_) - shared
    first = max(conflict, key=lambda unit: conflict[unit])
    least = (shared + sizes.get(first, 0)) / all_
    if budget < sizes.get(first, 0):
        raise RecipeError(
            f"budget_share is {share}, and the shared weights with {first}, the layer of most conflict, take "
            f"{least:.4f} of all experts as whole models. Give at least {math.ceil(least * 1e4) / 1e4}, or choose a "
            "smaller store."
        )
    return budget


def plan(recipe: RouteRecipe) -> list[str]:
    """Say which layers would be routed and what the folder would take; reads all models and prompts."""
    from modicum.jobs.routing import bytes_by_store, check_tap, prompts_of, try_prompts

    notes: list[str] = []
    rows = prompts_of(recipe, notes.append)
    try_prompts(recipe, rows)
    build = plan_build(recipe)
    check_tap(recipe, build)
    routed, t = set(build.about.routed), len(build.experts)
    lines = [
        f"{unit}: conflict {d:.4f}, {'routed' if unit in routed else 'averaged'} ({build.sizes.get(unit, 0)} bytes)"
        for unit, d in build.conflict.items()
    ]
    lines.append(f"{len(routed)} of {len(build.conflict)} layers routed, stored by {build.about.store}")
    for name, size in bytes_by_store(build).items():
        lines.append(f"stored by {name}: {size} bytes")
    lines.append(
        f"on disk {build.total} bytes and headers, {build.router} of them the router's: "
        f"{build.total / (t * build.whole):.3f} of {t} whole models; in memory one model of {build.whole} bytes, the "
        "rest stays mapped"
    )
    if recipe.router is not None and recipe.router.kind == "entropy":
        lines.append(f"router entropy: each prompt is read {t} times, once by every expert")
    if (section := recipe.distil) is not None:
        parameters = sum(step.spec.numel for step in build.merge.steps)
        lines.append(
            f"distil: {section.steps} steps of {section.batch_size} prompts for each of {t} experts; in memory this "
            f"model and the fine-tune in float32, {2 * 4 * parameters} bytes"
        )
    lines += [
        f"router: {len(known)} prompts of {name} from {recipe.data[name].path}"
        for name, known in rows["known"].items()
        if recipe.router is not None
    ]
    return [*lines, *notes, *build.merge.notes]


def _foreseeable(recipe: Any) -> bool:
    """Whether the plan takes whole models in the place of the experts: it does, but where their factors are kept."""
    return not expert_store[recipe.store.name].facts.factors


@job("route", plan=plan, outputs=lambda recipe: ["model", *recipe.variants], foreseeable=_foreseeable)
def route(recipe: RouteRecipe, run: Run) -> None:
    """Build a routed model: dense weights, stored experts and a router.

    Args:
        recipe: Base, experts, prompts, rule or budget, and store.
        run: Gets ``model/``, which transformers loads as one model, and a folder for each variant; ``record.json``
            holds the conflict of every layer, the bytes, and how well the router tells the tasks apart.
    """
    from modicum.jobs.route_scales import distil
    from modicum.jobs.routing import (
        assemble,
        bytes_by_store,
        check_tap,
        finish_config,
        fit,
        prompts_of,
        summary,
        try_prompts,
        variant,
    )
    from modicum.weights.merge import run_plan

    rows = prompts_of(recipe, run.note)
    try_prompts(recipe, rows)
    build = plan_build(recipe)
    run.inputs.check()
    check_tap(recipe, build)
    for note in build.merge.notes:
        run.note(note)
    run.record["metrics"] = summary(recipe, build, bytes_by_store(build))
    run.save()
    # What a stopped run has finished is used again under the same plan and inputs alone.
    work = run.folder / BUILDING / digest([asdict(build.about), build.merge.identity])
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "dense").is_dir():
        run_plan(build.merge, work / "dense", shard_bytes=recipe.shard_bytes, progress=not run.quiet)
    if build.stores and not (work / "experts").is_dir():
        _write_experts(recipe, build, work, progress=not run.quiet, check=run.inputs.check_mapped)
    run.inputs.check()
    with whole_folder(run.folder / "model", check=run.inputs.check) as folder:
        assemble(work, folder, build)
        if recipe.distil is not None:
            run.record["metrics"]["distilled"] = distil(recipe, build, folder, rows["known"], work, run.note)
        if recipe.router is not None:
            run.record["metrics"]["router"] = fit(recipe, folder, rows, run.note)
        finish_config(folder)
    run.output("model", run.folder / "model")
    for selection in dict.fromkeys(recipe.variants):
        with whole_folder(run.folder / "variants" / selection) as folder:
            variant(run.folder / "model", folder, selection)
        run.output(selection, run.folder / "variants" / selection)
    remove(run.folder / BUILDING)


def _write_experts(recipe: RouteRecipe, build: Build, work: Path, *, progress: bool, check: Callable[[], None]) -> None:
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.expert_plan import part_name, specs_of
    from modicum.weights.stream import map_tensors

    dense = Checkpoint(work / "dense")
    groups = {
        f"{t}.{name}": [part_name(t, name, part) for part in store.specs]
        for name, of_expert in build.stores.items()
        for t, store in of_expert.items()
    }

    def make(group: str) -> tuple[dict[str, Any], dict[str, Any]]:
        number, _, name = group.partition(".")
        t = int(number)
        parts = build.stores[name][t].encode(dense[name], build.experts[t][name])
        return {part_name(t, name, part): tensor for part, tensor in parts.items()}, {}

    map_tensors(
        make,
        specs_of(build.stores),
        work / "experts",
        identity=[asdict(build.about), build.merge.identity],
        groups=groups,
        shard_bytes=recipe.shard_bytes,
        stem="experts",
        progress=progress,
        check=check,
    )
