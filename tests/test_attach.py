"""Attaching, swapping and detaching, on interfaces in network namespaces of the tests' own."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filters
import other_program
import pytest
from pyroute2 import IPRoute
from shell import shell

from xdp_erm_py import doctor, lab, shared
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import isolation, journal, loader, nic, ours, stats, topology
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Link, Links
from xdp_erm_py.kernel.netlink import Refused, Rtnetlink
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.fanout import FanoutWorkers
from xdp_erm_py.lab.traffic import synthetic
from xdp_erm_py.program import compiler
from xdp_erm_py.settings import InterfaceConfig

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[1] / "bin" / "xdp-erm")]
TIMEOUT = 60  # seconds

DEFAULT = InterfaceConfig()
NATIVE, GENERIC = InterfaceConfig(mode="native"), InterfaceConfig(mode="generic")

# On a veth, what is on at first and must not be while frames are decapsulated.
OFFLOADS = {"rx-vlan-offload", "rx-checksumming", "rx-vlan-stag-hw-parse"}
TURNED_OFF = f"{SENSOR}: turned off rx-checksum, rx-vlan-hw-parse, rx-vlan-stag-hw-parse"
TURNED_ON = f"{SENSOR}: turned on rx-checksum, rx-vlan-hw-parse, rx-vlan-stag-hw-parse again"
ISOLATED = f"{SENSOR}: decapsulated frames are kept from the host's own network stack"
RELEASED = f"{SENSOR}: the host's own network stack sees all frames again"
MISSING = f"{SENSOR}: no such interface in this network namespace; `ip link` lists them"


def link(name: str = SENSOR) -> Link:
    with Links() as links:
        return links.find(name)


def features(name: str = SENSOR) -> dict[str, str]:
    """What `ethtool -k` says: on or off, by feature."""
    done = subprocess.run(["ethtool", "-k", name], capture_output=True, text=True, timeout=TIMEOUT, check=True)
    return dict(line.strip().split(": ", 1) for line in done.stdout.splitlines()[1:])


def turn(state: str, feature: str) -> None:
    subprocess.run(["ethtool", "-K", SENSOR, feature, state], timeout=TIMEOUT, check=True)


def set_mtu(mtu: int, name: str = SENSOR) -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], mtu=mtu)


def delete_sensor() -> None:
    with IPRoute() as route:
        route.link("del", index=route.link_lookup(ifname=SENSOR)[0])


def fails(act, *arguments, **keywords) -> str:
    """The message of the error that this call must end with."""
    with pytest.raises(XdpErmError) as raised:
        act(*arguments, **keywords)
    message = str(raised.value)
    assert "\n" not in message
    return message


def refusal(name: str, reason: str) -> str:
    """A pattern; the reason is in the kernel's words, which change with its version."""
    return rf"{name}: XDP is refused in native mode: {reason}; --mode generic works with every driver"


def counters(name: str = SENSOR) -> dict[str, dict[str, int]]:
    interface, = stats.snapshot(name)
    return interface["counters"]


def mirror(cable, packets):
    """Sends ERM from the switch and returns what arrived at the sensor."""
    with FanoutWorkers(cable, 2, operator.attrgetter("mirrored")) as workers:
        lab.mirror(cable, packets, workers)
        return workers.finish()


@contextlib.contextmanager
def bridge():
    """An interface whose driver knows no native XDP."""
    with IPRoute() as route:
        route.link("add", ifname="bridge0", kind="bridge", mtu=2000)
    yield "bridge0"


