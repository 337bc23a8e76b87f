"""The encapsulations in which mirrored frames come: one record each, and their headers in plain Python.

Written from the formats alone, for reading rather than for speed; bpf/encapsulations/ is measured against it. Every
field is in network byte order. Formats: HP ERM as measured on ArubaOS-Switch; draft-foschiano-erspan-03; RFC 2784 and
2890 (GRE); RFC 7348 (VXLAN); RFC 8926 (GENEVE); TZSP as MikroTik sends it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .. import shared
from ..settings import DEFAULTS, IPV4_ONLY, PORTS

MAC_PAIR_LEN = 12
# Bytes of an IPv6 header, above those of an IPv4 header; Linux's tunnels put an encapsulation limit before GRE.
_IPV6_MORE = {"udp": 20, "gre": 28}
ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD
ETHERTYPE_8021Q = 0x8100
ETHERTYPE_8021AD = 0x88A8
ETHERTYPE_BRIDGING = 0x6558
ETHERTYPE_ERSPAN, ETHERTYPE_ERSPAN_III = 0x88BE, 0x22EB

GRE_CHECKSUM, GRE_ROUTING, GRE_KEY, GRE_SEQUENCE, GRE_VERSION = 0x8000, 0x4000, 0x2000, 0x1000, 0x0007

# The ERM header's raw priority is not the 802.1p priority. RCDCap's mapping; 2 -> 0 is also what real captures show.
PCP_OF_RAW_PRIORITY = (1, 2, 0, 3, 4, 5, 6, 7)


class Untouched(Exception):
    """The frame is not one that is peeled; the message is the verdict that says why."""

    def __init__(self, verdict: str, foreign: str | None = None) -> None:
        super().__init__(verdict)
        self.foreign = foreign


class Vlan(NamedTuple):
    """What a header keeps of the mirrored frame's 802.1Q tag; `tci` has the 802.1p priority."""

    tci: int
    is_tagged: bool
    """Whether it says that the frame was tagged."""

    @property
    def vlan_id(self) -> int:
        return self.tci & 0xFFF


class Header(NamedTuple):
    """What stands before the mirrored frame."""

    length: int
    """Bytes up to the frame."""
    session: int | None = None
    """None: it is the UDP source port."""
    vlan: Vlan | None = None
    """Of a frame that has no tag any more."""
    is_cut: bool = False
    """Whether it says that the frame is not whole."""
    ethertype: int | None = None
    """Of a packet that comes without an Ethernet header."""
    number: int | None = None
    """Of the frame in its session."""


class Encapsulation(NamedTuple):
    """One of them."""

    name: str
    """As it is configured, and in bpf/shared.h."""
    transport: str
    """udp or gre."""
    types: tuple[int, ...]
    """GRE types."""
    overhead: int
    """Most bytes of a frame beyond the 1514 of a full mirrored one: the outer Ethernet header, IPv4 without options and
    all that follows, and the mirrored frame's tag where it stays in the frame."""
    session: str
    """What tells the sessions of one sender apart."""
    zeek: str
    """How Zeek reads it where XDP has not taken it off."""
    unwrap: Callable[[bytes], Header]
    """Reads what is behind the UDP header, or the GRE header and what is behind it. Raises Untouched."""
    wrap: Callable[[bytes, int, int, bool, int], bytes]
    """The inverse: frame without its tag, session, tag control information (0: none), whether it was tagged, and the
    frame's number."""

    @property
    def setting(self) -> str | None:
        """What its UDP destination ports are called in the configuration."""
        return PORTS.get(self.name)

    @property
    def ports(self) -> tuple[int, ...]:
        """Those by default."""
        return tuple(DEFAULTS[self.setting]) if self.setting else ()

    @property
    def ipv6(self) -> bool:
        """Whether it can come in IPv6 as well."""
        return self.name not in IPV4_ONLY


def take(data: bytes, length: int) -> bytes:
    """The first bytes. Raises Untouched: there are not so many."""
    if len(data) < length:
        raise Untouched("truncated")
    return data[:length]


def insert_vlan_tag(frame: bytes, tci: int) -> bytes:
    """Put an 802.1Q tag between the MAC addresses and the EtherType."""
    return frame[:MAC_PAIR_LEN] + struct.pack("!HH", ETHERTYPE_8021Q, tci) + frame[MAC_PAIR_LEN:]


