"""What profile ``quick`` changes in upstream's arguments. Everything else stays as upstream's script says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

PRESET: Final[Mapping[str, int | float]] = MappingProxyType(
    {
        # N-LoRA's own. O-LoRA's single epoch is of data sets ten times as large or more.
        "num_train_epochs": 10,
        # N-LoRA's own, so that all methods take the same 100 steps a task; O-LoRA's is 8 on each of eight GPUs.
        "per_device_train_batch_size": 48,
        # N-LoRA's own: each prediction is one batch.
        "per_device_eval_batch_size": 512,
        # Both methods' own. The small model learns at it too.
        "learning_rate": 1e-3,
    }
)
"""Upstream argument -> value, for all methods."""

LLAMA_PRESET: Final[Mapping[str, int | float]] = MappingProxyType(
    # Upstream's LLaMA scripts gather eight small batches for a step; one of 48 fits a small model.
    {**PRESET, "gradient_accumulation_steps": 1}
)
"""The same for the LLaMA scripts."""
