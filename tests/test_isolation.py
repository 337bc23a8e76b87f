"""Isolation: a hostile mirror's frames reach every packet tap and move nothing else of the host."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filters
import pytest
from frames import ERM, ip, udp
from program import overstate
from pyroute2 import IPRoute
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from shell import TIMEOUT, shell

from xdp_erm_py import lab, shared
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import isolation, journal, loader, metadata, ours, stats
from xdp_erm_py.kernel import bpf, clsact, sysfs, version
from xdp_erm_py.kernel.links import Link, Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import SWITCH_INTERFACE as SWITCH
from xdp_erm_py.lab.fanout import FanoutWorkers
from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.lab.traffic import Packet
from xdp_erm_py.program import compiler
from xdp_erm_py.program.module import Function, Object
from xdp_erm_py.program.reference import insert_vlan_tag
from xdp_erm_py.settings import InterfaceConfig

HOST_INTERFACES = Path("/sys/class/net")
ADDRESS, ADDRESS6, OTHER, OTHER6 = "10.5.0.1", "fd00:5::1", "10.5.0.9", "fd00:5::9"
VLAN = 10
OTHER_MAC = "02:00:00:00:05:09"
TCP_PORT, UDP_PORT = 2222, 5353
SO_RCVBUFFORCE = 33  # Python has no name for it
FILTER = isolation.FILTER
OURS = f"{FILTER}-{compiler.classifier_digest()}"  # in clsact


@pytest.fixture
def sensor(cable):
    """The cable, at whose sensor end a host has addresses, a VLAN device, neighbours, and ports that would answer."""
    # It says nothing on its own: no duplicate address detection, no router solicitations, and reports of the multicast
    # groups that it joins at once. IPv6 itself comes on last.
    for setting, value in (("accept_dad", "0"), ("router_solicitations", "0"),
                           ("mldv1_unsolicited_report_interval", "1"), ("mldv2_unsolicited_report_interval", "1"),
                           ("disable_ipv6", "0")):
        for scope in ("default", SENSOR):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/{setting}").write_text(value)
    # Replies of nobody asked for make neighbours, echo requests to all are answered: a host as credulous as they come.
    shell(f"ip link set lo up; ip address add {ADDRESS}/24 dev {SENSOR};"
          f"ip address add {ADDRESS6}/64 dev {SENSOR} nodad;"
          f"sysctl -q -w net.ipv4.conf.{SENSOR}.arp_accept=1 net.ipv4.icmp_echo_ignore_broadcasts=0")
    with contextlib.ExitStack() as opened:
        for kind, port in ((socket.SOCK_STREAM, TCP_PORT), (socket.SOCK_DGRAM, UDP_PORT)):
            server = opened.enter_context(socket.socket(socket.AF_INET6, kind))
            server.bind(("::", port))
            if kind == socket.SOCK_STREAM:
                server.listen()
        yield cable


def mac() -> str:
    return shell(f"ip -br link show {SENSOR}").split()[2]


def hostile(mac: str) -> list[Packet]:
    """Mirrored frames that a host with these addresses would answer, learn from or take in, each as ERM."""
    to_me, to_all = Ether(src=OTHER_MAC, dst=mac), Ether(src=OTHER_MAC, dst="ff:ff:ff:ff:ff:ff")
    discovery = Ether(src=OTHER_MAC, dst="33:33:ff:00:00:01")
    solicitation = ICMPv6ND_NS(tgt=ADDRESS6) / ICMPv6NDOptSrcLLAddr(lladdr=OTHER_MAC)
    mine, mine6 = IP(src=OTHER, dst=ADDRESS), IPv6(src=OTHER6, dst=ADDRESS6)
    inner = [
        to_all / ARP(op=1, hwsrc=OTHER_MAC, psrc=OTHER, pdst=ADDRESS),
        to_all / ARP(op=2, hwsrc=OTHER_MAC, psrc=OTHER, hwdst="ff:ff:ff:ff:ff:ff", pdst=OTHER),
        to_me / mine / ICMP() / b"echo",
        to_all / IP(src=OTHER, dst="10.5.0.255") / ICMP() / b"echo",
        to_me / mine / TCP(sport=40000, dport=TCP_PORT, flags="S"),
        to_me / mine / TCP(sport=40000, dport=1, flags="S"),
        to_me / mine / UDP(sport=40000, dport=UDP_PORT) / b"datagram",
        to_me / mine / UDP(sport=40000, dport=1) / b"nobody listens",
        to_all / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67) / BOOTP() / DHCP(
            options=[("message-type", "discover"), "end"]),
        to_me / IP(src=OTHER, dst="224.0.0.1", proto=2) / b"\x11\x64\xee\x9b\0\0\0\0",
        discovery / IPv6(src=OTHER6, dst="ff02::1:ff00:1") / solicitation,
        to_me / mine6 / ICMPv6EchoRequest(data=b"echo"),
        to_me / mine6 / TCP(sport=40000, dport=TCP_PORT, flags="S"),
        to_me / mine6 / UDP(sport=40000, dport=1) / b"nobody listens",
        to_me / IP(src=OTHER, dst="203.0.113.1", ttl=1) / UDP() / b"not for here",
    ]
    outer = Ether(src="02:00:00:00:00:01", dst=mac)  # as switches do, which have asked for the address by ARP
    return [Packet(bytes(outer / ip() / udp() / ERM(vlan=VLAN) / frame), bytes(frame)) for frame in inner]


def counted() -> dict[str, int]:
    """What the host's own stack has counted, by name, its neighbours, and the packets it has sent."""
    values = {}
    lines = Path("/proc/net/snmp").read_text().splitlines() + Path("/proc/net/netstat").read_text().splitlines()
    for names, numbers in zip(lines[::2], lines[1::2]):
        values.update({f"{names.split()[0]}{name}": int(number)
                       for name, number in zip(names.split()[1:], numbers.split()[1:])})
    values.update((line.split()[0], int(line.split()[1])) for line in Path("/proc/net/snmp6").read_text().splitlines())
    conntrack = Path("/proc/net/nf_conntrack")
    if conntrack.exists():
        values["conntrack"] = len(conntrack.read_text().splitlines())
    values.update((f"neighbour {line}", 1) for line in shell("ip neighbour show").splitlines())
    values["sent"] = int(re.search(rf"{SENSOR}:(?:\s+\d+){{9}}\s+(\d+)", Path("/proc/net/dev").read_text())[1])
    return values


