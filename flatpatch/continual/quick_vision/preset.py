"""What profile ``quick`` changes in the settings upstream's JSON files give. Everything else stays as they say."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

CLASSES: Final = 20
"""Classes of the benchmark."""

TASKS: Final = 5
"""Tasks they come in, four classes each."""

PRESET: Final[Mapping[str, Any]] = MappingProxyType({"init_cls": 4, "increment": 4, "batch_size": 64})
"""Upstream's key -> value, for all methods."""

METHOD_PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "inflora": MappingProxyType(
            {
                "total_sessions": 5,
                "embd_dim": 64,
                "num_heads": 4,
                "init_epoch": 10,
                "epochs": 10,
                "init_lr": 5e-3,
                "lrate": 5e-3,
                "num_workers": 0,
            }
        ),
        "cllora": MappingProxyType(
            {
                "init_epochs": 10,
                "later_epochs": 10,
                "general_pos": [0, 1, 2],
                "specfic_pos": [3, 4, 5],
            }
        ),
        "seqlora": MappingProxyType({"epochs": 10, "lrate": 5e-3, "rank": 10}),
    }
)
"""Method -> its own keys, in upstream's spelling (``specfic_pos``, ``embd_dim``)."""
