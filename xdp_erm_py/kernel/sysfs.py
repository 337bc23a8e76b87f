"""A sysfs of the caller's own network namespace.

/sys shows the interfaces of the network namespace in which it was mounted, which may be another's with the same names.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from ..errors import XdpErmError

# The same on every architecture (kernel's scripts/syscall.tbl); uapi linux/mount.h
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def mounted() -> Iterator[int]:
    """A descriptor of the root of a sysfs of the caller's network namespace (Linux 5.2)."""
    context = _system_call(_FSOPEN, b"sysfs", _CLOEXEC)
    try:
        _system_call(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        root = _system_call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        yield root
    finally:
        os.close(root)


def names(root: int, path: str) -> list[str]:
    """What a directory of sysfs holds. OSError: it is not there."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        return os.listdir(directory)
    finally:
        os.close(directory)


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise XdpErmError(f"sysfs of this network namespace cannot be opened: {os.strerror(code)}")
    return result
