"""Two processes: replicas stay equal, and equal to one process that does all the work."""

import pytest
import torch
from torch import nn
from zeroth_order_models import IDS, LABELS, flat, tied

from modicum.errors import UnsupportedError
from modicum.optim import MeZO, TeZO
from pairs import in_two_processes

SHARES = {1: [slice(0, 4)], 2: [slice(0, 1), slice(1, 4)]}  # uneven on purpose


def loss_on(model, rows):
    return lambda: nn.functional.cross_entropy(model(IDS[rows]).flatten(0, 1), LABELS[rows].flatten())


def data_parallel(rank, world, method, knobs):
    model = tied()
    optimizer = method(model.named_parameters(), lr=1e-3, **knobs)
    optimizer.attach(model)
    rows = SHARES[world][rank]
    for _ in range(5):
        optimizer.probe(loss_on(model, rows), weight=rows.stop - rows.start)
        optimizer.step()
    optimizer.detach()
    return flat(model)


def query_parallel(rank, world, method, knobs):
    model = tied()
    optimizer = method(model.named_parameters(), lr=1e-3, queries=4 // world, parallel="query", **knobs)
    optimizer.attach(model)
    for _ in range(5):
        optimizer.step(loss_on(model, slice(0, 4)))
    assert optimizer.kappas.shape == (4,)
    optimizer.detach()
    return flat(model)


def sharded(rank, world, method, knobs):
    knobs = dict(knobs)
    model = tied().to(knobs.pop("dtype", torch.float64))
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for module in (model.up, model.down):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = method(model.named_parameters(), lr=1e-3, **knobs)
    if world > 1:
        with pytest.raises(UnsupportedError, match=r"The weights are sharded\. Call attach"):
            optimizer.step(loss_on(model, slice(0, 4)))
    optimizer.attach(model)
    for _ in range(5):
        optimizer.step(loss_on(model, slice(0, 4)))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


CASES = [
    (data_parallel, TeZO, {"rank": 3, "variant": "momentum"}),
    (data_parallel, TeZO, {"rank": 3, "engine": "adapter"}),
    (query_parallel, TeZO, {"rank": 3, "engine": "adapter"}),
    (sharded, TeZO, {"rank": 3}),
    (sharded, TeZO, {"rank": 3, "variant": "adam"}),
    (sharded, MeZO, {}),
    (sharded, MeZO, {"dtype": torch.bfloat16}),
    (sharded, TeZO, {"dtype": torch.bfloat16, "rank": 3}),
    (sharded, TeZO, {"dtype": torch.bfloat16, "rank": 3, "variant": "adam"}),
]


def work(rank, folder):
    torch.save([run(rank, 2, method, knobs) for run, method, knobs in CASES], f"{folder}/{rank}.pt")


def test_two_processes_do_what_one_does(tmp_path):
    in_two_processes(work, str(tmp_path))
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for (run, method, knobs), first, second in zip(CASES, one, two, strict=True):
        case = f"{run.__name__} {method.__name__} {knobs}"
        assert torch.equal(first, second), case
        assert (first - run(0, 1, method, knobs)).abs().max() < 1e-9, case
