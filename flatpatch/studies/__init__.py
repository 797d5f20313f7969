"""Experiments as data: which runs, what is measured in them, which hypotheses are tested, and what came out."""
