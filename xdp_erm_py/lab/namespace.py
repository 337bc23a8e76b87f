"""Anonymous network namespaces: no name, no mount, gone with the last file descriptor, even after SIGKILL."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
THIS_NAMESPACE = "/proc/thread-self/ns/net"

# os.setns and os.unshare exist only from Python 3.12 on.
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace of its own, empty but for a loopback interface that is down.

    Sockets stay in the namespace in which they were made, so one thread can serve several. Needs CAP_SYS_ADMIN;
    raises OSError without it.
    """

    def __init__(self) -> None:
        with _returning():
            _check(_libc.unshare(CLONE_NEWNET))
            self.fd = os.open(THIS_NAMESPACE, os.O_RDONLY)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread, and the processes it starts, into this namespace for the length of a block."""
        with _returning():
            _check(_libc.setns(self.fd, CLONE_NEWNET))
            yield

    def close(self) -> None:
        os.close(self.fd)


@contextlib.contextmanager
def _returning() -> Iterator[None]:
    home = os.open(THIS_NAMESPACE, os.O_RDONLY)
    try:
        yield
    finally:
        _check(_libc.setns(home, CLONE_NEWNET))
        os.close(home)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
