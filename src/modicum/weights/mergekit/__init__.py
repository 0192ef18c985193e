"""Mergekit files: read as they are, run by modicum's own methods."""
