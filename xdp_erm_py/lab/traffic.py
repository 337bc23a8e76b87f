"""Synthetic mirror traffic: two-way flows as several switches would mirror them, each frame different."""

from __future__ import annotations

import itertools
import random
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..program.encapsulations import ENCAPSULATIONS, ETHERTYPE_IPV4, ETHERTYPE_IPV6, insert_vlan_tag
from ..program.reference import PROTOCOL_GRE, PROTOCOL_UDP, UDP_LEN, Session
from ..settings import IPV4_ONLY

PROTOCOL_TCP = 6
TCP_LEN = 20
TCP_SYN, TCP_ACK, TCP_PUSH = 0x02, 0x10, 0x08

SENSOR_ADDRESS = "192.0.2.1"
# With some senders it is a hash of the inner flow; here it makes a session one flow, as with the others.
SOURCE_PORT = 49152
SESSIONS = (
    Session("198.51.100.1", 1),
    Session("198.51.100.1", 2),
    Session("198.51.100.2", 1),
    Session("198.51.100.3", 65535),
)
VLANS = (1, 10, 2011, 4094)

MIN_FRAME_LEN = 60
MAX_FRAME_LEN = 1514
FILLING = bytes(range(256)) * 6
SEED = 7932  # the same packets in each run
MOST_FLOWS = 1 << 16  # that there are addresses for


class Packet(NamedTuple):
    """What the switch sends, and the frame it mirrored: the same where the packet mirrors none."""

    sent: bytes
    mirrored: bytes


class Copy(NamedTuple):
    """How one direction of a flow is mirrored."""

    session: Session
    is_tagged: bool


class Flow:
    """One two-way TCP or UDP conversation between a client (side 0) and a server (side 1)."""

    def __init__(self, number: int, rng: random.Random, sessions: Sequence[Session]) -> None:
        self.tci = rng.randrange(8) << 13 | rng.choice(VLANS)
        self.copies = (Copy(rng.choice(sessions), True), Copy(rng.choice(sessions), rng.choice((True, False))))
        self._protocol = rng.choice((PROTOCOL_TCP, PROTOCOL_UDP))
        self._ports = (32768 + number % 28000, 9000 + number % 100)
        self._macs = tuple(struct.pack("!HI", 0x0200 + side, number) for side in (0, 1))
        if number % 5 == 0:
            self._family, addresses = socket.AF_INET6, (f"2001:db8:1::{number:x}", f"2001:db8:2::{number % 200:x}")
        else:
            client = socket.inet_ntoa(struct.pack("!I", 0x0A000000 + number))
            self._family, addresses = socket.AF_INET, (client, f"192.168.0.{number % 200}")
        self._addresses = tuple(socket.inet_pton(self._family, address) for address in addresses)
        self._next_sequence = [rng.randrange(1 << 32), rng.randrange(1 << 32)]
        self._packets = 0

    def next_frame(self, number: int, rng: random.Random) -> tuple[int, bytes]:
        """Build the flow's next frame, without its tag, and say which side sends it; `number` makes it unique."""
        # The client opens, the server answers, then either side goes on.
        side = self._packets if self._packets < 2 else rng.randrange(2)
        opening = self._packets < 2
        self._packets += 1

        room = rng.randrange(MIN_FRAME_LEN, MAX_FRAME_LEN + 1) - 14 - (20 if self._family == socket.AF_INET else 40)
        if self._protocol == PROTOCOL_UDP:
            segment = self._udp(side, _payload(number, room - UDP_LEN))
        elif opening:
            segment = self._tcp(side, b"", TCP_SYN | TCP_ACK if side else TCP_SYN)
        else:
            segment = self._tcp(side, _payload(number, room - TCP_LEN), TCP_PUSH | TCP_ACK)
        return side, self._ethernet(side, self._ip(side, segment)).ljust(MIN_FRAME_LEN, b"\0")

    def _ethernet(self, side: int, packet: bytes) -> bytes:
        ethertype = ETHERTYPE_IPV4 if self._family == socket.AF_INET else ETHERTYPE_IPV6
        return self._macs[1 - side] + self._macs[side] + struct.pack("!H", ethertype) + packet

    def _ip(self, side: int, segment: bytes) -> bytes:
        source, destination = self._addresses[side], self._addresses[1 - side]
        if self._family == socket.AF_INET:
            return ipv4_header(source, destination, self._protocol, len(segment)) + segment
        return struct.pack("!IHBB16s16s", 6 << 28, len(segment), self._protocol, 64, source, destination) + segment

    def _udp(self, side: int, payload: bytes) -> bytes:
        ports = self._ports[side], self._ports[1 - side]
        length = UDP_LEN + len(payload)
        checksum = self._checksum(side, struct.pack("!HHHH", *ports, length, 0) + payload)
        return struct.pack("!HHHH", *ports, length, checksum) + payload

    def _tcp(self, side: int, payload: bytes, flags: int) -> bytes:
        sequence = self._next_sequence[side]
        acknowledgment = self._next_sequence[1 - side] if flags & TCP_ACK else 0
        self._next_sequence[side] = (sequence + len(payload) + (1 if flags & TCP_SYN else 0)) % (1 << 32)
        fields = self._ports[side], self._ports[1 - side], sequence, acknowledgment, TCP_LEN // 4 << 4, flags, 65535
        checksum = self._checksum(side, struct.pack("!HHIIBBHHH", *fields, 0, 0) + payload)
        return struct.pack("!HHIIBBHHH", *fields, checksum, 0) + payload

    def _checksum(self, side: int, segment: bytes) -> int:
        pseudo_header = self._addresses[0] + self._addresses[1] + struct.pack("!II", len(segment), self._protocol)
        return internet_checksum(pseudo_header + segment)