def mirror(cable, packets: list[Packet], vlan: str) -> None:
    """Every frame must reach the taps as it was mirrored."""
    if vlan == "restore":
        # PCP 0, which is what scapy's layer says by default
        packets = [Packet(packet.sent, insert_vlan_tag(packet.mirrored, VLAN)) for packet in packets]
    with FanoutWorkers(cable, 2, operator.attrgetter("mirrored")) as workers:
        lab.mirror(cable, packets, workers)
        result = workers.finish()
    assert (result.missing, result.unexpected, result.identical) == (0, 0, len(packets))


def has_vlan_devices() -> bool:
    """Makes vlan0 on the sensor's interface; not every kernel can."""
    made = subprocess.run(["ip", "link", "add", "link", SENSOR, "name", "vlan0", "type", "vlan", "id", str(VLAN)],
                          capture_output=True, timeout=TIMEOUT, check=False)
    return made.returncode == 0


def tracks_connections() -> bool:
    """Has the host track connections, by a rule that asks for their state; not every kernel can."""
    rules = ("add table inet watch; add chain inet watch incoming { type filter hook prerouting priority 0; };"
             "add rule inet watch incoming ct state new counter")
    made = subprocess.run(["nft", rules], capture_output=True, timeout=TIMEOUT, check=False)
    return made.returncode == 0


def settled() -> dict[str, int]:
    """The host's counters once its own start-up chatter (multicast listener reports, for one) has ended."""
    last, since = counted(), time.monotonic()
    deadline = since + TIMEOUT
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if (now := counted()) != last:
            last, since = now, time.monotonic()
        if time.monotonic() - since > 0.5:
            return last
    pytest.fail("the host does not come to rest")


@pytest.mark.parametrize("mode, spread", [("native", "none"), ("generic", "none"), ("native", "cpumap"),
                                          ("native", "rps")])
@pytest.mark.parametrize("vlan", ["strip", "restore"])
def test_a_hostile_mirror_moves_nothing_of_the_host(sensor, mode, spread, vlan):
    if vlan == "restore" and has_vlan_devices():
        shell(f"ip address flush dev {SENSOR} scope global; ip link set vlan0 up;"
              f"ip address add {ADDRESS}/24 dev vlan0; ip address add {ADDRESS6}/64 dev vlan0 nodad")
    tracks_connections()
    loader.attach(SENSOR, InterfaceConfig(mode=mode, vlan=vlan, spread=spread))
    sensor.wait_for_carrier()
    packets = hostile(mac())
    before = settled()
    mirror(sensor, packets, vlan)
    time.sleep(0.5)
    assert counted() == before


def test_without_isolation_the_host_answers(sensor):
    """The same frames, to show that they would be answered."""
    tracked = tracks_connections()
    loader.attach(SENSOR, InterfaceConfig(isolate=False, vlan="strip"))
    sensor.wait_for_carrier()
    packets = hostile(mac())
    before = settled()
    mirror(sensor, packets, "strip")
    time.sleep(0.5)
    after = counted()
    assert after["sent"] - before["sent"] >= 5
    assert after["Ip:InReceives"] > before["Ip:InReceives"] and after["Icmp:InEchos"] > before["Icmp:InEchos"]
    assert not tracked or after["conntrack"] > before["conntrack"]


@pytest.mark.check
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_the_sensors_own_traffic_is_unaffected(sensor, mode):
    loader.attach(SENSOR, InterfaceConfig(mode=mode))
    sensor.wait_for_carrier()
    with sensor.switch.entered():
        shell(f"ip address add {OTHER}/24 dev {SWITCH}")
        # ARP and TCP, to the sensor and back.
        with socket.create_connection((ADDRESS, TCP_PORT), timeout=TIMEOUT):
            pass