def wait_until_gone(open_by_id, number):
    """The kernel frees programs and maps some time after their last user has left."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            with bpf.descriptor(open_by_id(number)):
                time.sleep(0.02)
        except FileNotFoundError:
            return
    pytest.fail(f"{open_by_id.__name__} {number} is still there")


def map_fd(number: int) -> int:
    return bpf.Map.by_id(number).fd


# Attach and detach

@pytest.mark.check
def test_what_is_done_is_said(cable):
    assert loader.attach(SENSOR, DEFAULT) == [
        TURNED_OFF, ISOLATED, f"{SENSOR}: attached (native, program {link().program_id})"]
    assert (link().mode, link().mtu) == ("native", 3500)
    attached = link().program_id
    assert loader.detach(SENSOR) == [f"{SENSOR}: detached (program {attached})", TURNED_ON, RELEASED]
    assert link().program_id is None


@pytest.mark.check
def test_both_are_idempotent(cable):
    loader.attach(SENSOR, DEFAULT)
    attached = link()
    assert loader.attach(SENSOR, DEFAULT) == [f"{SENSOR}: already attached (native, program {attached.program_id})"]
    assert link() == attached
    loader.detach(SENSOR)
    detached = link()
    assert loader.detach(SENSOR) == [f"{SENSOR}: xdp-erm is not attached"]
    assert link() == detached


def test_an_alternative_name_does_as_well(cable, tmp_path):
    """In a configuration file, too; what is said and shown has the kernel's own."""
    name = "uplink-of-the-mirror-" + "x" * 106
    subprocess.run(["ip", "link", "property", "add", "dev", SENSOR, "altname", name], check=True, timeout=TIMEOUT)

    def run(*arguments: str) -> str:
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    file = tmp_path / "xdp-erm.yaml"
    file.write_text(f"interfaces: {{{name}: {{vlan: strip}}}}")
    for names in ([], [name], [SENSOR], [name, SENSOR]):
        said = run("attach", "--config", str(file), *names)
        assert f"{SENSOR}: attached (" in said or said == f"{SENSOR}: already attached (native, program " \
            f"{link().program_id})\n"
    assert f"interfaces:\n  {SENSOR}:\n" in run("config", "--config", str(file))
    interface, = json.loads(run("stats", name, "--json"))["interfaces"]
    assert (interface["name"], interface["other_names"], interface["config"]["vlan"]) == (SENSOR, [name], "strip")
    lines = run("doctor", "--config", str(file), name).splitlines()
    assert [line.partition(": ")[0].split()[1] for line in lines].count(SENSOR) > 5 and name not in "".join(lines)
    assert run("detach", name).startswith(f"{SENSOR}: detached (program ")
    assert run("detach", name) == f"{SENSOR}: xdp-erm is not attached\n"


def test_nothing_is_left_behind(cable):
    before = link(), features(), sorted(os.listdir("/proc/self/fd"))
    long = tuple(f"10.0.{number}.1" for number in range(compiler.MOST_COMPARED + 1))
    loader.attach(SENSOR, InterfaceConfig(sources=("10.0.0.0/8",), targets=long))
    loader.attach(SENSOR, InterfaceConfig(vlan="strip", sources=long))
    with Links() as links:
        maps = ours.find(links, SENSOR).maps
    assert set(maps) == {"counters", "own_sessions", "senders", "sessions", "sources", "taken", "xdp_erm_state"}
    program_id = link().program_id
    loader.detach(SENSOR)
    wait_until_gone(bpf.program_fd, program_id)
    for map_id in maps.values():
        wait_until_gone(map_fd, map_id)
    assert (link(), features(), sorted(os.listdir("/proc/self/fd"))) == before


def test_an_interface_that_is_not_there(cable):
    with cable.switch.entered():
        assert fails(loader.attach, SENSOR, DEFAULT) == MISSING
        assert fails(loader.detach, SENSOR) == MISSING
        assert fails(stats.snapshot, SENSOR) == MISSING


def test_stats_where_it_is_not_attached(cable):
    assert fails(stats.snapshot, SENSOR) == f"{SENSOR}: xdp-erm is not attached; `xdp-erm attach {SENSOR}` does it"
    assert stats.snapshot() == []


def test_it_is_found_by_its_network_namespace(cable):
    loader.attach(SENSOR, DEFAULT)
    assert [interface["name"] for interface in stats.snapshot()] == [SENSOR]
    with cable.switch.entered():
        assert stats.snapshot() == []


def test_it_is_found_from_another_process_with_another_sys(cable):
    """`ip netns exec` gives its command a /sys of its own, in which nothing is pinned."""
    loader.attach(SENSOR, DEFAULT)
    enter = ["unshare", "--mount", "sh", "-c", 'mount -t sysfs none /sys && exec "$@"', "sh"]
    done = subprocess.run([*enter, *COMMAND, "stats", "--json"], capture_output=True, text=True, timeout=TIMEOUT,
                          check=True)
    interface, = json.loads(done.stdout)["interfaces"]
    assert (interface["name"], interface["program_id"]) == (SENSOR, link().program_id)
    subprocess.run([*enter, *COMMAND, "detach", SENSOR], capture_output=True, timeout=TIMEOUT, check=True)
    assert link().program_id is None


# The NIC's settings

