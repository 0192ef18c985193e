"""Agents in processes of their own: the numbers of a simulation, messages to neighbours alone, a word when one dies."""

from __future__ import annotations

import multiprocessing
import os
import time
from datetime import timedelta

import pytest
import torch

from modicum.errors import ModicumError, UnsupportedError
from modicum.submodular import (
    MAOSEA,
    MAOSMA,
    MASPL,
    FacilityLocation,
    PointToPoint,
    Simulated,
    complete,
    metropolis_weights,
    path,
    ring,
    simulate,
)

CONTEXT = multiprocessing.get_context("fork")
ROUNDS = 5
KINDS = {
    "ma_osma": (MAOSMA, {"eta": 0.3}),
    "ma_osea": (MAOSEA, {"eta": 1.0, "gamma": 0.05}),
    "ma_spl": (MASPL, {"eta": 0.3}),
    "ma_spl, exact": (MASPL, {"eta": 0.3, "gradient": "exact"}),
    "worlds": (MASPL, {"eta": 0.3, "seed": [1, 2]}),
    "changing": (MASPL, {"eta": 0.3}),
}

DROP = {"changing": 0.4}


def objective(n, number):
    return FacilityLocation(torch.rand(5, n, generator=torch.Generator().manual_seed(number), dtype=torch.float64))


def blocks(agents):
    return [2 + i % 2 for i in range(agents)]


def graph(agents, kind):
    """Return weights; under "changing" they change every round, and some messages are lost."""
    rings, complete_ = metropolis_weights(ring(agents)), metropolis_weights(complete(agents))
    return (lambda turn: (rings, complete_)[turn % 2]) if kind == "changing" else rings


def run(agents, kind, network):
    made, knobs = KINDS[kind]
    policy = made(blocks(agents), network, **knobs)
    trace = simulate(
        policy, lambda number: objective(policy.n, number), rounds=ROUNDS, hints=lambda t: objective(policy.n, t)
    )
    return policy, trace


def process(rank, agents, kind, foreign, folder, queue):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=agents, timeout=timedelta(seconds=20)
    )
    try:
        network = PointToPoint(None, graph(agents, kind), foreign=foreign, drop=DROP.get(kind, 0.0))
        if kind == "dies":
            policy = MASPL(blocks(agents), network, eta=0.3)
            policy.update(objective(policy.n, 0))
            if rank == 1:
                os._exit(3)
            for number in range(50):
                policy.update(objective(policy.n, number))
        policy, trace = run(agents, kind, network)
        queue.put((rank, policy.x[..., 0, :].numpy(), trace.actions.numpy(), network.bytes, trace.bytes))
    except ModicumError as error:
        queue.put((rank, str(error)))
    finally:
        dist.destroy_process_group()


def processes(agents, kind, folder, foreign="float64", answers=None):
    queue = CONTEXT.Queue()
    started = [
        CONTEXT.Process(target=process, args=(rank, agents, kind, foreign, folder, queue)) for rank in range(agents)
    ]
    for one in started:
        one.start()
    found = sorted((queue.get(timeout=90) for _ in range(answers or agents)), key=lambda item: item[0])
    for one in started:
        one.join(30)
    return found


def compare(agents, kind, folder):
    W = metropolis_weights(ring(agents))
    policy, trace = run(agents, kind, Simulated(graph(agents, kind), drop=DROP.get(kind, 0.0)))
    found = processes(agents, kind, folder)
    assert sum(item[3] for item in found) == trace.bytes
    for rank, x, actions, sent, total in found:
        assert total == trace.bytes
        torch.testing.assert_close(torch.from_numpy(x), policy.x[..., rank, :], rtol=0, atol=1e-12)
        assert (torch.from_numpy(actions) == trace.actions).all()
        if kind == "changing":
            continue
        # A round for each hint and one for each update, eight bytes for each number and neighbour.
        worlds = len(policy._seeds)
        assert sent == 2 * ROUNDS * worlds * 8 * policy.n * int((W[rank] > 0).sum() - 1)
    if kind != "changing":
        assert trace.bytes == 2 * ROUNDS * len(policy._seeds) * 8 * policy.n * int((W > 0).sum() - agents)


@pytest.mark.parametrize("kind", ["ma_osma", "ma_spl", "changing"])
def test_two_processes_equal_the_simulation(kind, tmp_path):
    compare(2, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("agents", [3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_more_processes_equal_the_simulation(agents, kind, tmp_path):
    compare(agents, kind, tmp_path)


@pytest.mark.slow
def test_half_precision_of_others_blocks_equals_the_simulation(tmp_path):
    network = Simulated(metropolis_weights(ring(3)), foreign="float16")
    policy, trace = run(3, "ma_osma", network)
    found = processes(3, "ma_osma", tmp_path, "float16")
    for rank, x, _, sent, _ in found:
        torch.testing.assert_close(torch.from_numpy(x), policy.x[rank], rtol=0, atol=1e-12)
        own = blocks(3)[rank]
        assert sent == 2 * ROUNDS * 2 * (8 * own + 2 * (policy.n - own))
    assert sum(item[3] for item in found) == trace.bytes < run(3, "ma_osma", metropolis_weights(ring(3)))[1].bytes


@pytest.mark.slow
def test_when_one_dies_the_others_say_so(tmp_path):
    began = time.monotonic()
    for rank, text in processes(3, "dies", tmp_path, answers=2):
        assert f"agent {rank}: a neighbour" in text and "does not answer" in text and "\n" not in text
    assert time.monotonic() - began < 60


def test_unconnected_processes_are_refused():
    with pytest.raises(UnsupportedError, match="start them with torchrun"):
        PointToPoint(None, metropolis_weights(path(2)))
