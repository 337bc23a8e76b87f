"""The XDP program against the reference in plain Python, on frames that nobody thought of."""

from __future__ import annotations

from frames import ERM, ETHER, MACS, SENSOR, ip, udp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program import Counted
from scapy.layers.inet import IP, IPOption_NOP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q
from scapy.packet import Raw

from xdp_erm_py.program.reference import decapsulate
from xdp_erm_py.settings import InterfaceConfig
from xdp_erm_py.shared import ERM_DEFAULT_PORT

CONFIGURATIONS = (
    InterfaceConfig(),
    InterfaceConfig(vlan="tagged", depth=2, port=(7932, 7933), sources=("198.51.100.0/24",)),
    InterfaceConfig(vlan="strip", sources=("198.51.100.0/24", "10.0.0.0/8")),
    InterfaceConfig(depth=3, sources=("198.51.100.1/32", "203.0.113.0/24"), targets=(SENSOR,)),
)

# The kernel's test run takes Ethernet frames, of a page with room before and behind.
SHORTEST, LONGEST = 14, 3000


def sometimes(value, other):
    """`value` as a rule, now and then what `other` draws, so that most frames get past the first check."""
    return st.integers(0, 29).flatmap(lambda roll: other if roll == 13 else st.just(value))


vlan_tags = st.lists(st.builds(lambda kind, vlan: kind(vlan=vlan), st.sampled_from([Dot1Q, Dot1AD]),
                               st.integers(0, 4095)), max_size=3)
erm_headers = st.builds(ERM, vlan=st.sampled_from([0, 1, 10, 4095]), priority=st.integers(0, 7), cfi=st.integers(0, 1),
                        is_tagged=st.integers(0, 1), unknown_high=st.integers(0, 255))
trailers = st.one_of(st.just(b""), st.binary(max_size=30))

mirrored_frames = st.one_of(
    st.builds(lambda payload: bytes(MACS / Raw(payload)), st.binary(max_size=100)),
    st.builds(lambda payload, length: bytes(MACS / IP(src="10.0.0.1", dst="10.0.0.2", len=length) / Raw(payload)),
              st.binary(max_size=100), st.one_of(st.none(), st.integers(0, 65535))),
    st.builds(lambda payload, length: bytes(MACS / IPv6(plen=length) / Raw(payload)),
              st.binary(max_size=100), st.one_of(st.none(), st.integers(0, 65535))),
    st.builds(lambda tags, payload: bytes(stacked(MACS, tags) / IP(src="10.0.0.1", dst="10.0.0.2") / Raw(payload)),
              vlan_tags, st.binary(max_size=40)),
)


def stacked(frame, tags):
    for tag in tags:
        frame = frame / tag
    return frame


@st.composite
def wrapped(draw, inner):
    """One more level of ERM around what `inner` draws; each of its fields is wrong now and then."""
    frame = draw(inner)
    end = draw(sometimes(len(frame), st.integers(SHORTEST, len(frame))))
    payload, behind = bytes(draw(erm_headers)) + frame[:end], frame[end:] + draw(trailers)
    near = st.integers(-30, 30)
    udp_length = draw(sometimes(8 + len(payload), near.map(lambda off: max(0, 8 + len(payload) + off))))
    options = [IPOption_NOP()] * 4 * draw(st.integers(0, 10))
    total_length = draw(sometimes(None, near.map(lambda off: max(0, 28 + len(options) + len(payload) + off))))
    network = ip(
        src=draw(st.sampled_from(["198.51.100.1", "198.51.100.2", "203.0.113.1", "10.0.0.1"])),
        dst=draw(sometimes(SENSOR, st.just("10.0.0.2"))), options=options, len=total_length,
        version=draw(sometimes(4, st.integers(0, 15))), ihl=draw(sometimes(None, st.integers(0, 15))),
        frag=draw(sometimes(0, st.integers(0, 8191))), flags=draw(sometimes("DF", st.integers(0, 7))),
        proto=draw(sometimes(17, st.integers(0, 255))))
    transport = udp(dport=draw(sometimes(ERM_DEFAULT_PORT, st.integers(7930, 7934))), sport=draw(st.integers(1, 4)),
                    len=udp_length)
    return bytes(stacked(ETHER, draw(vlan_tags)) / network / transport / Raw(payload + draw(trailers))) + behind


@st.composite
def mutated(draw, frames):
    """A frame with a byte or two changed, or cut."""
    frame = bytearray(draw(frames))
    if draw(st.booleans()):
        return bytes(frame[:draw(st.integers(SHORTEST, len(frame)))])
    for position in draw(st.lists(st.integers(0, len(frame) - 1), min_size=1, max_size=2)):
        frame[position] = draw(st.integers(0, 255))
    return bytes(frame)


one_level = wrapped(mirrored_frames)
two_levels = wrapped(one_level)
three_levels = wrapped(two_levels)
erm_frames = st.one_of(one_level, two_levels, three_levels, wrapped(three_levels))


def reference_notes(expected):
    return [name for name, noted in (("nested", expected.levels > 1), ("nested_refused", expected.nested_refused),
                                     ("inner_truncated", expected.inner_truncated)) if noted]


def check_agreement(program, frame):
    for config in CONFIGURATIONS:
        expected = decapsulate(frame, config)
        counted = Counted(1, len(frame))
        notes = reference_notes(expected)
        outcome = program(config).run(frame)
        assert outcome.counters == dict.fromkeys([expected.verdict, *notes], counted), config
        assert outcome.frame == expected.frame, config
        assert outcome.sessions == ({expected.session: counted} if expected.session else {}), config
        assert outcome.senders == ({expected.foreign: counted} if expected.foreign else {}), config


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@given(frame=erm_frames)
@examples(500)
def test_erm_in_many_variations(program, frame):
    check_agreement(program, frame)


@given(frame=mutated(erm_frames))
@examples(500)
def test_damaged_erm(program, frame):
    check_agreement(program, frame)


# Random bytes alone hardly ever begin like an IPv4 frame, let alone like ERM.
beginnings = st.sampled_from([bytes(ETHER / ip() / udp())[:length] for length in (0, 14, 15, 24, 34, 38)])


@given(beginning=beginnings, rest=st.binary(min_size=SHORTEST, max_size=LONGEST))
@examples(400)
def test_random_bytes(program, beginning, rest):
    check_agreement(program, beginning + rest)
