"""Merge methods called by hand, without the checks that a merge of models makes first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.errors import ModicumError
from modicum.registry import merge_method
from modicum.weights import merge_state_dicts, methods
from modicum.weights.kernels import fused
from modicum.weights.methods import dare, linear, resm, ties, tsv

KNOBS: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 0.5},
    "dare": {"density": 0.5},
    "della": {"density": 0.5},
    "nearswap": {"t": 0.1},
    "slerp": {"t": 0.3},
    "ties": {"density": 0.5},
}


def draw(*shape: int, n: int) -> tuple[Tensor, list[Tensor]]:
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=rng) for _ in range(n + 1)]
    return tensors[0], tensors[1:]


@pytest.mark.parametrize("name", [n for n, entry in merge_method.items() if not entry.facts.statistics])
@pytest.mark.parametrize("least", [0, 1 << 60])
def test_parameters_of_a_model_are_merged_like_tensors(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST", least)
    facts, method = merge_method[name].facts, getattr(methods, name)
    base, experts = draw(6, 4, n=1 if facts.two or facts.most == 1 else 2)
    plain = method(base, experts, **KNOBS.get(name, {}))
    learnt = method(torch.nn.Parameter(base), [torch.nn.Parameter(e) for e in experts], **KNOBS.get(name, {}))
    assert torch.equal(plain, learnt) and not learnt.requires_grad


@pytest.mark.parametrize("name", ["breadcrumbs", "dare", "della", "ties"])
@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), [0.5, 2.0]])
def test_a_density_outside_its_range_is_refused(name: str, density: Any) -> None:
    base, experts = draw(8, n=2)
    with pytest.raises(ModicumError, match="density"):
        getattr(methods, name)(base, experts, density=density)
    with pytest.raises(TypeError, match="density"):
        getattr(methods, name)(base, experts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: methods.task_arithmetic(w, []), "there are no experts"),
        (lambda w: methods.task_arithmetic(None, [w]), "task_arithmetic needs a base"),
        (
            lambda w: methods.task_arithmetic(w, [torch.ones(2, 2)]),
            r"experts\[0\] has shape \[2, 2\], expected \[3, 3\]",
        ),
        (lambda w: linear(None, [w, w], weights=[1.0]), "weights has 1 values for 2 experts"),
        (lambda w: ties(w, [w, w], density=[0.5]), "density has 1 values for 2 experts"),
        (lambda w: methods.slerp(w, [w], t=1.5), "t: .*got 1.5"),
        (lambda w: resm(w, [w, 2 * w], ranks=[2, 2]), r"ranks are \[2, 2\], 4 together.*only 3 singular vectors"),
        (lambda w: resm(w, [w, 2 * w], ranks=[1]), "ranks has 1 values for 2 experts, expected one for each"),
        (lambda w: resm(w, [w, 2 * w], weights=[1.0]), "weights has 1 values for 2 experts, expected one for each"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(call: Any, message: str) -> None:
    with pytest.raises(ModicumError, match=message) as error:
        call(torch.ones(3, 3))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 3.0]), np.array([1.0, 3.0]), (1.0, 3.0)])
def test_weights_may_stand_in_tensors_and_arrays(weights: Any) -> None:
    _, experts = draw(5, n=2)
    assert torch.equal(linear(None, experts, weights=weights), linear(None, experts, weights=[1.0, 3.0]))


@pytest.mark.parametrize("density", [0.3, 0.05, 0.001])
def test_dare_divides_by_the_density_itself(density: float) -> None:
    base, expert = torch.zeros(1 << 16), torch.ones(1 << 16)
    runs = [dare(base, [expert], density=density, generator=torch.Generator().manual_seed(s)) for s in range(40)]
    kept = torch.cat([run[run != 0] for run in runs])
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / density))
    n = 40 * len(base)
    assert abs(len(kept) - density * n) < 5 * (density * n) ** 0.5


def test_weights_and_ranks_of_resm_may_be_given() -> None:
    base, experts = draw(12, 9, n=3)
    assert torch.equal(resm(base, experts, weights=[1.0] * 3, ranks=[3] * 3), tsv(base, experts))
    assert torch.equal(resm(base, experts, weights="none", ranks="uniform"), tsv(base, experts))
    same = [resm(base, experts, ranks=ranks) for ranks in ("mean-preserving", "mean_preserving")]
    assert torch.equal(*same)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_weights_along_an_axis_are_those_of_its_lines(axis: str) -> None:
    _, deltas = draw(12, 9, n=3)
    found = methods.outlier_weights(deltas, alpha=1.0, axis=axis)
    lines = [delta.T if axis == "column" else delta for delta in deltas]
    for i, same in enumerate(zip(*lines)):
        alone = methods.outlier_weights(same, alpha=1.0)
        assert [float(weights.flatten()[i]) for weights in found] == pytest.approx(alone)
    whole = resm(torch.zeros(12, 9), deltas, axis=axis, sigmas=1.0, ranks="uniform")
    weighed = [delta * weights for delta, weights in zip(deltas, found)]
    torch.testing.assert_close(whole, tsv(torch.zeros(12, 9), weighed))
    assert torch.isfinite(resm(torch.zeros(12, 9), deltas, axis=axis, outliers="mitigate")).all()


def test_pieces_of_methods_stand_beside_them() -> None:
    stack = torch.eye(4)[:, :2]
    torch.testing.assert_close(methods.inv_sqrt_polar(stack, rtol=0), stack)
    assert methods.task_interference([torch.diag(torch.tensor([2.0, 0])), torch.diag(torch.tensor([0, 1.0]))]) == 0
    assert len(methods.truncated_svd(torch.eye(3), 2).S) == 2 and callable(methods.rank_plan)


@pytest.mark.parametrize(
    ("base", "experts", "message"),
    [
        ({"w": torch.ones(1)}, {"w": torch.ones(1)}, r"experts\[0\] is of type str, expected a dictionary"),
        ([torch.ones(1)], [{"w": torch.ones(1)}], "base is of type list, expected a dictionary"),
        ({"w": 1.0}, [{"w": torch.ones(1)}], "base: entry 'w' is of type float"),
        ({"q.qweight": torch.ones(1)}, [{"q.qweight": torch.ones(1)}], "base is quantised"),
    ],
)
def test_what_is_no_dictionary_of_weights_is_named(base: Any, experts: Any, message: str) -> None:
    with pytest.raises(ModicumError, match=message):
        merge_state_dicts(base, experts, method="linear")
