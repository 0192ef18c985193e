"""The plan refuses what the merge would: knobs that a method rejects are found before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import ModicumError
from modicum.registry import merge_method
from modicum.weights import merge_state_dicts
from modicum.weights.merge import run_step, survey
from modicum.weights.plan import Plan, plan_merge
from modicum.weights.rehearsal import rehearse

VALUES = [None, True, False, 0, 1, 2, -1, 0.0, 0.1, 0.5, 0.99, 1.0, 1e-9, [1.0], [0.0, 0.0], [1.0, -1.0], [0.3, 0.7],
          [0.0, 0.0, 0.0], [0.2, 0.5, 1.0], "none", "l1", "ties"]  # fmt: skip
METHODS = [name for name, entry in merge_method.items() if not entry.facts.statistics]


def models(n: int) -> list[dict[str, torch.Tensor]]:
    noise = torch.Generator().manual_seed(0)
    return [{"x.weight": torch.randn(4, 3, generator=noise), "b": torch.randn(3, generator=noise)} for _ in range(n)]


def planned(method: str, n: int, based: bool, knobs: dict[str, Any]) -> Plan | None:
    base, *experts = models(n + 1)
    try:
        return plan_merge(base if based else None, experts, method=method, knobs=knobs)
    except ModicumError as error:
        assert str(error)
        return None


@pytest.mark.parametrize("method", METHODS)
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_what_passes_the_plan_is_not_refused_by_the_merge(method: str, data: st.DataObject) -> None:
    entry = merge_method[method]
    knobs = {}
    for knob, field in entry.schema.model_fields.items():
        if field.is_required() or data.draw(st.booleans()):
            knobs[knob] = data.draw(st.sampled_from(VALUES), label=knob)
    plan = planned(method, data.draw(st.integers(1, 3)), data.draw(st.booleans()), knobs)
    found = survey(plan) if plan else {}
    for step in plan.steps if plan else ():
        run_step(step, found=found.get(step.name, {}))


@pytest.mark.parametrize(
    ("method", "knobs", "n"),
    [
        ("linear", {"weights": [1.0, -1.0]}, 2),
        ("linear", {"weights": [1.0]}, 2),
        ("nuslerp", {"weights": [0.0, 0.0]}, 2),
        ("multislerp", {"weights": [1.0, -1.0]}, 2),
        ("task_arithmetic", {"weights": [1.0, 2.0, 3.0]}, 2),
        ("ties", {"density": [0.5, 0.5, 0.5]}, 2),
        ("della", {"density": 0.9, "epsilon": 0.3}, 2),
        ("slerp", {"t": 0.5}, 3),
    ],
)
def test_the_plan_refuses_knobs_that_only_the_method_knows_to_be_wrong(
    method: str, knobs: dict[str, Any], n: int
) -> None:
    assert planned(method, n, merge_method[method].facts.base or method == "slerp", knobs) is None


def test_the_tensor_is_named_where_knobs_differ_from_tensor_to_tensor() -> None:
    base, *experts = models(3)
    steps = [
        step
        for weights in ([1.0, 0.0], [1.0, -1.0])
        for step in plan_merge(None, experts, method="linear", knobs={"weights": [1.0, 0.0]}).steps[:1]
        for step in [type(step)(**{**vars(step), "knobs": {**step.knobs, "weights": weights}})]
    ]
    with pytest.raises(ModicumError, match=r"x\.weight: linear: the weights"):
        rehearse(steps)
    assert merge_state_dicts(base, experts, method="task_arithmetic")
