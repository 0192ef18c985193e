"""Merge methods: one file each, each the plain function on tensors."""

from typing import Any

from modicum.registry import merge_method


def __getattr__(name: str) -> Any:  # tells type checkers that the names below are made at import
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# A method is called like its file, and importing a file binds the *module* to that name; loading all of them first and
# then binding the functions makes `from modicum.weights.methods import ties` give the function, always.
globals().update({name: entry.function for name, entry in merge_method.items()})
