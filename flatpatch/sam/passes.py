"""What must be the same in the two passes of a step: random numbers, and the statistics BatchNorm keeps."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RandomState:
    """Where the global random generators stand: torch's on CPU and CUDA, Python's and numpy's.

    Restoring it before the second pass gives that pass the first one's dropout masks, and leaves the
    generators where a single pass would have left them.
    """

    def __init__(self) -> None:
        self._cpu: Tensor = torch.get_rng_state()
        self._cuda: list[Tensor] = []
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._cuda = torch.cuda.get_rng_state_all()
        self._python = random.getstate()
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def restore(self) -> None:
        """Put every generator back to where it was when this object was made."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def batch_norm_statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Normalise by the batch without updating running statistics, as the pass at ``w + epsilon`` must.

    Args:
        model: Whose BatchNorm (and InstanceNorm) layers to hold; None holds nothing.

    Yields:
        Nothing.
    """
    layers = [
        module
        for module in (model.modules() if model is not None else ())
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
