"""Receive packet steering of an interface's queues, in sysfs."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ..errors import XdpErmError
from . import sysfs
from .links import Link, gone


def masks(link: Link) -> dict[str, str]:
    """The CPUs that each receive queue's packets are spread over, as a hexadecimal mask, by the queue's name.

    Empty where the kernel has no RPS (CONFIG_RPS).
    """
    with sysfs.mounted() as root:
        found = {queue: _read(root, link, queue) for queue in _queues(root, link)}
        return {queue: mask for queue, mask in found.items() if mask is not None}


def write(link: Link, wanted: dict[str, str]) -> None:
    """Sets the masks of queues. XdpErmError: the kernel refuses."""
    with sysfs.mounted() as root:
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


def _queues(root: int, link: Link) -> list[str]:
    try:
        return sorted(name for name in sysfs.names(root, f"class/net/{link.name}/queues") if name.startswith("rx-"))
    except FileNotFoundError:
        raise gone(link) from None


def _path(link: Link, queue: str) -> str:
    return f"class/net/{link.name}/queues/{queue}/rps_cpus"


def _read(root: int, link: Link, queue: str) -> str | None:
    try:
        return sysfs.read(root, _path(link, queue))
    except FileNotFoundError:
        return None
