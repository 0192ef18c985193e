"""Merge methods: one file each, each the plain function on tensors.

What a method states about itself in its decorator: ``base=False``, it needs no base; ``experts``, ``most`` and ``two``,
how many it takes; ``matrix=True``, it decomposes matrices, so that all else is averaged; ``factors``, it gives the
same result in any orthonormal bases of a matrix' outputs (``"left"``) or of outputs and inputs (``"both"``), so that
it can merge LoRA experts without leaving their factors; ``floats``, how much
memory it takes for each entry; ``statistics="required"``, it weighs by data, of which ``measure`` says what is
measured;
``survey``, a function that looks at the whole model first;
``supplied``, parameters that are no knobs, of which ``report`` is a list that gets what the method chose for
each matrix.
"""

from importlib import import_module
from typing import Any

from modicum.registry import merge_method
from modicum.weights.kernels.held import held

PIECES = {  # of methods, for those who build their own
    "inv_sqrt_polar": "modicum.linalg",
    "outlier_weights": "modicum.weights.methods.resm",
    "rank_plan": "modicum.weights.methods.resm",
    "task_interference": "modicum.weights.methods.tsv",
    "truncated_svd": "modicum.linalg",
}


def __getattr__(name: str) -> Any:  # tells type checkers too that the names below are made at import
    if name in PIECES:
        return getattr(import_module(PIECES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# A method is called like its file, and importing a file binds the *module* to that name; loading all of them first and
# then binding the functions makes `from modicum.weights.methods import ties` give the function, always.
globals().update({name: held(entry) for name, entry in merge_method.items()})
