"""Zeroth-order optimisers: fine-tuning with forward passes only."""
