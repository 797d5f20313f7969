"""Incremental LoRA: a new adapter per task beside the frozen old ones, and no penalty.

One of the baselines of O-LoRA's paper (arXiv:2310.14152, "IncLoRA"): O-LoRA without anything that keeps
tasks apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatpatch.families.text.reference.adapters import LayerMatrices

KEEPS_OLD = True


def penalty(layers: Sequence[LayerMatrices], lamda_1: float, lamda_2: float) -> Tensor:
    """Return zero: nothing is penalised."""
    del lamda_1, lamda_2
    return torch.zeros((), dtype=layers[0].A.dtype, device=layers[0].A.device)
