"""Attacks on safety training: from a prompt to a prompt, one file each."""
