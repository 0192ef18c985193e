"""Merge models: a recipe of our own, or a mergekit file as it is."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import yaml
from pydantic import AliasChoices, Field, model_validator

from modicum.borders import border, loads
from modicum.errors import CheckpointError, RecipeError
from modicum.jobs.card import CARD, beside, model_card
from modicum.jobs.loading.folders import note_code
from modicum.jobs.loading.references import model_and_adapter
from modicum.jobs.merging.opening import closed, without_dtype
from modicum.recipe import Recipe, choice, dump
from modicum.record import Run
from modicum.registry import job, merge_method
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.weights.lora import LoraPlan
    from modicum.weights.plan import Plan

Measured: TypeAlias = Mapping[str, Mapping[str, Any]]
EACH = ("ranks", "weights", "spectra", "energy_ranks", "outliers")  # of what is measured, a value for each expert
ALL = ("kept", "weakest", "interference", "survival", "cast_error")  # and one for the tensor
CLOSE = 0.05  # squared length of a direction beside the strongest, below which whitening magnifies noise


class MergeRecipe(Recipe):
    """A base, its experts and a method; or a mergekit document."""

    job: Literal["merge"] = "merge"
    base: str | None = Field(default=None, description="model that the experts were trained from")
    experts: list[str] = Field(
        default=[], description="folders, Hub ids or builtins, or model+adapter; adapters are folded in"
    )
    method: choice(merge_method) | None = Field(  # type: ignore[valid-type]
        default=None, description="the merge method; a mergekit document names its own"
    )
    output: Literal["model", "lora"] = Field(
        default="model", description="lora: merge adapters of one base into an adapter, for methods that can"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="of the result")
    tokenizer: str | dict[str, Any] | None = Field(
        default=None,
        description="bring vocabularies together: union, base, a model whose tokenizer the result gets, or a mapping "
        "of source, tokens and pad_to_multiple_of as in mergekit files",
    )
    exclude: str | None = Field(
        default=None, description="regular expression of tensor names that stay as they are in the base"
    )
    base_fingerprint: str | None = Field(
        default=None, description="refuse another base; a training run's record names its inputs' fingerprints"
    )
    device: str = Field(default="cpu", description="where the arithmetic happens, for example cuda")
    statistics: list[str] = Field(
        default=[], description="for methods that weigh by data: of each expert, what the job statistics made"
    )
    shard_bytes: PositiveInt = Field(
        default=5_000_000_000,
        description="largest weight file",
        validation_alias=AliasChoices("shard_bytes", "shard_size"),  # its name in version 0.1
    )
    diagnostics: bool = Field(
        default=False, description="also measure spectra, interference, outliers and what the cast loses; slower"
    )
    allow_pickle: bool = Field(
        default=False,
        description="allow pytorch_model.bin, read with weights_only=True",
        validation_alias=AliasChoices("allow_pickle", "pickled"),  # its name in version 0.1
    )
    remote_code: bool = Field(default=False, description="fetch and carry the code that comes with a model")

    mergekit: dict[str, Any] | None = Field(default=None, description="a mergekit file's content, in place of the rest")
    twice: list[str] = Field(
        default=[], description="keys that stand twice in a mergekit file; the last one counts, as in mergekit"
    )

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: object) -> object:
        """Take a mergekit file's content apart: our keys beside it, as ``--set seed=1`` puts them, go to the job."""
        if not isinstance(data, Mapping) or "merge_method" not in data:
            return data
        from modicum.weights.mergekit.document import KEYS

        ours = {*cls.model_fields, "pickled", "shard_size"} - KEYS - {"mergekit"}
        job = {key: value for key, value in data.items() if key in ours}
        return job | {"mergekit": {key: value for key, value in data.items() if key not in ours}}

    @model_validator(mode="after")
    def _complete(self) -> MergeRecipe:
        if self.mergekit is not None:
            ours = ("method", "experts", "base", "dtype", "exclude", "base_fingerprint", "tokenizer")
            if given := [name for name in ours if getattr(self, name)]:
                raise RecipeError(f"a mergekit file says {', '.join(given)} itself, or has no such thing. Remove ours.")
            if self.output == "lora":
                raise RecipeError("a mergekit file describes a whole model. Write a recipe of ours for output: lora.")
            from modicum.weights.mergekit.document import read_slices

            read_slices(self.mergekit)
            return self
        if self.method is None:
            raise RecipeError("'method' is missing. Set it, for example {name: ties, density: 0.2}.")
        if not self.experts:
            raise RecipeError("'experts' is missing. List the models to merge.")
        from modicum.weights.statistics import check_statistics

        check_statistics(self.method.name, len(self.experts), len(self.statistics))
        if self.output == "lora" and self.tokenizer is not None:
            raise RecipeError("an adapter has no vocabulary of its own. Remove tokenizer, or output: lora.")
        if self.output == "lora" and self.diagnostics:
            raise RecipeError("diagnostics looks at whole matrices, which output: lora does not make. Remove one.")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the models, their statistics, and whose tokenizer the result gets."""
        from modicum.weights.mergekit.document import models_of, tokenizer_of

        if self.mergekit is not None:
            yield from models_of(self.mergekit)
        yield from ([self.base] if self.base else [])
        for expert in self.experts:
            yield from filter(None, model_and_adapter(expert))
        yield from self.statistics
        for other in tokenizer_of({"tokenizer": self.tokenizer}):
            yield from filter(None, (other.model, other.adapter))


def make_plan(recipe: MergeRecipe) -> Plan | LoraPlan:
    """Open the models and decide what happens to each tensor; reads headers only."""
    from modicum.jobs.loading.tokenizers import find_tokenizer, tokenizer_json
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.lora import plan_loras
    from modicum.weights.plan import check_fingerprint, plan_merge

    def opened(reference: str, adapter: str | None = None) -> Checkpoint:
        source, base = (reference, None) if adapter is None else (adapter, reference)
        return Checkpoint(source, base=base, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)

    statistics = [opened(reference) for reference in recipe.statistics]
    if recipe.mergekit is not None:
        from modicum.jobs.merging.layers import settled
        from modicum.jobs.merging.settings import notes_on_unsaid
        from modicum.weights.mergekit.planning import plan_mergekit

        with border("The mergekit file", "Check its values."):
            plan = plan_mergekit(recipe.mergekit, opened, statistics, find=find_tokenizer, convert=tokenizer_json)
        twice = [f"{place}: the last one counts, as in mergekit" for place in recipe.twice]
        notes = [*twice, *plan.notes, *notes_on_unsaid(plan)]
        plan = settled(replace(plan, seed=recipe.seed, device=recipe.device, notes=notes))
        _refuse_config(plan)
        return plan.diagnosed() if recipe.diagnostics else plan
    from modicum.jobs.merging.settings import notes_on_unsaid

    method: Any = recipe.method
    base = opened(recipe.base) if recipe.base else None
    experts = [opened(*model_and_adapter(expert)) for expert in recipe.experts]
    if recipe.output == "lora":
        if recipe.base_fingerprint is not None:
            check_fingerprint(base, recipe.base_fingerprint)
        return plan_loras(experts, method=method.name, knobs=method.knobs, base=base, exclude=recipe.exclude)
    plan = plan_merge(
        base,
        experts,
        method=method.name,
        knobs=method.knobs,
        dtype=recipe.dtype,
        exclude=recipe.exclude,
        base_fingerprint=recipe.base_fingerprint,
        statistics=statistics,
        seed=recipe.seed,
        device=recipe.device,
        tokenizer=recipe.tokenizer,
        find=find_tokenizer,
        convert=tokenizer_json,
    )
    plan = replace(plan, notes=[*plan.notes, *notes_on_unsaid(plan)])
    _refuse_config(plan)
    return plan.diagnosed() if recipe.diagnostics else plan


def _refuse_config(plan: Plan) -> None:
    """Refuse a merge whose ``config.json`` transformers would not open, though it opens the one it was made from."""
    text, origin = _new_config(plan), _origin(plan)
    if text is None or (origin is not None and closed(origin.parent)):
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(text)
        if problem := closed(Path(folder)):
            raise CheckpointError(
                f"transformers would not open the result's config.json: {problem} Choose other layers, or merge whole "
                "models."
            )


def _origin(plan: Plan) -> Path | None:
    """Return the ``config.json`` that the result's was made from."""
    from modicum.weights.checkpoint import Checkpoint

    first = next((model for model in plan.models if isinstance(model, Checkpoint)), None)
    path = None if first is None else first.base.folder / "config.json"
    return path if path is not None and path.exists() else None


