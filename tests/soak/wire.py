"""The traffic: frames of every verdict, each with a number of its own, sent at one end and taken in at the other."""

from __future__ import annotations

import collections
import errno
import functools
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

from frames import ELSEWHERE, ERM, ETHER, MACS, ip, udp
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP
from scapy.packet import Packet, Raw

from xdp_erm_py.lab.cable import SWITCH_INTERFACE, Cable
from xdp_erm_py.lab.fanout import (
    AUXDATA,
    ETH_P_ALL,
    PACKET_AUXDATA,
    PACKET_STATISTICS,
    SO_RCVBUFFORCE,
    SOL_PACKET,
    with_vlan_tag,
)
from xdp_erm_py.program.reference import decapsulate
from xdp_erm_py.settings import InterfaceConfig

FRAMES_A_SECOND = 2000
BURST = 20
RECEIVE_BUFFER = 64 << 20  # bytes

# The source address of every Ethernet header, outer or inner: a byte for the kind of frame and four for the number.
_SOURCE = "02:00:4e:55:4d:42"
_OUTER, _INNER = ETHER.copy(), MACS.copy()
_OUTER.src = _INNER.src = _SOURCE
_PLACE = bytes.fromhex(_SOURCE.replace(":", ""))
_KIND, _NUMBER = 7, slice(8, 12)  # where they stand in a frame


def _erm(inner: Packet | bytes, outer: Packet | None = None, datagram: Packet | None = None, **fields: int) -> Packet:
    return _OUTER / (outer or ip()) / (datagram or udp()) / ERM(**fields) / inner


def _inner(host: int, size: int = 0) -> Packet:
    return _INNER / IP(src=f"10.0.0.{host}", dst=f"10.0.1.{host}") / UDP(chksum=0) / Raw(b"mirrored".ljust(size, b"."))


def _kinds() -> Iterator[tuple[str, Packet | bytes]]:
    for host in range(1, 9):
        yield f"flow {host}", _erm(_inner(host, 100 * host), vlan=0)
    yield "tagged", _erm(_inner(1), vlan=2011, is_tagged=1)
    yield "full size", _erm(_inner(2, 1472), vlan=10)
    yield "padded", bytes(_erm(_inner(3), vlan=0)) + bytes(20)
    yield "nested", _erm(_erm(_inner(4), vlan=0), vlan=0)
    yield "other port", _erm(_inner(5), datagram=udp(dport=7933))
    yield "foreign source", _erm(_inner(6), outer=ip(src="203.0.113.9"))
    yield "foreign target", _erm(_inner(7), outer=ip(dst="192.0.2.99"))
    yield "ARP", _OUTER / ARP()
    yield "TCP", _OUTER / ip() / TCP()
    yield "fragment", _erm(_inner(8), outer=ip(flags="MF"))
    yield "last fragment", _OUTER / ip(frag=185, proto=17) / Raw(b"the rest")
    yield "truncated", bytes(_erm(_inner(1)))[:-10]
    yield "no frame within", bytes(_OUTER / ip() / udp() / Raw(bytes(12)))
    yield "malformed", _erm(_inner(2), datagram=udp(len=4))


KINDS = dict(_kinds())
_FRAMES = [bytes(frame) for frame in KINDS.values()]
#: What the configurations that a soak takes turns with may differ in; see faults.py.
NARROW = {"port": (7932,), "sources": ("198.51.100.0/24",), "targets": ("192.0.2.1",)}
#: The same senders, on a list so long that it is looked up.
LONG = NARROW["sources"] + ELSEWHERE


@functools.cache
def _becomes(kind: int, config: InterfaceConfig) -> tuple[str, bytes]:
    outcome = decapsulate(_FRAMES[kind], config)
    return outcome.verdict, outcome.frame


def _untouched(kind: int) -> str:
    """The verdict with which frames of a kind stay as they are; of some it depends on the configuration whether."""
    verdicts = [_becomes(kind, InterfaceConfig(**narrow))[0] for narrow in (  # type: ignore[arg-type]
        {}, {"sources": NARROW["sources"]}, {"targets": NARROW["targets"]})]
    return next((verdict for verdict in verdicts if verdict != "decapsulated"), "decapsulated")


