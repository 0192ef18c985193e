"""Gradient rules and zeroth-order optimisers."""
