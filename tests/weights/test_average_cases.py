"""Acceptance cases of averages on checkpoints of one number, with the numbers of the specification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.claims.sewa.arms import greedy_within
from safetensors.torch import load_file, save_file
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.jobs.averaging.folders import in_order
from modicum.weights import Checkpoint, average, average_state_dicts
from modicum.weights.averagers.sewa import work
from modicum.weights.lora_mean import plan_lora_mean, run_lora_mean
from modicum.weights.search import Landscape

POINTS = (0.0, 1.0, 2.0, 10.0)
SQRT = (0.5, 0.2071067812, 0.1589186226, 0.1339745962)
COSINE = (0.1464466094, 0.3535533906, 0.3535533906, 0.1464466094)
RULES: list[tuple[str, dict[str, Any], tuple[float, ...], float]] = [
    ("uniform", {}, (0.25,) * 4, 3.25),
    ("lawa", {"last": 2}, (0, 0, 0.5, 0.5), 6),
    ("ema", {"decay": 0.5}, (0.125, 0.125, 0.25, 0.5), 5.625),
    ("wma", {}, (0.1, 0.2, 0.3, 0.4), 4.8),
    ("wsm", {"decay": "sqrt"}, SQRT, 1.8646899886),
    ("wsm", {"decay": "linear"}, (0.25,) * 4, 3.25),
    ("wsm", {"decay": "cosine"}, COSINE, 2.5251262658),
    ("wsm", {"decay": [0.75, 0.5, 0.25]}, (0.25,) * 4, 3.25),
    ("wsm", {"decay": [1.0, 0.5, 0.25]}, (0, 0.5, 0.25, 0.25), 3.5),
    ("power_ema", {"sigma_rel": 0.2357022604}, (0.0625, 0.1875, 0.3125, 0.4375), 5.1875),
]


def toys() -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor([x])} for x in POINTS]


def bowl(weights: dict[str, Tensor], target: float) -> Tensor:
    return (weights["w"] - target).square().sum()


def search(target: float, method: str = "sewa", **knobs: Any) -> tuple[dict[str, Tensor], list[float]]:
    return average_state_dicts(toys(), method=method, loss=bowl, batches=[target], fallback=False, **knobs)


def chosen(coefficients: list[float]) -> set[int]:
    return {i for i, c in enumerate(coefficients) if c}


@pytest.mark.parametrize(("method", "knobs", "coefficients", "mean"), RULES)
def test_rules_have_the_coefficients_of_the_specification(
    method: str, knobs: dict[str, Any], coefficients: tuple[float, ...], mean: float
) -> None:
    made, found = average_state_dicts(toys(), method=method, **knobs)
    assert found == pytest.approx(coefficients, abs=1e-7)
    assert float(made["w"]) == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9])
def test_rules_that_take_some_fit_any_number_where_none_is_given(n: int) -> None:
    states = [{"w": torch.tensor([float(i)])} for i in range(n)]
    assert sum(1 for c in average_state_dicts(states, method="lawa")[1] if c) == min(5, n)
    drawn = average_state_dicts(states, method="random", loss=lambda w, t: 0.0, batches=[1.5])[1]
    assert sum(1 for c in drawn if c) == min(5, (n + 1) // 2)


def test_what_is_no_list_of_dictionaries_of_tensors_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"^checkpoints\[0\] is of type str, expected a dictionary of tensors"):
        average_state_dicts({"w": torch.ones(1)}, method="uniform")  # type: ignore[arg-type]


def test_a_mean_in_bfloat16_is_cast_once(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([x], dtype=torch.bfloat16)} for x in (256.0, *[1.0] * 7)]
    assert average_state_dicts(states, method="uniform")[0]["w"].item() == 33.0
    assert average_state_dicts(states, method="uniform", dtype="float32")[0]["w"].item() == 32.875
    for i, state in enumerate(states):
        (tmp_path / str(i)).mkdir()
        save_file(state, tmp_path / str(i) / "model.safetensors")
    for dtype, expected in ((None, 33.0), ("float32", 32.875)):
        out = tmp_path / str(dtype)
        average([tmp_path / str(i) for i in range(8)], out, dtype=dtype, progress=False)
        assert load_file(out / "model.safetensors")["w"].item() == expected


def test_the_outlier_is_never_chosen_without_exchanges_and_often_by_the_published_form() -> None:
    for seed in range(3):
        assert 3 not in chosen(search(1.5, k=2, refine=False, seed=seed)[1])
    published = [search(1.0, k=3, refine=False, estimator="published", seed=seed)[1] for seed in range(5)]
    assert any(3 in chosen(found) for found in published)


@pytest.mark.parametrize(("target", "k", "best"), [(1.0, 3, {0, 1, 2}), (1.5, 2, {1, 2}), (1.0, 2, {0, 2})])
def test_the_surrogate_finds_the_best_subset(target: float, k: int, best: set[int]) -> None:
    found = search(target, "quadratic", k=k)[1]
    assert chosen(found) == best and set(found) == {0, 1 / k}


def test_one_is_a_checkpoint_bit_for_bit_and_all_are_the_plain_mean_without_a_search() -> None:
    states = [{"w": torch.tensor([0.1 * (i + 1), 1 / (i + 3)])} for i in range(4)]
    made, found = average_state_dicts(states, method="sewa", loss=bowl, batches=[0.3], k=1, fallback=False)
    assert torch.equal(made["w"], states[found.index(1.0)]["w"])

    def asked(weights: dict[str, Tensor], target: float) -> Tensor:
        raise AssertionError

    assert average_state_dicts(states, method="sewa", loss=asked, batches=[1.0], k=4)[1] == [0.25] * 4
    assert work(4, 1, k=4, estimator="exact_k", iters=150, samples=None, refine=True) == (0, 0, 0)


def test_adapters_of_one_number_have_the_mean_of_their_products_at_the_sum_of_their_ranks(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.zeros(1, 1)}, tmp_path / "base/model.safetensors")
    for i, value in enumerate((1.0, -1.0)):
        folder = tmp_path / str(i)
        folder.mkdir()
        factors = {f"base_model.model.q.lora_{side}.weight": torch.full((1, 1), value) for side in "AB"}
        save_file(factors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "r": 1, "lora_alpha": 1}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    known = [Checkpoint(tmp_path / str(i)) for i in range(2)]
    average(known, tmp_path / "out", progress=False)
    assert load_file(tmp_path / "out/model.safetensors")["q.weight"].item() == 1.0
    with pytest.raises(CheckpointError, match="among the checkpoints twice"):
        plan_lora_mean([known[0], Checkpoint(f"{tmp_path}/0/"), known[1]], [0.2, 0.3, 0.5])
    plan = plan_lora_mean(known, [0.5, 0.5])
    assert plan.describe()[-1] == "writes an adapter of rank 2, the exact mean"
    run_lora_mean(plan, tmp_path / "adapter", progress=False)
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {name.split(".")[-2]: list(t.shape) for name, t in written.items()} == {"lora_A": [2, 1], "lora_B": [1, 2]}
    assert Checkpoint(tmp_path / "adapter", base=tmp_path / "base")["q.weight"].item() == 1.0
    assert (
        "rank 1, the nearest to the mean, whose rank is 2" in plan_lora_mean(known, [0.5, 0.5], rank=1).describe()[-1]
    )


def test_numbers_count_in_every_part_of_a_path_that_differs() -> None:
    paths = ["1/a-10/checkpoint-5", "1/b-2/checkpoint-7", "1/a-10/checkpoint-40"]
    assert in_order(paths, "*") == [paths[1], paths[0], paths[2]]


@pytest.mark.parametrize(
    "ordered",
    [
        ["epoch-0.5", "epoch-1.25", "epoch-1.5", "epoch-2", "epoch-10"],
        ["epoch-0.50", "epoch-1.25", "epoch-1.50"],
        ["epoch-0.5", "epoch-1.0", "epoch-1.25"],
        ["v1.2.9", "v1.2.10", "v1.3.0"],
        ["e-1.5/step-9", "e-1.5/step-10.old", "e-1.75/step-2"],
    ],
)
def test_numbers_with_a_point_are_decimals_and_with_two_versions(ordered: list[str]) -> None:
    assert in_order(sorted(ordered, reverse=True), "*") == ordered


def test_what_may_be_a_decimal_or_a_version_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"\.10 beside .* List the folders"):
        in_order(["v1.9", "v1.10"], "v*")


@pytest.mark.parametrize("n", [1, 4])
def test_the_study_s_greedy_control_spends_what_it_is_given(n: int) -> None:
    known = toys()[:n]
    few, many = (greedy_within(Landscape(bowl, known, [1.0]), budget, seed=0) for budget in (0, 200))
    losses = [Landscape(bowl, known, [1.0]).value(found) for found in (few, many)]
    assert losses[1] <= losses[0]
    if n == 4:  # without a budget it is greedy itself
        assert few == average_state_dicts(known, method="greedy", loss=bowl, batches=[1.0], fallback=False)[1]