def test_offloads_are_off_while_attached(cable):
    before = features()
    assert {name for name in OFFLOADS if before[name] == "on"} == OFFLOADS
    loader.attach(SENSOR, DEFAULT)
    assert {name for name, state in features().items() if state != before[name]} == OFFLOADS
    loader.attach(SENSOR, InterfaceConfig(vlan="tagged"))
    loader.detach(SENSOR)
    assert features() == before


def test_an_offload_that_was_off_stays_off(cable):
    turn("off", "rxvlan")
    before = features()
    loader.attach(SENSOR, DEFAULT)
    loader.detach(SENSOR)
    assert features() == before


def test_an_offload_somebody_turned_on_is_turned_off_again_and_comes_back(cable):
    turn("off", "rxvlan")
    loader.attach(SENSOR, DEFAULT)
    turn("on", "rxvlan")
    assert loader.attach(SENSOR, DEFAULT) == [
        f"{SENSOR}: turned off rx-vlan-hw-parse",
        f"{SENSOR}: already attached (native, program {link().program_id})"]
    loader.detach(SENSOR)
    assert features()["rx-vlan-offload"] == "on"


def test_what_somebody_else_changed_is_left_alone(cable):
    set_mtu(1500)
    loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    turn("on", "rxvlan")
    turn("off", "tx-checksum-ip-generic")
    set_mtu(2000)
    said = loader.detach(SENSOR)
    assert said[1:] == [f"{SENSOR}: turned on rx-checksum, rx-vlan-stag-hw-parse again", RELEASED]
    after = features()
    assert (link().mtu, after["rx-vlan-offload"], after["tx-checksum-ip-generic"]) == (2000, "on", "off")


def test_a_small_mtu_is_warned_of(cable):
    set_mtu(1553)
    assert loader.attach(SENSOR, DEFAULT)[0] == (
        f"{SENSOR}: warning: MTU is 1553; full-size mirrored frames need 1554: use --set-mtu or "
        f"`ip link set dev {SENSOR} mtu 1554`")
    assert link().mtu == 1553


@pytest.mark.check
def test_a_small_mtu_is_set_and_comes_back(cable):
    set_mtu(1500)
    assert loader.attach(SENSOR, InterfaceConfig(set_mtu=True))[0] == f"{SENSOR}: set MTU to 1554 (was 1500)"
    loader.attach(SENSOR, InterfaceConfig(set_mtu=True, vlan="tagged"))
    assert link().mtu == 1554
    assert f"{SENSOR}: MTU is 1500 again" in loader.detach(SENSOR)
    assert link().mtu == 1500


@pytest.mark.parametrize("config, mtu", [
    (InterfaceConfig(encapsulations=("erm", "vxlan")), 1554), (InterfaceConfig(encapsulations=("geneve",)), 1806),
    (InterfaceConfig(encapsulations=("erm", "vxlan"), sources=("192.0.2.0/24", "2001:db8::/32")), 1574),
    (InterfaceConfig(encapsulations=("erspan",)), 1566)], ids=["VXLAN", "GENEVE", "VXLAN over IPv6", "ERSPAN"])
def test_an_mtu_is_small_for_what_is_to_come(cable, config, mtu):
    set_mtu(mtu - 1)
    raised = loader.attach(SENSOR, dataclasses.replace(config, set_mtu=True))
    assert f"{SENSOR}: set MTU to {mtu} (was {mtu - 1})" in raised
    loader.detach(SENSOR)
    assert [line for line in loader.attach(SENSOR, config) if "MTU" in line] == [
        f"{SENSOR}: warning: MTU is {mtu - 1}; full-size mirrored frames need {mtu}: use --set-mtu or `ip link set dev "
        f"{SENSOR} mtu {mtu}`"]
    said, = (each.text for each in doctor.examine([SENSOR]) if each.check == "mtu")
    assert f"MTU is {mtu - 1}, and full-size mirrored frames need {mtu}: " in said


def test_a_small_mtu_can_be_set_later(cable):
    set_mtu(1500)
    loader.attach(SENSOR, DEFAULT)
    program_id = link().program_id
    assert loader.attach(SENSOR, InterfaceConfig(set_mtu=True)) == [
        f"{SENSOR}: set MTU to 1554 (was 1500)", f"{SENSOR}: already attached (native, program {program_id})"]
    interface, = stats.snapshot(SENSOR)
    assert interface["config"]["set_mtu"] is True
    loader.detach(SENSOR)
    assert link().mtu == 1500


@pytest.mark.parametrize("mtu", [1554, 3500])
def test_an_mtu_that_is_large_enough_stays(cable, mtu):
    set_mtu(mtu)
    assert "MTU" not in " ".join(loader.attach(SENSOR, InterfaceConfig(set_mtu=True)) + loader.detach(SENSOR))
    assert link().mtu == mtu


