"""Runs that share a store of references: every pair is computed by one of them, whatever the others do meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest

from modicum import lock
from modicum.jobs.data.pairs import Pair, PairCollator
from modicum.jobs.training import references
from modicum.jobs.training.references import ReferenceStore, referenced
from support import tiny_llama

PAIRS = [Pair((5 + i, 6), (7, 8 + i), (9,)) for i in range(40)]


def ask(number: int, folder, barrier, told) -> None:
    """Compute the references of half of the pairs, or of all, counting passes of the model."""
    references.KEPT = 8
    model, passes = tiny_llama(), []
    forward = model.forward

    def counted(*args, **given):
        passes.append(1)
        time.sleep(0.01)  # long enough for the other process to want the same pairs
        return forward(*args, **given)

    model.forward = counted
    barrier.wait(300)
    (found,) = referenced([PAIRS[10 * number :]], model, PairCollator(0), precision="x", note=print, folder=folder)
    told.put((number, len(passes), [pair.reference for pair in found]))


def test_two_processes_compute_every_pair_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(2), context.Queue()
    workers = [context.Process(target=ask, args=(number, tmp_path, barrier, told)) for number in range(2)]
    for worker in workers:
        worker.start()
    (_, first, whole), (_, second, rest) = sorted(told.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    assert first + second == len(PAIRS) and min(first, second) > 0
    assert rest == whole[10:]
    assert not [*tmp_path.glob("*/*.lock*"), *tmp_path.glob("*/.*")]


def test_a_run_waits_for_what_another_computes_and_takes_it_over_when_that_dies(tmp_path, monkeypatch):
    first, second = (ReferenceStore("m", tmp_path) for _ in range(2))
    turns = first.turns(["aa1", "aa2", "bb1"], {}, print)
    assert next(turns) == ["aa1", "aa2", "bb1"]
    waited, notes = [], []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            first.add({"aa1": (1.0, 2.0)})
            turns.close()  # as when it is killed: what it had kept is known, and the rest is free

    monkeypatch.setattr(references.time, "sleep", sleep)
    known: references.Known = {}
    assert next(second.turns(["aa1", "aa2"], known, notes.append)) == ["aa2"]
    assert known == {"aa1": (1.0, 2.0)} and len(waited) == 2 and len(notes) == 1 and "waits for them" in notes[0]


@pytest.mark.parametrize("host", ["elsewhere", None])
def test_a_lock_of_a_dead_or_unreachable_run_stops_nobody(tmp_path, host):
    store = ReferenceStore("m", tmp_path)
    store.folder.mkdir()
    owner = lock._me().__dict__ | {"pid": 2**22 + 1, "host": host or lock._me().host}
    (store.folder / ".aa.lock").write_text(json.dumps(owner))
    assert next(store.turns(["aa1"], {}, print)) == ["aa1"]
    assert (store.folder / ".aa.lock").exists() == (host is not None)  # nobody else's is deleted
