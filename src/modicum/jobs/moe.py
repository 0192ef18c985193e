"""Put a mixture of experts together from dense models, with routers that follow prompts; files of mergekit-moe too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field, model_validator

from modicum.borders import loads
from modicum.errors import CheckpointError, RecipeError
from modicum.jobs.card import CARD, beside, model_card
from modicum.jobs.loading.folders import note_code
from modicum.jobs.loading.references import model_and_adapter
from modicum.layout import is_recomputed, layer_of, role
from modicum.recipe import Recipe, Section, dump
from modicum.record import Run
from modicum.registry import job
from modicum.types import PositiveInt

if TYPE_CHECKING:
    import torch

    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.mixture import Expert
    from modicum.weights.plan import Plan

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
_OWN = frozenset({"model_type", "architectures", "_name_or_path", "dtype"})  # settings of a class or a place
BY_PROMPTS = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")


class MoeExpert(Section):
    """A dense model that becomes an expert."""

    source_model: str = Field(description="a folder, Hub id or builtin, or model+adapter")
    positive_prompts: list[str] = Field(default=[], description="what the expert is for")
    negative_prompts: list[str] = Field(default=[], description="what it is not for")
    noise_scale: Annotated[float, Ge(0)] = Field(
        default=0.0, description="of mergekit files; anything but 0 is refused"
    )
    residual_scale: float = Field(default=1.0, description="factor on what the expert adds")


class MoeRecipe(Recipe):
    """A base and experts of one dense architecture, and what their routers follow."""

    job: Literal["moe"] = "moe"
    base_model: str = Field(description="gives everything but the experts' feed-forwards")
    experts: list[MoeExpert] = Field(min_length=1, description="the models whose feed-forwards become experts")
    shared_experts: list[MoeExpert] = Field(default=[], max_length=1, description="one that sees every token, of Qwen2")
    gate_mode: GateMode = Field(
        default="hidden",
        description="hidden: the base's states at the last token of the prompts, layer by layer; hidden_avg: their "
        "mean; cheap_embed: the mean embedding; random",
    )
    experts_per_token: PositiveInt = Field(default=2, description="how many experts each token goes through")
    architecture: Literal["auto", "mixtral", "qwen", "qwen3"] = Field(
        default="auto", description="of the result; auto: as the base and the experts tell"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the result; the base's when not given"
    )
    device: str = Field(default="cpu", description="where the base reads the prompts")
    shard_bytes: PositiveInt = 5_000_000_000
    allow_pickle: bool = False
    remote_code: bool = False

    @model_validator(mode="after")
    def _check(self) -> MoeRecipe:
        prompts = [(tuple(each.positive_prompts), tuple(each.negative_prompts)) for each in self.experts]
        if self.gate_mode in BY_PROMPTS:
            for number, each in enumerate([*self.experts, *self.shared_experts]):
                if not each.positive_prompts and number < len(self.experts):
                    raise RecipeError(
                        f"experts[{number}] has no positive_prompts, which gate_mode {self.gate_mode} needs."
                    )
            if len(set(prompts)) == 1 and len(prompts) > 1:
                raise RecipeError("All experts have the same prompts, so that no router tells them apart. Change some.")
        if any(each.noise_scale for each in (*self.experts, *self.shared_experts)):
            raise RecipeError("noise_scale adds random noise to weights, which is not done here. Remove it.")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the models, and the adapters that some are given with."""
        experts = [each.source_model for each in (*self.experts, *self.shared_experts)]
        parts = [self.base_model, *(part for expert in experts for part in model_and_adapter(expert) if part)]
        yield from dict.fromkeys(parts)


