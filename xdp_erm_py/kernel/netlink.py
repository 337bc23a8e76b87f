"""Requests to rtnetlink, in the caller's network namespace.

Not by pyroute2, because the versions that distributions ship read and write IFLA_XDP in different ways, some of them
wrong, and some remove traffic control filters with flags that newer kernels refuse. Messages are in host byte order;
the numbers are those of uapi linux/netlink.h and rtnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_REQUEST, _ACK = 0x1, 0x4
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DUMP_INTERRUPTED = 0x10
_NLMSGERR_ATTR_MSG = 1
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port

NESTED = 0x8000
DUMP, EXCLUSIVE, CREATE = 0x300, 0x200, 0x400

#: How often a dump is asked for that changes came between.
_MOST_DUMPS = 100


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
        """Sends one request; returns the bodies of what comes in answer, before it is acknowledged. Raises Refused.

        A dump that a change has interrupted, and that may therefore leave something out, is asked for again.
        """
        flags |= _REQUEST if flags & DUMP == DUMP else _REQUEST | _ACK
        message = _HEADER.pack(_HEADER.size + len(body), kind, flags, 0, 0) + body
        for _ in range(_MOST_DUMPS):
            self._socket.send(message)
            answers, interrupted = self._answers()
            if not interrupted:
                return answers
        raise Refused(errno.EAGAIN, "it changes all the time")

    def _answers(self) -> tuple[list[bytes], bool]:
        """To one request: what comes, and whether a change came between its parts."""
        answers: list[bytes] = []
        interrupted = False
        while True:
            datagram = self._socket.recv(1 << 18)
            while datagram:
                length, answer, flags, *_ = _HEADER.unpack_from(datagram)
                body, datagram = datagram[_HEADER.size:length], datagram[length:]
                interrupted |= bool(flags & _DUMP_INTERRUPTED)
                if answer in (_NLMSG_DONE, _NLMSG_ERROR):
                    code, = struct.unpack_from("=i", body)
                    if code == 0:
                        return answers, interrupted
                    request = _HEADER.size if answer == _NLMSG_ERROR else 0  # is repeated, its header at least
                    words = attributes(body[4 + request:]).get(_NLMSGERR_ATTR_MSG, b"")
                    raise Refused(-code, text(words))
                answers.append(body)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to a multiple of four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value.ljust((len(value) + 3) // 4 * 4, b"\0")


def attributes(data: bytes) -> dict[int, bytes]:
    """The values by kind; of those of one kind the last."""
    return dict(each_attribute(data))


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, value) of one after another, kinds without the flag for nested ones; each begins at a multiple of four
    bytes."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & ~NESTED, data[4:length]
        data = data[(length + 3) // 4 * 4:]


def text(value: bytes) -> str:
    """A string attribute."""
    return value.rstrip(b"\0").decode(errors="replace")
