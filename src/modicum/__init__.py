"""Get more out of the weights and the machine you already have.

Importing ``modicum`` costs nothing: each subpackage loads what it needs when it is imported itself.
"""

from importlib.metadata import version as _version

from modicum.moved import install as _install

__version__ = _version("modicum")

_install()
