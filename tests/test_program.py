"""The XDP program on one packet at a time (BPF_PROG_TEST_RUN): its verdict, the bytes it leaves, what it counts.

Each frame is a scapy expression. Whatever the program does not decapsulate has to come out as it went in.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from frames import ELSEWHERE, ERM, ETHER, INNER, MACS, PING, SENSOR, SESSION, SWITCH, ip, udp, wrap
from program import XDP_PASS, Counted, Program, mark
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q
from scapy.packet import Packet, Padding, Raw

from xdp_erm_py import shared
from xdp_erm_py.interface import stats
from xdp_erm_py.kernel import bpf, btf
from xdp_erm_py.kernel.bpf import descriptor
from xdp_erm_py.program import compiler
from xdp_erm_py.program.compiler import MOST_COMPARED, Variant
from xdp_erm_py.program.module import PULL_DATA, Module
from xdp_erm_py.program.reference import Session
from xdp_erm_py.settings import InterfaceConfig

pytestmark = pytest.mark.check

STRIP = InterfaceConfig(vlan="strip")
#: Two levels within the outermost are peeled, where they come from SWITCH.
DEEP = InterfaceConfig(vlan="strip", depth=3, sources=(f"{SWITCH}/32",))

# What INNER becomes in the default configuration, with the VLAN that wrap() puts into the ERM header.
LEFT = MACS / Dot1Q(vlan=10) / PING


def table(names: str, rows: dict[str, tuple[Any, ...]]) -> pytest.MarkDecorator:
    """A test for each row, by its name."""
    return pytest.mark.parametrize(names, [pytest.param(*row, id=name) for name, row in rows.items()])


def check(program, sent, verdict, left=None, notes=(), session=SESSION):
    """One packet in: one verdict, exactly these bytes out (`left`; else untouched), and no other counter moves."""
    sent = bytes(sent)
    counted = Counted(packets=1, bytes=len(sent))
    outcome = program.run(sent)
    assert outcome.counters == dict.fromkeys((verdict, *notes), counted)
    assert outcome.frame == (sent if left is None else bytes(left))
    assert outcome.sessions == ({session: counted} if verdict == "decapsulated" else {})
    assert outcome.senders == ({session.source: counted} if verdict.startswith("foreign") else {})


def check_left(program, sent, left, notes=(), session=SESSION):
    check(program, sent, "decapsulated", left, notes, session)


# Layers around the mirrored frame

def nops(count: int) -> list[IPOption_NOP]:
    return [IPOption_NOP()] * count


@table("sent", {
    "plain": (wrap(INNER),),
    "802.1Q": (ETHER / Dot1Q(vlan=1) / ip() / udp() / ERM() / INNER,),
    "802.1Q priority tag": (ETHER / Dot1Q(vlan=0, prio=7) / ip() / udp() / ERM() / INNER,),
    "802.1ad": (ETHER / Dot1AD(vlan=1) / ip() / udp() / ERM() / INNER,),
    "QinQ": (ETHER / Dot1AD(vlan=1) / Dot1Q(vlan=2) / ip() / udp() / ERM() / INNER,),
    "two 802.1Q tags": (ETHER / Dot1Q(vlan=1) / Dot1Q(vlan=2) / ip() / udp() / ERM() / INNER,),
    "802.1Q outside, 802.1ad inside": (ETHER / Dot1Q(vlan=1) / Dot1AD(vlan=2) / ip() / udp() / ERM() / INNER,),
    "don't fragment off": (ETHER / ip(flags="") / udp() / ERM() / INNER,),
    "reserved fragment bit": (ETHER / ip(flags="evil") / udp() / ERM() / INNER,),
    "TOS, id and TTL": (ETHER / ip(tos=0xFF, id=0xFFFF, ttl=1) / udp() / ERM() / INNER,),
    "wrong IP checksum": (ETHER / ip(chksum=1) / udp() / ERM() / INNER,),
    "UDP checksum": (ETHER / ip() / udp(chksum=None) / ERM() / INNER,),
    "wrong UDP checksum": (ETHER / ip() / udp(chksum=1) / ERM() / INNER,),
    "unknown ERM bits": (wrap(INNER, unknown=2**64 - 1, unknown_high=255, unknown_low=127),),
})
def test_wrapping(program, sent):
    check_left(program(), sent, LEFT)


@pytest.mark.parametrize("length", range(4, 41, 4))
def test_ip_options(program, length):
    check_left(program(), ETHER / ip(options=nops(length)) / udp() / ERM() / INNER, LEFT)


@table("inner", {
    "ARP": (MACS / ARP(psrc="10.0.0.1"),),
    "IPv6": (MACS / IPv6() / UDP() / b"x",),
    "802.3": (MACS / LLC() / b"spanning tree",),
    "jumbo": (MACS / Raw(bytes(3000)),),
    "full size": (MACS / Raw(bytes(1500)),),
    "no payload": (MACS / Raw(),),
    "tags of its own": (MACS / Dot1AD(vlan=5) / Dot1Q(vlan=6) / PING,),
    "three tags of its own": (MACS / Dot1Q() / Dot1Q() / Dot1Q() / PING,),
    "ERM by TCP": (MACS / IP(src=SWITCH, dst=SENSOR) / TCP(dport=7932),),
})
def test_any_mirrored_frame(program, inner):
    inner = bytes(inner)
    check_left(program(STRIP), wrap(inner), inner)
    check_left(program(), wrap(inner), inner[:12] + bytes.fromhex("8100 000a") + inner[12:])


@table("sent", {
    "one byte": (wrap(INNER) / Padding(b"\1"),),
    "many bytes": (wrap(INNER) / Padding(b"\1" * 1000),),
    "something like a frame": (wrap(INNER) / Padding(bytes(wrap(INNER))),),
    "behind a tag": (ETHER / Dot1Q(vlan=1) / ip() / udp() / ERM() / INNER / Padding(b"\1" * 10),),
    "inside IP, past the UDP length": (ETHER / ip() / udp(len=20 + len(INNER)) / ERM() / (bytes(INNER) + b"\1" * 7),),
    "both": (ETHER / ip() / udp(len=20 + len(INNER)) / ERM() / (bytes(INNER) + b"\1" * 7) / Padding(b"\2" * 3),),
})
def test_what_follows_the_datagram_is_cut(program, sent):
    check_left(program(), sent, LEFT)
    check_left(program(STRIP), sent, INNER)



# Frames that are left alone

@table("sent, verdict", {
    "ARP": (ETHER / ARP(psrc=SWITCH, pdst=SENSOR), "other"),
    "IPv6 to the port": (ETHER / IPv6() / udp() / ERM() / INNER, "other"),
    "802.3": (ETHER / Raw() / LLC() / b"spanning tree", "other"),
    "EtherType for experiments": (ETHER / Raw(), "other"),
    "TCP": (ETHER / ip() / TCP(dport=7932) / ERM() / INNER, "other"),
    "ICMP": (ETHER / ip() / ICMP(), "other"),
    "another UDP port": (ETHER / ip() / udp(dport=7933) / ERM() / INNER, "other"),
    "from the port": (ETHER / ip() / udp(sport=7932, dport=5) / ERM() / INNER, "other"),
    "the port's bytes swapped": (ETHER / ip() / udp(dport=0xFC1E) / ERM() / INNER, "other"),
    "three tags": (ETHER / Dot1Q() / Dot1Q() / Dot1Q() / ip() / udp() / ERM() / INNER, "other"),
    "tag and ARP": (ETHER / Dot1Q() / ARP(psrc=SWITCH, pdst=SENSOR), "other"),
    "first fragment": (ETHER / ip(flags="MF") / udp() / ERM() / INNER, "fragment"),
    "first fragment, DF set": (ETHER / ip(flags="MF+DF") / udp() / ERM() / INNER, "fragment"),
    "first fragment to another port": (ETHER / ip(flags="MF") / udp(dport=53) / ERM() / INNER, "other"),
    # The ports are in the first one. What looks like them in others is anything.
    "middle fragment": (ETHER / ip(flags="MF", frag=185, proto=17) / udp() / ERM() / INNER, "other"),
    "last fragment": (ETHER / ip(flags="", frag=1, proto=17) / udp() / ERM() / INNER, "other"),
    "last fragment, offset 256": (ETHER / ip(flags="", frag=256 // 8, proto=17) / udp() / INNER, "other"),
    "last fragment, offset 32768": (ETHER / ip(flags="", frag=32768 // 8, proto=17) / udp() / INNER, "other"),
    "fragment of TCP": (ETHER / ip(flags="MF") / TCP() / INNER, "other"),
    "IP version 6 in an IPv4 frame": (ETHER / ip(version=6) / udp() / ERM() / INNER, "malformed"),
    "IP version 0": (ETHER / ip(version=0) / udp() / ERM() / INNER, "malformed"),
    "IHL 4": (ETHER / ip(ihl=4) / udp() / ERM() / INNER, "malformed"),
    "IHL 0": (ETHER / ip(ihl=0) / udp() / ERM() / INNER, "malformed"),
    "UDP length 0": (ETHER / ip() / udp(len=0) / ERM() / INNER, "malformed"),
    "UDP length 7": (ETHER / ip() / udp(len=7) / ERM() / INNER, "malformed"),
    "UDP longer than IP": (ETHER / ip() / udp(len=21 + len(INNER)) / ERM() / INNER, "malformed"),
    "UDP longer than IP, with options": (
        ETHER / ip(options=nops(8), len=40 + len(INNER)) / udp() / ERM() / INNER, "malformed"),
    "UDP length 65535": (ETHER / ip() / udp(len=65535) / ERM() / INNER, "malformed"),
    "IP total length 0": (ETHER / ip(len=0) / udp() / ERM() / INNER, "malformed"),
    "IP total length below the header": (ETHER / ip(len=19) / udp() / ERM() / INNER, "malformed"),
    "IP longer than the frame": (ETHER / ip(len=41 + len(INNER)) / udp() / ERM() / INNER, "truncated"),
    "IP total length 65535": (ETHER / ip(len=65535) / udp() / ERM() / INNER, "truncated"),
    "all zero": (Raw(bytes(60)), "other"),
    "all ones": (Raw(b"\xff" * 60), "other"),
})
def test_left_alone(program, sent, verdict):
    check(program(), sent, verdict)


@table("sent, verdict", {
    "version before protocol": (ETHER / ip(version=5) / TCP(), "malformed"),
    "protocol before fragment": (ETHER / ip(flags="MF", proto=6) / Raw(b"\1" * 50), "other"),
    "offset before length": (ETHER / ip(frag=1, proto=17), "other"),
    "length before fragment": (Raw(bytes(ETHER / ip(flags="MF") / udp())[:-1]), "truncated"),
    "port before fragment": (ETHER / ip(flags="MF") / udp(dport=53), "other"),
    "fragment before UDP length": (ETHER / ip(flags="MF") / udp(len=7), "fragment"),
    "length before port": (Raw(bytes(ETHER / ip() / udp(dport=53))[:-1]), "truncated"),
    "port before UDP length": (ETHER / ip() / udp(dport=53, len=7) / INNER, "other"),
    "UDP length before frame length": (ETHER / ip(len=1000) / udp(len=7), "malformed"),
    "frame length before ERM header": (ETHER / ip() / udp(), "truncated"),
})
def test_the_order_of_the_rules(program, sent, verdict):
    check(program(), sent, verdict)


MANY_LAYERS = bytes(ETHER / Dot1AD(vlan=1) / Dot1Q(vlan=2) / ip(options=nops(40)) / udp() / ERM() / INNER)


@pytest.mark.parametrize("length", range(14, len(MANY_LAYERS)))
def test_every_cut(program, length):
    check(program(), MANY_LAYERS[:length], "truncated")


def test_no_cut(program):
    check_left(program(), MANY_LAYERS, LEFT)


@pytest.mark.parametrize("length", range(26))
def test_datagram_too_short_for_a_frame(program, length):
    """The 12 bytes and an Ethernet header are needed. The padding behind must not be taken for them."""
    payload = bytes(ERM() / INNER)[:length]
    check(program(), ETHER / ip() / udp() / payload, "truncated")
    check(program(), ETHER / ip() / udp() / payload / Padding(bytes(100)), "truncated")


def test_shortest_datagram_with_a_frame(program):
    header = bytes(MACS / ARP(psrc="10.0.0.1"))[:14]
    check_left(program(STRIP), wrap(header), header)


# ERM in ERM

def nest(*vlans: int, inner: Packet = INNER) -> Packet:
    """ERM in ERM, with the VLAN of each level from the outside in."""
    for vlan in reversed(vlans):
        inner = wrap(inner, vlan=vlan)
    return inner


def refused(levels: int, peeled: int) -> list[str]:
    """The notes on a frame of so many levels of which so many were peeled."""
    return ["nested"] * (peeled > 1) + ["nested_refused"] * (peeled < levels)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nested(program, depth, levels):
    vlans = (11, 12, 13, 14)[:levels]
    peeled = min(depth, levels)
    inner, notes = nest(*vlans[peeled:]), refused(levels, peeled)
    deep = dataclasses.replace(DEEP, depth=depth)
    check_left(program(deep), nest(*vlans), inner, notes)
    # The tag is what the last header that was peeled says.
    tagged = bytes(inner)[:12] + struct.pack("!HH", 0x8100, vlans[peeled - 1]) + bytes(inner)[12:]
    check_left(program(dataclasses.replace(deep, vlan="restore")), nest(*vlans), tagged, notes)


def test_what_a_mirrored_host_wraps_stays_wrapped(program):
    """By default, and where the host is none of the sources: the frame that it invents was not mirrored."""
    invented = ETHER / ip(src="10.9.9.9") / udp() / ERM() / INNER
    for config in (STRIP, DEEP, dataclasses.replace(DEEP, depth=1)):
        check_left(program(config), wrap(invented), invented, ["nested_refused"])
        check_left(program(config), wrap(invented) / Padding(bytes(9)), invented, ["nested_refused"])
    # Whatever is within it.
    check_left(program(DEEP), wrap(wrap(wrap(invented))), invented, ["nested", "nested_refused"])
    around = ETHER / ip(src="10.9.9.9") / udp() / ERM() / wrap(INNER)
    check_left(program(DEEP), wrap(around), around, ["nested_refused"])


@table("inner", {
    "802.1Q": (ETHER / Dot1Q(vlan=1) / ip() / udp() / ERM() / INNER,),
    "QinQ": (ETHER / Dot1AD(vlan=1) / Dot1Q(vlan=2) / ip() / udp() / ERM() / INNER,),
    "IP options": (ETHER / ip(options=nops(40)) / udp() / ERM() / INNER,),
    "padding": (Raw(bytes(wrap(INNER) / Padding(b"\1" * 20))),),
    "UDP shorter than IP": (ETHER / ip() / udp(len=20 + len(INNER)) / ERM() / (bytes(INNER) + b"past the end"),),
})
def test_nested_wrapping(program, inner):
    deep = program(dataclasses.replace(DEEP, vlan="restore"))
    check_left(deep, wrap(inner, vlan=4000), LEFT, ["nested"])
    check_left(deep, wrap(wrap(inner)) / Padding(b"\2" * 5), LEFT, ["nested"])
    check_left(program(STRIP), wrap(inner), inner, ["nested_refused"])


@table("inner, notes", {
    "TCP": (ETHER / ip() / TCP(dport=7932), []),
    "another port": (ETHER / ip() / udp(dport=53) / ERM() / INNER, []),
    "three tags": (ETHER / Dot1Q() / Dot1Q() / Dot1Q() / ip() / udp() / ERM() / INNER, []),
    "fragment": (ETHER / ip(flags="MF") / udp() / ERM() / INNER, []),
    "last fragment": (ETHER / ip(frag=1) / udp() / ERM() / INNER, []),
    "IP version": (ETHER / ip(version=6) / udp() / ERM() / INNER, []),
    "IHL 4": (ETHER / ip(ihl=4) / udp() / ERM() / INNER, []),
    "UDP length 7": (ETHER / ip() / udp(len=7) / ERM() / INNER, []),
    "UDP longer than IP": (ETHER / ip() / udp(len=21 + len(INNER)) / ERM() / INNER, []),
    "IP longer than the frame": (ETHER / ip(len=41 + len(INNER)) / udp() / ERM() / INNER, ["inner_truncated"]),
    "no ERM header": (ETHER / ip() / udp(), []),
    "no frame in it": (ETHER / ip() / udp() / ERM(), []),
})
def test_peeling_stops_at_what_is_no_datagram(program, inner, notes):
    check_left(program(STRIP), wrap(inner), inner, notes)
    check_left(program(DEEP), wrap(inner), inner, notes)
    check_left(program(DEEP), wrap(wrap(inner)), inner, ["nested", *notes])


@pytest.mark.parametrize("length", range(14, len(MANY_LAYERS)))
def test_every_cut_of_a_nested_datagram(program, length):
    """What follows in the packet, behind the outer datagram's end, must not be taken for the nested one's rest."""
    inner = MANY_LAYERS[:length]
    notes = ["inner_truncated"] if length >= 22 else []  # below that the EtherType behind the tags is missing
    for config in (STRIP, DEEP):
        check_left(program(config), wrap(inner), inner, notes)
        check_left(program(config), wrap(inner) / Padding(MANY_LAYERS[length:]), inner, notes)


def test_ports_are_those_of_every_level(program):
    config = dataclasses.replace(DEEP, port=(7932, 9999))
    nested = ETHER / ip() / udp(dport=9999) / ERM() / wrap(INNER)
    check_left(program(config), nested, INNER, ["nested"])
    check_left(program(config), wrap(ETHER / ip() / udp(dport=9999) / ERM() / INNER), INNER, ["nested"])


# The VLAN

PCP_OF_RAW_PRIORITY = (1, 2, 0, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("mode", shared.VLAN_MODES)
@pytest.mark.parametrize("vlan", [0, 1, 2011, 4095])
@pytest.mark.parametrize("is_tagged", [0, 1])
def test_vlan(program, mode, vlan, is_tagged):
    for (raw, pcp), cfi in itertools.product(enumerate(PCP_OF_RAW_PRIORITY), (0, 1)):
        tagged = vlan != 0 and (mode == "restore" or (mode == "tagged" and is_tagged))
        left = MACS / Dot1Q(vlan=vlan, prio=pcp, id=cfi) / PING if tagged else INNER
        sent = wrap(INNER, vlan=vlan, priority=raw, cfi=cfi, is_tagged=is_tagged)
        check_left(program(InterfaceConfig(vlan=mode)), sent, left)


# What is configured: ports, allow lists, sessions

@table("ports, port, verdict", {
    "default": ((7932,), 7932, "decapsulated"),
    "below": ((7932,), 7931, "other"),
    "lowest": ((1, 65535), 1, "decapsulated"),
    "highest": ((1, 65535), 65535, "decapsulated"),
    "between": ((1, 65535), 7932, "other"),
    "zero": ((1, 65535), 0, "other"),
})
def test_ports(program, ports, port, verdict):
    sent = ETHER / ip() / udp(dport=port) / ERM() / INNER
    left = INNER if verdict == "decapsulated" else None
    check(program(InterfaceConfig(port=ports, vlan="strip")), sent, verdict, left)


# Short allow lists are compared in the program, long ones are looked up.
long_or_short = pytest.mark.parametrize("elsewhere", [(), ELSEWHERE], ids=["short", "long"])
PREFIXES = "198.51.100.0/25", "198.51.100.200/32", "203.0.113.128/31"


@long_or_short
@table("source, verdict", {
    "first of a prefix": ("198.51.100.0", "decapsulated"),
    "last of a prefix": ("198.51.100.127", "decapsulated"),
    "one past it": ("198.51.100.128", "foreign_source"),
    "one before it": ("198.51.99.255", "foreign_source"),
    "the /32": ("198.51.100.200", "decapsulated"),
    "beside the /32": ("198.51.100.201", "foreign_source"),
    "in the /31": ("203.0.113.129", "decapsulated"),
    "beside the /31": ("203.0.113.130", "foreign_source"),
    "a prefix's bytes swapped": ("0.100.51.198", "foreign_source"),
})
def test_sources(program, source, verdict, elsewhere):
    config = InterfaceConfig(vlan="strip", sources=PREFIXES + elsewhere)
    left = INNER if verdict == "decapsulated" else None
    check(program(config), ETHER / ip(src=source) / udp() / ERM() / INNER, verdict, left, session=Session(source, 5))


@long_or_short
@pytest.mark.parametrize("source", ["0.0.0.0", "127.0.0.1", "198.51.100.1", "255.255.255.255"])
def test_source_0_0_0_0_0_is_any(program, source, elsewhere):
    config = InterfaceConfig(vlan="strip", sources=("0.0.0.0/0", *elsewhere))
    check_left(program(config), ETHER / ip(src=source) / udp() / ERM() / INNER, INNER, session=Session(source, 5))


@pytest.mark.parametrize("count", [MOST_COMPARED, MOST_COMPARED + 1])
def test_each_of_a_list_counts(program, count):
    sources = tuple(f"10.77.{number}.0/24" for number in range(count))
    for number in range(count):
        source = f"10.77.{number}.9"
        check_left(program(InterfaceConfig(vlan="strip", sources=sources)),
                   ETHER / ip(src=source) / udp() / ERM() / INNER, INNER, session=Session(source, 5))


@long_or_short
@table("target, verdict", {
    "on the list": ("192.0.2.1", "decapsulated"),
    "the other on the list": ("192.0.2.200", "decapsulated"),
    "between": ("192.0.2.2", "foreign_target"),
    "broadcast": ("255.255.255.255", "foreign_target"),
})
def test_targets(program, target, verdict, elsewhere):
    config = InterfaceConfig(vlan="strip", targets=("192.0.2.1", "192.0.2.200", *elsewhere))
    left = INNER if verdict == "decapsulated" else None
    check(program(config), ETHER / ip(dst=target) / udp() / ERM() / INNER, verdict, left)


@long_or_short
@table("sent, verdict", {
    "neither": (ETHER / ip(src="10.9.9.9", dst="10.9.9.9") / udp() / ERM() / INNER, "foreign_source"),
    "source only": (ETHER / ip(dst="10.9.9.9") / udp() / ERM() / INNER, "foreign_target"),
    "target only": (ETHER / ip(src="10.9.9.9") / udp() / ERM() / INNER, "foreign_source"),
    "both": (wrap(INNER), "decapsulated"),
    "source before fragment": (ETHER / ip(src="10.9.9.9", flags="MF") / udp() / ERM() / INNER, "foreign_source"),
    "target before fragment": (ETHER / ip(dst="10.9.9.9", flags="MF") / udp() / ERM() / INNER, "foreign_target"),
    "offset before source": (ETHER / ip(src="10.9.9.9", frag=1, proto=17) / udp() / ERM() / INNER, "other"),
    "port before source": (ETHER / ip(src="10.9.9.9") / udp(dport=53) / ERM() / INNER, "other"),
    "source before UDP length": (ETHER / ip(src="10.9.9.9") / udp(len=7) / ERM() / INNER, "foreign_source"),
    "target before UDP length": (ETHER / ip(dst="10.9.9.9") / udp(len=7) / ERM() / INNER, "foreign_target"),
})
def test_sources_and_targets(program, sent, verdict, elsewhere):
    config = InterfaceConfig(vlan="strip", sources=(f"{SWITCH}/32", *elsewhere), targets=(SENSOR, *elsewhere))
    source = Session(sent["IP"].src, 5)
    check(program(config), sent, verdict, INNER if verdict == "decapsulated" else None, session=source)


@long_or_short
def test_sources_are_for_every_level_and_targets_for_the_outermost(program, elsewhere):
    config = dataclasses.replace(DEEP, sources=(*DEEP.sources, *elsewhere), targets=(SENSOR, *elsewhere))
    elsewhere_too = ETHER / ip(dst="10.9.9.9") / udp() / ERM() / INNER
    check_left(program(config), wrap(elsewhere_too), INNER, ["nested"])
    check(program(config), elsewhere_too, "foreign_target")
    foreign = ETHER / ip(src="10.9.9.9") / udp() / ERM() / INNER
    check_left(program(config), wrap(foreign), foreign, ["nested_refused"])
    check(program(config), foreign, "foreign_source", session=Session("10.9.9.9", 5))


def test_a_session_is_the_outermost_address_and_source_port(program):
    config = dataclasses.replace(DEEP, sources=("0.0.0.0/0",))
    for session in (Session("198.51.100.1", 1), Session("198.51.100.1", 65535), Session("255.255.255.255", 0)):
        outer = ETHER / ip(src=session.source) / udp(sport=session.id) / ERM()
        check_left(program(config), outer / INNER, INNER, session=session)
        check_left(program(config), outer / wrap(INNER), INNER, ["nested"], session=session)


NOBODY = InterfaceConfig(vlan="strip", sources=("192.0.2.255/32",))


@pytest.mark.parametrize("lists", [{"sources": ("198.51.100.0/24",)}, {"targets": ("192.0.2.9",)}], ids=str)
def test_foreign_senders_are_counted_by_address(xdp, lists):
    """All their packets together, whatever port they come from; and nobody else's."""
    with Program(InterfaceConfig(vlan="strip", **lists)) as program:
        sent = [ETHER / ip(src=source) / udp(sport=port) / ERM() / INNER
                for source, port in (("10.9.9.9", 1), ("10.9.9.9", 2), ("255.255.255.255", 1), ("0.0.0.1", 1))]
        for frame in (*sent, ETHER / ip(dst="192.0.2.9") / udp() / ERM() / INNER, ETHER / ip(src="10.9.9.9") / TCP()):
            program.run(bytes(frame))
        length = len(sent[0])
        assert program.senders() == {"10.9.9.9": Counted(2, 2 * length), "255.255.255.255": Counted(1, length),
                                     "0.0.0.1": Counted(1, length)}
        _, _, last_seen = stats.read_senders(program.maps["senders"])["10.9.9.9"]
        assert last_seen == pytest.approx(time.monotonic(), abs=1.5)


