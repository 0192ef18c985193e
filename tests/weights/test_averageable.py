"""What a mean is of: statistics, buffers, ties, packed numbers, factors, and what is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modicum.errors import ModicumError
from modicum.weights import Checkpoint, Snapshots, average, average_state_dicts
from modicum.weights.average import choose
from modicum.weights.search import Landscape

State = dict[str, Tensor]


def bowl(weights: State, target: float) -> Tensor:
    return (weights["w"] - target).square().sum()


def toys(*points: float, **more: Tensor) -> list[State]:
    return [{"w": torch.tensor([x]), **{name: t.clone() for name, t in more.items()}} for x in points]


def folders(root: Path, states: list[State]) -> list[Path]:
    for i, state in enumerate(states):
        (root / str(i)).mkdir(parents=True)
        save_file(state, root / str(i) / "model.safetensors")
    return [root / str(i) for i in range(len(states))]


@pytest.mark.parametrize("exclude", [None, "running|tracked", "^0"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_search_writes_to_no_checkpoint(tmp_path: Path, exclude: str | None, on_disk: bool) -> None:
    model: Any = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    states: list[State] = []
    for step in range(3):
        nn.init.constant_(model[1].weight, step)
        model[0](torch.randn(8, 2) + step)
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    before = [{name: t.clone() for name, t in state.items()} for state in states]

    def loss(weights: State, batch: Tensor) -> Tensor:
        assert model.training
        mean: Tensor = torch.func.functional_call(model, weights, (batch,)).square().mean()
        return mean

    given: dict[str, Any] = {"loss": loss, "batches": [torch.randn(8, 2) + 9], "exclude": exclude, "k": 2, "iters": 4}
    if on_disk:
        known = [Checkpoint(folder) for folder in folders(tmp_path, states)]
        found = average(known, tmp_path / "out", method="sewa", progress=False, **given)
        made, states = load_file(tmp_path / "out/model.safetensors"), [dict(state) for state in known]
    else:
        made, found = average_state_dicts(states, method="sewa", **given)
    assert all(torch.equal(old[name], state[name]) for old, state in zip(before, states) for name in old)
    latest = 2 if exclude else max(i for i, c in enumerate(found) if c)
    assert torch.equal(made["0.running_mean"], before[latest]["0.running_mean"])


@pytest.mark.parametrize("name", ["q.lora_A.weight", "model.q.lora_B.default.weight", "e.lora_embedding_A.x"])
def test_factors_of_adapters_are_not_averaged_one_by_one(name: str) -> None:
    states = [{name: torch.full((1, 1), x), "w": torch.tensor([x])} for x in (1.0, -1.0)]
    wanted: list[dict[str, Any]] = [{"method": "uniform"}, {"method": "greedy", "loss": bowl, "batches": [0.2]}]
    for given in wanted:
        with pytest.raises(ModicumError, match="factor of an adapter.*job: average, output: lora") as error:
            average_state_dicts(states, **given)
        assert "\n" not in str(error.value)
    assert average_state_dicts(states, method="last")[0]["w"] == -1
    assert average_state_dicts(states, method="best", loss=bowl, batches=[1.0])[0]["w"] == 1


def test_both_losses_of_the_guard_are_finite_or_the_checkpoint_is_named() -> None:
    def broken(weights: State, batch: float) -> Tensor:
        return bowl(weights, batch) if batch >= 0 else bowl(weights, batch) * float("nan")

    with pytest.raises(ModicumError, match=r"loss of checkpoints\[0\] on the held-out data is not finite"):
        average_state_dicts(toys(0.0, 1.0, 2.0), method="best", loss=broken, batches=[0.0], held_out=[-1.0])

    def apart(weights: State, batch: float) -> Tensor:
        whole = float(weights["w"]) in (0.0, 1.0, 2.0, 3.0)
        return bowl(weights, batch) if whole or batch >= 0 else torch.tensor(torch.inf)

    with pytest.raises(ModicumError, match="Neither what greedy chose nor the plain mean of the last 2"):
        average_state_dicts(toys(0.0, 1.0, 2.0, 3.0), method="greedy", loss=apart, batches=[0.5], held_out=[-1.0])


def test_what_is_no_weight_and_what_comes_with_the_weights_is_of_the_newest_that_counts(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([float(i)]), "n": torch.tensor(i)} for i in range(3)]
    places = folders(tmp_path / "in", states)
    for i, place in enumerate(places):
        (place / "generation_config.json").write_text(f'{{"temperature": {i + 1}}}')
    average(places, tmp_path / "out", method="wsm", decay=[1.0, 0.5], progress=False)  # shares 0, 0.5, 0.5
    average(places[:2], tmp_path / "two", progress=False)
    for out, newest in (("out", 2), ("two", 1)):
        assert load_file(tmp_path / out / "model.safetensors")["n"] == newest
        assert f'"temperature": {newest + 1}' in (tmp_path / out / "generation_config.json").read_text()


def test_several_dtypes_need_a_dtype() -> None:
    states = [{"w": torch.ones(2, dtype=kind)} for kind in (torch.float16, torch.float32)]
    with pytest.raises(ModicumError, match=r"checkpoints\[0\]: tensor 'w' is torch.float16.*Set dtype"):
        average_state_dicts(states, method="last")
    assert average_state_dicts(states, method="uniform", dtype="float32")[0]["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("q.qweight", torch.ones(2, 2, dtype=torch.int32), "quantised"),
        ("q.weight", torch.ones(2, 2, dtype=torch.int32), "int32 and differs"),
        ("q.weight", torch.ones(4, dtype=torch.uint8), "uint8 and differs"),
        ("q.weight", torch.ones(4, dtype=torch.int8), "int8 and differs"),
        ("q.weight", torch.ones(4, dtype=torch.complex64), "complex64 and differs"),
        ("q.weight", torch.ones(4, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_packed_and_unusual_numbers_are_refused(name: str, tensor: Tensor, message: str) -> None:
    states = toys(0.0, 1.0, **{name: tensor})
    states[1][name] = torch.zeros_like(tensor)
    wanted: list[dict[str, Any]] = [{"method": "uniform"}, {"method": "best", "loss": bowl, "batches": [1.0]}]
    for given in wanted:
        with pytest.raises(ModicumError, match=rf"tensor '{name}'.*{message}.*cannot be averaged") as error:
            average_state_dicts(states, **given)
        assert "\n" not in str(error.value)


def test_integers_that_are_alike_and_counters_are_no_packed_weights() -> None:
    states = toys(0.0, 1.0, index=torch.arange(4, dtype=torch.int32), seen=torch.zeros(3, dtype=torch.int64))
    states[1]["seen"] += 5
    made, _ = average_state_dicts(states, method="uniform")
    assert made["seen"].tolist() == [5, 5, 5] and made["w"] == 0.5


class Quantised(nn.Module):
    """A module with a floating buffer that no name gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.register_buffer("codebook", torch.zeros(2))


