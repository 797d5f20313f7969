"""Which models the LLaMA code of N-LoRA and O-LoRA can train, checked before anything starts. Loads no torch.

That code (src/run_*.py, src/uie_collator.py) tells a LLaMA by its folder's name, loads LLaMA's slow tokenizer, and says
itself that piece 1 begins a text and pads it on the left and that piece 2 ends one. It makes the embeddings as many as
the tokenizer's pieces; where that changes their number the new ones are not frozen, and would be trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flatpatch.families.text.models import LLAMA, LLAMA_SPECIAL, TOKENIZER_MODEL

PREFIX = "llama"  # of the orders


def is_llama(order: str) -> bool:
    """Tell whether an order's script is one of upstream's ``scripts_llama``."""
    return order.startswith(PREFIX)


def name_problem(name: str) -> str:
    """Return why upstream's code would not take a folder of this name for a LLaMA, or an empty string."""
    lower = name.lower()
    if PREFIX in lower and "adapter" not in lower:
        return ""
    return f"must hold '{PREFIX}'" if PREFIX not in lower else f"must hold '{PREFIX}' and not 'adapter'"


def model_problems(folder: Path, longest: int) -> list[str]:
    """Return why upstream's LLaMA code could not train a model as it is meant, one message each.

    Args:
        folder: The model's, which has its ``config.json`` and ``tokenizer.model``.
        longest: Most pieces of an example that a run reads.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"model={folder}: its config.json cannot be read ({error}). Download or make it again."]
    if kind != LLAMA:
        return [f"model={folder} is of type '{kind}', and upstream's LLaMA scripts train a '{LLAMA}'. Name another."]
    problems = []
    positions = config.get("max_position_embeddings") or 2048
    if positions < longest:
        problems.append(
            f"model={folder} has {positions} positions, and an example may take {longest}: upstream's code stops. "
            f"Use a longer model, or upstream.max_source_length={positions}."
        )
    pieces, special = _pieces_of(folder)
    if special != LLAMA_SPECIAL:
        problems.append(
            f"model={folder}: the first pieces of its {TOKENIZER_MODEL} are {' '.join(special) or 'unreadable'}, and "
            f"upstream's code takes them for {' '.join(LLAMA_SPECIAL)}. Use a tokenizer of LLaMA's kind."
        )
    elif pieces != config.get("vocab_size"):
        problems.append(
            f"model={folder} has {config.get('vocab_size')} embeddings and its tokenizer {pieces} pieces, added ones "
            "counted: upstream's code would make them equal and train all embeddings. Save the model with embeddings "
            "for as many pieces, or take the added ones away."
        )
    return problems


def _pieces_of(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Return how many pieces a tokenizer has, added ones counted, and the first three; none if it cannot be read."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / TOKENIZER_MODEL))
        count = processor.get_piece_size()
        known = set(processor.id_to_piece(list(range(count))))
        return count + len(_named_tokens(folder) - known), tuple(processor.id_to_piece([0, 1, 2]))
    except (OSError, RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return 0, ()


def _named_tokens(folder: Path) -> set[str]:
    """Return the tokens that the files beside a tokenizer's pieces name; those that are no piece are added to it."""
    named: set[str] = set()
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if name == "added_tokens.json":
            named |= set(content)
            continue
        for key, value in content.items():
            of_key = value if isinstance(value, list) else [value] if key.endswith("_token") else []
            named |= {each["content"] if isinstance(each, dict) else each for each in of_key if each}
    return {token for token in named if isinstance(token, str)}
