"""Evaluation: estimators, generation, judges, attacks."""