def test_buffers_are_not_averaged_where_they_are_known(tmp_path: Path) -> None:
    model = Quantised()
    snapshots = Snapshots(model)
    for step in range(3):
        nn.init.constant_(model.w, step)
        model.codebook.fill_(step)  # type: ignore[operator]
        snapshots.take(step)
    made, _ = average_state_dicts(snapshots.states(), method="uniform")
    assert made["w"] == 1 and made["codebook"].tolist() == [2, 2]
    again = Snapshots(Quantised())
    torch.save(snapshots.state_dict(), tmp_path / "snapshots.pt")
    again.load_state_dict(torch.load(tmp_path / "snapshots.pt", weights_only=True))
    assert again.states()[0].buffers == {"codebook"}
    plain = [dict(state) for state in snapshots.states()]
    assert average_state_dicts(plain, method="uniform")[0]["codebook"].tolist() == [1, 1]
    assert average_state_dicts(plain, method="uniform", buffers=["codebook"])[0]["codebook"].tolist() == [2, 2]
    average(folders(tmp_path / "in", plain), tmp_path / "out", buffers=["codebook"], progress=False)
    assert load_file(tmp_path / "out/model.safetensors")["codebook"].tolist() == [2, 2]
    seen: list[list[float]] = []

    def loss(weights: State, batch: float) -> Tensor:
        seen.append(weights["codebook"].tolist())
        return bowl(weights, batch)

    average_state_dicts(snapshots.states(), method="best", loss=loss, batches=[1.0])
    assert [x for x, _ in seen[:3]] == [0, 1, 2]


