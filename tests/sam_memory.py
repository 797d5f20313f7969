"""How much memory some work takes on the CPU, from torch's own allocation events."""

from __future__ import annotations

import torch


def allocations(work):
    """The sizes allocated (positive) and freed (negative), in bytes and in order, while ``work`` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_bytes(work):
    """The most bytes that ``work`` had allocated and not yet freed."""
    alive = peak = 0
    for size in allocations(work):
        alive += size
        peak = max(peak, alive)
    return peak
