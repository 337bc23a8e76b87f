"""Spreading over CPUs: which CPU a frame goes to, in which order, what is lost, and what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import operator
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from frames import ETHER, MACS, ip, udp, wrap
from program import XDP_PASS, XDP_REDIRECT, Program
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import ARP, LLC, Dot1AD, Dot1Q
from scapy.packet import Packet, Raw
from shell import shell

from xdp_erm_py import doctor, lab, shared
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import loader, spread, stats, topology
from xdp_erm_py.interface.ours import find
from xdp_erm_py.kernel import bpf, rps, sysfs, version
from xdp_erm_py.kernel.links import Link, Links
from xdp_erm_py.kernel.netlink import Refused
from xdp_erm_py.lab import cable as cables
from xdp_erm_py.lab import generate, traffic
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, SWITCH_INTERFACE, Cable
from xdp_erm_py.lab.fanout import PACKET_STATISTICS, SO_RCVBUFFORCE, SOL_PACKET, FanoutWorkers
from xdp_erm_py.program import compiler
from xdp_erm_py.settings import InterfaceConfig, cpu_list, parse_cpu_list

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[1] / "bin" / "xdp-erm")]
TIMEOUT = 60  # seconds
CPUS = tuple(sorted(os.sched_getaffinity(0)))[:2]
CPUMAP = InterfaceConfig(spread="cpumap", spread_cpus=CPUS)
RPS = InterfaceConfig(spread="rps", spread_cpus=CPUS)
CONVERSATIONS = 60  # that all of them are together by chance: one in 2 to the power of this

needs_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: nothing to spread over")
pytestmark = needs_cpus


# Which CPU


class Steering:
    """The program with two CPUs to hand frames to, in test runs: it decides, and no frame goes anywhere."""

    def __init__(self, settings: InterfaceConfig, empty: bool = False) -> None:
        self._program = Program(settings, variant=compiler.Variant(CPUS))
        if empty:
            for cpu in CPUS:  # a queue of no frames is none
                self._program.maps["cpus"].update(struct.pack("=I", cpu), struct.pack("=Ii", 0, 0))

    def run(self, frame: Packet | bytes) -> tuple[int, int | None]:
        """What the program says, and the CPU it has counted the frame for."""
        before = self._counted()
        action, _ = bpf.test_run(self._program.fd, bytes(frame))
        moved = [cpu for cpu, (then, now) in enumerate(zip(before, self._counted())) if now > then]
        assert len(moved) <= 1
        return action, moved[0] if moved else None

    def cpu(self, inner: Packet | bytes) -> int:
        action, cpu = self.run(wrap(inner))
        assert action == XDP_REDIRECT and cpu in CPUS
        return cpu

    def _counted(self) -> list[int]:
        steered = self._program.maps["steered"]
        return [sum(struct.unpack("=Q", value)[0] for value in steered.lookup(struct.pack("=I", cpu)))
                for cpu in range(bpf.possible_cpus()[-1] + 1)]

    def close(self) -> None:
        self._program.__exit__()


@pytest.fixture(scope="module")
def steering(xdp: None) -> Iterator[Steering]:
    with contextlib.closing(Steering(CPUMAP)) as made:
        yield made


@pytest.fixture(scope="module")
def steering_by_ports(xdp: None) -> Iterator[Steering]:
    with contextlib.closing(Steering(InterfaceConfig(spread="cpumap", spread_ports=True))) as made:
        yield made


def pairs(family: type[Packet]) -> Iterator[tuple[str, str]]:
    """Addresses of conversations, always the same."""
    draw = random.Random(1)
    for _ in range(CONVERSATIONS):
        if family is IP:
            yield tuple(socket.inet_ntoa(draw.randbytes(4)) for _ in range(2))
        else:
            yield tuple(socket.inet_ntop(socket.AF_INET6, draw.randbytes(16)) for _ in range(2))


BOTH = pytest.mark.parametrize("family", [IP, IPv6])


@pytest.mark.check
@BOTH
@pytest.mark.parametrize("tags", [(), (Dot1Q(vlan=5),), (Dot1AD(vlan=5), Dot1Q(vlan=6))], ids=["", "802.1Q", "QinQ"])
def test_both_directions_stay_together(steering, steering_by_ports, family, tags):
    for (client, server), program in itertools.product(pairs(family), (steering, steering_by_ports)):
        there = MACS
        for tag in tags:
            there = there / tag
        back = there / family(src=server, dst=client) / TCP(sport=443, dport=50000)
        there = there / family(src=client, dst=server) / TCP(sport=50000, dport=443)
        assert program.cpu(there) == program.cpu(back)


@BOTH
def test_conversations_are_shared_evenly(steering, family):
    draw = random.Random(2)
    addresses = [draw.randbytes(8 if family is IP else 32) for _ in range(600)]
    # As in a real network: clients next to each other, and one server.
    addresses += [bytes(2) + struct.pack("!H", number) + bytes([10, 0, 0, 1]) if family is IP else
                  bytes(14) + struct.pack("!H", number) + bytes(15) + b"\1" for number in range(600)]
    length = 4 if family is IP else 16
    kind = socket.AF_INET if family is IP else socket.AF_INET6
    for half in (addresses[:600], addresses[600:]):
        cpus = [steering.cpu(MACS / family(src=socket.inet_ntop(kind, both[:length]),
                                           dst=socket.inet_ntop(kind, both[length:])) / UDP()) for both in half]
        assert 220 < cpus.count(CPUS[0]) < 380  # 6.5 standard deviations


def test_the_protocol_counts(steering):
    differing = [steering.cpu(MACS / IP(src=here, dst=there) / TCP()) != steering.cpu(MACS / IP(src=here, dst=there) /
                                                                                     UDP())
                 for here, there in pairs(IP)]
    assert any(differing)


@BOTH
def test_ports_count_only_where_they_shall(steering, steering_by_ports, family):
    here, there = next(pairs(family))
    for program, cpus in ((steering, 1), (steering_by_ports, 2)):
        assert len({program.cpu(MACS / family(src=here, dst=there) / UDP(sport=port, dport=53))
                    for port in range(1024, 1024 + CONVERSATIONS)}) == cpus


def test_fragments_stay_together(steering):
    for here, there in pairs(IP):
        whole = IP(src=here, dst=there) / UDP() / Raw(bytes(2500))
        assert len({steering.cpu(MACS / packet) for packet in (whole, *fragment(whole, 1000))}) == 1


def test_fragments_have_no_ports(steering_by_ports):
    """But the first of them, by which it must not go."""
    for here, there in pairs(IP):
        first, *others = fragment(IP(src=here, dst=there) / UDP(sport=50000, dport=53) / Raw(bytes(2500)), 1000)
        assert len({steering_by_ports.cpu(MACS / packet) for packet in (first, *others)}) == 1


def test_ipv6_fragments_stay_together(steering):
    for here, there in pairs(IPv6):
        header = IPv6(src=here, dst=there)
        pieces = [header / IPv6ExtHdrFragment(nh=17, m=more, offset=offset) / Raw(bytes(80))
                  for more, offset in ((1, 0), (1, 10), (0, 20))]
        assert len({steering.cpu(MACS / packet) for packet in (header / UDP() / Raw(bytes(80)), *pieces)}) == 1


@pytest.mark.parametrize("kind", [3, 4, 5, 11, 12])
def test_icmp_errors_follow_what_they_are_about(steering, steering_by_ports, kind):
    for (here, there), program in itertools.product(pairs(IP), (steering, steering_by_ports)):
        about = IP(src=here, dst=there) / UDP(sport=50000, dport=53)
        error = IP(src="192.0.2.254", dst=here) / ICMP(type=kind) / about
        assert program.cpu(MACS / error) == program.cpu(MACS / about)


@pytest.mark.parametrize("kind", [ICMPv6PacketTooBig, ICMPv6TimeExceeded])
def test_icmpv6_errors_follow_what_they_are_about(steering, steering_by_ports, kind):
    for (here, there), program in itertools.product(pairs(IPv6), (steering, steering_by_ports)):
        about = IPv6(src=here, dst=there) / TCP(sport=50000, dport=443)
        error = IPv6(src="2001:db8::fe", dst=here) / kind() / about
        assert program.cpu(MACS / error) == program.cpu(MACS / about)


@pytest.mark.parametrize("family, echo", [(IP, ICMP), (IPv6, ICMPv6EchoRequest)], ids=["ICMP", "ICMPv6"])
def test_what_an_echo_carries_does_not_count(steering, family, echo):
    quoted = bytes(IP(src="10.9.8.7", dst="10.6.5.4") / UDP() if family is IP else
                   IPv6(src="2001:db8::7", dst="2001:db8::8") / UDP())
    for here, there in pairs(family):
        asked = MACS / family(src=here, dst=there) / echo()
        assert len({steering.cpu(asked / Raw(data)) for data in (b"", quoted)}) == 1


def test_a_fragment_is_no_icmp_error_whatever_it_begins_with(steering):
    error = bytes(ICMP(type=3) / IP(src="10.9.8.7", dst="10.6.5.4") / UDP())
    for here, there in pairs(IP):
        pieces = [IP(src=here, dst=there, proto=1, frag=offset, flags=flags) / Raw(error)
                  for offset, flags in ((100, ""), (50, "MF"))]
        assert len({steering.cpu(MACS / packet) for packet in (IP(src=here, dst=there) / ICMP(), *pieces)}) == 1


def test_what_is_not_ip_goes_to_one_cpu(steering):
    draw = random.Random(3)
    others = [MACS / ARP(pdst=f"10.0.0.{number}") for number in range(CONVERSATIONS)]
    others += [MACS / LLC() / draw.randbytes(50) for _ in range(CONVERSATIONS)]
    others += [bytes(MACS / IP(src=here, dst=there))[:14 + 19] for here, there in pairs(IP)]
    assert len({steering.cpu(frame) for frame in others}) == 1


def test_nested_erm_goes_by_the_innermost_flow(xdp):
    settings = InterfaceConfig(spread="cpumap", depth=2, sources=("0.0.0.0/0",))
    with contextlib.closing(Steering(settings)) as steering:
        cpus = [steering.cpu(MACS / IP(src=here, dst=there) / UDP()) for here, there in pairs(IP)]
        nested = [steering.cpu(wrap(MACS / IP(src=here, dst=there) / UDP())) for here, there in pairs(IP)]
    assert cpus == nested and len(set(cpus)) == 2


@pytest.mark.parametrize("frame", [
    ETHER / ARP(), ETHER / ip() / TCP(), ETHER / ip() / udp(dport=53), ETHER / ip() / udp() / b"short",
    ETHER / ip(frag=1) / udp()], ids=["ARP", "TCP", "DNS", "truncated", "fragment"])
def test_what_is_not_decapsulated_stays(steering, frame):
    assert steering.run(frame) == (XDP_PASS, None)


def test_an_empty_map_passes_frames_on(xdp):
    with contextlib.closing(Steering(CPUMAP, empty=True)) as program:
        for here, there in pairs(IP):
            assert program.run(wrap(MACS / IP(src=here, dst=there))) == (XDP_PASS, None)


# On a cable


def attached(settings: InterfaceConfig) -> list[str]:
    return loader.attach(SENSOR_INTERFACE, settings)


def interface() -> dict:
    found, = stats.snapshot(SENSOR_INTERFACE)
    return found


def wait_until_arrived(frames: int) -> dict:
    """The interface's counters when that many have been handed over and none waits any more."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        found = interface()
        if sum(cpu["steered"] for cpu in found["cpus"].values()) == frames and \
                not any(cpu["dropped"] for cpu in found["cpus"].values()):
            return found
        assert time.monotonic() < deadline, found["cpus"]
        time.sleep(0.02)


