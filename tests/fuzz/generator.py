"""Frames at random: mirrored ones in all encapsulations with a fault now and then, and frames that are none."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Sequence

from frames import ETHER, INNER, MACS, PING, SENSOR, SWITCH, ip, udp
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q
from scapy.packet import Raw

from xdp_erm_py.shared import ERM_DEFAULT_PORT

SHORTEST, LONGEST = 14, 9216

SOURCES = tuple(bytes(map(int, address.split("."))) for address in (SWITCH, "198.51.100.2", "203.0.113.1", "10.0.0.1"))
TARGETS = tuple(bytes(map(int, address.split("."))) for address in (SENSOR, "192.0.2.2"))
SOURCES_6 = tuple(map(socket.inet_pton, [socket.AF_INET6] * 3,
                      ("2001:db8::1", "2001:db8:1::2", "::ffff:198.51.100.1")))
TARGETS_6 = tuple(map(socket.inet_pton, [socket.AF_INET6] * 2, ("2001:db8::9", "2001:db8::a")))
PORTS = (ERM_DEFAULT_PORT, ERM_DEFAULT_PORT + 1)
KINDS = ("erm",) * 6 + ("erspan",) * 3 + ("gre", "gre", "vxlan", "geneve", "geneve", "tzsp")
EXTENSIONS = (0, 43, 44, 51, 60)

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
    ETHER / IPv6() / IPv6ExtHdrHopByHop() / UDP(dport=4789) / INNER,
    ETHER / IPv6() / IPv6ExtHdrFragment() / UDP(dport=4789) / INNER,
    ETHER / IPv6() / IPv6ExtHdrHopByHop() / ICMPv6EchoRequest(),
)))

MACS_OF_SWITCH = bytes(ETHER)[:12]
TPIDS = (0x8100, 0x88A8)
# Numbers at which bytes and fields change their meaning.
EDGES = (0, 1, 0x0F, 0x11, 0x3F, 0x40, 0x44, 0x45, 0x46, 0x4F, 0x7F, 0x80, 0x81, 0x88, 0xA8, 0xDD, 0xFE, 0xFF)
# Headers of two levels; most of what the program looks at lies here.
HEADERS = 140


class Generator:
    """The same `seed` gives the same frames. `kinds` are the encapsulations, each as often as it stands there."""

    def __init__(self, seed: int | str, kinds: Sequence[str] = KINDS) -> None:
        self._random = random.Random(seed)
        self._kinds = kinds

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
        """One more level of wrapping around a frame; each of its fields is wrong now and then."""
        behind = self._bytes(40) if self._one_in(4) else b""
        kind = self._pick(self._kinds)
        payload = getattr(self, f"_{kind}")(inner)
        if self._one_in(30):
            payload = payload[:self._below(len(payload) + 1)]
        protocol = 47
        if kind not in ("erspan", "gre"):
            length = self._near(8 + len(payload))
            port = {"vxlan": 4789, "geneve": 6081, "tzsp": 37008}.get(kind, PORTS[self._one_in(6)])
            payload = struct.pack("!HHHH", 1 + self._below(4), self._near(port), length, 0) + payload
            protocol = 17
        if self._one_in(8):
            payload += self._bytes(20)  # within IP, behind UDP
        ipv6 = self._one_in(4 if kind not in ("erm", "tzsp") else 20)
        packet = (self._ipv6 if ipv6 else self._ipv4)(protocol, payload)
        ethertype = self._below(1 << 16) if self._one_in(60) else 0x86DD if ipv6 else 0x0800
        return b"".join((MACS_OF_SWITCH, self._tags(), struct.pack("!H", ethertype), packet, behind))

    def _ipv4(self, protocol: int, payload: bytes) -> bytes:
        options = b"\1" * (4 * self._pick((0, 0, 0, 0, 0, 1, 2, 10)))
        source = self._pick(SOURCES) if self._one_in(3) else SOURCES[0]
        return struct.pack(
            "!BBHHHBBH4s4s",
            self._pick(EDGES) if self._one_in(60) else 0x45 + len(options) // 4, 0,
            self._near(20 + len(options) + len(payload)), 0,
            self._below(1 << 16) if self._one_in(60) else 0x4000, 85,
            self._below(256) if self._one_in(60) else protocol, 0, source,
            TARGETS[self._one_in(15)]) + options + payload

    def _ipv6(self, protocol: int, payload: bytes) -> bytes:
        if self._one_in(20):
            # Every third with an encapsulation limit.
            payload = bytes((self._pick((*[protocol] * 6, 58, *EXTENSIONS)), self._one_in(8))) + bytes(6) + payload
            protocol = self._pick((*[60] * 5, *EXTENSIONS))
        source = self._pick(SOURCES_6) if self._one_in(3) else SOURCES_6[0]
        return struct.pack(
            "!BBHHBB16s16s", self._pick(EDGES) if self._one_in(60) else 0x60, 0, 0, self._near(len(payload)),
            self._below(256) if self._one_in(60) else protocol, 64, source, TARGETS_6[self._one_in(15)]) + payload

    def _erm(self, inner: bytes) -> bytes:
        return self._random.randbytes(8) + struct.pack("!I", self._vlan()) + inner

    def _gre_header(self, kind: int, flags: int) -> bytes:
        """With random optional fields, but for the sequence number, which stands where `flags` has it."""
        flags |= self._pick((0, 0, 0, 0x2000, 0x8000, 0xA000))
        if self._one_in(40):
            flags ^= 1 << self._below(16)
        fields = b""
        for flag in (0x8000, 0x2000, 0x1000):
            if flags & flag:
                number = self._below(8) if flag != 0x8000 and not self._one_in(10) else self._random.getrandbits(32)
                fields += struct.pack("!I", number)
        return struct.pack("!HH", flags, self._below(1 << 16) if self._one_in(60) else kind) + fields

    def _gre(self, inner: bytes) -> bytes:
        kind, inner = self._bared(inner)
        return self._gre_header(kind or 0x6558, self._pick((0, 0, 0x1000))) + inner

    def _bared(self, inner: bytes) -> tuple[int, bytes]:
        """Now and then without the Ethernet header, and which EtherType that had; else 0."""
        kind = int.from_bytes(inner[12:14], "big")
        return (kind, inner[14:]) if kind in (0x0800, 0x86DD) and self._one_in(2) else (0, inner)

    def _erspan(self, inner: bytes) -> bytes:
        version = self._pick((1, 2, 2, 3, 3))
        if version == 1:
            return self._gre_header(0x88BE, 0) + inner
        word = (self._below(16) if self._one_in(30) else version - 1) << 28 | self._random.getrandbits(28)
        word &= ~0x3F0  # few sessions
        if self._one_in(2):
            word &= ~0xFFF0000  # VLAN 0
        if version == 2:
            return self._gre_header(0x88BE, 0x1000) + struct.pack("!II", word, self._random.getrandbits(32)) + inner
        kind, inner = self._bared(inner)
        flags = self._random.getrandbits(16) & ~0x7C01 | (2 if kind else 0) << 10
        if self._one_in(20):
            flags ^= 1 << 10 + self._below(5)
        subheader = b""
        if self._one_in(3):
            flags, subheader = flags | 1, self._random.randbytes(8)
        header = struct.pack("!IIHH", word, self._random.getrandbits(32), self._random.getrandbits(16), flags)
        return self._gre_header(0x22EB, self._pick((0, 0x1000))) + header + subheader + inner

    def _vxlan(self, inner: bytes) -> bytes:
        flags = self._below(256) if self._one_in(30) else 8
        return struct.pack("!BBHI", flags, 0, 0, self._below(4) << 8 | self._below(256)) + inner

    def _geneve(self, inner: bytes) -> bytes:
        kind, inner = self._bared(inner)
        options = self._pick((0, 0, 1, 2, 63, self._below(64)))
        first = self._below(256) if self._one_in(30) else options
        flags = self._below(256) if self._one_in(30) else self._pick((0, 0x40))
        kind = self._below(1 << 16) if self._one_in(40) else kind or 0x6558
        return struct.pack("!BBHI", first, flags, kind, self._below(4) << 8) + bytes(4 * options) + inner

    def _tzsp(self, inner: bytes) -> bytes:
        fields = b""
        for _ in range(self._pick((0, 0, 0, 1, 2, 7, 9))):
            value = self._bytes(self._pick((0, 1, 4, 255)))
            fields += b"\0" if self._one_in(3) else bytes((self._pick((10, 13, 255)), len(value))) + value
        header = struct.pack("!BBH", self._below(4) if self._one_in(30) else 1,
                             self._below(6) if self._one_in(30) else 0, self._below(300) if self._one_in(30) else 1)
        return header + fields + (b"" if self._one_in(30) else b"\1") + inner

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
