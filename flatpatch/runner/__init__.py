"""Resolve settings, carry out plans, keep records, resume, sweep."""
