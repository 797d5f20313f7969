"""Runs implementations of SAM, other people's and ours, against closed forms, and prints a matrix of what holds.

Nothing of theirs is here: adapters call packages that are installed and checkouts that the user made.
"""
