"""What keeps a measurement from changing the training it is made in."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

_HALVES = (torch.float16, torch.bfloat16)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put Python's, numpy's and torch's generators, on all devices, back when the block is left."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def working_copy(model: nn.Module) -> tuple[nn.Module, str]:
    """Copy a model, so that nothing done to the copy reaches the one that is trained.

    Half-precision weights become float32 ones of the same values: curvature at 16 bits carries about a percent of
    noise. Hooks stay behind, because those of a training engine hold the engine.

    Args:
        model: Any module; neither it nor its ``.grad`` is touched.

    Returns:
        The copy, on the same device, and in words what its weights are.
    """
    hooks: dict[int, object] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                hooks[id(value)] = OrderedDict()
    copied = copy.deepcopy(model, hooks)
    if callable(disable := getattr(copied, "gradient_checkpointing_disable", None)):
        disable()
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
    if any(p.dtype in _HALVES for p in copied.parameters()):
        copied.float()
        return copied, f"float32 copy of {', '.join(kinds)} weights"
    return copied, ", ".join(kinds)
