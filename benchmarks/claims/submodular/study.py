"""Run the cells that have no result yet: python -m benchmarks.claims.submodular.study STUDY [--minutes 4].

``gadgets`` are pairs of agents in a trap, ``tracking`` all policies on moving targets, ``sensitivity`` what curvature,
mixing, lost and late messages do, ``horizon`` how regret grows with the rounds and with the graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from benchmarks.cells import measure_all, resumable

from modicum.submodular import FacilityLocation, Simulated, metropolis_weights, second_modulus, simulate, theory_step
from modicum.submodular.comparison import Variant, best_step, play, tune
from modicum.submodular.graphs import complete, erdos_renyi, path, ring
from modicum.submodular.policies.make import make_policy
from modicum.submodular.tracking import TrackingWorld
from modicum.submodular.tracks import stone_soup_tracks

SEEDS = 10
TUNING = 1
ROUNDS = 150
STEPS = (10.0, 100.0, 1000.0, 10000.0)
AGENTS, TARGETS = 20, 30
GADGET_ROUNDS = 1000
MIXTURES: Mapping[str, tuple[int, int, int]] = {"8:1:1": (8, 1, 1), "6:3:1": (6, 3, 1), "4:5:1": (4, 5, 1)}
GRAPHS: Mapping[str, Callable[[], torch.Tensor]] = {
    "complete": lambda: complete(AGENTS),
    "ring": lambda: ring(AGENTS),
    "random": lambda: erdos_renyi(AGENTS, degree=4, seed=0),
}
PLAIN = {"surrogate": False}
POLICIES = (
    Variant("ma_spl", {}, 0, "ma_spl"),
    Variant("ma_spl", {}, 10, "ma_spl, hint 10"),
    Variant("ma_osma", {}, 0, "ma_osma"),
    Variant("ma_osma", {}, 10, "ma_osma, hint 10"),
    Variant("ma_osma", PLAIN, 0, "ma_osma, plain gradient"),
    Variant("ma_osea", {}, 0, "ma_osea"),
    Variant("rag", {}, 0, "rag"),
    Variant("rag", {}, 1, "rag, hint"),
    Variant("osg", {}, 0, "osg"),
    Variant("osg", {"scale": 1.0}, 0, "osg, theory's rates"),
    Variant("bsg", {}, 0, "bsg"),
    Variant("no_communication", {}, 0, "no_communication"),
    Variant("best_response", {}, 0, "best_response"),
    Variant("best_response", {}, 1, "best_response, hint"),
    Variant("last_greedy", {}, 0, "last_greedy"),
    Variant("last_greedy", {}, 1, "last_greedy, hint"),
    Variant("oracle_greedy", {}, 0, "oracle_greedy"),
    Variant("random", {}, 0, "random"),
)


def track(mixture: str, graph: str, variant: Variant, tracks: Any = None) -> dict[str, Any]:
    """Tune a variant on worlds of its own, and play it on ten others."""
    W = metropolis_weights(GRAPHS[graph]())

    def world(seeds: Any) -> TrackingWorld:
        return TrackingWorld(AGENTS, TARGETS, mixture=MIXTURES[mixture], seed=seeds, tracks=tracks)

    table, step = None, None
    if variant.step is not None:
        table = tune(variant, world, W, seeds=[500 + i for i in range(TUNING)], rounds=ROUNDS, steps=STEPS)
        step = best_step(table)
    trace = play(variant, world, W, seeds=range(SEEDS), rounds=ROUNDS, steps=None if step is None else [step])
    utility = (trace.utility.mean(0) * TARGETS).tolist()
    return {
        "mixture": mixture, "graph": graph if variant.local else "none", "label": variant.label, "step": step,
        "tuning": table and {k: v * TARGETS for k, v in table.items()}, "utility": utility,
        "bytes": trace.bytes / SEEDS / ROUNDS,
        "evaluations": trace.evaluations / ROUNDS, "beta": second_modulus(W),
    }  # fmt: skip


def tracking() -> dict[str, Callable[[], Any]]:
    """Every policy, mixture and graph; what does not depend on a graph once. What the claims are about goes first."""
    wanted = {}
    first = (
        "ma_spl",
        "ma_spl, hint 10",
        "ma_osma",
        "ma_osma, plain gradient",
        "last_greedy",
        "last_greedy, hint",
        "osg",
    )
    for chosen in (first, ()):
        for mixture in MIXTURES:
            for graph in GRAPHS:
                for variant in POLICIES:
                    if (not chosen or variant.label in chosen) and (variant.local or graph == "complete"):
                        wanted[f"{mixture}|{graph}|{variant.label}"] = partial(track, mixture, graph, variant)
    tracks = partial(stone_soup_tracks, TARGETS, ROUNDS + 2, fit=20.0)
    for variant in POLICIES:
        if variant.label in (
            "ma_spl",
            "ma_spl, hint 10",
            "ma_osma",
            "osg",
            "last_greedy",
            "last_greedy, hint",
            "random",
        ):
            wanted[f"stonesoup|random|{variant.label}"] = partial(_soup, tracks, variant)
    return wanted


def _soup(tracks: Callable[[], Any], variant: Variant) -> dict[str, Any]:
    return track("8:1:1", "random", variant, tracks()) | {"mixture": "Stone Soup"}


def trap(flipped: bool = False, pairs: int = AGENTS // 2) -> FacilityLocation:
    """Pairs of agents whose best answers to each other's worse actions are their worse actions."""
    one = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0.01, 0, 0], [0, 0, 0, 0.1]], dtype=torch.float64)
    return FacilityLocation(torch.block_diag(*[one[:, [1, 0, 3, 2]] if flipped else one] * pairs))


