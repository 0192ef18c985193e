"""Laws of policies, on small objectives that change every round."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from laws import Draw, default_knobs, knobs, law
from safetensors.torch import load, save
from torch import Tensor

from modicum.registry import Entry, policy
from modicum.submodular import FacilityLocation, metropolis_weights, ring

BLOCKS = ([2, 3, 2], [[0, 3], [1], [2, 4, 5]], [1], [2] * 5)
ROUNDS = 6


def objective(n: int, number: int, worlds: tuple[int, ...] = ()) -> FacilityLocation:
    rng = torch.Generator().manual_seed(number)
    return FacilityLocation(torch.rand(*worlds, 4, n, generator=rng, dtype=torch.float64))


def make(entry: Entry[Any], blocks: Any, values: dict[str, Any], seed: Any = 0) -> Any:
    W = metropolis_weights(ring(len(blocks)))
    offered = {"W": W, "horizon": ROUNDS, "order": None, "seed": seed}
    return entry.function(blocks, **{k: v for k, v in offered.items() if k in entry.facts.supplied}, **values)


def usual(entry: Entry[Any], draw: Draw) -> dict[str, Any]:
    values = knobs(entry, draw)
    # Without mixing MA-OSEA must be told so, and only small samples are worth their time.
    return values | ({"allow_zero_mixing": True} if "allow_zero_mixing" in values else {})


def play(entry: Entry[Any], made: Any, rounds: range, worlds: tuple[int, ...] = ()) -> list[Tensor]:
    actions = []
    for number in rounds:
        f = objective(made.n, number, worlds)
        actions.append(made.act(f if entry.facts.hints == "truth" else None))
        made.update(f)
    return actions


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Toy:
    """Choose from a generator of its own; what the broken policies below have in common."""

    def __init__(self, blocks: Any, *, seed: Any = 0) -> None:
        self.sizes = [k if isinstance(k, int) else len(k) for k in blocks]
        self.n, self.turn = sum(self.sizes), 0
        self.seeds = [seed] if isinstance(seed, int) else seed
        self.batched = not isinstance(seed, int)

    def number(self) -> int:
        return self.turn

    def act(self, hint: Any = None, *, rounds: int = 1) -> Tensor:
        rows = [[(self.number() + seed) % k for k in self.sizes] for seed in self.seeds]
        return torch.tensor(rows if self.batched else rows[0])

    def update(self, f: Any) -> None:
        self.turn += 1

    def probabilities(self) -> Tensor:
        return torch.cat([torch.full((k,), 1 / k) for k in self.sizes])

    def state_dict(self) -> dict[str, Tensor]:
        return {"turn": torch.tensor(self.turn)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.turn = int(state["turn"])


class OutOfRange(Toy):
    def act(self, hint: Any = None, *, rounds: int = 1) -> Tensor:
        return super().act(hint) + 1


class DrawsGlobally(Toy):
    def number(self) -> int:
        return int(torch.randint(100, ()))


class Forgets(Toy):
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.turn = 0


class MixesWorlds(Toy):
    def number(self) -> int:
        return self.turn + len(self.seeds)


@law(policy, "every agent chooses one of its own actions, with probabilities", broken=OutOfRange, supplied={"seed"})
def feasible(entry: Entry[Any], draw: Draw) -> None:
    blocks = draw(st.sampled_from(BLOCKS))
    made = make(entry, blocks, usual(entry, draw))
    sizes = torch.tensor([k if isinstance(k, int) else len(k) for k in blocks])
    for actions in play(entry, made, range(ROUNDS)):
        assert actions.shape == sizes.shape and actions.dtype == torch.long
        assert bool((actions < sizes).all() and (actions >= -1).all())
        p = made.probabilities()
        assert p.shape == (int(sizes.sum()),) and bool((p >= 0).all())
        assert all(float(part.sum()) <= 1 + 1e-9 for part in p.split(sizes.tolist()))


@law(policy, "one seed gives the same actions, whatever is drawn elsewhere", broken=DrawsGlobally, supplied={"seed"})
def repeats(entry: Entry[Any], draw: Draw) -> None:
    blocks, values = draw(st.sampled_from(BLOCKS)), usual(entry, draw)
    first = play(entry, make(entry, blocks, values), range(ROUNDS))
    torch.rand(3)
    assert same(first, play(entry, make(entry, blocks, values), range(ROUNDS)))


@law(policy, "a policy goes on from its state as if it had not stopped", broken=Forgets, supplied={"seed"})
def resumes(entry: Entry[Any], draw: Draw) -> None:
    blocks, values = draw(st.sampled_from(BLOCKS)), usual(entry, draw)
    whole = play(entry, make(entry, blocks, values), range(ROUNDS))
    made = make(entry, blocks, values)
    play(entry, made, range(3))
    state = load(save(made.state_dict()))
    fresh = make(entry, blocks, values, seed=98)
    fresh.load_state_dict(state)
    assert same(play(entry, fresh, range(3, ROUNDS)), whole[3:])


@law(policy, "each world of a batch goes as it would alone", broken=MixesWorlds, supplied={"seed"})
def worlds_apart(entry: Entry[Any], draw: Draw) -> None:
    blocks, values = draw(st.sampled_from(BLOCKS)), default_knobs(entry, **usual(entry, draw))
    seeds = [3, 8]
    together = play(entry, make(entry, blocks, values, seeds), range(ROUNDS), (2,))
    for i, seed in enumerate(seeds):
        alone = make(entry, blocks, values, seed)
        for number in range(ROUNDS):
            f = FacilityLocation(objective(alone.n, number, (2,)).V[i])
            actions = alone.act(f if entry.facts.hints == "truth" else None)
            assert torch.equal(actions, together[number][i])
            alone.update(f)
