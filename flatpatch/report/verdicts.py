"""Where a study's verdicts lie, and their words: what writes them and what shows them agree here."""

from __future__ import annotations

STUDIES = "studies"  # the folder, below the one that holds the runs; then the study's name, and its form
VERDICTS = "verdicts.json"
SCHEMA = 1
CORRECT, AS_RECORDED = "correct", "as recorded"  # the two ways of measuring
