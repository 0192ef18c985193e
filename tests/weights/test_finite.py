"""Numbers that are not finite go neither in nor out: one line names the tensor, and nothing is left on the disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.registry import merge_method
from modicum.weights import average, merge, merge_state_dicts
from modicum.weights.kernels.compare import refuse_overflow
from support import measured
from weights.conftest import write_model
from weights.test_merging import REQUIRED, number_of_experts

NAME = "model.layers.0.mlp.up_proj.weight"
SURVEYS = [("ties", {"density": 0.5, "trim_scope": "model"})]
METHODS = [(name, REQUIRED.get(name, {})) for name in merge_method] + SURVEYS


def models(method: str, *, level: float = 0.0) -> list[dict[str, Tensor]]:
    """Return a base and its experts."""
    rng = torch.Generator().manual_seed(0)
    return [
        {NAME: level + torch.randn(6, 6, generator=rng), "model.norm.weight": level + torch.rand(6, generator=rng)}
        for _ in range(1 + number_of_experts(method, 2))
    ]


@pytest.mark.parametrize(("method", "knobs"), METHODS, ids=str)
def test_an_overflow_of_the_cast_is_refused(method: str, knobs: dict[str, object]) -> None:
    base, *experts = models(method, level=1e6)
    with pytest.raises(
        CheckpointError, match=rf"'model.*': ({method}|linear) gives \d+ values that are NaN or infinite in float16"
    ):
        merge_state_dicts(base, experts, method=method, dtype="float16", statistics=measured(method, experts), **knobs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("method", "knobs"), METHODS, ids=str)
def test_an_input_that_is_not_finite_is_refused(method: str, knobs: dict[str, object], value: float) -> None:
    base, *experts = models(method)
    statistics = measured(method, experts)
    experts[-1][NAME][2, 3] = value
    with pytest.raises(CheckpointError, match=f"'{NAME}' has 1 values that are NaN or infinite"):
        merge_state_dicts(base, experts, method=method, statistics=statistics, **knobs)


@pytest.mark.parametrize("knobs", [{}, {"weights": [0.0, 1.0]}, {"scale": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", [name for name in merge_method if "propagates" in merge_method[name].facts.laws])
def test_large_tensors_are_looked_at_in_the_result_or_one_by_one(
    method: str, dtype: torch.dtype, knobs: dict[str, list[float]]
) -> None:
    """The compiled passes see no model but through its result; a weight of 0 would hide it there."""
    count = number_of_experts(method, 2)
    known = merge_method[method].function.__kwdefaults__ or {}
    chosen = {name: value for name, value in knobs.items() if name in known}
    for which in range(1 + count):
        base, *experts = [{NAME: torch.ones(300, 256, dtype=dtype)} for _ in range(1 + count)]
        [base, *experts][which][NAME][299, 255] = -math.inf
        with pytest.raises(CheckpointError, match=f"tensor '{NAME}' has 1 values that are NaN or infinite"):
            merge_state_dicts(base, experts, method=method, **chosen)


@pytest.mark.parametrize("method", [name for name in merge_method if merge_method[name].facts.statistics])
def test_statistics_that_are_not_finite_are_refused(method: str) -> None:
    base, *experts = models(method)
    statistics = measured(method, experts)
    statistics[1][NAME][0, 0] = math.nan
    with pytest.raises(CheckpointError, match=f"'{NAME}' has 1 values that are NaN or infinite"):
        merge_state_dicts(base, experts, method=method, statistics=statistics)


@pytest.mark.parametrize(("method", "knobs"), METHODS, ids=str)
def test_numbers_near_the_largest_come_out_finite_or_not_at_all(method: str, knobs: dict[str, object]) -> None:
    base, *experts = ({name: 3e38 * tensor.sign() for name, tensor in model.items()} for model in models(method))
    try:
        merged = merge_state_dicts(base, experts, method=method, statistics=measured(method, experts), **knobs)
    except CheckpointError as error:
        assert f"tensor {NAME!r}" in str(error) or "tensor 'model.norm.weight'" in str(error)
    else:
        assert all(tensor.isfinite().all() for tensor in merged.values())


def test_nothing_is_left_of_a_merge_or_an_average_that_overflows(tmp_path: Path) -> None:
    folders = [write_model(tmp_path / str(i), model) for i, model in enumerate(models("linear", level=1e6))]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="linear gives"):
        merge(None, folders, tmp_path / "out", method="linear", dtype="float16")
    with pytest.raises(CheckpointError, match="they reach 1e"):
        average(folders, tmp_path / "out", method="uniform", dtype="float16")
    assert sorted(tmp_path.iterdir()) == before


def test_what_overflows_is_told_with_its_size_and_a_way_out() -> None:
    made = torch.tensor([1.0, -1e5])
    with pytest.raises(CheckpointError, match=r"gives 1 values .* up to 6.55e\+04; they reach 1e\+05. Choose"):
        refuse_overflow("w", made.half(), method="ties", made=made)
    with pytest.raises(CheckpointError, match="'w': ties gives 1 values .* in float32. Lower the method's scale"):
        refuse_overflow("w", torch.tensor([math.nan]), method="ties")
    refuse_overflow("w", torch.tensor([1]), method="ties")
    refuse_overflow("w", made, method="ties")
