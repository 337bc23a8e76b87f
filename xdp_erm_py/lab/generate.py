"""`xdp-erm generate`: ERM traffic made in the kernel, to see what a sensor takes.

Only a veth interface is taken without --force, as the frames would go out to a real network. They come out at its peer
only if that has an XDP program or GRO; the kernel drops them otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .. import shared
from ..errors import UsageError, XdpErmError
from ..kernel import bpf, ethtool
from ..kernel.links import Link, Links
from ..kernel.privileges import require_to_change
from ..printable import say
from ..program import compiler
from ..program.module import Module
from ..program.reference import PROTOCOL_UDP, Session
from .traffic import MOST_FLOWS, encapsulate, internet_checksum, ipv4_header

PROGRAM, SOURCE = "generate", "generate.c"
SWITCH = Session("198.51.100.1", 1)

# Where things stand in the frame: Ethernet 14, IPv4 20, UDP 8, ERM 12, then the mirrored frame.
OUTER_SOURCE_PORT, MIRRORED = 34, 54
# The last 16 bits of the session's id by encapsulation, and the number of ERSPAN's frames.
SESSION = {"erm": OUTER_SOURCE_PORT, "erspan": 44, "gre": 40, "vxlan": 47, "geneve": 47, "tzsp": OUTER_SOURCE_PORT}
NUMBER = {"erspan": 38}
MOST_SESSIONS = {"erspan": 1023}
SHORTEST, LONGEST = 64, 1514  # bytes of the mirrored frame: IPv6 and UDP headers fit
CHUNK = 65536  # frames in one system call
TICKS = 10  # calls in a second where a rate is asked for; each takes some 20 ms to prepare


class Layout(NamedTuple):
    """A frame of flow 0, and where its flow and the checksum over that stand."""

    frame: bytes
    headers: int
    flow: int
    checksum: int
    session: int = OUTER_SOURCE_PORT
    """The last 16 bits of its id."""
    number: int | None = None
    """Of the frame in its session, where it has one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("interface", metavar="IFACE", help="a veth interface; the frames come out at its peer")
    parser.add_argument("--flows", type=from_to(1, MOST_FLOWS), default=2000, metavar="N", help="default 2000")
    parser.add_argument("--sessions", type=from_to(1, 65535), default=1, metavar="N", help="default 1")
    parser.add_argument("--encapsulation", choices=shared.ENCAPSULATIONS, default="erm", metavar="NAME",
                        help=f"{', '.join(shared.ENCAPSULATIONS)} (default erm)")
    parser.add_argument("--size", type=from_to(SHORTEST, LONGEST), default=512, metavar="BYTES",
                        help=f"of the mirrored frame, {SHORTEST} to {LONGEST} (default 512)")
    parser.add_argument("--vlan", type=from_to(0, 4094), default=0, metavar="ID", help="default 0: none")
    parser.add_argument("--rate", type=from_to(1, 10**8), metavar="PPS", help="default: as fast as it goes")
    parser.add_argument("--ipv6", action="store_true", help="IPv6 in the mirrored frames, not IPv4")
    parser.add_argument("--force", action="store_true", help="send into an interface that is no veth")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--packets", type=from_to(1, 10**12), metavar="N", help="default 100000")
    length.add_argument("--seconds", type=from_to(1, 86400), metavar="S", help="instead of --packets")


def run(args: argparse.Namespace) -> int:
    require_to_change()
    link = _link(args.interface, args.force)
    if args.sessions > MOST_SESSIONS.get(args.encapsulation, args.sessions):
        raise UsageError(f"--sessions {args.sessions}: {args.encapsulation} has {MOST_SESSIONS[args.encapsulation]}")
    layout = layout_of(args.size, args.vlan, args.ipv6, args.encapsulation)
    packets = None if args.seconds else args.packets or 100_000
    before = _transmitted(link)
    handed, seconds = _generate(link.index, layout, args, packets)
    sent = _transmitted(link) - before
    say(f"{link.name}: sent {sent} of {handed} frames ({len(layout.frame)} bytes, {args.flows} flows, "
        f"{args.sessions} sessions) in {seconds:.2f} s, {sent / seconds:.0f} a second")
    if sent < handed:
        raise XdpErmError(f"{link.name}: {handed - sent} frames were dropped: the peer has neither an XDP program "
                          "nor GRO, or it does not keep up (then lower --rate)")
    return 0


