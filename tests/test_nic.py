"""What is changed on a NIC, and on those below it, and that it comes back."""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any

import pytest
from shell import shell

from xdp_erm_py import doctor
from xdp_erm_py.config import InterfaceConfig
from xdp_erm_py.doctor import OK, PROBLEM, WARNING
from xdp_erm_py.interface import loader, nic, ours
from xdp_erm_py.kernel import rps, sysfs
from xdp_erm_py.kernel.ethtool import Feature
from xdp_erm_py.kernel.links import Link, Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR

DEFAULT = InterfaceConfig()
OFFLOADS = ["rx-checksum", "rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"]  # a veth's that are on at first


def link(name: str) -> Link:
    with Links() as links:
        return links.find(name)


def features(name: str = SENSOR) -> str:
    return shell(f"ethtool -k {name}")


def changes(name: str) -> dict[str, Any]:
    with Links() as links:
        return ours.find(links, name).state["nic"]


@pytest.fixture
def bridge(cable) -> str:
    """One that the sensor's interface is a port of."""
    shell(f"ip link add bridge0 mtu 3500 type bridge; ip link set {SENSOR} master bridge0; ip link set bridge0 up")
    return "bridge0"


# Interfaces below

def test_offloads_of_interfaces_below_are_off_while_attached(cable, bridge):
    before = features(), features(bridge)
    assert f"{SENSOR}: turned off {', '.join(OFFLOADS)}" in loader.attach(bridge, DEFAULT)
    assert nic.harmful(link(SENSOR)) == ([], [])
    assert changes(bridge)["below"] == {str(link(SENSOR).index): {"features": OFFLOADS}}
    assert not [line for line in loader.attach(bridge, DEFAULT) if "turned off" in line]
    assert f"{SENSOR}: turned on {', '.join(OFFLOADS)} again" in loader.detach(bridge)
    assert (features(), features(bridge)) == before


def test_an_interface_that_comes_below_later(cable, bridge):
    """A bond's new slave, for one: doctor says it, the next attach readies it, detach undoes it also where it left."""
    shell(f"ip link set {SENSOR} nomaster")
    loader.attach(bridge, DEFAULT)
    before = features()
    shell(f"ip link set {SENSOR} master {bridge}")
    said = [(each.result, each.text) for each in doctor.examine([bridge]) if each.check == "offloads"]
    assert (PROBLEM, f"rx-checksum is on on {SENSOR}, whose frames it gets; it {nic.FEATURES['rx-checksum']}: `xdp-erm "
                     f"attach {bridge}` turns it off") in said
    loader.attach(bridge, DEFAULT)
    assert nic.harmful(link(SENSOR)) == ([], [])
    shell(f"ip link set {SENSOR} nomaster")
    loader.detach(bridge)
    assert features() == before


def test_mtus_of_interfaces_below(cable, bridge):
    shell(f"ip link set {SENSOR} mtu 1500; ip link set {bridge} mtu 1400")
    said = loader.attach(bridge, DEFAULT)
    assert [line for line in said if "MTU" in line] == [
        f"{name}: warning: MTU is {mtu}; full-size mirrored frames need 1554: use --set-mtu or `ip link set dev {name} "
        "mtu 1554`" for name, mtu in ((SENSOR, 1500), (bridge, 1400))]
    assert [each.text.partition(",")[0] for each in doctor.examine([bridge])
            if (each.check, each.result) == ("mtu", WARNING)] == ["MTU is 1400", f"MTU of {SENSOR}"]
    assert [line for line in loader.attach(bridge, InterfaceConfig(set_mtu=True)) if "MTU" in line] == [
        f"{SENSOR}: set MTU to 1554 (was 1500)", f"{bridge}: set MTU to 1554 (was 1400)"]
    assert (link(SENSOR).mtu, link(bridge).mtu) == (1554, 1554)
    loader.detach(bridge)
    assert (link(SENSOR).mtu, link(bridge).mtu) == (1500, 1400)


def test_what_two_stand_on_stays_ready_until_both_are_detached(cable):
    """In either order."""
    before = features()
    names = ["macvlan1", "macvlan2"]
    shell("".join(f"ip link add link {SENSOR} name {name} type macvlan;" for name in names))
    for first, second in (names, names[::-1]):
        for name in names:
            loader.attach(name, DEFAULT)
        loader.detach(first)
        assert nic.harmful(link(SENSOR)) == ([], [])
        loader.detach(second)
        assert features() == before


