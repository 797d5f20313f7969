"""The experiment record's step, which is not SAM."""

from __future__ import annotations

from flatpatch.kinds.sam import SharpnessAware


class Recorded(SharpnessAware):
    """SAM's arithmetic on losses that are not those of SAM: whatever trains chooses them, pass by pass."""

    name = "recorded"
    title = "as recorded (not SAM)"
    place = 20
    climbs = False
    takes_radius = False


KIND = Recorded
