"""Counting workers: AF_PACKET fanout members as Zeek's workers open them, that compare what they get."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..program.encapsulations import ETHERTYPE_IPV4, ETHERTYPE_IPV6, MAC_PAIR_LEN, Untouched
from ..program.reference import IPV4_LEN, IPV6_LEN, PROTOCOL_UDP, skip_ethernet
from .cable import SENSOR_INTERFACE, Cable
from .traffic import PROTOCOL_TCP, Packet

# linux/if_packet.h, what Python's socket module has no names for
SOL_PACKET = 263
PACKET_ADD_MEMBERSHIP, PACKET_STATISTICS, PACKET_AUXDATA, PACKET_FANOUT = 1, 6, 8, 18
PACKET_MR_PROMISC = 1
PACKET_FANOUT_HASH = 0
TP_STATUS_VLAN_VALID = 0x10
SO_RCVBUFFORCE = 33
ETH_P_ALL = 3
AUXDATA = struct.Struct("=IIIHHHH")  # tpacket_auxdata: status, len, snaplen, mac, net, vlan_tci, vlan_tpid

MOST_MEMBERS = 256  # of a fanout group that does not ask for more
FANOUT_ID = 23  # Zeek's; groups are per network namespace
RECEIVE_BUFFER = 8 << 20  # bytes: all of a window for one worker, with the kernel's overhead
MAX_RECEIVE_LEN = 1 << 16
SILENCE_TIMEOUT = 5.0  # seconds without a frame after which what is missing counts as lost
SURPLUS_TIMEOUT = 0.2  # seconds to wait in the end for frames that should not come

PROTOCOLS_WITH_PORTS = (PROTOCOL_TCP, PROTOCOL_UDP)
PROTOCOLS_WITHOUT_PORTS = (1, 58)  # ICMP, ICMPv6


class FlowKey(NamedTuple):
    """An unordered 5-tuple: the endpoints are sorted, each an address and a port as they stand in the packet."""

    protocol: int
    lower: tuple[bytes, bytes]
    upper: tuple[bytes, bytes]


@dataclasses.dataclass
class Result:
    """What a run came to. Frames of a flow that has no key count for no flow."""

    packets: list[int]
    """Frames by worker."""
    sent: int = 0
    mirrored: int = 0
    """Mirrored ones among those sent."""
    identical: int | None = 0
    """Those that arrived as exactly the frame the switch mirrored; None: the workers do not compare."""
    missing: int = 0
    """Packets that did not arrive as they should."""
    unexpected: int = 0
    """Frames that arrived although nothing sent accounts for them: altered, or there twice."""
    dropped: int = 0
    """Frames the kernel dropped because a worker's receive buffer was full."""
    workers_by_flow: dict[FlowKey, set[int]] = dataclasses.field(default_factory=dict)
    unlogged_flows: int = 0
    """Mirrored flows that are in no worker's conn.log, where workers have one."""

    @property
    def split_flows(self) -> int:
        return sum(len(workers) > 1 for workers in self.workers_by_flow.values())

    def flows_of(self, worker: int) -> int:
        return sum(worker in workers for workers in self.workers_by_flow.values())


