"""Isolation: a hostile mirror's frames reach every packet tap and move nothing else of the host."""

from __future__ import annotations

import contextlib
import operator
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from frames import ERM, ip, udp
from pyroute2 import IPRoute
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from shell import TIMEOUT, shell

from xdp_erm_py import lab, shared
from xdp_erm_py.config import InterfaceConfig
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import attachment, isolation, journal, stats
from xdp_erm_py.kernel import bpf, sysfs
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import SWITCH_INTERFACE as SWITCH
from xdp_erm_py.lab.fanout import FanoutWorkers
from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.lab.traffic import Packet
from xdp_erm_py.program import compiler
from xdp_erm_py.program.reference import insert_vlan_tag

HOST_INTERFACES = Path("/sys/class/net")
ADDRESS, ADDRESS6, OTHER, OTHER6 = "10.5.0.1", "fd00:5::1", "10.5.0.9", "fd00:5::9"
VLAN = 10
OTHER_MAC = "02:00:00:00:05:09"
TCP_PORT, UDP_PORT = 2222, 5353
OURS = f"xdp_erm_isolate-{compiler.classifier_digest()}"


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
    attachment.attach(SENSOR, InterfaceConfig(mode=mode, vlan=vlan, spread=spread))
    sensor.wait_for_carrier()
    packets = hostile(mac())
    before = settled()
    mirror(sensor, packets, vlan)
    time.sleep(0.5)
    assert counted() == before


def test_without_isolation_the_host_answers(sensor):
    """The same frames, to show that they would be answered."""
    tracked = tracks_connections()
    attachment.attach(SENSOR, InterfaceConfig(isolate=False, vlan="strip"))
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
    attachment.attach(SENSOR, InterfaceConfig(mode=mode))
    sensor.wait_for_carrier()
    with sensor.switch.entered():
        shell(f"ip address add {OTHER}/24 dev {SWITCH}")
        # ARP and TCP, to the sensor and back.
        with socket.create_connection((ADDRESS, TCP_PORT), timeout=10):
            pass


def test_a_bridge_gets_no_mirrored_frame(sensor):
    shell(f"ip link add bridge0 type bridge; ip link add out0 type veth peer name out1; ip address flush dev {SENSOR};"
          "ip link set out0 master bridge0 up; ip link set out1 up; ip link set bridge0 up;"
          f"ip link set {SENSOR} master bridge0")
    attachment.attach(SENSOR, InterfaceConfig(vlan="strip"))
    sensor.wait_for_carrier()
    mirror(sensor, hostile("02:00:00:00:05:01"), "strip")
    assert OTHER_MAC not in shell("bridge fdb show br bridge0")


# Its place among the filters


def filters() -> list[str]:
    """The names of the BPF filters, in the order in which they run."""
    return re.findall(r"handle 0x\w+ (\S+) direct-action", shell(f"tc filter show dev {SENSOR} ingress"))


def qdiscs() -> set[str]:
    return set(re.findall(r"qdisc (\w+)", shell(f"tc qdisc show dev {SENSOR}")))


def add_filter(name: str, preference: int, action: int = 0) -> None:
    """Somebody else's filter, which ends with `action` (0: the frame is fine)."""
    instructions = bytes.fromhex(f"b7000000{action & 0xff:02x}000000 9500000000000000")
    with bpf.descriptor(bpf.load_classifier("theirs", instructions, b"GPL")) as program, Links() as links, \
            IPRoute() as route:
        route.tc("add-filter", "bpf", links.find(SENSOR).index, 0, fd=program, name=name, parent=0xFFFFFFF2,
                 prio=preference, protocol=3, classid=0, direct_action=True)


@pytest.mark.check
def test_filter_and_qdisc_come_and_go(cable):
    before = qdiscs()
    attachment.attach(SENSOR, InterfaceConfig())
    assert (filters(), qdiscs() - before) == ([OURS + "+clsact"], {"clsact"})
    attachment.attach(SENSOR, InterfaceConfig())
    attachment.attach(SENSOR, InterfaceConfig(vlan="tagged"))
    assert filters() == [OURS + "+clsact"]
    attachment.detach(SENSOR)
    assert qdiscs() == before


@pytest.mark.parametrize("qdisc", ["clsact", "ingress"])
def test_a_qdisc_and_filters_that_were_there_stay(cable, qdisc):
    shell(f"tc qdisc add dev {SENSOR} {qdisc}")
    add_filter("theirs", 1)
    attachment.attach(SENSOR, InterfaceConfig())
    assert filters() == [OURS, "theirs"]  # theirs accepts all frames, which ends the matter
    attachment.detach(SENSOR)
    assert (filters(), qdisc in qdiscs()) == (["theirs"], True)


