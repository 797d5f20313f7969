"""What profile ``quick`` changes in the settings upstream's JSON files give. Everything else stays as they say."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

CLASSES: Final = 20
"""Classes of the benchmark."""

TASKS: Final = 5
"""Tasks they come in, four classes each, unless a method's row says otherwise."""

PRESET: Final[Mapping[str, Any]] = MappingProxyType({"init_cls": 4, "increment": 4, "batch_size": 64})
"""Upstream's key -> value, for all methods. Five batches of 64 are a task's training images."""