def test_a_checkpoint_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    a, b = folders(tmp_path / "in", toys(0.0, 1.0))
    with pytest.raises(ModicumError, match="among the checkpoints twice"):
        average([a, str(a) + "/", b], tmp_path / "out", progress=False)


def test_what_excludes_one_name_of_a_tie_excludes_the_tensor() -> None:
    states = toys(0.0, 1.0, b=torch.ones(1))
    for state in states:
        state["head"] = state["w"]
    made, _ = average_state_dicts(states, method="uniform", exclude="^head$")
    assert made["w"] == made["head"] == 1
    with pytest.raises(ModicumError, match="exclude .* leaves no weight"):
        Landscape(bowl, [{k: s[k] for k in ("w", "head")} for s in states], [0.0], exclude="head").gradient([0.5, 0.5])


def test_a_buffer_that_one_checkpoint_lacks_is_left_out() -> None:
    states = toys(0.0, 1.0)
    states[0]["rotary.inv_freq"] = torch.ones(3)
    for order in (states, states[::-1]):
        made, _ = average_state_dicts(order, method="best", loss=bowl, batches=[1.0])
        assert set(made) == {"w"} and made["w"] == 1


def endless() -> Iterator[float]:
    yield 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": endless()}, r"batches is a generator.*list\(batches\)"),
        ({"batches": torch.utils.data.DataLoader([1.0, 2.0])}, "batches is a DataLoader"),  # type: ignore[arg-type]
        ({"batches": [1.0], "held_out": endless()}, "held_out is a generator"),
        ({"batches": [1.0], "loss": lambda w, _: float(0 * w["w"].sum()) + 3}, "is the same number"),
        ({"batches": [1.0], "method": "greedy", "loss": lambda w, _: float(0 * w["w"].sum())}, "is the same number"),
        ({"method": "wsm", "decay": [1.0, 0.5, 0.2, 0.1]}, "4 values for 3 checkpoints.*save_total_limit"),
    ],
)
def test_wrong_requests_are_one_clear_line(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"method": "best", "loss": bowl} | changes
    with pytest.raises(ModicumError, match=message) as error:
        average_state_dicts(toys(0.0, 1.0, 3.0), **given)
    assert "\n" not in str(error.value)


def test_what_is_no_tensor_or_not_finite_is_named_where_it_is_not_used_too(tmp_path: Path) -> None:
    states: list[Any] = toys(0.0, 1.0)
    with pytest.raises(ModicumError, match=r"checkpoints\[1\]: entry 'step' is of type int"):
        average_state_dicts([states[0], states[1] | {"step": 3}], method="last")
    broken = toys(float("nan"), 1.0)
    with pytest.raises(ModicumError, match=r"checkpoints\[0\].*NaN"):
        average_state_dicts(broken, method="last")
    with pytest.raises(ModicumError, match=r"checkpoints\[1\].*NaN"):
        average_state_dicts([*toys(0.0), *broken], method="wsm", decay=[1.0, 0.5])
    with pytest.raises(ModicumError, match="in/0.*NaN"):
        average(folders(tmp_path / "in", broken), tmp_path / "out", method="last", progress=False)
    assert not (tmp_path / "out").exists()


def test_each_search_is_charged_what_it_asks_for_alone() -> None:
    known = toys(0.0, 1.0, 3.0)
    landscape = Landscape(bowl, known, [1.0, 2.0])
    passes = [choose(known, method="best", landscape=landscape, fallback=False).passes for _ in range(2)]
    assert passes == [{"values": 6, "gradients": 0}] * 2


def test_a_slope_does_not_fold_the_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.ones(2, 2)}, tmp_path / "base/model.safetensors")
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        factors = {f"base_model.model.q.lora_{side}.weight": torch.ones(2, 2) + i for side in "AB"}
        save_file(factors, tmp_path / str(i) / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base"), "r": 2, "lora_alpha": 2}
        (tmp_path / str(i) / "adapter_config.json").write_text(json.dumps(config))
    known = [Checkpoint(tmp_path / str(i)) for i in range(2)]
    landscape = Landscape(lambda weights, _: weights["q.weight"].square().sum(), known, [0])
    read: list[str] = []
    real = Checkpoint.__getitem__

    def counted(self: Checkpoint, name: str) -> Tensor:
        read.append(self.name)
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "__getitem__", counted)
    landscape.gradient([0.5, 0.5])
    assert set(read) == {known[0].base.name}
