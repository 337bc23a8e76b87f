"""Kills the process that it is called in, at a step of what it does."""

from __future__ import annotations

import importlib
import os
import signal
from typing import Any


def kill_at(module: str, owner: str, step: str, when: str, number: int) -> None:
    """`when` ("before" or "after") the `number`th call of function `step` of a class of the package, or of a module."""
    place = importlib.import_module(f"xdp_erm_py.{module}")
    for name in filter(None, owner.split(".")):
        place = getattr(place, name)
    original, calls = getattr(place, step), 0

    def killed(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, step, killed)
