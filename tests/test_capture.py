"""The XDP program on what a real switch sent: each copy becomes the frame that was mirrored.

Frames 1, 2, 5 and 6 of the capture are native, 3, 4, 7 and 8 the switch's ERM copies of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from frames import ERM, wrap
from program import Counted
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.utils import rdpcap

from xdp_erm_py.program.reference import Session
from xdp_erm_py.settings import InterfaceConfig

CAPTURE = Path(__file__).resolve().parents[2] / "shared" / "captures" / "hp-erm-1.cap"

pytestmark = [pytest.mark.check,
              pytest.mark.skipif(not CAPTURE.exists(), reason=f"no real capture at {CAPTURE}")]

PAIRS = {1: 3, 2: 4, 5: 7, 6: 8}
each_pair = pytest.mark.parametrize("native, copy", PAIRS.items())

# VLAN and priority as the switch has them. Its priority need not be the frame's own: 5 and 6 were sent with 6.
TAGS = {1: (10, 0), 2: (10, 0), 5: (2011, 5), 6: (2011, 6)}


@pytest.fixture(scope="module")
def frames():
    """The capture's frames by their number, each as its bytes."""
    return dict(enumerate(map(bytes, rdpcap(str(CAPTURE))), 1))


def untagged(frame: bytes) -> bytes:
    return frame[:12] + frame[16:] if frame[12:14] == b"\x81\x00" else frame


def tagged(frame: bytes, vlan: int, priority: int) -> bytes:
    return frame[:12] + b"\x81\x00" + (priority << 13 | vlan).to_bytes(2, "big") + frame[12:]


def test_it_is_the_capture_these_tests_are_about(frames):
    assert list(frames) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(ICMP in Ether(frames[native]) and UDP not in Ether(frames[native]) for native in PAIRS)
    assert all(ERM in Ether(frames[copy]) for copy in PAIRS.values())
    tags = {native: Ether(frames[native])[Dot1Q].vlan for native in PAIRS if Dot1Q in Ether(frames[native])}
    assert tags == {5: 2011, 6: 2011}


@each_pair
def test_strip_leaves_the_native_frame_without_its_tag(program, frames, native, copy):
    outcome = program(InterfaceConfig(vlan="strip")).run(frames[copy])
    assert outcome.frame == untagged(frames[native])


@each_pair
def test_restore_leaves_the_native_frame_with_the_switch_s_tag(program, frames, native, copy):
    outcome = program(InterfaceConfig(vlan="restore")).run(frames[copy])
    assert outcome.frame == tagged(untagged(frames[native]), *TAGS[native])


def test_restore_leaves_the_very_frame_where_the_tags_are_the_same(program, frames):
    assert program().run(frames[8]).frame == frames[6]


@each_pair
def test_tagged_believes_the_switch(program, frames, native, copy):
    """It says of frame 5 alone that it was tagged, though 6 was as well."""
    outcome = program(InterfaceConfig(vlan="tagged")).run(frames[copy])
    frame = untagged(frames[native])
    assert outcome.frame == (tagged(frame, *TAGS[native]) if native == 5 else frame)


@each_pair
def test_a_copy_of_a_copy(program, frames, native, copy):
    config = InterfaceConfig(vlan="strip", depth=2, sources=("0.0.0.0/0",))
    outcome = program(config).run(bytes(wrap(frames[copy])))
    assert outcome.frame == untagged(frames[native])
    assert set(outcome.counters) == {"decapsulated", "nested"}


@each_pair
def test_what_is_counted(program, frames, native, copy):
    outer = Ether(frames[copy])
    counted = Counted(1, len(frames[copy]))
    outcome = program().run(frames[copy])
    assert outcome.counters == {"decapsulated": counted}
    assert outcome.sessions == {Session(outer[IP].src, outer[UDP].sport): counted}


@pytest.mark.parametrize("native", PAIRS)
def test_native_frames_are_left_alone(program, frames, native):
    outcome = program().run(frames[native])
    assert (outcome.frame, outcome.counters) == (frames[native], {"other": Counted(1, len(frames[native]))})
