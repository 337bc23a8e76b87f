"""Which kernel runs."""

from __future__ import annotations

import platform
import re


def running() -> tuple[int, ...]:
    """Its version: two numbers."""
    return tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
