"""A pipe in the place of any file of a run: whoever reads the run says so, and waits for nobody."""

from __future__ import annotations

import os
import shutil
import signal
import sys

import pytest

from modicum.cli import verify
from modicum.errors import CheckpointError
from modicum.jobs import execute
from modicum.recipe import parse
from modicum.report.runs import load

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")


@pytest.fixture
def soon():
    """End what waits for a writer of a pipe."""

    def end(_number, _frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_no_reader_of_a_run_waits_for_a_pipe(tiny_model, tmp_path, soon):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "say", "completion": "abc"}\n' * 4)
    trainer = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    tune = {"name": "tune", "job": "train", "model": str(tiny_model), "data": {"path": str(rows)}, "trainer": trainer}
    merged = {"name": "mix", "job": "merge", "experts": ["stage:tune", str(tiny_model)], "method": "linear"}
    recipe = parse({"job": "pipeline", "stages": [tune, merged]})
    run = execute(recipe, tmp_path / "run", quiet=True).folder
    names = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    assert len(names) > 25
    for name in names:
        odd = tmp_path / "odd"
        shutil.copytree(run, odd)
        (odd / name).unlink()
        os.mkfifo(odd / name)
        for reader in (verify, load):
            soon()
            with pytest.raises(CheckpointError, match="is a pipe, expected a file"):
                reader([odd])
        soon()
        try:
            assert execute(recipe, odd, quiet=True).done  # an output is made anew, what is not needed stays
        except CheckpointError as error:
            assert "is a pipe, expected a file" in str(error)
        signal.alarm(0)
        shutil.rmtree(odd)
