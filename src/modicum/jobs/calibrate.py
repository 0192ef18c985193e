"""Choose the exit threshold of a looped model on held-out text, and compare exit criteria on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

from pydantic import Field

from modicum.durable import whole_folder
from modicum.errors import RecipeError
from modicum.jobs.data.rows import DataSection, load_rows, tokenize
from modicum.jobs.data.trial import check_tokens
from modicum.jobs.loading.models import load_model, load_tokenizer, looped_model, native_bfloat16, rehearse_loading
from modicum.recipe import Recipe
from modicum.record import Run
from modicum.registry import job
from modicum.types import NonNegative, NonNegativeInt, PositiveInt

Criterion: TypeAlias = Literal["zero_attention", "confidence", "gate", "latent", "entropy", "kl", "random"]


class CalibrateRecipe(Recipe):
    """Which model, on which text, and how much an exit may cost."""

    job: Literal["calibrate"] = "calibrate"
    model: str = Field(description="folder, Hub id or adapter of a looped model")
    data: DataSection = Field(description="text to measure losses on")
    max_loss_increase: NonNegative = Field(default=0.01, description="nats for each token")
    criteria: list[Criterion] = Field(
        default=["zero_attention", "confidence", "gate", "latent", "entropy", "kl", "random"],
        min_length=1,
        description="the one with the fewest layer visits for the allowed loss goes into the model",
    )
    scope: Literal["token", "prefix", "sequence", "last_token", "batch"] = Field(
        default="token",
        description="which tokens decide together to leave: each alone, all up to it, a sequence, by its last "
        "token, or a batch",
    )
    candidates: PositiveInt = Field(default=8, description="thresholds tried for each criterion")
    batch_size: PositiveInt = Field(default=8, description="rows at a time")
    importance: bool = Field(default=False, description="measure the loss when each visit of a layer is skipped")
    prune: NonNegativeInt = Field(default=0, description="visits to leave out for good, the least important ones")
    prune_by: Literal["loss", "zero_attention"] = Field(
        default="loss", description="what importance is: the measured loss, or the attention on the zero token"
    )

    def inputs(self) -> Iterator[str]:
        """Yield the model and the data."""
        yield self.model
        yield from self.data.inputs()


def plan(recipe: CalibrateRecipe) -> list[str]:
    """Say what would be tried."""
    model = rehearse_loading(recipe.model)
    tried, ids = recipe.candidates + 1, _of_one_length(recipe, model, lambda _: None)
    rows = len(load_rows(recipe.data, seed=recipe.seed))
    lines = [f"try {tried} thresholds of {', '.join(recipe.criteria)} on {rows} documents of {recipe.data.path}"]
    _fits(recipe, _leaving(model, recipe), len(ids))
    if recipe.prune or recipe.importance:
        lines.insert(0, f"skip each visit of a layer once{f', then {recipe.prune} for good' if recipe.prune else ''}")
    return lines


def _of_one_length(recipe: CalibrateRecipe, model: Any, note: Callable[[str], None]) -> list[list[int]]:
    """Return the ids of the longest rows, which make batches without padding; the few that are shorter are left out."""
    tokenizer = load_tokenizer(recipe.model)
    rows = tokenize(load_rows(recipe.data, seed=recipe.seed, note=note), tokenizer, recipe.data, note=note)
    check_tokens(model, rows)
    longest = max(map(len, rows["input_ids"]))
    return [list(ids) for ids in rows["input_ids"] if len(ids) == longest]


def _fits(recipe: CalibrateRecipe, model: Any, rows: int) -> None:
    """Refuse criteria that the model or the data leave nothing of."""
    if "gate" in recipe.criteria and rows < 2:
        raise RecipeError(
            "The gate is fitted on other rows than it is compared on, and there is one row. Give more data."
        )
    if recipe.prune:
        from modicum.models.zero_token.importance import check_count, looped

        visits = looped(model)
        check_count(visits, recipe.prune)
        if recipe.prune_by == "zero_attention" and not {*visits} <= {*model._rows}:
            raise RecipeError("prune_by: some visits have no zero token to go by. Set prune_by: loss.")
    if set(recipe.criteria) == {"zero_attention"} and not model._rows:
        raise RecipeError("No criterion of the recipe fits the model. Name others.")


def _leaving(model: Any, recipe: CalibrateRecipe) -> Any:
    """Return the looped model, in one piece; refuse one whose loop cannot be left."""
    looped = looped_model(model, recipe.model)
    if looped.depth < 2:
        raise RecipeError(f"{recipe.model} has a single cycle, so there is nothing to leave.")
    return looped


@job("calibrate", plan=plan, outputs=lambda _: ["model"])
def calibrate(recipe: CalibrateRecipe, run: Run) -> None:
    """Measure loss against mean cycles by criterion; write the model with the exit that is best.

    Args:
        recipe: Model, text, and the allowed rise of the loss.
        run: ``model/`` leaves its loop by the best criterion; an adapter is merged into it. ``record.json`` holds the
            loss by cycles, and each criterion's curve and choice. A gate is fitted on every second batch, and all
            criteria are compared on the others.
    """
    import torch

    from modicum.models.zero_token.calibrate import cheapest, exit_curve, fit_exit_gate, loss_by_cycles

    tokenizer = load_tokenizer(recipe.model)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = _leaving(
        load_model(recipe.model, dtype="auto" if native_bfloat16(device) else "float32", device=device), recipe
    )
    whole = torch.tensor(_of_one_length(recipe, model, run.note), device=device)
    _fits(recipe, model, len(whole))
    metrics = run.record["metrics"] = {"tokens": whole.numel(), "criteria": {}}
    if recipe.importance or recipe.prune:
        model = _prune(recipe, run, model, torch.split(whole, recipe.batch_size))
    if "gate" in recipe.criteria:
        stays = fit_exit_gate(model, torch.split(whole[1::2], recipe.batch_size))
        run.say(f"gate: after cycle 1, {stays[1]:.0%} of the predictions are those of all cycles")
        whole = whole[::2]
    batches = torch.split(whole, recipe.batch_size)
    metrics["loss_by_cycles"] = loss_by_cycles(model, batches)
    model.config.exit_scope, has_zero = recipe.scope, bool(model._rows)
    for criterion in recipe.criteria:
        if criterion == "zero_attention" and not has_zero:
            run.note("The model has no zero tokens, so that it cannot leave by zero_attention.")
            continue
        model.config.exit_criterion = criterion
        curve = exit_curve(model, batches, candidates=recipe.candidates)
        chosen = cheapest(curve, max_loss_increase=recipe.max_loss_increase)
        for point in curve:
            run.log("exit", criterion=criterion, **asdict(point))
        metrics["criteria"][criterion] = asdict(chosen)
        run.say(
            f"{criterion}: {chosen.mean_cycles:.2f} of {model.depth} cycles, {chosen.visits:.1f} of "
            f"{len(model.schedule)} visits, loss {chosen.full_loss:.4f} -> {chosen.loss:.4f} "
            f"at threshold {chosen.threshold:.4g}"
        )
    choices = metrics["criteria"]
    # By visits, not by cycles: what reads the prediction runs tail and head for it.
    best = min(choices, key=lambda name: (choices[name]["visits"], choices[name]["loss"]))
    metrics["best"] = best
    run.say(f"the model leaves by {best}: the fewest visits for the allowed loss")
    model.config.exit_criterion, model.config.exit_threshold = best, choices[best]["threshold"]
    run.inputs.check()
    with whole_folder(run.folder / "model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run.output("model", run.folder / "model")


def _prune(recipe: CalibrateRecipe, run: Run, model: Any, batches: Sequence[Any]) -> Any:
    """Measure how much each visit matters; return the model without the least important ones, if so many are to go."""
    from modicum.models.zero_token.importance import skip_visits, visit_importance

    found = visit_importance(model, batches)
    run.record["metrics"]["importance"] = asdict(found)
    for visit in found.visits:
        run.log("visit", **asdict(visit))
    if found.rank_correlation is not None:
        run.say(f"zero attention against the loss of skipping a visit: rank correlation {found.rank_correlation:.2f}")
    if not recipe.prune:
        return model
    gone = found.least(recipe.prune, by=recipe.prune_by)
    run.record["metrics"]["skipped"] = gone
    run.say(f"left out: {', '.join(f'layer {layer} in cycle {cycle}' for layer, cycle in gone)}")
    return skip_visits(model, gone)
