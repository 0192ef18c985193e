"""Speed of coordination: a round of each policy, batches of worlds, growth with the agents, greedy beside peers.

    python -m benchmarks.speed.submodular [--parts round worlds growth greedy features peers accelerator]

Adds the parts to ``benchmarks/results/submodular-speed.json``. One thread. Each figure is there as the median and the
fastest of several repeats, in wall and in processor time; a busy machine inflates the fastest least. The peers are
``submodlib-py`` and ``apricot-select``, in an environment of their own whose Python ``PEERS`` names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.provenance import origin
from benchmarks.tables import RESULTS, load

from modicum.environment import environment
from modicum.record import write_atomic
from modicum.submodular import FacilityLocation, complete, erdos_renyi, greedy, metropolis_weights
from modicum.submodular.policies.make import make_policy

NAME = "submodular-speed.json"
N, M, K = 20, 30, 24
KNOBS: dict[str, dict[str, Any]] = {
    "ma_osma": {"eta": 1.0},
    "ma_osea": {"eta": 1.0},
    "ma_spl": {"eta": 1.0},
    "osg": {},
    "last_greedy": {},
}


def peak_gb() -> float:
    """Return the most memory that this process has held.

    The kernel's ``ru_maxrss`` is no measure of a child: it keeps the parent's when another program starts.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e9


