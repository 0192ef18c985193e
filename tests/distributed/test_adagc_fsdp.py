"""AdaGC on two processes: FSDP2, DDP and tensor parallelism give what one process gives."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from modicum.optim import AdaGC
from modicum.optim.gradient.gradients import tensor_norms
from pairs import in_two_processes

STEPS, KNOBS = 7, {"warmup": 3, "relative": 1.1}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.LayerNorm(3))


def data(step):
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=g) * (10 if step == 5 else 1), torch.randn(8, 3, generator=g)


def train(model, rows, clipper):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    clipper.attach(optimizer)
    for step in range(STEPS):
        x, y = (part[rows] for part in data(step))
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def one_process():
    model = net()
    clipper = AdaGC(model.named_parameters(), **KNOBS)
    train(model, slice(None), clipper)
    return {name: param.detach() for name, param in model.named_parameters()}, clipper.state_dict()


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6), name


def half(rank):
    return slice(4 * rank, 4 * rank + 4)


def check_fsdp2(rank, mesh):
    from torch.distributed.fsdp import fully_shard

    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    clipper = AdaGC(model.named_parameters(), **KNOBS)
    train(model, half(rank), clipper)
    weights, state = one_process()
    close({name: param.full_tensor().detach() for name, param in model.named_parameters()}, weights)
    close(clipper.state_dict(), state)


def check_ddp(rank, mesh):
    model = nn.parallel.DistributedDataParallel(net())
    clipper = AdaGC(model.named_parameters(), **KNOBS)
    train(model, half(rank), clipper)
    weights, state = one_process()
    close({name: param.detach() for name, param in model.module.named_parameters()}, weights)
    close(clipper.state_dict(), state)


def spread(mesh):
    """Five gradients, sharded along either side, unevenly, not at all, and with sums still owed."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    g = torch.Generator().manual_seed(1)
    whole = [torch.randn(shape, generator=g) for shape in ((4, 6), (3, 4), (1, 5), (6,), (2, 2))]
    # Clones: a distributed tensor may share the memory of the one it was made from.
    parts = [
        distribute_tensor(w.clone(), mesh, [p]) for w, p in zip(whole, (Shard(0), Shard(1), Shard(0), Replicate()))
    ]
    parts.append(type(parts[0]).from_local(whole[4] / 2, mesh, [Partial()]))
    return whole, parts


def check_tensor_parallel(rank, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    whole, parts = spread(mesh)
    params = [nn.Parameter(torch.zeros_like(part)) for part in parts[:4]]
    params.append(nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Replicate()])))
    for param, part in zip(params, parts):
        param.grad = part
    clipper = AdaGC(params, absolute=0.5, eps=0)
    clipper.clip_()
    total = torch.cat([w.view(-1) for w in whole]).norm()
    for param, w in zip(params, whole):
        assert torch.allclose(param.grad.full_tensor(), w * 0.5 / total, rtol=1e-5)
    assert torch.allclose(clipper.state.gamma, torch.stack([w.norm() for w in whole]) * 0.5 / total, rtol=1e-5)
    with CommDebugMode() as counted:
        tensor_norms([param.grad for param in params])
    assert counted.get_total_counts() == 1, "one all-reduce for one way of sharding"


def check_shard_granularity(rank, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    param = nn.Parameter(distribute_tensor(torch.zeros(2, 3), mesh, [Shard(0)]))
    clipper = AdaGC([param], granularity="shard", warmup=1, absolute=1.0, relative=1.0)
    grad = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]])
    param.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
    clipper.clip_()  # the warm-up clips by the norm of everything, 5
    assert clipper.state.gamma.item() == pytest.approx(0.6 if rank == 0 else 0.8)
    param.grad = distribute_tensor(10 * grad, mesh, [Shard(0)])
    with CommDebugMode() as counted:
        clipper.clip_()
    assert counted.get_total_counts() == 0
    assert torch.allclose(param.grad.full_tensor(), grad / 5)


def check_empty_shards(rank, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    part = distribute_tensor(torch.tensor([[3.0, 4.0]]), mesh, [Shard(0)])
    assert tensor_norms([part]).tolist() == [5.0]


CHECKS = [check_fsdp2, check_ddp, check_tensor_parallel, check_shard_granularity, check_empty_shards]


def worker(rank):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for check in CHECKS:
        check(rank, mesh)


def test_two_processes_equal_one():
    # One launch for all checks: starting processes takes longer than the checks do.
    in_two_processes(worker)
