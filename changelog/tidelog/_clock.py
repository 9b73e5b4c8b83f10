"""Clocks: what time it is, for whoever keeps something for so long and no longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

# Returns the microseconds since 1970. Nothing that decides about order or conflicts asks one.
Clock: TypeAlias = Callable[[], int]


def system_time_us() -> int:
    """Return what the machine's clock says."""
    return time.time_ns() // 1000
