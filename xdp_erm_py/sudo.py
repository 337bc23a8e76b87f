"""Who runs a command through sudo(8) may be allowed that command as root, and not root's files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def caller() -> tuple[int, int] | None:
    """Number and group of the user who ran sudo; None: nobody did, or root."""
    user, group = os.environ.get("SUDO_UID", ""), os.environ.get("SUDO_GID", "")
    if os.geteuid() != 0 or not user.isdecimal() or not group.isdecimal() or int(user) == 0:
        return None
    return int(user), int(group)


@contextlib.contextmanager
def rights_of_caller() -> Iterator[None]:
    """For opening files that the command line names: by the caller's rights, not by root's."""
    found = caller()
    if found is None:
        yield
        return
    groups = os.getgroups()
    try:
        os.setgroups([])
        os.setegid(found[1])
        os.seteuid(found[0])
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
