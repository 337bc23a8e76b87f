"""The XDP program, loaded without an interface, and what one packet does to its counters."""

from __future__ import annotations

import contextlib
import os
import struct
from typing import NamedTuple

from xdp_erm_py import shared
from xdp_erm_py.interface import ours, stats
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.bpf import descriptor
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.program.compiler import PLAIN, Compiled, Variant
from xdp_erm_py.program.reference import Session
from xdp_erm_py.settings import InterfaceConfig

XDP_PASS, XDP_REDIRECT = 2, 4


MARK_LENGTH = 8


def mark(frame: bytes) -> bytes:
    """The metadata of a decapsulated frame, as in bpf/mark.h."""
    return struct.pack("=I", shared.MARK) + (frame[12:16] if len(frame) >= 16 else bytes(4))


class Counted(NamedTuple):
    packets: int
    bytes: int


class Outcome(NamedTuple):
    """What became of a packet, and which counters it moved, by how much."""

    frame: bytes
    counters: dict[str, Counted]
    sessions: dict[Session, Counted]
    senders: dict[str, Counted]
    """Foreign ones."""


def overstate(interface: str, counter: str, packets: int) -> None:
    """Has the program on the interface have counted so many packets more than it has."""
    with Links() as links, bpf.Map.by_id(ours.find(links, interface).maps["counters"]) as counters:
        key = struct.pack("=I", shared.COUNTERS.index(counter))
        first, *others = counters.lookup(key)
        more = struct.pack("=QQ", struct.unpack("=QQ", first)[0] + packets, struct.unpack("=QQ", first)[1])
        counters.update(key, b"".join([more, *others]))


class Program:
    """A compiled and loaded program; the with block unloads it."""

    def __init__(self, config: InterfaceConfig, options: tuple[str, ...] = (), variant: Variant = PLAIN) -> None:
        self._isolate = config.isolate
        #: What it says of a frame that it has decapsulated.
        self.action = XDP_REDIRECT if variant.cpus else XDP_PASS
        with contextlib.ExitStack() as stack:
            compiled = stack.enter_context(Compiled(config, variant, options))
            self.fd = stack.enter_context(descriptor(compiled.load({})))
            self.maps = {name: stack.enter_context(bpf.Map(os.dup(fd))) for name, fd in compiled.maps.items()}
            self._stack = stack.pop_all()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, frame: bytes) -> Outcome:
        counters, sessions, senders = self.counters(), self.sessions(), self.senders()
        result, left = bpf.test_run(self.fd, frame)
        moved = _moved(counters, self.counters())
        assert result == (self.action if "decapsulated" in moved else XDP_PASS)
        if self._isolate and "decapsulated" in moved:
            # A test run gives the metadata with the frame.
            metadata, left = left[:MARK_LENGTH], left[MARK_LENGTH:]
            assert metadata == mark(left)
        return Outcome(left, moved, _moved(sessions, self.sessions()), _moved(senders, self.senders()))

    def counters(self) -> dict[str, Counted]:
        counted = {}
        for index, name in enumerate(shared.COUNTERS):
            per_cpu = [struct.unpack("=QQ", value) for value in self.maps["counters"].lookup(struct.pack("=I", index))]
            counted[name] = Counted(*map(sum, zip(*per_cpu)))
        return counted

    def sessions(self) -> dict[Session, Counted]:
        return {session: Counted(packets, bytes_) for session, (packets, bytes_, _) in self._sessions().items()}

    def senders(self) -> dict[str, Counted]:
        if "senders" not in self.maps:
            return {}
        counted = stats.read_senders(self.maps["senders"])
        return {source: Counted(packets, bytes_) for source, (packets, bytes_, _) in counted.items()}

    def last_seen(self) -> dict[Session, float]:
        """Seconds of CLOCK_MONOTONIC."""
        return {session: last_seen for session, (_, _, last_seen) in self._sessions().items()}

    def order(self) -> dict[Session, stats.Order]:
        """Of sessions whose frames are numbered."""
        return stats.read_order(self.maps["numbers"]) if "numbers" in self.maps else {}

    def _sessions(self) -> dict[Session, tuple[int, int, float]]:
        if "sessions" not in self.maps:
            return {}
        counted = stats.read_sessions(self.maps["own_sessions"], self.maps["sessions"])
        return counted


def _moved(before: dict, after: dict) -> dict:
    """What has changed between two readings, by how much."""
    moved = {}
    for name, (packets, bytes_) in after.items():
        packets_before, bytes_before = before.get(name, (0, 0))
        if (packets, bytes_) != (packets_before, bytes_before):
            moved[name] = Counted(packets - packets_before, bytes_ - bytes_before)
    return moved
