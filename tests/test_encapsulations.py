"""Every encapsulation in each of its variants: what the program and the reference make of it, written out by hand.

HP ERM's own are in test_program.py. Headers are hexadecimal text, as the formats' documents draw them.
"""

from __future__ import annotations

import dataclasses
import operator
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
from frames import ELSEWHERE, ERM, ETHER, INNER, MACS, PING, SENSOR, SWITCH, ip, udp
from program import Counted, Program
from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Raw
from scapy.utils import rdpcap

from xdp_erm_py import shared
from xdp_erm_py.interface import loader, stats
from xdp_erm_py.interface.stats import Order
from xdp_erm_py.kernel import bpf
from xdp_erm_py.lab import mirror
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, Cable
from xdp_erm_py.lab.fanout import FanoutWorkers
from xdp_erm_py.lab.traffic import synthetic
from xdp_erm_py.program import compiler
from xdp_erm_py.program.compiler import PLAIN, Variant
from xdp_erm_py.program.encapsulations import ENCAPSULATIONS, least_mtu
from xdp_erm_py.program.reference import Decapsulation, Session, decapsulate
from xdp_erm_py.settings import InterfaceConfig

CAPTURES = Path(__file__).resolve().parents[2] / "shared" / "captures"

ALL = InterfaceConfig(encapsulations=shared.ENCAPSULATIONS)
STRIP = dataclasses.replace(ALL, vlan="strip")
DEEP = dataclasses.replace(STRIP, depth=3, sources=(f"{SWITCH}/32", "2001:db8::1/128"))

TAGGED = MACS / Dot1Q(vlan=7, prio=3) / PING


def text(*words: str) -> bytes:
    return bytes.fromhex("".join(words))


def gre(header: str, inner: object, **fields: object) -> bytes:
    return bytes(ETHER / ip(proto=47, **fields) / Raw(text(header) + bytes(inner)))


def over_udp(port: int, header: str, inner: object, **fields: object) -> bytes:
    return bytes(ETHER / ip() / udp(dport=port, **fields) / Raw(text(header) + bytes(inner)))


def over_ipv6(payload: bytes, protocol: int = 47) -> bytes:
    return bytes(ETHER / IPv6(src="2001:db8::1", dst="2001:db8::9", nh=protocol) / Raw(payload))


def check(program, config, sent, verdict="decapsulated", left=None, notes=(), session=None):
    """One packet in: one verdict, these bytes out (else untouched), no other counter moves; the reference agrees."""
    sent = bytes(sent)
    expected = decapsulate(sent, config)
    counted = Counted(1, len(sent))
    outcome = program(config).run(sent)
    assert outcome.counters == dict.fromkeys((verdict, *notes), counted)
    assert outcome.frame == (sent if left is None else bytes(left))
    assert (expected.verdict, expected.frame) == (verdict, outcome.frame)
    if session is not None:
        assert outcome.sessions == {session: counted}
        assert expected.session == session


# Formats and their variants

ERSPAN_II = "1000 88be 00000007 {word} 00000000"
ERSPAN_III = "1000 22eb 00000007 {word} 01020304 0000 {flags}"