def make_plan(recipe: MoeRecipe, rows: Mapping[int, torch.Tensor] | None = None) -> Plan:
    """Open the models and decide what becomes of each tensor.

    Args:
        recipe: The models.
        rows: For each layer, the router's rows, those of a shared expert last; zeros when not given.
    """
    import torch

    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.mixture import Expert, depth_of, kind_of, plan_mixture, width_of

    options: dict[str, Any] = {"allow_pickle": recipe.allow_pickle, "remote_code": recipe.remote_code}
    base = Checkpoint(recipe.base_model, **options)
    opened = {recipe.base_model: base}
    for each in (*recipe.experts, *recipe.shared_experts):
        if each.source_model not in opened:
            model, adapter = model_and_adapter(each.source_model)
            opened[each.source_model] = Checkpoint(adapter or model, base=model if adapter else None, **options)
    wanted = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen3": "qwen3_moe"}.get(recipe.architecture)
    if wanted is not None and wanted != kind_of(base).model_type:
        raise RecipeError(
            f"architecture {recipe.architecture} needs another base than {base.name}, which becomes a "
            f"{kind_of(base).model_type}. Remove architecture."
        )

    def experts(listed: Sequence[MoeExpert]) -> list[Expert]:
        return [Expert(opened[each.source_model], each.residual_scale) for each in listed]

    n = len(recipe.experts)
    rows = rows or {
        layer: torch.zeros(n + len(recipe.shared_experts), width_of(base)) for layer in range(depth_of(base))
    }
    plan = plan_mixture(
        base,
        experts(recipe.experts),
        {layer: row[:n].contiguous() for layer, row in rows.items()},
        shared=next(iter(experts(recipe.shared_experts)), None),
        shared_gates={layer: row[n:].contiguous() for layer, row in rows.items()} if recipe.shared_experts else None,
        experts_per_token=recipe.experts_per_token,
        dtype=recipe.dtype,
    )
    plan = _said_out(plan, base)
    _refuse_homeless(plan, base)
    notes = [f"{n} experts: many kernels want a power of two"] if n & (n - 1) else []
    if "random" in recipe.gate_mode:
        notes.append("routers are random: the mixture must be trained before it is of use")
    return replace(plan, seed=recipe.seed, notes=[*notes, *plan.notes])


def _said_out(plan: Plan, base: Checkpoint) -> Plan:
    """Return the plan with a ``config.json`` that says what the dense class takes for granted.

    The mixture's class takes other things for granted: Mixtral's rotary base is a hundred times that of Llama.
    """
    from modicum.jobs.merging.layers import opened

    config = loads(plan.companions["config.json"])
    dense, mixture = opened(base.config), opened(config)
    if dense is None or mixture is None:
        return plan
    before, after = dense.to_dict(), mixture.to_dict()
    silent = {key: value for key, value in before.items() if key not in _OWN and value != after.get(key)}
    if "rope_parameters" in silent:  # which older files say in these
        config = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    text = json.dumps(config | silent, indent=2) + "\n"
    return replace(plan, companions={**plan.companions, "config.json": text.encode()}) if silent else plan


def _refuse_homeless(plan: Plan, base: Checkpoint) -> None:
    """Refuse what the mixture's class has no place for outside the experts, such as biases, or would do otherwise."""
    from modicum.jobs.merging.layers import built, opened

    config, dense, name = opened(loads(plan.companions["config.json"])), opened(base.config), base.name
    model = None if config is None else built(config)
    if model is None:
        raise RecipeError(f"transformers does not build the mixture that {name} would become. Update transformers.")

    def outside(names: Iterable[str]) -> set[str]:
        return {name for name in names if not {"mlp", "block_sparse_moe"} & set(name.split("."))}

    ours = outside(step.name for step in plan.steps if not is_recomputed(step.name, step.spec.shape))
    theirs = {name for name in outside(model.state_dict()) if role(name) != "head"}
    kind = type(model).__name__
    if extra := sorted(each for each in ours - theirs if role(each) != "head"):
        raise CheckpointError(
            f"{name}: {extra[0]!r} and {len(extra) - 1} more tensors have no place in {kind}, which would leave them "
            "out. Choose models without them."
        )
    if lost := sorted(theirs - ours):
        raise CheckpointError(f"{name} has no {lost[0]!r}, which {kind} needs. Choose models that have it.")
    before = {} if dense is None or (old := built(dense)) is None else _settings(old)
    for key, found in _settings(model).items():
        if (expected := before.get(key, found)) != found:
            raise CheckpointError(
                f"{name}: {key} is {found} in {kind}, expected {expected} as in the dense class. Choose models without "
                "it, or correct config.json."
            )


