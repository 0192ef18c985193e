"""Jobs: the only place that knows Trainer, data sets, files and the network.

A job is a function ``(recipe, run)`` in the file of its name; the annotation of ``recipe`` is the schema. Modules here
import their engine when they run, so that listing and checking stay instant.
"""
