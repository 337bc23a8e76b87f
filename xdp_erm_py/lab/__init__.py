"""`xdp-erm lab`: a mirroring switch and a sensor on this machine, run without and with xdp-erm.

Switch and sensor are network namespaces joined by a veth pair. They have no name and die with the process, so that
nothing of the machine's own network is touched and nothing is left behind.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pyroute2.netlink.exceptions import NetlinkError

from .. import shared
from ..errors import UsageError, XdpErmError
from ..interface import loader, stats
from ..settings import InterfaceConfig
from .cable import SENSOR_INTERFACE, Cable
from .capture import captured
from .fanout import MOST_MEMBERS, FanoutWorkers, Result
from .generate import from_to
from .report import print_report
from .traffic import MOST_FLOWS, SESSIONS, Packet, synthetic
from .zeek import ZeekWorkers

FLOWS, PACKETS = 2000, 100_000

# Packets on the cable at a time: below the 256 that a veth's ring holds, so that nothing overflows.
WINDOW = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pcap", type=Path, metavar="FILE", help="replay this capture instead of synthetic traffic")
    parser.add_argument("--workers", type=from_to(1, MOST_MEMBERS), default=4, metavar="N",
                        help="fanout members (default 4)")
    parser.add_argument("--flows", type=from_to(1, MOST_FLOWS), metavar="N",
                        help=f"synthetic flows (default {FLOWS})")
    parser.add_argument("--sessions", type=int, choices=range(1, len(SESSIONS) + 1), metavar="N",
                        help=f"mirror sessions that carry them, 1 to {len(SESSIONS)} (default {len(SESSIONS)})")
    parser.add_argument("--encapsulation", choices=shared.ENCAPSULATIONS, metavar="NAME",
                        help=f"in which it is mirrored: {', '.join(shared.ENCAPSULATIONS)} (default erm; of a capture "
                             "all are taken)")
    parser.add_argument("--zeek", action="store_true", help="real Zeek workers instead of counting ones")
    parser.add_argument("--packets", type=from_to(1, 10**12), metavar="N",
                        help=f"packets of all flows (default {PACKETS})")


def run(args: argparse.Namespace) -> int:
    """Run the lab; return 0 if every claim held, 1 if not."""
    without, with_xdp_erm, counters = _both_runs(_traffic(args), _config(args), args.workers, args.zeek)
    print_report(without, with_xdp_erm, counters)
    faults = find_faults(without, with_xdp_erm, counters)
    for fault in faults:
        print(f"xdp-erm lab: {fault}", file=sys.stderr)
    return 1 if faults else 0


def find_faults(without: Result, with_xdp_erm: Result, counters: dict[str, dict[str, int]]) -> list[str]:
    """Say which of the lab's claims did not hold."""
    faults = []
    for name, result in (("without xdp-erm", without), ("with xdp-erm", with_xdp_erm)):
        if result.missing:
            faults.append(f"{name}, {result.missing} of {result.sent} packets did not arrive as they should")
        if result.unexpected:
            faults.append(f"{name}, {result.unexpected} frames arrived that should not: altered, or more than once")
    if with_xdp_erm.unlogged_flows:
        faults.append(f"with xdp-erm, {with_xdp_erm.unlogged_flows} mirrored flows are in no conn.log")
    if with_xdp_erm.split_flows:
        faults.append(f"with xdp-erm, {with_xdp_erm.split_flows} flows were split over workers")
    verdicts = sum(counters[verdict]["packets"] for verdict in shared.VERDICTS)
    if verdicts != with_xdp_erm.sent:
        faults.append(f"xdp-erm counted {verdicts} packets, {with_xdp_erm.sent} were sent")
    decapsulated = counters["decapsulated"]["packets"]
    if decapsulated != with_xdp_erm.mirrored:
        faults.append(f"xdp-erm counted {decapsulated} packets as decapsulated, {with_xdp_erm.mirrored} should be")
    return faults


def _config(args: argparse.Namespace) -> InterfaceConfig:
    if args.encapsulation:
        return InterfaceConfig(encapsulations=(args.encapsulation,))
    return InterfaceConfig(encapsulations=shared.ENCAPSULATIONS) if args.pcap else InterfaceConfig()


def _traffic(args: argparse.Namespace) -> Callable[[], Iterator[Packet]]:
    """Return what starts the traffic from its beginning, for each run anew."""
    if args.pcap:
        config = _config(args)
        if args.flows or args.packets or args.sessions:
            raise UsageError("--flows, --packets and --sessions are for synthetic traffic: leave them out with --pcap")
        if args.pcap.is_file():
            return lambda: captured(args.pcap, config)
        packets = list(captured(args.pcap, config))  # a pipe gives it once, and there are two runs
        return lambda: iter(packets)
    return lambda: synthetic(args.flows or FLOWS, args.packets or PACKETS, args.sessions or len(SESSIONS),
                             args.encapsulation or "erm")


def _both_runs(
    traffic: Callable[[], Iterator[Packet]], config: InterfaceConfig, worker_count: int, zeek: bool
) -> tuple[Result, Result, dict[str, dict[str, int]]]:
    def workers_expecting(frame: str) -> FanoutWorkers | ZeekWorkers:
        if zeek:
            return ZeekWorkers(cable, worker_count)
        return FanoutWorkers(cable, worker_count, operator.attrgetter(frame))

    with _cable() as cable:
        with workers_expecting("sent") as workers:
            mirror(cable, traffic(), workers)
            without = workers.finish()
        with cable.sensor.entered():
            for line in loader.attach(SENSOR_INTERFACE, config):
                print(line)
        cable.wait_for_carrier()
        with workers_expecting("mirrored") as workers:
            mirror(cable, traffic(), workers)
            with_xdp_erm = workers.finish()
        with cable.sensor.entered():
            counters = stats.snapshot(SENSOR_INTERFACE)[0]["counters"]
    return without, with_xdp_erm, counters


def mirror(cable: Cable, traffic: Iterable[Packet], workers: FanoutWorkers | ZeekWorkers) -> None:
    """Send the traffic at the pace at which the workers take it, to its end or until nothing arrives any more."""
    packets = iter(traffic)
    while window := list(itertools.islice(packets, WINDOW)):
        for packet in window:
            cable.send(packet.sent)
        if not workers.take(window):
            return


def _cable() -> Cable:
    try:
        return Cable()
    except OSError as error:
        if error.errno == errno.EPERM:
            raise XdpErmError("the lab makes network namespaces, which needs root: run it with sudo") from None
        raise XdpErmError(f"network namespaces cannot be made here: {error.strerror}") from None
    except NetlinkError as error:
        raise XdpErmError(f"no veth pair can be made here: {os.strerror(error.code)}") from None
