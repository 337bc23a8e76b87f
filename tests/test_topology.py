"""Interfaces that are made of others, or a part of them: who gets decapsulated frames, and what is refused."""

from __future__ import annotations

import dataclasses
import operator
import socket

import other_program
import pytest
from shell import shell

from xdp_erm_py import cli, doctor, lab
from xdp_erm_py.doctor import PROBLEM, WARNING
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import loader, ours, topology
from xdp_erm_py.kernel.links import Link, Links
from xdp_erm_py.kernel.netlink import Refused
from xdp_erm_py.lab import fanout
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.fanout import FanoutWorkers
from xdp_erm_py.lab.traffic import synthetic
from xdp_erm_py.settings import InterfaceConfig

DEFAULT, GENERIC = InterfaceConfig(), InterfaceConfig(mode="generic")
ELSEWHERE = "attach to the interface that the switch's frames come in on"


def program(name: str) -> int | None:
    with Links() as links:
        return links.find(name).program_id


def fails(act, *arguments) -> str:
    with pytest.raises(XdpErmError) as raised:
        act(*arguments)
    return str(raised.value)


@pytest.fixture
def bridge(cable) -> str:
    """One that the sensor's interface is a port of."""
    shell(f"ip link add bridge0 mtu 3500 type bridge; ip link set {SENSOR} master bridge0; ip link set bridge0 up")
    return "bridge0"


# Where no program sees mirrored frames

@pytest.mark.parametrize("add, name, reason", [
    ("ip link add ifb9 type ifb", "ifb9",
     "this ifb interface receives no frames; those redirected to it go on as frames of the interface that they came "
     "from"),
    ("ip tuntap add tun0 mode tun", "tun0",
     "this tun interface has no Ethernet header (link type 65534), and mirrored frames come in one"),
])
@pytest.mark.parametrize("config", [DEFAULT, GENERIC], ids=["auto", "generic"])
def test_what_xdp_never_sees_frames_on_is_refused(cable, add, name, reason, config):
    shell(add)
    assert fails(loader.attach, name, config) == f"{name}: {reason}: {ELSEWHERE}"
    assert program(name) is None
    assert (PROBLEM, f"{reason}: {ELSEWHERE}") in said_by_doctor("place", name)


@pytest.mark.parametrize("kind", ["dummy", "vrf"])
def test_other_kinds_that_receive_nothing(kind):
    """This kernel may not have them."""
    with pytest.raises(XdpErmError, match=f"eth9: this {kind} interface receives no frames"):
        topology.check(Link("eth9", 9, "", 1500, None, None, kind=kind))


def test_a_tap_is_as_good_as_any(cable):
    shell("ip tuntap add tap0 mode tap")
    loader.attach("tap0", DEFAULT)
    assert program("tap0")


# What is above

def said_by_doctor(check: str, name: str) -> list[tuple[str, str]]:
    return [(finding.result, finding.text) for finding in doctor.examine([name]) if finding.check == check]


STARVED = ("bridge bridge0, which gets its frames, gets no decapsulated ones: attach to bridge0 if Zeek captures there")


def test_frames_of_a_port_do_not_reach_its_bridge_and_it_is_said(cable, bridge):
    """Without isolation they do."""
    assert f"{SENSOR}: warning: {STARVED}" in loader.attach(SENSOR, DEFAULT)
    assert f"{SENSOR}: warning: {STARVED}" in loader.attach(SENSOR, DEFAULT)
    assert said_by_doctor("place", SENSOR) == [(WARNING, STARVED)]
    assert not [line for line in loader.attach(SENSOR, InterfaceConfig(isolate=False)) if "gets no" in line]
    assert said_by_doctor("place", SENSOR) == []


TAKEN = ("what comes here for the host's own tunnel vxlan0 (vxlan) is taken for mirrored frames, and does not get "
         "there: set `sources` to the switches' addresses")


def test_a_tunnel_of_the_hosts_own_is_told_of(cable):
    vxlan = InterfaceConfig(encapsulations=("vxlan",))
    others = InterfaceConfig(encapsulations=("erspan", "gre", "geneve"))
    switches = dataclasses.replace(vxlan, sources=("198.51.100.0/24",))

    def told(config):
        return f"{SENSOR}: warning: {TAKEN}" in loader.attach(SENSOR, config), said_by_doctor("place", SENSOR)

    shell("ip link add vxlan0 type vxlan id 7 dstport 4789 local 192.0.2.1")
    assert told(vxlan) == (False, [])  # as it is down
    shell("ip link set vxlan0 up")
    assert told(vxlan) == (True, [(WARNING, TAKEN)])
    assert told(vxlan) == (True, [(WARNING, TAKEN)])
    for config in (switches, others, DEFAULT):
        assert told(config) == (False, [])


