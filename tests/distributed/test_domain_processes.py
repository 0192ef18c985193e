"""Two workers of a data-parallel training choose their domains together, and go on exactly."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch
from benchmarks.speed.endpoint import free_port

CONTEXT = multiprocessing.get_context("spawn")
NAMES = ["low", "high"]


def worker(rank, port, folder, resume, seed, queue):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    from transformers import Trainer, TrainingArguments

    from modicum.errors import ModicumError
    from modicum.jobs.training.domains import DomainCallback, DomainStream
    from modicum.submodular.data_selection import DomainScheduler
    from support import tiny_llama

    rng = torch.Generator().manual_seed(0)
    spans = {"low": (4, 30), "high": (60, 90)}
    rows = {
        name: [{"input_ids": row, "labels": row} for row in torch.randint(*spans[name], (12, 8), generator=rng)]
        for name in NAMES
    }
    scheduler = DomainScheduler(torch.eye(2), workers=2, worker=rank, domains=NAMES, seed=seed + rank * (seed > 0))
    stream = DomainStream(rows, scheduler, batch=2)
    probes = [
        {key: torch.stack([row[key] for row in rows[name][:4]]) for key in ("input_ids", "labels")} for name in NAMES
    ]
    callback = DomainCallback(stream, probes, every=2)
    arguments = TrainingArguments(
        folder, max_steps=6, per_device_train_batch_size=2, save_steps=3, learning_rate=1e-2, report_to=[],
        use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", seed=0, ddp_backend="gloo", dataloader_pin_memory=False,
    )  # fmt: skip
    try:
        trainer = Trainer(tiny_llama(seed=0), arguments, train_dataset=stream, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).numpy()
        queue.put((rank, scheduler.round, callback.losses, weights))
    except ModicumError as error:
        queue.put((rank, str(error)))


def train(folder, resume=None, seed=0):
    port = free_port()
    queue = CONTEXT.Queue()
    started = [CONTEXT.Process(target=worker, args=(rank, port, str(folder), resume, seed, queue)) for rank in range(2)]
    for one in started:
        one.start()
    found = sorted((queue.get(timeout=240) for _ in started), key=lambda item: item[0])
    for one in started:
        one.join(30)
    return found


@pytest.mark.slow
def test_two_workers_choose_alike_and_go_on_exactly(tmp_path):
    whole = train(tmp_path)
    again = train(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    for (_, rounds, losses, weights), (_, _, others, after) in zip(whole, again):
        assert rounds == 3 and losses == others and (weights == after).all()
    assert whole[0][2] == whole[1][2] and (whole[0][3] == whole[1][3]).all()


@pytest.mark.slow
def test_workers_with_different_schedulers_are_stopped(tmp_path):
    assert all("chose different domains" in item[1] for item in train(tmp_path, seed=7))