def _new_config(plan: Plan) -> bytes | None:
    """Return the result's ``config.json``, ``None`` where it differs from its origin at most by the dtype.

    Transformers opens the one as it opens the other then, and a plain merge is spared the import of transformers.
    """
    text, origin = plan.companions.get("config.json"), _origin(plan)
    if text is None or origin is None:
        return text
    same = without_dtype(loads(text)) == without_dtype(loads(origin.read_bytes()))
    return None if same else text


@job(
    "merge",
    plan=lambda recipe: make_plan(recipe).describe(),
    distributed=True,
    makes_like=lambda r: None if r.mergekit or r.tokenizer else r.base or model_and_adapter(r.experts[0])[0],
    outputs=lambda recipe: ["adapter" if recipe.output == "lora" else "model"],
    foreseeable=lambda recipe: recipe.output == "model",
)
def merge(recipe: MergeRecipe, run: Run) -> None:
    """Merge models into one, a tensor at a time.

    Args:
        recipe: The models and the method.
        run: Gets ``model/`` or ``adapter/``, and per-tensor figures in its metrics.
    """
    from modicum.weights.lora import LoraPlan, run_loras
    from modicum.weights.merge import run_plan

    plan = make_plan(recipe)
    run.inputs.check()  # what was opened is what the run is known by; from here on the plan looks after it
    note_code(plan.models, run)
    kind = "adapter" if isinstance(plan, LoraPlan) else "model"
    out = run.folder / kind
    metrics: dict[str, Any]
    rows: Measured
    card = described(recipe, plan, run.folder)
    if isinstance(plan, LoraPlan):
        rows = measured = run_loras(
            plan,
            out,
            dtype=recipe.dtype,
            device=recipe.device,
            progress=not run.quiet,
            replace=True,
            companions=card,
        )
        experts = [model.name for model in plan.models]
        metrics = {"modules": len(rows), "rank": max(row["rank"] for row in rows.values())}
    else:
        for note in plan.notes:
            run.note(note)
        measured = run_plan(
            replace(plan, companions={**plan.companions, **card}),
            out,
            shard_bytes=recipe.shard_bytes,
            fork=recipe.device == "cpu",
            progress=not run.quiet,
            replace=True,
        )
        if not run.main:
            return  # each process measured its own share; the first one has collected them all
        rows, experts = comparable(plan, measured)
        metrics = {"tensors": len(plan.steps), "memory_bound": plan.memory_bound()}
    if not isinstance(plan, LoraPlan) and _new_config(plan) is not None and (problem := closed(out)):
        run.note(f"transformers does not open {out / 'config.json'}: {problem}")
    names = short_names(experts)
    found = {"layers": layers(rows, names), "diagnostics": diagnostics(rows, names)}
    run.record["metrics"] = metrics | {key: value for key, value in found.items() if value}
    if warning := _uncertain(measured):
        run.note(warning)
    run.output(kind, out)


