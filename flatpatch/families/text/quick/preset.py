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

METHOD_PRESETS: Final[Mapping[str, Mapping[str, float]]] = MappingProxyType(
    {
        # Upstream's is 0.4. At that strength the small model stays below 60 % on the first task after 100 steps.
        "nlora": MappingProxyType({"lamda_1": 0.05}),
        # Upstream's own, named for the reference engine, which has no script to read them from.
        "olora": MappingProxyType({"lamda_1": 0.5, "lamda_2": 0.0}),
    }
)
"""Method -> its own arguments; a method that is not named has none."""