def test_filters_that_came_later_stay_with_the_qdisc(cable):
    attachment.attach(SENSOR, InterfaceConfig())
    add_filter("theirs", 7)
    attachment.detach(SENSOR)
    assert (filters(), "clsact" in qdiscs()) == (["theirs"], True)


def test_their_filter_still_sees_the_hosts_own_traffic(sensor):
    shell(f"tc qdisc add dev {SENSOR} clsact")
    add_filter("theirs", 1, action=2)  # drops all
    attachment.attach(SENSOR, InterfaceConfig())
    sensor.wait_for_carrier()
    with sensor.switch.entered():
        shell(f"ip address add {OTHER}/24 dev {SWITCH}")
        with pytest.raises(OSError, match="timed out"):
            socket.create_connection((ADDRESS, TCP_PORT), timeout=2)


def test_other_kinds_of_filters_before_it_are_warned_of():
    others = [isolation._Filter(*fields) for fields in (
        (1, 0, "flower", None), (1, 1, "flower", None), (3, 1, "u32", None), (4, 1, "bpf", "theirs"))]
    assert isolation._preference(others) == (2, [1])
    assert isolation._preference(others[2:]) == (1, [])
    assert isolation._preference([]) == (1, [])


def test_it_is_switched_on_and_off_under_way(cable):
    attachment.attach(SENSOR, InterfaceConfig(isolate=False))
    assert (filters(), "clsact" in qdiscs()) == ([], False)
    attachment.attach(SENSOR, InterfaceConfig())
    assert filters() == [OURS + "+clsact"]
    said = attachment.attach(SENSOR, InterfaceConfig(isolate=False))
    assert said[-1] == f"{SENSOR}: the host's own network stack sees all frames again"
    assert (filters(), "clsact" in qdiscs()) == ([], False)


def test_a_filter_that_was_taken_away_is_put_back(cable):
    attachment.attach(SENSOR, InterfaceConfig())
    shell(f"tc qdisc del dev {SENSOR} clsact")
    with Links() as links:
        assert not isolation.is_isolated(links.find(SENSOR))
    attachment.attach(SENSOR, InterfaceConfig())
    assert filters() == [OURS + "+clsact"]


@pytest.mark.parametrize("gone", ["program", "never attached"])
def test_a_filter_that_was_left_alone_is_removed(cable, gone):
    """Somebody took the program off, or a command was killed between filter and program."""
    if gone == "program":
        attachment.attach(SENSOR, InterfaceConfig())
        shell(f"ip link set dev {SENSOR} xdp off")
    else:
        with Links() as links:
            isolation.isolate(links.find(SENSOR), lambda _: None)
    assert attachment.detach(SENSOR) == [f"{SENSOR}: the host's own network stack sees all frames again"]
    assert (filters(), "clsact" in qdiscs()) == ([], False)
    assert attachment.detach(SENSOR) == [f"{SENSOR}: xdp-erm is not attached"]


def test_a_refused_attach_leaves_no_filter(cable, monkeypatch):
    def refuses(*_):
        raise XdpErmError("no")
    monkeypatch.setattr(attachment, "_attach", refuses)
    with pytest.raises(XdpErmError):
        attachment.attach(SENSOR, InterfaceConfig())
    assert (filters(), "clsact" in qdiscs()) == ([], False)


def test_a_kernel_without_such_filters_is_not_attached_to(cable, monkeypatch):
    # The program does nothing a filter could be.
    monkeypatch.setattr(compiler, "classifier", lambda: (bytes(8), b"GPL"))
    with pytest.raises(XdpErmError, match=rf"^{SENSOR}: decapsulated frames cannot be kept from the host's own network "
                                          r"stack, the kernel does not load the filter: .*isolate: false \(--no-isolate"
                                          r"\) attaches without$"):
        attachment.attach(SENSOR, InterfaceConfig())
    assert stats.snapshot() == []
    assert attachment.attach(SENSOR, InterfaceConfig(isolate=False))


def test_a_driver_is_that_of_the_interface_of_this_network_namespace(xdp, monkeypatch):
    """/sys shows another namespace's, which may have the same name."""
    drivers = {path.parts[-3]: os.path.basename(os.readlink(path)) for path in HOST_INTERFACES.glob("*/device/driver")}
    if not drivers:
        pytest.skip("this machine has no interface with a driver")
    name, driver = next(iter(drivers.items()))
    with Links() as links:
        assert sysfs.driver(links.find(name)) == driver
        assert sysfs.driver(links.find("lo")) is None
    monkeypatch.setattr(isolation, "DRIVERS_WITHOUT_METADATA", (driver,))
    namespace = Namespace()
    try:
        with namespace.entered(), Links() as links:
            shell(f"ip link add {name} type veth")
            assert isolation.lacks_metadata(links.find(name)) is None
    finally:
        namespace.close()