def gadget(name: str, knobs: dict[str, Any], graph: str, flips: bool, order: list[int] | None = None) -> dict[str, Any]:
    """Play the pairs of agents; with flips the labels change every quarter."""
    both = trap(), trap(flipped=True)
    W = torch.eye(AGENTS, dtype=torch.float64) if graph == "none" else metropolis_weights(GRAPHS[graph]())
    made = make_policy(
        name, [2] * AGENTS, W=W, horizon=GADGET_ROUNDS, order=order, seed=list(range(SEEDS)), knobs=knobs
    )
    quarter = GADGET_ROUNDS // 4
    trace = simulate(made, lambda t: both[t // quarter % 2] if flips else both[0], rounds=GADGET_ROUNDS)
    share = trace.utility / AGENTS
    return {
        "policy": name, "knobs": knobs, "graph": graph, "flips": flips,
        "last": share[-quarter:].mean(0).tolist(), "whole": share.mean(0).tolist(),
    }  # fmt: skip


def gadgets() -> dict[str, Callable[[], Any]]:
    """Consensus against none, the surrogate against the plain gradient, and the trap of an order."""
    wanted = {}
    for flips in (False, True):
        kind = "flipping" if flips else "static"
        for graph in ("complete", "ring", "none"):
            for consensus in ("paper", "owner") if graph != "none" else ("paper",):
                for surrogate in (True, False):
                    for eta in (0.1, 1.0):
                        knobs = {"eta": eta, "consensus": consensus, "surrogate": surrogate}
                        label = f"ma_osma|{consensus}|{'surrogate' if surrogate else 'plain'}|{eta:g}"
                        wanted[f"{kind}|{graph}|{label}"] = partial(gadget, "ma_osma", knobs, graph, flips)
        for graph in ("complete", "ring"):
            osea = {"eta": 10.0, "gamma": 0.01}
            wanted[f"{kind}|{graph}|ma_osea|10"] = partial(gadget, "ma_osea", osea, graph, flips)
            wanted[f"{kind}|{graph}|ma_spl|1"] = partial(gadget, "ma_spl", {"eta": 1.0}, graph, flips)
        for scale in (0.3, 1.0, 10.0):
            for trapped in (True, False):
                # The first of a pair picks first, which is the trap; or the second does.
                order = list(range(AGENTS)) if trapped else list(range(AGENTS - 1, -1, -1))
                label = f"osg|{'trapped' if trapped else 'lucky'} order|{scale:g}"
                wanted[f"{kind}|none|{label}"] = partial(gadget, "osg", {"scale": scale}, "none", flips, order)
    return wanted


def vary(name: str, knobs: dict[str, Any], drop: float = 0.0, delay: int = 0) -> dict[str, Any]:
    """Play one variation on moving targets over the random graph."""
    network = Simulated(metropolis_weights(GRAPHS["random"]()), drop=drop, delay=delay)
    world = TrackingWorld(AGENTS, TARGETS, seed=list(range(SEEDS)))
    made = make_policy(name, world.blocks, W=network, horizon=ROUNDS, seed=list(range(SEEDS)), knobs=knobs)
    trace = simulate(made, world, rounds=ROUNDS)
    return {"policy": name, "knobs": knobs, "drop": drop, "delay": delay,
            "utility": (trace.utility.mean(0) * TARGETS).tolist()}  # fmt: skip


def sensitivity() -> dict[str, Callable[[], Any]]:
    """Curvature, samples, mixing, lost and late messages."""
    wanted: dict[str, Callable[[], Any]] = {}
    for c in (0.25, 0.5, 0.75, 1.0):
        wanted[f"ma_osma|c {c:g}"] = partial(vary, "ma_osma", {"eta": 1000.0, "c": c})
    for samples in (2, 8):
        wanted[f"ma_osma|samples {samples}"] = partial(vary, "ma_osma", {"eta": 1000.0, "n_samples": samples})
    for gamma in (0.001, 0.01, 0.03, 0.1):
        wanted[f"ma_osea|gamma {gamma:g}"] = partial(vary, "ma_osea", {"eta": 3000.0, "gamma": gamma})
    for eta in (10.0, 100.0, 1000.0, 10000.0):
        wanted[f"ma_spl|eta {eta:g}"] = partial(vary, "ma_spl", {"eta": eta})
    for drop in (0.1, 0.3, 0.5):
        wanted[f"ma_spl|drop {drop:g}"] = partial(vary, "ma_spl", {"eta": 1000.0}, drop)
    for delay in (1, 3):
        wanted[f"ma_spl|delay {delay}"] = partial(vary, "ma_spl", {"eta": 1000.0}, 0.0, delay)
    return wanted


def regret(name: str, graph: str, T: int) -> dict[str, Any]:
    """Play static gadgets for T rounds with a multiple of theory's step; regret is against 1 - 1/e of the optimum."""
    n = AGENTS
    links = {"path": lambda: path(n), **GRAPHS}[graph]()
    W = metropolis_weights(links)
    beta = second_modulus(W)
    eta = 10 * theory_step(T, 1.0, beta)
    made = make_policy(name, [2] * n, W=W, horizon=T, seed=list(range(SEEDS)), knobs={"eta": eta})
    utility = simulate(made, trap(), rounds=T).utility.sum(0) / n
    left = (1 - 0.36787944117) * T - utility
    return {
        "policy": name, "graph": graph, "T": T, "beta": beta, "eta": eta, "regret": (T - utility).tolist(),
        "regret of the ratio": left.tolist(),
    }  # fmt: skip


def horizon() -> dict[str, Callable[[], Any]]:
    """Regret by the number of rounds and by the graph."""
    return {
        f"{name}|{graph}|{T}": partial(regret, name, graph, T)
        for name in ("ma_osma", "ma_spl")
        for graph in ("complete", "random", "ring", "path")
        for T in (125, 250, 500, 1000)
    }


STUDIES = {"gadgets": gadgets, "tracking": tracking, "sensitivity": sensitivity, "horizon": horizon}


def main() -> None:
    """Run cells until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=4.0)
    options = parser.parse_args()
    about = {"seeds": SEEDS, "rounds": GADGET_ROUNDS if options.study == "gadgets" else ROUNDS}
    if options.study == "tracking":
        about |= {"steps": list(STEPS), "agents": AGENTS, "targets": TARGETS, "tuning worlds": TUNING}
    recall = resumable(f"submodular-{options.study}", minutes=options.minutes, about=about)
    measure_all(recall, STUDIES[options.study]())


if __name__ == "__main__":
    main()