class FanoutWorkers:
    """`count` members of one fanout group on the sensor's interface.

    `expected` says which frame a packet should arrive as.
    """

    def __init__(self, cable: Cable, count: int, expected: Callable[[Packet], bytes]) -> None:
        self.result = Result([0] * count)
        self._expected = expected
        self._identical = 0
        self._outstanding: dict[bytes, list[Packet]] = collections.defaultdict(list)
        self._poll = select.poll()
        with contextlib.ExitStack() as stack:
            with cable.sensor.entered():
                sockets = [stack.enter_context(_fanout_member()) for _ in range(count)]
            self._sockets = {member.fileno(): (worker, member) for worker, member in enumerate(sockets)}
            for member in sockets:
                self._poll.register(member, select.POLLIN)
            self._stack = stack.pop_all()

    def __enter__(self) -> FanoutWorkers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def take(self, packets: Sequence[Packet]) -> bool:
        """Receive what was just sent; return False if it does not come, which makes sending more pointless."""
        for packet in packets:
            self._outstanding[self._expected(packet)].append(packet)
            self.result.sent += 1
            self.result.mirrored += packet.sent != packet.mirrored
        while sum(self.result.packets) < self.result.sent:
            if not self._receive(SILENCE_TIMEOUT):
                return False
        return True

    def finish(self) -> Result:
        """Wait for surplus frames, then close the books."""
        deadline = time.monotonic() + SILENCE_TIMEOUT
        while self._receive(SURPLUS_TIMEOUT) and time.monotonic() < deadline:
            pass
        self.result.identical = self._identical
        self.result.missing = sum(len(packets) for packets in self._outstanding.values())
        for _, member in self._sockets.values():
            _, dropped = struct.unpack("=II", member.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
            self.result.dropped += dropped
        return self.result

    def _receive(self, timeout: float) -> bool:
        """Take in all frames that are there, waiting for the first of them; return whether there was any."""
        ready = self._poll.poll(timeout * 1000)
        for descriptor, _ in ready:
            worker, member = self._sockets[descriptor]
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, control, _, address = member.recvmsg(MAX_RECEIVE_LEN, socket.CMSG_SPACE(AUXDATA.size))
                    if address[2] != socket.PACKET_OUTGOING:
                        self._count(worker, with_vlan_tag(frame, control[0][2]))
        return bool(ready)

    def _count(self, worker: int, frame: bytes) -> None:
        self.result.packets[worker] += 1
        packets = self._outstanding.get(frame)
        if not packets:
            self.result.unexpected += 1
            return
        packet = packets.pop()
        if not packets:
            del self._outstanding[frame]
        self._identical += packet.sent != packet.mirrored and frame == packet.mirrored
        flow = flow_key(packet.mirrored)
        if flow:
            self.result.workers_by_flow.setdefault(flow, set()).add(worker)


def flow_key(frame: bytes) -> FlowKey | None:
    """Return the unordered 5-tuple of a TCP, UDP or ICMP packet, None for anything else.

    IP fragments have no port in it, as only the first one carries any; the fanout hash leaves it out as well.
    """
    try:
        ethertype, ip = skip_ethernet(frame)
    except Untouched:
        return None
    if ethertype == ETHERTYPE_IPV4 and len(frame) >= ip + IPV4_LEN:
        protocol, addresses, address_len = frame[ip + 9], ip + 12, 4
        transport = ip + (frame[ip] & 0xF) * 4
        has_ports = protocol in PROTOCOLS_WITH_PORTS and not struct.unpack_from("!H", frame, ip + 6)[0] & 0x3FFF
    elif ethertype == ETHERTYPE_IPV6 and len(frame) >= ip + IPV6_LEN:
        protocol, addresses, address_len = frame[ip + 6], ip + 8, 16
        transport = ip + IPV6_LEN
        has_ports = protocol in PROTOCOLS_WITH_PORTS
    else:
        return None
    if protocol not in PROTOCOLS_WITH_PORTS + PROTOCOLS_WITHOUT_PORTS:
        return None
    endpoints = []
    for side in (0, 1):
        address = frame[addresses + side * address_len:][:address_len]
        port = frame[transport + side * 2:][:2] if has_ports else b""
        endpoints.append((address, port))
    return FlowKey(protocol, *sorted(endpoints))


def _fanout_member() -> socket.socket:
    """Open one member in the calling thread's network namespace, promiscuous and not blocking."""
    member = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        member.setblocking(False)
        member.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        member.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        member.bind((SENSOR_INTERFACE, ETH_P_ALL))
        promiscuous = struct.pack("=iHH8x", socket.if_nametoindex(SENSOR_INTERFACE), PACKET_MR_PROMISC, 0)
        member.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, promiscuous)
        member.setsockopt(SOL_PACKET, PACKET_FANOUT, FANOUT_ID | PACKET_FANOUT_HASH << 16)
    except BaseException:
        member.close()
        raise
    return member


def with_vlan_tag(frame: bytes, auxdata: bytes) -> bytes:
    """Put back the VLAN tag that the kernel took out of a frame, as every capture program does."""
    status, *_, tci, tpid = AUXDATA.unpack(auxdata)
    if not status & TP_STATUS_VLAN_VALID:
        return frame
    return frame[:MAC_PAIR_LEN] + struct.pack("!HH", tpid, tci) + frame[MAC_PAIR_LEN:]
