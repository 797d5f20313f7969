"""How long a training step takes, told by the device that does it, without waiting for the device in the loop.

``seconds`` of a step means the same in every recorder: from when the step's first batch is loaded, before its first
forward pass, until its optimizer step is done. What else the loop does between two steps (waiting for that batch,
evaluating, saving, writing) does not count; in CL-LoRA, where a batch takes two steps, the second begins where the
first ends. On a CUDA device both moments are events in its stream, so the work is timed, not the queueing of it.
"""

from __future__ import annotations

import time
from typing import Any


class Moment:
    """A moment in the work of a device."""

    def __init__(self, device: Any) -> None:
        """Mark what the device has been given to do so far.

        Args:
            device: A ``torch.device``. All but CUDA devices are taken to have done it already.
        """
        self._host = time.perf_counter()
        self._event: Any = None
        if device.type == "cuda":
            import torch

            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def seconds_until(self, later: Moment) -> float:
        """Wait until the device has come to a later moment, and return the seconds in between."""
        if self._event is None:
            return later._host - self._host
        later._event.synchronize()
        milliseconds: float = self._event.elapsed_time(later._event)
        return milliseconds / 1000


class Span:
    """The time between two moments: ``float(span)`` waits for the second one and tells the seconds."""

    def __init__(self, began: Moment, ended: Moment) -> None:
        self._began, self._ended = began, ended

    def __float__(self) -> float:
        return self._began.seconds_until(self._ended)
