"""Starting an adapter on two processes: DDP's replicas and FSDP2's shards get what one process gets."""

import os

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from modicum.adapters import Preheat, get_hrp_state_dict, initialize_lora_hrp_weights
from modicum.adapters.layers import factors_of, lora_layers, whole
from modicum.jobs.training.adapter import initialize
from modicum.random import generator
from pairs import in_two_processes
from support import tiny_llama

CONFIG = Preheat(preheat_rank=8, preheat_steps=3)


def model():
    return get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def batches(rows=slice(None)):
    rng = generator(0, "batches")
    return [{"input_ids": ids[rows], "labels": ids[rows]} for ids in torch.randint(3, 264, (4, 4, 12), generator=rng)]


def started(peft_model, rows=slice(None)):
    # SGD, because Adam divides rounding differences between one process and two by their own size.
    state = get_hrp_state_dict(
        peft_model, batches(rows), lr=0.5, config=CONFIG, optimizer=lambda p, lr: torch.optim.SGD(p, lr=lr)
    )
    initialize_lora_hrp_weights(peft_model, state, init_factor="balanced")
    return products(peft_model)


def products(peft_model):
    found = {}
    for name, layer in lora_layers(peft_model).items():
        A, B = (whole(factor, name) for factor in factors_of(layer, "default"))
        found[name] = B @ A
    return found


def same_everywhere(found):
    for value in found.values():
        other = value.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(value, other)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=1e-2)


def half(rank):
    return slice(2 * rank, 2 * rank + 2)


def check_replicas(rank, mesh):
    found = started(model(), half(rank))
    same_everywhere(found)
    close(found, torch.load(os.environ["EXPECTED"]))


def check_shards(rank, mesh):
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    for layer in sharded.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    parameters = [id(p) for p in sharded.parameters()]
    found = started(sharded, half(rank))
    assert [id(p) for p in sharded.parameters()] == parameters
    assert all(
        hasattr(factor, "full_tensor")
        for layer in lora_layers(sharded).values()
        for factor in factors_of(layer, "default")
    )
    same_everywhere(found)
    close(found, torch.load(os.environ["EXPECTED"]))


def check_other_starts(rank, mesh):
    """A process that draws or measures differently must not end with another adapter."""
    for name in ("default", "lora_one", "eva"):
        torch.manual_seed(rank)
        replica = model()
        initialize(replica, name, {}, batches=lambda: batches(half(rank)), lr=1e-3)
        for layer in lora_layers(replica).values():
            same_everywhere({str(i): factor.detach() for i, factor in enumerate(factors_of(layer, "default"))})


def worker(rank, expected):
    os.environ["EXPECTED"] = expected
    mesh = dist.init_device_mesh("cpu", (2,))
    for check in (check_replicas, check_shards, check_other_starts):
        check(rank, mesh)


def test_two_processes_agree_with_one(tmp_path):
    torch.save(started(model()), tmp_path / "products.pt")
    # One pair of processes for all checks: starting them takes longer than the checks do.
    in_two_processes(worker, str(tmp_path / "products.pt"))