@pytest.mark.parametrize("vlan", ["restore", "strip"])
@pytest.mark.parametrize("settings", [
    CPUMAP, RPS, InterfaceConfig(spread="cpumap", spread_cpus=CPUS, mode="generic", isolate=False),
    InterfaceConfig(spread="cpumap", spread_cpus=CPUS, isolate=False)],
    ids=["cpumap", "rps", "generic cpumap", "cpumap without isolation"])
def test_every_frame_arrives_as_it_was_mirrored(cable, settings, vlan):
    attached(dataclasses.replace(settings, vlan=vlan))
    cable.wait_for_carrier()
    packets = list(traffic.synthetic(100, 3000)) if vlan == "restore" else [
        traffic.Packet(bytes(wrap(MACS / IP(src=here, dst=there) / UDP() / Raw(bytes(number)))),
                       bytes(MACS / IP(src=here, dst=there) / UDP() / Raw(bytes(number))))
        for number, (here, there) in enumerate(pairs(IP))]
    with FanoutWorkers(cable, 2, operator.attrgetter("mirrored")) as workers:
        lab.mirror(cable, packets, workers)
        result = workers.finish()
    assert (result.missing, result.unexpected, result.identical) == (0, 0, len(packets))
    decapsulated = interface()["counters"]["decapsulated"]["packets"]
    assert decapsulated >= CONVERSATIONS
    if settings.spread == "cpumap":
        found = wait_until_arrived(decapsulated)
        assert set(found["cpus"]) == {str(cpu) for cpu in CPUS}