def synthetic(flows: int, packets: int, sessions: int = len(SESSIONS), encapsulation: str = "erm",
              first: int = 0) -> Iterator[Packet]:
    """Yield `packets` mirrored ones of `flows` flows, taking turns, in so many sessions; the same ones at each call.

    `first` is the first flow's number: those of other numbers are others.
    """
    rng = random.Random(SEED)
    chosen = [session._replace(encapsulation=encapsulation) for session in SESSIONS[:sessions]]
    conversations = [Flow(number, rng, chosen) for number in range(first, first + flows)]
    sent = dict.fromkeys(chosen, 0)
    for number, flow in enumerate(itertools.islice(itertools.cycle(conversations), packets)):
        side, frame = flow.next_frame(number, rng)
        copy = flow.copies[side]
        sent[copy.session] += 1
        yield Packet(encapsulate(frame, flow.tci, copy.is_tagged, copy.session, sent[copy.session]),
                     insert_vlan_tag(frame, flow.tci))


def encapsulate(frame: bytes, tci: int, is_tagged: bool, session: Session, number: int = 0) -> bytes:
    """Wrap an untagged frame as ArubaOS-Switch does, but for the encapsulation: DF, TTL 85, no UDP checksum.

    `number` is the frame's in its session.
    """
    encapsulation = ENCAPSULATIONS[session.encapsulation]
    payload, protocol = encapsulation.wrap(frame, session.id, tci, is_tagged, number), PROTOCOL_GRE
    if encapsulation.transport == "udp":
        source_port = session.id if session.encapsulation in IPV4_ONLY else SOURCE_PORT
        udp = struct.pack("!HHHH", source_port, encapsulation.ports[0], UDP_LEN + len(payload), 0)
        payload, protocol = udp + payload, PROTOCOL_UDP
    addresses = socket.inet_aton(session.source), socket.inet_aton(SENSOR_ADDRESS)
    ethernet = bytes.fromhex("020000000002 020000000001 0800")
    return ethernet + ipv4_header(*addresses, protocol, len(payload), time_to_live=85) + payload


def ipv4_header(source: bytes, destination: bytes, protocol: int, payload_len: int, time_to_live: int = 64) -> bytes:
    """Build a 20-byte header with don't-fragment set and its checksum right."""
    start = struct.pack("!BBHHHBB", 0x45, 0, 20 + payload_len, 0, 0x4000, time_to_live, protocol)
    addresses = source + destination
    return start + struct.pack("!H", internet_checksum(start + addresses)) + addresses


def internet_checksum(data: bytes) -> int:
    """RFC 1071 checksum of `data`, in which the checksum field is zero or left out.

    The one's complement sum of 16-bit words is the remainder modulo 0xFFFF of all bytes read as one number, since
    2**16 leaves 1. A remainder of 0 gives 0xFFFF here, the value UDP asks for and IP and TCP take as well as 0.
    """
    return 0xFFFF - int.from_bytes(data + b"\0" * (len(data) % 2), "big") % 0xFFFF


def _payload(number: int, length: int) -> bytes:
    """Return `length` bytes, 8 at least, that start with the packet's number."""
    return struct.pack("!Q", number) + FILLING[: max(length - 8, 0)]
