"""A training whose workers choose their domains: what they read, what is kept, and going on exactly."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from modicum.errors import ModicumError
from modicum.jobs.training.domains import FILE, DomainCallback, DomainStream
from modicum.submodular import BSG, FacilityLocation
from modicum.submodular.data_selection import DomainScheduler, Needs, SelectionWorld, similarities
from support import tiny_llama

NAMES = ["low", "high", "mixed"]
SIMILAR = [[1.0, 0.0, 0.6], [0.0, 1.0, 0.6]]


def rows():
    rng = torch.Generator().manual_seed(0)
    spans = {"low": (4, 30), "high": (60, 90), "mixed": (4, 90)}
    found = {}
    for name, (low, high) in spans.items():
        ids = torch.randint(low, high, (12, 8), generator=rng)
        found[name] = [{"input_ids": row, "labels": row} for row in ids]
    return found


def parts(seed=0, **knobs):
    scheduler = DomainScheduler(SIMILAR, workers=2, domains=NAMES, seed=seed, knobs={"eta": 1.0}, **knobs)
    stream = DomainStream(rows(), scheduler, batch=2)
    probes = [
        {key: torch.stack([row[key] for row in rows()[name][:4]]) for key in ("input_ids", "labels")}
        for name in NAMES[:2]
    ]
    return stream, DomainCallback(stream, probes, every=2)


def train(folder, steps=8, resume=None, **changed):
    from transformers import Trainer, TrainingArguments

    stream, callback = parts()
    usual = {"per_device_train_batch_size": 4, "save_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        seed=0, **{**usual, **changed},
    )  # fmt: skip
    trainer = Trainer(tiny_llama(seed=0), arguments, train_dataset=stream, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, stream, callback


def test_a_training_chooses_its_domains_and_goes_on_exactly(tmp_path):
    whole, stream, callback = train(tmp_path / "run")
    assert len(callback.losses) == 4 and stream.scheduler.round == 4 and len(stream.history) >= 8
    assert all(len(batch) == 2 for batch in stream.history)
    kept = load_file(tmp_path / "run" / "checkpoint-3" / FILE)
    assert {"history", "losses", "shares", "round", "policy.x"} <= kept.keys() and int(kept["round"]) == 1
    again, after, other = train(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"))
    assert after.history[:8] == stream.history[:8] and other.losses == callback.losses
    assert other.shares == callback.shares and torch.tensor(callback.shares).shape == (4, 2, 3)
    assert torch.tensor(callback.shares).sum(-1).allclose(torch.ones(4, 2))
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)
    (tmp_path / "run" / "checkpoint-3" / FILE).unlink()
    with pytest.raises(ModicumError, match="cannot go on"):
        train(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-3"))


def test_a_training_that_would_read_something_else_is_refused(tmp_path):
    with pytest.raises(ModicumError, match="Set dataloader_num_workers to 0"):
        train(tmp_path, steps=1, dataloader_num_workers=1)
    with pytest.raises(
        ModicumError, match=re.escape("1 processes with batches of 2 rows: expected 2 workers of 2 rows")
    ):
        train(tmp_path, steps=1, per_device_train_batch_size=2)
    loader = DataLoader(parts()[0], batch_size=2, num_workers=1)
    with pytest.raises(ModicumError, match="a copy of the scheduler, which never learns"):
        next(iter(loader))


@pytest.mark.parametrize("policy", ["osg", "bsg", "best_response"])
def test_learners_learn_from_what_was_trained_on(policy):
    scheduler = DomainScheduler(torch.eye(3), workers=2, policy=policy, floor=0.9, seed=1)
    for _ in range(20):
        chosen = scheduler.next_domains()
        learnt = scheduler.policy._done if policy == "best_response" else scheduler.policy._played
        assert chosen == learnt.tolist()
        scheduler.observe([1.0, 2.0, 3.0])


def test_an_action_that_the_floor_chose_is_as_likely_as_the_floor_makes_it():
    def learnt(floor, shares):
        made = BSG([2], horizon=10**6)
        made.floor, made.experts = floor, torch.tensor(shares, dtype=torch.float64).expand_as(made.experts).clone()
        made.overrule(torch.tensor([1]))
        made.update(FacilityLocation([[1.0, 0.0]]))
        return made.experts[0, :, 1] / made.experts[0, :, 0] * (shares[0] / shares[1])

    # All by the floor, an action has a chance of a half whatever the policy thinks.
    torch.testing.assert_close(learnt(1.0, [0.6, 0.4]), learnt(0.0, [0.5, 0.5]), rtol=1e-4, atol=0)
    assert bool((learnt(0.0, [0.6, 0.4]) < 0.99 * learnt(0.0, [0.5, 0.5])).all())


def test_shares_count_the_draws_of_workers_that_would_idle():
    scheduler = DomainScheduler(torch.eye(3), workers=2, knobs={"residual": "idle", "eta": 0.01}, W=[[0.5, 0.5]] * 2)
    scheduler.next_domains()
    scheduler.observe([1.0, 2.0, 3.0])
    assert float(scheduler.policy.probabilities().sum()) < 1.9
    torch.testing.assert_close(scheduler.shares().sum(1), torch.ones(2, dtype=torch.float64))


def test_a_stream_reads_each_domain_in_turn_and_every_row_before_one_again():
    stream, _ = parts()
    stream.history = [[0, 1]] * 6
    found = [row["input_ids"] for _, row in zip(range(24), stream)]
    first = [tuple(row.tolist()) for i, row in enumerate(found) if i % 4 < 2]
    assert len(set(first)) == 12 and all(
        int(row.min()) >= 4 and int(row.max()) < 30 for i, row in enumerate(found) if i % 4 < 2
    )
    assert stream.tokens().tolist() == [6, 6, 0]


def test_the_scheduler_follows_the_needs_and_never_leaves_a_domain_out():
    scheduler = DomainScheduler(torch.eye(3), workers=2, policy="ma_spl", floor=0.1, knobs={"eta": 2.0}, seed=1)
    for _ in range(60):
        scheduler.next_domains()
        scheduler.observe([0.1, 0.1, 5.0])
    shares = scheduler.shares()
    assert float(shares[:, 2].max()) > 0.8 and float(shares.min()) >= 0.1 / 3 - 1e-12
    torch.testing.assert_close(shares.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("policy", ["ma_spl", "ma_osma", "osg", "bsg", "last_greedy", "oracle_greedy", "random"])
@pytest.mark.parametrize("utility", ["coverage", "facility"])
def test_a_scheduler_goes_on_from_its_state(policy, utility):
    def made(seed=3):
        step = {"knobs": {"eta": 1.0}} if policy.startswith("ma_") else {}
        return DomainScheduler(SIMILAR, workers=3, policy=policy, utility=utility, seed=seed, horizon=20, **step)

    def play(scheduler, rounds):
        chosen = []
        for number in rounds:
            chosen.append(scheduler.next_domains())
            assert scheduler.next_domains() == chosen[-1] and scheduler.next_domain() == chosen[-1][0]
            scheduler.observe([1 + number % 3, 2.0])
        return chosen

    whole, first = play(made(), range(8)), made()
    play(first, range(4))
    fresh = made()
    fresh.load_state_dict({name: part.clone() for name, part in first.state_dict().items()})
    assert play(fresh, range(4, 8)) == whole[4:]


def test_needs_follow_losses():
    needs = Needs(2, reference=[1.0, 0.0], memory=0.5, floor=0.2)
    torch.testing.assert_close(needs.observe([2.0, 1.0]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(
        needs.observe([0.0, 1.0]), torch.tensor([0.1 + 0.8 / 3, 0.1 + 1.6 / 3], dtype=torch.float64)
    )
    assert Needs(2, floor=0.0).observe([0.0, 0.0]).tolist() == [0.5, 0.5]


def test_worlds_of_needs_are_apart():
    both, alone = SelectionWorld(SIMILAR, workers=2, seed=[0, 4]), SelectionWorld(SIMILAR, workers=2, seed=4)
    for actions in ([0, 1], [2, 2]):
        both.step(torch.tensor([[1, 1], actions]))
        alone.step(torch.tensor(actions))
    torch.testing.assert_close(both.need[1], alone.need[0])
    assert (
        both.objective().worlds == (2,) and float(both.predict().value(torch.ones(2, 6, dtype=torch.bool)).max()) <= 1
    )


def streamed(rows):
    return DomainStream(rows, DomainScheduler([[1.0]], workers=1), batch=1)


BAD = {
    "similarity above one": (lambda: DomainScheduler([[2.0]], workers=1), "in [0, 1]"),
    "other names": (lambda: DomainScheduler([[1.0]], workers=1, domains=["a", "b"]), "2 domains are named"),
    "nobody": (lambda: DomainScheduler([[1.0]], workers=0), "workers is 0"),
    "a stranger": (lambda: DomainScheduler([[1.0]], workers=1, worker=1), "worker is 1"),
    "an unknown utility": (lambda: DomainScheduler([[1.0]], workers=1, utility="sum"), "utility is 'sum'"),
    "wrong losses": (lambda: Needs(2).observe([1.0]), "expected 2 finite losses"),
    "losses that are none": (lambda: Needs(1).observe([float("nan")]), "finite losses"),
    "a wrong memory": (lambda: Needs(1, memory=1.0), "memory is 1.0"),
    "wrong references": (lambda: Needs(1, reference=[1.0, 2.0]), "reference has 2 losses"),
    "features that are none": (lambda: similarities([[float("inf")]]), "finite"),
    "no rows": (lambda: streamed({"0": []}), "domain 0 has no rows"),
    "other domains": (lambda: streamed({"x": [1]}), "but the scheduler has ['0']"),
    "other probes": (lambda: DomainCallback(parts()[0], [], every=1), "0 probes"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    call, message = BAD[what]
    with pytest.raises((ModicumError, TypeError), match=re.escape(message)):
        call()
