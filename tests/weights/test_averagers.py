"""Every averager beside its transcription in NumPy, and the loss along checkpoints that learning ones are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError
from modicum.registry import averager
from modicum.weights import Checkpoint, average, average_state_dicts
from modicum.weights.average import choose, plan_average
from modicum.weights.merge import run_plan
from modicum.weights.search import Landscape
from oracles import average as oracle
from weights.conftest import random_tensors, write_model

CASES: dict[str, tuple[dict[str, Any], Callable[[Sequence[oracle.Array]], oracle.Array]]] = {
    "uniform": ({}, oracle.uniform),
    "lawa": ({"last": 2}, lambda m: oracle.lawa(m, 2)),
    "ema": ({"decay": 0.7}, lambda m: oracle.ema(m, 0.7)),
    "wsm, linear": ({"decay": "linear"}, lambda m: oracle.wsm(m, "linear")),
    "wsm, sqrt": ({"decay": "sqrt"}, lambda m: oracle.wsm(m, "sqrt")),
    "wsm, cosine": ({"decay": "cosine"}, lambda m: oracle.wsm(m, "cosine")),
    "wsm, a list": ({"decay": [0.9, 0.9, 0.3, 0.2, 0.0]}, lambda m: oracle.wsm(m, [0.9, 0.9, 0.3, 0.2, 0.0])),
    "last": ({}, oracle.last),
    "wma": ({}, oracle.wma),
    "power_ema": ({"sigma_rel": 0.1}, lambda m: oracle.power_ema(m, 0.1)),
    "power_ema, wide": ({"sigma_rel": 0.28}, lambda m: oracle.power_ema(m, 0.28)),
}
LISTS = ("wsm, a list",)  # fit six checkpoints


@pytest.mark.oracle("averagers", CASES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [2, 3, 6])
def test_coefficients_make_the_mean_of_the_oracle(case: str, n: int) -> None:
    knobs, expected = CASES[case]
    entry = averager[case.partition(",")[0]]
    n = 6 if case in LISTS else n
    models = np.random.default_rng(n).normal(size=(n, 5))
    coefficients = entry.function(list(models), **entry.knobs(knobs))
    np.testing.assert_allclose(np.tensordot(coefficients, models, 1), expected(list(models)), rtol=1e-12)


def test_defaults_are_those_of_the_documentation() -> None:
    models = list(np.random.default_rng(0).normal(size=(7, 3)))
    for name, expected in (("lawa", oracle.lawa(models, 5)), ("ema", oracle.ema(models, 0.8)),
                           ("wsm", oracle.wsm(models, "sqrt"))):  # fmt: skip
        coefficients = averager[name].function(models, **averager[name].knobs({}))
        np.testing.assert_allclose(np.tensordot(coefficients, models, 1), expected, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_on_disk_become_the_mean_of_the_oracle(tmp_path: Path, case: str) -> None:
    knobs, expected = CASES[case]
    tensors = [random_tensors(seed, torch.float32) for seed in range(6 if case in LISTS else 4)]
    folders = [write_model(tmp_path / str(i), t) for i, t in enumerate(tensors)]
    average(folders, tmp_path / "out", method=case.partition(",")[0], progress=False, **knobs)
    for name, found in load_file(tmp_path / "out/model.safetensors").items():
        mean = expected([t[name].double().numpy() for t in tensors])
        np.testing.assert_allclose(found.numpy(), mean, rtol=1e-5, atol=1e-6)


def test_excluded_tensors_stay_as_in_the_last_checkpoint(tmp_path: Path) -> None:
    tensors = [random_tensors(seed) for seed in range(3)]
    folders = [write_model(tmp_path / str(i), t) for i, t in enumerate(tensors)]
    average(folders, tmp_path / "out", exclude="norm", progress=False)
    found = load_file(tmp_path / "out/model.safetensors")
    assert {name for name in found if torch.equal(found[name], tensors[-1][name])} == {n for n in found if "norm" in n}
    with pytest.raises(RecipeError, match="matches no tensor"):
        average(folders, tmp_path / "none", exclude="rotary", progress=False)


# A loss along checkpoints


def quadratic(weights: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    return torch.stack([(weights[name] - target[name]).square().sum() for name in target]).sum()


def models(n: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(40, 30, generator=rng).to(dtype), "b": torch.randn(7, generator=rng).to(dtype)}
        for _ in range(n)
    ]  # fmt: skip


WEIGHTS = [0.5, 0.2, 0.0, 0.3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [WEIGHTS, [0.25, 0.25, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
def test_loss_and_slope_are_those_of_the_oracle(dtype: torch.dtype, weights: list[float]) -> None:
    known, batches = models(4, dtype), models(3, torch.float64)
    landscape = Landscape(quadratic, known, batches)
    flat = [np.concatenate([t.double().numpy().ravel() for t in m.values()]) for m in known]
    targets = [np.concatenate([t.numpy().ravel() for t in b.values()]) for b in batches]

    def loss(mean: oracle.Array) -> float:
        return float(np.mean([((mean - target) ** 2).sum() for target in targets]))

    mean = sum(w * m for w, m in zip(weights, flat))
    value, slope = landscape.gradient(weights)
    assert slope.dtype == torch.float64
    assert value == pytest.approx(loss(mean), rel=1e-5)
    assert landscape.value(weights) == pytest.approx(value, rel=1e-6)
    expected = oracle.slope(loss, flat, weights)
    np.testing.assert_allclose(slope.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_a_step_looks_at_the_batch_whose_turn_it_is_and_a_score_at_what_was_held_out() -> None:
    known, batches, held_out = models(4), models(3), models(5)[3:]
    landscape = Landscape(quadratic, known, batches, held_out)
    one = [Landscape(quadratic, known, [batch]) for batch in batches]
    for step in range(7):
        assert landscape.value(WEIGHTS, step=step) == pytest.approx(one[step % 3].value(WEIGHTS))
        assert landscape.gradient(WEIGHTS, step=step)[1].tolist() == one[step % 3].gradient(WEIGHTS)[1].tolist()
    assert landscape.score(WEIGHTS) == pytest.approx(Landscape(quadratic, known, held_out).value(WEIGHTS))
    assert Landscape(quadratic, known, batches).score(WEIGHTS) == landscape.value(WEIGHTS)


def test_what_is_excluded_stays_as_in_the_newest_and_has_no_slope() -> None:
    known, batches = models(4), models(2)
    landscape = Landscape(quadratic, known, batches, exclude="^a$")
    seen: list[dict[str, Tensor]] = []
    watched = Landscape(lambda w, b: (seen.append(w), quadratic(w, b))[1], known, batches, exclude="^a$")
    watched.value(WEIGHTS)
    assert torch.equal(seen[0]["a"], known[-1]["a"])
    others = [{"b": model["b"]} for model in known]
    only_b = Landscape(quadratic, others, [{"b": batch["b"]} for batch in batches])
    torch.testing.assert_close(landscape.gradient(WEIGHTS)[1], only_b.gradient(WEIGHTS)[1])
    with pytest.raises(RecipeError, match="exclude .* leaves no weight"):
        Landscape(quadratic, known, batches, exclude=".").gradient(WEIGHTS)


def test_a_small_difference_between_large_weights_keeps_its_slope() -> None:
    """Inner products with the weights themselves would drown it."""
    rng = torch.Generator().manual_seed(0)
    common, target = 100 * torch.randn(1 << 16, generator=rng), torch.zeros(1 << 16)
    known = [{"w": common + 1e-3 * torch.randn(1 << 16, generator=rng)} for _ in range(3)]
    _, slope = Landscape(quadratic, known, [{"w": target}]).gradient([1 / 3] * 3)
    exact = torch.stack([m["w"].double() for m in known])
    expected = (exact - exact[-1]) @ (2 * exact.mean(0))
    torch.testing.assert_close(slope - slope[-1], expected, rtol=1e-3, atol=1.0)


def test_integer_tensors_are_no_weights_and_inputs_stay_as_they_are() -> None:
    known = [{**model, "steps": torch.tensor(3)} for model in models(3)]
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in known]
    seen: list[set[str]] = []
    landscape = Landscape(lambda w, b: (seen.append(set(w)), quadratic(w, b))[1], known, models(1))
    landscape.gradient([0.0, 0.0, 1.0])
    landscape.value([0.2, 0.3, 0.5])
    assert seen == [{"a", "b"}] * 2
    assert all(torch.equal(a[n], b[n]) and not b[n].requires_grad for a, b in zip(before, known) for n in a)


def test_a_landscape_without_data_or_of_other_shapes_is_refused() -> None:
    with pytest.raises(RecipeError, match="^batches is empty.*at least one batch"):
        Landscape(quadratic, models(2), [])
    with pytest.raises(RecipeError, match="^held_out is empty.*at least one batch"):
        Landscape(quadratic, models(2), models(1), [])
    with pytest.raises(RecipeError, match="^loss is a float, expected a function"):
        Landscape(0.5, models(2), models(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 coefficients for 3 checkpoints"):
        Landscape(quadratic, models(3), models(1)).value([0.5, 0.5])


def test_nothing_of_the_size_of_all_checkpoints_exists(tmp_path: Path) -> None:
    """Memory of torch is seen by the tensors that are alive while the loss is computed and the slope is taken."""
    import gc

    n, size = 12, 1 << 16
    rng = torch.Generator().manual_seed(0)
    folders = [write_model(tmp_path / str(i), {f"{k}": torch.randn(size, generator=rng) for k in range(4)})
               for i in range(n)]  # fmt: skip
    checkpoints = [Checkpoint(folder) for folder in folders]
    most = 0

    def loss(weights: dict[str, Tensor], _: object) -> Tensor:
        nonlocal most
        alive = {t.data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor}
        most = max(most, sum(alive.values()))
        return torch.stack([w.square().sum() for w in weights.values()]).sum()

    gc.collect()
    before = sum(t.untyped_storage().nbytes() for t in gc.get_objects() if isinstance(t, Tensor))
    Landscape(loss, checkpoints, [0, 1]).gradient([1 / n] * n)
    model = 4 * size * 4
    assert most - before < 3 * model < n * model / 3


# An averager that learns, in a function of its own


@pytest.fixture
def toys() -> Iterator[None]:
    @averager("toy_descent", learns="gradient")
    def toy_descent(landscape: Landscape, checkpoints: Sequence[object], *, iters: int = 100) -> list[float]:
        """Descend in logits, whose softmax are the coefficients."""
        logits = torch.zeros(len(checkpoints), dtype=torch.float64)
        for step in range(iters):
            shares = logits.softmax(0)
            slope = landscape.gradient(shares.tolist(), step=step)[1]
            gradient = shares * (slope - (shares * slope).sum())
            logits -= 0.95**step * gradient / gradient.abs().max().clamp_min(1e-12)
        return logits.softmax(0).tolist()

    @averager("toy_draw")
    def toy_draw(checkpoints: Sequence[object], *, rng: torch.Generator) -> list[float]:
        """Draw."""
        return torch.rand(len(checkpoints), generator=rng).softmax(0).tolist()

    @averager("toy_worst", learns="value")
    def toy_worst(landscape: Landscape, checkpoints: Sequence[object]) -> list[float]:
        """Take the worst."""
        n = len(checkpoints)
        units = [[float(i == j) for j in range(n)] for i in range(n)]
        return max(units, key=landscape.value)

    yield
    for name in ("toy_descent", "toy_draw", "toy_worst"):
        del averager._entries[name]


@pytest.mark.usefixtures("toys")
def test_a_learning_averager_finds_the_better_checkpoints(tmp_path: Path) -> None:
    tensors = [random_tensors(seed, torch.float32) for seed in range(4)]
    folders = [write_model(tmp_path / str(i), t) for i, t in enumerate(tensors)]
    target = {name: 0.7 * tensors[1][name] + 0.3 * tensors[2][name] for name in tensors[0]}
    found = average(folders, tmp_path / "out", method="toy_descent", loss=quadratic, batches=[target], progress=False)
    assert found == pytest.approx([0, 0.7, 0.3, 0], abs=0.06)
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(tensor, sum(c * t[name] for c, t in zip(found, tensors)), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("toys")
def test_a_choice_that_loses_on_held_out_data_gives_way_to_the_latest(tmp_path: Path) -> None:
    known = models(3)
    landscape = Landscape(quadratic, known, [known[1]], [known[2]])
    kept = choose(known, method="toy_worst", landscape=landscape)
    assert kept.coefficients == [0.0, 0.0, 1.0]
    assert set(kept.scores) == {"toy_worst", "mean of the last 1"}
    assert kept.note is not None and "lost on held-out data" in kept.note
    free = choose(known, method="toy_worst", landscape=landscape, fallback=False)
    assert sorted(free.coefficients) == [0.0, 0.0, 1.0]
    assert free.coefficients != kept.coefficients
    better = Landscape(quadratic, known, [known[1]], [known[free.coefficients.index(1.0)]])
    assert choose(known, method="toy_worst", landscape=better).coefficients == free.coefficients


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("best", [1, 2, 4, 5])
def test_a_tuned_guard_knows_the_means_of_other_numbers_of_the_latest(best: int) -> None:
    known = models(5)
    target = {name: sum(m[name] for m in known[-best:]) / best for name in known[0]}
    landscape = Landscape(quadratic, known, [known[0]], [target])
    kept = choose(known, method="toy_worst", landscape=landscape, fallback="tuned")
    assert kept.coefficients == pytest.approx([0.0] * (5 - best) + [1 / best] * best)
    if kept.note is not None:
        assert f"mean of the last {best}" in kept.note
        assert set(kept.scores) >= {f"mean of the last {k}" for k in (2, 4, 5)}
    with pytest.raises(RecipeError, match="fallback is 'tunde'"):
        choose(known, method="toy_worst", landscape=landscape, fallback="tunde")  # type: ignore[arg-type]


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("answer", [[1.0], [0.7, 0.7], [float("nan"), 1.0]])
def test_an_answer_that_is_no_mean_is_refused(monkeypatch: pytest.MonkeyPatch, answer: list[float]) -> None:
    astray = dataclasses.replace(averager["toy_worst"], function=lambda landscape, checkpoints: answer)
    monkeypatch.setitem(averager._entries, "toy_worst", astray)
    with pytest.raises(CheckpointError, match="toy_worst answered with the coefficients"):
        choose(models(2), method="toy_worst", landscape=Landscape(quadratic, models(2), models(1)))


@pytest.mark.usefixtures("toys")
def test_draws_come_from_the_seed() -> None:
    drawn = [choose(["a", "b"], method="toy_draw", seed=seed).coefficients for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.usefixtures("toys")
def test_a_rule_that_learns_needs_data() -> None:
    with pytest.raises(RecipeError, match="toy_descent learns its coefficients from a loss on data"):
        choose(models(2), method="toy_descent")


def test_what_cannot_be_written_is_refused_before_the_search(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(i), random_tensors(i)) for i in range(2)]

    def searched(weights: dict[str, Tensor], batch: object) -> float:
        raise AssertionError

    told: dict[str, Any] = {"method": "best", "loss": searched, "batches": [0], "progress": False}
    with pytest.raises(CheckpointError, match="exists already"):
        average(folders, folders[0], **told)
    with pytest.raises(RecipeError, match="dtype"):
        average(folders, tmp_path / "out", dtype="float3", **told)


def test_weights_that_ask_for_gradients_are_averaged_without_them() -> None:
    known = [{name: torch.nn.Parameter(tensor) for name, tensor in model.items()} for model in models(3)]
    made, _ = average_state_dicts(known, method="sewa", loss=quadratic, batches=models(2), k=2, iters=3)
    assert not any(tensor.requires_grad for tensor in made.values())
    assert all(p.grad is None for model in known for p in model.values())


def test_coefficients_may_be_a_tensor() -> None:
    landscape = Landscape(quadratic, models(4), models(2))
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    assert landscape.value(weights) == landscape.value(WEIGHTS)  # type: ignore[arg-type]
    assert torch.equal(landscape.gradient(weights, 1)[1], landscape.gradient(WEIGHTS, 1)[1])  # type: ignore[arg-type]


def test_a_plan_of_tensors_in_memory_is_written(tmp_path: Path) -> None:
    known = models(2)
    run_plan(plan_average(known, [0.25, 0.75]), tmp_path / "out", progress=False)
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(tensor, 0.25 * known[0][name] + 0.75 * known[1][name])