def _settings(model: torch.nn.Module) -> dict[str, object]:
    """Return what the layers of a model do besides their feed-forwards, such as the window that attention sees."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if layer_of(f"{name}.") and "mlp" not in name.split(".")
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, bool | int | float | str | None)
    }


def describe(recipe: MoeRecipe) -> list[str]:
    """Return the plan in words, a line each."""
    if recipe.gate_mode in BY_PROMPTS:
        from modicum.jobs.loading.models import rehearse_loading

        rehearse_loading(recipe.base_model, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
        encoded = _encoder(recipe)
        for each in (*recipe.experts, *recipe.shared_experts):
            for prompt in (*each.positive_prompts, *each.negative_prompts):
                encoded(prompt)
    return [f"routers by gate_mode {recipe.gate_mode}", *make_plan(recipe).describe()]


def _encoder(recipe: MoeRecipe) -> Callable[[str], list[int]]:
    """Return what gives the ids of a prompt, as it would begin a text; it refuses one without any."""
    from modicum.jobs.loading.models import load_tokenizer

    tokenizer = load_tokenizer(recipe.base_model, remote_code=recipe.remote_code)

    def encoded(prompt: str) -> list[int]:
        found: list[int] = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False)["input_ids"]
        if not found:
            raise RecipeError(f"The prompt {prompt!r} has no tokens. Change it.")
        return found

    return encoded


def router_rows(recipe: MoeRecipe) -> dict[int, torch.Tensor]:
    """Return for each layer the router's rows, of length one; those of a shared expert last."""
    import torch

    from modicum.jobs.loading.models import load_model
    from modicum.random import generator
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.mixture import depth_of, width_of

    base = Checkpoint(recipe.base_model, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
    everyone, depth = [*recipe.experts, *recipe.shared_experts], depth_of(base)
    if recipe.gate_mode not in BY_PROMPTS:
        found = {}
        for layer in range(depth):
            draws = torch.empty(len(everyone), width_of(base))
            rng = generator(recipe.seed, "moe", layer)
            uniform = recipe.gate_mode == "uniform_random"
            found[layer] = draws.uniform_(-1, 1, generator=rng) if uniform else draws.normal_(generator=rng)
        return found
    encoded = _encoder(recipe)
    options: dict[str, Any] = {"allow_pickle": recipe.allow_pickle, "remote_code": recipe.remote_code}
    model = load_model(recipe.base_model, device=recipe.device, **options)

    @torch.no_grad()
    def states(prompt: str) -> torch.Tensor:
        """Return what each layer reads of a prompt, ``(layers, width)``."""
        ids = torch.tensor([encoded(prompt)], device=recipe.device)
        if recipe.gate_mode == "cheap_embed":
            return model.get_input_embeddings()(ids)[0].double().sum(0).expand(depth, -1)
        layers = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]
        read = torch.stack([layer[0].double() for layer in layers])
        return read.mean(1) if recipe.gate_mode == "hidden_avg" else read[:, -1]

    def mean(prompts: Sequence[str]) -> torch.Tensor:
        total = torch.stack([states(prompt) for prompt in prompts]).sum(0)
        over = sum(len(encoded(prompt)) for prompt in prompts) if recipe.gate_mode == "cheap_embed" else len(prompts)
        return total / over

    rows = []
    for each in everyone:
        row = mean(each.positive_prompts) if each.positive_prompts else torch.zeros(depth, width_of(base)).double()
        row = row - mean(each.negative_prompts) if each.negative_prompts else row
        rows.append(row / row.norm(dim=-1, keepdim=True).clamp_min(1e-8))
    stacked = torch.stack(rows, 1).float().cpu()
    return {layer: stacked[layer] for layer in range(depth)}


@job("moe", plan=describe, outputs=lambda _: ["model"])
def moe(recipe: MoeRecipe, run: Run) -> None:
    """Write a mixture of experts.

    Args:
        recipe: The models and the prompts.
        run: Gets ``model/``, and in its metrics how far the router's rows are from telling the experts apart.
    """
    import torch

    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.merge import run_plan

    make_plan(recipe)  # what does not fit is refused before a model reads anything
    rows = router_rows(recipe)
    plan = make_plan(recipe, rows)
    run.inputs.check()
    note_code(plan.models, run)
    for note in plan.notes:
        run.note(note)
    n = len(recipe.experts)
    condition = [float(torch.linalg.cond(row[:n].double())) for row in rows.values()]
    if max(condition) > 100:
        run.note(
            "Routers hardly tell the experts apart in some layer: their rows are nearly dependent. Change the prompts."
        )
    out = run.folder / "model"
    opened = [model for model in plan.models if isinstance(model, Checkpoint)]
    card = model_card(
        {beside(model.name, run.folder): [model.folder] for model in opened},
        base=beside(recipe.base_model, run.folder),
        method=f"mixture of experts, gates {recipe.gate_mode}",
        recipe=beside({key: value for key, value in dump(recipe).items() if key != "out"}, run.folder),
        said={"tags": ["moe"]},
    )
    run_plan(
        replace(plan, companions={**plan.companions, CARD: card}),
        out,
        shard_bytes=recipe.shard_bytes,
        progress=not run.quiet,
        replace=True,
    )
    run.record["metrics"] = {"experts": n, "condition": [float(f"{value:.4g}") for value in condition]}
    run.output("model", out)
