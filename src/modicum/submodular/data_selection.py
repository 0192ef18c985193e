r"""Which data each worker trains on next, chosen by the workers together, without a centre.

Agents are data-parallel workers; a round is a stretch of optimiser steps; worker ``i``'s action ``d`` is to train on
domain ``d`` next. Probes ``j``, held-out examples of every domain, have needs :math:`w_j` that follow their losses, and
domain ``d`` serves probe ``j`` with a similarity :math:`s_{jd}`:

.. math::
    f_t(A) = \sum_j w_{t,j} \max_{(i,d) \in A} s_{jd} \quad\text{or}\quad
    f_t(A) = \sum_j w_{t,j} \Bigl(1 - \prod_{(i,d) \in A} (1 - s_{jd})\Bigr)

Both are monotone and submodular, and once the needs are known every action's gain can be computed without training on
it. The published mixtures (``odm``, DoReMi as ``hedge``) learn from losses instead: ``utility="loss"`` is the sum of
the losses of the domains that are taken, each counted once.

This application is ours, not the publications'. With a global all-reduce a central greedy costs the same messages; the
policies earn their keep where workers only reach neighbours. Higher coverage is not lower loss: measure both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modicum import registry
from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.submodular.draws import keys, seeds_of, uniform
from modicum.submodular.functions.base import SetFunction
from modicum.submodular.functions.coverage import ProbabilisticCoverage
from modicum.submodular.functions.facility import FacilityLocation
from modicum.submodular.geometry import array
from modicum.submodular.graphs import metropolis_weights, ring
from modicum.submodular.policies.make import make_policy
from modicum.types import Decay, PositiveInt, UnitInterval

ETA = 1.0  # a step for objectives of at most 1
Utility = Literal["coverage", "facility", "loss"]


def similarities(features: Any, probes: Any | None = None) -> Tensor:
    """Return the clipped cosines between probes and domains.

    Args:
        features: A vector for each domain, (K, d), such as mean embeddings or counts of n-grams.
        probes: A vector for each probe, (m, d); the domains' own where not given.

    Returns:
        Numbers in [0, 1], (m, K).

    Raises:
        RecipeError: Features are not finite, or of two lengths.

    Example:
        >>> similarities([[1.0, 0.0], [1.0, 1.0]])[0].tolist()
        [1.0, 0.7071067811865475]
    """
    x, y = (array(part, "features").double() for part in (features, features if probes is None else probes))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not bool(x.isfinite().all() and y.isfinite().all()):
        raise RecipeError(f"features {tuple(x.shape)} and probes {tuple(y.shape)}: expected finite (number, length).")
    x, y = (part / part.norm(dim=1, keepdim=True).clamp(min=1e-12) for part in (x, y))
    return (y @ x.T).clamp(0, 1)


def counted(texts: Sequence[str], *, size: int = 4096) -> Tensor:
    """Return a vector of hashed three-byte sequences for each text, of square roots of counts less their mean.

    The mean over the texts is what they all have in common; what is left tells them apart.

    Args:
        texts: Texts of the domains, or of the probes; give both together, so that they share a mean.
        size: Length of a vector.

    Example:
        >>> near, far = similarities(counted(["abcabc", "abcabcabc", "xyzxyz"]))[0, 1:].tolist()
        >>> near > 0.9, far
        (True, 0.0)
    """
    found = []
    for text in texts:
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        places = (data[:-2] * 65599 + data[1:-1] * 257 + data[2:]) % size if len(data) > 2 else np.zeros(0, np.int64)
        counts = np.sqrt(np.bincount(places, minlength=size).astype(float))
        found.append(torch.from_numpy(counts / max(1e-12, float(np.linalg.norm(counts)))))
    vectors = torch.stack(found)
    return vectors - vectors.mean(0)


def objective_of(utility: Utility, similarity: Tensor, weights: Tensor, *, workers: int) -> SetFunction:
    """Return what the choices of all workers are worth.

    Args:
        utility: ``coverage`` (a second worker on a domain still helps), ``facility`` (it does not), or ``loss``: the
            sum of the weights of the probes whose own domains are taken, whatever is similar.
        similarity: How well each domain serves each probe, (probes, domains).
        weights: Of the probes, (..., probes), with worlds before.
        workers: How many workers choose.

    Example:
        >>> f = objective_of("loss", torch.eye(2), torch.tensor([2.0, 3.0]), workers=2)
        >>> float(f.value([True, False, True, False])), float(f.value([True, False, False, True]))
        (2.0, 5.0)
    """
    columns = list(range(similarity.shape[1])) * workers
    if utility == "loss":
        return FacilityLocation(torch.diag_embed(weights), columns=columns)
    table = similarity.expand(*weights.shape[:-1], -1, -1)
    if utility == "facility":
        return FacilityLocation(table, weights=weights, columns=columns)
    return ProbabilisticCoverage(table[..., columns], weights=weights)


def checked_table(similarity: Any, utility: str) -> Tensor:
    """Return similarities as a table that suits a utility.

    Raises:
        RecipeError: It is no table of numbers in [0, 1], or the utility is unknown or has no use for it.
    """
    if utility not in ("coverage", "facility", "loss"):
        raise RecipeError(f"utility is {utility!r}, expected coverage, facility or loss.")
    table = array(similarity, "similarity").double()
    if table.ndim != 2 or not table.numel() or not bool(((table >= 0) & (table <= 1)).all()):
        raise RecipeError(f"similarity of shape {tuple(table.shape)}: expected (probes, domains) in [0, 1].")
    if utility == "loss" and len(table) != table.shape[1]:
        raise RecipeError(
            f"utility loss is of each domain's own probe, but {len(table)} probes and {table.shape[1]} domains are "
            "given. Give as many probes as domains, in the same order, or take utility coverage."
        )
    return table


@guarded
class Needs:
    """How much each probe still needs, from its losses.

    .. math::
        e_j = \\max(0, \\text{loss}_j - \\text{reference}_j), \\qquad
        w \\leftarrow m w + (1 - m) e, \\quad \\text{normalised to sum 1}

    Args:
        probes: How many there are.
        reference: Loss of each probe that is good enough; 0 where not given.
        memory: Share of the past that is kept, in [0, 1).
        floor: Share that is spread evenly, so that no probe is ever forgotten, in [0, 1].

    Raises:
        RecipeError: A knob is out of range.

    Example:
        >>> needs = Needs(2, memory=0.0, floor=0.0)
        >>> needs.observe([3.0, 1.0]).tolist()
        [0.75, 0.25]
    """

    def __init__(
        self,
        probes: PositiveInt,
        *,
        reference: Sequence[float] | None = None,
        memory: Decay = 0.5,
        floor: UnitInterval = 0.1,
    ) -> None:
        self.reference = array([0.0] * probes if reference is None else reference, "reference").double()
        if self.reference.shape != (probes,):
            raise RecipeError(f"reference has {len(self.reference)} losses, expected {probes}, one for each probe.")
        self.memory, self.floor = memory, floor
        self.excess = torch.full((probes,), math.nan, dtype=torch.float64)

    @property
    def known(self) -> Tensor:
        """The smoothed losses in excess of the reference; 1 each before anything was observed."""
        return self.excess.nan_to_num(nan=1.0)

    @property
    def weights(self) -> Tensor:
        """The needs, which sum to 1; even before anything was observed, and once nothing is needed."""
        even = torch.full_like(self.excess, 1 / len(self.excess))
        total = self.known.sum()
        return (1 - self.floor) * (self.known / total if float(total) > 0 else even) + self.floor * even

    def observe(self, losses: Any) -> Tensor:
        """Take in a loss for each probe and return the needs.

        Raises:
            RecipeError: There are more or fewer losses than probes, or one is not finite.
        """
        found = torch.as_tensor(losses).double().cpu()
        if found.shape != self.excess.shape or not bool(found.isfinite().all()):
            raise RecipeError(
                f"losses {found.tolist()}: expected {len(self.excess)} finite losses, one for each probe."
            )
        now = (found - self.reference).clamp(min=0)
        first = bool(self.excess.isnan().any())
        self.excess = now if first else self.memory * self.excess + (1 - self.memory) * now
        return self.weights


@guarded
class DomainScheduler:
    """Which domain each worker trains on, round by round.

    Every process holds the same scheduler and feeds it the same losses: all draws are named by worker and round, so
    that all agree on everybody's choice without a message. What the policy would send is simulated and counted.

    Args:
        similarity: How well each domain serves each probe, (probes, domains), in [0, 1].
        workers: How many workers choose.
        domains: Names of the domains.
        policy: A policy's name.
        worker: The worker that this process trains, whose domain :meth:`next_domain` returns.
        utility: ``coverage``, ``facility`` or ``loss`` (see :func:`objective_of`), of the needs; with ``loss`` of the
            losses themselves, as ``odm`` and DoReMi (``hedge``) learn.
        W: Weights between the workers; a ring where not given.
        horizon: Number of rounds, which some policies must know.
        needs: How needs follow from losses; by default smoothed, but with ``loss`` as they are.
        floor: Share of choices that are uniform, so that no domain is ever left out.
        seed: Seed of all draws.
        knobs: The policy's own knobs; a step that is not given is 1.

    Raises:
        RecipeError: A knob does not fit.

    Example:
        >>> scheduler = DomainScheduler(torch.eye(3), workers=2, policy="ma_spl")
        >>> len(scheduler.next_domains())
        2
        >>> scheduler.observe([2.0, 1.0, 1.0])
    """

    def __init__(
        self,
        similarity: Any,
        *,
        workers: PositiveInt,
        domains: Sequence[str] | None = None,
        policy: str = "ma_spl",
        worker: int = 0,
        utility: Utility = "coverage",
        W: Any = None,
        horizon: PositiveInt = 1000,
        needs: Needs | None = None,
        floor: UnitInterval = 0.05,
        seed: int = 0,
        knobs: Mapping[str, Any] | None = None,
    ) -> None:
        self.similarity = checked_table(similarity, utility)
        probes, count = self.similarity.shape
        self.domains = list(domains) if domains is not None else [str(d) for d in range(count)]
        if len(self.domains) != count:
            raise RecipeError(f"{len(self.domains)} domains are named, but similarity has {count} columns.")
        if not 0 <= worker < workers:
            raise RecipeError(f"worker is {worker}, expected 0 to {workers - 1}.")
        self.worker, self.workers, self.utility, self.floor = worker, workers, utility, floor
        self.needs = needs or Needs(probes, memory=0.0 if utility == "loss" else 0.5)
        weights = metropolis_weights(ring(workers)) if W is None else W
        blocks = [count] * workers
        own = {"eta": ETA} if registry.policy[policy].facts.step == "eta" else {}
        self.policy = make_policy(policy, blocks, W=weights, horizon=horizon, seed=seed, knobs={**own, **(knobs or {})})
        self.policy.floor = floor
        self._keys = keys([seed], "domain-floor", range(workers))[0]
        self.round = 0
        self.current: list[int] | None = None

    def objective(self) -> SetFunction:
        """Return the objective of the present needs."""
        weights = self.needs.known if self.utility == "loss" else self.needs.weights
        return objective_of(self.utility, self.similarity, weights, workers=self.workers)

    def next_domains(self) -> list[int]:
        """Choose a domain for every worker; until the next observation the choice stands."""
        if self.current is None:
            seen = self.objective() if self.policy.sees == "now" else None
            chosen = self.policy.act(seen)
            draws = uniform(self._keys, self.round, 2)
            other = (draws[:, 1] * len(self.domains)).long()
            chosen = torch.where((draws[:, 0] < self.floor) | (chosen < 0), other, chosen)
            self.policy.overrule(chosen)
            self.current = [int(d) for d in chosen]
        return list(self.current)

    def next_domain(self) -> int:
        """Choose for all and return this worker's domain."""
        return self.next_domains()[self.worker]

    def observe(self, losses: Any) -> None:
        """End the round: take in a loss for each probe, and let the policy learn what its actions were worth."""
        self.next_domains()
        self.needs.observe(losses)
        self.policy.update(self.objective())
        self.round += 1
        self.current = None

    def shares(self) -> Tensor:
        """Return the probability of each domain for each worker, floor included, (workers, domains)."""
        p = self.policy.probabilities().reshape(self.workers, -1)
        p = p + (1 - p.sum(1, keepdim=True)) / len(self.domains)  # a worker that would idle draws any domain
        return (1 - self.floor) * p + self.floor / len(self.domains)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        current = torch.tensor(self.current if self.current is not None else [-1] * self.workers)
        own = {"round": torch.tensor(self.round), "current": current, "excess": self.needs.excess}
        return own | {f"policy.{name}": part for name, part in self.policy.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state.

        Raises:
            RecipeError: It is the state of another policy, or of other workers or domains.
        """
        if missing := sorted({"round", "current", "excess"} - state.keys()):
            raise RecipeError(f"state of a scheduler: {', '.join(missing)} is missing. Is it another object's?")
        if state["excess"].shape != self.needs.excess.shape or len(state["current"]) != self.workers:
            raise RecipeError("the scheduler's state is of other workers or probes. Take those it was saved with.")
        self.round = int(state["round"])
        self.current = None if int(state["current"][0]) < 0 else [int(d) for d in state["current"]]
        self.needs.excess = state["excess"].double().clone()
        inner = {n.removeprefix("policy."): part for n, part in state.items() if n.startswith("policy.")}
        self.policy.load_state_dict(inner)


@guarded
class SelectionWorld:
    """Needs that fall where workers train and rise elsewhere: data selection without the training.

    Args:
        similarity: How well each domain serves each probe, (probes, domains), in [0, 1].
        workers: How many workers choose.
        utility: See :func:`objective_of`.
        learn: How much of a probe's need one round of full service takes away.
        drift: How fast needs return to 1 of themselves.
        seed: Seeds of the first needs; several for as many worlds.

    Raises:
        RecipeError: A knob is out of range.

    Example:
        >>> world = SelectionWorld(torch.eye(3), workers=2)
        >>> before = world.need
        >>> world.step(torch.tensor([0, 1]))
        >>> (world.need < before).tolist()
        [[True, True, False]]
    """

    def __init__(
        self,
        similarity: Any,
        *,
        workers: PositiveInt,
        utility: Utility = "coverage",
        learn: UnitInterval = 0.3,
        drift: UnitInterval = 0.05,
        seed: int | Sequence[int] = 0,
    ) -> None:
        self.similarity = checked_table(similarity, utility)
        self.workers, self.utility, self.learn, self.drift = workers, utility, learn, drift
        seeds, self.worlds = seeds_of(seed)
        probes, count = self.similarity.shape
        self.blocks = [count] * workers
        self.need = 0.5 + 0.5 * uniform(keys(seeds, "selection-need", [0])[:, 0], 0, probes)
        self._last = self.need

    def objective(self) -> SetFunction:
        """Return the objective of the present needs."""
        return self._of(self.need)

    def predict(self) -> SetFunction:
        """Return the objective of the needs one round ago."""
        return self._of(self._last)

    def _of(self, need: Tensor) -> SetFunction:
        weights = need if self.utility == "loss" else need / need.sum(-1, keepdim=True)
        return objective_of(self.utility, self.similarity, weights if self.worlds else weights[0], workers=self.workers)

    def step(self, actions: Tensor) -> None:
        """Train on the chosen domains."""
        chosen = actions.reshape(len(self.need), -1)
        served = self.similarity[:, chosen.clamp(min=0)] * (chosen >= 0)
        missed = (1 - self.learn * served).prod(-1).T
        self._last = self.need
        self.need = self.need * missed + self.drift * (1 - self.need)