#: A frame, what is left of it, and the id of its session. VLAN 10 is in the headers that have one.
VARIANTS = {
    "ERSPAN I": ("erspan", gre("0000 88be", TAGGED), TAGGED, 0),
    "ERSPAN I with key and checksum": ("erspan", gre("a000 88be 00000000 00000009", INNER), INNER, 0),
    "ERSPAN II": ("erspan", gre(ERSPAN_II.format(word="100a 1064"), INNER), MACS / Dot1Q(vlan=10) / PING, 100),
    "ERSPAN II, priority": ("erspan", gre(ERSPAN_II.format(word="100a f3ff"), INNER),
                            MACS / Dot1Q(vlan=10, prio=7) / PING, 1023),
    "ERSPAN II with key": ("erspan", gre("3000 88be 00000009 00000007 100a1064 00000000", INNER),
                           MACS / Dot1Q(vlan=10) / PING, 100),
    "ERSPAN II, VLAN 0": ("erspan", gre(ERSPAN_II.format(word="1000 0001"), INNER), INNER, 1),
    "ERSPAN II, the tag left": ("erspan", gre(ERSPAN_II.format(word="100a 1864"), TAGGED), TAGGED, 100),
    "ERSPAN III": ("erspan", gre(ERSPAN_III.format(word="200a 0064", flags="0000"), INNER),
                   MACS / Dot1Q(vlan=10) / PING, 100),
    "ERSPAN III without a number": ("erspan", gre("0000 22eb 200a0064 01020304 0000 8030", INNER),
                                    MACS / Dot1Q(vlan=10) / PING, 100),
    "ERSPAN III with subheader": ("erspan", gre(ERSPAN_III.format(word="200a 0064", flags="0007") + "0102030405060708",
                                                INNER), MACS / Dot1Q(vlan=10) / PING, 100),
    "ERSPAN III, the tag as well": ("erspan", gre(ERSPAN_III.format(word="2007 0064", flags="0000"), TAGGED), TAGGED,
                                    100),
    "ERSPAN III, a service tag": ("erspan", gre(ERSPAN_III.format(word="2007 0064", flags="0000"),
                                                MACS / Dot1AD(vlan=7) / PING), MACS / Dot1AD(vlan=7) / PING, 100),
    "ERSPAN III, IP": ("erspan", gre(ERSPAN_III.format(word="200a 0064", flags="0800"), PING), ETHER / PING, 100),
    "GRE": ("gre", gre("0000 6558", TAGGED), TAGGED, 0),
    "GRE with key": ("gre", gre("2000 6558 ffff0001", TAGGED), TAGGED, 0xFFFF0001),
    "GRE, IPv4": ("gre", gre("0000 0800", PING), ETHER / PING, 0),
    "GRE, IPv6": ("gre", gre("0000 86dd", IPv6() / UDP() / b"x"), ETHER / IPv6() / UDP() / b"x", 0),
    "VXLAN": ("vxlan", over_udp(4789, "08000000 00007b00", TAGGED), TAGGED, 123),
    "VXLAN, Ethernet by its number": ("vxlan", over_udp(4789, "0c000003 00007b00", TAGGED), TAGGED, 123),
    "VXLAN, other flags": ("vxlan", over_udp(4789, "88000123 ffffffff", INNER), INNER, 0xFFFFFF),
    "GENEVE": ("geneve", over_udp(6081, "0000 6558 00000a00", TAGGED), TAGGED, 10),
    "GENEVE, critical options": ("geneve", over_udp(6081, "0240 6558 00000a00 0102030405060708", INNER), INNER, 10),
    "GENEVE, IPv4": ("geneve", over_udp(6081, "0000 0800 00000a00", PING), ETHER / PING, 10),
    "GENEVE, IPv6": ("geneve", over_udp(6081, "0000 86dd 00000a00", IPv6() / UDP()), ETHER / IPv6() / UDP(), 10),
    "TZSP": ("tzsp", over_udp(37008, "0100 0001 01", TAGGED), TAGGED, 5),
    "TZSP, to be sent": ("tzsp", over_udp(37008, "0101 0001 01", TAGGED), TAGGED, 5),
    "TZSP with fields": ("tzsp", over_udp(37008, "0100 0001 00 0a 01 07 01", INNER), INNER, 5),
}
each_variant = pytest.mark.parametrize("kind, sent, left, session", VARIANTS.values(), ids=VARIANTS)


@each_variant
def test_what_is_left(program, kind, sent, left, session):
    source = Session(SWITCH, session, kind)
    check(program, ALL, sent, left=left, session=source)
    check(program, dataclasses.replace(ALL, encapsulations=(kind,)), sent, left=left, session=source)
    check(program, ALL, sent + b"padding", left=left, session=source)
    # What is not configured is another's.
    others = tuple(name for name in shared.ENCAPSULATIONS if name != kind)
    check(program, dataclasses.replace(ALL, encapsulations=others), sent, "other")