_UNTOUCHED = [_untouched(kind) for kind in range(len(_FRAMES))]


class Wire(threading.Thread):
    """Sends steadily while it is told to, and looks at all that comes out at the tap.

    What it counts is for whoever has paused it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(name="wire", daemon=True)
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._go, self._paused, self._end = threading.Event(), threading.Event(), False
        self._outstanding: dict[int, int] = {}
        self._taps: list[socket.socket] = []
        #: The configurations that may be in force; and whether there may be none.
        self.configs: set[InterfaceConfig] = set()
        self.bare = False
        self.counted: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def plug(self, cable: Cable, name: str) -> None:
        """Takes the cable's two ends, of which the sensor's is called `name`; again once it has been made anew."""
        with cable.switch.entered():
            self._sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._sender.bind((SWITCH_INTERFACE, 0))
        with cable.sensor.entered():
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            tap.setblocking(False)
            tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            tap.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            tap.bind((name, ETH_P_ALL))
            self._taps.append(tap)  # an older one may still hold frames

    def run(self) -> None:
        following = time.monotonic()
        while not self._end:
            if self._go.is_set():
                for _ in range(BURST):
                    self._send()
            else:
                self._paused.set()
            for tap in self._taps:
                self._take(tap)
            following = max(following + BURST / FRAMES_A_SECOND, time.monotonic())
            time.sleep(max(following - time.monotonic(), 0))

    def resume(self) -> None:
        self._go.set()

    def pause(self) -> None:
        """Returns when no more is sent; what is under way is still taken in."""
        self._go.clear()
        self._paused.clear()
        if not self._paused.wait(60):
            raise RuntimeError("the sender does not stop")

    def forget(self) -> None:
        """What has not come will not come any more."""
        self._outstanding.clear()

    def end(self) -> None:
        self._end = True
        self.join()

    def _send(self) -> None:
        kind, number = self._random.randrange(len(_FRAMES)), next(self._numbers) & 0xFFFFFFFF
        self._outstanding[number] = kind
        self.counted["sent"] += 1
        try:
            self._sender.send(_numbered(_FRAMES[kind], kind, number))
        except OSError as error:
            # ENOBUFS: the interface took it and dropped it, and has counted that.
            if error.errno != errno.ENOBUFS:
                del self._outstanding[number]
                self.counted["refused"] += 1
                if error.errno not in (errno.ENETDOWN, errno.ENXIO):
                    self.wrong.append(f"the switch cannot send: {error}")

    def _take(self, tap: socket.socket) -> None:
        while True:
            try:
                frame, control, _, address = tap.recvmsg(1 << 16, socket.CMSG_SPACE(AUXDATA.size))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENETDOWN:
                    continue  # said once, when the interface goes down
                raise
            if address[2] != socket.PACKET_OUTGOING:
                self._compare(with_vlan_tag(frame, control[0][2]))
        _, dropped = struct.unpack("=II", tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self.counted["lost by the tap"] += dropped

    def _compare(self, frame: bytes) -> None:
        self.counted["taken"] += 1
        kind, number = frame[_KIND], int.from_bytes(frame[_NUMBER], "big")
        if self._outstanding.pop(number, None) != kind:
            self.wrong.append(f"nobody sent this, or it came twice: {frame.hex()}")
            return
        for config in self.configs:
            verdict, expected = _becomes(kind, config)
            if frame == _numbered(expected, kind, number):
                self.counted[verdict] += 1
                return
        if self.bare and frame == _numbered(_FRAMES[kind], kind, number):
            # With the verdict `decapsulated`: no program had it.
            self.counted["still wrapped" if _UNTOUCHED[kind] == "decapsulated" else _UNTOUCHED[kind]] += 1
            return
        self.wrong.append(f"{list(KINDS)[kind]}: not as any configuration in force makes it: {frame.hex()}")


def _numbered(frame: bytes, kind: int, number: int) -> bytes:
    return frame.replace(_PLACE, _PLACE[:1] + bytes([kind]) + number.to_bytes(4, "big"))
