"""Units: times, bytes and counts as people say them."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `15 h`, `3 days`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{max(1, round(seconds / unit))} {name}"
    return f"{round(seconds / 86400)} days"


def size_of(count: float) -> str:
    """Bytes for people: `350 kB`, `4.2 MB`, `10.3 GB`."""
    for limit, unit, name in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (math.inf, 1e9, "GB")):
        if count < limit:
            return f"{count / unit:.3g} {name}"
    raise AssertionError("every count is below infinity")


def number_of(count: float) -> str:
    """A count for people: `2.57 B`, `3.4 T`, `812 k`."""
    for limit, unit, name in (
        (1e3, 1, ""),
        (1e6, 1e3, " k"),
        (1e9, 1e6, " M"),
        (1e12, 1e9, " B"),
        (math.inf, 1e12, " T"),
    ):
        if count < limit:
            return f"{count / unit:.3g}{name}"
    raise AssertionError("every count is below infinity")
