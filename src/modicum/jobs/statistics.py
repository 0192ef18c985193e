"""Measure a model on its own data: what ``fisher`` and ``regmean`` weigh experts by when they merge them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.data.section import DataSection
from modicum.jobs.loading.models import in_one_piece, load_model, load_tokenizer, rehearse_loading
from modicum.patterns import Pattern
from modicum.recipe import Recipe
from modicum.record import Run
from modicum.registry import job
from modicum.types import IGNORED, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from modicum.weights.checkpoint import Checkpoint

Batch = dict[str, Any]
T = TypeVar("T")


class StatisticsRecipe(Recipe):
    """Which model, on which data, and what to measure."""

    job: Literal["statistics"] = "statistics"
    model: str = Field(description="folder, Hub id or builtin; an adapter is merged into its base first")
    kind: Literal["fisher", "gram"] = Field(
        description="fisher: mean squared gradients, for fisher; gram: products of layers' inputs, for regmean"
    )
    data: DataSection = Field(description="rows to measure on")
    labels: Literal["data", "model"] = Field(
        default="data", description="fisher: the data's own labels, or labels drawn from the model"
    )
    batch_size: PositiveInt = Field(default=8, description="gram: rows of one length at a time")
    exclude: str | None = Field(default=None, description="regular expression of tensor names that are not measured")
    memory: PositiveInt = Field(
        default=4_000_000_000, description="bytes of sums held at a time; the data is read once for each such share"
    )
    device: str = Field(default="cpu", description="where the model computes, for example cuda")
    allow_pickle: bool = False
    remote_code: bool = False

    def inputs(self) -> Iterator[str]:
        """Yield the model and the data."""
        yield self.model
        yield from self.data.inputs()


def plan(recipe: StatisticsRecipe) -> list[str]:
    """Say what would be measured; reads headers and data, but no weights."""
    from modicum.jobs.data.packing_trial import foresee_batches
    from modicum.jobs.data.rows import load_rows
    from modicum.weights.checkpoint import Checkpoint

    rows = load_rows(recipe.data, seed=recipe.seed)
    checkpoint = Checkpoint(recipe.model, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
    what = {"fisher": "mean squared gradients", "gram": "Gram matrices of the linear layers' inputs"}[recipe.kind]
    model: Any = rehearse_loading(recipe.model, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
    _measured(recipe, in_one_piece(model), checkpoint)
    return [
        f"{what} of {recipe.model} ({checkpoint.nbytes / 1e6:.0f} MB) on {len(rows)} rows of {recipe.data.path}",
        f"holds at most {max(1, recipe.memory // 10**6)} MB of sums at a time, or those of one tensor",
        *foresee_batches(recipe.data, rows, recipe.model, model=model, remote_code=recipe.remote_code),
    ]


def _measured(recipe: StatisticsRecipe, model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what will be measured, by name; refuse a model that has none of it."""
    known = {name: shape for name, shape in measured_tensors(model, recipe.kind).items() if name in checkpoint}
    if not known:
        raise UnsupportedError(
            f"{recipe.model}: a {model.config.model_type} model has no weights of its own to measure. Measure the "
            "models that it was made of."
        )
    left_out = Pattern(recipe.exclude, "exclude") if recipe.exclude else None
    found = {name: shape for name, shape in known.items() if not (left_out and left_out.finds(name))}
    if not found:
        raise RecipeError(f"exclude {recipe.exclude!r} leaves no tensor to measure. Correct it, or leave it out.")
    return found


