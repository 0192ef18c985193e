"""mergekit's methods in terms of ours: which one each is, and what its parameters are called there."""

from __future__ import annotations

import math
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
    """Looks parameters up: ``shared(name, default)`` of the merge, ``each(name[, default])`` of every model.

    What a reader counts or decides with comes as a number or a switch; what goes to a method as it is, the method's own
    schema checks.
    """

    shared: Callable[[str, Any], Any]
    each: Callable[..., list[Any]]

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number of the merge; without a default it must be set.

        Raises:
            RecipeError: It is missing, or no finite number.
        """
        value = self.shared(name, default)
        if value is None:
            raise RecipeError(f"parameter {name!r} is missing. Set it.")
        return _number(value, name)

    def numbers(self, name: str, *default: float, with_base: bool = False) -> list[float]:
        """Return a number of every model.

        Raises:
            RecipeError: One is missing, or no finite number.
        """
        return [_number(value, name) for value in self.each(name, *default, with_base=with_base)]

    def switch(self, name: str, default: bool) -> bool:
        """Return what is on or off: true or false, as mergekit's files also say 1 or 0.

        Raises:
            RecipeError: It is something else.
        """
        value = self.shared(name, default)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise RecipeError(f"parameter {name!r} is {value!r:.60}, expected true or false.")
        return bool(value)


def _number(value: object, name: str) -> float:
    with suppress(OverflowError):
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return value
    raise RecipeError(f"parameter {name!r} is {value!r:.60}, expected a finite number.")


def _total(weights: list[float]) -> float:
    """Return the sum that normalized weights are divided by."""
    total = sum(weights)
    if total == 0 or not math.isfinite(total):
        raise RecipeError(f"The weights {weights} sum to {total:g} and cannot be normalized. Set normalize: false.")
    return total


def _linear(get: Getter) -> Translation:
    weights = get.numbers("weight", with_base=True)
    return Translation("linear", {"weights": weights, "normalize": get.switch("normalize", True)}, False)


def _task_arithmetic(get: Getter) -> Translation:
    weights = get.numbers("weight")
    total = _total(weights) if get.switch("normalize", False) else 1
    return Translation("task_arithmetic", {"weights": weights, "scale": get.number("lambda", 1.0) / total}, True)


def _sparse(
    ours: str, *, normalize: bool, elect: str | None = None, more: Callable[[Getter], Data] = lambda _: {}
) -> Reader:
    """Make the reader of a method that sparsifies deltas and adds them up; ``more`` reads knobs of its own."""

    def read(get: Getter) -> Translation:
        weights, density, scale = get.numbers("weight"), get.numbers("density", 1.0), get.number("lambda", 1.0)
        normalized = get.switch("normalize", normalize)
        if 0 in density:
            # mergekit drops the whole delta of an expert of density 0; without election its weight still divides.
            if normalized and elect == "none":
                scale, normalized = scale / _total(weights), False
            weights = [weight if share else 0.0 for weight, share in zip(weights, density)]
            density = [share or 1.0 for share in density]
        knobs = {"weights": weights, "scale": scale, "density": density, "normalize": normalized}
        return Translation(ours, knobs | ({"elect": elect} if elect else {}) | more(get), True)

    return read


def _gamma(get: Getter) -> Data:
    return {"gamma": get.numbers("gamma", 0.01)}


def _rescale(get: Getter) -> Data:
    norm = get.shared("rescale_norm", "l1")
    if norm not in (None, "l1"):
        raise UnsupportedError(f"rescale_norm is {norm!r}, expected l1 or none.")
    return {"rescale": "l1" if get.switch("rescale", True) and norm else "none"}


def _epsilon(get: Getter) -> Data:
    # mergekit leaves a tensor alone at density 1, whatever epsilon says.
    return _rescale(get) | {"epsilon": get.numbers("epsilon", 0.15)}


def _slerp(get: Getter) -> Translation:
    return Translation("slerp", {"t": get.number("t")}, True)


def _nuslerp(get: Getter) -> Translation:
    knobs = {
        "weights": get.numbers("weight"),
        "flatten": get.switch("nuslerp_flatten", True),
        "row_wise": not get.switch("nuslerp_row_wise", False),
    }
    return Translation("nuslerp", knobs, None)


def _multislerp(get: Getter) -> Translation:
    # mergekit's tangents are not scaled by their angles, so that their weighted sum, and with it the step, vanishes.
    knobs = {"weights": get.numbers("weight"), "normalize_weights": get.switch("normalize_weights", True)}
    return Translation("multislerp", knobs | {"steps": 0}, None)


def _karcher(get: Getter) -> Translation:
    knobs = {"iterations": get.number("max_iter", 10), "tolerance": get.number("tol", 1e-5)}
    return Translation("karcher", knobs, False)


def _model_stock(get: Getter) -> Translation:
    return Translation("model_stock", {"clamp": False, "filter_wise": get.switch("filter_wise", False)}, True)


def _nearswap(get: Getter) -> Translation:
    return Translation("nearswap", {"t": max(0.0, get.number("t"))}, True)


def _ram(plus: bool) -> Reader:
    def read(get: Getter) -> Translation:
        knobs = {"eps": get.number("epsilon", 1e-5), "r": get.number("r", 0.1) if plus else 0.0}
        return Translation("ram", knobs | {"alpha": get.number("alpha", 0.2)}, True)

    return read


def _passthrough(get: Getter) -> Translation:
    return Translation("passthrough", {"scale": get.numbers("scale", 1.0, with_base=True)[0]}, False)


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
    "sce": lambda get: Translation("sce", {"select": get.number("select_topk", 1.0)}, True),
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


def parameters_of(name: str) -> dict[str, bool]:
    """Return the parameters that a method reads, and whether each model may have its own value.

    Example:
        >>> parameters_of("task_arithmetic")
        {'weight': True, 'normalize': False, 'lambda': False}
    """
    asked: dict[str, bool] = {}

    def shared(key: str, default: Any) -> Any:
        asked.setdefault(key, False)
        return default

    def each(key: str, default: Any = 1.0, **_: Any) -> list[Any]:
        asked[key] = True
        return [default]

    with suppress(RecipeError):  # raised where a required parameter is missing, as here all are
        method_of(name)(Getter(shared, each))
    return asked
