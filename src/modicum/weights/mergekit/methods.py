"""mergekit's methods in terms of ours: which one each is, and what its parameters are called there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from modicum.errors import RecipeError, UnsupportedError
from modicum.registry import merge_method


class Translation(NamedTuple):
    """What a mergekit method is here."""

    method: str
    knobs: dict[str, Any]
    needs_base: bool | None  # whether it merges differences from a base; None: if the file names one


Data = dict[str, Any]
Reader = Callable[["Getter"], Translation]


@dataclass(frozen=True)
class Getter:
    """Looks parameters up: ``shared(name, default)`` of the merge, ``each(name[, default])`` of every model."""

    shared: Callable[[str, Any], Any]
    each: Callable[..., list[Any]]


def _linear(get: Getter) -> Translation:
    weights = get.each("weight", with_base=True)
    return Translation("linear", {"weights": weights, "normalize": get.shared("normalize", True)}, False)


def _task_arithmetic(get: Getter) -> Translation:
    weights = get.each("weight")
    total = sum(weights) if get.shared("normalize", False) else 1
    if total == 0:
        raise RecipeError(f"The weights {weights} sum to 0 and cannot be normalized. Set normalize: false.")
    return Translation("task_arithmetic", {"weights": weights, "scale": get.shared("lambda", 1.0) / total}, True)


def _sparse(
    ours: str, *, normalize: bool, elect: str | None = None, more: Callable[[Getter], Data] = lambda _: {}
) -> Reader:
    """Make the reader of a method that sparsifies deltas and adds them up; ``more`` reads knobs of its own."""

    def read(get: Getter) -> Translation:
        weights, density, scale = get.each("weight"), get.each("density", 1.0), get.shared("lambda", 1.0)
        normalized = bool(get.shared("normalize", normalize))
        if 0 in density:
            # mergekit drops the whole delta of an expert of density 0; without election its weight still divides.
            if normalized and elect == "none":
                scale, normalized = scale / sum(weights), False
            weights = [weight if share else 0.0 for weight, share in zip(weights, density)]
            density = [share or 1.0 for share in density]
        knobs = {"weights": weights, "scale": scale, "density": density, "normalize": normalized}
        return Translation(ours, knobs | ({"elect": elect} if elect else {}) | more(get), True)

    return read


def _gamma(get: Getter) -> Data:
    return {"gamma": get.each("gamma", 0.01)}


def _rescale(get: Getter) -> Data:
    norm = get.shared("rescale_norm", "l1")
    if norm not in (None, "l1"):
        raise UnsupportedError(f"rescale_norm is {norm!r}, expected l1 or none.")
    return {"rescale": "l1" if get.shared("rescale", True) and norm else "none"}


def _epsilon(get: Getter) -> Data:
    # mergekit leaves a tensor alone at density 1, whatever epsilon says.
    return _rescale(get) | {"epsilon": get.each("epsilon", 0.15)}


def _required(get: Getter, method: str, name: str) -> Any:
    value = get.shared(name, None)
    if value is None:
        raise RecipeError(f"{method}: parameter {name!r} is missing. Set it.")
    return value


def _slerp(get: Getter) -> Translation:
    return Translation("slerp", {"t": _required(get, "slerp", "t")}, True)


def _nuslerp(get: Getter) -> Translation:
    knobs = {
        "weights": get.each("weight"),
        "flatten": get.shared("nuslerp_flatten", True),
        "row_wise": not get.shared("nuslerp_row_wise", False),
    }
    return Translation("nuslerp", knobs, None)


def _multislerp(get: Getter) -> Translation:
    # mergekit's tangents are not scaled by their angles, so that their weighted sum, and with it the step, vanishes.
    knobs = {"weights": get.each("weight"), "normalize_weights": get.shared("normalize_weights", True), "steps": 0}
    return Translation("multislerp", knobs, None)


def _karcher(get: Getter) -> Translation:
    return Translation(
        "karcher", {"iterations": get.shared("max_iter", 10), "tolerance": get.shared("tol", 1e-5)}, False
    )


def _model_stock(get: Getter) -> Translation:
    return Translation("model_stock", {"clamp": False, "filter_wise": bool(get.shared("filter_wise", False))}, True)


def _nearswap(get: Getter) -> Translation:
    return Translation("nearswap", {"t": max(0.0, _required(get, "nearswap", "t"))}, True)


def _ram(plus: bool) -> Reader:
    def read(get: Getter) -> Translation:
        knobs = {"eps": get.shared("epsilon", 1e-5), "r": get.shared("r", 0.1) if plus else 0.0}
        return Translation("ram", knobs | {"alpha": get.shared("alpha", 0.2)}, True)

    return read


def _passthrough(get: Getter) -> Translation:
    return Translation("passthrough", {"scale": get.each("scale", 1.0, with_base=True)[0]}, False)


METHODS: dict[str, Reader] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "ties": _sparse("ties", normalize=True),
    "dare_linear": _sparse("dare", normalize=False, elect="none", more=_rescale),
    "dare_ties": _sparse("dare", normalize=False, elect="ties", more=_rescale),
    "breadcrumbs": _sparse("breadcrumbs", normalize=False, elect="none", more=_gamma),
    "breadcrumbs_ties": _sparse("breadcrumbs", normalize=False, elect="ties", more=_gamma),
    "della": _sparse("della", normalize=True, elect="ties", more=_epsilon),
    "della_linear": _sparse("della", normalize=False, elect="none", more=_epsilon),
    "model_stock": _model_stock,
    "slerp": _slerp,
    "nearswap": _nearswap,
    "arcee_fusion": lambda _: Translation("arcee_fusion", {}, True),
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "sce": lambda get: Translation("sce", {"select": get.shared("select_topk", 1.0)}, True),
    "ram": _ram(plus=False),
    "ramplus_tl": _ram(plus=True),
    "passthrough": _passthrough,
}


def method_of(name: str) -> Reader:
    """Return the reader of a method: mergekit's, or one of ours, whose knobs then are the parameters."""
    if name in METHODS:
        return METHODS[name]
    entry = merge_method[name]

    def read(get: Getter) -> Translation:
        knobs = {knob: get.shared(knob, None) for knob in entry.parameters[1]}
        if "weights" in knobs and knobs["weights"] is None:
            knobs["weights"] = get.each("weight", 1.0)
        given = {key: value for key, value in knobs.items() if value is not None}
        return Translation(name, given, entry.facts.base)

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