@each_variant
def test_every_cut(program, kind, sent, left, session):
    for length in range(14, len(sent)):
        check(program, ALL, sent[:length], "truncated")


@each_variant
def test_every_length_of_a_datagram(program, kind, sent, left, session):
    """Cut by its own lengths: what follows behind must not be taken for the rest, nor make it whole."""
    is_udp = sent[23] == 17
    for length in range(8 if is_udp else 4, len(sent) - 34):
        cut = bytearray(sent[:34 + length])
        cut[16:18] = struct.pack("!H", 20 + length)
        if is_udp:
            cut[38:40] = struct.pack("!H", length)
        expected = decapsulate(bytes(cut), ALL)
        # Whole is its Ethernet header at least, or a byte of a packet that has none.
        assert expected.verdict == ("decapsulated" if len(sent) - 34 - length <= len(bytes(left)) - 14 and
                                    expected.verdict == "decapsulated" else "truncated")
        for behind in (b"", sent[34 + length:]):
            outcome = program(ALL).run(bytes(cut) + behind)
            assert (expected.verdict in outcome.counters, outcome.frame) == (
                True, expected.frame if expected.verdict == "decapsulated" else bytes(cut) + behind)


@each_variant
def test_ipv6_around(program, kind, sent, left, session):
    carried, protocol = sent[34:], sent[23]
    around = over_ipv6(carried, protocol)
    if kind == "tzsp":
        check(program, ALL, around, "other")
        return
    check(program, ALL, around, left=left, session=Session("2001:db8::1", session, kind))
    limit = text("0401 0401 0100")  # the encapsulation limit, and padding
    with_limit = over_ipv6(bytes([protocol, 0]) + limit + carried, 60)
    check(program, ALL, with_limit, left=left, session=Session("2001:db8::1", session, kind))
    for extension in (0, 43, 44, 51, 60):
        if extension != 60:
            check(program, ALL, over_ipv6(bytes([protocol, 0]) + limit + carried, extension), "extension")
        check(program, ALL, over_ipv6(bytes([protocol, 1]) + limit + bytes(8) + carried, extension), "extension")
        check(program, ALL, over_ipv6(bytes([extension, 0]) + limit + carried, extension), "extension")
        check(program, ALL, over_ipv6(bytes([58, 0]) + limit + carried, extension), "other")
    for sent in (around, with_limit):
        for length in range(14, len(sent)):
            check(program, ALL, sent[:length], "truncated")


@pytest.mark.parametrize("length", range(20))
def test_a_payload_length_within_the_encapsulation_limit_or_udp(program, length):
    sent = bytearray(over_ipv6(text("1100 0401 0401 0100") + over_udp(4789, "08000000 00000100", INNER)[34:], 60))
    sent[18:20] = struct.pack("!H", length)
    check(program, ALL, sent, "malformed")


def test_levels_within_come_with_an_encapsulation_limit_too(program):
    within = over_ipv6(text("2f00 0401 0401 0100 0000 6558") + bytes(INNER), 60)
    check(program, DEEP, over_udp(4789, "08000000 00000100", within), left=INNER, notes=["nested"])
    check(program, STRIP, over_udp(4789, "08000000 00000100", within), left=within, notes=["nested_refused"])


