"""Snapshots are owned copies, statistics are taken anew, and averages in memory leave what they are given alone."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from modicum.errors import RecipeError
from modicum.weights import Snapshots, average_state_dicts, refresh_batch_norm
from modicum.weights.files import digest_tensor


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_taken_stays_as_it_was(dtype: torch.dtype) -> None:
    """A state dict holds the live weights: a list of them is a list of one model."""
    torch.manual_seed(0)
    model = Tied().to(dtype)
    snapshots, aliased, expected = Snapshots(model), [], []
    for step in range(4):
        with torch.no_grad():
            snapshots.take(step)
        aliased.append(model.state_dict())
        expected.append({name: digest_tensor(tensor) for name, tensor in model.state_dict().items()})
        trained(model)
    found = [{name: digest_tensor(tensor) for name, tensor in state.items()} for state in snapshots.states()]
    assert found == expected
    assert len({state["embed.weight"] for state in found}) == 4
    assert len({digest_tensor(state["embed.weight"]) for state in aliased}) == 1
    for state in snapshots.states():
        assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
        assert all(not tensor.requires_grad for tensor in state.values())
        assert state["embed.weight"].dtype is dtype
    model.load_state_dict(snapshots.states()[0])


def test_the_oldest_gives_way_and_a_repeated_step_replaces_what_came_after() -> None:
    model = nn.Linear(2, 2)
    snapshots = Snapshots(model, keep=3)
    for step in (1, 2, 3, 4, 5):
        snapshots.take(step)
    assert snapshots.steps == [3, 4, 5] and len(snapshots) == 3
    trained(model)
    snapshots.take(4)
    assert snapshots.steps == [3, 4]
    assert torch.equal(snapshots.states()[-1]["weight"], model.weight)
    with pytest.raises(RecipeError, match="keep is 0"):
        Snapshots(model, keep=0)


def test_the_ring_goes_through_a_file_bit_for_bit() -> None:
    model = Tied()
    snapshots = Snapshots(model, keep=2)
    for step in range(3):
        snapshots.take(step)
        trained(model)
    file = io.BytesIO()
    torch.save(snapshots.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = Snapshots(model, keep=2)
    other.load_state_dict(loaded)
    assert other.steps == [1, 2]
    for a, b in zip(snapshots.states(), other.states()):
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert b["embed.weight"].data_ptr() == b["head.weight"].data_ptr()
    loaded["states"][0]["embed.weight"].zero_()
    assert other.states()[0]["embed.weight"].abs().sum() > 0
    with pytest.raises(RecipeError, match="another model"):
        Snapshots(nn.Linear(2, 2)).load_state_dict(loaded)
    with pytest.raises(RecipeError, match=r"shape \[2, 2\], expected \[3, 2\]"):
        state = {"steps": [0], "states": [nn.Linear(2, 2, bias=False).state_dict()]}
        Snapshots(nn.Linear(2, 3, bias=False)).load_state_dict(state)


def test_averages_in_memory_leave_their_input_alone_and_share_what_is_tied() -> None:
    model, snapshots = Tied(), Snapshots(Tied())
    snapshots = Snapshots(model)
    for step in range(3):
        model.train()
        model.norm(torch.randn(8, 3) + step)
        trained(model)
        snapshots.take(step)
    states = snapshots.states()
    before = [{name: digest_tensor(tensor) for name, tensor in state.items()} for state in states]
    made, _ = average_state_dicts(states, method="uniform")
    mean = torch.stack([state["embed.weight"] for state in states]).mean(0)
    torch.testing.assert_close(made["embed.weight"], mean)
    assert made["embed.weight"].data_ptr() == made["head.weight"].data_ptr()
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(made[name], states[-1][name])
    older, _ = average_state_dicts(states, method="best", loss=near(states[1]), batches=[0])
    assert older["norm.num_batches_tracked"] == 2
    for tensor in [*made.values(), *older.values()]:
        tensor.add_(1)
    assert before == [{name: digest_tensor(tensor) for name, tensor in state.items()} for state in states]


def near(target: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    return lambda weights, _: (weights["embed.weight"] - target["embed.weight"]).square().sum()


def test_a_loss_in_training_mode_does_not_write_to_the_checkpoints() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    snapshots = Snapshots(model)
    for step in range(3):
        trained(model)
        snapshots.take(step)
    states = snapshots.states()
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]

    def loss(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (batch,)).square().mean()

    batches = [torch.randn(8, 2) for _ in range(2)]
    average_state_dicts(states, method="sewa", k=2, iters=5, loss=loss, batches=batches)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, states) for name in a)


def test_statistics_are_plain_means_over_the_batches_and_modes_come_back() -> None:
    torch.manual_seed(0)
    layers = (nn.BatchNorm1d(3, momentum=0.3), nn.Dropout(), nn.BatchNorm1d(3, affine=False))
    model = nn.Sequential(*layers)
    model[1].eval()
    batches = [torch.randn(16, 3) * (i + 1) + i for i in range(4)]
    assert refresh_batch_norm(model, [(batch, "label") for batch in batches]) == 2
    expected = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_mean, expected)
    torch.testing.assert_close(model[0].running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))
    assert [module.training for module in model] == [True, False, True]
    assert model[0].momentum == 0.3 and int(model[0].num_batches_tracked) == 4
    assert refresh_batch_norm(nn.Linear(2, 2), []) == 0
    with pytest.raises(RecipeError, match="no batch"):
        refresh_batch_norm(model, [])


def test_statistics_are_those_of_torch_s_own_update() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    batches = [torch.randn(8, 3) for _ in range(3)]
    refresh_batch_norm(ours, batches)
    torch.optim.swa_utils.update_bn(batches, theirs)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
