"""Averages of a model that FSDP2 shards over two processes, with dimensions of odd size, are those of one process."""

import torch
import torch.distributed as dist
from torch import nn

from modicum.weights import Snapshots, average_state_dicts
from modicum.weights.moving import MovingAverage
from pairs import in_two_processes

STEPS = 6


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def train(model, rows, watch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 5, generator=g)[rows], torch.randn(8, 3, generator=g)[rows]
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for look in watch:
            look(step)


def averages(model):
    return MovingAverage(model, decay=0.8), Snapshots(model, keep=3)


def whole(model):
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in model.named_parameters()}


def worker(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    one, two = net(), net()
    for layer in (two[0], two[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(two, mesh=mesh)
    ema_one, ring_one = averages(one)
    ema_two, ring_two = averages(two)
    train(one, slice(None), [lambda _: ema_one.update(), ring_one.take])
    train(two, slice(4 * rank, 4 * rank + 4), [lambda _: ema_two.update(), ring_two.take])
    with CommDebugMode() as counted:
        ema_two.update()
        ring_two.take(STEPS)
    ema_one.update()
    ring_one.take(STEPS)
    assert counted.get_total_counts() == 0, "nothing is gathered"
    assert ring_two.states()[-1]["0.weight"].shape == (4 if rank == 0 else 3, 5)
    with ema_one.in_place(), ema_two.in_place():
        for (name, a), b in zip(whole(one).items(), whole(two).values()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    # The mean of the local shards is the shard of the mean.
    expected, _ = average_state_dicts(ring_one.states(), method="uniform")
    mean, _ = average_state_dicts(ring_two.states(), method="uniform")
    for name, parameter in two.named_parameters():
        with torch.no_grad():
            parameter.to_local().copy_(mean[name])
        torch.testing.assert_close(parameter.full_tensor().detach(), expected[name], rtol=1e-5, atol=1e-6)
    # Taken from the memory of each process, everything is as it was.
    again, ring = averages(two)
    again.load_state_dict(ema_two.state_dict())
    ring.load_state_dict(ring_two.state_dict())
    assert all(torch.equal(t, ema_two.state_dict()[key]) for key, t in again.state_dict().items())
    assert ring.steps == ring_two.steps


def test_two_processes_average_as_one():
    in_two_processes(worker)
