"""Objectives: batch in, batch out, and where needed a loss."""
