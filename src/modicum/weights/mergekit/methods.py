"""mergekit's methods in terms of ours: which one each is, and what its parameters are called there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from modicum.errors import RecipeError, UnsupportedError
from modicum.registry import merge_method

# Our method, its knobs, and whether it works on deltas from the base; None when it does if there is a base.
Made = tuple[str, dict[str, Any], bool | None]


@dataclass(frozen=True)
class Getter:
    """Looks parameters up: ``shared(name, default)`` of the merge, ``each(name[, default])`` of every model."""

    shared: Callable[[str, Any], Any]
    each: Callable[..., list[Any]]


def _linear(get: Getter) -> Made:
    weights = get.each("weight", everyone=True)
    return "linear", {"weights": weights, "normalize": get.shared("normalize", True)}, False


def _deltas(ours: str, *, normalize: bool, rescale: bool = False, elect: str | None = None) -> Callable[[Getter], Made]:
    """Make the reader of a method that sparsifies deltas and adds them up."""

    def read(get: Getter) -> Made:
        weights = get.each("weight")
        knobs: dict[str, Any] = {"weights": weights, "scale": get.shared("lambda", 1.0)}
        normalized = bool(get.shared("normalize", normalize))
        if ours == "task_arithmetic":
            total = sum(weights)
            if normalized and total == 0:
                raise RecipeError(f"The weights {weights} sum to 0 and cannot be normalized. Set normalize: false.")
            knobs["scale"] /= total if normalized else 1
            return ours, knobs, True
        knobs |= {"density": get.each("density", 1.0), "normalize": normalized}
        if elect is not None:
            knobs["elect"] = elect
        if ours == "breadcrumbs":
            knobs["gamma"] = get.each("gamma", 0.01)
        if ours == "della":
            # mergekit leaves a tensor alone at density 1, whatever epsilon says.
            knobs["epsilon"] = get.each("epsilon", 0.15)
        if ours in ("dare", "della"):
            norm = get.shared("rescale_norm", "l1" if rescale else None)
            if norm not in (None, "l1"):
                raise UnsupportedError(f"rescale_norm is {norm!r}, expected l1 or none.")
            on = bool(get.shared("rescale", rescale)) and norm is not None
            knobs["rescale"] = "l1" if on else "none"
        return ours, knobs, True

    return read


def _slerp(get: Getter) -> Made:
    t = get.shared("t", None)
    if t is None:
        raise RecipeError("slerp: parameter 't' is missing. Set it.")
    return "slerp", {"t": t}, True


def _nuslerp(get: Getter) -> Made:
    knobs = {
        "weights": get.each("weight"),
        "flatten": get.shared("nuslerp_flatten", True),
        "row_wise": not get.shared("nuslerp_row_wise", False),
    }
    return "nuslerp", knobs, None


def _multislerp(get: Getter) -> Made:
    # mergekit's tangents are not scaled by their angles, so that their weighted sum, and with it the step, vanishes.
    knobs = {"weights": get.each("weight"), "normalize_weights": get.shared("normalize_weights", True), "steps": 0}
    return "multislerp", knobs, None


def _karcher(get: Getter) -> Made:
    return "karcher", {"iterations": get.shared("max_iter", 10), "tolerance": get.shared("tol", 1e-5)}, False


def _model_stock(get: Getter) -> Made:
    if get.shared("filter_wise", False):
        raise UnsupportedError("model_stock with filter_wise is not supported. Remove it.")
    return "model_stock", {"clamp": False}, True


def _ram(plus: bool) -> Callable[[Getter], Made]:
    def read(get: Getter) -> Made:
        knobs = {"eps": get.shared("epsilon", 1e-5), "r": get.shared("r", 0.1) if plus else 0.0}
        return "ram", knobs | {"alpha": get.shared("alpha", 0.2)}, True

    return read


METHODS: dict[str, Callable[[Getter], Made]] = {
    "linear": _linear,
    "task_arithmetic": _deltas("task_arithmetic", normalize=False),
    "ties": _deltas("ties", normalize=True),
    "dare_linear": _deltas("dare", normalize=False, rescale=True, elect="none"),
    "dare_ties": _deltas("dare", normalize=False, rescale=True, elect="ties"),
    "breadcrumbs": _deltas("breadcrumbs", normalize=False, elect="none"),
    "breadcrumbs_ties": _deltas("breadcrumbs", normalize=False, elect="ties"),
    "della": _deltas("della", normalize=True, rescale=True, elect="ties"),
    "della_linear": _deltas("della", normalize=False, rescale=True, elect="none"),
    "model_stock": _model_stock,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "sce": lambda get: ("sce", {"select": get.shared("select_topk", 1.0)}, True),
    "ram": _ram(plus=False),
    "ramplus_tl": _ram(plus=True),
    "passthrough": lambda get: ("passthrough", {"scale": get.each("scale", 1.0, everyone=True)[0]}, False),
}


def method_of(name: str) -> Callable[[Getter], Made]:
    """Return the reader of a method: mergekit's, or one of ours, whose knobs then are the parameters."""
    if name in METHODS:
        return METHODS[name]
    entry = merge_method[name]

    def read(get: Getter) -> Made:
        knobs = {knob: get.shared(knob, None) for knob in entry.parameters[1]}
        if "weights" in knobs and knobs["weights"] is None:
            knobs["weights"] = get.each("weight", 1.0)
        given = {key: value for key, value in knobs.items() if value is not None}
        return name, given, entry.facts.base

    return read


def parameters_of(name: str) -> set[str]:
    """Return the parameters that a method reads.

    Example:
        >>> sorted(parameters_of("sce"))
        ['select_topk']
    """
    asked: set[str] = set()

    def shared(key: str, default: Any) -> Any:
        asked.add(key)
        return default

    def each(key: str, default: Any = 1.0, **_: Any) -> list[Any]:
        return [shared(key, default)]

    with suppress(RecipeError):  # raised where a required parameter is missing, as here all are
        method_of(name)(Getter(shared, each))
    return asked