def test_a_failed_attach_leaves_the_nic_as_it_was(cable):
    with bridge() as name:
        set_mtu(1500, name)
        before = link(name), features(name)
        message = fails(loader.attach, name, InterfaceConfig(mode="native", set_mtu=True))
        assert re.fullmatch(refusal(name, ".*"), message)
        assert (link(name), features(name)) == before


@pytest.mark.parametrize("owner, step", [(nic, "_turn_off"), (Links, "attach")])
@pytest.mark.parametrize("problem", [XdpErmError, KeyboardInterrupt])
def test_an_attach_that_ends_half_way_leaves_the_nic_as_it_was(cable, monkeypatch, owner, step, problem):
    def fail(*_, **__):
        raise problem("no more")

    set_mtu(1500)
    before = link(), features()
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(problem, match="no more"):
        loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    assert (link(), features()) == before


@pytest.mark.parametrize("earlier, config", [
    (None, DEFAULT), (InterfaceConfig(vlan="strip"), DEFAULT), (NATIVE, GENERIC), (DEFAULT, None)],
    ids=["attach", "swap", "mode", "detach"])
def test_ctrl_c_waits_until_nothing_is_half_done(cable, monkeypatch, earlier, config):
    """It comes while the kernel is about each request in turn; a link that goes down and up takes seconds."""
    def everything() -> tuple:
        return link(), features(), filters.everything(SENSOR)

    answers, left, number, interrupted = Rtnetlink._answers, 0, 0, True

    def answers_and_signal(self):
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)
        return answers(self)

    set_mtu(1500)
    before = everything()
    while interrupted:
        number, interrupted = number + 1, False
        if earlier:
            loader.attach(SENSOR, dataclasses.replace(earlier, set_mtu=True))
        attached, left = everything(), number
        with monkeypatch.context() as patched:
            patched.setattr(Rtnetlink, "_answers", answers_and_signal)
            try:
                if config:
                    loader.attach(SENSOR, dataclasses.replace(config, set_mtu=True))
                else:
                    loader.detach(SENSOR)
            except KeyboardInterrupt:
                interrupted = True
        assert interrupted == (left <= 0)
        if config and everything() != attached:
            assert stats.snapshot(SENSOR)[0]["config"] == {**config.as_dict(), "set_mtu": True}
            assert (filters.tcx(SENSOR), link().mtu) == ([isolation.FILTER], 1554)
            assert {features()[name] for name in OFFLOADS} == {"off"}
        if not config:
            assert everything() in (attached, before)
        with journal.exclusive() as entries:
            assert entries.unfinished(link()) == {}
        loader.detach(SENSOR)
        assert everything() == before
    assert number > 5


@pytest.mark.parametrize("owner, step", [(topology, "diverted"), (isolation, "retire")])
@pytest.mark.parametrize("problem", [XdpErmError, OSError, MemoryError])
def test_what_the_attached_program_relies_on_stays(cable, monkeypatch, owner, step, problem):
    """Where something fails once it is attached."""
    def fail(*_):
        raise problem(errno.ENOMEM, "no more")

    set_mtu(1500)
    before = link(), features(), filters.everything(SENSOR)
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, fail)
        with pytest.raises((XdpErmError, problem), match="no more"):
            loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    assert stats.snapshot(SENSOR)
    assert (filters.tcx(SENSOR), link().mtu) == ([isolation.FILTER], 1554)
    assert {features()[name] for name in OFFLOADS} == {"off"}
    loader.detach(SENSOR)
    assert (link(), features(), filters.everything(SENSOR)) == before


# Swapping

