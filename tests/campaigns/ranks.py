"""Kills of runs that two processes share: of a rank, of both, of what launched them; then the same bytes.

``python tests/campaigns/ranks.py [--seconds 600] [--seed 0] [--torchrun]`` launches a merge or a training with two
ranks, ends something at a random moment, and launches it again, until it is done. Nobody may be left waiting, and the
end must be that of a run in peace. Half of the runs have two «machines»: each rank has a host name and a boot id of its
own (namespaces of Linux; needs root), and they share the folder alone. ``--torchrun`` takes the real launcher, which is
slower; else a small one does what it does: it tells the others to stop when one rank fails. Counts go into
``benchmarks/results/kills-ranks.json``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests")]

from benchmarks.speed.endpoint import free_port  # noqa: E402

from campaigns import forked, frame, kills, workshop  # noqa: E402 - after their path

RESULT = ROOT / "benchmarks/results/kills-ranks.json"
JOBS = ("merge", "train", "train-adapter", "pipeline", "average-search")
GRACE = 30.0  # seconds that the launcher gives a rank to stop, as torchrun does


def command_of(name: str, out: str) -> list[str]:
    """Return the arguments of a run."""
    return ["run", f"{name}.yaml", "--out", out, "--quiet"]


class Launch:
    """A launcher and its two ranks.

    Args:
        name: The recipe.
        world: Where it lies.
        out: The run folder.
        machines: Give each rank a machine of its own.
        torchrun: Use the real launcher.
    """

    def __init__(self, name: str, world: Path, out: str, *, machines: bool, torchrun: bool = False) -> None:
        self._pids = world / "pids"
        self._pids.write_text("")
        self._log = world / "launcher.log"
        self._log.write_text("")
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
                       f"--master-port={free_port()}", "-m", "modicum", *command_of(name, out)]  # fmt: skip
            environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}
            with self._log.open("w") as log:
                started = subprocess.Popen(command, cwd=world, env=environment, stdout=log, stderr=log,
                                           start_new_session=True)  # fmt: skip
            self.pid = started.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                self._launch(name, world, out, machines)
        self._status: int | None = None

    def _launch(self, name: str, world: Path, out: str, machines: bool) -> NoReturn:
        os.setsid()
        stopping: list[float] = []
        signal.signal(signal.SIGTERM, lambda *_: stopping.append(time.monotonic()))
        port, ranks = free_port(), []
        for rank in range(2):
            told = {"RANK": str(rank), "LOCAL_RANK": str(0 if machines else rank), "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "1" if machines else "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "campaign"}  # fmt: skip
            told |= {"CAMPAIGN_MACHINE": f"machine-{rank}"} if machines else {}
            ranks.append(forked.Attempt(command_of(name, out), world, variables=told))
            with self._pids.open("a") as file:
                file.write(f"{ranks[-1].pid}\n")
        left, status = list(ranks), 0
        while left:
            for one in list(left):
                if (found := one.wait(0.0, reap=False)) is not None:
                    left.remove(one)
                    with self._log.open("a") as log:
                        log.write(f"rank {ranks.index(one)}: {found.status}: {found.said[-3000:]}\n")
                    if found.status != 0:
                        status = 1
                        stopping.append(time.monotonic())
            for one in left if stopping else ():
                one.kill(signal.SIGKILL if time.monotonic() > stopping[0] + GRACE else signal.SIGTERM)
            time.sleep(0.2 if stopping else 0.02)
        os._exit(status)

    def ranks(self) -> list[int]:
        """Return the numbers of the ranks that have been started."""
        told = [int(line) for line in self._pids.read_text().split()]
        return told or [pid for pid in _children(self.pid) if b"modicum" in _arguments(pid)]

    def wait(self, seconds: float) -> int | None:
        """Return the launcher's exit status, once it and its ranks have ended; ``None`` if they do not in time."""
        deadline = time.monotonic() + seconds
        known = set(self.ranks())
        while time.monotonic() < deadline:
            if self._status is None:
                with suppress(ChildProcessError):
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                    if pid:
                        self._status = os.waitstatus_to_exitcode(status)
            known |= set(self.ranks()) if self._status is None else set()
            if self._status is not None and not any(map(_lives, known)):
                return self._status
            time.sleep(0.03)
        return None

    def end(self, rng: random.Random) -> str:
        """End something of it; return what."""
        ranks = self.ranks()
        way = rng.choice(("rank", "rank", "both", "launcher", "launcher asked"))
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        with suppress(ProcessLookupError):
            if way == "rank" and ranks:
                place = rng.randrange(len(ranks))
                os.kill(ranks[place], number)
                return f"{signal.Signals(number).name} to rank {place}"
            if way == "both" and ranks:
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL)
                return "SIGKILL to both ranks"
            os.kill(self.pid, signal.SIGTERM if way == "launcher asked" else signal.SIGKILL)
        return "SIGTERM to the launcher" if way == "launcher asked" else "SIGKILL to the launcher"

    def said(self) -> str:
        """Return what the ranks said last."""
        return " | ".join(self._log.read_text().splitlines()[-4:])[-600:] if self._log.exists() else ""

    def doing(self) -> str:
        """Return where the ranks are, which ends them."""
        for number in (signal.SIGUSR1, signal.SIGKILL):
            for pid in self.ranks():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(1.0)
        return self._log.read_text()[-6000:]

    def destroy(self) -> None:
        """End all of it."""
        for pid in (self.pid, *self.ranks()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _arguments(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def campaign(at: frame.Campaign) -> None:
    """Launch, end something, and launch again, one run at a time."""
    known = workshop.recipes()
    jobs, torchrun = at.chosen.jobs, at.chosen.torchrun
    world = kills.Peace(at.work / "world", {name: known[name] for name in jobs}).world
    peace, lasts = {}, {}
    for name in jobs:
        shutil.rmtree(world / "peace" / f"{name}-2", ignore_errors=True)
        began = time.monotonic()
        first = Launch(name, world, f"peace/{name}-2", machines=False, torchrun=torchrun)
        if first.wait(300.0) != 0:
            raise RuntimeError(f"{name} fails in peace: {first.said()}")
        peace[name], lasts[name] = kills.made(world / "peace" / f"{name}-2"), time.monotonic() - began
    for number in at.numbers():
        rng = at.rng(number)
        name = rng.choice(jobs)
        machines = rng.random() < 0.5 and os.geteuid() == 0 and not torchrun
        shutil.rmtree(world / "out", ignore_errors=True)
        (world / "out").mkdir()
        kind = f"{'torchrun, ' if torchrun else ''}{'two machines' if machines else 'one machine'}"
        for _ in range(rng.choice((1, 1, 2))):
            run = Launch(name, world, "out/run", machines=machines, torchrun=torchrun)
            over = run.wait(rng.uniform(0.0, 1.1) * lasts[name])
            how, wrong = ("over before", None) if over is not None else (run.end(rng), None)
            if over is None and run.wait(60.0) is None:
                wrong = f"somebody is left waiting: {run.doing()}"
                run.destroy()
            wrong = wrong or "; ".join(kills.unlawful(world / "out/run", peace[name])) or None
            at.tell(number, f"{name}, case {number}, {how}", f"{kind}: {how}", wrong)
            if how == "over before":
                break
        last = Launch(name, world, "out/run", machines=machines, torchrun=torchrun)
        status, wrong = last.wait(120.0), None
        if status != 0:
            wrong = f"exit status {status}: {last.doing() if status is None else last.said()}"
            last.destroy()
        elif kills.made(world / "out/run") != peace[name]:
            wrong = kills.difference(kills.made(world / "out/run"), peace[name])
        elif left := kills.leftovers(world / "out/run"):
            wrong = f"leftovers: {left[:3]}"
        at.tell(number, f"{name}, case {number}, run again", f"{kind}: run again", wrong)


if __name__ == "__main__":
    raise SystemExit(
        frame.main(
            __doc__,
            RESULT,
            campaign,
            jobs=(JOBS, "those that are launched"),
            torchrun=(False, "take the real launcher, which is slower"),
        )
    )
