"""Measures of models, one file each; see :class:`modicum.facts.MeasureFacts`."""
