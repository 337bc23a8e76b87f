"""What goes wrong, in one line that a user can act on."""

from __future__ import annotations


class XdpErmError(Exception):
    """Something failed. The message says what, on which interface, and what to do now."""

    exit_status = 1


class UsageError(XdpErmError):
    """The command line or the configuration is wrong; nothing was changed."""

    exit_status = 2
