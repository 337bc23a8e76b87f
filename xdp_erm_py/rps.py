"""Receive packet steering of an interface's queues, in sysfs.

/sys shows the interfaces of the network namespace in which it was mounted, which may be another's with the same names:
what is read and written here is a sysfs of the caller's own network namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator

from .errors import XdpErmError
from .links import Link, gone

# The same on every architecture (kernel's scripts/syscall.tbl); uapi linux/mount.h
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6

_libc = ctypes.CDLL(None, use_errno=True)


def masks(link: Link) -> dict[str, str]:
    """The CPUs that each receive queue's packets are spread over, as a hexadecimal mask, by the queue's name.

    Empty where the kernel has no RPS (CONFIG_RPS).
    """
    with sysfs() as root:
        found = {queue: _read(root, link, queue) for queue in _queues(root, link)}
        return {queue: mask for queue, mask in found.items() if mask is not None}


def write(link: Link, wanted: dict[str, str]) -> None:
    """Sets the masks of queues. XdpErmError: the kernel refuses."""
    with sysfs() as root:
        for queue, mask in wanted.items():
            try:
                file = os.open(_path(link, queue), os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
                try:
                    os.write(file, mask.encode())
                finally:
                    os.close(file)
            except OSError as error:
                raise XdpErmError(f"{link.name}: RPS of queue {queue} cannot be set to CPUs {mask}: "
                                  f"{error.strerror}") from None


def mask_of(cpus: Iterable[int]) -> str:
    """As the kernel writes it: groups of 32 bits, the highest first."""
    digits = format(sum(1 << cpu for cpu in cpus), "x")
    digits = digits.rjust(-(-len(digits) // 8) * 8, "0")
    return ",".join(digits[start:start + 8] for start in range(0, len(digits), 8))


def same(mask: str, other: str) -> bool:
    """Whether two masks name the same CPUs; the kernel writes as many digits as it has CPUs."""
    return int(mask.replace(",", ""), 16) == int(other.replace(",", ""), 16)


@contextlib.contextmanager
def sysfs() -> Iterator[int]:
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


def _queues(root: int, link: Link) -> list[str]:
    try:
        return sorted(name for name in names(root, f"class/net/{link.name}/queues") if name.startswith("rx-"))
    except FileNotFoundError:
        raise gone(link.name) from None


def _path(link: Link, queue: str) -> str:
    return f"class/net/{link.name}/queues/{queue}/rps_cpus"


def _read(root: int, link: Link, queue: str) -> str | None:
    try:
        file = os.open(_path(link, queue), os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
    except FileNotFoundError:
        return None
    try:
        return os.read(file, 4096).decode().strip()
    finally:
        os.close(file)
