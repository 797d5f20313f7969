"""What kind of pretrained model a folder holds. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path

ENCODER, SEQ2SEQ, LLAMA = "bert", "t5", "llama"  # as their config.json names them
TOKENIZER_MODEL = "tokenizer.model"
LLAMA_SPECIAL = ("<unk>", "<s>", "</s>")  # the first pieces of LLaMA's tokenizer


def model_type(folder: Path) -> str:
    """Return what a model's config.json says it is, or an empty string."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def is_encoder(folder: Path) -> bool:
    """Tell whether a model answers through a head for each task; else it writes its answers."""
    return model_type(folder) == ENCODER


def lacks(folder: Path, *, llama: bool = False) -> str:
    """Return what a model's folder lacks, or an empty string; ``llama``: for upstream's LLaMA code."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if llama and not (folder / TOKENIZER_MODEL).is_file():
        return f"{TOKENIZER_MODEL}, which upstream's LLaMA code reads"
    tokenizers = ("tokenizer.json", "spiece.model", "tokenizer.model")
    if not any((folder / name).is_file() for name in tokenizers):
        return "tokenizer (tokenizer.json or spiece.model)"
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        return "weights (*.safetensors or pytorch_model*.bin)"
    return ""
