"""ERM as a scapy layer, and the pieces the tests make frames of: ETHER / ip() / udp() / ERM(vlan=10) / INNER."""

from __future__ import annotations

from typing import ClassVar

from scapy.fields import BitField, XLongField
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, bind_layers

from xdp_erm_py.program.compiler import MOST_COMPARED
from xdp_erm_py.program.reference import Session
from xdp_erm_py.shared import ERM_DEFAULT_PORT


class ERM(Packet):
    name = "HP ERM"
    fields_desc: ClassVar = [
        XLongField("unknown", 0),
        BitField("unknown_high", 0, 8),
        BitField("priority", 2, 3),  # raw: 2 is PCP 0
        BitField("cfi", 0, 1),
        BitField("vlan", 10, 12),
        BitField("is_tagged", 0, 1),
        BitField("unknown_low", 0, 7),
    ]


bind_layers(UDP, ERM, dport=ERM_DEFAULT_PORT)
bind_layers(ERM, Ether)

SWITCH, SENSOR = "198.51.100.1", "192.0.2.1"
SESSION = Session(SWITCH, 5)
#: Addresses that no frame has. With them an allow list is looked up, not compared one by one.
ELSEWHERE = tuple(f"10.77.{number}.77" for number in range(MOST_COMPARED))

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")

# The mirrored frame: its addresses, and what it carries.
MACS = Ether(src="02:00:00:00:00:0a", dst="02:00:00:00:00:0b")
PING = IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(seq=1) / b"0123456789abcdef"
INNER = MACS / PING


def ip(**fields: object) -> IP:
    """The outer IPv4 header as the switch sends it, but for `fields`."""
    return IP(**{"src": SESSION.source, "dst": SENSOR, "flags": "DF", "ttl": 85, **fields})


def udp(**fields: object) -> UDP:
    """The outer UDP header as the switch sends it, but for `fields`."""
    return UDP(**{"sport": SESSION.id, "dport": ERM_DEFAULT_PORT, "chksum": 0, **fields})


def wrap(inner: Packet | bytes, **fields: int) -> Packet:
    """One level of ERM around `inner`; the fields are the ERM header's."""
    return ETHER / ip() / udp() / ERM(**fields) / inner
