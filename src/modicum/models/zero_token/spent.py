"""What a looped model's passes cost: visits, cycles, time, and how much of it leaving early saves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils.output_capturing import CompileableContextVar

from modicum.models.zero_token.cache import without_trace
from modicum.models.zero_token.loop import Trace

# Those who count the passes of this thread.
_COUNTING = CompileableContextVar("modicum_zero_token_spent")


@dataclass
class _Kind:
    """Seconds of passes of one kind, and of those that were made with all cycles as well."""

    seconds: float = 0.0
    compared: float = 0.0
    full: float = 0.0
    passes: int = 0


@dataclass
class Spent:
    """Counts of a looped model's passes; see :meth:`~modicum.models.zero_token.looped.Looped.counted`.

    A compiled pass is not counted.

    Attributes:
        every: One in so many passes that may leave early is made with all cycles too, for the time; 0 for none.
        reading: Whether passes over several tokens are among them, which cost most.
        visits: Layer visits made, times the tokens that they computed.
        all_visits: What the same passes would have made with all cycles.
        cycles: Cycles of the tokens of each pass (b, t), padding as NaN.
    """

    every: int = 0
    reading: bool = True
    visits: int = 0
    all_visits: int = 0
    cycles: list[Tensor] = field(default_factory=list)
    kinds: dict[bool, _Kind] = field(default_factory=lambda: {False: _Kind(), True: _Kind()})

    @property
    def seconds(self) -> float:
        """Time of the passes."""
        return sum(kind.seconds for kind in self.kinds.values())

    @property
    def tokens(self) -> int:
        """Tokens that were computed, without padding."""
        return sum(int((~cycles.isnan()).sum()) for cycles in self.cycles)

    @property
    def mean_cycles(self) -> float | None:
        """Cycles of a token on average."""
        return sum(float(cycles.nansum()) for cycles in self.cycles) / self.tokens if self.tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens by the time of the passes."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def visits_saved(self) -> float | None:
        """Share of the visits of tokens that leaving early saved; below 0 where deciding cost more."""
        return 1 - self.visits / self.all_visits if self.all_visits else None

    @property
    def time_saved(self) -> float | None:
        """Share of the time that leaving early saved, by the passes that were made both ways; None without any.

        Passes over one token and over several are weighed by their own times.
        """
        used = [kind for kind in self.kinds.values() if kind.compared]
        if not used:
            return None
        return 1 - sum(k.seconds for k in used) / sum(k.seconds * k.full / k.compared for k in used)

    def compares(self, *, short: bool) -> bool:
        """Whether the next pass is made both ways; not the first, which warms up."""
        due = self.every > 0 and self.kinds[short].passes % self.every == min(1, self.every - 1)
        return due and (short or self.reading)

    def facts(self) -> dict[str, float | int | None]:
        """Return the numbers by name."""
        names = ("tokens", "mean_cycles", "visits", "visits_saved", "seconds", "time_saved", "tokens_per_second")
        return {name: getattr(self, name) for name in names}


@contextmanager
def counted(every: int = 0, *, reading: bool = True) -> Iterator[Spent]:
    """Count the passes that looped models make within; see :class:`Spent`."""
    spent = Spent(every=every, reading=reading)
    token = _COUNTING.set((*(_COUNTING.get() or ()), spent))
    try:
        yield spent
    finally:
        _COUNTING.reset(token)


def counting(model: Any, run: Callable[[Any], Any], named: dict[str, Any], call: Any) -> Any:
    """Make a pass, by ``run`` of its call, and count it where somebody counts."""
    meters: tuple[Spent, ...] = () if torch.compiler.is_compiling() else _COUNTING.get() or ()
    if not meters:
        return run(call)
    ids = named.get("input_ids")
    short = (named["inputs_embeds"] if ids is None else ids).shape[1] == 1
    comparing = [m for m in meters if m.compares(short=short)] if not model.training else []
    full = _full_time(model, run, named, type(call)(stay=True)) if comparing and model.decides(call) else None
    began = _now(model)
    out = run(call)
    seconds = _now(model) - began
    for meter in meters:
        kind = meter.kinds[short]
        kind.seconds, kind.passes = kind.seconds + seconds, kind.passes + 1
        _count(meter, model, call.trace)
        if full is not None and meter in comparing:
            kind.compared, kind.full = kind.compared + seconds, kind.full + full
    return out


def _count(meter: Spent, model: Any, trace: Trace) -> None:
    if trace.cycles is None or trace.run is None:
        return
    cycles, real = trace.cycles.float(), trace.run.real
    meter.visits += trace.computed
    meter.all_visits += len(model.schedule) * cycles.numel()
    meter.cycles.append(cycles if real is None else cycles.masked_fill(~real, torch.nan))


def _now(model: Any) -> float:
    """Return the time at which the model's device has done what it was asked to: an accelerator lags behind."""
    if model.device.type not in ("cpu", "meta"):
        torch.get_device_module(model.device).synchronize()
    return time.perf_counter()


def _full_time(model: Any, run: Callable[[Any], Any], named: dict[str, Any], call: Any) -> float:
    """Return the time of the pass with all cycles; the cache is put back."""
    with torch.no_grad(), without_trace(named.get("cache")):
        began = _now(model)
        run(call)
        return _now(model) - began