def test_a_bridge_gets_no_mirrored_frame(sensor):
    shell(f"ip link add bridge0 type bridge; ip link add out0 type veth peer name out1; ip address flush dev {SENSOR};"
          "ip link set out0 master bridge0 up; ip link set out1 up; ip link set bridge0 up;"
          f"ip link set {SENSOR} master bridge0")
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    sensor.wait_for_carrier()
    mirror(sensor, hostile("02:00:00:00:05:01"), "strip")
    assert OTHER_MAC not in shell("bridge fdb show br bridge0")


# Its place among what sees frames behind the taps


def old_kernel(monkeypatch) -> None:
    """Makes it one without tcx, as far as isolation can tell."""
    monkeypatch.setattr(isolation, "_has_tcx", lambda link: False)


@pytest.fixture(params=["tcx", "clsact"])
def hook(request, cable, monkeypatch) -> str:
    """Each of the two ways; the first only where the kernel has it."""
    if request.param == "clsact":
        old_kernel(monkeypatch)
    elif bpf.tcx(1) is None:
        pytest.skip("this kernel has no tcx")
    return request.param


def places() -> tuple[list[str], list[str], bool]:
    """The names of tcx programs, of filters, and whether there is a clsact qdisc."""
    return filters.tcx(SENSOR), filters.clsact(SENSOR), "clsact" in filters.qdiscs(SENSOR)


NOTHING = [], [], False
THERE = {"tcx": ([FILTER], [], False), "clsact": ([], [OURS + "+clsact"], True)}


def looked() -> isolation.Isolation:
    with Links() as links:
        return isolation.look(links.find(SENSOR))


@pytest.mark.check
def test_it_comes_and_goes(hook):
    before = filters.everything(SENSOR)
    loader.attach(SENSOR, InterfaceConfig())
    first = filters.everything(SENSOR)
    assert (places(), looked()) == (THERE[hook], (hook, ()))
    loader.attach(SENSOR, InterfaceConfig())
    loader.attach(SENSOR, InterfaceConfig(vlan="tagged"))
    assert filters.everything(SENSOR) == first
    loader.detach(SENSOR)
    assert filters.everything(SENSOR) == before


def test_a_hostile_mirror_moves_nothing_of_an_old_kernels_host(sensor, monkeypatch):
    old_kernel(monkeypatch)
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    sensor.wait_for_carrier()
    packets = hostile(mac())
    before = settled()
    mirror(sensor, packets, "strip")
    time.sleep(0.5)
    assert (counted(), places()) == (before, THERE["clsact"])


@pytest.mark.parametrize("says", [filters.NEXT, filters.PASS, filters.DROP])
def test_somebody_elses_tcx_program_that_was_there_comes_after_ours(sensor, says):
    """What it lets pass comes past all filters of clsact."""
    filters.add_tcx(SENSOR, says)
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    assert (filters.tcx(SENSOR), looked()) == ([FILTER, "theirs"], ("tcx", ()))
    sensor.wait_for_carrier()
    packets, before = hostile(mac()), received()
    mirror(sensor, packets, "strip")
    assert received() == before
    loader.detach(SENSOR)
    assert filters.tcx(SENSOR) == ["theirs"]


def test_their_tcx_program_that_comes_later_and_first_is_told_of_and_passed(sensor):
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    sensor.wait_for_carrier()
    packets, before = hostile(mac()), received()
    filters.add_tcx(SENSOR, filters.PASS)
    filters.add_tcx(SENSOR, filters.PASS, first=False)
    by, (theirs,) = looked()
    assert (by, re.fullmatch(r"the tcx program \d+ \(theirs\)", theirs) is not None) == ("tcx", True)
    mirror(sensor, packets, "strip")
    assert received() != before
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    assert (filters.tcx(SENSOR), looked()) == ([FILTER, "theirs", "theirs"], ("tcx", ()))


def test_somebody_who_attaches_at_the_same_time_is_no_hindrance(cable, monkeypatch):
    attach_tcx = bpf.attach_tcx

    def interrupted(*arguments):
        monkeypatch.setattr(bpf, "attach_tcx", attach_tcx)
        filters.add_tcx(SENSOR, filters.PASS)
        attach_tcx(*arguments)

    monkeypatch.setattr(bpf, "attach_tcx", interrupted)
    loader.attach(SENSOR, InterfaceConfig())
    assert filters.tcx(SENSOR) == [FILTER, "theirs"]


@pytest.mark.parametrize("qdisc", ["clsact", "ingress"])
def test_a_qdisc_and_filters_that_were_there_stay(hook, qdisc):
    shell(f"tc qdisc add dev {SENSOR} {qdisc}")
    filters.add_clsact(SENSOR, 1)
    loader.attach(SENSOR, InterfaceConfig())
    # Theirs accepts all frames, which ends the matter.
    assert filters.tcx(SENSOR) + filters.clsact(SENSOR) == [FILTER if hook == "tcx" else OURS, "theirs"]
    loader.detach(SENSOR)
    assert (filters.tcx(SENSOR), filters.clsact(SENSOR), qdisc in filters.qdiscs(SENSOR)) == ([], ["theirs"], True)