def test_which_tunnels_can_be_meant():
    """This kernel may have none of these kinds."""
    here, gre = link("eth1", 1), link("gre1", 2, kind="gre", flags=1)
    erspan, ip6 = link("e1", 3, kind="erspan", lower=9, flags=1), link("g6", 4, kind="ip6gretap", lower=1, flags=1)
    everything = [here, link("vlan5", 9, kind="vlan", lower=5), gre, erspan, ip6]
    told = topology.diverted(everything, here, ("erspan", "gre", "vxlan"), ())
    # The other one stands on another interface.
    assert [line.partition(" tunnel ")[2].split()[0] for line in told] == ["gre1", "g6"]
    assert topology.diverted(everything, here, ("vxlan", "geneve", "tzsp", "erm"), ()) == []
    assert topology.diverted(everything, here, ("gre",), ("198.51.100.0/24",)) == []


def test_the_cure_that_is_named_is_one(cable, bridge, monkeypatch):
    """Attached to the bridge, frames of its port arrive there as they were mirrored."""
    loader.attach(bridge, DEFAULT)
    cable.wait_for_carrier()
    packets = list(synthetic(flows=20, packets=200))
    monkeypatch.setattr(fanout, "SENSOR_INTERFACE", bridge)
    with FanoutWorkers(cable, 2, operator.attrgetter("mirrored")) as workers:
        lab.mirror(cable, packets, workers)
        result = workers.finish()
    assert (result.missing, result.unexpected, result.identical) == (0, 0, 200)


def link(name: str, index: int, **settings) -> Link:
    return Link(name, index, "", 1500, settings.pop("program_id", None), None, **settings)


def test_what_is_above_and_below():
    """A bridge over a VLAN over a bond, which this kernel may not have, and a veth's peer, which is neither."""
    eth1, eth2 = (link(f"eth{number}", number, master=5) for number in (1, 2))
    bond = link("bond0", 5, kind="bond")
    vlan = link("bond0.7", 6, kind="vlan", lower=5, master=8)
    bridge = link("bridge0", 8, kind="bridge")
    veth = link("veth0", 9, kind="veth", lower=6)
    everything = [veth, bridge, eth1, eth2, bond, vlan]
    assert topology.below(everything, bridge) == [vlan, bond, eth1, eth2]
    assert topology.below(everything, bond) == [eth1, eth2]
    assert topology.below(everything, eth1) == topology.below(everything, veth) == []
    assert topology.above(everything, eth1) == [bond]
    assert topology.above(everything, bond) == [vlan]
    assert topology.above(everything, vlan) == [bridge]
    assert topology.above(everything, bridge) == topology.above(everything, veth) == []


UNTAGGED = ("in generic mode a VLAN tag of the wrapping stays on the mirrored frame here: if the switches' ERM comes "
            f"tagged, attach to {SENSOR}, and capture from there")


def test_a_tag_that_is_taken_off_below_is_said(cable, bridge):
    """And is true: the tag of a wrapped frame is beside the mirrored one."""
    assert f"{bridge}: warning: {UNTAGGED}" in loader.attach(bridge, DEFAULT)
    assert said_by_doctor("place", bridge) == [(WARNING, UNTAGGED)]
    cable.wait_for_carrier()
    shell(f"ip link set {bridge} promisc on")
    packet, = synthetic(flows=1, packets=1)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as tap:
        tap.bind((bridge, 0))
        tap.setsockopt(fanout.SOL_PACKET, fanout.PACKET_AUXDATA, 1)
        tap.settimeout(60)
        cable.send(packet.sent[:12] + bytes.fromhex("81000007") + packet.sent[12:])
        frame, ((*_, auxdata),), *_ = tap.recvmsg(1 << 16, 1 << 8)
    assert frame == packet.mirrored
    status, *_, tag, _ = fanout.AUXDATA.unpack(auxdata)
    assert (status & fanout.TP_STATUS_VLAN_VALID, tag) == (fanout.TP_STATUS_VLAN_VALID, 7)


def test_where_no_tag_is_taken_off(cable):
    assert topology.untagged([], link("eth1", 1)) == []
    assert not [line for line in loader.attach(SENSOR, GENERIC) if "VLAN tag" in line]
    vlan, parent = link("eth1.5", 2, kind="vlan", lower=1), link("eth1", 1)
    assert topology.untagged([vlan, parent], vlan) == []


# Two programs

def test_a_port_of_a_bridge_that_has_a_program_is_refused(cable, bridge):
    loader.attach(bridge, DEFAULT)
    assert fails(loader.attach, SENSOR, DEFAULT) == (
        f"{SENSOR}: bridge bridge0, which gets its frames, has an XDP program, and the kernel allows one of the two: "
        "use that, or free it first (`xdp-erm detach bridge0`)")
    assert program(SENSOR) is None
    loader.detach(bridge)
    loader.attach(SENSOR, DEFAULT)
    loader.detach(SENSOR)
    assert loader.detach(SENSOR) == [f"{SENSOR}: xdp-erm is not attached"]


