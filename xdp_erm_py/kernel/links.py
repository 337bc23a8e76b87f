"""Network interfaces and the XDP programs on them, over rtnetlink, in the caller's network namespace.

The numbers are those of uapi linux/rtnetlink.h and if_link.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import XdpErmError
from .netlink import DUMP, NESTED, Refused, Rtnetlink, attribute, attributes, text

_RTM_GETLINK, _RTM_SETLINK = 18, 19
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_XDP = 1, 3, 4, 43
_IFLA_XDP_FD, _IFLA_XDP_FLAGS, _IFLA_XDP_EXPECTED_FD = 1, 3, 8
_IFLA_XDP_PROGRAM_ID = {"native": 5, "generic": 6, "offload": 7}

_UPDATE_IF_NOEXIST, _REPLACE = 1 << 0, 1 << 4
_MODE_FLAGS = {"generic": 1 << 1, "native": 1 << 2, "offload": 1 << 3}


@dataclass(frozen=True)
class Link:
    name: str
    index: int
    address: str
    """Of the hardware, in hexadecimal; empty where there is none."""
    mtu: int
    """Bytes above the Ethernet header."""
    program_id: int | None
    """The XDP program, None: none."""
    mode: str | None
    """How it is attached: native, generic or offload."""


class Links:
    """A connection to rtnetlink; use it in a with block."""

    def __init__(self) -> None:
        self._rtnetlink = Rtnetlink()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *exception: object) -> None:
        self._rtnetlink.__exit__(*exception)

    def __iter__(self) -> Iterator[Link]:
        return iter([_link(body) for body in self._request(_RTM_GETLINK, DUMP, 0, b"")])

    def find(self, name: str) -> Link:
        """The interface of that name; XdpErmError where there is none."""
        for link in self:
            if link.name == name:
                return link
        raise XdpErmError(f"{name}: no such interface in this network namespace; `ip link` lists them")

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Sets the MTU, in bytes above the Ethernet header. XdpErmError: the driver refuses it."""
        try:
            self._set(link, attribute(_IFLA_MTU, struct.pack("=I", mtu)))
        except Refused as refused:
            raise XdpErmError(f"{link.name}: MTU {mtu} is refused: {refused}") from None

    def attach(self, link: Link, program: int, mode: str, replaced: int | None = None) -> None:
        """Puts the program with descriptor `program` on the interface.

        `replaced` is the descriptor of the program that must be there now, for an atomic swap; without it there must be
        none. Raises Refused.
        """
        self._set_xdp(link, program, mode, replaced)

    def detach(self, link: Link, mode: str, program: int) -> None:
        """Takes the program with descriptor `program` off the interface, and no other. Raises Refused."""
        self._set_xdp(link, -1, mode, program)

    def _set_xdp(self, link: Link, program: int, mode: str, expected: int | None) -> None:
        flags = _MODE_FLAGS[mode] | (_UPDATE_IF_NOEXIST if expected is None else _REPLACE)
        nested = attribute(_IFLA_XDP_FD, struct.pack("=i", program))
        nested += attribute(_IFLA_XDP_FLAGS, struct.pack("=I", flags))
        if expected is not None:
            nested += attribute(_IFLA_XDP_EXPECTED_FD, struct.pack("=i", expected))
        self._set(link, attribute(_IFLA_XDP | NESTED, nested))

    def _set(self, link: Link, attributes: bytes) -> None:
        try:
            self._request(_RTM_SETLINK, 0, link.index, attributes)
        except Refused as refused:
            if refused.code == errno.ENODEV:
                raise gone(link.name) from None
            raise

    def _request(self, kind: int, flags: int, index: int, attributes: bytes) -> list[bytes]:
        return self._rtnetlink.request(kind, flags, _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attributes)


def gone(name: str) -> XdpErmError:
    return XdpErmError(f"{name}: the interface went away half-way; nothing of ours is left on it")


def _link(body: bytes) -> Link:
    _, _, index, _, _ = _LINK.unpack_from(body)
    link = attributes(body[_LINK.size:])
    xdp = attributes(link.get(_IFLA_XDP, b""))
    mode = next((mode for mode, attribute in _IFLA_XDP_PROGRAM_ID.items() if attribute in xdp), None)
    return Link(text(link[_IFLA_IFNAME]), index, link.get(_IFLA_ADDRESS, b"").hex(), _u32(link[_IFLA_MTU]),
                _u32(xdp[_IFLA_XDP_PROGRAM_ID[mode]]) if mode else None, mode)


def _u32(value: bytes) -> int:
    number: int = struct.unpack("=I", value)[0]
    return number
