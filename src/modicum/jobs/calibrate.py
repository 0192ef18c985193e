"""Choose the exit threshold of a looped model on held-out text, and compare exit criteria on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal, TypeAlias

from pydantic import Field

from modicum.durable import whole_folder
from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.data.rows import DataSection, load_rows, tokenize
from modicum.jobs.loading.models import load_model, load_tokenizer, native_bfloat16
from modicum.recipe import Recipe
from modicum.record import Run
from modicum.registry import job
from modicum.types import NonNegative, PositiveInt

Criterion: TypeAlias = Literal["zero_attention", "confidence", "latent", "entropy", "kl", "random"]


class CalibrateRecipe(Recipe):
    """Which model, on which text, and how much an exit may cost."""

    job: Literal["calibrate"] = "calibrate"
    model: str = Field(description="folder, Hub id or adapter of a looped model")
    data: DataSection
    max_loss_increase: NonNegative = Field(default=0.01, description="nats for each token")
    criteria: list[Criterion] = Field(
        default=["zero_attention", "latent", "random"], min_length=1, description="the first one goes into the model"
    )
    scope: Literal["token", "prefix", "sequence", "last_token", "batch"] = "token"
    candidates: PositiveInt = Field(default=8, description="thresholds tried for each criterion")
    batch_size: PositiveInt = 8

    def inputs(self) -> Iterator[str]:
        """Yield the model and the data."""
        yield self.model
        yield from self.data.inputs()


def plan(recipe: CalibrateRecipe) -> list[str]:
    """Say what would be tried."""
    rows, tried = len(load_rows(recipe.data, seed=recipe.seed)), recipe.candidates + 1
    return [f"try {tried} thresholds of {', '.join(recipe.criteria)} on {rows} documents of {recipe.data.path}"]


@job("calibrate", plan=plan)
def calibrate(recipe: CalibrateRecipe, run: Run) -> None:
    """Measure loss against mean cycles by criterion; write the model with the threshold that was chosen.

    Args:
        recipe: Model, text, and the allowed rise of the loss.
        run: ``model/`` leaves its loop by the first criterion; an adapter is merged into it. ``record.json`` holds the
            loss by cycles, and each criterion's curve and choice.
    """
    import torch

    from modicum.models.zero_token.calibrate import cheapest, exit_curve, loss_by_cycles
    from modicum.models.zero_token.model import ZeroTokenForCausalLM

    tokenizer = load_tokenizer(recipe.model)
    rows = tokenize(load_rows(recipe.data, seed=recipe.seed, note=run.note), tokenizer, recipe.data, note=run.note)
    # Rows of one length make batches without padding; the few that are shorter are left out.
    longest = max(map(len, rows["input_ids"]))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    whole = torch.tensor([ids for ids in rows["input_ids"] if len(ids) == longest], device=device)
    batches = torch.split(whole, recipe.batch_size)
    model = load_model(recipe.model, dtype="auto" if native_bfloat16(device) else "float32", device=device)
    model = getattr(model, "merge_and_unload", lambda: model)()
    if not isinstance(model, ZeroTokenForCausalLM):
        raise UnsupportedError(f"{recipe.model} is no looped model. Convert it first: model.convert of a train job.")
    if model.config.depth < 2:
        raise RecipeError(f"{recipe.model} has a single cycle, so there is nothing to leave.")
    by_cycles = loss_by_cycles(model, batches)
    run.record["metrics"] = {"tokens": whole.numel(), "loss_by_cycles": by_cycles, "criteria": {}}
    model.config.exit_scope = recipe.scope
    for criterion in recipe.criteria:
        model.config.exit_criterion = criterion
        curve = exit_curve(model, batches, candidates=recipe.candidates)
        chosen = cheapest(curve, max_loss_increase=recipe.max_loss_increase)
        for point in curve:
            run.log("exit", criterion=criterion, **asdict(point))
        run.record["metrics"]["criteria"][criterion] = asdict(chosen)
        run.say(
            f"{criterion}: {chosen.mean_cycles:.2f} of {model.config.depth} cycles, "
            f"loss {chosen.full_loss:.4f} -> {chosen.loss:.4f} at threshold {chosen.threshold:.4g}"
        )
    choices = run.record["metrics"]["criteria"]
    best = min(choices, key=lambda name: (choices[name]["mean_cycles"], choices[name]["loss"]))
    run.record["metrics"]["best"] = best
    if len(choices) > 1:
        run.say(
            f"fewest cycles for the allowed loss: {best}; the model leaves by {recipe.criteria[0]}, the first named"
        )
    first = recipe.criteria[0]
    model.config.exit_criterion = first
    model.config.exit_threshold = run.record["metrics"]["criteria"][first]["threshold"]
    run.inputs.check()
    with whole_folder(run.folder / "model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    run.output("model", run.folder / "model")