def test_a_macvlan_above_that_has_a_program(cable):
    shell(f"ip link add link {SENSOR} name macvlan0 type macvlan")
    theirs = other_program.attach("macvlan0", "generic")
    assert "macvlan macvlan0, which gets its frames, has an XDP program" in fails(loader.attach, SENSOR, DEFAULT)
    assert (program(SENSOR), program("macvlan0")) == (None, theirs)


def test_ours_below_is_refused(cable, bridge):
    """No wrapped frame comes up any more, and the kernel would let go of the lower one only after the upper one."""
    loader.attach(SENSOR, DEFAULT)
    assert fails(loader.attach, bridge, DEFAULT) == (
        f"{bridge}: xdp-erm is attached to veth {SENSOR} below it, and decapsulates there: capture from {SENSOR}, or "
        f"free it first (`xdp-erm detach {SENSOR}`)")
    assert program(bridge) is None


def test_a_program_of_others_below_is_said(cable, bridge):
    theirs = other_program.attach(SENSOR, "native")
    warning = f"{bridge}: warning: veth {SENSOR} below it has an XDP program, which sees frames first"
    assert warning in loader.attach(bridge, DEFAULT)
    assert warning not in loader.attach(bridge, DEFAULT)  # said once
    assert program(SENSOR) == theirs


def test_two_that_became_one_stack_are_detached_at_once(cable, capsys):
    """The kernel takes the lower one off only once the upper one is."""
    shell("ip link add bridge0 mtu 3500 type bridge; ip link set bridge0 up")
    for name in (SENSOR, "bridge0"):
        loader.attach(name, DEFAULT)
    shell(f"ip link set {SENSOR} master bridge0")
    loader.attach(SENSOR, DEFAULT)  # nothing to do, so the kernel is not asked
    assert fails(loader.detach, SENSOR) == (
        f"{SENSOR}: program {program(SENSOR)} cannot be taken off: bridge0, which gets its frames, has one, too: "
        "`xdp-erm detach bridge0` first")
    for names in ([], [SENSOR, "bridge0"]):
        assert cli.main(["detach", *names]) == 0, capsys.readouterr()
        assert (program(SENSOR), program("bridge0")) == (None, None)
        shell(f"ip link set {SENSOR} nomaster")
        for name in (SENSOR, "bridge0"):
            loader.attach(name, DEFAULT)
        shell(f"ip link set {SENSOR} master bridge0")


@pytest.mark.parametrize("first", [1, 60])
def test_a_bridge_of_many_ports(cable, first):
    """What was changed of each is a part of the program's state, which has room for it, also for those to come."""
    shell("ip link add bridge0 type bridge; ip link set bridge0 up")
    add = "ip link add port{0} type veth peer name end{0}; ip link set port{0} master bridge0"
    shell("; ".join(add.format(number) for number in range(first)))
    loader.attach("bridge0", DEFAULT)
    shell("; ".join(add.format(number) for number in range(first, 80)) or "true")
    said = loader.attach("bridge0", DEFAULT)
    assert "port79: turned off rx-checksum, rx-vlan-hw-parse, rx-vlan-stag-hw-parse" in said
    with Links() as links:
        assert len(ours.find(links, "bridge0").state["nic"]["below"]) == 80
    said = loader.detach("bridge0")
    assert "port79: turned on rx-checksum, rx-vlan-hw-parse, rx-vlan-stag-hw-parse again" in said
    assert program("bridge0") is None


def test_a_slave_of_a_bond_that_has_a_program(monkeypatch):
    bond, slave = link("bond0", 5, kind="bond"), link("eth1", 1, program_id=77, master=5)
    monkeypatch.setattr(topology, "attachment_of", lambda _: None)
    with pytest.raises(XdpErmError) as raised:
        topology.conflicts([bond, slave], bond)
    assert str(raised.value) == ("bond0: eth1, a part of it, has an XDP program, and the kernel allows one of the two: "
                                 "free it first (`ip link set dev eth1 xdp off`)")


def test_who_holds_the_interface_is_not_made_up(cable, monkeypatch):
    """That somebody was quicker is said only where somebody's program is there."""
    attach = Links.attach

    def refuse(self, link, program, mode, replaced=None):
        raise Refused(17, "an upper device has one")

    def outrun(self, link, program, mode, replaced=None):
        monkeypatch.setattr(Links, "attach", attach)
        other_program.attach(SENSOR, "native")
        attach(self, link, program, mode, replaced)

    monkeypatch.setattr(Links, "attach", refuse)
    assert fails(loader.attach, SENSOR, DEFAULT) == f"{SENSOR}: XDP is refused: an upper device has one"
    monkeypatch.setattr(Links, "attach", outrun)
    assert fails(loader.attach, SENSOR, DEFAULT) == (
        f"{SENSOR}: somebody else attached an XDP program just now: try again")