@pytest.mark.parametrize("mode", ["native", "generic"])
def test_swaps_under_traffic(cable, mode):
    """All the while every packet arrives, decapsulated, and is counted."""
    configs = [InterfaceConfig(mode=mode), InterfaceConfig(mode=mode, depth=3, sources=("198.51.100.0/24",)),
               InterfaceConfig(mode=mode, sources=("198.51.100.0/24",), targets=("192.0.2.1",)),
               InterfaceConfig(mode=mode, port=(7932, 7933))]
    loader.attach(SENSOR, configs[-1])
    cable.wait_for_carrier()
    done, sent_bytes, under_traffic = threading.Event(), 0, 0
    deadline = time.monotonic() + TIMEOUT

    def traffic():
        nonlocal sent_bytes
        for packet in synthetic(flows=200, packets=10**9):
            if done.is_set():
                return
            sent_bytes += len(packet.sent)
            yield packet

    with FanoutWorkers(cable, 2, operator.attrgetter("mirrored")) as workers:
        sender = threading.Thread(target=lab.mirror, args=(cable, traffic(), workers))
        sender.start()
        try:
            for config in itertools.cycle(configs):  # on a busy machine nothing may be sent during some of the swaps
                if under_traffic == 12:
                    break
                assert time.monotonic() < deadline, f"traffic during {under_traffic} swaps only"
                before, counted = link().program_id, counters()["decapsulated"]["packets"]
                said = loader.attach(SENSOR, config)
                assert said == [f"{SENSOR}: swapped the program ({mode}, program {link().program_id})"]
                assert link().program_id != before
                under_traffic += counters()["decapsulated"]["packets"] > counted
        finally:
            done.set()
            sender.join(TIMEOUT)
        result = workers.finish()

    assert (result.missing, result.unexpected, result.dropped) == (0, 0, 0)
    sent = {"packets": result.sent, "bytes": sent_bytes}
    interface, = stats.snapshot(SENSOR)
    assert {name: counter for name, counter in interface["counters"].items() if counter["packets"]} == {
        "decapsulated": sent}
    assert {unit: sum(session[unit] for session in interface["sessions"]) for unit in sent} == sent


@pytest.mark.parametrize("owner, step", [(bpf, "program_fd"), (bpf.Map, "by_id")])
@pytest.mark.parametrize("name", [SENSOR, None])
def test_a_program_that_is_swapped_while_it_is_read_is_not_missed(cable, monkeypatch, owner, step, name):
    """Each of the calls may be the one that finds the old program, or a map of it, gone."""
    loader.attach(SENSOR, DEFAULT)
    original = getattr(owner, step)
    for number in range(100):
        calls = 0

        def gone(*arguments):
            nonlocal calls
            calls += 1
            if calls == number:  # noqa: B023
                raise bpf.Gone
            return original(*arguments)

        monkeypatch.setattr(owner, step, gone)
        assert [interface["name"] for interface in stats.snapshot(name)] == [SENSOR]
        if calls < number:
            break
    assert 1 < number < 99


def test_each_attachment_is_told_from_the_one_before(cable):
    """However soon it comes; swaps keep what it is known by."""
    known = []
    for _ in range(3):
        loader.attach(SENSOR, DEFAULT)
        known.append(stats.snapshot(SENSOR)[0]["id"])
        loader.attach(SENSOR, InterfaceConfig(vlan="strip"))
        assert stats.snapshot(SENSOR)[0]["id"] == known[-1]
        loader.detach(SENSOR)
    assert len(set(known)) == 3


