"""One command at a time changes interfaces, and one that is killed half-way leaves word of what it was about.

The lock file is the journal: for each interface under way, the changes to its NIC (see nic.py) that are not yet in the
keeping of an attached program, and {"clsact": true} once a qdisc is made for the filter of isolation.py. It is empty
between commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import XdpErmError
from ..kernel.links import Link

LOCK = Path("/run/xdp-erm.lock")
LOCK_SECONDS = 60


class Journal:
    """The entries in the locked file, by network namespace and interface.

    The numbers of namespaces and interfaces are used again in time, so the hardware's address is a part of the key.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._namespace = os.stat("/proc/thread-self/ns/net").st_ino
        content = os.pread(fd, 1 << 20, 0).decode(errors="replace")
        # A write is shorter than a page and so done or not done, but the end of an older entry may stand behind it.
        self._entries: dict[str, Any] = json.JSONDecoder().raw_decode(content)[0] if content else {}

    def begin(self, link: Link, changes: dict[str, Any]) -> None:
        """To be called before `changes` are made."""
        self._entries[self._key(link)] = changes
        self._write()

    def end(self, link: Link) -> None:
        """The changes are undone, or in the keeping of an attached program."""
        if self._entries.pop(self._key(link), None) is not None:
            self._write()

    def unfinished(self, link: Link) -> dict[str, Any]:
        """The changes that a killed command was about to make."""
        changes: dict[str, Any] = self._entries.get(self._key(link), {})
        return changes

    def _key(self, link: Link) -> str:
        return f"{self._namespace}/{link.index}/{link.address}"

    def _write(self) -> None:
        content = json.dumps(self._entries).encode() if self._entries else b""
        try:
            os.pwrite(self._fd, content, 0)
            os.ftruncate(self._fd, len(content))
        except OSError as error:
            raise XdpErmError(f"{LOCK} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def exclusive() -> Iterator[Journal]:
    """Waits for other commands, for at most LOCK_SECONDS. XdpErmError: the lock is not to be had."""
    try:
        lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise XdpErmError(f"the lock {LOCK} cannot be opened: {error.strerror}") from None
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    print("waiting for another xdp-erm to finish", file=sys.stderr)
                    waiting = True
                if time.monotonic() > deadline:
                    raise XdpErmError(f"another xdp-erm has held {LOCK} for {LOCK_SECONDS} s; `fuser {LOCK}` names "
                                      "it") from None
                time.sleep(0.05)
        yield Journal(lock)
    finally:
        os.close(lock)