def test_a_driver_without_metadata_is_used_in_generic_mode(cable, monkeypatch):
    monkeypatch.setattr(isolation, "lacks_metadata", lambda link: "ena")
    reason = f"{SENSOR}: native XDP of its driver (ena) has no metadata, which isolation needs"
    with pytest.raises(XdpErmError, match=re.escape(reason + ": use generic mode (--mode auto), or isolate: false")):
        attachment.attach(SENSOR, InterfaceConfig(mode="native"))
    assert attachment.attach(SENSOR, InterfaceConfig())[0] == reason + ": using generic mode, which is slower"
    assert stats.snapshot(SENSOR)[0]["mode"] == "generic"
    attachment.attach(SENSOR, InterfaceConfig(isolate=False, mode="native"))
    assert stats.snapshot(SENSOR)[0]["mode"] == "native"


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


@pytest.mark.parametrize("name", ["digest", "without"])
def test_a_filter_of_another_version_is_replaced(sensor, upgrade, monkeypatch, name):
    """Under hostile traffic, at no moment of which there is a program whose frames no filter takes."""
    with monkeypatch.context() as patched:
        if name == "without":  # as the first versions called it
            patched.setattr(isolation, "_name", lambda: isolation.FILTER)
        attachment.attach(SENSOR, InterfaceConfig(vlan="strip"))
    old, = filters()
    before = received()
    upgrade()
    stack = []
    original = attachment._put

    def put(*arguments):
        stack.append(filters())
        mirror(sensor, hostile(mac()), "strip")  # by the old program
        said = original(*arguments)
        stack.append(filters())
        mirror(sensor, hostile(mac()), "strip")  # by the new one
        return said

    monkeypatch.setattr(attachment, "_put", put)
    assert f"{SENSOR}: decapsulated frames are kept from the host's own network stack, by a newer filter" in \
        attachment.attach(SENSOR, InterfaceConfig(vlan="strip"))
    new, = filters()
    assert new == f"xdp_erm_isolate-{compiler.classifier_digest()}+clsact" != old
    assert stack == [[new, old], [new, old]]
    mirror(sensor, hostile(mac()), "strip")
    assert received() == before
    attachment.detach(SENSOR)
    assert (filters(), "clsact" in qdiscs()) == ([], False)


def test_a_failed_upgrade_leaves_the_old_filter(cable, upgrade, monkeypatch):
    attachment.attach(SENSOR, InterfaceConfig())
    before = filters()
    upgrade()

    def refuses(*_):
        raise XdpErmError("no")
    monkeypatch.setattr(attachment, "_attach", refuses)
    with pytest.raises(XdpErmError):
        attachment.attach(SENSOR, InterfaceConfig())
    assert filters() == before


@pytest.mark.parametrize("step", ["_put", "retire"])
def test_an_upgrade_that_is_killed_is_finished_by_the_next_attach(cable, upgrade, monkeypatch, step):
    attachment.attach(SENSOR, InterfaceConfig())
    upgrade()
    with monkeypatch.context() as patched:
        patched.setattr(isolation if step == "retire" else attachment, step, lambda *_: sys.exit("killed"))
        for owner, name in ((isolation, "withdraw"), (attachment.nic, "restore")):
            patched.setattr(owner, name, lambda *_: [])
        with pytest.raises(SystemExit):
            attachment.attach(SENSOR, InterfaceConfig())
    assert len(filters()) == 2
    attachment.attach(SENSOR, InterfaceConfig())
    assert filters() == [f"xdp_erm_isolate-{compiler.classifier_digest()}+clsact"]
    attachment.detach(SENSOR)
    assert (filters(), "clsact" in qdiscs()) == ([], False)


def test_somebody_elses_empty_qdisc_stays_where_a_command_was_killed(cable, monkeypatch):
    shell(f"tc qdisc add dev {SENSOR} clsact")
    with monkeypatch.context() as patched:
        patched.setattr(isolation, "_add_filter", lambda *_: sys.exit("killed"))
        for owner, name in ((attachment.nic, "restore"), (journal.Journal, "end")):
            patched.setattr(owner, name, lambda *_: [])
        with pytest.raises(SystemExit):
            attachment.attach(SENSOR, InterfaceConfig())
    assert attachment.detach(SENSOR)
    assert "clsact" in qdiscs()
