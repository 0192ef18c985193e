"""Which modules an adapter's configuration names: PEFT makes factors for these, and passes over those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from modicum.patterns import Pattern

Make: TypeAlias = Callable[[str, str], Pattern]  # of an expression, and what it is for
ALL = "all-linear"  # stands for modules that depend on the base's class


def is_named(module: str, config: Mapping[str, Any], make: Make = Pattern) -> bool:
    """Whether a configuration names a module; the rule is PEFT's own.

    Args:
        module: Its name in the base.
        config: What ``adapter_config.json`` holds.
        make: Makes regular expressions; one that keeps them bounds the time of many calls.

    Raises:
        RecipeError: A regular expression is malformed, or takes too long.

    Example:
        >>> config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
        >>> is_named("model.layers.1.self_attn.q_proj", config), is_named("model.layers.0.self_attn.q_proj", config)
        (True, False)
        >>> is_named("model.layers.1.self_attn.k_proj", config)
        False
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _is_listed(module, excluded, "exclude_modules", make):
        return False
    if not targets or targets == ALL:
        return True
    if not _is_listed(module, targets, "target_modules", make):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) or module in targets or layers is None or layers == []:
        return True
    return _layer_of(module, config.get("layers_pattern"), make) in (layers if isinstance(layers, list) else [layers])


def _is_listed(module: str, targets: Any, what: str, make: Make) -> bool:
    if isinstance(targets, str):
        return make(rf"(?:{targets})\Z", what).begins(module)
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _layer_of(module: str, patterns: Any, make: Make) -> int | None:
    """Return the first number that stands behind the name of a list of layers."""
    for pattern in [patterns] if isinstance(patterns, str) and patterns else patterns or ["[^.]*"]:
        found = make(rf"(?:.*?\.)?{pattern}\.([0-9]{{1,9}})\.", "layers_pattern").first_group(module)
        if found is not None:
            return int(found)
    return None
