"""Recipes inside a recipe: what they use of each other, how they are checked, and how they run.

Pipelines and grids share all of it; each stage is a run of its own in the folder ``stages``.
"""
