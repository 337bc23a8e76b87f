"""HP ERM decapsulation in plain Python: what the XDP program is measured against.

Written from the wire format alone, for reading rather than for speed. Every field is in network byte order. The lab
takes its expected frames from here, the tests compare the two implementations on the same frames.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import NamedTuple

from ..settings import InterfaceConfig
from ..shared import ERM_HEADER_LEN

ETHERNET_LEN = 14
MAC_PAIR_LEN = 12
VLAN_TAG_LEN = 4
IPV4_LEN = 20
IPV6_LEN = 40
UDP_LEN = 8

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
ETHERTYPE_8021Q = 0x8100
ETHERTYPE_8021AD = 0x88A8
MAX_VLAN_TAGS = 2

PROTOCOL_UDP = 17

# The header's raw priority is not the 802.1p priority. RCDCap's mapping; 2 -> 0 is also what real captures show.
PCP_OF_RAW_PRIORITY = (1, 2, 0, 3, 4, 5, 6, 7)


class Session(NamedTuple):
    """A mirror session as the capture side sees it: the operator of the switch picks a source port for each."""

    source: str
    source_port: int


class Vlan(NamedTuple):
    """What the ERM header keeps of the mirrored frame's 802.1Q tag; `tci` has the 802.1p priority, not the raw one."""

    tci: int
    is_tagged: bool

    @property
    def vlan_id(self) -> int:
        return self.tci & 0xFFF


class Datagram(NamedTuple):
    """One level of ERM, taken apart."""

    session: Session
    vlan: Vlan
    inner: bytes


@dataclass(frozen=True)
class Decapsulation:
    """The verdict and the frame that goes on to the taps.

    With any verdict but `decapsulated` the frame is the one that came in, `levels` is 0 and `session` None.
    `nested_refused`: the frame that goes on is ERM itself, deeper than configured or not from one of the sources.
    `foreign` is the source address where the verdict is `foreign_source` or `foreign_target`.
    """

    verdict: str
    frame: bytes
    levels: int = 0
    nested_refused: bool = False
    inner_truncated: bool = False
    session: Session | None = None
    foreign: str | None = None


class Untouched(Exception):
    """The frame is not ERM that can be peeled; the message is the verdict that says why."""

    def __init__(self, verdict: str, foreign: str | None = None) -> None:
        super().__init__(verdict)
        self.foreign = foreign


def decapsulate(frame: bytes, config: InterfaceConfig) -> Decapsulation:
    """Strip `frame`, an Ethernet frame without its FCS, of its ERM wrapping. Never raises, whatever the bytes."""
    try:
        outermost = datagram = _parse(frame, config.port, config.sources, config.targets)
    except Untouched as reason:
        return Decapsulation(str(reason), frame, foreign=reason.foreign)
    levels, nested_refused = 1, False
    while not nested_refused:
        try:
            within = _parse(datagram.inner, config.port)
        except Untouched:
            break
        # Whoever is mirrored can send ERM, too. Where a level within was sent to is another sensor's business.
        if levels < config.depth and _is_source(within.session.source, config.sources):
            datagram = within
            levels += 1
        else:
            nested_refused = True
    return Decapsulation(
        "decapsulated",
        _restore_vlan(datagram.inner, datagram.vlan, config.vlan),
        levels,
        nested_refused,
        _is_inner_truncated(datagram.inner),
        outermost.session,
    )


def parse_vlan(erm_header: bytes) -> Vlan:
    """Read the VLAN out of the ERM header's third word: priority 23-21, CFI 20, VLAN id 19-8, is_tagged 7."""
    (word,) = struct.unpack_from("!I", erm_header, 8)
    pcp = PCP_OF_RAW_PRIORITY[word >> 21 & 7]
    return Vlan(pcp << 13 | (word >> 8 & 0x1FFF), bool(word & 0x80))


def insert_vlan_tag(frame: bytes, tci: int) -> bytes:
    """Put an 802.1Q tag between the MAC addresses and the EtherType."""
    return frame[:MAC_PAIR_LEN] + struct.pack("!HH", ETHERTYPE_8021Q, tci) + frame[MAC_PAIR_LEN:]