@pytest.mark.parametrize("sent, verdict", {
    "ERM in IPv6": (ETHER / IPv6() / udp() / ERM() / INNER, "other"),
    "hop-by-hop options of others": (ETHER / IPv6() / IPv6ExtHdrHopByHop() / ICMPv6EchoRequest(), "other"),
    "a fragment": (ETHER / IPv6() / IPv6ExtHdrFragment(m=1) / UDP(dport=4789), "extension"),
    "IPv4's version in IPv6": (ETHER / IPv6(version=4) / UDP(dport=4789), "malformed"),
    "a payload length of 0": (ETHER / IPv6(plen=0) / UDP(dport=4789) / Raw(text("08000000 00000100")) / INNER,
                              "malformed"),
    "GRE of others": (gre("0000 880b", INNER), "other"),
    "GRE with routing": (gre("4000 6558", INNER), "malformed"),
    "GRE version 1": (gre("0001 88be", INNER), "malformed"),
    "GRE version 7": (gre("0007 0800", PING), "malformed"),
    "a first fragment": (gre("0000 6558", INNER, flags="MF"), "fragment"),
    "a later fragment": (gre("0000 6558", INNER, frag=1), "other"),
    "ERSPAN II, version 0": (gre(ERSPAN_II.format(word="000a 1064"), INNER), "malformed"),
    "ERSPAN III, version 1": (gre(ERSPAN_III.format(word="100a 0064", flags="0000"), INNER), "malformed"),
    "ERSPAN III, a frame of type 1": (gre(ERSPAN_III.format(word="200a 0064", flags="0400"), INNER), "malformed"),
    "ERSPAN III, IP of version 0": (gre(ERSPAN_III.format(word="200a 0064", flags="0800"), b"\0" + bytes(PING)[1:]),
                                    "malformed"),
    "VXLAN without a VNI": (over_udp(4789, "00000000 00007b00", INNER), "malformed"),
    "VXLAN, IPv4 by its number": (over_udp(4789, "0c000001 00007b00", PING), "other"),
    "VXLAN, NSH by its number": (over_udp(4789, "8c000004 00007b00", INNER), "other"),
    "GENEVE, version 1": (over_udp(6081, "4000 6558 00000a00", INNER), "malformed"),
    "GENEVE, control": (over_udp(6081, "0080 6558 00000a00", INNER), "other"),
    "GENEVE of others": (over_udp(6081, "0000 8847 00000a00", INNER), "other"),
    "TZSP, version 2": (over_udp(37008, "0200 0001 01", INNER), "malformed"),
    "TZSP keepalive": (over_udp(37008, "0104 0000 01", b""), "other"),
    "TZSP, configuration": (over_udp(37008, "0103 0001 01", INNER), "other"),
    "TZSP, a reserved type": (over_udp(37008, "0102 0001 01", INNER), "other"),
    "TZSP of 802.11": (over_udp(37008, "0100 0012 01", INNER), "other"),
    "TZSP, fields without an end": (over_udp(37008, "0100 0001", b"\0" * 200), "malformed"),
    "TZSP, a field beyond the end": (over_udp(37008, "0100 0001 0a ff", bytes(100)), "truncated"),
}.values())
def test_left_alone(program, sent, verdict):
    check(program, ALL, sent, verdict)


@pytest.mark.parametrize("flags", range(8))
def test_optional_fields_of_gre(program, flags):
    checksum, key, sequence = flags & 4, flags & 2, flags & 1
    fields = "00000000" * bool(checksum) + "00abcdef" * bool(key) + "00000003" * bool(sequence)
    header = f"{bool(checksum) << 15 | bool(key) << 13 | bool(sequence) << 12:04x}"
    check(program, ALL, gre(f"{header} 6558 {fields}", INNER), left=INNER,
          session=Session(SWITCH, 0xABCDEF if key else 0, "gre"))


def test_options_of_geneve(program):
    for words in range(64):
        sent = over_udp(6081, f"{words:02x}00 6558 00000100" + "01020304" * words, INNER)
        check(program, ALL, sent, left=INNER)
        if words:
            check(program, ALL, sent[:-len(INNER) - 1], "truncated")


def test_fields_of_tzsp(program):
    for length in (0, 1, 254, 255):
        check(program, ALL, over_udp(37008, f"0100 0001 0a {length:02x}" + "00" * length + "01", INNER), left=INNER)
    most = shared.MAX_TZSP_FIELDS
    check(program, ALL, over_udp(37008, "0100 0001" + "00" * (most - 1) + "01", INNER), left=INNER)
    check(program, ALL, over_udp(37008, "0100 0001" + "00" * most + "01", INNER), "malformed")