@pytest.mark.parametrize("act", [lambda: stats.snapshot(), lambda: stats.snapshot(SENSOR)])
def test_a_file_that_is_missing_is_no_swap(cable, monkeypatch, act):
    """It is said, not looked for over and over, and no descriptor is left open."""
    loader.attach(SENSOR, DEFAULT)
    monkeypatch.setattr(bpf, "_POSSIBLE", Path("/nowhere/possible"))
    before = sorted(os.listdir("/proc/self/fd"))
    assert fails(act) == "/nowhere/possible cannot be read: No such file or directory"
    assert sorted(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()


@pytest.mark.parametrize("act", [lambda: loader.attach(SENSOR, InterfaceConfig(vlan="strip")),
                                 lambda: loader.detach(SENSOR)], ids=["attach", "detach"])
def test_somebody_takes_the_program_off_meanwhile(cable, monkeypatch, act):
    """Whenever its program or a map is asked for by its number. It is said, and leaves no filter behind."""
    by_id, left, number = bpf._by_id, 0, 0

    def by_id_taken_off(command, wanted):
        nonlocal left
        left -= 1
        if left == 0:
            shell(f"ip link set dev {SENSOR} xdp off")
            time.sleep(0.05)  # the kernel frees it some time later
        return by_id(command, wanted)

    before = link(), filters.everything(SENSOR)
    while left <= 0:
        number += 1
        loader.attach(SENSOR, DEFAULT)
        left = number
        with monkeypatch.context() as patched:
            patched.setattr(bpf, "_by_id", by_id_taken_off)
            with contextlib.suppress(XdpErmError):
                act()
        loader.detach(SENSOR)
        assert (link(), filters.everything(SENSOR)) == before, number
    assert number > 5


def test_a_changed_mode_keeps_the_counters(cable):
    packets = list(synthetic(flows=20, packets=100))
    loader.attach(SENSOR, NATIVE)
    since = [stats.snapshot(SENSOR)[0][name] for name in ("id", "attached_at", "since_boot")]
    assert 0 < time.clock_gettime(time.CLOCK_BOOTTIME) - since[2] < TIMEOUT
    for number, (before, config) in enumerate([("native", GENERIC), ("generic", NATIVE), ("native", GENERIC)], 1):
        assert mirror(cable, packets).identical == 100
        assert loader.attach(SENSOR, config) == [
            f"{SENSOR}: the kernel allows no two programs, so there was none for a moment while the mode changed from "
            f"{before}", f"{SENSOR}: attached ({config.mode}, program {link().program_id})"]
        interface, = stats.snapshot(SENSOR)
        assert [interface[name] for name in ("mode", "id", "attached_at", "since_boot")] == [config.mode, *since]
        assert interface["counters"]["decapsulated"] == {
            "packets": 100 * number, "bytes": sum(len(packet.sent) for packet in packets) * number}
        assert sum(session["packets"] for session in interface["sessions"]) == 100 * number


def test_the_counters_of_all_cpus_are_summed(cable):
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("there is only one CPU")
    loader.attach(SENSOR, DEFAULT)
    packets = list(synthetic(flows=20, packets=100))
    try:
        for cpu in cpus[:2]:  # a veth receives where its other end sends
            os.sched_setaffinity(0, {cpu})
            mirror(cable, packets)
    finally:
        os.sched_setaffinity(0, cpus)
    interface, = stats.snapshot(SENSOR)
    twice = {"packets": 200, "bytes": 2 * sum(len(packet.sent) for packet in packets)}
    assert interface["counters"]["decapsulated"] == twice
    assert {unit: sum(session[unit] for session in interface["sessions"]) for unit in twice} == twice


def test_mode_auto_leaves_the_mode_as_it_is(cable):
    loader.attach(SENSOR, GENERIC)
    loader.attach(SENSOR, InterfaceConfig(vlan="tagged"))
    assert link().mode == "generic"


def test_sessions_can_be_turned_off_and_on(cable):
    packets = list(synthetic(flows=20, packets=100))
    loader.attach(SENSOR, DEFAULT)
    mirror(cable, packets)
    loader.attach(SENSOR, InterfaceConfig(sessions=False))
    mirror(cable, packets)
    assert stats.snapshot(SENSOR)[0]["sessions"] == []
    loader.attach(SENSOR, DEFAULT)
    mirror(cable, packets)
    interface, = stats.snapshot(SENSOR)
    assert interface["counters"]["decapsulated"]["packets"] == 300
    assert sum(session["packets"] for session in interface["sessions"]) == 100


def test_counters_go_on_where_another_encapsulation_is_taken(cable):
    """Sessions are told apart otherwise then, and begin anew."""
    packets = list(synthetic(flows=20, packets=100))
    loader.attach(SENSOR, DEFAULT)
    mirror(cable, packets)
    said = loader.attach(SENSOR, InterfaceConfig(encapsulations=("erm", "erspan")))
    assert f"{SENSOR}: sessions and foreign senders start again from zero: they are told apart otherwise now" in said
    mirror(cable, [*packets, *synthetic(20, 100, encapsulation="erspan")])
    interface, = stats.snapshot(SENSOR)
    assert interface["counters"]["decapsulated"]["packets"] == 300
    assert {kind: sum(each["packets"] for each in interface["sessions"] if each["encapsulation"] == kind)
            for kind in ("erm", "erspan")} == {"erm": 100, "erspan": 100}
    assert {each["gaps"] for each in interface["sessions"]} == {None, 0}
    # Between two such configurations they go on.
    loader.attach(SENSOR, InterfaceConfig(encapsulations=("erm", "erspan", "vxlan")))
    assert sum(each["packets"] for each in stats.snapshot(SENSOR)[0]["sessions"]) == 200
    loader.attach(SENSOR, DEFAULT)
    assert stats.snapshot(SENSOR)[0]["sessions"] == []


def test_a_version_whose_counters_look_different_starts_from_zero(cable, tmp_path, monkeypatch):
    loader.attach(SENSOR, DEFAULT)
    mirror(cable, synthetic(flows=5, packets=10))
    other = tmp_path / "bpf"
    shutil.copytree(shared.BPF_DIRECTORY, other)
    header = other / "shared.h"
    header.write_text(header.read_text().replace("MAX_SESSIONS 1024", "MAX_SESSIONS 2048"))
    monkeypatch.setattr(shared, "BPF_DIRECTORY", other)
    said = loader.attach(SENSOR, DEFAULT)
    assert (f"{SENSOR}: counters start again from zero: the attached program was of another version "
            f"({loader.__version__})") in said
    assert counters()["decapsulated"]["packets"] == 0


# Drivers without native XDP

def test_auto_falls_back_to_generic(cable):
    with bridge() as name:
        said = loader.attach(name, DEFAULT)
        *_, falls_back, attached = said
        assert re.fullmatch(rf"{name}: the driver refuses native XDP \(.+\): using generic mode, which is slower",
                            falls_back)
        assert attached == f"{name}: attached (generic, program {link(name).program_id})"
        assert link(name).mode == "generic"


def test_native_is_refused(cable):
    with bridge() as name:
        before = link(name), features(name)
        message = fails(loader.attach, name, NATIVE)
        assert re.fullmatch(refusal(name, ".+"), message)
        assert (link(name), features(name)) == before


def test_a_refused_change_of_mode_keeps_the_old_program(cable):
    with bridge() as name:
        loader.attach(name, GENERIC)
        before = link(name), features(name), stats.snapshot(name)
        fails(loader.attach, name, NATIVE)
        assert (link(name), features(name), stats.snapshot(name)) == before


def test_an_old_program_that_cannot_be_put_back_is_told_of(cable, monkeypatch):
    def refuse(self, link, program, mode, replaced=None):
        raise Refused(errno.EOPNOTSUPP, f"no {mode} today")

    with bridge() as name:
        before = features(name), filters.everything(name)
        loader.attach(name, GENERIC)
        monkeypatch.setattr(Links, "attach", refuse)
        assert fails(loader.attach, name, NATIVE) == (
            f"{name}: XDP is refused in native mode: no native today; --mode generic works with every driver; the "
            "program from before cannot be put back: no generic today; ERM is not decapsulated now")
        assert link(name).program_id is None
        assert (features(name), filters.everything(name)) == before


# Somebody else's program

@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("program", ["somebody", "xdp_erm"])
def test_a_foreign_program_stays(cable, mode, program):
    """Also one that has the name of ours."""
    program_id = other_program.attach(SENSOR, mode, program)
    before = link(), features()
    keyword = {"native": "xdpdrv", "generic": "xdpgeneric"}[mode]
    message = fails(loader.attach, SENSOR, DEFAULT)
    assert message == (f"{SENSOR}: another XDP program is attached (program {program_id}, {program}); free the "
                       f"interface with `ip link set dev {SENSOR} {keyword} off`, or replace it with --force")
    assert loader.detach(SENSOR) == [f"{SENSOR}: program {program_id} ({program}) is not ours and stays"]
    assert (link(), features()) == before
    assert stats.snapshot() == []
    # What the message says is what helps.
    subprocess.run(re.search("`(.*)`", message)[1].split(), timeout=TIMEOUT, check=True)
    loader.attach(SENSOR, DEFAULT)


def test_the_dispatcher_of_libxdp_stays(cable):
    program_id = other_program.attach(SENSOR, "native", "xdp_dispatcher")
    assert fails(loader.attach, SENSOR, DEFAULT) == (
        f"{SENSOR}: libxdp's dispatcher (program {program_id}, xdp_dispatcher) holds the interface; free it with "
        f"`xdp-loader unload {SENSOR} --all`, or replace it with --force")
    assert link().program_id == program_id


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_force_replaces_a_foreign_program(cable, mode):
    program_id = other_program.attach(SENSOR, mode)
    said = loader.attach(SENSOR, DEFAULT, force=True)
    assert said[-1] == (f"{SENSOR}: replaced program {program_id} of somebody else ({mode}, program "
                        f"{link().program_id})")
    wait_until_gone(bpf.program_fd, program_id)
    assert mirror(cable, synthetic(flows=5, packets=10)).identical == 10


@pytest.mark.parametrize("config", [DEFAULT, GENERIC], ids=["same mode", "other mode"])
def test_a_bpf_link_cannot_be_replaced(cable, config):
    with other_program.linked(SENSOR) as program_id:
        before = link(), features()
        assert fails(loader.attach, SENSOR, config, force=True) == (
            f"{SENSOR}: program {program_id} is held by a BPF link, which only its owner can release: stop that "
            "process (`bpftool link` names it)")
        assert (link(), features()) == before


# Several at once, and interfaces that go away

def test_two_at_once(cable):
    """Both wait for one that holds the lock; then they take turns, and the second finds it done."""
    with journal.LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        both = [subprocess.Popen([*COMMAND, "attach", SENSOR], text=True, **pipes) for _ in range(2)]
        for process in both:
            assert process.stderr.readline() == "waiting for another xdp-erm to finish\n"
        assert link().program_id is None
    outputs = sorted(process.communicate(timeout=TIMEOUT) for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert outputs == [(f"{SENSOR}: already attached (native, program {link().program_id})\n", ""),
                       (f"{TURNED_OFF}\n{ISOLATED}\n{SENSOR}: attached (native, program {link().program_id})\n", "")]


def test_users_cannot_keep_others_waiting(cable, monkeypatch):
    """Who can open a file can lock it, as flock(1) does. The file is there as an earlier version has left it."""
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.2)
    journal.LOCK.touch(0o644)
    journal.LOCK.chmod(0o644)
    loader.attach(SENSOR, DEFAULT)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "flock", journal.LOCK, "sleep", "60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as user:
        assert "Permission denied" in user.stderr.readline()
    loader.detach(SENSOR)


def test_waiting_has_an_end(cable, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(journal, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.2)
    with journal.LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for act in (lambda: loader.attach(SENSOR, DEFAULT), lambda: loader.detach(SENSOR)):
            assert fails(act) == f"another xdp-erm has held {tmp_path}/lock for 0.2 s; `fuser {tmp_path}/lock` names it"
    assert link().program_id is None
    assert capsys.readouterr().err == "waiting for another xdp-erm to finish\n" * 2


def test_an_interface_deleted_while_attached(cable):
    loader.attach(SENSOR, DEFAULT)
    program_id = link().program_id
    delete_sensor()
    assert fails(stats.snapshot, SENSOR) == MISSING
    assert fails(loader.detach, SENSOR) == MISSING
    assert stats.snapshot() == []
    wait_until_gone(bpf.program_fd, program_id)


@pytest.mark.parametrize("owner, step", [(nic, "prepare"), (isolation, "isolate")])
def test_an_interface_that_gets_another_name_half_way(cable, monkeypatch, owner, step):
    original = getattr(owner, step)

    def renamed(*arguments, **keywords):
        result = original(*arguments, **keywords)
        shell(f"ip link set dev {SENSOR} down; ip link set dev {SENSOR} name new0; ip link set dev new0 up")
        return result

    set_mtu(1500)
    before, filtered = features(), filters.everything(SENSOR)
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, renamed)
        with contextlib.suppress(XdpErmError):
            loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    loader.detach("new0")
    assert (features("new0"), link("new0").mtu) == (before, 1500)
    assert filters.everything("new0").replace("new0", SENSOR) == filtered


def test_an_interface_that_gets_another_name_while_it_is_detached(cable, monkeypatch):
    original = stats.wait_for_queues

    def renamed(attachment):
        shell(f"ip link set dev {SENSOR} down; ip link set dev {SENSOR} name new0; ip link set dev new0 up")
        original(attachment)

    set_mtu(1500)
    before, filtered = features(), filters.everything(SENSOR)
    loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    monkeypatch.setattr(stats, "wait_for_queues", renamed)
    loader.detach(SENSOR)
    assert (features("new0"), link("new0").mtu) == (before, 1500)
    assert filters.everything("new0").replace("new0", SENSOR) == filtered


GONE = f"{SENSOR}: the interface went away half-way; nothing of ours is left on it"


@pytest.mark.parametrize("when, owner, step, message", [
    ("before", compiler.Compiled, "load", GONE),
    ("after", compiler.Compiled, "load", GONE),
    ("after", nic, "prepare", GONE),
    ("before", Links, "attach", GONE),
    ("after", Links, "attach", GONE),
])
def test_an_interface_deleted_half_way(cable, monkeypatch, when, owner, step, message):
    original = getattr(owner, step)

    def interrupted(*arguments, **keywords):
        if when == "before":
            delete_sensor()
            return original(*arguments, **keywords)
        result = original(*arguments, **keywords)
        delete_sensor()
        return result

    monkeypatch.setattr(owner, step, interrupted)
    set_mtu(1500)
    before = link()
    assert fails(loader.attach, SENSOR, InterfaceConfig(set_mtu=True)) == message
    with journal.exclusive() as entries:
        assert entries.unfinished(before) == {}
