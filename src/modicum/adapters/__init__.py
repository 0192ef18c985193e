"""Initialisations of low-rank adapters."""