@pytest.mark.parametrize("mode", shared.VLAN_MODES)
@pytest.mark.parametrize("how", range(4))
@pytest.mark.parametrize("vlan", [0, 1, 4095])
def test_the_tag_of_erspan_ii(program, mode, how, vlan):
    """How the frame was tagged: 0 not, 1 ISL, 2 802.1Q, 3 it still is."""
    sent = gre(ERSPAN_II.format(word=f"{1 << 28 | vlan << 16 | 5 << 13 | how << 11 | 1:08x}"), INNER)
    inserted = vlan and how != 3 and (mode == "restore" or (mode == "tagged" and how))
    left = MACS / Dot1Q(vlan=vlan, prio=5) / PING if inserted else INNER
    check(program, dataclasses.replace(ALL, vlan=mode), sent, left=left)


def test_a_frame_that_the_switch_has_cut(program):
    arp = bytes(MACS / ARP(psrc="10.0.0.1"))[:30]
    check(program, STRIP, gre(ERSPAN_II.format(word="1000 0401"), arp), left=arp, notes=["inner_truncated"])
    check(program, STRIP, gre(ERSPAN_III.format(word="2000 0401", flags="0000"), arp), left=arp,
          notes=["inner_truncated"])
    packet = bytes(PING)[:-1]
    check(program, ALL, gre("0000 0800", packet), left=bytes(ETHER / PING)[:-1], notes=["inner_truncated"])


# Trust, sessions, numbers

AROUND = {"vxlan": (4789, "08000000 00000500"), "geneve": (6081, "0000 6558 00000500"), "erm": (7932, "00" * 12),
          "tzsp": (37008, "0100 0001 01")}


@pytest.mark.parametrize("around", AROUND)
@each_variant
def test_levels_of_different_kinds(program, around, kind, sent, left, session):
    """ERSPAN within VXLAN and the like: peeled from allowed sources, else left, as ERM within ERM."""
    outermost = Session(SWITCH, 5, around)
    both = over_udp(*AROUND[around], sent)
    check(program, STRIP, both, left=sent, notes=["nested_refused"], session=outermost)
    stripped = decapsulate(sent, STRIP).frame
    check(program, DEEP, both, left=stripped, notes=["nested"], session=outermost)
    foreign = sent[:26] + bytes([10, 9, 9, 9]) + sent[30:]
    check(program, DEEP, over_udp(*AROUND[around], foreign), left=foreign, notes=["nested_refused"], session=outermost)


def test_a_packet_within_a_packet(program):
    """Neither level within has an Ethernet header: the addresses are the outermost one's."""
    within = bytes(ip(proto=47) / Raw(text("0000 0800") + bytes(PING)))
    check(program, DEEP, gre("0000 0800", within), left=ETHER / PING, notes=["nested"])
    check(program, STRIP, gre("0000 0800", within), left=bytes(ETHER)[:12] + b"\x08\x00" + within,
          notes=["nested_refused"])


@pytest.mark.parametrize("elsewhere", [(), tuple(f"10.77.{number}.77" for number in range(9))], ids=["short", "long"])
@pytest.mark.parametrize("sources, targets, verdict", [
    (("2001:db8::/32",), (), "decapsulated"),
    (("2001:db8::1/128",), ("2001:db8::9",), "decapsulated"),
    (("2001:db8::/127", "10.0.0.0/8"), (), "decapsulated"),
    (("::/0",), (), "decapsulated"),
    (("2001:db8::2/127",), (), "foreign_source"),
    (("2001:db9::/32",), (), "foreign_source"),
    (("0.0.0.0/0",), (), "foreign_source"),
    (("2001:db8::/32",), ("2001:db8::8", SENSOR), "foreign_target"),
])
def test_ipv6_allow_lists(program, sources, targets, verdict, elsewhere):
    config = dataclasses.replace(STRIP, sources=sources + elsewhere, targets=targets + (elsewhere if targets else ()))
    sent = over_ipv6(text("0000 6558") + bytes(INNER))
    outcome = program(config).run(sent)
    assert outcome.counters == {verdict: Counted(1, len(sent))}
    assert outcome.senders == ({"2001:db8::1": Counted(1, len(sent))} if verdict.startswith("foreign") else {})
    assert decapsulate(sent, config).verdict == verdict
    # IPv4 is not within them but where it stands there itself.
    check(program, config, gre("0000 6558", INNER, src="10.9.9.9"),
          *("decapsulated", INNER) if {"10.0.0.0/8", "0.0.0.0/0"} & {*sources} else ("foreign_source",))


