"""The language modelling loss of a mean of checkpoints, with room for one model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from modicum import processes
from modicum.jobs.data.batches import load_batches
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.weights.journal import Journal
from modicum.weights.search import Landscape

if TYPE_CHECKING:
    from modicum.jobs.average import AverageRecipe
    from modicum.weights.checkpoint import Checkpoint


def make_landscape(
    recipe: AverageRecipe,
    checkpoints: Sequence[Checkpoint],
    note: Callable[[str], None],
    *,
    journal: Journal | None = None,
) -> Landscape:
    """Return the loss of a mean of the checkpoints on the recipe's data.

    Args:
        recipe: Names the data.
        checkpoints: Oldest first.
        note: Told when rows were cut or dropped.
        journal: Remembers the answers.
    """
    newest = checkpoints[-1]
    tokenizer = load_tokenizer(newest.name, remote_code=recipe.remote_code)
    # An adapter's weights come folded into those of its base, so the base is all that is needed of the model.
    model = load_model(
        str(newest.base.folder),
        dtype="float32",
        device=recipe.device,
        allow_pickle=recipe.allow_pickle,
        remote_code=recipe.remote_code,
    ).requires_grad_(False)
    options: dict[str, Any] = {"batch_size": recipe.batch_size, "seed": recipe.seed, "note": note, "model": model}
    batches, held_out = (
        load_batches(section, tokenizer, **options) if section else None for section in (recipe.data, recipe.held_out)
    )
    hollow(model)

    def loss(weights: dict[str, torch.Tensor], batch: dict[str, Any]) -> torch.Tensor:
        batch = {key: value.to(recipe.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        mean: torch.Tensor = torch.func.functional_call(model, weights, kwargs=batch).loss
        return mean

    return Landscape(
        loss,
        checkpoints,
        batches or (),
        held_out,
        recipe.exclude,
        recipe.device,
        journal=journal,
        shared=processes.connected(),
    )


def hollow(model: torch.nn.Module) -> None:
    """Free the memory of a model's parameters: they are places for the weights of means, and hold none themselves."""
    empty: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            place = torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            setattr(module, name, empty.setdefault(id(parameter), place))


@contextmanager
def connected() -> Iterator[None]:
    """Connect the processes of a launch while they search together, unless they are connected already."""
    if processes.world() == 1 or processes.connected():
        yield
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