def receive(tap: socket.socket, count: int) -> list[bytes]:
    tap.settimeout(TIMEOUT)
    return [tap.recv(1 << 16) for _ in range(count)]


@contextlib.contextmanager
def tapped() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:  # 3: ETH_P_ALL
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        tap.bind((SENSOR_INTERFACE, 0))
        yield tap


@pytest.mark.parametrize("settings", [CPUMAP, RPS], ids=["cpumap", "rps"])
@pytest.mark.parametrize("swaps", [0, 6])
def test_the_order_within_a_flow_is_kept(cable, settings, swaps):
    """Over swaps as well, since what waits in the queues stays in them."""
    attached(settings)
    cable.wait_for_carrier()
    flows = [MACS / IP(src=here, dst=there) / UDP(chksum=0) / b"order" for here, there in pairs(IP)]
    frames = [bytes(wrap(flow, vlan=0)) for flow in flows]
    rounds, at_once = 300, 10  # more than the queues and the tap hold would be lost on a busy machine
    numbers: dict[bytes, list[int]] = {}
    with tapped() as tap:
        for number in range(rounds):
            if swaps and number % (rounds // swaps) == 0:
                attached(dataclasses.replace(settings, sessions=number // (rounds // swaps) % 2 == 1))
            for frame in frames:
                cable.send(frame[:-5] + struct.pack("!xI", number))
            if (number + 1) % at_once == 0:
                for frame in receive(tap, at_once * len(frames)):
                    numbers.setdefault(frame[26:34], []).append(struct.unpack("!I", frame[-4:])[0])
    assert len(numbers) == len(frames)
    assert all(found == list(range(rounds)) for found in numbers.values())


def test_the_queues_stay_over_swaps_that_change_nothing_of_them(cable):
    """Frames that wait in an old queue would be overtaken otherwise."""
    def queues() -> int:
        with Links() as links:
            return find(links, SENSOR_INTERFACE).maps["cpus"]

    attached(CPUMAP)
    first = queues()
    attached(dataclasses.replace(CPUMAP, sessions=False))
    assert queues() == first
    attached(dataclasses.replace(CPUMAP, spread_queue=64))
    assert queues() != first


def test_segments_are_not_merged(cable):
    attached(CPUMAP)
    cable.wait_for_carrier()
    segments = [bytes(MACS / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(seq=1000 * number, flags="A") / Raw(bytes(1000)))
                for number in range(200)]
    with tapped() as tap:
        for segment in segments:
            cable.send(bytes(wrap(segment, vlan=0)))
        assert receive(tap, len(segments)) == segments


def test_what_full_queues_drop_is_counted(cable):
    """Frames come faster than a queue of one frame can take them; those that arrive are counted at a tap."""
    attached(dataclasses.replace(CPUMAP, spread_queue=1))
    cable.wait_for_carrier()
    with tapped() as tap:
        with cable.switch.entered():
            with Links() as links:
                index = links.find(SWITCH_INTERFACE).index
            layout = generate.layout_of(512, 0, False)
            with generate.loaded(index, layout, 2000, 1) as program:
                bpf.run_live(program, layout.frame, 200_000)
        deadline, seen = time.monotonic() + TIMEOUT, -1
        arrived = 0
        while arrived != seen and time.monotonic() < deadline:
            time.sleep(0.3)
            seen = arrived
            # Since the last call; those that found no room in the socket's buffer are among them.
            packets, _ = struct.unpack("=II", tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
            arrived += packets
    found = interface()
    steered = sum(cpu["steered"] for cpu in found["cpus"].values())
    dropped = sum(cpu["dropped"] for cpu in found["cpus"].values())
    assert steered == found["counters"]["decapsulated"]["packets"] > 0
    assert dropped == steered - arrived > 0
    said = subprocess.run([*COMMAND, "stats", SENSOR_INTERFACE], capture_output=True, text=True, check=True,
                          timeout=TIMEOUT).stdout
    assert "to CPU" in said and "dropped" in said


@pytest.mark.parametrize("steered, arrived, dropped", [
    ([100, 50, 0], [90, 50, 0], {"0": 10, "1": 0}),
    ([100, 50, 0], [79, 71, 0], {"0": 0, "1": 0}),  # CPU 0 went offline, 1 worked off its queue
    ([100, 50, 0], [79, 66, 0], {"0": 5, "1": 0}),
    ([100, 50, 0], [79, 50, 21], {"0": 0, "1": 0}),  # another did, that gets no frames of its own
    ([100, 50, 0], [70, 40, 35], {"0": 0, "1": 5}),
    ([0, 0, 0], [0, 0, 0], {}),
], ids=itertools.count())
def test_what_other_cpus_have_worked_off_is_not_dropped(steered, arrived, dropped):
    found = stats._dropped(dict(enumerate(steered)), dict(enumerate(arrived)))
    assert {cpu: frames["dropped"] for cpu, frames in found.items()} == dropped
    assert sum(dropped.values()) == sum(steered) - sum(arrived)
    assert {cpu: frames["steered"] for cpu, frames in found.items()} == {
        str(cpu): frames for cpu, frames in enumerate(steered) if frames}


@pytest.mark.parametrize("listed, numbers", [("0", (0,)), ("0-3", (0, 1, 2, 3)), ("0,2-3,8", (0, 2, 3, 8))])
def test_cpus_that_are_possible_may_have_gaps(tmp_path, monkeypatch, listed, numbers):
    """A per-CPU map has values for those that are, one after another."""
    (tmp_path / "possible").write_text(f"{listed}\n")
    monkeypatch.setattr(bpf, "_POSSIBLE", tmp_path / "possible")
    assert bpf.possible_cpus() == numbers


def test_counters_go_on_over_swaps_to_other_cpus(cable):
    attached(CPUMAP)
    cable.wait_for_carrier()
    frames = [bytes(wrap(MACS / IP(src=here, dst=there))) for here, there in pairs(IP)]
    for frame in frames:
        cable.send(frame)
    wait_until_arrived(len(frames))
    attached(InterfaceConfig(spread="cpumap", spread_cpus=CPUS[:1]))
    for frame in frames:
        cable.send(frame)
    before = wait_until_arrived(2 * len(frames))
    assert before["cpus"][str(CPUS[1])]["steered"] < len(frames) < before["cpus"][str(CPUS[0])]["steered"]


# Receive packet steering


def masks() -> dict[str, str]:
    with Links() as links:
        return rps.masks(links.find(SENSOR_INTERFACE))


@pytest.mark.check
def test_rps_comes_and_goes(cable):
    before = masks()
    said = attached(RPS)
    wanted = rps.mask_of(CPUS)
    assert f"{SENSOR_INTERFACE}: set receive packet steering of rx-0 to {wanted}" in said
    assert all(rps.same(mask, wanted) for mask in masks().values())
    assert not [line for line in attached(RPS) if "steering" in line]
    assert f"{SENSOR_INTERFACE}: receive packet steering of rx-0 is as before" in \
        loader.detach(SENSOR_INTERFACE)
    assert masks() == before


def test_more_queues_than_anybody_has(cable):
    """What was changed is a part of the program's state, which has room for it."""
    shell("ip link add many mtu 3500 numrxqueues 600 type veth peer name end mtu 3500; ip link set many up")
    with Links() as links:
        before = rps.masks(links.find("many"))
    loader.attach("many", RPS)
    with Links() as links:
        assert len(find(links, "many").state["nic"]["rps"]) == 600
    loader.detach("many")
    with Links() as links:
        assert rps.masks(links.find("many")) == before


def test_a_mask_that_was_there_comes_back(cable):
    with Links() as links:
        rps.write(links.find(SENSOR_INTERFACE), {"rx-0": rps.mask_of(CPUS[1:])})
    before = masks()
    attached(RPS)
    attached(InterfaceConfig(spread="rps", spread_cpus=CPUS[:1]))
    assert masks() != before
    attached(InterfaceConfig())
    assert masks() == before
    attached(RPS)
    loader.detach(SENSOR_INTERFACE)
    assert masks() == before


def test_a_mask_that_somebody_else_has_set_since_stays(cable):
    attached(RPS)
    with Links() as links:
        rps.write(links.find(SENSOR_INTERFACE), {"rx-0": rps.mask_of(CPUS[1:])})
    loader.detach(SENSOR_INTERFACE)
    assert rps.same(masks()["rx-0"], rps.mask_of(CPUS[1:]))


def test_an_attach_that_ends_at_the_mask_is_mended_by_the_next(cable, monkeypatch):
    before = masks()

    def fail(link: Link, wanted: dict[str, str]) -> None:
        write(link, wanted)
        raise KeyboardInterrupt

    write = rps.write
    monkeypatch.setattr(rps, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        attached(RPS)
    monkeypatch.undo()
    assert masks() != before
    loader.detach(SENSOR_INTERFACE)
    assert masks() == before


@pytest.mark.parametrize("cpus, mask", [((0,), "00000001"), ((1, 33), "00000002,00000002"),
                                        ((64,), "00000001,00000000,00000000")])
def test_masks_are_as_the_kernel_writes_them(cpus, mask):
    assert rps.mask_of(cpus) == mask
    assert rps.same(mask, mask.lstrip("0"))
    assert not rps.same(mask, rps.mask_of([2]))


# Jumbo frames


@pytest.fixture
def jumbo(xdp, monkeypatch) -> Iterator[Cable]:
    monkeypatch.setattr(cables, "MTU", 9000)
    with Cable() as cable, cable.sensor.entered():
        yield cable


@pytest.mark.parametrize("settings, mode", [
    (InterfaceConfig(), "native, multi-buffer"), (CPUMAP, "native, multi-buffer"), (RPS, "native, multi-buffer"),
    (InterfaceConfig(mode="generic"), "generic")], ids=["none", "cpumap", "rps", "generic"])
def test_jumbo_frames(jumbo, settings, mode):
    said = attached(settings)
    assert any(f"attached ({mode}, program" in line for line in said)
    assert "already attached" in "\n".join(attached(settings))
    jumbo.wait_for_carrier()
    frames = [bytes(MACS / IP(src=here, dst=there) / UDP() / Raw(os.urandom(size)))
              for (here, there), size in zip(pairs(IP), itertools.cycle((10, 1400, 3000, 3600, 5000, 8800)))]
    with tapped() as tap:
        for frame in frames:
            jumbo.send(bytes(wrap(frame, vlan=0)))
        assert sorted(receive(tap, len(frames))) == sorted(frames)
    assert interface()["counters"]["decapsulated"]["packets"] == len(frames)


@pytest.mark.parametrize("settings", [InterfaceConfig(vlan="strip"), InterfaceConfig(spread="cpumap", vlan="strip")],
                         ids=["none", "cpumap"])
def test_what_follows_a_datagram_is_cut_or_the_frame_stays_as_it_is(jumbo, settings):
    """Some of what is short enough to lie in one piece is cut, none of what is not."""
    attached(settings)
    jumbo.wait_for_carrier()
    mirrored = [bytes(MACS / IP(src="10.0.0.1", dst="10.0.0.2") / UDP() / Raw(os.urandom(size)))
                for size in (100, 6000)]
    sent = [bytes(wrap(frame)) + b"padding" for frame in mirrored]
    with tapped() as tap:
        for frame in sent:
            jumbo.send(frame)
        assert sorted(receive(tap, 2)) == sorted([mirrored[0], sent[1]])
    counted = {name: counter["packets"] for name, counter in interface()["counters"].items() if counter["packets"]}
    assert counted == {"decapsulated": 1, "failed": 1}


def test_after_a_change_of_the_mtu_all_is_seen_again(jumbo):
    """Doctor and status say it before anybody attaches."""
    assert any("attached (native, multi-buffer" in line for line in attached(InterfaceConfig()))
    for namespace, name in ((jumbo.switch, SWITCH_INTERFACE), (jumbo.sensor, SENSOR_INTERFACE)):
        with namespace.entered():
            subprocess.run(["ip", "link", "set", name, "mtu", "1600"], check=True, timeout=TIMEOUT)
    changed = "its MTU was changed from 9000 to 1600"
    with Links() as links:
        assert find(links, SENSOR_INTERFACE).outdated == changed
    said, = (each.text for each in doctor.examine([SENSOR_INTERFACE]) if each.check == "mtu")
    assert said == (f"{changed} since xdp-erm was attached, after which some drivers do not run the program: `xdp-erm "
                    f"attach {SENSOR_INTERFACE}`")
    assert any("swapped the program (native, program" in line for line in attached(InterfaceConfig()))
    assert any("already attached (native, program" in line for line in attached(InterfaceConfig()))
    with Links() as links:
        assert find(links, SENSOR_INTERFACE).outdated is None


def test_after_a_change_of_queues_all_is_seen_again(cable):
    attached(InterfaceConfig())
    subprocess.run(["ethtool", "-L", SENSOR_INTERFACE, "rx", "2", "tx", "2"], check=True, timeout=TIMEOUT)
    with Links() as links:
        assert find(links, SENSOR_INTERFACE).outdated == "its numbers of queues were changed"
    assert any("swapped the program (native, program" in line for line in attached(InterfaceConfig()))
    with Links() as links:
        assert find(links, SENSOR_INTERFACE).outdated is None


def test_headers_in_several_pieces_change_the_mode_at_the_next_attach(jumbo, monkeypatch):
    """Where most frames are so; but not against what is configured."""
    def counted(decapsulated: int, failed: int) -> None:
        found = {name: {"packets": 0, "bytes": 0} for name in shared.COUNTERS}
        found |= {"decapsulated": {"packets": decapsulated, "bytes": 0}, "failed": {"packets": failed, "bytes": 0}}
        monkeypatch.setattr(stats, "counters", lambda _: found)

    def mode(settings: InterfaceConfig) -> str:
        attached(settings)
        with Links() as links:
            return find(links, SENSOR_INTERFACE).mode

    counted(0, 12)
    assert [mode(InterfaceConfig(mode="native")) for _ in range(2)] == ["native", "native"]
    counted(1000, 12)
    assert [mode(InterfaceConfig()) for _ in range(2)] == ["native", "native"]
    counted(0, 12)
    said = attached(InterfaceConfig())
    reason = "the driver has the headers of 12 frames in several pieces of memory"
    assert f"{SENSOR_INTERFACE}: {reason}: using generic mode, which is slower" in said
    assert mode(InterfaceConfig()) == "generic"
    with Links() as links:
        assert find(links, SENSOR_INTERFACE).state["why_generic"] == reason


def mtu_is_too_large(monkeypatch: pytest.MonkeyPatch, modes: tuple[str, ...] = ("native",)) -> None:
    """The driver refuses programs that do not take frames in several pieces, or any in native mode."""
    attach = Links.attach

    def refuse(self, link, program, mode, replaced=None):
        if mode in modes and (modes != ("native",) or not takes_frags(program)):
            raise Refused(errno.EINVAL, "MTU too large")
        attach(self, link, program, mode, replaced)

    loaded: dict[int, bool] = {}

    def takes_frags(program: int) -> bool:
        return loaded[bpf.program_info(program).id]

    load = compiler.Compiled.load

    def remember(self, carried):
        program = load(self, carried)
        loaded[bpf.program_info(program).id] = self._variant.frags
        return program

    monkeypatch.setattr(compiler.Compiled, "load", remember)
    monkeypatch.setattr(Links, "attach", refuse)


def test_an_mtu_that_grew_takes_the_program_that_it_needs(cable, monkeypatch):
    """As virtio's, which accepts the MTU and from then on loses frames in silence."""
    attached(InterfaceConfig())
    subprocess.run(["ip", "link", "set", SENSOR_INTERFACE, "mtu", "9000"], check=True, timeout=TIMEOUT)
    mtu_is_too_large(monkeypatch)
    assert any("swapped the program (native, multi-buffer" in line for line in attached(InterfaceConfig()))
    assert any("already attached (native, program" in line for line in attached(InterfaceConfig()))


def test_an_mtu_that_is_too_large_for_any(cable, monkeypatch):
    """The old program stays where it is."""
    attached(InterfaceConfig())
    before = interface()["program_id"]
    subprocess.run(["ip", "link", "set", SENSOR_INTERFACE, "mtu", "9000"], check=True, timeout=TIMEOUT)
    mtu_is_too_large(monkeypatch, ("native", "generic"))
    with pytest.raises(XdpErmError, match=f"{SENSOR_INTERFACE}: program {before} cannot be replaced: MTU too large"):
        attached(InterfaceConfig())
    assert interface()["program_id"] == before


def test_an_mtu_that_native_mode_takes_again(cable):
    attached(InterfaceConfig(mode="generic"))
    assert not any("native" in line for line in attached(InterfaceConfig()))
    subprocess.run(["ip", "link", "set", SENSOR_INTERFACE, "mtu", "1600"], check=True, timeout=TIMEOUT)
    assert any("attached (native" in line for line in attached(InterfaceConfig()))


def test_a_swap_takes_jumbo_frames_still(jumbo):
    attached(InterfaceConfig())
    assert any("swapped the program (native, multi-buffer" in line for line in attached(InterfaceConfig(vlan="tagged")))


# What is chosen, and why

LINK = Link("eth9", 9, "", 1500, None, None)


@pytest.fixture
def host(monkeypatch) -> SimpleNamespace:
    """A host as the test wants it."""
    made = SimpleNamespace(online="0-7", isolated="", receiving=set(), redirects=True, kernel=(6, 1),
                           masks={"rx-0": "0"})
    monkeypatch.setattr(spread, "_listed", lambda name: set(parse_cpu_list(getattr(made, name))))
    monkeypatch.setattr(spread, "_receiving", lambda link: made.receiving)
    monkeypatch.setattr(spread, "_redirects", lambda link: made.redirects)
    monkeypatch.setattr(version, "running", lambda: made.kernel)
    monkeypatch.setattr(rps, "masks", lambda link: made.masks)
    return made


def planned(mode: str = "native", **settings: object) -> tuple[str, str, str]:
    found = spread.plan(LINK, InterfaceConfig(**{"spread": "auto", **settings}), mode)
    return found.how, cpu_list(found.cpus), found.reason


def test_none_is_the_default(host):
    assert spread.plan(LINK, InterfaceConfig(), "native") == ("none", (), "as configured")


def test_auto_hands_frames_on_where_it_can(host):
    assert planned() == ("cpumap", "0-7", "frames can be redirected; of 0-7")
    host.redirects = None
    assert planned()[0] == "cpumap"
    host.redirects = False
    assert planned() == ("rps", "0-7", "the driver's native XDP cannot redirect; of 0-7")
    host.masks = {}
    assert planned() == ("none", "", "the driver's native XDP cannot redirect")


@pytest.mark.parametrize("drivers, kernel, known", [
    ({"eth9": "igb"}, (5, 10), True), ({"eth9": "ixgbevf"}, (6, 2), False), ({"eth9": "nfp"}, (6, 2), False),
    ({"eth9": "igc"}, (5, 12), False), ({"eth9": "igc"}, (5, 13), True), ({"eth9": None}, (5, 10), True),
    ({"bond0": None, "eth9": "ixgbe", "eth8": "ixgbevf"}, (6, 1), False)])
def test_a_driver_that_would_drop_what_is_redirected(host, monkeypatch, drivers, kernel, known):
    """Where the kernel does not tell what the driver can."""
    first, *below = (dataclasses.replace(LINK, name=name) for name in drivers)
    monkeypatch.setattr(topology, "stack", lambda links, link: [first, *below])
    monkeypatch.setattr(sysfs, "driver", lambda link: drivers[link.name])
    host.kernel = kernel
    assert planned()[0] == "cpumap"
    host.redirects = None
    how, _, reason = planned()
    assert (how, "not known to redirect" in reason) == ("cpumap" if known else "rps", not known)
    if not known:
        with pytest.raises(XdpErmError, match=r"eth9: spread: cpumap is impossible here: native XDP of its driver"):
            planned(spread="cpumap")


def test_auto_in_generic_mode(host):
    how, cpus, reason = planned("generic")
    assert (how, cpus) == ("none", "") and "isolate" in reason
    assert planned("generic", isolate=False)[0] == "cpumap"
    host.kernel = (5, 14)
    assert planned("generic", isolate=False) == ("none", "", "in generic mode it needs Linux 5.15")


def test_the_cpus_are_those_that_have_nothing_else_to_do(host):
    host.receiving, host.isolated = {0, 1}, "6-7"
    assert planned() == ("cpumap", "2-5", "frames can be redirected; of 0-7, less 0-1 the NIC's, 6-7 isolated")
    assert planned(spread_avoid=(4, 5))[1:] == (
        "2-3", "frames can be redirected; of 0-7, less 0-1 the NIC's, 4-5 to be avoided, 6-7 isolated")
    host.receiving = set(range(8))
    assert planned()[1] == "0-5"
    assert planned(spread_cpus=(1, 7)) == ("cpumap", "1,7", "frames can be redirected; as configured")


def test_cpus_that_were_found_out_stay_while_they_will_do(host):
    """irqbalance moves interrupts about, which is no reason to swap the program."""
    def again(**settings: object) -> tuple[str, str]:
        config_ = InterfaceConfig(**{"spread": "auto", **settings})
        found = spread.plan(LINK, config_, "native", before)
        return cpu_list(found.cpus), found.reason

    host.receiving = {0, 1}
    first = spread.plan(LINK, InterfaceConfig(spread="auto"), "native")
    assert first.cpus == (2, 3, 4, 5, 6, 7)
    before = {"config": InterfaceConfig(spread="auto").as_dict(), "spread": json.loads(json.dumps(first._asdict()))}
    for host.receiving in ({0, 5}, set(), {2, 3, 4, 5, 6}, set(range(8))):
        assert again() == ("2-7", "frames can be redirected; as before")
    host.receiving = {2, 3, 4, 5, 6, 7}  # none of them has time, and others have
    assert again()[0] == "0-1"
    host.receiving = {0, 1}
    host.online = "0-6"
    assert again()[0] == "2-6"
    host.online, host.isolated = "0-7", "7"
    assert again()[0] == "2-6"
    host.isolated = ""
    assert again(spread_avoid=(2,))[0] == "3-7"
    assert again(spread_cpus=(1,))[0] == "1"
    before["config"]["spread_cpus"] = list(first.cpus)  # not found out
    host.receiving = {0, 5}
    assert again()[0] == "1-4,6-7"
    before.update(spread=None)
    assert again()[0] == "1-4,6-7"


@needs_cpus
def test_an_interrupt_that_moves_swaps_nothing(cable, monkeypatch):
    auto = InterfaceConfig(spread="cpumap")
    monkeypatch.setattr(spread, "_receiving", lambda _: set())
    attached(auto)
    monkeypatch.setattr(spread, "_receiving", lambda _: {CPUS[0]})
    assert any("already attached" in line for line in attached(auto))


def tree(root: Path, files: dict[str, str]) -> int:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return os.open(root, os.O_RDONLY)


def test_interrupts_of_all_kinds_of_devices(tmp_path, monkeypatch):
    """Of a PCI device, of virtio's, which are the PCI device's that it is on, of Hyper-V's channels, and of none."""
    irqs = {f"irq/{number}/effective_affinity_list": cpus
            for number, cpus in ((30, "1"), (31, "2-3"), (32, "4"), (40, "7"))}
    devices = {"pci/nic/msi_irqs/30": "msi", "pci/nic/msi_irqs/31": "msi", "pci/msi_irqs/40": "msi",
               "pci/card/msi_irqs/32": "msi", "pci/card/msi_irqs/99": "msi", "pci/card/virtio0/vendor": "0x1af4",
               "vmbus/guid/channels/15/cpu": "5", "vmbus/guid/channels/16/cpu": "6"}
    root = tree(tmp_path, {**irqs, **devices})
    for name, device in (("eth1", "pci/nic"), ("eth2", "pci/card/virtio0"), ("eth3", "vmbus/guid"), ("veth0", None)):
        (tmp_path / "class/net" / name).mkdir(parents=True)
        if device:
            (tmp_path / "class/net" / name / "device").symlink_to(f"../../../{device}")
    monkeypatch.setattr(spread, "_INTERRUPTS", tmp_path / "irq")
    found = {name: spread._interrupted(root, Link(name, 9, "", 1500, None, None))
             for name in ("eth1", "eth2", "eth3", "veth0")}
    os.close(root)
    assert found == {"eth1": {1, 2, 3}, "eth2": {4}, "eth3": {5, 6}, "veth0": set()}


def test_a_kernel_that_does_not_tell_is_not_complained_of():
    """Before Linux 6.3 there is no such protocol. pyroute2 would write of it to stderr, in a process without a log."""
    code = ("from pyroute2.netlink import generic; from xdp_erm_py.interface import spread\n"
            "from xdp_erm_py.kernel.links import Links\n"
            "bind = generic.GenericNetlinkSocket.bind\n"
            "generic.GenericNetlinkSocket.bind = lambda self, name, *rest: bind(self, 'no' + name, *rest)\n"
            "with Links() as links: print(spread._redirects(links.find('lo')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert (done.stdout, done.stderr) == ("None\n", "")


@pytest.mark.parametrize("online, receiving, avoid", [("0", set(), ()), ("0-1", {0}, (1,)), ("0-1", set(), (0, 1))])
def test_where_no_other_cpu_is_left(host, online, receiving, avoid):
    host.online, host.receiving = online, receiving
    how, cpus, reason = planned(spread_avoid=avoid)
    assert (how, cpus) == ("none", "") and reason.startswith("no other CPU is left")
    with pytest.raises(XdpErmError, match=r"eth9: spread: cpumap is impossible here: no other CPU is left"):
        planned(spread="cpumap", spread_avoid=avoid)


@pytest.mark.parametrize("settings, mode, reason", [
    ({"spread": "rps"}, "generic", "generic XDP runs after receive packet steering"),
    ({"spread": "cpumap"}, "generic", r"loses the mark .* \(isolate\)"),
    ({"spread": "rps", "spread_cpus": (6, 7)}, "native", r"steers no packets to isolated CPUs \(6-7\)"),
])
def test_what_is_impossible_is_refused(host, settings, mode, reason):
    host.isolated = "6-7"
    with pytest.raises(XdpErmError, match=rf"eth9: spread: {settings['spread']} is impossible here: .*{reason}"):
        planned(mode, **settings)


def test_a_cpu_that_is_not_there_is_refused(host):
    with pytest.raises(XdpErmError, match=r"eth9: spread_cpus: CPU 8 is not online \(online: 0-7\)"):
        planned(spread_cpus=(3, 8))


def test_a_driver_says_whether_it_redirects(cable):
    with Links() as links:
        assert spread._redirects(links.find(SENSOR_INTERFACE)) is not False
        assert spread._receiving(links.find(SENSOR_INTERFACE)) == set()


def test_where_sys_does_not_list_cpus(cable, monkeypatch, tmp_path):
    """As in some containers."""
    monkeypatch.setattr(spread, "_CPUS", tmp_path)
    with pytest.raises(XdpErmError, match=rf"^{tmp_path}/online cannot be read: No such file or directory$"):
        attached(InterfaceConfig(spread="auto"))


def test_a_refused_attach_changes_nothing(cable):
    before = masks()
    for settings in ({"spread": "rps", "mode": "generic"}, {"spread": "cpumap", "spread_cpus": [4095]}):
        with pytest.raises(XdpErmError, match="spread"):
            attached(InterfaceConfig(**{**settings, "spread_cpus": tuple(settings.get("spread_cpus", ()))}))
    with Links() as links:
        assert links.find(SENSOR_INTERFACE).program_id is None
    assert masks() == before


def test_status_tells_how_and_why(cable):
    attached(CPUMAP)
    said = subprocess.run([*COMMAND, "status", "--json"], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    found, = json.loads(said.stdout)["interfaces"]
    assert found["spread"] == {"how": "cpumap", "cpus": list(CPUS), "reason": "as configured"}
    said = subprocess.run([*COMMAND, "status"], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert f"cpumap {cpu_list(CPUS)}" in said.stdout