def test_without_allow_lists_nobody_is_foreign(program):
    assert "senders" not in program(STRIP).maps


# Behind the program: one that gives each packet a source of its own, but every 64th SWITCH's, and runs it.
FLOOD = """
BPF_ARRAY(number, u32, 1);

int flood(struct xdp_md *ctx)
{
	u32 zero = 0, *next = number.lookup(&zero);
	__be32 *source = (void *)(long)ctx->data + 26;

	if (!next || (void *)(source + 1) > (void *)(long)ctx->data_end)
		return XDP_ABORTED;
	++*next;
	*source = bpf_htonl(*next % 64 ? 0x0a000000 + *next : 0xc6336401);
	return xdp_erm(ctx);
}
"""


def test_a_million_spoofed_sources(xdp):
    """They replace each other. Who goes on sending among them is seen, whenever one looks, with all it has sent."""
    packets = 1 << 20
    text = compiler.source(compiler.SOURCE).replace("\nint xdp_erm(", "\nstatic __always_inline int xdp_erm(") + FLOOD
    with Module(compiler.compiled(text, compiler.flags(NOBODY))) as flood, \
            descriptor(flood.load_xdp("flood")) as program, \
            bpf.Map(os.dup(flood.maps["senders"])) as senders, bpf.Map(os.dup(flood.maps["number"])) as number:
        running = threading.Thread(target=bpf.test_run, args=(program, bytes(wrap(INNER)), packets))
        running.start()
        readings = []
        while running.is_alive():
            readings.append(stats.read_senders(senders))
        running.join()
        counted = stats.read_senders(senders)
        assert number.lookup(bytes(4)) == [struct.pack("=I", packets)]
    assert counted[SWITCH][:2] == (packets // 64, packets // 64 * len(wrap(INNER)))
    assert shared.MAX_SENDERS // 2 < len(counted) <= shared.MAX_SENDERS
    full = [reading for reading in readings if len(reading) > shared.MAX_SENDERS // 2]
    assert full and all(SWITCH in reading for reading in full)


@pytest.fixture(scope="module")
def in_pieces(xdp):
    """The program for frames in several pieces of memory. A test run makes such ones since Linux 6.18."""
    with Program(InterfaceConfig(vlan="strip", isolate=False), variant=Variant(frags=True)) as loaded:
        try:
            bpf.test_run(loaded.fd, bytes(100), linear=50)
        except OSError as error:
            pytest.skip(f"this kernel makes no test runs with frames in several pieces: {error.strerror}")
        yield loaded


LONG = INNER / Raw(bytes(400))


@pytest.mark.parametrize("first", range(14, len(wrap(LONG)), 3))
def test_a_first_piece_of_any_length(in_pieces, first):
    """Either the frame is decapsulated, or it is whole and counted as what it is; nothing is taken for cut."""
    sent = bytes(wrap(LONG))
    before = in_pieces.counters()
    result, left = bpf.test_run(in_pieces.fd, sent, linear=first)
    counted = {name: value.packets - before[name].packets for name, value in in_pieces.counters().items()}
    wrapping = len(sent) - len(LONG)
    expected = "decapsulated" if first >= wrapping + len(MACS) else "failed"
    assert {name: number for name, number in counted.items() if number} == {expected: 1}
    assert (result, left) == (XDP_PASS, sent[wrapping:] if expected == "decapsulated" else sent)


@pytest.mark.parametrize("encapsulations", [("erm",), shared.ENCAPSULATIONS], ids=["ERM", "all"])
def test_a_tag_needs_the_whole_ethernet_header_in_the_first_piece(in_pieces, encapsulations):
    sent = bytes(wrap(LONG, vlan=10))
    wrapping = len(sent) - len(LONG)
    whole = bytes(MACS / Dot1Q(vlan=10, prio=0) / LONG.payload)
    with Program(InterfaceConfig(encapsulations=encapsulations, isolate=False), variant=Variant(frags=True)) as loaded:
        for first in range(wrapping, wrapping + 20):
            result, left = bpf.test_run(loaded.fd, sent, linear=first)
            assert (result, left) == (XDP_PASS, whole if first >= wrapping + 12 else sent)


@pytest.mark.parametrize("isolate", [True, False])
def test_headers_in_several_pieces_are_put_into_the_first(in_pieces, isolate):
    """Since Linux 6.18, which this test needs in any case. Then the frame is as if it had been in one piece."""
    sent = bytes(wrap(LONG))
    with Program(InterfaceConfig(vlan="strip", isolate=isolate), variant=Variant(frags=True, pull=True)) as loaded:
        for first in [*range(14, 100), 255, 256, 257, len(sent) - 1]:
            before = loaded.counters()["decapsulated"].packets
            result, left = bpf.test_run(loaded.fd, sent, linear=first)
            frame = sent[len(sent) - len(LONG):]
            assert (result, left) == (XDP_PASS, (mark(frame) if isolate else b"") + frame)
            assert loaded.counters()["decapsulated"].packets == before + 1


def test_a_kernel_without_such_a_function(monkeypatch, tmp_path):
    assert btf.function_id("bpf_xdp_pull_nothing") is None
    monkeypatch.setattr(btf, "_TYPES", tmp_path / "vmlinux")
    assert btf.function_id.__wrapped__(PULL_DATA) is None
    monkeypatch.setattr(btf, "function_id", lambda _: None)
    with Module(compiler.compiled(compiler.source(compiler.SOURCE),
                                  compiler.flags(InterfaceConfig(), Variant(frags=True, pull=True)))) as module, \
            pytest.raises(OSError, match="this kernel has no bpf_xdp_pull_data"):
        module.load_xdp(compiler.PROGRAM, frags=True)


@pytest.mark.parametrize("first", [100, 200])
def test_what_is_truncated_is_so_in_several_pieces_too(in_pieces, first):
    """Where the first piece is long enough for any headers."""
    sent = bytes(wrap(INNER / Raw(bytes(800))))[:700]
    before = in_pieces.counters()["truncated"].packets
    assert bpf.test_run(in_pieces.fd, sent, linear=first + 200) == (XDP_PASS, sent)
    assert in_pieces.counters()["truncated"].packets == before + 1


def test_sessions_are_read_though_a_flood_never_rests():
    """Of made-up sources, on so many CPUs that a place passes to another session while they are read, each time."""
    readings = itertools.count()

    def lookup(key: bytes) -> list[bytes]:
        number = next(readings)
        assert number < 1000, "it is read for ever"
        place = struct.pack("!II", 0x0A000000 + number, 0) + struct.pack("=QQQ", 1, 100, 1 << 32)
        return [place + bytes(len(place) * (shared.OWN_SESSIONS - 1))]

    own = SimpleNamespace(info=SimpleNamespace(value_size=32 * shared.OWN_SESSIONS), lookup=lookup)
    sessions = stats.read_sessions(own, SimpleNamespace(contents=dict))
    assert [counted[:2] for counted in sessions.values()] == [(1, 100)]


def test_last_seen(xdp):
    with Program(STRIP) as program:
        start = time.monotonic()
        program.run(bytes(wrap(INNER)))
        first = program.last_seen()[SESSION]
        assert start - 1.5 < first < time.monotonic() + 1.5
        time.sleep(0.1)
        program.run(bytes(wrap(INNER)))
        # As long as the sleep, or longer on a slow machine; a tick more or less.
        assert 0.1 - 0.05 < program.last_seen()[SESSION] - first < time.monotonic() - start + 0.05


def test_without_sessions(program):
    config = InterfaceConfig(vlan="strip", sessions=False)
    outcome = program(config).run(bytes(wrap(INNER)))
    assert (outcome.frame, list(outcome.counters)) == (bytes(INNER), ["decapsulated"])
    assert list(program(config).maps) == ["counters"]


@pytest.fixture
def one_cpu():
    """Each CPU has sessions of its own: the test stays on one."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    yield
    os.sched_setaffinity(0, cpus)


@pytest.mark.parametrize("sources_between", [15, 63, 255])
def test_a_flood_of_sources_does_not_push_out_a_busy_session(xdp, one_cpu, sources_between):
    """The kernel's LRU keeps what came again since it last looked. A session as rare as 1 packet in 1024 would go."""
    busy, rounds = bytes(wrap(INNER)), 100
    spoofed = itertools.count(0x0A000000)
    with Program(STRIP) as program:
        for _ in range(rounds):
            bpf.test_run(program.fd, busy)
            for address in itertools.islice(spoofed, sources_between):
                bpf.test_run(program.fd, busy[:26] + struct.pack("!I", address) + busy[30:])
        sessions = program.sessions()
        assert program.counters()["decapsulated"].packets == rounds * (1 + sources_between)
        # And one that comes late is counted as well.
        check_left(program, ETHER / ip() / udp(sport=6) / ERM() / INNER, INNER, session=Session(SWITCH, 6))
    assert sessions[SESSION] == Counted(rounds, rounds * len(busy))
    assert shared.MAX_SESSIONS // 2 < len(sessions) <= shared.MAX_SESSIONS + shared.OWN_SESSIONS


# The program's clock is what the VLAN tag says.
CLOCK = "-Dbpf_jiffies64()=(outermost->tag & TAG_CONTROL)"


def test_a_session_has_its_place_until_it_has_been_silent_for_long(xdp, one_cpu):
    with Program(STRIP, (CLOCK,)) as program:
        def run(port, jiffies):
            erm = struct.pack("!QI", 0, PCP_OF_RAW_PRIORITY.index(jiffies >> 13) << 21 | (jiffies & 0x1FFF) << 8)
            program.run(bytes(ETHER / ip() / udp(sport=port) / Raw(erm) / INNER))

        def shared_sessions():
            return {int.from_bytes(key[4:6], "big"): struct.unpack_from("=Q", value)[0]
                    for key, value in program.maps["sessions"].contents().items()}

        start, rival = 5000, 1
        while run(rival, start) or not shared_sessions():
            rival += 1  # until one finds its place taken
        run(rival, start + shared.OWN_JIFFIES - 1)
        assert shared_sessions() == {rival: 2}
        run(rival, start + shared.OWN_JIFFIES)  # takes it
        (owner, moved), = (shared_sessions().items() - {rival: 2}.items())
        assert moved == 1
        run(rival, start + 2 * shared.OWN_JIFFIES - 1)
        run(owner, start + 2 * shared.OWN_JIFFIES)
        assert shared_sessions() == {rival: 2, owner: 2}
        counted = {session.id: packets for session, (packets, _) in program.sessions().items()}
        assert counted == dict.fromkeys(range(1, rival), 1) | {owner: 2, rival: 4}


# Truncating mirror sessions

IP_28 = IP(src="10.0.0.1", dst="10.0.0.2", len=28, proto=1)
IPV6_48 = IPv6(src="2001:db8::1", dst="2001:db8::2", plen=8, nh=59)


@table("inner, truncated", {
    "IPv4 whole": (MACS / IP_28 / Raw(bytes(8)), False),
    "IPv4 and padding": (MACS / IP_28 / Raw(bytes(26)), False),
    "IPv4, a byte missing": (MACS / IP_28 / Raw(bytes(7)), True),
    "IPv4, only its header": (MACS / IP_28, True),
    "IPv4, a part of its header": (Raw(bytes(MACS / IP_28)[:33]), True),
    "IPv4, nothing of it": (Raw(bytes(MACS / IP_28)[:14]), True),
    "IPv4, total length 65535": (MACS / IP(len=65535) / Raw(bytes(8)), True),
    "IPv4, total length 0": (MACS / IP(len=0) / Raw(bytes(8)), False),
    "IPv6 whole": (MACS / IPV6_48 / Raw(bytes(8)), False),
    "IPv6 and padding": (MACS / IPV6_48 / Raw(bytes(9)), False),
    "IPv6, a byte missing": (MACS / IPV6_48 / Raw(bytes(7)), True),
    "IPv6, only its header": (MACS / IPV6_48, True),
    "IPv6, a part of its header": (Raw(bytes(MACS / IPV6_48)[:53]), True),
    "IPv6, nothing of it": (Raw(bytes(MACS / IPV6_48)[:14]), True),
    "tag, IPv4 whole": (MACS / Dot1Q() / IP_28 / Raw(bytes(8)), False),
    "tag, IPv4, a byte missing": (MACS / Dot1Q() / IP_28 / Raw(bytes(7)), True),
    "tag, IPv6, a byte missing": (MACS / Dot1AD() / IPV6_48 / Raw(bytes(7)), True),
    "two tags, IPv4, a byte missing": (MACS / Dot1AD() / Dot1Q() / IP_28 / Raw(bytes(7)), True),
    "three tags, IPv4, a byte missing": (MACS / Dot1Q() / Dot1Q() / Dot1Q() / IP_28 / Raw(bytes(7)), False),
    "a part of the tag": (Raw(bytes(MACS / Dot1Q() / IP_28)[:17]), False),
    "ARP, a byte missing": (Raw(bytes(MACS / ARP(psrc="10.0.0.1"))[:-1]), False),
})
def test_inner_truncated(program, inner, truncated):
    notes = ["inner_truncated"] if truncated else []
    check_left(program(STRIP), wrap(inner), inner, notes)
    # Neither what follows the datagram nor the tag that is inserted makes up for missing bytes.
    check_left(program(STRIP), wrap(inner) / Padding(bytes(100)), inner, notes)
    tagged = bytes(inner)[:12] + bytes.fromhex("8100 000a") + bytes(inner)[12:]
    check_left(program(), wrap(inner), tagged, notes)


# Helpers of the kernel that refuse: -22 is EINVAL

NO_ADJUST_HEAD = "-Dbpf_xdp_adjust_head(ctx, n)=(-22)"
NO_ADJUST_TAIL = "-Dbpf_xdp_adjust_tail(ctx, n)=(-22)"
NO_META = "-Dbpf_xdp_adjust_meta(ctx, n)=(-22)"


def test_a_frame_that_cannot_be_marked_stays_wrapped(program):
    """The host would take it for one of its own."""
    for sent in (wrap(INNER), wrap(wrap(INNER)), wrap(INNER) / Padding(bytes(5))):
        check(program(InterfaceConfig(), NO_META), sent, "unmarked")
    check_left(program(InterfaceConfig(isolate=False), NO_META), wrap(INNER), LEFT)


@pytest.mark.parametrize("config", [InterfaceConfig(), STRIP, DEEP], ids=["restore", "strip", "deep"])
def test_failed_helpers_leave_the_packet_as_it_was(program, config):
    for sent in (wrap(INNER), wrap(wrap(INNER)), wrap(INNER) / Padding(bytes(5))):
        check(program(config, NO_ADJUST_HEAD), sent, "failed")
    for sent in (wrap(INNER) / Padding(bytes(5)), wrap(wrap(INNER)) / Padding(bytes(5))):
        check(program(config, NO_ADJUST_TAIL), sent, "failed")
    check(program(config, NO_ADJUST_TAIL), wrap(INNER), "decapsulated", LEFT if config == InterfaceConfig() else INNER)
