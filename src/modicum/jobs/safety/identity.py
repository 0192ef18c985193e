"""What a judge's verdicts depend on, so that those of another judge are never taken for its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from modicum.evaluate.chat import Judge
from modicum.record import digest


def judge_identity(judge: Judge) -> str:
    """Return a hash of a judge: its class and name, its knobs, the judges and models that it asks, what it learned.

    A knob is an argument of the class that the judge keeps under the same name. What a judge has learned it tells by an
    attribute ``learned``.

    Example:
        >>> from modicum.evaluate.judges.qwen_guard import Qwen3Guard
        >>> strict, loose = (Qwen3Guard(None, mode=mode) for mode in ("strict", "loose"))
        >>> judge_identity(strict) == judge_identity(loose)
        False

    Cost:
        One pass over the weights of the models that it asks.
    """
    return digest(_told(judge))


def weights_of(model: Any) -> str:
    """Return what tells chat models of one name apart: the weights of one on this machine, else nothing."""
    while hasattr(model, "inner"):  # a decoder or cache around the model
        model = model.inner
    inner: Any = getattr(model, "model", None)
    if not hasattr(inner, "state_dict"):
        return ""
    from modicum.jobs.training.references import fingerprint

    return fingerprint(inner, str(inner.dtype))


def _told(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _told(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_told(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "generate"):
        return [kind, getattr(value, "name", ""), weights_of(value)]
    names = inspect.signature(type(value)).parameters if hasattr(value, "judge") else ()
    knobs = {name: _told(getattr(value, name)) for name in names if hasattr(value, name)}
    return [kind, getattr(value, "name", ""), knobs, _told(getattr(value, "learned", None))]
