"""Every method on an accelerator gives what it gives on the processor, up to rounding; run by hand with ``-m gpu``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradient_laws
import merge_laws
import objective_laws
import pytest
import torch
from adapter_laws import start
from hypothesis import strategies as st
from laws import default_knobs
from torch import Tensor, nn
from zeroth_order_laws import Bowl

from modicum.registry import Entry, adapter_init, gradient_rule, merge_method, objective, policy, zeroth_order
from modicum.submodular import FacilityLocation, metropolis_weights, ring
from modicum.weights import merge_state_dicts

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The rank is larger")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on which this rehearses itself


def each(table: Any) -> Any:
    return pytest.mark.parametrize("name", sorted(table))


def first(strategy: st.SearchStrategy[Any]) -> Any:
    """Stand in for Hypothesis' draw: of each strategy a fixed example."""
    from hypothesis import Phase, given, settings

    kept: list[Any] = []

    @settings(max_examples=1, phases=[Phase.generate], database=None, derandomize=True)
    @given(strategy)
    def look(value: Any) -> None:
        kept.append(value)

    look()
    return kept[0]


def moved(value: Any, device: str) -> Any:
    """Return a structure whose tensors lie on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    return type(value)(moved(part, device) for part in value) if isinstance(value, list | tuple) else value


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().cpu()]
    if isinstance(value, bool | int | float):
        return [torch.tensor(float(value))]
    if isinstance(value, Mapping):
        return [number for part in value.values() for number in tensors(part)]
    return [number for part in value for number in tensors(part)] if isinstance(value, Sequence) else []


def same(work: Callable[[str], Any], *, times: float = 1.0) -> None:
    """Compare what ``work`` makes on the processor and on the accelerator."""
    expected, found = tensors(work("cpu")), tensors(work(DEVICE))
    assert expected and len(found) == len(expected)
    for a, b in zip(found, expected):
        tolerance = times * {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(b.dtype, 1e-4)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each(merge_method)
def test_merges(name: str, dtype: torch.dtype) -> None:
    entry = merge_method[name]
    rng = torch.Generator().manual_seed(0)
    count = 1 if entry.facts.two else min(3, entry.facts.most or 3)
    shapes = {"m.weight": (48, 40), "m.bias": (48,), "t.weight": (600, 400)}
    base = {key: torch.randn(shape, generator=rng).to(dtype) for key, shape in shapes.items()}
    experts = [
        {key: (value + 0.1 * torch.randn(value.shape, generator=rng)).to(dtype) for key, value in base.items()}
        for _ in range(count)
    ]
    told = (
        [
            {key: merge_laws._statistics(entry, value, rng) for key, value in base.items() if value.ndim > 1}
            for _ in experts
        ]
        if entry.facts.statistics
        else []
    )
    values = default_knobs(entry)
    same(
        lambda device: merge_state_dicts(base, experts, method=name, device=device, statistics=told, **values), times=10
    )


@pytest.mark.parametrize("worlds", [(), (3,)])
@each(policy)
def test_policies(name: str, worlds: tuple[int, ...]) -> None:
    entry, blocks = policy[name], [2, 3, 2, 4]

    def play(device: str) -> list[Tensor]:
        offered = {
            "W": metropolis_weights(ring(4)).to(device),
            "horizon": 8,
            "order": None,
            "seed": list(range(worlds[0])) if worlds else 0,
            "device": device,
        }
        given = {key: value for key, value in offered.items() if key in entry.facts.supplied}
        if "device" in inspect.signature(entry.function).parameters:
            given["device"] = device
        made = entry.function(blocks, **given, **default_knobs(entry))
        found = []
        for number in range(6):
            rng = torch.Generator().manual_seed(number)
            values = torch.rand(*worlds, 4, made.n, generator=rng, dtype=torch.float64).to(device)
            f = FacilityLocation(values)
            found.append(made.act(f if entry.facts.hints == "truth" else None))
            made.update(f)
        return [*found, made.probabilities()]

    same(play)


@each(objective)
def test_objectives(name: str) -> None:
    entry = objective[name]
    kind = entry.facts.acts_on
    drawn = {"answers": objective_laws.answers, "pairs": objective_laws.preferences}
    by_batch = objective_laws.is_of_batches(entry)
    data = drawn.get(kind, objective_laws.batch if by_batch else objective_laws.contrasts)(first)
    values = objective_laws.chosen(entry, first)
    same(lambda device: objective_laws.apply(entry, moved(data, device), values))


@each(gradient_rule)
def test_gradient_rules(name: str) -> None:
    entry = gradient_rule[name]
    rng = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    weights = {f"w{i}": torch.randn(shape, generator=rng) for i, shape in enumerate(shapes)}
    series = [
        {key: 10.0 ** (step % 3) * torch.randn(w.shape, generator=rng) for key, w in weights.items()}
        for step in range(6)
    ]
    values = gradient_laws.quick(entry, first)

    def run(device: str) -> Any:
        seen = gradient_laws.Run(moved(weights, device), moved(series, device)).watch(entry, values, resume_at=3)
        return [step.update for step in seen]

    same(run)


@each(zeroth_order)
def test_zeroth_order(name: str) -> None:
    entry = zeroth_order[name]

    def run(device: str) -> dict[str, Tensor]:
        bowl: nn.Module = Bowl().to(device)
        fixed = {"engine": "mutate"} if "engine" in entry.parameters[1] else {}
        optimizer = entry.function(list(bowl.named_parameters()), **default_knobs(entry, **fixed))
        for _ in range(4):
            optimizer.step(bowl)
        if hasattr(optimizer, "settle_"):
            optimizer.settle_()
        return bowl.weights()  # type: ignore[operator]

    same(run)


@each(adapter_init)
def test_adapter_initialisations(name: str) -> None:
    entry: Entry[Any] = adapter_init[name]
    made = start(entry, first, chosen=default_knobs(entry))
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 12, generator=rng)
    inputs = torch.randn(40, 12, generator=rng)
    data = {
        "weight": weight, "gradient": torch.randn(16, 12, generator=rng), "moment": inputs.T @ inputs,
        "A": torch.randn(5, 12, generator=rng), "B": torch.randn(16, 5, generator=rng),
    }  # fmt: skip
    given = made.given | ({"rank": 4} if "rank" in made.given else {})

    def product(device: str) -> Tensor:
        fresh = type(made)(entry, moved(data, device), given)
        A, B = fresh.factors()
        return B @ A  # whose factors are unique up to signs only

    same(product)
