"""An unfinished merge goes on only when nothing that it depends on has changed."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modicum.weights import Checkpoint, extract_lora, merge, merge_loras
from modicum.weights.files import Spec
from modicum.weights.mergekit.vocabulary import Vocabulary
from modicum.weights.plan import Plan, Source, Step, identity_of, plan_merge
from weights.conftest import write_model
from weights.test_adapter import train_adapter

Settings = dict[str, Any]
NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(6)]
merging = sys.modules["modicum.weights.merge"]  # the package has a function of the module's name


def tensors(seed: int, shape: tuple[int, ...] = (8, 8)) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name in NAMES}


@pytest.fixture
def world(tmp_path: Path) -> Settings:
    """Arguments of a merge that uses everything: statistics, draws, an adapter, exclusions."""
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        write_model(tmp_path / name, tensors(seed))
    for name, seed in (("fa", 3), ("fb", 4)):
        write_model(tmp_path / name, {key: value.abs() for key, value in tensors(seed).items()})
    return {"base": tmp_path / "base", "experts": [tmp_path / "a", tmp_path / "b"], "method": "linear"}


def start_and_stop(monkeypatch: pytest.MonkeyPatch, settings: Settings, out: Path) -> None:
    """Begin the merge, and be interrupted after three tensors."""
    real, count = merging.run_step, 0

    def fragile(step: Step, **found: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        return real(step, **found)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "run_step", fragile)
        with pytest.raises(KeyboardInterrupt):
            merge(out=out, workers=1, progress=False, **settings)
    assert out.with_name(f".{out.name}.partial").exists()


def rewrite(folder: Path, scale: float) -> None:
    file = folder / "model.safetensors"
    write_model(folder, {name: scale * tensor for name, tensor in load_file(file).items()})


def fisher(world: Settings, **changes: Any) -> Settings:
    root = world["base"].parent
    return world | {"method": "fisher", "statistics": [root / "fa", root / "fb"]} | changes


CHANGES: dict[str, tuple[Callable[[Settings], Settings], Callable[[Settings], Any]]] = {
    # what the first try is, and what changes before the second: files, or the settings that are returned
    "base": (lambda w: w | {"method": "task_arithmetic"}, lambda w: rewrite(w["base"], 2)),
    "expert": (lambda w: w, lambda w: rewrite(w["experts"][1], 2)),
    "order": (lambda w: w | {"weights": [1.0, 3.0]}, lambda w: w | {"experts": w["experts"][::-1]}),
    "fewer experts": (lambda w: w, lambda w: w | {"experts": w["experts"][:1]}),
    "statistics": (fisher, lambda w: rewrite(w["statistics"][0], 9)),
    "other statistics": (fisher, lambda w: w | {"statistics": w["statistics"][::-1]}),
    "method": (lambda w: w | {"method": "task_arithmetic"}, lambda w: w | {"method": "magmax"}),
    "knob": (lambda w: w, lambda w: w | {"weights": [1.0, 3.0]}),
    "seed": (lambda w: w | {"method": "dare", "density": 0.5}, lambda w: w | {"seed": 1}),
    "dtype": (lambda w: w, lambda w: w | {"dtype": "bfloat16"}),
    "exclude": (lambda w: w, lambda w: w | {"exclude": "layers.[0-3]"}),
    "shards": (lambda w: w, lambda w: w | {"shard_bytes": 300}),
}


def result(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_merge_whose_ingredients_changed_starts_afresh(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    prepare, alter = CHANGES[change]
    first = prepare(world)
    merge(out=tmp_path / "before", progress=False, **first)
    start_and_stop(monkeypatch, first, tmp_path / "out")
    second = alter(first) or first
    found = merge(out=tmp_path / "out", workers=1, progress=False, **second)
    expected = merge(out=tmp_path / "clean", progress=False, **second)
    assert result(tmp_path / "out") == result(tmp_path / "clean") != result(tmp_path / "before")
    assert found == expected


def test_diagnostics_asked_for_later_are_measured_of_every_tensor(
    world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_and_stop(monkeypatch, world, tmp_path / "out")
    found = merge(out=tmp_path / "out", progress=False, diagnostics=True, **world)
    assert all("outliers" in row for row in found.values())


@pytest.mark.parametrize("changed", ["adapter", "its base"])
def test_an_adapter_and_what_lies_beneath_it_are_ingredients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    from support import tiny_llama

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama(seed=0).save_pretrained(base)
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    train_adapter(base, adapter)
    settings = {"base": tmp_path / "other", "experts": [adapter], "method": "task_arithmetic"}
    start_and_stop(monkeypatch, settings, tmp_path / "out")
    if changed == "adapter":
        file = adapter / "adapter_model.safetensors"
        save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    else:
        tiny_llama(seed=2).save_pretrained(base)
    for out in ("out", "clean"):
        merge(out=tmp_path / out, progress=False, **settings)
    assert result(tmp_path / "out") == result(tmp_path / "clean")


def test_what_did_not_change_goes_on(world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_and_stop(monkeypatch, world, tmp_path / "out")
    made: list[str] = []
    real = merging.run_step

    def watched(step: Step, **found: Any) -> Any:
        made.append(step.name)
        return real(step, **found)

    monkeypatch.setattr(merging, "run_step", watched)
    merge(out=tmp_path / "out", progress=False, **world)
    assert len(made) == 3


def test_the_middle_of_a_large_file_is_an_ingredient(tmp_path: Path) -> None:
    large = {"w": torch.zeros(1 << 19)}
    before = Checkpoint(write_model(tmp_path / "m", large)).identity
    large["w"][1 << 18] = 1
    os.utime(write_model(tmp_path / "m", large) / "model.safetensors", ns=(0, 1))
    assert Checkpoint(tmp_path / "m").identity != before


OTHER: dict[str, Any] = {  # another value of every field of a step and of a plan
    "name": "other", "spec": Spec((1,), torch.float32), "method": "magmax", "base": None, "experts": (),
    "knobs": {"scale": 2.0}, "statistics": (Source("s", {"w": torch.ones(1)}, "w"),), "diagnosed": True,
    "compared": False, "steps": (), "companions": {"config.json": b"{}"}, "seed": 1, "device": "cuda",
}  # fmt: skip
SILENT = {"models", "notes"}  # nothing of the result depends on them: what is read stands in the steps


def a_plan() -> Plan:
    return plan_merge({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], method="task_arithmetic", knobs={})


@pytest.mark.parametrize("part", [part.name for part in dataclasses.fields(Step)])
def test_every_field_of_a_step_is_part_of_the_identity(part: str) -> None:
    plan = a_plan()
    changed = dataclasses.replace(plan, steps=[dataclasses.replace(plan.steps[0], **{part: OTHER[part]})])
    assert changed.identity != plan.identity


@pytest.mark.parametrize("part", [part.name for part in dataclasses.fields(Plan) if part.name not in SILENT])
def test_every_field_of_a_plan_is_part_of_the_identity(part: str) -> None:
    assert dataclasses.replace(a_plan(), **{part: OTHER[part]}).identity != a_plan().identity == a_plan().identity


def test_rows_of_a_vocabulary_are_ingredients(world: Settings) -> None:
    model, donor = Checkpoint(world["base"]), Checkpoint(world["experts"][0])
    rows, other = torch.tensor([0, 1, -1]), torch.tensor([0, -2, -1])
    seen = [
        identity_of(table)
        for table in (
            Vocabulary(model, 3, rows, []),
            Vocabulary(model, 3, other, []),
            Vocabulary(model, 3, rows, [(donor, rows)]),
            Vocabulary(model, 3, rows, [(donor, other)]),
        )
    ]
    assert all(seen[i] != seen[j] for i in range(4) for j in range(i))
    assert identity_of(Vocabulary(model, 3, rows.clone(), [])) == seen[0]


def test_all_that_a_step_reads_is_among_its_sources(world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = fisher(world)
    opened = {key: [Checkpoint(p) for p in settings[key]] for key in ("experts", "statistics")}
    plan = plan_merge(Checkpoint(world["base"]), opened["experts"], method="fisher", knobs={},
                      statistics=opened["statistics"])  # fmt: skip
    read: set[tuple[str, str]] = set()
    real = Checkpoint.__getitem__

    def watched(self: Checkpoint, name: str) -> Tensor:
        read.add((self.name, name))
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", watched)
    for step in plan.steps:
        read.clear()
        merging.run_step(step)
        assert read == {(source.model, source.name) for source in step.sources}
        assert len(read) == 5


@pytest.mark.parametrize("made_by", ["merged", "extracted"])
def test_an_adapter_made_of_other_ingredients_is_written_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_by: str
) -> None:
    """The factors have the same names and shapes either way."""
    from modicum.weights import stream
    from support import tiny_llama

    tiny_llama(seed=0).save_pretrained(tmp_path / "base")
    tiny_llama(seed=1).save_pretrained(tmp_path / "tuned")
    adapters = [tmp_path / "a", tmp_path / "b"]
    for adapter in adapters:
        train_adapter(tmp_path / "base", adapter)

    def run(second: bool, out: Path) -> None:
        if made_by == "merged":
            merge_loras(adapters, out, method="task_arithmetic", scale=2.0 if second else 1.0, progress=False)
        else:
            extract_lora(tmp_path / "tuned", tmp_path / "base", out, max_rank=2, progress=False)

    real, count = stream.put, 0

    def fragile(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "put", fragile)
        with pytest.raises(KeyboardInterrupt):
            run(False, tmp_path / "out")
    if made_by == "extracted":
        tiny_llama(seed=2).save_pretrained(tmp_path / "tuned")
    run(True, tmp_path / "out")
    run(True, tmp_path / "clean")
    assert result(tmp_path / "out") == result(tmp_path / "clean")
