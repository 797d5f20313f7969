"""Runs beside upstream's published numbers: how far apart, how sure, and what may be said of it."""

from flatpatch.comparison.compare import compare_logged, compare_runs
from flatpatch.comparison.sides import subject_of

__all__ = ["compare_logged", "compare_runs", "subject_of"]