def test_the_source_port_is_no_session_of_vxlan_and_geneve(xdp):
    with Program(STRIP) as program:
        for port in range(100, 110):
            program.run(over_udp(4789, "08000000 00000100", INNER, sport=port))
            program.run(over_udp(6081, "0000 6558 00000200", INNER, sport=port))
        assert {session: counted.packets for session, counted in program.sessions().items()} == {
            Session(SWITCH, 1, "vxlan"): 10, Session(SWITCH, 2, "geneve"): 10}


ERSPAN_II_NUMBERED = "1000 88be {number:08x} 10001001 00000000"


@pytest.mark.parametrize("numbers, gaps, reordered", [
    ((1, 2, 3), 0, 0),
    ((7,), 0, 0),
    ((1, 2, 5, 6), 2, 0),
    ((1, 3, 2, 4), 0, 1),
    ((1, 5, 2, 3), 1, 2),
    ((0xFFFFFFFE, 0xFFFFFFFF, 0, 1), 0, 0),
    ((0xFFFFFFFE, 1), 2, 0),
    ((0, 0xFFFFFFFF, 1), 0, 1),  # the first to come was late itself, which cannot be known
    ((5, 5, 5, 5), 0, 0),  # a sender that does not count
    ((100000, 1, 2, 3), 0, 0),  # began anew
    ((1, 2, 90000000, 90000001), 0, 0),
    ((1, 2, 4, 100000000, 100000002, 1, 2), 1, 0),  # nor are those missing that seem to be before it is settled
    ((1, shared.LEAP + 1), shared.LEAP - 1, 0),
    ((shared.LEAP + 1, 1), 0, 1),
], ids=str)
@pytest.mark.parametrize("header", [ERSPAN_II_NUMBERED, "1000 22eb {number:08x} 20000001 00000000 00000000",
                                    "3000 6558 00000001 {number:08x}"], ids=["ERSPAN II", "ERSPAN III", "GRE"])
def test_the_numbers_of_a_session(xdp, header, numbers, gaps, reordered):
    assert order_of(numbers, header) == Order(gaps, reordered)


@pytest.mark.parametrize("leap", [shared.LEAP + 1, 100000, shared.MOST_MISSING])
def test_a_leap_is_loss_once_it_is_settled(xdp, leap):
    run = range(1 + leap, 1 + leap + shared.LEAP)
    assert order_of([1, *run[:-1]]) == Order(0, 0)
    assert order_of([1, *run]) == Order(leap - 1, 0)
    assert order_of([1, 3, *run[2:], run[-1] + 2, run[-1] + 4]) == Order(1 + leap - 1 + 2, 0)


def test_leaps_ahead_add_up(xdp):
    """However soon so much is lost again: what is known is as old as LEAP frames at most."""
    bursts = shared.LEAP // 100 + 1
    numbers = [1, *(10000 * burst + number for burst in range(1, bursts + 2) for number in range(100))]
    assert order_of(numbers) == Order(9998 + (bursts - 1) * 9900, 0)


@pytest.mark.parametrize("starts", [(1, 500000), (500000, 1), (1, 5000, 700000, 702000), (0, 60000, 2**31, 0xFFFFFF00)],
                         ids=str)
