"""Judges of answers: from an item to a verdict, one file each."""