def test_filters_that_came_later_stay_with_the_qdisc(cable, monkeypatch):
    old_kernel(monkeypatch)
    loader.attach(SENSOR, InterfaceConfig())
    filters.add_clsact(SENSOR, 7)
    loader.detach(SENSOR)
    assert places() == ([], ["theirs"], True)


def test_their_filter_that_comes_later_and_first_is_told_of_and_passed(cable, monkeypatch):
    old_kernel(monkeypatch)
    loader.attach(SENSOR, InterfaceConfig())
    filters.add_clsact(SENSOR, 1)
    assert looked() == ("clsact", ("the filter theirs of preference 1",))
    loader.attach(SENSOR, InterfaceConfig())
    assert (places(), looked()) == (([], [OURS + "+clsact", "theirs"], True), ("clsact", ()))


def test_their_filter_still_sees_the_hosts_own_traffic(sensor, hook):
    shell(f"tc qdisc add dev {SENSOR} clsact")
    filters.add_clsact(SENSOR, 1, filters.DROP)
    loader.attach(SENSOR, InterfaceConfig())
    sensor.wait_for_carrier()
    with sensor.switch.entered():
        shell(f"ip address add {OTHER}/24 dev {SWITCH}")
        with pytest.raises(OSError, match="timed out"):
            socket.create_connection((ADDRESS, TCP_PORT), timeout=2)


def made_up(*fields: tuple[int, int, str, str | None]) -> list[isolation._Filter]:
    """Filters of clsact: preference, handle, kind, name."""
    return [isolation._Filter(name or kind, 7 if name else None,
                              clsact.Filter(preference, True, handle, kind, name, None))
            for preference, handle, kind, name in fields]


def test_other_kinds_of_filters_before_it_are_told_of():
    others = made_up((1, 0, "flower", None), (1, 1, "flower", None), (3, 1, "u32", None), (4, 1, "bpf", "theirs"))
    assert (isolation._preference(others), isolation._preference(others[2:]), isolation._preference([])) == (2, 1, 1)
    ours = made_up((2, 1, "bpf", OURS))
    assert list(map(isolation._called, isolation._before(others[:2] + ours + others[2:]))) == [
        "the filter flower of preference 1"]


def test_a_filter_of_one_protocol_before_it(cable, monkeypatch):
    """No other can have its preference."""
    old_kernel(monkeypatch)
    shell(f"tc qdisc add dev {SENSOR} clsact")
    filters.add_clsact(SENSOR, 1, protocol=0x0800)
    said = loader.attach(SENSOR, InterfaceConfig())
    assert any("the filter theirs of preference 1 comes before that" in line for line in said)
    assert places() == ([], ["theirs", OURS], True)
    assert loader.attach(SENSOR, InterfaceConfig())[0].startswith(f"{SENSOR}: already attached")
    loader.detach(SENSOR)
    assert places() == ([], ["theirs"], True)


def test_it_is_not_put_there_anew_where_it_could_come_no_sooner(monkeypatch):
    old_kernel(monkeypatch)
    flower = made_up((1, 0, "flower", None), (1, 1, "flower", None))
    ours, theirs = made_up((2, 1, "bpf", OURS), (2, 2, "bpf", "theirs"))
    assert isolation._stands_well(None, [*flower, ours, theirs])
    assert not isolation._stands_well(None, [*flower, theirs, ours])


def test_it_is_switched_on_and_off_under_way(hook):
    loader.attach(SENSOR, InterfaceConfig(isolate=False))
    assert places() == NOTHING
    loader.attach(SENSOR, InterfaceConfig())
    assert places() == THERE[hook]
    said = loader.attach(SENSOR, InterfaceConfig(isolate=False))
    assert said[-1] == f"{SENSOR}: the host's own network stack sees all frames again"
    assert places() == NOTHING


def test_a_filter_that_was_taken_away_is_put_back(hook):
    loader.attach(SENSOR, InterfaceConfig())
    filters.take_away(SENSOR)
    assert looked() == (None, ())
    loader.attach(SENSOR, InterfaceConfig())
    assert places()[:2] == (THERE[hook][0], [OURS] if hook == "clsact" else [])


@pytest.mark.parametrize("gone", ["program", "never attached"])
def test_a_filter_that_was_left_alone_is_removed(hook, gone):
    """Somebody took the program off, or a command was killed between filter and program."""
    if gone == "program":
        loader.attach(SENSOR, InterfaceConfig())
        shell(f"ip link set dev {SENSOR} xdp off")
    else:
        with Links() as links, isolation.counting({}) as taken:
            isolation.isolate(links.find(SENSOR), None, taken, lambda _: None)
    assert loader.detach(SENSOR) == [f"{SENSOR}: the host's own network stack sees all frames again"]
    assert places() == NOTHING
    assert loader.detach(SENSOR) == [f"{SENSOR}: xdp-erm is not attached"]


