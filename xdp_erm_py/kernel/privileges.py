"""What a command must be allowed to do, looked at before it does anything: capabilities(7), which root usually has."""

from __future__ import annotations

from pathlib import Path

from ..errors import XdpErmError

# uapi linux/capability.h. CAP_BPF is not enough: the kernel gives programs and maps by their id to CAP_SYS_ADMIN only.
_NET_ADMIN = ("CAP_NET_ADMIN", 12)
_SYS_ADMIN = ("CAP_SYS_ADMIN", 21)


def require_to_look() -> None:
    """To find programs and read their maps. XdpErmError: not allowed."""
    _require(_SYS_ADMIN)


def require_to_change() -> None:
    """To load programs and change interfaces as well. XdpErmError: not allowed."""
    _require(_NET_ADMIN, _SYS_ADMIN)


def _require(*capabilities: tuple[str, int]) -> None:
    status = Path("/proc/thread-self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    missing = [name for name, bit in capabilities if not effective >> bit & 1]
    if missing:
        raise XdpErmError(f"XDP programs need root; {' and '.join(missing)} is missing here: run it with sudo")
