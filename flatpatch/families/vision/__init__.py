"""Repositories driven by JSON files around a hand-written loop (the PyCIL and PILOT kind)."""