def described(recipe: MergeRecipe, plan: Plan | LoraPlan, folder: Path) -> dict[str, bytes]:
    """Return the files that tell of a merge in ``folder``: its model card, and the mergekit file where there is one."""
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.lora import LoraPlan

    opened = [model for model in plan.models if isinstance(model, Checkpoint)]
    opened = [one for model in opened for one in ((model.base, model) if model.adapter else (model,))]
    lora = isinstance(plan, LoraPlan)
    written: Mapping[str, Any] = {k: v for k, v in dump(recipe).items() if k not in ("out", "mergekit", "twice")}
    base, said = recipe.base, {}
    if recipe.mergekit is not None:
        from modicum.weights.mergekit.document import CARD_KEYS, Reference

        written, base = recipe.mergekit, recipe.mergekit.get("base_model")
        base = Reference.parse(base, "base_model").model if base else None
        said = {key: value for key, value in written.items() if key in CARD_KEYS}
    card = model_card(
        {beside(model.name, folder): [model.folder] for model in opened},
        base=beside(base, folder) if base else None,
        method=recipe.method.name if recipe.method else str(written["merge_method"]),
        recipe=beside(written, folder),
        said=said,
        mergekit=recipe.mergekit is not None,
        adapter=lora,
    )
    files = {CARD: card}
    if recipe.mergekit is not None:
        document = beside(recipe.mergekit, folder)
        files["mergekit_config.yml"] = yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()
    return files


