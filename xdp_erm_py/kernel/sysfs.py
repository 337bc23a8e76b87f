"""A sysfs of the caller's own network namespace.

/sys shows the interfaces of the network namespace in which it was mounted, which may be another's with the same names.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from ..errors import XdpErmError
from .links import Link, Links

# The same on every architecture (kernel's scripts/syscall.tbl); uapi linux/mount.h
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6

_SYS = "/sys"

# uapi linux/virtio_net.h: with a MTU of the host's, TSO4, TSO6, ECN or UFO for the guest, or mergeable buffers, longer
# frames come in than this, which is an Ethernet header, a VLAN tag and 1500 bytes.
_LONGER_FRAMES = (3, 7, 8, 9, 10, 15)
_VIRTIO_FRAME = 1518

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def mounted() -> Iterator[int]:
    """A descriptor of the root of a sysfs of the caller's network namespace (Linux 5.2).

    Where no file system may be mounted (seccomp, a container), that is /sys, if it shows this network namespace.
    XdpErmError: it does not.
    """
    try:
        root = _mount()
    except OSError as error:
        try:
            root = os.open(_SYS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            raise XdpErmError(f"no sysfs can be mounted ({error.strerror}), and there is none at {_SYS}") from None
        if not _is_of_this_namespace(root):
            os.close(root)
            raise XdpErmError(f"no sysfs of this network namespace can be mounted ({error.strerror}), and {_SYS} is of "
                              "another") from None
    try:
        yield root
    finally:
        os.close(root)


def _mount() -> int:
    context = _system_call(_FSOPEN, b"sysfs", _CLOEXEC)
    try:
        _system_call(_FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _system_call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)


def _is_of_this_namespace(root: int) -> bool:
    """Whether it shows the same interfaces as rtnetlink, by names, numbers and hardware addresses."""
    with Links() as links:
        told = {link.name: (link.index, link.address) for link in links}
    try:
        shown = {name: (int(read(root, f"class/net/{name}/ifindex")),
                        read(root, f"class/net/{name}/address").replace(":", ""))
                 for name in names(root, "class/net") if name != "bonding_masters"}  # a file
    except (OSError, ValueError):
        return False
    return shown == told


def driver(link: Link) -> str | None:
    """The interface's driver; None: it is a virtual interface."""
    with mounted() as root:
        try:
            return os.path.basename(os.readlink(f"class/net/{link.name}/device/driver", dir_fd=root))
        except OSError:
            return None


def longest_frame(link: Link) -> int | None:
    """What fits the buffers of its NIC whatever the MTU, in bytes without FCS; None: no such limit is known.

    virtio_net has it where the hypervisor offers neither mergeable buffers nor the like, and drops what is longer.
    """
    if driver(link) != "virtio_net":
        return None
    with mounted() as root:
        offered = read(root, f"class/net/{link.name}/device/features")
    return None if any(offered[feature:feature + 1] == "1" for feature in _LONGER_FRAMES) else _VIRTIO_FRAME


def read(root: int, path: str) -> str:
    """What a file of sysfs says. OSError: it cannot be read."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
    try:
        return os.read(file, 4096).decode().strip()
    finally:
        os.close(file)


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
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