@job("statistics", plan=plan, outputs=lambda _: ["statistics"])
def statistics(recipe: StatisticsRecipe, run: Run) -> None:
    """Measure squared gradients or Gram matrices of a model on data.

    Args:
        recipe: The model, the data and what to measure.
        run: Gets ``statistics/``, a checkpoint by the names of the model's tensors, which a merge takes.
    """
    import torch

    from modicum.jobs.data.batches import load_batches
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.files import Spec
    from modicum.weights.kernels.compare import refuse_overflow
    from modicum.weights.statistics import FILE, weights_of
    from modicum.weights.stream import map_tensors, names_by_size

    options: dict[str, Any] = {"allow_pickle": recipe.allow_pickle, "remote_code": recipe.remote_code}
    checkpoint = Checkpoint(recipe.model, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
    tokenizer = load_tokenizer(recipe.model, remote_code=recipe.remote_code)
    size = 1 if recipe.kind == "fisher" else recipe.batch_size
    model = load_model(recipe.model, dtype="float32", device=recipe.device, **options)
    model = in_one_piece(model).requires_grad_(False)
    # Rows of one length need no padding, whose inputs would enter the products.
    one_length = recipe.kind == "gram"
    batches = load_batches(
        recipe.data, tokenizer, batch_size=size, seed=recipe.seed, note=run.note, one_length=one_length, model=model
    )
    # Shapes as they are stored: of a layer, its inputs; of a parameter, its own.
    specs = {name: Spec(shape, torch.float32) for name, shape in _measured(recipe, model, checkpoint).items()}
    shares = shared_out(names_by_size(specs), {name: spec.numel * 8 for name, spec in specs.items()}, recipe.memory)
    done: dict[str, Tensor] = {}
    threads = torch.get_num_threads()

    def make(name: str) -> tuple[Tensor, dict[str, Any]]:
        if name not in done:
            done.clear()
            torch.set_num_threads(threads)  # one thread makes all: it may use every core
            share = next(share for share in shares if name in share)
            shown = _shown(batches, f"{shares.index(share) + 1}/{len(shares)}", quiet=run.quiet)
            done.update(measure(model, share, shown, recipe, batches))
        found = done.pop(name).cpu()
        refuse_overflow(name, found, method=recipe.kind)
        return found, {}

    rows = sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    about = {"kind": recipe.kind, "model": recipe.model, "weights": weights_of(checkpoint), "rows": rows,
             "tokens": tokens} | ({"labels": recipe.labels} if recipe.kind == "fisher" else {})  # fmt: skip
    out = run.folder / "statistics"
    map_tensors(
        make,
        specs,
        out,
        identity=[run.hash, checkpoint.identity],
        companions={FILE: (json.dumps(about, indent=2) + "\n").encode()},
        workers=1,
        progress=False,
        replace=True,
        check=run.inputs.check,
    )
    run.record["metrics"] = {"tensors": len(specs), "rows": rows, "tokens": tokens}
    run.output("statistics", out)


def measured_tensors(model: PreTrainedModel, kind: str) -> Mapping[str, tuple[int, ...]]:
    """Return of which tensors something is measured, and the shapes of what is.

    Raises:
        UnsupportedError: The model has no linear layers to measure.
    """
    if kind == "fisher":
        return {name: tuple(tensor.shape) for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    found = {name: (layer.in_features, layer.in_features) for name, layer in linear_layers(model).items()}
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no linear layers whose inputs could be measured.")
    return found


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers by the names of their weights; one that is tied to an embedding belongs to that."""
    from torch import nn

    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        parameters[id(module.weight)]: module
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in parameters and id(module.weight) not in tables
    }


def shared_out(names: Sequence[str], sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Cut the names into shares of at most ``most`` bytes, or of one tensor, in order.

    Example:
        >>> shared_out(["a", "b", "c"], {"a": 9, "b": 2, "c": 2}, 4)
        [['a'], ['b', 'c']]
    """
    shares: list[list[str]] = []
    used = 0
    for name in names:
        if not shares or used + sizes[name] > most:
            shares.append([])
            used = 0
        shares[-1].append(name)
        used += sizes[name]
    return shares


def measure(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Iterable[Batch],
    recipe: StatisticsRecipe,
    data: Sequence[Batch],
) -> dict[str, Tensor]:
    """Measure some tensors on all data."""
    from modicum.weights.measure import gram_matrices, squared_gradients

    def on_device(batch: Batch) -> Batch:
        return {k: v.to(recipe.device) if hasattr(v, "to") else v for k, v in batch.items() if k != "labels"}

    if recipe.kind == "gram":
        layers = linear_layers(model)
        return gram_matrices(
            lambda batch: model(**on_device(batch)),
            {name: layers[name] for name in names},
            batches,
            count=sum(batch["input_ids"].numel() for batch in data),
        )
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name].requires_grad_() for name in names}
    try:
        return squared_gradients(
            lambda numbered: log_likelihood(model(**on_device(numbered[1])).logits, numbered[1]["labels"], recipe,
                                            numbered[0]),
            chosen,
            enumerate(batches),
            count=len(data),
        )  # fmt: skip
    finally:
        model.requires_grad_(False)


def log_likelihood(logits: Tensor, labels: Tensor, recipe: StatisticsRecipe, number: int) -> Tensor:
    """Return the log-likelihood of a row's labels, or of labels drawn from the model in their places."""
    import torch

    from modicum.random import generator

    scores = logits[:, :-1].float().log_softmax(-1)
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    scores, targets = scores[wanted.to(scores.device)], targets[wanted]
    if recipe.labels == "model":
        rng = generator(recipe.seed, "statistics", number)
        targets = torch.multinomial(scores.detach().exp().cpu(), 1, generator=rng).squeeze(1)
    return scores.gather(1, targets[:, None].to(scores.device)).sum()


def _shown(batches: Sequence[T], told: str, *, quiet: bool) -> Iterable[T]:
    """Yield the batches behind a progress bar."""
    from rich.console import Console
    from rich.progress import track

    return track(
        batches, f"measuring {told}", console=Console(stderr=True), transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )  # fmt: skip
