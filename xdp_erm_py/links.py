"""Network interfaces and the XDP programs on them, over rtnetlink, in the caller's network namespace.

Not by pyroute2, because the versions that distributions ship read and write IFLA_XDP in different ways, and some of
them wrong. Messages are in host byte order; the numbers are those of uapi linux/netlink.h, rtnetlink.h and if_link.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import XdpErmError

_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_GETLINK, _RTM_SETLINK = 16, 18, 19
_NLMSGERR_ATTR_MSG = 1
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change
_NESTED = 0x8000

_IFLA_IFNAME, _IFLA_MTU, _IFLA_XDP = 3, 4, 43
_IFLA_XDP_FD, _IFLA_XDP_FLAGS, _IFLA_XDP_EXPECTED_FD = 1, 3, 8
_IFLA_XDP_PROGRAM_ID = {"native": 5, "generic": 6, "offload": 7}

_UPDATE_IF_NOEXIST, _REPLACE = 1 << 0, 1 << 4
_MODE_FLAGS = {"generic": 1 << 1, "native": 1 << 2, "offload": 1 << 3}


@dataclass(frozen=True)
class Link:
    name: str
    index: int
    mtu: int
    """Bytes above the Ethernet header."""
    program_id: int | None
    """The XDP program, None: none."""
    mode: str | None
    """How it is attached: native, generic or offload."""


class Refused(Exception):
    """The kernel or the driver refused; `code` is the errno, the text is theirs."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason or os.strerror(code))
        self.code = code


class Links:
    """A connection to rtnetlink; use it in a with block."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        # Answers to requests carry the driver's own words, and not the request again.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def __iter__(self) -> Iterator[Link]:
        return iter([_link(body) for body in self._request(_RTM_GETLINK, _DUMP, 0, b"")])

    def find(self, name: str) -> Link:
        """The interface of that name; XdpErmError where there is none."""
        for link in self:
            if link.name == name:
                return link
        raise XdpErmError(f"{name}: no such interface in this network namespace; `ip link` lists them")

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Sets the MTU, in bytes above the Ethernet header. XdpErmError: the driver refuses it."""
        try:
            self._set(link, _attribute(_IFLA_MTU, struct.pack("=I", mtu)))
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
        nested = _attribute(_IFLA_XDP_FD, struct.pack("=i", program))
        nested += _attribute(_IFLA_XDP_FLAGS, struct.pack("=I", flags))
        if expected is not None:
            nested += _attribute(_IFLA_XDP_EXPECTED_FD, struct.pack("=i", expected))
        self._set(link, _attribute(_IFLA_XDP | _NESTED, nested))

    def _set(self, link: Link, attributes: bytes) -> None:
        try:
            self._request(_RTM_SETLINK, _ACK, link.index, attributes)
        except Refused as refused:
            if refused.code == errno.ENODEV:
                raise gone(link.name) from None
            raise

    def _request(self, kind: int, flags: int, index: int, attributes: bytes) -> list[bytes]:
        """Sends one request; returns the links in the answer. Raises Refused."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + attributes
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 0, 0) + body)
        links: list[bytes] = []
        while True:
            datagram = self._socket.recv(1 << 18)
            while datagram:
                length, answer, *_ = _HEADER.unpack_from(datagram)
                body, datagram = datagram[_HEADER.size:length], datagram[length:]
                if answer == _NLMSG_DONE:
                    return links
                if answer == _NLMSG_ERROR:
                    code, = struct.unpack_from("=i", body)
                    if code == 0:
                        return links
                    words = _attributes(body[4 + _HEADER.size:]).get(_NLMSGERR_ATTR_MSG, b"")
                    raise Refused(-code, words.rstrip(b"\0").decode(errors="replace"))
                if answer == _RTM_NEWLINK:
                    links.append(body)


def gone(name: str) -> XdpErmError:
    return XdpErmError(f"{name}: the interface went away half-way; nothing of ours is left on it")


def _link(body: bytes) -> Link:
    _, _, index, _, _ = _LINK.unpack_from(body)
    attributes = _attributes(body[_LINK.size:])
    xdp = _attributes(attributes.get(_IFLA_XDP, b""))
    mode = next((mode for mode, attribute in _IFLA_XDP_PROGRAM_ID.items() if attribute in xdp), None)
    return Link(attributes[_IFLA_IFNAME].rstrip(b"\0").decode(), index, _u32(attributes[_IFLA_MTU]),
                _u32(xdp[_IFLA_XDP_PROGRAM_ID[mode]]) if mode else None, mode)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value.ljust((len(value) + 3) // 4 * 4, b"\0")


def _attributes(data: bytes) -> dict[int, bytes]:
    """The values by kind, without the flag for nested ones; each begins at a multiple of four bytes."""
    attributes = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        attributes[kind & ~_NESTED] = data[4:length]
        data = data[(length + 3) // 4 * 4:]
    return attributes


def _u32(value: bytes) -> int:
    number: int = struct.unpack("=I", value)[0]
    return number
