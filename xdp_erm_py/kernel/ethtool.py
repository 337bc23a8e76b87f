"""Features, queues and statistics of an interface, as `ethtool -k`, `-K`, `-l`, `-S` have them (uapi linux/ethtool.h).

Not by pyroute2: importing it takes twice as long as all the rest of attaching, and 25 MB.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import socket
import struct
from typing import NamedTuple

_SIOCETHTOOL = 0x8946
_GSTRINGS, _GSTATS, _GSSET_INFO, _GFEATURES, _SFEATURES, _GCHANNELS = 0x1B, 0x1D, 0x37, 0x3A, 0x3B, 0x3C
_SS_STATS, _SS_FEATURES = 1, 4  # the sets of strings that are the statistics' and the features' names
_NAME_LENGTH = 32


class Feature(NamedTuple):
    on: bool
    movable: bool
    """Whether the driver lets it be turned on and off."""


def features(name: str) -> dict[str, Feature]:
    """The features of interface `name`. OSError: ENODEV, there is no such interface; or they cannot be read."""
    with _Interface(name) as interface:
        names = interface.names(_SS_FEATURES)
        blocks = interface.request(struct.pack("=II", _GFEATURES, _blocks(names)), 16 * _blocks(names))
        found = {}
        for index, feature in enumerate(names):
            available, _requested, active, never_changed = struct.unpack_from("=4I", blocks, 8 + index // 32 * 16)
            bit = 1 << index % 32
            found[feature] = Feature(bool(active & bit), bool(available & ~never_changed & bit))
        return found


def channels(name: str) -> list[int] | None:
    """How many queues interface `name` has: receiving, sending, other, combined; None: its driver does not tell."""
    with _Interface(name) as interface:
        try:
            answer = interface.request(struct.pack("=I", _GCHANNELS), 32)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return None
            raise
        return list(struct.unpack_from("=4I", answer, 20))


def set_features(name: str, values: dict[str, bool]) -> None:
    """Turns features on or off, as far as the driver lets it: what is so then, features() tells. OSError as there."""
    with _Interface(name) as interface:
        names = interface.names(_SS_FEATURES)
        blocks = bytearray(8 * _blocks(names))
        for index, feature in enumerate(names):
            if feature in values:
                meant, on = struct.unpack_from("=II", blocks, index // 32 * 8)
                bit = 1 << index % 32
                struct.pack_into("=II", blocks, index // 32 * 8, meant | bit, on | bit * values[feature])
        interface.request(struct.pack("=II", _SFEATURES, _blocks(names)) + blocks)


def statistics(name: str) -> dict[str, int]:
    """What the driver of interface `name` counts, each driver something else. OSError as features()."""
    with _Interface(name) as interface:
        names = interface.names(_SS_STATS)
        answer = interface.request(struct.pack("=II", _GSTATS, len(names)), 8 * len(names))
        return dict(zip(names, struct.unpack_from(f"={len(names)}Q", answer, 8)))


def _blocks(names: list[str]) -> int:
    return (len(names) + 31) // 32


class _Interface:
    def __init__(self, name: str) -> None:
        encoded = name.encode(errors="surrogateescape")
        if len(encoded) > 15:  # the kernel's own limit
            raise OSError(errno.ENODEV, "no such interface")
        self._name = encoded
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> _Interface:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def names(self, kind: int) -> list[str]:
        """A set of names, in the order of what they are names of."""
        answer = self.request(struct.pack("=IIQ", _GSSET_INFO, 0, 1 << kind), 4)
        found, count = struct.unpack_from("=QI", answer, 8)
        if not found:  # the driver has none of this kind
            return []
        answer = self.request(struct.pack("=III", _GSTRINGS, kind, count), count * _NAME_LENGTH)
        return [answer[start:start + _NAME_LENGTH].split(b"\0")[0].decode(errors="replace")
                for start in range(12, 12 + count * _NAME_LENGTH, _NAME_LENGTH)]

    def request(self, command: bytes, room: int = 0) -> bytes:
        """The command as the kernel has filled it in, with as many bytes behind it."""
        data = ctypes.create_string_buffer(command, len(command) + room)
        request = struct.pack("16sP16x", self._name, ctypes.addressof(data))  # struct ifreq
        fcntl.ioctl(self._socket, _SIOCETHTOOL, request)
        return data.raw
