"""Give a looped model away: as a plain one of its host's class, or with the code that it needs beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from modicum.errors import UnsupportedError
from modicum.jobs.loading.models import load_model, load_tokenizer, looped_model, rehearse_model
from modicum.recipe import Recipe
from modicum.record import Run, whole_folder
from modicum.registry import job
from modicum.types import PositiveInt

COLUMNS = "zero_columns.safetensors"


class ExportRecipe(Recipe):
    """Which looped model, and in which form."""

    job: Literal["export"] = "export"
    model: str = Field(description="folder, Hub id or adapter of a looped model")
    format: Literal["unrolled", "remote-code"] = Field(
        default="unrolled",
        description="unrolled: a checkpoint of the host's own class with as many layers as visits; remote-code: the "
        "looped model with its code in one file, for trust_remote_code=True",
    )
    n_cycles: PositiveInt | None = Field(default=None, description="cycles to unroll; all when not given")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the result; auto: as the model is stored"
    )

    def inputs(self) -> Iterator[str]:
        """Yield the model."""
        yield self.model


def plan(recipe: ExportRecipe) -> list[str]:
    """Say what would be written; refuse what cannot be."""
    from modicum.models.zero_token.export import check_unrollable, unrolled_schedule

    looped = looped_model(rehearse_model(recipe.model), recipe.model).config
    if recipe.format == "remote-code":
        _check_remote(recipe)
        load_tokenizer(recipe.model)
        return [f"write {recipe.model} with the code of a looped {looped.host.model_type!r} model"]
    check_unrollable(looped)
    visits = unrolled_schedule(looped, recipe.n_cycles)
    load_tokenizer(recipe.model)
    physical = looped.host.num_hidden_layers
    return [f"write {physical} layers as {len(visits)} of a plain {looped.host.model_type!r} model"]


@job("export", plan=plan, outputs=lambda _: ["model"])
def export(recipe: ExportRecipe, run: Run) -> None:
    """Write a looped model as a plain one, and compare the two before it counts as done.

    Args:
        recipe: Model and form.
        run: ``model/`` is the plain checkpoint. A model with zero tokens in all layers also leaves
            ``zero_columns.safetensors``, the keys that go into the first column of the cache; the plain model alone
            then is the looped one without its zero tokens.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from modicum.models.zero_token.export import hold, unroll, zero_columns

    model: Any = looped_model(load_model(recipe.model, dtype=recipe.dtype), recipe.model)
    if recipe.format == "remote-code":
        return _with_code(recipe, model, run)
    if model.config.exit_threshold is not None:
        run.note("The plain model runs all its layers for every token: the exit threshold is left behind.")
    plain = unroll(model, n_cycles=recipe.n_cycles)
    columns = zero_columns(model, n_cycles=recipe.n_cycles) if model.config.zero_token else None
    tokenizer = load_tokenizer(recipe.model)
    run.inputs.check()
    with whole_folder(run.folder / "model", check=run.inputs.check_mapped) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if columns is not None:
            save_file(columns, folder / COLUMNS)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=plain.dtype).eval()
        difference = hold(loaded, model, n_cycles=recipe.n_cycles, columns=columns)
    run.record["metrics"] = {"layers": plain.config.num_hidden_layers, "logits_differ_by": difference}
    run.say(f"{plain.config.num_hidden_layers} layers; logits differ by {difference:.1e} of the largest")
    if columns is not None:
        run.say(f"zero tokens are in {COLUMNS}: a plain tool that cannot put them into its cache runs without them")
    run.output("model", run.folder / "model")


def _check_remote(recipe: ExportRecipe) -> None:
    if recipe.n_cycles is not None:
        raise UnsupportedError("n_cycles is for format: unrolled; a looped model takes n_cycles in its calls.")


def _with_code(recipe: ExportRecipe, model: Any, run: Run) -> None:
    """Write the looped model, and its code in one file that needs torch and transformers alone."""
    from modicum.models.zero_token import bundle

    _check_remote(recipe)
    with whole_folder(run.folder / "model", check=run.inputs.check) as folder:
        model.save_pretrained(folder)
        load_tokenizer(recipe.model).save_pretrained(folder)
        (folder / bundle.FILE).write_text(bundle.source(), encoding="utf-8")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = json.dumps(config | {"auto_map": bundle.auto_map()}, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    run.record["metrics"] = {"visits": len(model.schedule)}
    run.say(f"load it with trust_remote_code=True: {bundle.FILE} holds its code")
    run.output("model", run.folder / "model")