def _tagged(frame: bytes, tci: int) -> bytes:
    return insert_vlan_tag(frame, tci) if tci & 0xFFF else frame


def parse_vlan(erm_header: bytes) -> Vlan:
    """Read the VLAN out of the ERM header's third word: priority 23-21, CFI 20, VLAN id 19-8, is_tagged 7."""
    (word,) = struct.unpack_from("!I", erm_header, 8)
    pcp = PCP_OF_RAW_PRIORITY[word >> 21 & 7]
    return Vlan(pcp << 13 | (word >> 8 & 0x1FFF), bool(word & 0x80))


def _unwrap_erm(payload: bytes) -> Header:
    return Header(12, None, parse_vlan(take(payload, 12)))


def _wrap_erm(frame: bytes, session: int, tci: int, is_tagged: bool, number: int) -> bytes:
    raw_priority = PCP_OF_RAW_PRIORITY.index(tci >> 13)
    return struct.pack("!8xI", raw_priority << 21 | (tci & 0x1FFF) << 8 | is_tagged << 7) + frame


def _unwrap_gre(packet: bytes) -> Header:
    flags, ethertype = struct.unpack("!HH", take(packet, 4))
    if flags & (GRE_ROUTING | GRE_VERSION):
        raise Untouched("malformed")
    length, key, number = 4, 0, None
    for flag in (GRE_CHECKSUM, GRE_KEY, GRE_SEQUENCE):
        if flags & flag:
            field = int.from_bytes(take(packet, length + 4)[length:], "big")
            length += 4
            key, number = (field if flag == GRE_KEY else key), (field if flag == GRE_SEQUENCE else number)
    return Header(length, key, ethertype=ethertype if ethertype in (ETHERTYPE_IPV4, ETHERTYPE_IPV6) else None,
                  number=number)


def _wrap_gre(frame: bytes, session: int, tci: int, is_tagged: bool, number: int) -> bytes:
    return struct.pack("!HHI", GRE_KEY, ETHERTYPE_BRIDGING, session) + _tagged(frame, tci)


def _unwrap_erspan(packet: bytes) -> Header:
    (ethertype,) = struct.unpack_from("!H", packet, 2)
    gre = _unwrap_gre(packet)
    if ethertype == ETHERTYPE_ERSPAN and gre.number is None:  # type I
        return Header(gre.length, 0)
    is_third = ethertype == ETHERTYPE_ERSPAN_III
    length = gre.length + (12 if is_third else 8)
    (word,) = struct.unpack_from("!I", take(packet, length), gre.length)
    if word >> 28 != (2 if is_third else 1):
        raise Untouched("malformed")
    vlan = Vlan((word >> 13 & 7) << 13 | word >> 16 & 0xFFF, True)  # III does not say whether the frame was tagged
    without_ethernet = None
    if is_third:
        (flags,) = struct.unpack_from("!H", packet, length - 2)
        if flags & 1:  # a subheader
            length += 8
            take(packet, length)
        frame_type = flags >> 10 & 0x1F
        if frame_type == 2:  # IP
            version = take(packet, length + 1)[length] >> 4
            without_ethernet = {4: ETHERTYPE_IPV4, 6: ETHERTYPE_IPV6}.get(version)
        if frame_type not in (0, 2) or (frame_type == 2 and without_ethernet is None):
            raise Untouched("malformed")
    tag_is_left = struct.pack("!H", ETHERTYPE_8021Q), struct.pack("!H", ETHERTYPE_8021AD)
    frame = packet[length:]
    has_tag = len(frame) >= 14 and frame[12:14] in tag_is_left
    if not is_third:
        how = word >> 11 & 3  # 0: no tag, 1: ISL, 2: 802.1Q, 3: the tag is still in the frame
        vlan = vlan._replace(is_tagged=how != 0)
        has_tag = has_tag or how == 3
    return Header(length, word & 0x3FF, None if has_tag or without_ethernet else vlan, bool(word & 0x400),
                  without_ethernet, gre.number)