def test_a_refused_attach_leaves_no_filter(hook, monkeypatch):
    def refuses(*_):
        raise XdpErmError("no")
    monkeypatch.setattr(loader, "_attach_best", refuses)
    with pytest.raises(XdpErmError):
        loader.attach(SENSOR, InterfaceConfig())
    assert places() == NOTHING


def test_a_kernel_without_such_filters_is_not_attached_to(hook, monkeypatch):
    # The program does nothing a filter could be.
    nothing = Object("GPL", {}, {compiler.CLASSIFIER: Function(bytes(8), ())})
    monkeypatch.setattr(compiler, "classifier", lambda: nothing)
    with pytest.raises(XdpErmError, match=rf"^{SENSOR}: decapsulated frames cannot be kept from the host's own network "
                                          r"stack, the kernel does not load the filter: .*isolate: false \(--no-isolate"
                                          r"\) attaches without$"):
        loader.attach(SENSOR, InterfaceConfig())
    assert stats.snapshot() == []
    assert loader.attach(SENSOR, InterfaceConfig(isolate=False))


def test_a_driver_is_that_of_the_interface_of_this_network_namespace(xdp, monkeypatch):
    """/sys shows another namespace's, which may have the same name."""
    drivers = {path.parts[-3]: os.path.basename(os.readlink(path)) for path in HOST_INTERFACES.glob("*/device/driver")}
    if not drivers:
        pytest.skip("this machine has no interface with a driver")
    name, driver = next(iter(drivers.items()))
    with Links() as links:
        assert sysfs.driver(links.find(name)) == driver
        assert sysfs.driver(links.find("lo")) is None
    namespace = Namespace()
    try:
        with namespace.entered(), Links() as links:
            shell(f"ip link add {name} type veth")
            assert sysfs.driver(links.find(name)) is None
    finally:
        namespace.close()


@pytest.mark.parametrize("driver, kind, kernel, lacking", [
    ("igb", None, (5, 10), None), ("mvpp2", None, (6, 18), "mvpp2"),
    ("mlx5_core", None, (5, 15), "mlx5_core before Linux 5.18"), ("mlx5_core", None, (5, 18), None),
    ("ena", None, (6, 18), "ena"), ("mlx4_core", None, (6, 18), "mlx4_core"),
    ("brand_new", None, (7, 0), "brand_new"), ("bnxt_en", None, (6, 1), "bnxt_en before Linux 6.12"),
    ("bnxt_en", None, (6, 12), None), (None, "veth", (5, 10), None), (None, "tun", (6, 14), "tun before Linux 6.15"),
    (None, "tun", (6, 15), None)])
def test_drivers_that_hand_on_the_mark(monkeypatch, driver, kind, kernel, lacking):
    monkeypatch.setattr(sysfs, "driver", lambda link: driver)
    monkeypatch.setattr(version, "running", lambda: kernel)
    link = Link("eth1", 1, "", 1500, None, None, kind=kind)
    assert metadata.lacking([link], link) == lacking


def test_a_driver_below_that_does_not_hand_it_on(monkeypatch):
    """A bond is a virtual interface; its parts run the program."""
    bond = Link("bond0", 1, "", 1500, None, None, kind="bond")
    good, bad = (Link(name, index, "", 1500, None, None, master=1) for index, name in ((2, "eth1"), (3, "eth2")))
    monkeypatch.setattr(sysfs, "driver", lambda link: {"eth1": "igb", "eth2": "vmxnet3"}.get(link.name))
    assert metadata.lacking([bond, good], bond) is None
    assert metadata.lacking([bond, good, bad], bond) == "vmxnet3 of eth2"


def test_a_driver_that_does_not_hand_on_the_mark_is_used_in_generic_mode(cable, monkeypatch):
    monkeypatch.setattr(metadata, "lacking", lambda links, link: "ena")
    reason = "native XDP of its driver (ena) is not known to carry the mark that isolation needs"
    with pytest.raises(XdpErmError, match=re.escape(
            f"{SENSOR}: {reason}: use generic mode (--mode auto), or isolate: false (--no-isolate)")):
        loader.attach(SENSOR, InterfaceConfig(mode="native"))
    assert loader.attach(SENSOR, InterfaceConfig())[0] == f"{SENSOR}: {reason}: using generic mode, which is slower"
    assert stats.snapshot(SENSOR)[0]["mode"] == "generic"
    with Links() as links:
        assert ours.find(links, SENSOR).state["why_generic"] == reason
    loader.attach(SENSOR, InterfaceConfig(isolate=False, mode="native"))
    assert stats.snapshot(SENSOR)[0]["mode"] == "native"
    with Links() as links:
        assert ours.find(links, SENSOR).state["why_generic"] is None