def skip_ethernet(frame: bytes) -> tuple[int, int]:
    """Return the EtherType after at most two VLAN tags and the offset of what follows it.

    Raises Untouched("truncated") where the frame ends before that.
    """
    offset = ETHERNET_LEN
    ethertype = _ethertype_before(frame, offset)
    for _ in range(MAX_VLAN_TAGS):
        if ethertype not in (ETHERTYPE_8021Q, ETHERTYPE_8021AD):
            break
        offset += VLAN_TAG_LEN
        ethertype = _ethertype_before(frame, offset)
    return ethertype, offset


def _ethertype_before(frame: bytes, offset: int) -> int:
    if len(frame) < offset:
        raise Untouched("truncated")
    return int.from_bytes(frame[offset - 2:offset], "big")


def _parse(
    frame: bytes, ports: tuple[int, ...], sources: tuple[str, ...] = (), targets: tuple[str, ...] = ()
) -> Datagram:
    """Take one level of ERM apart, or raise Untouched with the verdict."""
    ethertype, ip = skip_ethernet(frame)
    if ethertype != ETHERTYPE_IPV4:
        raise Untouched("other")

    available = len(frame) - ip
    if available < IPV4_LEN:
        raise Untouched("truncated")
    version, header_words = frame[ip] >> 4, frame[ip] & 0xF
    if version != 4 or header_words < 5:
        raise Untouched("malformed")
    total_length, _, fragment, _, protocol, _, source, destination = struct.unpack_from("!HHHBBH4s4s", frame, ip + 2)
    if protocol != PROTOCOL_UDP:
        raise Untouched("other")
    if fragment & 0x1FFF:  # an offset: only the first fragment has the ports
        raise Untouched("other")

    header_len = header_words * 4
    if available < header_len + UDP_LEN:
        raise Untouched("truncated")
    source_port, destination_port, udp_length = struct.unpack_from("!HHH", frame, ip + header_len)
    if destination_port not in ports:
        raise Untouched("other")
    source_address = str(ipaddress.IPv4Address(source))
    if not _is_source(source_address, sources):
        raise Untouched("foreign_source", source_address)
    if targets and str(ipaddress.IPv4Address(destination)) not in targets:
        raise Untouched("foreign_target", source_address)
    if fragment & 0x2000:  # more fragments follow; 0x4000 is don't-fragment
        raise Untouched("fragment")

    if udp_length < UDP_LEN or header_len + udp_length > total_length:
        raise Untouched("malformed")
    if available < total_length or udp_length < UDP_LEN + ERM_HEADER_LEN + ETHERNET_LEN:
        raise Untouched("truncated")

    erm = ip + header_len + UDP_LEN
    inner = erm + ERM_HEADER_LEN
    end = ip + header_len + udp_length
    return Datagram(Session(source_address, source_port), parse_vlan(frame[erm:inner]), frame[inner:end])


def _is_source(address: str, sources: tuple[str, ...]) -> bool:
    """Tell whether a sender is on the allow list; without one everybody is."""
    return not sources or any(ipaddress.IPv4Address(address) in ipaddress.IPv4Network(prefix) for prefix in sources)


def _restore_vlan(frame: bytes, vlan: Vlan, mode: str) -> bytes:
    if vlan.vlan_id == 0 or mode == "strip" or (mode == "tagged" and not vlan.is_tagged):
        return frame
    return insert_vlan_tag(frame, vlan.tci)


def _is_inner_truncated(frame: bytes) -> bool:
    """Tell whether the mirrored IP packet says it is longer than the bytes that came."""
    try:
        ethertype, ip = skip_ethernet(frame)
    except Untouched:
        return False
    available = len(frame) - ip
    if ethertype == ETHERTYPE_IPV4:
        return available < IPV4_LEN or struct.unpack_from("!H", frame, ip + 2)[0] > available
    if ethertype == ETHERTYPE_IPV6:
        return available < IPV6_LEN or IPV6_LEN + struct.unpack_from("!H", frame, ip + 4)[0] > available
    return False
