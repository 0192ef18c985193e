"""Settings that a zeroth-order method passes to the shared step, and the combinations that the step refuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

from modicum.errors import RecipeError, UnsupportedError
from modicum.knobs import fields_of, guarded
from modicum.optim.zeroth_order.leaves import Distribution, Leaf, Ranks
from modicum.optim.zeroth_order.lifts import Lift, Scale
from modicum.optim.zeroth_order.moments import Betas
from modicum.types import NonNegative, Positive, PositiveInt

Engine: TypeAlias = Literal["mutate", "adapter", "paired", "jvp"]
Parallel: TypeAlias = Literal["data", "query"]
Vectors: TypeAlias = Literal["dense", "freeze"]


@guarded
@dataclass(frozen=True)
class Settings:
    """Settings of the shared step: the knobs of a method, and what its class fixes.

    Attributes:
        lr: Learning rate.
        eps: Radius of the probe.
        variant: How the estimates become a step, in the user's words; an ``update`` and what goes with it.
        seed: Seed of all draws.
        queries: Directions per step, whose estimates are averaged.
        sides: 2 probes at plus and minus each direction; 1 at each direction and once at the weights themselves.
        weight_decay: Decoupled decay of the matrices.
        include: Patterns (regular expressions) of the parameters to train; all when not given.
        exclude: Patterns of parameters to leave alone.
        dense: Patterns of matrices that get a dense direction too.
        vectors: Whether biases and norms get a dense direction or stay as they are.
        engine: ``mutate`` writes the weights; ``adapter`` computes the perturbation beside them; ``paired`` does so
            for all points in one forward pass; ``jvp`` takes the exact derivative (a reference; memory of two models).
        passes: Passes over the weights per step of the ``mutate`` engine; 2 leaves the next perturbation in the
            weights until :meth:`settle_`.
        parallel: What several processes share out: the batch, or the queries.
        lift: How coordinates become a direction; ``None`` for dense directions only.
        ranks: Chooses the rank of each matrix.
        scale: See :func:`~modicum.optim.zeroth_order.lifts.scales`.
        refresh_every: Steps for which the factors are kept; for ever when ``None``.
        distribution: What dense directions are drawn from.
        update: How the estimates become a step: a name of :data:`~modicum.optim.zeroth_order.moments.UPDATES`.
        entrywise: Whether the update is made entry by entry of the weight, not on the coordinates.
        betas: Memories of the moving averages.
        adam_eps: Keeps Adam's divisor from zero.
        bias_correction: Whether the moving averages' start at zero is corrected.
    """

    lr: NonNegative
    eps: Positive
    variant: str = "sgd"
    seed: int = 0
    queries: PositiveInt = 1
    sides: Literal[1, 2] = 2
    weight_decay: NonNegative = 0.0
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    dense: Sequence[str] = ()
    vectors: Vectors = "dense"
    engine: Engine = "mutate"
    passes: Literal[2, 3] = 3
    parallel: Parallel = "data"
    lift: Lift | None = None
    ranks: Ranks | None = None
    scale: Scale = "unit"
    refresh_every: PositiveInt | None = None
    distribution: Distribution = "normal"
    update: str = "sgd"
    entrywise: bool = False
    betas: Betas = (0.9, 0.99)
    adam_eps: Positive = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        if self.weight_decay and self.engine != "mutate":
            raise UnsupportedError(
                f"weight_decay={self.weight_decay} needs engine='mutate': the {self.engine} engine does not write the "
                "weights, so it cannot shrink them. Set weight_decay to 0 or change the engine."
            )

    @property
    def adapts(self) -> bool:
        """Whether the learned coordinates stay beside the weights until they are folded in."""
        return self.engine in ("adapter", "paired") and not self.entrywise

    def check(self, leaves: Sequence[Leaf], method: str, *, shaped: bool) -> None:
        """Raise unless this engine can serve these tensors."""
        if self.engine in ("adapter", "paired") and self.lift is None:
            raise UnsupportedError(
                f"engine={self.engine!r} needs low-rank directions, which {method} does not draw. "
                "Use engine='mutate', or TeZO, LOZO or SubZero."
            )
        if self.engine != "mutate" and any(hasattr(leaf.param, "to_local") for leaf in leaves):
            raise UnsupportedError(f"engine={self.engine!r} does not read sharded weights. Use engine='mutate'.")
        if self.passes == 2 and (self.engine != "mutate" or shaped or self.weight_decay):
            raise UnsupportedError(
                "passes=2 needs engine='mutate', no weight decay, and directions that do not depend on the last step."
            )
        if self.parallel == "query" and self.engine == "mutate":
            raise UnsupportedError(
                "parallel='query' perturbs each process's weights differently, and restoring them leaves different "
                "rounding residues. Use engine='adapter', which leaves the weights alone."
            )
        stand_ins = [leaf.name for leaf in leaves if leaf.stands_for_quantized]
        if stand_ins and (not self.adapts or self.refresh_every):
            raise UnsupportedError(
                f"{stand_ins[0]} is quantized and cannot be written. Use engine='adapter' without an entry-wise "
                "variant and without refresh_every."
            )


@fields_of(Settings)
class Shared(TypedDict, total=False):
    """Knobs of every zeroth-order optimiser; :class:`Settings` explains them and holds their defaults."""

    weight_decay: NonNegative
    include: Sequence[str] | None
    exclude: Sequence[str]
    seed: int


@fields_of(Settings)
class Unshaped(Shared, total=False):
    """Knobs of the methods whose directions do not depend on earlier steps."""

    queries: PositiveInt
    passes: Literal[2, 3]
    parallel: Parallel


@fields_of(Settings)
class LowRank(Unshaped, total=False):
    """Knobs of the methods with low-rank directions."""

    vectors: Vectors
    dense: Sequence[str]
    engine: Engine


def check_variant(variant: str, known: Iterable[str]) -> None:
    """Raise unless the method has this variant.

    Raises:
        RecipeError: It has not.
    """
    names = list(known)
    if variant not in names:
        raise RecipeError(f"variant is {variant!r}, expected one of: {', '.join(names)}.")
