"""Sizes of one-bit experts, fitted to each fine-tune's logits and written in the place of the stored ones."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.borders import border, loads
from modicum.durable import whole_file, write_atomic
from modicum.jobs.data.tokens import prompt_ids
from modicum.jobs.loading.models import load_model, load_tokenizer
from modicum.jobs.routing import held_out
from modicum.record import digest

if TYPE_CHECKING:
    from modicum.jobs.route import Build, RouteRecipe


def distil(
    recipe: RouteRecipe,
    build: Build,
    folder: Path,
    rows: Mapping[str, Sequence[Any]],
    work: Path,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Fit the sizes of every expert in a folder to its fine-tune, and write them there; the bytes stay as many.

    Args:
        recipe: With a section ``distil``.
        build: What the folder was made of.
        folder: Of the routed model, not finished yet.
        rows: Prompts of each expert's task; those held out tell what the fit is worth.
        work: Where a stopped run finds the experts that it is done with.
        note: Told of experts that the fit does no good.

    Returns:
        The error of each expert's logits before and after.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from modicum.models.routed.build import fill_host
    from modicum.models.routed.distilling import distil_scales

    section = recipe.distil
    assert section is not None  # noqa: S101
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(folder, dtype="float32", device=device)
    teacher: Any = AutoModelForCausalLM.from_config(model.config.host, dtype=torch.float32).to(device).eval()
    found: dict[str, Any] = {}
    for t, name in enumerate(recipe.experts):
        prompts = [prompt_ids(row, tokenizer) for row in rows[name]]
        kept = work / f"scales-{digest([section.model_dump(), recipe.seed, t, prompts])}.json"
        if not kept.is_file():
            fill_host(teacher, build.experts[t])
            texts = _answered(teacher, tokenizer, prompts, section.answer)
            end = len(texts) - held_out(recipe, len(texts))
            fitted = distil_scales(
                model,
                teacher,
                texts[:end],
                texts[end:],
                expert=t,
                steps=section.steps,
                batch_size=section.batch_size,
                learning_rate=section.learning_rate,
                seed=recipe.seed,
            )
            write_atomic(kept, json.dumps(fitted._asdict()) + "\n")
        with border(kept, "Delete it and run again: it is computed anew."):
            known = loads(kept.read_bytes())
            numbers = {key: float(known[key]) for key in ("before", "after")}
            factors = {str(key): float(value) for key, value in known["factors"].items()}
            if not all(map(math.isfinite, (*numbers.values(), *factors.values()))):
                raise ValueError("a number is not finite")
        found[name] = {**numbers, "factors": factors}
        if found[name]["after"] > found[name]["before"]:
            note(
                f"distil: the logits of {name} on held-out prompts are farther from its fine-tune's than before, "
                f"{found[name]['after']:.4g} instead of {found[name]['before']:.4g}. Give more prompts or fewer steps."
            )
    del model, teacher  # what is written next is mapped by them
    _rescale(folder, [found[name]["factors"] for name in recipe.experts])
    return {name: {key: one[key] for key in ("before", "after")} for name, one in found.items()}


def _answered(teacher: Any, tokenizer: Any, prompts: Sequence[list[int]], tokens: int) -> Sequence[list[int]]:
    """Return each prompt with the fine-tune's own likeliest answer behind it."""
    from modicum.evaluate import generate, stop_tokens
    from modicum.jobs.data.collators import pad_id

    if not tokens:
        return prompts
    stop = stop_tokens(teacher, tokenizer)
    answers = generate(teacher, prompts, max_new_tokens=tokens, stop=stop, pad=pad_id(tokenizer))
    return [prompt + answer for prompt, answer in zip(prompts, answers)]


def _rescale(folder: Path, factors: Sequence[Mapping[str, float]]) -> None:
    """Multiply the stored sizes; everything else of the files stays, to the byte."""
    from modicum.models.routed.folder import expert_files
    from modicum.weights.expert_plan import part_name
    from modicum.weights.files import MappedFile, put, read_header

    wanted = {part_name(t, name, "alpha"): r for t, of in enumerate(factors) for name, r in of.items()}
    for path in expert_files(folder):
        file = MappedFile(path)
        slots = {name: slot for name, slot in read_header(path, owner=path.name).items() if name in wanted}
        with whole_file(path) as fresh:  # the old one has a second name, by which a stopped run finds it unscaled
            shutil.copyfile(path, fresh)
            descriptor = os.open(fresh, os.O_RDWR)
            try:
                for name, slot in slots.items():
                    put(descriptor, slot, file.tensor(slot) * wanted[name])
            finally:
                os.close(descriptor)
