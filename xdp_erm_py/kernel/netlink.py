"""Requests to rtnetlink, in the caller's network namespace.

Not by pyroute2, because the versions that distributions ship read and write IFLA_XDP in different ways, some of them
wrong, and some remove traffic control filters with flags that newer kernels refuse. Messages are in host byte order;
the numbers are those of uapi linux/netlink.h and rtnetlink.h.
"""

from __future__ import annotations

import os
import socket
import struct

_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_REQUEST, _ACK = 0x1, 0x4
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSGERR_ATTR_MSG = 1
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port

NESTED = 0x8000
DUMP, EXCLUSIVE, CREATE = 0x300, 0x200, 0x400


class Refused(Exception):
    """The kernel or the driver refused; `code` is the errno, the text is theirs."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason or os.strerror(code))
        self.code = code


class Rtnetlink:
    """A connection to rtnetlink; use it in a with block."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        # Answers to requests carry the driver's own words, and not the request again.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Sends one request; returns the bodies of what comes in answer, before it is acknowledged. Raises Refused."""
        flags |= _REQUEST if flags & DUMP == DUMP else _REQUEST | _ACK
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body)
        answers: list[bytes] = []
        while True:
            datagram = self._socket.recv(1 << 18)
            while datagram:
                length, answer, *_ = _HEADER.unpack_from(datagram)
                body, datagram = datagram[_HEADER.size:length], datagram[length:]
                if answer == _NLMSG_DONE:
                    return answers
                if answer == _NLMSG_ERROR:
                    code, = struct.unpack_from("=i", body)
                    if code == 0:
                        return answers
                    words = attributes(body[4 + _HEADER.size:]).get(_NLMSGERR_ATTR_MSG, b"")
                    raise Refused(-code, text(words))
                answers.append(body)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to a multiple of four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value.ljust((len(value) + 3) // 4 * 4, b"\0")


def attributes(data: bytes) -> dict[int, bytes]:
    """The values by kind, without the flag for nested ones; each begins at a multiple of four bytes."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & ~NESTED] = data[4:length]
        data = data[(length + 3) // 4 * 4:]
    return found


def text(value: bytes) -> str:
    """A string attribute."""
    return value.rstrip(b"\0").decode(errors="replace")
