"""`xdp-erm generate` sends what it says: counted by xdp-erm, and looked at frame by frame."""

from __future__ import annotations

import socket
import threading

import pytest
from pyroute2 import IPRoute
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from xdp_erm_py import cli, shared
from xdp_erm_py.interface import loader, stats
from xdp_erm_py.lab import fanout
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, SWITCH_INTERFACE, Cable
from xdp_erm_py.settings import InterfaceConfig


def generate(cable: Cable, *arguments: str) -> int:
    with cable.switch.entered():
        return cli.main(["generate", SWITCH_INTERFACE, *arguments])


@pytest.mark.parametrize("ipv6", [False, True])
def test_the_frames_are_the_ones_asked_for(cable: Cable, ipv6: bool, capsys: pytest.CaptureFixture[str]) -> None:
    loader.attach(SENSOR_INTERFACE, InterfaceConfig())
    cable.wait_for_carrier()
    receiver = fanout._fanout_member()
    options = ["--ipv6"] if ipv6 else []
    assert generate(cable, "--packets", "210", "--flows", "7", "--sessions", "3", "--size", "100", "--vlan", "2011",
                    "--rate", "2000", *options) == 0
    assert "sent 210 of 210 frames (154 bytes, 7 flows, 3 sessions)" in capsys.readouterr().out

    snapshot = stats.snapshot(SENSOR_INTERFACE)[0]
    assert snapshot["counters"]["decapsulated"] == {"packets": 210, "bytes": 210 * 154}
    assert {entry["id"]: entry["packets"] for entry in snapshot["sessions"]} == {1: 90, 2: 60, 3: 60}

    flows: dict[object, int] = {}
    with receiver:
        for _ in range(210):
            data, control, *_ = receiver.recvmsg(2048, socket.CMSG_SPACE(fanout.AUXDATA.size))
            assert fanout.AUXDATA.unpack(control[0][2])[5] == 2011
            frame = Ether(data)
            network = frame[IPv6 if ipv6 else IP]
            flows[network.src] = flows.get(network.src, 0) + 1
            sent = bytes(network)
            del network[UDP].chksum
            if not ipv6:
                network[UDP].chksum = 0
                del network.chksum
            assert bytes(type(network)(bytes(network))) == sent, "a checksum is wrong"
            assert len(data) == 100
    assert list(flows.values()) == [30] * 7


@pytest.mark.parametrize("kind", shared.ENCAPSULATIONS)
def test_any_encapsulation(cable: Cable, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    loader.attach(SENSOR_INTERFACE, InterfaceConfig(encapsulations=(kind,)))
    cable.wait_for_carrier()
    receiver = fanout._fanout_member()
    assert generate(cable, "--packets", "210", "--flows", "7", "--sessions", "3", "--size", "100", "--vlan", "2011",
                    "--rate", "2000", "--encapsulation", kind) == 0
    (snapshot,) = stats.snapshot(SENSOR_INTERFACE)[:1]
    assert snapshot["counters"]["decapsulated"]["packets"] == 210
    assert {(session["encapsulation"], session["id"], session["gaps"], session["packets"])
            for session in snapshot["sessions"]} == {
        (kind, number, 0 if kind == "erspan" else None, packets) for number, packets in ((1, 90), (2, 60), (3, 60))}
    flows: dict[object, int] = {}
    with receiver:
        for _ in range(210):
            data, control, *_ = receiver.recvmsg(2048, socket.CMSG_SPACE(fanout.AUXDATA.size))
            assert fanout.AUXDATA.unpack(control[0][2])[5] == 2011
            assert len(data) == 100
            flows[Ether(data)[IP].src] = flows.get(Ether(data)[IP].src, 0) + 1
    assert list(flows.values()) == [30] * 7


@pytest.mark.check
def test_says_so_where_the_peer_takes_nothing(cable: Cable, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(cable, "--packets", "10") == 1
    assert "10 frames were dropped: the peer has neither an XDP program nor GRO" in capsys.readouterr().err


def test_what_the_kernel_sends_meanwhile_is_not_counted(cable: Cable, capsys: pytest.CaptureFixture[str]) -> None:
    loader.attach(SENSOR_INTERFACE, InterfaceConfig())
    cable.wait_for_carrier()
    before = transmitted(cable)
    over = threading.Event()

    def chatter() -> None:
        while not over.is_set():
            cable.send(bytes(60))
    with cable.switch.entered():
        talker = threading.Thread(target=chatter)
    talker.start()
    try:
        status = generate(cable, "--packets", "200", "--rate", "1000")
    finally:
        over.set()
        talker.join()
    assert status == 0
    assert "sent 200 of 200 frames" in capsys.readouterr().out
    assert transmitted(cable) - before > 200


def transmitted(cable: Cable) -> int:
    with cable.switch.entered(), IPRoute() as route:
        packets: int = route.link("get", ifname=SWITCH_INTERFACE)[0].get_attr("IFLA_STATS64")["tx_packets"]
    return packets


def test_refuses_what_is_no_veth(cable: Cable, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "lo"]) == 2
    assert "lo: no virtual interface, not veth" in capsys.readouterr().err
    assert cli.main(["generate", "nothing0"]) == 1
    assert "nothing0: no such interface" in capsys.readouterr().err
