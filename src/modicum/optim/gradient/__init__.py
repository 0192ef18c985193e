"""Gradient rules: what happens to gradients between the backward pass and the optimiser's step."""