def layout_of(size: int, vlan: int, ipv6: bool, encapsulation: str = "erm") -> Layout:
    """The frame of flow 0 in session 0, `size` bytes of it mirrored: UDP from a client whose address ends in the
    flow's number."""
    ports = struct.pack("!HH", 40000, 9000)
    length = size - 14 - (40 if ipv6 else 20)
    udp = ports + struct.pack("!HH", length, 0) + bytes(length - 8)
    if ipv6:
        addresses = b"".join(socket.inet_pton(socket.AF_INET6, text) for text in ("2001:db8:1::", "2001:db8:2::1"))
        checksum = internet_checksum(addresses + struct.pack("!II", length, PROTOCOL_UDP) + udp)
        packet = struct.pack("!IHBB", 6 << 28, length, PROTOCOL_UDP, 64) + addresses
        packet += udp[:6] + struct.pack("!H", checksum) + udp[8:]
        where = 40 + 8, 8 + 14, 40 + 6
    else:
        packet = ipv4_header(socket.inet_aton("10.0.0.0"), socket.inet_aton("192.168.0.1"), PROTOCOL_UDP, length) + udp
        where = 20 + 8, 12 + 2, 10
    ethertype = "86dd" if ipv6 else "0800"
    mirrored = bytes.fromhex(f"020000000102 020000000101 {ethertype}") + packet
    frame = encapsulate(mirrored, vlan, vlan != 0, SWITCH._replace(id=0, encapsulation=encapsulation))
    inner_ip = len(frame) - len(packet)
    headers, flow, checksum = (inner_ip + offset for offset in where)
    return Layout(frame, headers, flow, checksum, SESSION[encapsulation], NUMBER.get(encapsulation))


def _generate(ifindex: int, layout: Layout, args: argparse.Namespace, packets: int | None) -> tuple[int, float]:
    """Sends `packets`, or for as long as asked; how many were handed to the interface, and in how many seconds."""
    try:
        with loaded(ifindex, layout, args.flows, args.sessions) as program:
            handed, start = 0, time.monotonic()
            chunk = min(CHUNK, max(1, args.rate // TICKS)) if args.rate else CHUNK
            while handed < packets if packets else time.monotonic() - start < args.seconds:
                count = min(chunk, packets - handed) if packets else chunk
                bpf.run_live(program, layout.frame, count)
                handed += count
                if args.rate:
                    time.sleep(max(0.0, start + handed / args.rate - time.monotonic()))
            return handed, time.monotonic() - start
    except OSError as error:
        raise XdpErmError(f"{args.interface}: the kernel does not run the generator: {error.strerror} "
                          "(live frames need Linux 5.18)") from None


@contextlib.contextmanager
def loaded(ifindex: int, layout: Layout, flows: int, sessions: int) -> Iterator[int]:
    """The generator's descriptor: a test run of it with live frames sends as many. OSError: the kernel refuses it."""
    defines = {"IFINDEX": ifindex, "FLOWS": flows, "SESSIONS": sessions, "HEADERS": layout.headers,
               "SESSION": layout.session, "FLOW": layout.flow, "CHECKSUM": layout.checksum}
    if layout.number is not None:
        defines["NUMBER"] = layout.number
    options = [f"-DGENERATE_{name}={value}" for name, value in defines.items()]
    with Module(compiler.compiled(compiler.source(SOURCE), options)) as module:
        generator = struct.pack(f"=Q{layout.headers}s", 0, layout.frame)
        generator = generator.ljust(-(-len(generator) // 8) * 8, b"\0")  # as C pads it
        bpf.update(module.maps["generator"], bytes(4), generator)
        with bpf.descriptor(module.load_xdp(PROGRAM)) as program:
            yield program


def _link(name: str, force: bool) -> Link:
    with Links() as links:
        link = links.find(name)
    if link.kind != "veth" and not force:
        raise UsageError(f"{name}: {link.kind or 'no virtual interface'}, not veth: frames would go out to the network "
                         "or to nowhere; --force sends them")
    return link


def _transmitted(link: Link) -> int:
    """Frames that the interface sent; of veth only those of XDP programs, as the kernel may send meanwhile, too."""
    try:
        statistics = ethtool.statistics(link.name)
    except OSError:
        statistics = {}
    of_xdp = [count for what, count in statistics.items() if re.fullmatch(r"tx_queue_\d+_xdp_xmit", what)]
    if of_xdp:
        return sum(of_xdp)
    with Links() as links:
        return links.statistics(link)["tx_packets"]


def from_to(least: int, most: int) -> Callable[[str], int]:
    """A parser of an option's number."""
    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
        return int(text)
    return parse
