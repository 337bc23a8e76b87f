"""The reference decapsulator, on frames whose bytes are written out or counted by hand."""

from __future__ import annotations

import dataclasses
import pathlib
import struct

import pytest

from xdp_erm_py.lab.capture import read_pcap
from xdp_erm_py.program.encapsulations import PCP_OF_RAW_PRIORITY, parse_vlan
from xdp_erm_py.program.reference import Decapsulation, Session, decapsulate
from xdp_erm_py.settings import InterfaceConfig
from xdp_erm_py.shared import VERDICTS

pytestmark = pytest.mark.check

CAPTURE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "captures" / "hp-erm-1.cap"

DEFAULT = InterfaceConfig()

# A mirrored ICMP echo: 14 + 20 + 8 bytes, the smallest whole one.
INNER = bytes.fromhex(
    "000c299fdf96 000c2910c4a5 0800"
    "4500001c f7504000 40012dec 0acd0006 0acd0005"
    "0800a36d 548c0006"
)
OUTER_ETHERNET = bytes.fromhex("000c299fdf96 b499ba4f8a00 0800")
VLAN_10 = "0000000000000000 00400a00"  # as a switch sent it: raw priority 2, VLAN 10, not tagged


def wrap(inner: bytes = INNER, erm: str = VLAN_10, options: bytes = b"", **fields: int) -> bytes:
    """An outer packet whose fields are right unless given."""
    erm_header = bytes.fromhex(erm)
    udp_length = fields.get("udp_length", 8 + len(erm_header) + len(inner))
    header_words = fields.get("header_words", 5 + len(options) // 4)
    total_length = fields.get("total_length", 20 + len(options) + 8 + len(erm_header) + len(inner))
    ip = struct.pack("!BBHHHBBHII", fields.get("version", 4) << 4 | header_words, 0, total_length, 7,
                     fields.get("fragment", 0x4000), 85, fields.get("protocol", 17), 0, 0x0ACD0002, 0x0ACD0005)
    udp = struct.pack("!HHHH", 5, fields.get("port", 7932), udp_length, 0)
    return OUTER_ETHERNET + ip + options + udp + erm_header + inner


def tagged(frame: bytes, *tags: str) -> bytes:
    return frame[:12] + bytes.fromhex("".join(tags)) + frame[12:]


def verdict(frame: bytes, config: InterfaceConfig = DEFAULT) -> str:
    """The verdict; a frame that is not decapsulated must come back as it went in."""
    result = decapsulate(frame, config)
    assert result.verdict in VERDICTS
    if result.verdict != "decapsulated":
        foreign = "10.205.0.2" if result.verdict in ("foreign_source", "foreign_target") else None
        assert result == Decapsulation(result.verdict, frame, foreign=foreign)
    return result.verdict


def test_a_plain_datagram():
    expected = Decapsulation("decapsulated", tagged(INNER, "8100 000a"), 1, session=Session("10.205.0.2", 5))
    assert decapsulate(wrap(), DEFAULT) == expected


@pytest.mark.parametrize("word, tci, is_tagged", [
    ("00400a00", 0x000A, False),
    ("00400a80", 0x000A, True),
    ("00a7db80", 0xA7DB, True),
    ("00c7db00", 0xC7DB, False),
    ("00100180", 0x3001, True),  # raw priority 0 is PCP 1; the CFI bit is kept
    ("ff0fff7f", 0x2FFF, False),  # what the unknown bits hold does not matter
])
def test_the_vlan_in_the_header(word, tci, is_tagged):
    assert parse_vlan(bytes(8) + bytes.fromhex(word)) == (tci, is_tagged)


def test_raw_priorities_map_to_each_pcp_once():
    assert sorted(PCP_OF_RAW_PRIORITY) == list(range(8))


@pytest.mark.parametrize("mode, word, tag", [
    ("restore", "00a7db00", "8100 a7db"),
    ("restore", "00a7db80", "8100 a7db"),
    ("restore", "00400080", ""),  # VLAN id 0
    ("tagged", "00a7db00", ""),
    ("tagged", "00a7db80", "8100 a7db"),
    ("tagged", "00a00080", ""),
    ("strip", "00a7db80", ""),
])
def test_vlan_modes(mode, word, tag):
    config = InterfaceConfig(vlan=mode)
    assert decapsulate(wrap(erm="0000000000000000" + word), config).frame == tagged(INNER, tag)


@pytest.mark.parametrize("tags", [(), ("8100 0001",), ("88a8 0001",), ("88a8 0001", "8100 0002")])
def test_outer_vlan_tags(tags):
    assert decapsulate(tagged(wrap(), *tags), DEFAULT).frame == tagged(INNER, "8100 000a")


def test_a_third_outer_tag_is_another_protocol():
    assert verdict(tagged(wrap(), "8100 0001", "8100 0001", "8100 0001")) == "other"


def test_ip_options():
    assert decapsulate(wrap(options=b"\x01" * 40), DEFAULT).frame == tagged(INNER, "8100 000a")


def test_what_follows_the_datagram_is_cut():
    padded = wrap() + b"padding"
    inside_ip = wrap(inner=INNER + b"xx", udp_length=20 + len(INNER))
    assert decapsulate(padded, DEFAULT).frame == tagged(INNER, "8100 000a")
    assert decapsulate(inside_ip, DEFAULT).frame == tagged(INNER, "8100 000a")


@pytest.mark.parametrize("expected, frame", [
    ("other", OUTER_ETHERNET[:12] + bytes.fromhex("0806") + bytes(28)),
    ("other", OUTER_ETHERNET[:12] + bytes.fromhex("86dd") + bytes(60)),
    ("other", wrap(protocol=6)),
    ("other", wrap(port=7933)),
    ("malformed", wrap(version=6)),
    ("malformed", wrap(header_words=4)),
    ("malformed", wrap(udp_length=7)),
    ("malformed", wrap(udp_length=21 + len(INNER))),
    ("fragment", wrap(fragment=0x2000)),
    ("fragment", wrap(fragment=0x6000)),
    ("other", wrap(fragment=0x2000, port=7933)),
    ("other", wrap(fragment=0x2001)),  # the first fragment alone has the ports
    ("other", wrap(fragment=0x0001)),
    ("truncated", wrap(total_length=41 + len(INNER))),
    ("truncated", wrap(inner=INNER[:13])),
    ("truncated", wrap(inner=b"", erm="")),
])
def test_what_is_left_alone(expected, frame):
    assert verdict(frame) == expected


def test_each_cut_of_a_datagram():
    frame = wrap()
    assert {verdict(frame[:length]) for length in range(len(frame))} == {"truncated"}
    assert verdict(frame) == "decapsulated"


@pytest.mark.parametrize("expected, frame", [
    # Each frame has what two rules are for: the earlier one counts.
    ("malformed", wrap(version=6, protocol=6)),
    ("other", wrap(protocol=6, fragment=0x2000)),
    ("other", wrap(fragment=0x0001)[:34]),
    ("truncated", wrap(fragment=0x2000)[:41]),
    ("fragment", wrap(fragment=0x2000)[:42]),
    ("truncated", wrap(port=7933)[:41]),
    ("other", wrap(port=7933, udp_length=7)),
    ("malformed", wrap(udp_length=7)[:42]),
])
def test_the_order_of_the_rules(expected, frame):
    assert verdict(frame) == expected


@pytest.mark.parametrize("expected, settings", [
    ("decapsulated", {"sources": ("10.205.0.0/24",)}),
    ("decapsulated", {"sources": ("192.0.2.0/24", "10.205.0.2/32")}),
    ("foreign_source", {"sources": ("10.205.1.0/24", "10.205.0.3/32")}),
    ("decapsulated", {"targets": ("192.0.2.1", "10.205.0.5")}),
    ("foreign_target", {"targets": ("10.205.0.2",)}),
    ("foreign_source", {"sources": ("192.0.2.0/24",), "targets": ("192.0.2.1",)}),
])
def test_allow_lists(expected, settings):
    assert verdict(wrap(), InterfaceConfig(**settings)) == expected


def test_allow_lists_come_before_lengths_and_after_the_port():
    config = InterfaceConfig(sources=("192.0.2.0/24",))
    assert verdict(wrap(udp_length=7), config) == "foreign_source"
    assert verdict(wrap(port=7933), config) == "other"


def test_several_ports():
    config = InterfaceConfig(port=(1, 7933))
    assert verdict(wrap(port=7933), config) == "decapsulated"
    assert verdict(wrap(), config) == "other"


@pytest.mark.parametrize("depth, levels, left", [(1, 1, 3), (2, 2, 2), (3, 3, 1)])
def test_nesting_ends_at_the_depth(depth, levels, left):
    frames = [INNER]
    for vlan in ("00400a00", "00401400", "00401e00", "00402800"):  # 10, 20, 30, 40 from the inside out
        frames.append(wrap(frames[-1], "0000000000000000" + vlan))
    result = decapsulate(frames[4], InterfaceConfig(depth=depth, sources=("10.205.0.2/32",)))
    assert (result.levels, result.session) == (levels, Session("10.205.0.2", 5))
    assert result.nested_refused
    # The tag is what the innermost header that was peeled says.
    assert result.frame == tagged(frames[left], f"8100 {10 * (left + 1):04x}")


@pytest.mark.parametrize("inner", [wrap(fragment=0x2000), wrap(udp_length=7), wrap(port=7933), wrap()[:-1]])
def test_peeling_stops_at_what_is_no_datagram(inner):
    for config in (DEFAULT, InterfaceConfig(depth=3, sources=("10.205.0.2/32",))):
        result = decapsulate(wrap(inner), config)
        assert (result.verdict, result.levels, result.frame) == ("decapsulated", 1, tagged(inner, "8100 000a"))
        assert not result.nested_refused


@pytest.mark.parametrize("sources, levels, refused", [
    (("192.0.2.1/32", "10.205.0.0/24"), 2, False),
    (("192.0.2.1/32",), 1, True),  # whoever sent the level within is none of the switches
])
def test_sources_are_for_every_level_and_targets_for_the_outermost(sources, levels, refused):
    nested = wrap(wrap())
    nested = nested[:26] + bytes.fromhex("c0000201 c0000202") + nested[34:]  # another outermost source and target
    result = decapsulate(nested, InterfaceConfig(depth=3, sources=sources, targets=("192.0.2.2",)))
    assert (result.levels, result.nested_refused, result.session) == (levels, refused, Session("192.0.2.1", 5))


def test_padding_inside_is_not_taken_for_a_longer_datagram():
    """A nested datagram is bounded by the outer one's length, not by the bytes that follow in the buffer."""
    cut = wrap(wrap()[:-1]) + INNER
    result = decapsulate(cut, InterfaceConfig(depth=3, sources=("10.205.0.2/32",)))
    assert (result.levels, result.nested_refused) == (1, False)


IPV6 = INNER[:12] + bytes.fromhex("86dd 60000000 0004 3b 40") + bytes(32) + b"four"


@pytest.mark.parametrize("inner, truncated", [
    (INNER, False),
    (INNER + bytes(18), False),
    (INNER[:-1], True),
    (INNER[:33], True),
    (INNER[:14], True),
    (IPV6, False),
    (IPV6[:-1], True),
    (IPV6[:53], True),
    (IPV6[:19], True),
    (INNER[:12] + bytes.fromhex("0806") + bytes(3), False),
    (tagged(INNER, "88a8 0001", "8100 0002"), False),
    (tagged(INNER, "88a8 0001", "8100 0002")[:-1], True),
    (tagged(INNER, "8100 0001", "8100 0001", "8100 0001")[:-1], False),
    (tagged(INNER, "8100 0001")[:15], False),  # no EtherType left to tell
])
def test_inner_truncated(inner, truncated):
    result = decapsulate(wrap(inner), DEFAULT)
    assert (result.verdict, result.inner_truncated) == ("decapsulated", truncated)


def test_real_switch_output():
    """Copies 3, 4, 7 and 8 are what the switch mirrored of the native frames 1, 2, 5 and 6."""
    if not CAPTURE.exists():
        pytest.skip(f"no real capture at {CAPTURE}")
    frames = list(read_pcap(CAPTURE))
    strip = dataclasses.replace(DEFAULT, vlan="strip")
    for native, copy in ((0, 2), (1, 3)):
        assert decapsulate(frames[copy], strip).frame == frames[native]
        assert decapsulate(frames[copy], DEFAULT).frame == tagged(frames[native], "8100 000a")
    # These were tagged on the wire. The switch's own priority stands in the header, which the first copy shows:
    # the host saw 6, the header says 5.
    for native, copy, tci in ((4, 6, "a7db"), (5, 7, "c7db")):
        untagged = frames[native][:12] + frames[native][16:]
        assert decapsulate(frames[copy], strip).frame == untagged
        assert decapsulate(frames[copy], DEFAULT).frame == tagged(untagged, "8100", tci)
    assert [decapsulate(frames[native], DEFAULT).verdict for native in (0, 1, 4, 5)] == ["other"] * 4
