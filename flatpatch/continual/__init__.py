"""Continual learning: accuracy matrices, reference implementations of the methods, tasks and models."""