def test_an_attach_that_fails_takes_back_what_it_did_below(cable, bridge, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    before = features(), features(bridge), link(SENSOR).mtu
    monkeypatch.setattr(Links, "attach", fail)
    with pytest.raises(KeyboardInterrupt):
        loader.attach(bridge, InterfaceConfig(set_mtu=True))
    assert (features(), features(bridge), link(SENSOR).mtu) == before


def test_changes_are_merged_by_interface():
    earlier = {"mtu": [1500, 1554], "below": {"3": {"features": ["rx-gro"]}, "4": {"mtu": [1400, 1500]}}}
    later = {"features": ["rx-lro"], "below": {"3": {"features": ["rx-lro", "rx-gro"]}, "4": {"mtu": [1500, 1554]},
                                              "5": {"rps": {"rx-0": ["0", "3"]}}}}
    assert nic.merged(earlier, later) == {
        "mtu": [1500, 1554], "features": ["rx-lro"],
        "below": {"3": {"features": ["rx-gro", "rx-lro"]}, "4": {"mtu": [1400, 1554]},
                  "5": {"rps": {"rx-0": ["0", "3"]}}}}
    assert nic.merged(earlier, {}) == earlier and nic.merged({}, earlier) == earlier


# Receive packet steering

class Kept:
    """What was told of changes before they were made."""

    def __init__(self) -> None:
        self.changes: dict[str, Any] = {}

    def __call__(self, more: dict[str, Any]) -> None:
        self.changes = nic.merged(self.changes, more)


def test_steering_comes_and_goes_on_interfaces_below_as_well(cable):
    shell("ip link add other0 type veth peer name other1")
    with Links() as links:
        stack = [links.find(SENSOR), links.find("other0")]
    before = [rps.masks(each) for each in stack]
    kept = Kept()
    nic.set_rps(stack, (0,), {}, kept)
    assert [rps.same(rps.masks(each)["rx-0"], "1") for each in stack] == [True, True]
    assert kept.changes["below"][str(stack[1].index)]["rps"]["rx-0"][0] == before[1]["rx-0"]
    nic.set_rps(stack, (), kept.changes, Kept())
    assert [rps.masks(each) for each in stack] == before
    assert "rps" not in kept.changes and "rps" not in kept.changes["below"][str(stack[1].index)]


@pytest.fixture
def driver(monkeypatch) -> dict[str, Feature]:
    """The features of an interface's driver, i40e."""
    def change(_: Link, values: dict[str, bool]) -> None:
        made.update({name: made[name]._replace(on=on) for name, on in values.items()})

    made = {"rx-hashing": Feature(True, True), "rx-gro": Feature(False, True), "rx-checksum": Feature(False, True)}
    monkeypatch.setattr(nic, "_features", lambda _: dict(made))
    monkeypatch.setattr(nic, "_set", change)
    monkeypatch.setattr(sysfs, "driver", lambda _: "i40e")
    monkeypatch.setattr(rps, "masks", lambda _: {})
    return made


NIC = Link("eth9", 9, "", 1554, None, None)


def test_the_hash_stays_unless_steering_goes_by_it(driver):
    kept = Kept()
    with Links() as links:
        assert nic.prepare(links, [NIC], 1554, False, kept) == nic.settle([NIC], kept) == []
    assert nic.set_rps([NIC], (), {}, kept) == []
    assert driver["rx-hashing"].on and not kept.changes
    assert nic.set_rps([NIC], (0, 1), {}, kept) == [
        "eth9: turned off rx-hashing, which is the wrapping's hash",
        "eth9: warning: without it i40e receives everything in one queue: `spread: cpumap` needs no such thing"]
    assert not driver["rx-hashing"].on and kept.changes == {"features": ["rx-hashing"]}
    earlier = copy.deepcopy(kept.changes)
    assert nic.set_rps([NIC], (), earlier, kept) == ["eth9: turned on rx-hashing again"]
    assert driver["rx-hashing"].on and earlier == {"features": []}


def test_only_some_drivers_need_the_hash(driver, monkeypatch):
    monkeypatch.setattr(sysfs, "driver", lambda _: "ixgbe")
    assert nic.set_rps([NIC], (0, 1), {}, Kept()) == ["eth9: turned off rx-hashing, which is the wrapping's hash"]


@pytest.mark.parametrize("driver, offered, longest", [
    ("virtio_net", (0, 1, 5, 16, 17), 1518),  # no more than checksums, an address, a link's state and a control queue
    ("virtio_net", (0, 1, 5, 15), None), ("virtio_net", (7, 8), None), ("virtio_net", (3,), None), ("igb", (0,), None)])
def test_a_virtio_nic_whose_buffers_are_short(monkeypatch, tmp_path, driver, offered, longest):
    device = tmp_path / "class" / "net" / NIC.name / "device"
    device.mkdir(parents=True)
    (device / "driver").symlink_to(f"../drivers/{driver}")
    (device / "features").write_text("".join("1" if bit in offered else "0" for bit in range(64)) + "\n")

    @contextlib.contextmanager
    def mounted():
        root = os.open(tmp_path, os.O_RDONLY)
        yield root
        os.close(root)

    monkeypatch.setattr(sysfs, "mounted", mounted)
    assert sysfs.longest_frame(NIC) == longest
    assert nic.short_buffers(NIC, 1500) == []
    said = nic.short_buffers(NIC, 1554)
    assert said == ([] if longest is None else [
        "the hypervisor drops frames for it of more than 1518 bytes, whatever the MTU, and full-size mirrored ones "
        "have 1568: let it offer mergeable receive buffers (QEMU: mrg_rxbuf=on)"])


def test_what_cannot_be_turned_off_is_said_where_it_does_harm(driver, cable, monkeypatch):
    driver.update({"rx-checksum": Feature(True, False), "rx-gro-hw": Feature(True, False)})
    stays = "rx-gro-hw is on and the driver does not let it be turned off; it merges frames before XDP sees them"
    assert nic.settle([NIC], Kept()) == [f"eth9: warning: {stays}"]
    with Links() as links:
        patient = doctor.Patient(links.find(SENSOR), {}, None, {})
    assert list(doctor.offloads(patient)) == [
        (OK, "rx-checksum is on and the driver does not let it be turned off, which does no harm unless Zeek's "
             "AF_Packet::checksum_validation_mode is CHECKSUM_KERNEL"),
        (WARNING, stays)]
