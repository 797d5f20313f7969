"""What kind of pretrained model a folder holds. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path

ENCODER, SEQ2SEQ = "bert", "t5"  # as their config.json names them


def model_type(folder: Path) -> str:
    """Return what a model's config.json says it is, or an empty string."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_encoder(folder: Path) -> bool:
    """Tell whether a model answers through a head for each task; else it writes its answers."""
    return model_type(folder) == ENCODER


def lacks(folder: Path) -> str:
    """Return what a model's folder lacks, or an empty string."""
    if not (folder / "config.json").is_file():
        return "config.json"
    tokenizers = ("tokenizer.json", "spiece.model", "tokenizer.model")
    if not any((folder / name).is_file() for name in tokenizers):
        return "tokenizer (tokenizer.json or spiece.model)"
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        return "weights (*.safetensors or pytorch_model*.bin)"
    return ""
