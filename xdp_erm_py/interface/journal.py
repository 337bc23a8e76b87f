"""One command at a time changes interfaces, and one that is killed half-way leaves word of what it was about.

The journal stands beside the lock file: for each interface under way, the changes to its NIC (see nic.py) that are not
yet in the keeping of an attached program, and {"clsact": true} once a qdisc is made for the filter of isolation.py.
Between commands there is none but of what could not be undone.
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
from . import nic

LOCK = Path("/run/xdp-erm.lock")
LOCK_SECONDS = 60


class Journal:
    """Its entries, by network namespace and interface; only for who holds the lock.

    The numbers of namespaces and interfaces are used again in time, so the hardware's address is a part of the key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._namespace = os.stat("/proc/thread-self/ns/net").st_ino
        self._entries: dict[str, Any] = {}
        try:
            kept = json.loads(path.read_text())
            self._entries = {key: changes for key, changes in kept.items() if _are_changes(changes)}
            sound = self._entries == kept
        except FileNotFoundError:
            return
        except OSError as error:
            raise XdpErmError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, AttributeError, RecursionError):
            sound = False
        if not sound:
            print(f"xdp-erm: {path} is damaged, and only what is sound in it is gone by: if a command was killed "
                  "half-way, compare MTU and offloads of its interface yourself (`ip link`, `ethtool -k`)",
                  file=sys.stderr)
            self._write()

    def begin(self, link: Link, changes: dict[str, Any]) -> None:
        """To be called before `changes`, if any, are made."""
        if changes:
            self._entries[self._key(link)] = changes
            self._write()
        else:
            self.finish(link)

    def finish(self, link: Link) -> None:
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
        """Replaces the file as a whole: a command may be killed in the middle of a write, too."""
        try:
            if self._entries:
                new = self._path.with_suffix(".new")
                new.write_text(json.dumps(self._entries))
                os.replace(new, self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            raise XdpErmError(f"{self._path} cannot be written: {error.strerror}") from None


def _are_changes(entry: object) -> bool:
    """Whether an entry is one of ours: what is done by it is done as root."""
    if not isinstance(entry, dict) or entry.get("clsact", True) is not True:
        return False
    return nic.are_changes({key: value for key, value in entry.items() if key != "clsact"})


@contextlib.contextmanager
def exclusive() -> Iterator[Journal]:
    """Waits for other commands, for at most LOCK_SECONDS. XdpErmError: the lock is not to be had."""
    try:
        lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise XdpErmError(f"the lock {LOCK} cannot be opened: {error.strerror}") from None
    try:
        os.fchmod(lock, 0o600)  # who could read it could lock it, and earlier versions let everybody
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
        yield Journal(LOCK.with_suffix(".journal"))
    finally:
        os.close(lock)
