"""Faces of packages that import what they offer when it is asked for.

A face lists its names once, as imports under ``if TYPE_CHECKING:``, where type checkers and editors read them too::

    if TYPE_CHECKING:
        from modicum.optim.gradient.adagc import AdaGC

    __all__ = ["AdaGC"]
    face(__name__)
"""

from __future__ import annotations

import ast
import sys
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


class _Face(ModuleType):
    """A package whose names are found in the modules that its source names; made by :func:`face`."""

    @cached_property
    def _homes(self) -> dict[str, tuple[str, str]]:
        """Module of each name, and its name there."""
        blocks = (
            node
            for node in ast.parse(Path(str(self.__file__)).read_text(encoding="utf-8")).body
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
        imports = (line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom) and line.module)
        return {alias.asname or alias.name: (str(line.module), alias.name) for line in imports for alias in line.names}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, there = self._homes[name]
        value = getattr(import_module(module), there)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing a submodule binds it in its package; `perplexity` of the face stays the function all the same.
        if not isinstance(value, ModuleType) or name.startswith("_") or name not in self._homes:
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *self._homes})


def face(package: str) -> None:
    """Make a package import the names under its ``if TYPE_CHECKING:`` when they are first used."""
    sys.modules[package].__class__ = _Face