def _wrap_erspan(frame: bytes, session: int, tci: int, is_tagged: bool, number: int) -> bytes:
    """As type II."""
    word = 1 << 28 | (tci & 0xFFF) << 16 | tci >> 13 << 13 | (2 if is_tagged else 0) << 11 | session & 0x3FF
    return struct.pack("!HHIII", GRE_SEQUENCE, ETHERTYPE_ERSPAN, number & 0xFFFFFFFF, word, 0) + frame


def _unwrap_vxlan(payload: bytes) -> Header:
    flags, vni = struct.unpack("!II", take(payload, 8))
    if not flags & 0x08000000:
        raise Untouched("malformed")
    if flags & 0x04000000 and flags & 0xFF != 3:  # VXLAN-GPE, and not of Ethernet
        raise Untouched("other")
    return Header(8, vni >> 8)


def _wrap_vxlan(frame: bytes, session: int, tci: int, is_tagged: bool, number: int) -> bytes:
    return struct.pack("!II", 0x08000000, session << 8) + _tagged(frame, tci)


def _unwrap_geneve(payload: bytes) -> Header:
    version_length, flags, ethertype, vni = struct.unpack("!BBHI", take(payload, 8))
    if version_length >> 6:
        raise Untouched("malformed")
    is_control = flags & 0x80
    if is_control or ethertype not in (ETHERTYPE_BRIDGING, ETHERTYPE_IPV4, ETHERTYPE_IPV6):
        raise Untouched("other")
    return Header(8 + (version_length & 0x3F) * 4, vni >> 8,
                  ethertype=None if ethertype == ETHERTYPE_BRIDGING else ethertype)


def _wrap_geneve(frame: bytes, session: int, tci: int, is_tagged: bool, number: int) -> bytes:
    return struct.pack("!BBHI", 0, 0, ETHERTYPE_BRIDGING, session << 8) + _tagged(frame, tci)


def _unwrap_tzsp(payload: bytes) -> Header:
    version, kind, encapsulation = struct.unpack("!BBH", take(payload, 4))
    if version != 1:
        raise Untouched("malformed")
    if kind not in (0, 1) or encapsulation != 1:  # neither a received packet nor one to be sent, or not Ethernet
        raise Untouched("other")
    length = 4
    for _ in range(shared.MAX_TZSP_FIELDS):
        field = take(payload, length + 1)[length]
        length += 1
        if field == 1:  # the end
            return Header(length)
        if field != 0:  # padding has no length
            length += 1 + take(payload, length + 1)[length]
    raise Untouched("malformed")


def _wrap_tzsp(frame: bytes, session: int, tci: int, is_tagged: bool, number: int) -> bytes:
    return struct.pack("!BBHB", 1, 0, 1, 1) + _tagged(frame, tci)


#: All of them, by name; in the order of enum encapsulation in bpf/shared.h.
ENCAPSULATIONS = {each.name: each for each in (
    Encapsulation("erm", "udp", (), 54, "UDP source port",
                  "scripts/fallback.zeek", _unwrap_erm, _wrap_erm),
    Encapsulation("erspan", "gre", (ETHERTYPE_ERSPAN, ETHERTYPE_ERSPAN_III), 66, "ERSPAN session id",
                  "its GRE analyzer", _unwrap_erspan, _wrap_erspan),
    Encapsulation("gre", "gre", (ETHERTYPE_BRIDGING, ETHERTYPE_IPV4, ETHERTYPE_IPV6), 54, "GRE key",
                  "its GRE analyzer", _unwrap_gre, _wrap_gre),
    Encapsulation("vxlan", "udp", (), 54, "VNI",
                  "its VXLAN analyzer", _unwrap_vxlan, _wrap_vxlan),
    Encapsulation("geneve", "udp", (), 306, "VNI",
                  "its GENEVE analyzer", _unwrap_geneve, _wrap_geneve),
    Encapsulation("tzsp", "udp", (), 51, "UDP source port",
                  "not at all", _unwrap_tzsp, _wrap_tzsp),
)}


def least_mtu(names: Iterable[str], addresses: Iterable[str]) -> int:
    """The MTU that a full-size mirrored frame needs in any of these encapsulations, between these addresses."""
    found = [ENCAPSULATIONS[name] for name in names]
    is_ipv6 = any(":" in address for address in addresses)
    return 1500 + max(each.overhead + (_IPV6_MORE[each.transport] if each.ipv6 and is_ipv6 else 0) for each in found)
