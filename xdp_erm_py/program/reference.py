"""Decapsulation in plain Python: what the XDP program is measured against.

Written from the wire formats alone, for reading rather than for speed; those of the encapsulations stand in
encapsulations.py. Every field is in network byte order. The lab takes its expected frames from here, the tests compare
the two implementations on the same frames.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import NamedTuple

from ..settings import InterfaceConfig
from .encapsulations import (
    ENCAPSULATIONS,
    ETHERTYPE_8021AD,
    ETHERTYPE_8021Q,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    MAC_PAIR_LEN,
    Encapsulation,
    Header,
    Untouched,
    insert_vlan_tag,
)

ETHERNET_LEN = 14
VLAN_TAG_LEN = 4
IPV4_LEN = 20
IPV6_LEN = 40
UDP_LEN = 8
GRE_LEN = 4

MAX_VLAN_TAGS = 2

PROTOCOL_UDP = 17
PROTOCOL_GRE = 47
TRANSPORTS = {PROTOCOL_UDP: "udp", PROTOCOL_GRE: "gre"}
# Hop-by-hop options, routing, fragment, authentication, destination options. Each has 8 bytes at least.
EXTENSIONS = (0, 43, 44, 51, 60)
DESTINATION_OPTIONS = 60
EXTENSION_LEN = 8


class Session(NamedTuple):
    """A mirror session as the capture side sees it; what `id` is says its encapsulation."""

    source: str
    id: int
    encapsulation: str = "erm"


class Outer(NamedTuple):
    """The IP header of one level of wrapping."""

    source: str
    target: str
    protocol: int
    payload: int
    """Where it begins, in the frame."""
    length: int
    """Of the payload, as the header says; it can be below 0."""
    is_ipv4: bool
    is_fragment: bool


class Level(NamedTuple):
    """One level of wrapping, taken apart."""

    session: Session
    header: Header
    inner: bytes
    """The mirrored frame."""


@dataclass(frozen=True)
class Decapsulation:
    """The verdict and the frame that goes on to the taps.

    With any verdict but `decapsulated` the frame is the one that came in, `levels` is 0 and `session` None.
    `nested_refused`: the frame that goes on is wrapped itself, deeper than configured or not from one of the sources.
    `number` is the outermost level's, where its frames are numbered.
    `foreign` is the source address where the verdict is `foreign_source` or `foreign_target`.
    """

    verdict: str
    frame: bytes
    levels: int = 0
    nested_refused: bool = False
    inner_truncated: bool = False
    session: Session | None = None
    number: int | None = None
    foreign: str | None = None


def decapsulate(frame: bytes, config: InterfaceConfig) -> Decapsulation:
    """Strip `frame`, an Ethernet frame without its FCS, of its wrapping. Never raises, whatever the bytes."""
    try:
        outermost = level = _parse(frame, config, outermost=True)
    except Untouched as reason:
        return Decapsulation(str(reason), frame, foreign=reason.foreign)
    levels, nested_refused = 1, False
    while not nested_refused:
        try:
            within = _parse(level.inner, config, outermost=False)
        except Untouched:
            break
        # Whoever is mirrored can send it, too. Where a level within was sent to is another sensor's business.
        if levels < config.depth and _is_source(within.session.source, config.sources):
            level = within
            levels += 1
        else:
            nested_refused = True
    return Decapsulation(
        "decapsulated",
        _restore_vlan(level.inner, level.header, config.vlan),
        levels,
        nested_refused,
        level.header.is_cut or _is_inner_truncated(level.inner),
        outermost.session,
        outermost.header.number,
    )


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


def address_of(packed: bytes) -> str:
    """The text of an address of 4 or 16 bytes; an IPv4 address within IPv6 (::ffff:0:0/96) as IPv4."""
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _parse(frame: bytes, config: InterfaceConfig, outermost: bool) -> Level:
    """Take one level apart, or raise Untouched with the verdict."""
    wanted = [ENCAPSULATIONS[name] for name in config.encapsulations]
    is_only_erm = config.encapsulations == ("erm",)
    ethertype, offset = skip_ethernet(frame)
    carriers = [protocol for protocol, transport in TRANSPORTS.items()
                if transport in {each.transport for each in wanted}]
    if ethertype == ETHERTYPE_IPV4:
        outer = _parse_ipv4(frame, offset, carriers)
    elif ethertype == ETHERTYPE_IPV6 and not is_only_erm:
        outer = _parse_ipv6(frame, offset, carriers)
    else:
        raise Untouched("other")

    available = len(frame) - outer.payload
    transport_len = UDP_LEN if outer.protocol == PROTOCOL_UDP else GRE_LEN
    if available < transport_len:
        raise Untouched("truncated")
    encapsulation = _carried(frame, outer, config, wanted)

    if outermost and not _is_source(outer.source, config.sources):
        raise Untouched("foreign_source", outer.source)
    if outermost and config.targets and outer.target not in config.targets:
        raise Untouched("foreign_target", outer.source)
    if outer.is_fragment:
        raise Untouched("fragment")

    source_port, _, length = struct.unpack_from("!HHH", frame.ljust(outer.payload + 6), outer.payload)
    if outer.protocol == PROTOCOL_GRE:
        length = outer.length
    if length < transport_len or length > outer.length:
        raise Untouched("malformed")
    if outer.length > available:
        raise Untouched("truncated")
    # The datagram ends here, whatever follows.
    content = frame[outer.payload:outer.payload + length]
    if outer.protocol == PROTOCOL_UDP:
        content = content[UDP_LEN:]
    header = encapsulation.unwrap(content)
    inner = content[header.length:]
    if len(inner) < (1 if header.ethertype else ETHERNET_LEN):
        raise Untouched("truncated")
    if header.ethertype:
        inner = frame[:MAC_PAIR_LEN] + struct.pack("!H", header.ethertype) + inner
    session = source_port if header.session is None else header.session
    return Level(Session(outer.source, session, encapsulation.name), header, inner)


def _parse_ipv4(frame: bytes, ip: int, carriers: list[int]) -> Outer:
    if len(frame) - ip < IPV4_LEN:
        raise Untouched("truncated")
    version, header_words = frame[ip] >> 4, frame[ip] & 0xF
    if version != 4 or header_words < 5:
        raise Untouched("malformed")
    total_length, _, fragment, _, protocol, _, source, target = struct.unpack_from("!HHHBBH4s4s", frame, ip + 2)
    if protocol not in carriers:
        raise Untouched("other")
    if fragment & 0x1FFF:  # an offset: only the first fragment has the ports
        raise Untouched("other")
    return Outer(address_of(source), address_of(target), protocol, ip + header_words * 4,
                 total_length - header_words * 4, True, bool(fragment & 0x2000))  # more follow; 0x4000: don't fragment


def _parse_ipv6(frame: bytes, ip: int, carriers: list[int]) -> Outer:
    if len(frame) - ip < IPV6_LEN:
        raise Untouched("truncated")
    if frame[ip] >> 4 != 6:
        raise Untouched("malformed")
    length, protocol, _, source, target = struct.unpack_from("!HBB16s16s", frame, ip + 4)
    payload = ip + IPV6_LEN
    if protocol in EXTENSIONS:
        if len(frame) - payload < EXTENSION_LEN:
            raise Untouched("truncated")
        following, more = frame[payload], frame[payload + 1]
        # As Linux's tunnels send by default, for the encapsulation limit (RFC 2473).
        is_limit = protocol == DESTINATION_OPTIONS and more == 0
        if following in EXTENSIONS or (following in carriers and not is_limit):
            raise Untouched("extension")
        protocol, payload, length = following, payload + EXTENSION_LEN, length - EXTENSION_LEN
    if protocol not in carriers:
        raise Untouched("other")
    return Outer(address_of(source), address_of(target), protocol, payload, length, False, False)


def _carried(frame: bytes, outer: Outer, config: InterfaceConfig, wanted: list[Encapsulation]) -> Encapsulation:
    """What a UDP destination port or a GRE type carries."""
    (number,) = struct.unpack_from("!H", frame, outer.payload + 2)
    for each in wanted:
        numbers = getattr(config, each.setting) if each.setting else each.types
        if TRANSPORTS[outer.protocol] == each.transport and number in numbers and (outer.is_ipv4 or each.ipv6):
            return each
    raise Untouched("other")


def _is_source(address: str, sources: tuple[str, ...]) -> bool:
    """Tell whether a sender is on the allow list; without one everybody is."""
    return not sources or any(ipaddress.ip_address(address) in ipaddress.ip_network(prefix) for prefix in sources)


def _restore_vlan(frame: bytes, header: Header, mode: str) -> bytes:
    vlan = header.vlan
    if vlan is None or vlan.vlan_id == 0 or mode == "strip" or (mode == "tagged" and not vlan.is_tagged):
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