def test_frames_that_cannot_be_marked_change_the_mode_at_the_next_attach(cable):
    """Of a driver that is believed to be able to; but not against what is configured."""
    native = InterfaceConfig(mode="native")
    loader.attach(SENSOR, native)
    overstate(SENSOR, "unmarked", 12)
    loader.attach(SENSOR, native)
    assert stats.snapshot(SENSOR)[0]["mode"] == "native"
    loader.detach(SENSOR)
    loader.attach(SENSOR, InterfaceConfig())
    assert stats.snapshot(SENSOR)[0]["mode"] == "native"
    overstate(SENSOR, "unmarked", 12)
    reason = "12 frames could not be marked for isolation in native mode, and stayed wrapped"
    for _ in range(2):
        said = loader.attach(SENSOR, InterfaceConfig())
        assert stats.snapshot(SENSOR)[0]["mode"] == "generic"
        with Links() as links:
            assert ours.find(links, SENSOR).state["why_generic"] == reason
    assert said == [f"{SENSOR}: already attached (generic, program {stats.snapshot(SENSOR)[0]['program_id']})"]


def received() -> dict[str, int]:
    """What the stack has counted of packets that came, its neighbours included."""
    return {name: count for name, count in settled().items() if re.search("In|neighbour", name)}


@pytest.fixture
def upgrade(tmp_path, monkeypatch):
    """Makes the package another one, which marks its frames with another number."""
    def upgrade() -> None:
        other = tmp_path / "bpf"
        shutil.copytree(shared.BPF_DIRECTORY, other)
        header = other / "shared.h"
        changed = re.sub(r"(#define MARK) \S+", r"\1 0x12345678", header.read_text())
        assert changed != header.read_text()
        header.write_text(changed)
        monkeypatch.setattr(shared, "BPF_DIRECTORY", other)
    return upgrade


def put_under_hostile_traffic(sensor, monkeypatch) -> list[tuple[list[str], list[str], bool]]:
    """Has a mirror send right before and after the program is swapped; says where the filters are then."""
    there = []
    original = loader._put

    def put(*arguments):
        there.append(places())
        mirror(sensor, hostile(mac()), "strip")  # by the old program
        said = original(*arguments)
        there.append(places())
        mirror(sensor, hostile(mac()), "strip")  # by the new one
        return said

    monkeypatch.setattr(loader, "_put", put)
    return there


def test_a_filter_of_another_version_is_replaced(sensor, hook, upgrade, monkeypatch):
    """Under hostile traffic, at no moment of which there is a program whose frames no filter takes."""
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    old = places()
    before = received()
    upgrade()
    there = put_under_hostile_traffic(sensor, monkeypatch)
    assert f"{SENSOR}: decapsulated frames are kept from the host's own network stack, by a newer filter" in \
        loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    newer = f"xdp_erm_isolate-{compiler.classifier_digest()}+clsact"
    both, new = {"tcx": (([FILTER, FILTER], [], False), old),
                 "clsact": (([], [newer, *old[1]], True), ([], [newer], True))}[hook]
    assert (there, places()) == ([both, both], new)
    mirror(sensor, hostile(mac()), "strip")
    assert received() == before
    loader.detach(SENSOR)
    assert places() == NOTHING


@pytest.mark.parametrize("name", ["digest", "without"])
def test_a_version_that_used_clsact_moves_over(sensor, upgrade, monkeypatch, name):
    """Under the same traffic; the qdisc that was made for it goes with the old filter."""
    if bpf.tcx(1) is None:
        pytest.skip("this kernel has no tcx")
    with monkeypatch.context() as patched:
        old_kernel(patched)
        if name == "without":  # as the first versions called it
            patched.setattr(compiler, "classifier_digest", lambda: "")
        loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    old = places()
    before = received()
    upgrade()
    there = put_under_hostile_traffic(sensor, monkeypatch)
    loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
    assert (there, places()) == ([([FILTER], *old[1:])] * 2, THERE["tcx"])
    assert received() == before


def test_a_failed_upgrade_leaves_the_old_filter(hook, upgrade, monkeypatch):
    loader.attach(SENSOR, InterfaceConfig())
    before = filters.everything(SENSOR)
    upgrade()

    def refuses(*_):
        raise XdpErmError("no")
    monkeypatch.setattr(loader, "_attach_best", refuses)
    with pytest.raises(XdpErmError):
        loader.attach(SENSOR, InterfaceConfig())
    assert filters.everything(SENSOR) == before


@pytest.mark.parametrize("step", ["_put", "retire"])
def test_an_upgrade_that_is_killed_is_finished_by_the_next_attach(hook, upgrade, monkeypatch, step):
    loader.attach(SENSOR, InterfaceConfig())
    upgrade()
    with monkeypatch.context() as patched:
        patched.setattr(isolation if step == "retire" else loader, step, lambda *_: sys.exit("killed"))
        for owner, name in ((isolation, "withdraw"), (loader.nic, "restore")):
            patched.setattr(owner, name, lambda *_: [])
        with pytest.raises(SystemExit):
            loader.attach(SENSOR, InterfaceConfig())
    assert len(filters.tcx(SENSOR) + filters.clsact(SENSOR)) == 2
    loader.attach(SENSOR, InterfaceConfig())
    assert len(filters.tcx(SENSOR) + filters.clsact(SENSOR)) == 1
    loader.detach(SENSOR)
    assert places() == NOTHING


