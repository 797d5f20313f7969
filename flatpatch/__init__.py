"""Run the authors' continual-learning repositories with SAM, exactly as they are."""

__version__ = "0.1.0"
