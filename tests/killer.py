"""Kills a command, or the process that it is called in, at a step of what it does."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from typing import Any

from xdp_erm_py.cli import main


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


def run(*command: str, module: str, owner: str, step: str, when: str, number: int) -> int:
    """Runs a command of the command line that is killed so; its exit status, as subprocess has it.

    Forked, because to start Python and import everything takes longer than the command does.
    """
    process = os.fork()
    if process != 0:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        kill_at(module, owner, step, when, number)
        status = main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