def median(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the milliseconds of a call, in the median and at best."""
    for _ in range(3):
        work()
    wall, cpu = [], []
    for _ in range(repeats):
        a, b = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - a)
        cpu.append(time.process_time() - b)
    found = {"wall_ms": wall, "cpu_ms": cpu}
    fastest = {f"fastest_{name}": 1e3 * float(np.min(times)) for name, times in found.items()}
    return {name: 1e3 * float(np.median(times)) for name, times in found.items()} | fastest


def played(
    name: str,
    *,
    agents: int = N,
    rows: int = M,
    actions: int = K,
    worlds: int | None = None,
    W: Any = None,
    device: str = "cpu",
) -> Any:
    """Return a function that plays one round on a fresh objective, from the middle of a run."""
    rng = np.random.default_rng(0)
    shape = (rows, agents * actions) if worlds is None else (worlds, rows, agents * actions)
    values = [torch.from_numpy(rng.random(shape)).to(device) for _ in range(8 if device == "cpu" else 2)]
    seed = 0 if worlds is None else list(range(worlds))
    W = metropolis_weights(complete(agents)) if W is None else W
    policy = make_policy(name, [actions] * agents, W=W.to(device), horizon=1000, seed=seed, knobs=KNOBS[name])
    turn = [0]

    def work() -> None:
        turn[0] += 1
        policy.act()
        policy.update(FacilityLocation(values[turn[0] % len(values)]))
        if device != "cpu":
            torch.cuda.synchronize()

    for _ in range(20):
        work()
    return work


def black_box(V: Any) -> Callable[[], Any]:
    """Return a round of 2 ΣV evaluations of f, as code that knows nothing of f would do it."""
    rng = np.random.default_rng(1)
    x = np.full((N, N * K), 1 / K)

    def value(mask: Any) -> float:
        return float(V[:, mask].max(1).sum()) if mask.any() else 0.0

    def work() -> None:
        for i in range(N):
            z = 1 + np.log(rng.random() * (1 - np.exp(-1)) + np.exp(-1))
            R = rng.random(N * K) < z * x[i]
            for a in range(i * K, (i + 1) * K):
                with_a, without = R.copy(), R.copy()
                with_a[a], without[a] = True, False
                value(with_a) - value(without)

    return work


def agent_loop(V: Any) -> Callable[[], Any]:
    """Return a round as a NumPy loop over agents with the gains of an agent computed together."""
    rng = np.random.default_rng(1)
    state = {"x": np.full((N, N * K), 1 / K)}
    W = metropolis_weights(complete(N)).numpy()

    def work() -> None:
        x = state["x"]
        y = W @ x
        for i in range(N):
            own = slice(i * K, (i + 1) * K)
            z = 1 + np.log(rng.random() * (1 - np.exp(-1)) + np.exp(-1))
            members = np.flatnonzero(rng.random(N * K) < z * x[i])
            inside = V[:, members]
            if len(members) > 1:
                order = np.argpartition(inside, -2, axis=1)
                first, second = (np.take_along_axis(inside, order[:, [-k]], 1)[:, 0] for k in (1, 2))
                whose = members[order[:, -1]]
            else:
                first = inside[:, 0] if len(members) else np.zeros(M)
                second, whose = np.zeros(M), np.full(M, members[0] if len(members) else -1)
            base = np.where(whose[:, None] == np.arange(own.start, own.stop), second[:, None], first[:, None])
            g = 0.632 * np.maximum(V[:, own] - base, 0).sum(0)
            v = y[i, own] + g
            p = np.maximum(v, 0)
            if p.sum() > 1:
                u = np.sort(v)[::-1]
                over = np.cumsum(u) - 1
                r = np.flatnonzero(u - over / np.arange(1, K + 1) > 0)[-1]
                p = np.maximum(v - over[r] / (r + 1), 0)
            y[i, own] = p
            rng.choice(K, p=p / p.sum())
        state["x"] = y

    return work


def part_round() -> dict[str, Any]:
    """One round of 20 agents, 30 rows, 24 actions."""
    V = np.random.default_rng(0).random((M, N * K))
    found = {name: median(played(name), 200) for name in KNOBS}
    found["2ΣV evaluations"] = median(black_box(V), 5)
    found["NumPy loop over agents"] = median(agent_loop(V), 50)
    return found


def part_worlds() -> dict[str, Any]:
    """One round of many worlds, a world."""
    found = {}
    for worlds in (1, 8, 64):
        for name in ("ma_osma", "ma_spl"):
            timed = median(played(name, worlds=worlds), 20)
            found[f"{name}, {worlds}"] = {key: value / worlds for key, value in timed.items()}
    return found


def part_accelerator() -> dict[str, Any]:
    """Worlds a second on an accelerator, beside one thread of this machine's processor with 64 worlds at once."""
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name in ("ma_osma", "ma_spl"):
        thread = 64e3 / median(played(name, worlds=64), 20)["wall_ms"]
        found[name] = {"one thread": thread}
        for worlds in (256, 1024, 4096):
            there = worlds * 1e3 / median(played(name, worlds=worlds, device="cuda"), 10)["wall_ms"]
            found[name][str(worlds)] = {"worlds a second": there, "times one thread": there / thread}
    return found


def part_growth() -> dict[str, Any]:
    """One round at fixed degree, by the number of agents."""
    found = {}
    for agents in (20, 50, 100, 200, 500):
        W = (
            metropolis_weights(erdos_renyi(agents, degree=4, seed=0))
            if agents < 200
            else metropolis_weights(_wheel(agents))
        )
        timed = median(played("ma_spl", agents=agents, actions=8, W=W), 8)
        sent = int((W > 0).sum() - agents) * agents * 8 * 8
        found[str(agents)] = timed | {"cpu_ms_an_agent": timed["cpu_ms"] / agents, "bytes_an_agent": sent / agents}
    return found


def _wheel(agents: int) -> Any:
    """Every agent knows the two nearest on each side."""
    links = torch.zeros(agents, agents, dtype=torch.long)
    for i in range(agents):
        for step in (1, 2):
            links[i, (i + step) % agents] = links[(i + step) % agents, i] = 1
    return links


def part_greedy() -> dict[str, Any]:
    """Greedy on a dense matrix of 2,000 × 2,000, k = 100."""
    f = FacilityLocation(_kernel(2000))
    return median(lambda: greedy(f, 100), 5) | {"value": greedy(f, 100).value}


def _kernel(n: int) -> Any:
    X = np.random.default_rng(0).normal(size=(n, 16))
    return np.exp(-((X[:, None] - X) ** 2).sum(-1) / 16).astype(np.float32)


def part_features() -> dict[str, Any]:
    """Greedy on 50,000 elements from their features, in a process of its own for its memory."""
    code = (
        "import time, numpy as np\n"
        "from benchmarks.speed.submodular import peak_gb\n"
        "from modicum.submodular import FacilityLocation, greedy\n"
        "import torch; torch.set_num_threads(1)\n"
        "X = np.random.default_rng(0).normal(size=(50000, 32)).astype(np.float32)\n"
        "before = peak_gb()\n"
        "f = FacilityLocation.from_features(X)\n"
        "a = time.process_time(); picks = greedy(f, 10)\n"
        "print(time.process_time() - a, before, peak_gb(), f.n, f.rows, len(picks))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    seconds, before, peak = (float(part) for part in out[:3])
    n, rows, k = (int(part) for part in out[3:])
    return {"n": n, "rows": rows, "k": k, "cpu_s": seconds, "before_gb": before, "peak_gb": peak}


def part_peers() -> dict[str, Any]:
    """The same greedy by submodlib and apricot, in their own environment."""
    python = os.environ.get("PEERS")
    if not python:
        return {"skipped": "PEERS is not set"}
    code = (
        "import time, json, numpy as np\n"
        "X = np.random.default_rng(0).normal(size=(2000, 16))\n"
        "V = np.exp(-((X[:, None] - X) ** 2).sum(-1) / 16).astype(np.float32)\n"
        "out = {}\n"
        "from submodlib import FacilityLocationFunction\n"
        "f = FacilityLocationFunction(n=2000, mode='dense', sijs=V, separate_rep=False)\n"
        "t = []\n"
        "for _ in range(5):\n"
        "    a = time.process_time(); p = f.maximize(budget=100, optimizer='LazyGreedy', show_progress=False)\n"
        "    t.append(time.process_time() - a)\n"
        "out['submodlib'] = {'cpu_ms': 1e3 * float(np.median(t)), 'picks': [int(i) for i, _ in p]}\n"
        "from apricot import FacilityLocationSelection\n"
        "t = []\n"
        "for _ in range(4):\n"
        "    s = FacilityLocationSelection(100, metric='precomputed', optimizer='lazy')\n"
        "    a = time.process_time(); s.fit(V.astype(np.float64)); t.append(time.process_time() - a)\n"
        "out['apricot'] = {'cpu_ms': 1e3 * float(np.median(t[1:])), 'picks': [int(i) for i in s.ranking]}\n"
        "print(json.dumps(out))\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    found = json.loads(done.stdout.splitlines()[-1])
    ours = list(greedy(FacilityLocation(_kernel(2000)), 100))
    for peer in found.values():
        peer["same set"] = set(peer.pop("picks")) == set(ours)
    return found


PARTS = {name.removeprefix("part_"): made for name, made in list(globals().items()) if name.startswith("part_")}


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    torch.set_num_threads(1)
    found = load(NAME) or {"parts": {}}
    for part in parser.parse_args().parts:
        found["parts"][part] = PARTS[part]() | {"from": origin()}
        print(part, json.dumps(found["parts"][part]), flush=True)
        found |= {"environment": environment(), "peak_gb": peak_gb()}
        write_atomic(RESULTS / NAME, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
