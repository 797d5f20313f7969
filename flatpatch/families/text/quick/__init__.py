"""The embedded benchmark of profile ``quick``: generated text, a tokenizer and a small T5, made for this package.

It trains in minutes on two CPU cores and serves upstream's code and the reference implementations alike.
Its numbers say nothing about any paper's.
"""

from __future__ import annotations

from pathlib import Path

from flatpatch.families.text.quick.generator import TASKS, write_benchmark
from flatpatch.families.text.quick.preset import LLAMA_PRESET, PRESET

MODEL_FOLDER: Path = Path(__file__).resolve().parent / "t5-quick"
"""Folder of the shipped tokenizer and model. Its name says "t5" because upstream decides by the path."""

LLAMA_FOLDER: Path = MODEL_FOLDER.parent / "llama-quick"
"""Folder of the shipped LLaMA, whose weights are drawn and not trained. Its name says "llama" for the same reason."""

__all__ = ["LLAMA_FOLDER", "LLAMA_PRESET", "MODEL_FOLDER", "PRESET", "TASKS", "write_benchmark"]
