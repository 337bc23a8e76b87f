"""Frames at random: ERM in all shapes with a fault now and then, and frames that are no ERM at all."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

from frames import ETHER, INNER, MACS, PING, SENSOR, SWITCH, ip, udp
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q
from scapy.packet import Raw

from xdp_erm_py.shared import ERM_DEFAULT_PORT

SHORTEST, LONGEST = 14, 9216

SOURCES = tuple(bytes(map(int, address.split("."))) for address in (SWITCH, "198.51.100.2", "203.0.113.1", "10.0.0.1"))
TARGETS = tuple(bytes(map(int, address.split("."))) for address in (SENSOR, "192.0.2.2"))
PORTS = (ERM_DEFAULT_PORT, ERM_DEFAULT_PORT + 1)

# What a switch mirrors.
MIRRORED = tuple(map(bytes, (
    INNER,
    MACS / ARP(psrc="10.0.0.1"),
    MACS / LLC() / b"spanning tree",
    MACS / Raw(),
    MACS / PING / Raw(bytes(300)),
    MACS / IPv6() / UDP() / b"x",
    MACS / IPv6(plen=100) / UDP() / b"cut",
    MACS / ip(len=1500) / TCP() / b"cut",
    MACS / Dot1Q(vlan=5) / PING,
    MACS / Dot1AD(vlan=5) / Dot1Q(vlan=6) / IPv6() / UDP(),
    MACS / Dot1Q(vlan=5) / Dot1Q(vlan=6) / Dot1Q(vlan=7) / PING,
    MACS / Dot1Q(vlan=5, type=0x8100),
)))

# What else reaches the sensor.
FOREIGN = tuple(map(bytes, (
    ETHER / ARP(psrc=SWITCH, pdst=SENSOR),
    ETHER / IPv6() / udp() / INNER,
    ETHER / LLC() / b"spanning tree",
    ETHER / ip() / TCP(dport=ERM_DEFAULT_PORT) / INNER,
    ETHER / ip() / ICMP() / INNER,
    ETHER / ip() / udp(dport=53) / INNER,
    ETHER / ip(flags="MF") / udp() / INNER,
    ETHER / ip(frag=185, proto=17) / INNER,
    ETHER / Dot1Q() / Dot1Q() / Dot1Q() / ip() / udp() / INNER,
)))

MACS_OF_SWITCH = bytes(ETHER)[:12]
TPIDS = (0x8100, 0x88A8)
# Numbers at which bytes and fields change their meaning.
EDGES = (0, 1, 0x0F, 0x11, 0x3F, 0x40, 0x44, 0x45, 0x46, 0x4F, 0x7F, 0x80, 0x81, 0x88, 0xA8, 0xDD, 0xFE, 0xFF)
# Headers of two levels; most of what the program looks at lies here.
HEADERS = 140


class Generator:
    """The same `seed` gives the same frames."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed)

    def frame(self) -> bytes:
        """The next one, SHORTEST to LONGEST bytes."""
        if self._one_in(12):
            frame = self._pick(FOREIGN)
            if self._one_in(3):
                frame = self._wrapped(frame)
        else:
            frame = self._mirrored()
            for _ in range(self._pick((1, 1, 1, 1, 2, 2, 3, 4))):
                frame = self._wrapped(frame)
        while self._one_in(3):
            frame = self._damaged(frame)
        return frame[:LONGEST]

    def _below(self, end: int) -> int:
        return int(self._random.random() * end)

    def _one_in(self, number: int) -> bool:
        return self._random.random() * number < 1

    def _pick(self, choices: Sequence) -> object:
        return choices[int(self._random.random() * len(choices))]

    def _bytes(self, most: int) -> bytes:
        return self._random.randbytes(self._below(most + 1))

    def _near(self, number: int) -> int:
        """A 16-bit field that should be `number`: now and then a bit too much or too little, or anything."""
        if self._one_in(40):
            return max(0, number + self._below(61) - 30) & 0xFFFF
        if self._one_in(300):
            return self._below(1 << 16)
        return number & 0xFFFF

    def _mirrored(self) -> bytes:
        if self._one_in(40):
            return MIRRORED[0] + self._bytes(LONGEST)
        return self._pick(MIRRORED) + (self._bytes(40) if self._one_in(4) else b"")

    def _tags(self) -> bytes:
        if not self._one_in(4):
            return b""
        return b"".join(struct.pack("!HH", self._pick(TPIDS), self._below(1 << 16))
                        for _ in range(self._pick((1, 1, 2, 2, 3))))

    def _wrapped(self, inner: bytes) -> bytes:
        """One more level of ERM around a frame; each of its fields is wrong now and then."""
        behind = self._bytes(40) if self._one_in(4) else b""
        erm = self._random.randbytes(8) + struct.pack("!I", self._vlan())
        payload = erm + inner
        if self._one_in(30):
            payload = payload[:self._below(len(payload) + 1)]
        options = b"\1" * (4 * self._pick((0, 0, 0, 0, 0, 1, 2, 10)))
        udp_length = self._near(8 + len(payload))
        if self._one_in(8):
            payload += self._bytes(20)  # within IP, behind UDP
        source = self._pick(SOURCES) if self._one_in(3) else SOURCES[0]
        target = TARGETS[self._one_in(15)]
        header = struct.pack(
            "!BBHHHBBH4s4s",
            self._pick(EDGES) if self._one_in(60) else 0x45 + len(options) // 4, 0,
            self._near(28 + len(options) + len(payload)), 0,
            self._below(1 << 16) if self._one_in(60) else 0x4000, 85,
            self._below(256) if self._one_in(60) else 17, 0, source, target)
        udp = struct.pack("!HHHH", 1 + self._below(4), self._near(PORTS[self._one_in(6)]), udp_length, 0)
        ethertype = self._below(1 << 16) if self._one_in(60) else 0x0800
        return b"".join((MACS_OF_SWITCH, self._tags(), struct.pack("!H", ethertype), header, options, udp, payload,
                         behind))

    def _vlan(self) -> int:
        """The last word of the ERM header."""
        word = self._random.getrandbits(32)
        return word & ~0xFFF00 if self._one_in(8) else word

    def _damaged(self, frame: bytes) -> bytes:
        kind = self._below(6)
        if kind == 0:  # cut
            return frame[:SHORTEST + self._below(min(len(frame), 2 * HEADERS) - SHORTEST + 1)]
        if kind == 1:  # padded, now and then with what looks like a frame
            return frame + (self._bytes(LONGEST) if self._one_in(20) else self._pick(MIRRORED))
        if kind == 2:  # a tag too many
            return frame[:12] + struct.pack("!HH", self._pick(TPIDS), self._below(4096)) + frame[12:]
        at = self._below(min(len(frame), HEADERS))
        if kind == 3:  # another byte
            return frame[:at] + bytes((self._below(256),)) + frame[at + 1:]
        if kind == 4:
            return frame[:at] + bytes((self._pick(EDGES),)) + frame[at + 1:]
        # a few bits
        return frame[:at] + bytes((frame[at] ^ 1 << self._below(8),)) + frame[at + 1:]