def test_somebody_elses_empty_qdisc_stays_where_a_command_was_killed(cable, monkeypatch):
    old_kernel(monkeypatch)
    shell(f"tc qdisc add dev {SENSOR} clsact")
    with monkeypatch.context() as patched:
        patched.setattr(clsact, "add_filter", lambda *_: sys.exit("killed"))
        for owner, name in ((loader.nic, "restore"), (journal.Journal, "finish")):
            patched.setattr(owner, name, lambda *_: [])
        with pytest.raises(SystemExit):
            loader.attach(SENSOR, InterfaceConfig())
    assert loader.detach(SENSOR)
    assert "clsact" in filters.qdiscs(SENSOR)


# What it counts


def isolated() -> dict[str, int] | None:
    found = stats.snapshot(SENSOR)[0]["isolation"]
    return found and {key: value for key, value in found.items() if key != "filter"}


def leaked() -> int:
    with Links() as links:
        return stats.leaked(ours.find(links, SENSOR))


def send(cable, number: int = 20, vlan: int = VLAN, inner: bytes = b"") -> None:
    """So many mirrored frames, which are decapsulated when this returns."""
    before = decapsulated()
    frame = inner or bytes(Ether(src=OTHER_MAC, dst="02:00:00:00:00:77") / IP() / UDP() / b"mirrored")
    for _ in range(number):
        cable.send(bytes(Ether() / ip() / udp() / ERM(vlan=vlan) / frame))
    deadline = time.monotonic() + TIMEOUT
    while decapsulated() < before + number and time.monotonic() < deadline:
        time.sleep(0.01)
    assert decapsulated() == before + number


def decapsulated() -> int:
    return stats.snapshot(SENSOR)[0]["counters"]["decapsulated"]["packets"]


WAYS = {"native": InterfaceConfig(mode="native"), "generic": InterfaceConfig(mode="generic"),
        "cpumap": InterfaceConfig(spread="cpumap"), "rps": InterfaceConfig(spread="rps")}


@pytest.mark.parametrize("way", WAYS)
def test_what_it_takes_is_what_was_decapsulated(cable, hook, way):
    loader.attach(SENSOR, WAYS[way])
    cable.wait_for_carrier()
    send(cable)
    cable.send(bytes(Ether() / IP() / UDP()))
    assert leaked() == 0
    assert isolated() == {"taken": 20, "outer_tagged": 0, "accounted": 20}
    loader.attach(SENSOR, dataclasses.replace(WAYS[way], vlan="tagged"))  # a swap
    send(cable)
    assert leaked() == 0
    assert isolated() == {"taken": 40, "outer_tagged": 0, "accounted": 40}


@pytest.mark.parametrize("thief", ["tcx", "removed"])
def test_what_it_does_not_take_has_reached_the_host(cable, thief):
    loader.attach(SENSOR, InterfaceConfig())
    cable.wait_for_carrier()
    send(cable)
    if thief == "tcx":
        filters.add_tcx(SENSOR, filters.PASS)
    else:
        filters.take_away(SENSOR)
    send(cable, 7)
    assert (leaked(), isolated()["accounted"]) == (7, 20)
    loader.attach(SENSOR, InterfaceConfig(vlan="tagged"))  # which puts ours first again
    send(cable, 5)
    assert (leaked(), isolated()["accounted"]) == (0, 32)


def test_what_the_kernel_has_dropped_is_accounted_for(cable, monkeypatch):
    """The queue of another CPU was full, as may be with receive packet steering."""
    loader.attach(SENSOR, InterfaceConfig())
    cable.wait_for_carrier()
    filters.take_away(SENSOR)
    send(cable, 7)
    statistics = Links.statistics

    def more_dropped(self, link):
        found = statistics(self, link)
        return {**found, "rx_dropped": found["rx_dropped"] + 5}
    monkeypatch.setattr(Links, "statistics", more_dropped)
    assert leaked() == 2


def test_frames_that_gro_has_merged_are_still_so_many(cable):
    """Where somebody has turned GRO on again. They wait for a CPU that is busy sending them."""
    cpus = os.sched_getaffinity(0)
    loader.attach(SENSOR, InterfaceConfig(spread="cpumap", spread_cpus=(min(cpus),), vlan="strip"))
    cable.wait_for_carrier()
    shell(f"ethtool -K {SENSOR} gro on")
    segments = [Ether(src=OTHER_MAC, dst="02:00:00:00:00:77") / IP(src=OTHER, dst="10.5.0.7", id=number) / TCP(
        sport=1, dport=2, flags="A", seq=100 * number) / bytes(100) for number in range(500)]
    frames = [bytes(Ether() / ip() / udp() / ERM() / segment) for segment in segments]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.bind((SENSOR, 0))
        tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 26)
        tap.setblocking(False)
        for times in range(1, 21):  # on a busy machine the CPU may get round to each frame at once
            os.sched_setaffinity(0, {min(cpus)})
            try:
                for frame in frames:
                    cable.send(frame)
            finally:
                os.sched_setaffinity(0, cpus)
            deadline = time.monotonic() + TIMEOUT
            while isolated()["taken"] < times * len(frames) and time.monotonic() < deadline:
                time.sleep(0.02)  # some wait for the CPU still
            assert (leaked(), isolated()["taken"]) == (0, times * len(frames))
            seen = 0
            with contextlib.suppress(BlockingIOError):
                while tap.recv(1 << 16):
                    seen += 1
            if seen < len(frames):
                return
    if version.running() < (6, 15):
        pytest.skip("this kernel's cpumap merges nothing (before Linux 6.15)")
    pytest.fail("none were merged, so that nothing was tested")


