"""What profile ``quick`` changes in the settings upstream's JSON files give. Everything else stays as they say."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

CLASSES: Final = 20
"""Classes of the benchmark."""

TASKS: Final = 5
"""Tasks they come in, four classes each; but see CL-LoRA's preset."""

PRESET: Final[Mapping[str, Any]] = MappingProxyType({"init_cls": 4, "increment": 4, "batch_size": 64})
"""Upstream's key -> value, for all methods. Five batches of 64 are a task's training images."""

METHOD_PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "inflora": MappingProxyType(
            {
                "total_sessions": TASKS,
                "embd_dim": 64,
                "num_heads": 4,
                "init_epoch": 10,
                "epochs": 10,
                # Ten times upstream's: a task takes 50 steps here, and close to 800 on upstream's CIFAR-100.
                "init_lr": 5e-3,
                "lrate": 5e-3,
                "num_workers": 0,
            }
        ),
        "cllora": MappingProxyType(
            {
                # Its code asks for the five likeliest classes after the first task already. It shuffles the classes
                # anyway, so they come in four tasks of any five.
                "init_cls": 5,
                "increment": 5,
                "init_epochs": 6,
                "general_pos": [0, 1, 2],
                "specfic_pos": [3, 4, 5],
            }
        ),
        "seqlora": MappingProxyType({"epochs": 10, "lrate": 5e-3}),
    }
)
"""Method -> its own keys, in upstream's spelling (``embd_dim``, ``specfic_pos``)."""
