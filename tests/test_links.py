"""Interfaces as rtnetlink tells of them: all of them, by all their names, and what they count."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct

import pytest
from shell import shell

from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.kernel.links import Link, Links, gone
from xdp_erm_py.kernel.netlink import DUMP, Refused, Rtnetlink, attribute
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import SWITCH_INTERFACE as SWITCH

LONG = "uplink-of-the-mirror-" + "x" * 106


def link(name: str = SENSOR) -> Link:
    with Links() as links:
        return links.find(name)


def test_an_interface_is_found_by_any_of_its_names(cable):
    assert len(LONG) == 127
    assert link().other_names == ()
    for name in (LONG, "mirror0"):
        shell(f"ip link property add dev {SENSOR} altname {name}")
    assert link(LONG) == link("mirror0") == link()
    assert (link().name, sorted(link().other_names)) == (SENSOR, ["mirror0", LONG])
    with pytest.raises(XdpErmError, match="mirror1: no such interface"):
        link("mirror1")


def test_what_an_interface_is(cable):
    shell(f"""
        ip link add bridge0 type bridge
        ip link set {SENSOR} master bridge0
        ip link add link bridge0 name macvlan0 type macvlan
        ip tuntap add tun0 mode tun
    """)
    assert (link().kind, link().type, link().master) == ("veth", 1, link("bridge0").index)
    assert (link("macvlan0").kind, link("macvlan0").lower) == ("macvlan", link("bridge0").index)
    assert (link("tun0").kind, link("tun0").type, link("tun0").answers_arp) == ("tun", 0xFFFE, False)
    assert link().lower is None  # its peer is in another network namespace
    assert (link("lo").type, link("lo").kind, link("lo").master) == (772, None, None)


def test_up_carrier_and_arp(cable):
    cable.wait_for_carrier()
    assert (link().up, link().carrier, link().answers_arp) == (True, True, True)
    shell(f"ip link set {SENSOR} arp off")
    assert not link().answers_arp
    with cable.switch.entered():
        shell(f"ip link set {SWITCH} down")
    assert (link().up, link().carrier) == (True, False)
    shell(f"ip link set {SENSOR} down")
    assert (link().up, link().carrier) == (False, False)


def test_what_an_interface_counts(cable):
    cable.wait_for_carrier()
    with Links() as links:
        before = links.statistics(link())
        for _ in range(7):
            cable.send(bytes(60))
        after = links.statistics(link())
        told, = json.loads(shell(f"ip -j -s link show {SENSOR}"))
        assert after["rx_packets"] - before["rx_packets"] == 7
        assert {name: told["stats64"]["rx"][name] for name in ("packets", "bytes", "dropped")} == {
            name: after[f"rx_{name}"] for name in ("packets", "bytes", "dropped")}
        gone = link()
        shell(f"ip link del {SENSOR}")
        with pytest.raises(XdpErmError, match="went away"):
            links.statistics(gone)


def test_addresses(cable):
    shell(f"ip address add 192.0.2.1/24 dev {SENSOR}; ip address add 198.51.100.1/32 dev {SENSOR}; "
          f"ip address add 127.0.0.2/8 dev lo; sysctl -w net/ipv6/conf/{SENSOR}/disable_ipv6=0; "
          f"ip address add 2001:db8::1/64 dev {SENSOR} nodad; ip address add fe80::7/64 dev {SENSOR} nodad")
    with Links() as links:
        assert links.addresses(link()) == ["192.0.2.1", "198.51.100.1", "2001:db8::1"]


class Scripted:
    """A socket with answers prepared for each request."""

    def __init__(self, *answers: list[tuple[int, int, bytes]]) -> None:
        self._answers = list(answers)
        self._pending: list[bytes] = []
        self.requests = 0

    def send(self, _: bytes) -> None:
        self.requests += 1
        self._pending = [struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body
                         for kind, flags, body in self._answers[min(self.requests, len(self._answers)) - 1]]

    def recv(self, _: int) -> bytes:
        return self._pending.pop(0)


DONE, LINK = 3, 16
MULTI, INTERRUPTED = 2, 0x10


def dumped(*answers: list[tuple[int, int, bytes]]) -> tuple[list[bytes], int]:
    with Rtnetlink() as rtnetlink:
        rtnetlink._socket.close()
        rtnetlink._socket = scripted = Scripted(*answers)
        scripted.close = lambda: None
        return rtnetlink.request(18, DUMP, b""), scripted.requests


@pytest.mark.parametrize("where", ["first", "last", "end"])
def test_an_interrupted_dump_is_asked_for_again(where):
    whole = [(LINK, MULTI, b"one."), (LINK, MULTI, b"two."), (DONE, MULTI, bytes(4))]
    torn = [(LINK, MULTI | INTERRUPTED * (where == "first"), b"one."),
            (LINK, MULTI | INTERRUPTED * (where == "last"), b"none"),
            (DONE, MULTI | INTERRUPTED * (where == "end"), bytes(4))]
    assert dumped(whole) == ([b"one.", b"two."], 1)
    assert dumped(torn, torn, whole) == ([b"one.", b"two."], 3)


def test_a_dump_that_is_always_interrupted_ends():
    with pytest.raises(Refused, match="changes all the time") as refused:
        dumped([(DONE, MULTI | INTERRUPTED, bytes(4))])
    assert refused.value.code == errno.EAGAIN


@pytest.mark.parametrize("more, words", [(b"", os.strerror(errno.ENOMEM)), (attribute(1, b"no room\0"), "no room")])
def test_a_dump_that_fails_on_its_way_is_no_short_one(more, words):
    failed = [(LINK, MULTI, b"one."), (DONE, MULTI, struct.pack("=i", -errno.ENOMEM) + more)]
    with pytest.raises(Refused, match=f"^{words}$") as refused:
        dumped(failed)
    assert refused.value.code == errno.ENOMEM


def test_a_device_that_does_not_answer_has_not_gone(cable):
    """The kernel says "no such device" of one that is being reset as well."""
    with Links() as links:
        link = links.find(SENSOR)
    assert str(gone(link)) == (f"{SENSOR}: its driver does not answer: it resets the device, or that is suspended; try "
                               "again")
    assert "went away" in str(gone(dataclasses.replace(link, index=4095)))


def test_links_that_cannot_be_listed(monkeypatch):
    def refuse(*_: object) -> list[bytes]:
        raise Refused(errno.EAGAIN, "it changes all the time")

    monkeypatch.setattr(Rtnetlink, "request", refuse)
    with Links() as links, pytest.raises(XdpErmError, match="cannot be listed: it changes all the time"):
        list(links)
