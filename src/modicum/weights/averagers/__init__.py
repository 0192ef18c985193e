"""Averagers: one file each, each a plain function from checkpoints to coefficients that sum to 1.

A rule, ``(checkpoints, *, knobs) -> coefficients``, looks only at how many checkpoints there are. One that learns
states ``learns`` and is ``(landscape, checkpoints, *, knobs) -> coefficients``, where the
:class:`~modicum.weights.search.Landscape` tells the loss of a mean (``value``) and its slope (``gradient``). Either may
ask for ``rng``, and for ``report``, a list that takes what is worth showing of a search.
"""
