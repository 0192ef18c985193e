"""Policies of agents that choose together, one file each."""