def comparable(plan: Plan, measured: Measured) -> tuple[Measured, list[str]]:
    """Return what was measured of the tensors whose experts most share, as slices may differ, and the experts."""
    steps = [step for step in plan.steps if measured[step.name]]
    if not steps:
        return {}, []
    experts = Counter(tuple(source.model for source in step.experts) for step in steps).most_common(1)[0][0]
    chosen = [step for step in steps if tuple(source.model for source in step.experts) == experts]
    if len(measured[chosen[0].name]["norms"]) != len(experts):
        return {}, []
    return {step.name: measured[step.name] for step in chosen}, list(experts)


def layers(measured: Measured, models: list[str]) -> dict[str, Any]:
    """Arrange how the experts compare: a list over tensors for each expert and each pair of few experts."""
    if not measured:
        return {}
    rows = list(measured.values())
    pairs = [f"{a}|{b}" for i, a in enumerate(models) for b in models[i + 1 :]] if "cosines" in rows[0] else []
    conflict = {"conflict": [_round(row["conflict"]) for row in rows]} if "conflict" in rows[0] else {}
    return {
        "names": list(measured),
        "norms": {model: [_round(row["norms"][t]) for row in rows] for t, model in enumerate(models)},
        "cosines": {pair: [_round(row["cosines"][p]) for row in rows] for p, pair in enumerate(pairs)},
        **conflict,
    }


def diagnostics(measured: Measured, models: list[str]) -> dict[str, Any]:
    """Arrange what methods report and diagnostics add in the same way; nothing where there is none of it."""
    rows = {name: row for name, row in measured.items() if any(key in row for key in (*EACH, *ALL))}
    found: dict[str, Any] = {}
    for key in (*EACH, *ALL):
        values = [_round(row[key]) if key in row else None for row in rows.values()]
        if key in EACH and any(values):
            found[key] = {model: [v[t] if v else None for v in values] for t, model in enumerate(models)}
        elif any(value is not None for value in values):
            found[key] = values
    return {"names": list(rows), **found} if found else {}


def _uncertain(measured: Measured) -> str | None:
    """Say where experts are so close that what the method makes of them hangs on their small differences."""
    found = [row["weakest"] for row in measured.values() if "weakest" in row]
    close = [value for value in found if value < CLOSE]
    if not close:
        return None
    return (
        f"In {len(close)} of {len(found)} matrices, directions of the experts nearly coincide (least squared length "
        f"{min(close):.1g} of the largest), and making them orthogonal magnifies small differences. "
        f"whiten_rtol: {CLOSE} drops such directions; compare both on validation data."
    )


def _round(value: Any) -> Any:
    if isinstance(value, list):
        return [_round(one) for one in value]
    return value if isinstance(value, int) else float(f"{value:.5g}")


def short_names(models: list[str]) -> list[str]:
    """Call each model by the end of its path, as much of it as tells them apart."""
    parts = [model.rstrip("/").split("/") for model in models]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{model} ({i + 1})" for i, model in enumerate(models)]
