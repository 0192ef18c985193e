"""Baselines that PEFT implements: another scaling, layer, base, optimiser or kind of adapter than LoRA's.

Only this package may import PEFT; the rest of :mod:`modicum.adapters` knows tensors alone. Full fine-tuning, the
baseline that trains most, is a recipe without ``adapter``.
"""
