"""How tensors of a mean move: adapters by their products are the same models folded, whatever the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.weights import Checkpoint, average_state_dicts, search
from modicum.weights.averageable import aliases, parts_of
from modicum.weights.motion import Products, Still, Stored, motions
from modicum.weights.search import Landscape

SHAPES = {"a": (6, 5), "b": (4, 6), "c": (3,), "d": (7, 2)}


def bowl(weights: dict[str, Tensor], target: float) -> Tensor:
    return torch.stack([(w - target).pow(3).abs().sum() for w in weights.values()]).sum()


@pytest.fixture
def adapters(tmp_path: Path) -> list[Checkpoint]:
    """Three adapters of one base: of several ranks, one of which leaves a weight alone and one of which stores one."""
    rng = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    (tmp_path / "base").mkdir()
    save_file({name: t.to(torch.bfloat16) for name, t in base.items()}, tmp_path / "base/model.safetensors")
    for number, rank in enumerate((2, 3, 1)):
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir()
        tensors = {}
        for name in ("a", "b") if number != 1 else ("a",):
            rows, columns = SHAPES[name]
            tensors[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(rank, columns, generator=rng)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=rng)
        tensors["base_model.model.d.weight"] = torch.randn(7, 2, generator=rng)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "r": rank, "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return [Checkpoint(tmp_path / f"adapter-{i}") for i in range(3)]


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
def test_products_move_as_the_folded_weights_do(adapters: list[Checkpoint], weights: list[float]) -> None:
    kinds = {name: type(motion) for name, motion in motions(adapters, parts_of(adapters)).items()}
    assert kinds == {"a.weight": Products, "b.weight": Products, "c.weight": Still, "d.weight": Stored}
    folded = [{name: model[name].float() for name in model} for model in adapters]
    ours, theirs = Landscape(bowl, adapters, [0.5, 1.0]), Landscape(bowl, folded, [0.5, 1.0])
    assert ours.value(weights) == pytest.approx(theirs.value(weights), rel=1e-5)
    a, b = ours.gradient(weights), theirs.gradient(weights)
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    # What does not move adds the same to every slope.
    torch.testing.assert_close(a[1] - a[1].mean(), b[1] - b[1].mean(), rtol=1e-4, atol=1e-3)


def test_an_adapter_that_is_not_finite_is_named(adapters: list[Checkpoint]) -> None:
    adapters[1].adapter.factors["a.weight"].B[0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="adapter-1.*NaN"):
        Landscape(bowl, adapters, [0.5]).check_finite()


def test_threads_and_one_thread_make_the_same_mean_and_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    known = [{f"{i}": torch.randn(300, 40, generator=rng) for i in range(5)} for _ in range(4)]
    expected = Landscape(bowl, known, [0.5]).gradient([0.25] * 4)
    monkeypatch.setattr(search, "LARGE", 0)
    monkeypatch.setattr(search, "cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = Landscape(bowl, known, [0.5]).gradient([0.25] * 4)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_names_that_share_a_tensor_everywhere_are_one_weight() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    known = [{"a": one, "b": one, "c": one.clone()}, {"a": two, "b": two, "c": two.clone()}]
    assert aliases(known) == {"b": "a"}
    apart = [known[0], {"a": two, "b": two.clone(), "c": two.clone()}]
    assert aliases(apart) == {}
    seen: list[int] = []

    def loss(weights: dict[str, Tensor], _: int) -> Tensor:
        seen.append(len({w.data_ptr() for w in weights.values()}))
        return weights["a"].sum() + weights["b"].sum() + weights["c"].sum()

    _, slope = Landscape(loss, known, [0]).gradient([0.5, 0.5])
    assert seen == [2] and slope.tolist() == [6.0, 0.0]
    made, _ = average_state_dicts(known, method="uniform")
    assert made["a"].data_ptr() == made["b"].data_ptr() != made["c"].data_ptr()