def test_what_was_decapsulated_without_it_does_not_count(cable):
    loader.attach(SENSOR, InterfaceConfig(isolate=False))
    cable.wait_for_carrier()
    send(cable)
    assert (isolated(), leaked()) == (None, 0)
    loader.attach(SENSOR, InterfaceConfig())
    send(cable, 5)
    assert (leaked(), isolated()) == (0, {"taken": 5, "outer_tagged": 0, "accounted": 25})


@pytest.mark.parametrize("before, after", [("cpumap", "native"), ("native", "cpumap"), ("native", "generic")])
def test_it_is_balanced_over_changes_of_way_and_mode(cable, before, after):
    loader.attach(SENSOR, WAYS[before])
    cable.wait_for_carrier()
    send(cable)
    loader.attach(SENSOR, WAYS[after])
    cable.wait_for_carrier()
    send(cable)
    assert (leaked(), isolated()["accounted"]) == (0, 40)


def test_a_new_program_begins_anew_where_the_filter_was_left(cable):
    loader.attach(SENSOR, InterfaceConfig())
    cable.wait_for_carrier()
    send(cable)
    shell(f"ip link set dev {SENSOR} xdp off")
    loader.attach(SENSOR, InterfaceConfig())
    cable.wait_for_carrier()
    send(cable, 5)
    assert (leaked(), isolated()) == (0, {"taken": 5, "outer_tagged": 0, "accounted": 5})


def test_it_stays_for_what_waits_in_other_cpus_queues(cable, monkeypatch):
    """While more arrives, and no longer than until the rest, which was dropped, stays away."""
    loader.attach(SENSOR, InterfaceConfig(spread="cpumap"))
    arrived, seen = iter([1, 2, 3]), []

    def summed(attachment, name):
        if name == "steered":
            return 5
        seen.append(looked().by)
        return next(arrived, 3)

    monkeypatch.setattr(stats, "_summed", summed)
    loader.detach(SENSOR)
    assert len(seen) > 3 and set(seen) == {"tcx" if bpf.tcx(1) else "clsact"}
    assert places() == NOTHING


@contextlib.contextmanager
def tagged_beside(cable, tci: int) -> Iterator[None]:
    """What the switch sends has a VLAN tag, which veth leaves beside the frame: that of a VLAN device would be, too."""
    # bpf_skb_vlan_push(skb, htons(0x8100), tci); return TC_ACT_OK
    instructions = struct.pack("=" + "BBhi" * 5, 0xb7, 2, 0, socket.htons(0x8100), 0xb7, 3, 0, tci, 0x85, 0, 0, 18,
                               0xb7, 0, 0, 0, 0x95, 0, 0, 0)
    with cable.switch.entered(), Links() as links:
        index = links.find(SWITCH).index
        with bpf.descriptor(bpf.load_classifier("pushes", instructions, b"GPL")) as program, IPRoute() as route:
            route.tc("add", "clsact", index)
            route.tc("add-filter", "bpf", index, 0, fd=program, name="pushes", parent=0xFFFFFFF3, prio=1, protocol=3,
                     classid=0, direct_action=True)
    yield
    with cable.switch.entered():
        shell(f"tc qdisc del dev {SWITCH} clsact")


@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("vlan", ["strip", "restore"])
def test_a_tag_of_the_wrapping_that_travels_beside_it_is_told_of(cable, mode, vlan):
    """XDP cannot see it, and the taps get it with the mirrored frame."""
    loader.attach(SENSOR, InterfaceConfig(mode=mode, vlan=vlan))
    cable.wait_for_carrier()
    send(cable, 3)
    own = bytes(Ether(src=OTHER_MAC, dst="02:00:00:00:00:77") / Dot1Q(vlan=7) / IP() / UDP() / b"mirrored")
    send(cable, 3, inner=own)
    send(cable, 3, inner=bytes(14))
    assert isolated()["outer_tagged"] == 0
    with tagged_beside(cable, 99):
        with cable.switch.entered():
            shell(f"ethtool -K {SWITCH} txvlan on")
        send(cable, 3)
        send(cable, 2, inner=own)
        assert isolated()["outer_tagged"] == 5
        with cable.switch.entered():
            shell(f"ethtool -K {SWITCH} txvlan off")
        send(cable, 3)
    assert isolated()["outer_tagged"] == 5
