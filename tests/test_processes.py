"""Who is who among the processes of a run, and what they tell each other."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modicum import processes
from modicum.errors import UnsupportedError
from pairs import in_two_processes


def test_alone_there_is_nothing_to_exchange(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (processes.rank(), processes.world(), processes.main()) == (0, 1, True)
    values = torch.ones(2)
    processes.average([values])
    assert torch.equal(processes.gather(values), torch.ones(2))
    assert torch.equal(processes.mean(values, 2.0), torch.full((2,), 0.5))
    assert processes.broadcast(values) is values and processes.broadcast_object("told") == "told"


def test_the_launcher_numbers_processes_that_nothing_connects(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (processes.rank(), processes.world(), processes.main()) == (1, 2, False)
    with pytest.raises(UnsupportedError, match="init_process_group"):
        processes.gather(torch.ones(2))


def talk(rank: int) -> None:
    # The launcher's numbers are wrong here on purpose: the group's count.
    os.environ.update(RANK="7", WORLD_SIZE="9")
    assert (processes.rank(), processes.world(), processes.main()) == (rank, 2, rank == 0)
    own = torch.tensor([1.0, 2.0]) + rank
    # Weights 1 and 3: (sum of both sums) / 4.
    assert torch.equal(processes.mean(own, 1.0 + 2 * rank), torch.tensor([0.75, 1.25]))
    assert torch.equal(processes.gather(own), torch.tensor([1.0, 2.0, 2.0, 3.0]))
    pair = [own.clone(), torch.full((2, 2), float(rank)).T]
    processes.average(pair)
    assert torch.equal(pair[0], torch.tensor([1.5, 2.5])) and torch.equal(pair[1], torch.full((2, 2), 0.5))
    assert torch.equal(processes.broadcast(own.clone()), torch.tensor([1.0, 2.0]))
    assert processes.broadcast_object({"from": rank}) == {"from": 0}


def test_two_connected_processes():
    in_two_processes(talk)


def test_asking_who_writes_imports_no_torch():
    code = "import sys, modicum.record, modicum.processes as p; assert p.main(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "RANK": "0"})


def test_nobody_else_reads_the_launchers_variables():
    root = Path(processes.__file__).parent
    readers = [path.name for path in root.rglob("*.py") if re.search('"(RANK|WORLD_SIZE)"', path.read_text())]
    assert readers == ["processes.py"]


LAUNCHER = """
import os, subprocess, sys
rank = "from modicum import processes; import os, sys, time; print(1, flush=True); time.sleep(float(sys.argv[1])); "
rank += "processes.end_with_launcher(); time.sleep(60)"
told = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
child = subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]], env=os.environ | told, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("starting", [0.0, 1.0])
def test_a_process_whose_launcher_was_killed_ends(starting):
    """Even where that happens while the process is still starting, so that it never sees its launcher."""
    if starting and b"python" in Path("/proc/1/cmdline").read_bytes().partition(b"\0")[0]:
        pytest.skip("the first process of this container is a Python: it could be a launcher")
    command = [sys.executable, "-c", LAUNCHER, str(starting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        time.sleep(0.5 - starting / 2)  # it looks for its launcher before, or after
        launcher.kill()
    for _ in range(200):
        stat = Path(f"/proc/{rank}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return
        time.sleep(0.05)
    os.kill(rank, signal.SIGKILL)
    pytest.fail("it went on")