@pytest.mark.parametrize("run", [1, 3, 200])
def test_several_that_number_a_session_each_for_itself(xdp, starts, run):
    """As line cards of one switch: none of their frames is missing, in whatever turns they come."""
    numbers = [(start + turn * run + number) % 2**32
               for turn in range(2 * shared.LEAP // run // len(starts)) for start in starts for number in range(run)]
    assert order_of(numbers).gaps == 0


def order_of(numbers: Iterable[int], header: str = ERSPAN_II_NUMBERED) -> Order:
    """What a session's numbers come to."""
    before, behind = gre(header.format(number=0x12345678), INNER).split(text("12345678"))
    with Program(dataclasses.replace(ALL, encapsulations=("erspan", "gre"))) as program:
        for number in numbers:
            bpf.test_run(program.fd, before + struct.pack("!I", number) + behind)
        (session, order), = program.order().items()
        assert session.id == 1
    return order


def test_frames_without_numbers_have_no_order(xdp):
    with Program(ALL) as program:
        for _, sent, _, _ in VARIANTS.values():
            if sent[34:36] not in (b"\x10\x00", b"\x30\x00"):
                program.run(sent)
        assert program.order() == {}


# What has been seen on wires

def offset_of(frame: bytes) -> int:
    """Where the mirrored frame begins, counted by hand for each kind of header in the captures."""
    behind_ip = 34
    if frame[23] == 47:
        return {b"\x00\x00\x88\xbe": behind_ip + 4, b"\x10\x00\x88\xbe": behind_ip + 16,
                b"\x10\x00\x22\xeb": behind_ip + 20, b"\x00\x00\x22\xeb": behind_ip + 24}[frame[34:38]]
    return behind_ip + 8 + 8 + (frame[42] & 0x3F) * 4 if frame[36:38] == b"\x17\xc1" else behind_ip + 16


@pytest.mark.skipif(not CAPTURES.exists(), reason=f"no captures at {CAPTURES}")
@pytest.mark.parametrize("name, kind, tci", [
    ("erspanI", "erspan", None), ("erspanII", "erspan", 23), ("erspanIII", "erspan", 20),
    ("gre-erspan3-dot1q", "erspan", None), ("geneve", "geneve", None), ("geneve-ipv6", "geneve", None),
    ("vxlan", "vxlan", None)])
def test_captures(program, name, kind, tci):
    frames = list(map(bytes, rdpcap(str(CAPTURES / f"{name}.pcap"))))
    assert frames
    for frame in frames:
        inner = frame[offset_of(frame):14 + struct.unpack_from("!H", frame, 16)[0]]
        if name == "geneve-ipv6":
            inner = frame[:12] + b"\x86\xdd" + inner
            assert IPv6 in Ether(inner)
        else:
            assert ICMP in Ether(inner) or ARP in Ether(inner)
        left = inner if tci is None else inner[:12] + struct.pack("!HH", 0x8100, tci) + inner[12:]
        outcome = program(ALL).run(frame)
        assert outcome.counters == {"decapsulated": Counted(1, len(frame))}
        assert outcome.frame == left
        assert program(STRIP).run(frame).frame == inner
        (session,) = outcome.sessions
        assert session.encapsulation == kind


# The table of encapsulations

def test_it_is_in_the_order_of_the_program():
    assert tuple(ENCAPSULATIONS) == shared.ENCAPSULATIONS


@pytest.mark.parametrize("kind", shared.ENCAPSULATIONS)
def test_unwrap_is_the_inverse_of_wrap(kind):
    each = ENCAPSULATIONS[kind]
    for tci, is_tagged in ((0, False), (0x600A, True), (10, False)):
        wrapped = each.wrap(bytes(INNER), 9, tci, is_tagged, 77)
        header = each.unwrap(wrapped)
        tagged = bytes(INNER)[:12] + struct.pack("!HH", 0x8100, tci) + bytes(INNER)[12:]
        if kind in ("erm", "erspan"):
            assert (header.vlan.tci, header.vlan.is_tagged) == (tci, is_tagged)
            assert wrapped[header.length:] == bytes(INNER)
        else:
            assert wrapped[header.length:] == (tagged if tci else bytes(INNER))
        assert header.session in (9, None)
        assert header.number == (77 if kind == "erspan" else None)
        assert 34 + (8 if each.transport == "udp" else 0) + len(wrapped) - len(INNER) <= each.overhead


def test_the_mtu_is_that_of_the_longest():
    assert [least_mtu((kind,), ()) for kind in shared.ENCAPSULATIONS] == [1554, 1566, 1554, 1554, 1806, 1551]
    assert least_mtu(("erm", "vxlan", "erspan"), ()) == 1566
    assert [least_mtu((kind,), ("192.0.2.9", "2001:db8::9")) for kind in shared.ENCAPSULATIONS] == [
        1554, 1594, 1582, 1574, 1826, 1551]


def test_nothing_else_is_taken_by_default():
    """What is not configured is left, as before."""
    for _, sent, _, _ in VARIANTS.values():
        assert decapsulate(sent, InterfaceConfig()) == Decapsulation("other", sent)


@pytest.mark.parametrize("kind", shared.ENCAPSULATIONS)
def test_one_session_is_balanced_over_four_members(xdp, kind):
    """2,000 two-way flows: none split, and no member below 20 % of the packets; each frame as it was mirrored."""
    config = InterfaceConfig(encapsulations=(kind,))
    with Cable() as cable:
        with cable.sensor.entered():
            loader.attach(SENSOR_INTERFACE, config)
        cable.wait_for_carrier()
        with FanoutWorkers(cable, 4, operator.attrgetter("mirrored")) as workers:
            mirror(cable, synthetic(2000, 10000, 1, kind), workers)
            result = workers.finish()
        with cable.sensor.entered():
            (session,) = stats.snapshot(SENSOR_INTERFACE)[0]["sessions"]
    assert (result.identical, result.missing, result.unexpected) == (10000, 0, 0)
    assert (len(result.workers_by_flow), result.split_flows) == (2000, 0)
    assert min(result.packets) > 0.2 * 10000
    assert (session["encapsulation"], session["packets"]) == (kind, 10000)
    assert session["gaps"] == (0 if kind == "erspan" else None)


@pytest.mark.parametrize("variant", [PLAIN, Variant(frags=True), Variant((0,)), Variant((0,), True)],
                         ids=["plain", "frags", "cpumap", "cpumap and frags"])
@pytest.mark.parametrize("more", [{}, {"vlan": "strip", "sessions": False, "isolate": False},
                                  {"vlan": "tagged", "spread_ports": True, "targets": (SENSOR, "2001:db8::9")}],
                         ids=str)
@pytest.mark.parametrize("sources", [DEEP.sources, ("0.0.0.0/0", "::/0"), (*ELSEWHERE[:4], "2001:db8::/32", "::1/128")],
                         ids=["two", "any", "six"])
def test_the_verifier_takes_all_of_them_with_every_other_setting(xdp, variant, more, sources):
    with Program(dataclasses.replace(DEEP, **{"vlan": "restore", "sources": sources, **more}),
                 variant=variant) as program:
        assert program.fd


#: Instructions of the program for ERM alone before there was anything else (commit 67ed9e8), as bcc 0.26 with LLVM 14
#: makes them: len(compiler.compiled(source, flags).functions[PROGRAM].instructions) // 8.
BEFORE = {
    "default": (InterfaceConfig(), 551, 695),
    "least": (InterfaceConfig(vlan="strip", sessions=False, isolate=False), 319, 460),
    "most": (InterfaceConfig(port=(1, 7932, 65535), vlan="tagged", depth=3, sources=("10.0.0.0/8", "192.0.2.1/32"),
                             targets=("192.0.2.1",), spread_ports=True), 1009, 1208),
    "long lists": (InterfaceConfig(depth=2, sources=tuple(f"10.77.{number}.77/32" for number in range(9)),
                                   targets=tuple(f"10.77.{number}.77" for number in range(9))), 796, 877),
}


@pytest.mark.parametrize("config, plain, most", BEFORE.values(), ids=BEFORE)
def test_what_is_off_costs_nothing(xdp, config, plain, most):
    if compiler.bcc_version() != "bcc 0.26.0":
        pytest.skip(f"the numbers are of bcc 0.26.0, here is {compiler.bcc_version()}")

    def instructions(variant):
        made = compiler.compiled(compiler.source(compiler.SOURCE), compiler.flags(config, variant))
        return len(made.functions[compiler.PROGRAM].instructions) // 8

    # Together: how registers are allocated moves one or two from one variant to another.
    assert instructions(PLAIN) + instructions(Variant((0,), True)) <= plain + most
