r"""A loss along checkpoints: what an averager that learns is told, and the only place that makes means for it.

With a mean of checkpoints :math:`\bar\theta(w) = \sum_i w_i \theta_i`, one backward pass at :math:`\bar\theta` and n
inner products give the slope in the coefficients:

.. math::
    \partial F / \partial w_i = \langle \nabla F(\bar\theta), \theta_i \rangle
    = \langle \nabla F, \theta_i - \theta_n \rangle + \langle \nabla F, \theta_n \rangle

They are taken in the second form: see :mod:`modicum.weights.motion`. One mean and one gradient exist at a time;
checkpoints are read from their mapped files, and nothing has the size of all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from modicum import processes
from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.weights.averageable import Parts, check_factors, parts_of
from modicum.weights.compatibility import Tensors, spec_of
from modicum.weights.journal import Journal
from modicum.weights.motion import Motion, motions
from modicum.weights.stream import cores, run_all

Loss: TypeAlias = Callable[[dict[str, Tensor], Any], Tensor | float]
"""From the floating-point weights of a mean, by name, and a batch to the mean loss of the batch."""
T = TypeVar("T")
LARGE = 1 << 22  # weights; below, threads cost more than they save


class _Weights(dict[str, Tensor]):
    """The weights of a mean, which notice whether they are looked at."""

    seen = False

    def __getitem__(self, name: str) -> Tensor:
        self.seen = True
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        self.seen = True
        return super().__iter__()

    def get(self, *arguments: Any) -> Any:
        self.seen = True
        return super().get(*arguments)

    def __or__(self, other: Any) -> Any:
        return {**self, **other}

    def copy(self) -> dict[str, Tensor]:
        return {**self}

    def pop(self, *arguments: Any) -> Any:
        self.seen = True
        return super().pop(*arguments)

    def keys(self) -> Any:
        self.seen = True
        return super().keys()

    def values(self) -> Any:
        self.seen = True
        return super().values()

    def items(self) -> Any:
        self.seen = True
        return super().items()


@dataclass(frozen=True)
class Landscape:
    """The loss of a mean of checkpoints, as a function of their coefficients.

    Args:
        function: The loss of a mean on a batch. The weights that it is given are its own: it may
            keep them, and must not write to them.
        checkpoints: Oldest first.
        batches: What the search may look at.
        held_out: What a choice is judged by; ``batches`` when there is none.
        exclude: Regular expression of names of tensors that stay as they are in the newest checkpoint.
        device: Where the means go.
        journal: Remembers the answers, so that a search can go on.
        shared: All connected processes ask the same, and share the work: the tensors of the products, the batches of
            values. The answers are those of one process.

    Raises:
        RecipeError: There are no batches.
        CheckpointError: The checkpoints do not fit together.

    Example:
        >>> zero, one = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
        >>> landscape = Landscape(lambda weights, target: (weights["w"] - target).square().sum(), [zero, one], [0.25])
        >>> landscape.value([0.5, 0.5]), landscape.gradient([0.5, 0.5])
        (0.0625, (0.0625, tensor([0.0000, 0.5000], dtype=torch.float64)))
    """

    function: Loss
    checkpoints: Sequence[Tensors]
    batches: Sequence[Any]
    held_out: Sequence[Any] | None = None
    exclude: str | None = None
    device: str = "cpu"
    journal: Journal | None = None
    shared: bool = False
    counts: dict[str, int] = field(default_factory=lambda: {"values": 0, "gradients": 0})
    _known: dict[tuple[object, ...], list[float]] = field(default_factory=dict, repr=False)
    _slopes: list[bool] = field(default_factory=list, repr=False)
    _charged: set[tuple[object, ...]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise RecipeError(
                f"loss is a {type(self.function).__name__}, expected a function of (weights, batch) to one number."
            )
        for given, key in ((self.batches, "batches"), (self.held_out, "held_out")):
            if given is not None and not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
                raise RecipeError(
                    f"{key} is a {type(given).__name__}, and a search comes back to its batches. Give list({key})."
                )
            if given is not None and not len(given):
                raise RecipeError(f"{key} is empty, and a loss along checkpoints needs at least one batch. Give data.")
        _ = self.parts

    @cached_property
    def parts(self) -> Parts:
        """How the checkpoints' tensors take part in a mean."""
        return parts_of(self.checkpoints, self.exclude)

    @property
    def labels(self) -> list[str]:
        """What to call the checkpoints."""
        return self.parts.labels

    @cached_property
    def _motions(self) -> dict[str, Motion]:
        found = motions(self.checkpoints, self.parts)
        return {name: motion for name, motion in found.items() if name not in self.parts.ties}

    def value(self, weights: Sequence[float], step: int | None = None) -> float:
        """Return the loss of the mean with coefficients ``weights``; infinite where it is no number.

        Args:
            weights: One for each checkpoint.
            step: Look at one batch, the one whose turn it is in this step; at all of them when not given.

        Raises:
            CheckpointError: The loss of a single checkpoint is not finite.
        """
        return _mean(self.losses(weights, step))

    def score(self, weights: Sequence[float]) -> float:
        """Return the loss on the held-out batches, by which a choice is judged."""
        return _mean(self.losses(weights, held_out=True))

    def losses(self, weights: Sequence[float], step: int | None = None, *, held_out: bool = False) -> list[float]:
        """Return the loss on each batch; the same question is answered from memory.

        Args:
            weights: One for each checkpoint.
            step: As in :meth:`value`.
            held_out: On the held-out batches, where there are some.
        """
        weights = self._checked(weights)
        held_out = held_out and self.held_out is not None
        batches = self.held_out if held_out and self.held_out is not None else self._turn(step)
        turn = None if step is None else step % len(self.batches)
        key = (held_out, turn, tuple(weights))
        if key not in self._charged:
            self._charged.add(key)
            self.counts["values"] += len(batches)
        if key not in self._known:
            found = self._answer(key, lambda: self._evaluate(weights, batches))
            if not all(map(math.isfinite, found)):
                self._refuse_single(weights, key, held_out=held_out)
            self._known[key] = found
        return self._known[key]

    def gradient(self, weights: Sequence[float], step: int | None = None) -> tuple[float, Tensor]:
        """Return the loss, and its slope in each coefficient: ``(n,)`` in float64 on the CPU.

        Args:
            weights: One for each checkpoint.
            step: As in :meth:`value`.

        Raises:
            UnsupportedError: The loss has no gradient.
            RecipeError: The loss does not look at the weights.
            CheckpointError: The loss or its slope is not finite.
        """
        weights = self._checked(weights)
        turn = None if step is None else step % len(self.batches)
        self.counts["gradients"] += len(self._turn(step))
        value, *slope = self._answer(
            ("gradient", turn, tuple(weights)), lambda: self._differentiate(weights, self._turn(step))
        )
        self._slopes.append(any(slope))
        return value, torch.tensor(slope, dtype=torch.float64)

    def begin(self) -> None:
        """Begin a search: what an earlier one has asked already counts for this one too, so that costs compare."""
        self._charged.clear()

    def check_finite(self) -> None:
        """Refuse checkpoints with weights that are not finite, the unused ones too."""
        self._each(lambda name: self._motions[name].check(), list(self._motions))

    def check_followed(self) -> None:
        """Refuse a loss that was the same, or had no slope, wherever it was asked; not of checkpoints that are equal.

        Raises:
            RecipeError: It probably used the model's own weights.
        """
        flat = bool(self._slopes) and not any(self._slopes)
        if not flat and not self._constant:
            return
        first, *others = self.checkpoints
        if any(not torch.equal(first[name], other[name]) for name in self._motions for other in others):
            what = "has a gradient of zero in all weights that it is given" if flat else "is the same number"
            raise RecipeError(
                f"The loss {what}, wherever it was asked: it does not depend on the weights. Compute it by "
                "torch.func.functional_call, not from the model's own weights."
            )

    @property
    def _constant(self) -> bool:
        """Whether several means, of which two may be alike by chance, have one loss on the same batches."""
        answers: dict[object, list[list[float]]] = {}
        for (*data, _), losses in self._known.items():
            answers.setdefault(tuple(data), []).append(losses)
        most = max(answers.values(), key=len, default=[])
        return len(most) > 2 and all(losses == found[0] for found in answers.values() for losses in found)

    def _turn(self, step: int | None) -> Sequence[Any]:
        return self.batches if step is None else [self.batches[step % len(self.batches)]]

    def _checked(self, weights: Sequence[float]) -> list[float]:
        if len(weights) != len(self.checkpoints):
            raise ValueError(f"got {len(weights)} coefficients for {len(self.checkpoints)} checkpoints")
        return [float(weight) for weight in weights]

    def _answer(self, key: tuple[object, ...], ask: Callable[[], list[float]]) -> list[float]:
        if self.journal is None:
            return ask()
        return self.journal.answer(hashlib.sha256(repr(key).encode()).hexdigest()[:16], ask)

    def _evaluate(self, weights: Sequence[float], batches: Sequence[Any]) -> list[float]:
        rank, world = self._place
        mine = range(rank, len(batches), world)
        found = torch.zeros(len(batches), dtype=torch.float64)
        with torch.no_grad():
            mean = self._mean(weights) if mine else _Weights()
            for place in mine:
                found[place] = float(self._ask(mean, batches[place], fresh=world > 1 or len(batches) > 1))
        values: list[float] = self._sum(found).tolist()
        return values

    def _ask(self, mean: _Weights, batch: Any, *, fresh: bool) -> Tensor | float:
        """Ask for the loss of a batch; with ``fresh``, in a dictionary of its own, which it may empty."""
        given = _Weights(dict.items(mean)) if fresh else mean
        value = self.function(given, batch)
        if not given.seen:
            raise RecipeError(
                "The loss does not look at the weights that it is given. Compute it from them, as "
                "torch.func.functional_call(model, weights, …) does, not from the model's own."
            )
        if torch.is_tensor(value) and value.numel() != 1:
            raise RecipeError(f"The loss of a batch has shape {list(value.shape)}, expected one number: take its mean.")
        return value

    def _differentiate(self, weights: Sequence[float], batches: Sequence[Any]) -> list[float]:
        mean = self._mean(weights)
        moving = {name: dict.__getitem__(mean, name) for name, motion in self._motions.items() if motion.moves}
        for tensor in moving.values():
            tensor.requires_grad_()
        total, leaves = 0.0, list(moving.values())
        if not leaves:
            raise RecipeError("The checkpoints hold no weight that could be averaged. Choose others.")
        with torch.enable_grad():
            for batch in batches:
                value = self._ask(mean, batch, fresh=len(batches) > 1)
                if not torch.is_tensor(value) or not value.requires_grad:
                    raise UnsupportedError(
                        "The loss is a number without a gradient, and this search follows gradients. Choose "
                        "estimator: reinforce (sewa), greedy, window or best, which need values only; or return the "
                        "differentiable loss."
                    )
                share = value.reshape(()) / len(batches)
                share.backward(inputs=leaves)  # type: ignore[no-untyped-call]  # into the mean alone, not the model
                total += float(share.detach())
        del mean
        gradients = {name: tensor.grad for name, tensor in moving.items() if tensor.grad is not None}
        for tensor in leaves:
            tensor.grad = None
        moving.clear()
        leaves.clear()
        if not gradients:
            raise RecipeError(
                "The loss has no gradient in the weights that it is given: it probably used the model's own. Compute "
                "it by torch.func.functional_call(model, weights, …)."
            )
        slope = self._products(gradients)
        if not math.isfinite(total) or not bool(slope.isfinite().all()):
            self._refuse_single(weights)
            raise CheckpointError(
                "The loss of a mean of the checkpoints has no finite gradient, although that of each is finite: they "
                "lie in different regions. Leave out those before the break, or choose greedy or window."
            )
        return [total, *slope.tolist()]

    def _products(self, gradients: dict[str, Tensor]) -> Tensor:
        rank, world = self._place
        names = sorted(gradients)

        def one(name: str) -> Tensor:
            gradient = gradients.pop(name)
            return self._motions[name].products(gradient)

        found = torch.zeros(len(names), len(self.checkpoints), dtype=torch.float64)
        mine = names[rank::world]
        for name, products in self._each(one, mine).items():
            found[names.index(name)] = products
        return self._sum(found).sum(0)  # tensor by tensor in one order, whoever made them

    def _each(self, work: Callable[[str], T], names: Sequence[str]) -> dict[str, T]:
        """Do the same for each tensor: side by side on the cores that torch uses, where that is worth a thread."""
        workers = min(cores(), torch.get_num_threads(), len(names))
        if workers < 2 or not self._large:
            return {name: work(name) for name in names}
        return dict(run_all(work, names, workers=workers))

    @cached_property
    def _large(self) -> bool:
        return sum(spec_of(self.checkpoints[-1], name).numel for name in self._motions) > LARGE

    @property
    def _place(self) -> tuple[int, int]:
        return (processes.rank(), processes.world()) if self.shared else (0, 1)

    def _sum(self, numbers: Tensor) -> Tensor:
        """Return the numbers of all processes, each of which has zeros where another one's stand."""
        if self._place[1] == 1:
            return numbers
        return processes.gather(numbers[None]).sum(0)

    def _mean(self, weights: Sequence[float]) -> _Weights:
        check_factors(self._motions, weights)
        made = self._each(lambda name: self._motions[name].mean(weights), list(self._motions))
        mean = _Weights()
        for name in self._motions:
            tensor = made.pop(name).detach()
            dict.__setitem__(mean, name, tensor.to(self.device))
        for name, known in self.parts.ties.items():
            if dict.__contains__(mean, known):
                dict.__setitem__(mean, name, dict.__getitem__(mean, known))
        mean.seen = False
        return mean

    def _refuse_single(
        self, weights: Sequence[float], key: tuple[object, ...] = (None,), *, held_out: bool = False
    ) -> None:
        """Name the checkpoint whose own loss on the same data is not finite, of those that a mean is of."""
        units = [[float(i == j) for j in range(len(weights))] for i in range(len(weights))]
        for unit, name, weight in zip(units, self.labels, weights):
            alone = tuple(unit) == key[-1]
            if weight and (alone or not math.isfinite(_mean(self.losses(unit, held_out=held_out)))):
                where = " on the held-out data" if held_out else ""
                raise CheckpointError(f"The loss of {name}{where} is not finite. Leave that checkpoint out.")


def _mean(values: Sequence[float]) -> float:
    total = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
    return total
