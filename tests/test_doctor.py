"""`xdp-erm doctor`: each check where all is well and where it is not, and that it changes nothing."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filters
import other_program
import pytest
from frames import ETHER
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from shell import TIMEOUT, shell

from xdp_erm_py import cli, config, doctor, shared, systemd
from xdp_erm_py.doctor import OK, PROBLEM, WARNING, Patient
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import isolation, journal, loader, nic, ours, programs, stats, topology
from xdp_erm_py.kernel import version
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import SWITCH_INTERFACE as SWITCH
from xdp_erm_py.lab.traffic import synthetic
from xdp_erm_py.program import compiler
from xdp_erm_py.program.counters import COUNTERS
from xdp_erm_py.publish import lock
from xdp_erm_py.settings import InterfaceConfig

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[1] / "bin" / "xdp-erm")]
PACKET = next(iter(synthetic(flows=1, packets=1))).sent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing of the host's own counts: neither its configuration, nor its publisher, nor its units."""
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "xdp-erm.yaml")
    monkeypatch.setattr(lock, "DEFAULT", tmp_path / "publish.pid")
    monkeypatch.setattr(systemd, "UNIT_DIRECTORY", tmp_path)


def found(check: str, *names: str) -> list[tuple[str, str]]:
    """What one check says of the interfaces, or of the host."""
    return [(finding.result, finding.text) for finding in doctor.examine(list(names) or [SENSOR])
            if finding.check == check]


def says(check: str, result: str, *words: str) -> None:
    """Among what the check says is this; where it is a cure, it stands there as well."""
    said = found(check)
    assert any(each == result and all(word in text for word in words) for each, text in said), said


def well(check: str, *words: str) -> None:
    """It says nothing else but that all is well."""
    assert [result for result, _ in found(check)] == [OK]
    says(check, OK, *words)


# The host

@pytest.mark.check
def test_kernel(cable, monkeypatch):
    well("kernel", "Linux ")
    monkeypatch.setattr(version, "running", lambda: (5, 9))
    says("kernel", PROBLEM, "xdp-erm needs 5.10 or newer")


def test_rights(cable, monkeypatch):
    well("rights", "BPF can be used")
    monkeypatch.setattr(programs, "bpf_refused", lambda: "this kernel has no BPF")
    says("rights", PROBLEM, "this kernel has no BPF")


def test_modules(cable, monkeypatch):
    well("modules", "bcc ")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "websockets" else find(name))
    says("modules", PROBLEM, "websockets is missing: install python3-websockets")

    def missing(_: str) -> None:
        raise XdpErmError("bcc is missing: install python3-bpfcc")

    monkeypatch.setattr(compiler, "_clang", missing)
    says("modules", PROBLEM, "bcc is missing", "install python3-bpfcc")
    says("modules", PROBLEM, "websockets is missing: install python3-websockets")


def test_configuration(cable):
    assert found("configuration") == []
    config.DEFAULT_PATH.write_text("defaults: {depth: 9}")
    says("configuration", PROBLEM, f"{config.DEFAULT_PATH}:1: depth: 9 is not a depth")


@contextlib.contextmanager
def publisher():
    """A process that holds the publisher's lock."""
    hold = ("import sys, pathlib\nfrom xdp_erm_py.publish import lock\nwith lock.held(pathlib.Path(sys.argv[1])):\n"
            "    print('', flush=True)\n    input()")
    with subprocess.Popen([sys.executable, "-c", hold, lock.DEFAULT], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as started:
        try:
            assert started.stdout.readline()
            yield started.pid
        finally:
            started.kill()


def test_publisher(cable):
    none = [(WARNING, "no publisher runs, so Zeek gets no counters: `zeekctl start` starts one, or `systemctl start "
                      "xdp-erm-publish.service`")]
    assert found("publisher") == none
    with publisher() as pid:
        well("publisher", f"process {pid}")
    assert found("publisher") == none  # it is gone, its file is not


def test_fanout(cable, monkeypatch):
    """One group cannot have members on two interfaces; one interface can have two groups."""
    def told(*workers):
        monkeypatch.setattr(systemd, "zeek_workers", lambda: [
            systemd.Worker("zeek-worker", interface, number) for interface, number in workers])
        return found("fanout")

    assert told(("eth1", "23"), ("eth1", "23"), ("eth1", "24"), ("eth2", "25"), ("eth3", None), ("eth4", None)) == []
    ((result, text),) = told(("eth2", "7"), ("eth1", "7"), ("eth3", "8"))
    assert result == WARNING
    assert text.startswith("Zeek's workers of eth1, eth2 have one AF_PACKET fanout id (7), ")
    assert "`worker_args = AF_Packet::fanout_id=NUMBER`" in text


def test_interfaces(cable):
    """Those named, else the configured and the attached ones."""
    def examined(*names):
        return list(dict.fromkeys(finding.interface for finding in doctor.examine(list(names)) if finding.interface))

    assert examined() == []
    assert [finding.result for finding in doctor.examine([]) if finding.check == "interfaces"] == [PROBLEM]
    config.DEFAULT_PATH.write_text("interfaces: {eth7: {}}")
    assert examined() == ["eth7"]
    loader.attach(SENSOR, InterfaceConfig())
    assert examined() == ["eth7", SENSOR]
    assert examined("lo", "lo") == ["lo"]
    shell(f"ip link property add dev {SENSOR} altname uplink0")
    findings = list(doctor.examine(["uplink0", SENSOR]))
    assert len([finding for finding in findings if finding.check == "mtu"]) == 1
    assert {finding.interface for finding in findings} == {None, SENSOR}


# Any interface

def test_interface(cable):
    well("interface", "it is up")
    with cable.switch.entered():
        shell(f"ip link set {SWITCH} down")
    says("interface", PROBLEM, "no carrier")
    shell(f"ip link set {SENSOR} down")
    says("interface", PROBLEM, f"it is down: `ip link set dev {SENSOR} up`")
    assert found("interface", "nowhere0") == [
        (PROBLEM, "no such interface in this network namespace; `ip link` lists them")]


def test_address(cable):
    says("address", WARNING, "it has no address", "ARP")
    shell(f"ip address add 192.0.2.1/24 dev {SENSOR}")
    well("address", "192.0.2.1")
    config.DEFAULT_PATH.write_text(f"interfaces: {{{SENSOR}: {{targets: [192.0.2.9]}}}}")
    says("address", WARNING, "none of its addresses is in `targets` (192.0.2.9)")
    shell(f"ip address add 192.0.2.9/24 dev {SENSOR}")
    well("address", "192.0.2.1, 192.0.2.9")


def test_a_bridge_answers_for_its_port(cable):
    shell(f"ip link add bridge0 type bridge; ip link set {SENSOR} master bridge0; ip link set bridge0 up; "
          "ip address add 192.0.2.1/24 dev bridge0")
    well("address", "bridge0 has the address 192.0.2.1")
    shell("ip link set bridge0 arp off")
    says("address", WARNING, "bridge0 has the address 192.0.2.1, but ARP is off on it", "dev bridge0 arp on`")


def test_an_address_that_does_not_answer(cable):
    shell(f"ip address add 192.0.2.1/24 dev {SENSOR}")
    told = "it has the address 192.0.2.1, but "
    for break_it, cure in (
            (f"ip link set dev {SENSOR} arp off", f"ARP is off on it: `ip link set dev {SENSOR} arp on`"),
            (f"sysctl -w net/ipv4/conf/{SENSOR}/arp_ignore=8",
             f"the host answers no ARP requests: `sysctl -w net/ipv4/conf/{SENSOR}/arp_ignore=0`"),
            ("sysctl -w net/ipv4/conf/all/arp_ignore=8",
             "the host answers no ARP requests: `sysctl -w net/ipv4/conf/all/arp_ignore=0`")):
        shell(break_it)
        said, = found("address")
        assert (said[0], said[1].startswith(told + cure)) == (WARNING, True)
        shell(cure.split("`")[1])
        well("address", "192.0.2.1")


@pytest.mark.parametrize("mtu, result", [(1554, OK), (1553, WARNING)])
def test_mtu(cable, mtu, result):
    shell(f"ip link set {SENSOR} mtu {mtu}")
    assert [each for each, _ in found("mtu")] == [result]


def test_allow_lists(cable):
    """Those of the program, where there is one."""
    says("allow_lists", WARNING, "`sources` is not set", "whoever can send UDP to port 7932")
    says("allow_lists", WARNING, "`targets` is not set")
    config.DEFAULT_PATH.write_text("defaults: {sources: [192.0.2.0/24], port: [7933]}")
    says("allow_lists", OK, "`sources` is 192.0.2.0/24")
    says("allow_lists", WARNING, "`targets` is not set", "port 7933")
    loader.attach(SENSOR, InterfaceConfig(targets=("192.0.2.1",)))
    says("allow_lists", WARNING, "`sources` is not set", "port 7932")
    says("allow_lists", OK, "`targets` is 192.0.2.1")


def test_program(cable):
    assert found("program") == [(PROBLEM, f"xdp-erm is not attached: `xdp-erm attach {SENSOR}`")]
    wanted = systemd.UNIT_DIRECTORY / "multi-user.target.wants"
    wanted.mkdir()
    (wanted / "xdp-erm@another.service").touch()
    assert "systemd" not in found("program")[0][1]
    (wanted / f"xdp-erm@{SENSOR}.service").touch()
    says("program", PROBLEM, "not attached although a systemd unit shall do it", f"`xdp-erm attach {SENSOR}`")
    theirs = other_program.attach(SENSOR, "native")
    says("program", PROBLEM, f"another XDP program is attached (program {theirs}, somebody); free the interface")
    loader.attach(SENSOR, InterfaceConfig(), force=True)
    well("program", "xdp-erm is attached (native, program ")


@pytest.mark.parametrize("instance, name", [("eth1", "eth1"), (r"br\x2dlan", "br-lan"), (r"e\x1bx", "e\x1bx")])
def test_names_in_units(instance, name):
    wanted = systemd.UNIT_DIRECTORY / "multi-user.target.wants"
    wanted.mkdir()
    (wanted / f"xdp-erm@{instance}.service").touch()
    assert doctor._starts_at_boot(name)
    assert not doctor._starts_at_boot("eth2")


# What our program is attached to

def test_mode(cable):
    loader.attach(SENSOR, InterfaceConfig())
    well("mode", "native mode")
    loader.attach(SENSOR, InterfaceConfig(mode="generic"))
    well("mode", "generic mode")
    loader.attach(SENSOR, InterfaceConfig())
    says("mode", WARNING, "it was so before, which `mode: auto` leaves as it is: `xdp-erm attach --mode native "
                          f"{SENSOR}` changes it")
    shell("ip link add bridge0 type bridge")  # its driver knows no native XDP
    loader.attach("bridge0", InterfaceConfig())
    (result, text), = found("mode", "bridge0")
    assert (result, "generic mode, which is slower: the driver refuses native XDP (" in text) == (WARNING, True)


def test_isolation(cable):
    loader.attach(SENSOR, InterfaceConfig())
    well("isolated")
    filters.take_away(SENSOR)
    says("isolated", PROBLEM, f"`xdp-erm attach {SENSOR}` puts it back")
    cable.wait_for_carrier()
    for _ in range(9):
        cable.send(PACKET)
    count("decapsulated", 9)
    assert [result for result, _ in found("isolated")] == [PROBLEM, PROBLEM]
    says("isolated", PROBLEM, "at least 9 of 9 mirrored frames have reached the host's own network stack: `xdp-erm "
                              f"attach {SENSOR}` ends it")
    loader.attach(SENSOR, InterfaceConfig())
    well("isolated", "mirrored frames are kept from the host's own network stack (")
    loader.attach(SENSOR, InterfaceConfig(isolate=False))
    says("isolated", WARNING, "`isolate` is off")


def test_what_comes_before_the_filter(cable):
    loader.attach(SENSOR, InterfaceConfig())
    filters.add_tcx(SENSOR, filters.NEXT)
    says("isolated", WARNING, "(theirs) sees mirrored frames before our filter (tcx)", f"`xdp-erm attach {SENSOR}`")
    loader.attach(SENSOR, InterfaceConfig())
    well("isolated")


def test_tags_that_came_beside_the_wrapping(monkeypatch):
    monkeypatch.setattr(isolation, "look", lambda _: isolation.Isolation("tcx", ()))
    monkeypatch.setattr(stats, "leaked", lambda _: 0)
    one = patient({"decapsulated": 9}, isolation={"outer_tagged": 4})._replace(
        settings={"isolate": True}, attached=SimpleNamespace(), link=SimpleNamespace(name=SENSOR))
    _, (result, text) = doctor.isolated(one)
    assert (result, text.startswith("4 mirrored frames have reached Zeek with the VLAN tag of their wrapping")) == (
        PROBLEM, True)


def test_offloads(cable, monkeypatch):
    loader.attach(SENSOR, InterfaceConfig())
    well("offloads")
    shell(f"ethtool -K {SENSOR} rx-checksum on")
    assert found("offloads") == [(PROBLEM, f"rx-checksum is on; it {nic.FEATURES['rx-checksum']}: `xdp-erm attach "
                                           f"{SENSOR}` turns it off")]
    loader.attach(SENSOR, InterfaceConfig())
    well("offloads")
    with Links() as links:
        attached, loopback = nic.harmful(links.find(SENSOR)), nic.harmful(links.find("lo"))
    assert (attached, loopback) == (([], []), (["rx-gro"], ["rx-checksum"]))
    monkeypatch.setattr(nic, "harmful", lambda _: loopback)
    says("offloads", OK, "rx-checksum is on and the driver does not let it be turned off, which does no harm")


def count(wanted: str, number: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while stats.snapshot(SENSOR)[0]["counters"][wanted]["packets"] < number:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("encapsulations, sent", [
    ("erspan", "GRE"), ("vxlan", "UDP to port 4789"), ("erm, tzsp", "UDP to port 7932, 37008"),
    ("gre, geneve, erm", "UDP to port 7932, 6081 or GRE")])
def test_allow_lists_of_any_encapsulation(cable, encapsulations, sent):
    config.DEFAULT_PATH.write_text(f"defaults: {{encapsulations: [{encapsulations}]}}")
    says("allow_lists", WARNING, "`sources` is not set", f"so whoever can send {sent} can put frames before Zeek")


def test_ipv6_that_nobody_looks_into(cable):
    """It may be a mirror's, and may be any."""
    loader.attach(SENSOR, InterfaceConfig(encapsulations=("vxlan",)))
    cable.wait_for_carrier()
    cable.send(bytes(ETHER / IPv6() / IPv6ExtHdrFragment(m=1) / UDP(dport=53)))
    count("extension", 1)
    said = found("packets")
    assert [result for result, _ in said] == [WARNING, WARNING]
    assert said[0][1].startswith("none of 1 packets is a mirror's")
    assert said[1][1].startswith("1 packets may be a mirror's and are not decapsulated (extension): it comes in IPv6")


def test_packets(cable):
    loader.attach(SENSOR, InterfaceConfig(sources=("198.51.100.0/24",)))
    cable.wait_for_carrier()
    assert [result for result, _ in found("packets")] == [WARNING]
    says("packets", WARNING, "no packet has come")
    cable.send(bytes.fromhex("ffffffffffff 020000000001 0806") + bytes(46))
    count("other", 1)
    says("packets", WARNING, "none of 1 packets is a mirror's", f"tcpdump -ni {SENSOR}", "`encapsulations` (erm)")
    cable.send(PACKET[:26] + bytes([10, 0, 0, 7]) + PACKET[30:])
    count("foreign_source", 1)
    says("packets", PROBLEM, "1 of 1 mirror packets are not decapsulated (foreign_source)", "`sources`",
         "most: 10.0.0.7)")
    for _ in range(199):
        cable.send(PACKET)
    count("decapsulated", 199)
    well("packets", "199 packets were decapsulated since 20")


def patient(counters: dict[str, int], **counted: Any) -> Patient:
    """With these packets, and whatever else stats.snapshot() says."""
    packets = {name: {"packets": counters.get(name, 0), "bytes": 0} for name in shared.COUNTERS}
    return Patient(None, {}, None, {"counters": packets, "sessions": [], "foreign": [], "cpus": {},
                                "attached_at": "2026-01-01T00:00:00.000Z", **counted})


# "extension" need not be a mirror's.
UNWELCOME = [counter.name for counter in COUNTERS
             if counter.cure and not counter.is_note and counter.name != "extension"]


@pytest.mark.parametrize("verdict", UNWELCOME)
def test_packets_that_are_not_decapsulated(verdict):
    """Above one in a hundred."""
    some, = doctor.packets(patient({verdict: 3, "other": 1000}))
    assert some.result == PROBLEM
    assert some.text.startswith(f"3 of 3 mirror packets are not decapsulated ({verdict}): ")
    good, bad = doctor.packets(patient({verdict: 3, "decapsulated": 296}))
    assert (good.result, bad.result, bad.text.startswith("3 of 299 ")) == (OK, WARNING, True)
    assert [result.result for result in doctor.packets(patient({verdict: 3, "decapsulated": 297}))] == [OK]


def test_packets_that_are_cut():
    _, cut = doctor.packets(patient({"decapsulated": 100, "inner_truncated": 2}))
    assert cut.result == WARNING
    assert cut.text.startswith("2 of 100 mirrored frames are inner_truncated: they are cut")
    assert len(list(doctor.packets(patient({"decapsulated": 100, "inner_truncated": 1})))) == 1


def test_packets_that_are_erm_still():
    _, left = doctor.packets(patient({"decapsulated": 100, "nested_refused": 1}))
    assert left.result == WARNING
    assert left.text.startswith("1 of 100 mirrored frames are nested_refused: they are wrapped themselves")


def test_packets_that_come_no_more():
    def silent(*seconds: float) -> list[str]:
        sessions = [{"last_seen": stats._rfc3339(time.monotonic() - each)} for each in seconds]
        return [result.result for result in doctor.packets(patient({"decapsulated": 9}, sessions=sessions))]

    assert silent() == silent(280) == silent(9999, 280) == [OK]
    assert silent(320) == silent(9999, 320) == [OK, WARNING]


def test_queues():
    def dropped(*cpus: int) -> list[str]:
        counted = {str(cpu): {"steered": 1000, "dropped": number} for cpu, number in enumerate(cpus)}
        return [result.result for result in doctor.queues(patient({}, cpus=counted))]

    assert dropped() == dropped(10, 10) == []
    assert dropped(11, 10) == [WARNING]


def test_who_captures(cable):
    """A socket keeps an interface that is gone, also when another has its name."""
    loader.attach(SENSOR, InterfaceConfig())
    nobody = "nothing captures from it: start Zeek's workers"

    def listens(protocol: int, interface: str | None = None) -> socket.socket:
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
        if interface:
            listener.bind((interface, 0))
        return listener

    says("captured", WARNING, nobody)
    with listens(0x88cc, SENSOR), listens(0x0003, "lo"):
        says("captured", WARNING, nobody)
        with listens(0x0003):
            well("captured", "from it: 1")
        with listens(0x0003, SENSOR), listens(0x0003, SENSOR):
            well("captured", "from it: 2")
            shell(f"ip link delete {SENSOR} && ip link add {SENSOR} up type veth peer name {SWITCH}2")
            loader.attach(SENSOR, InterfaceConfig())
            says("captured", WARNING, nobody)


def test_reports(cable):
    loader.attach(SENSOR, InterfaceConfig())
    with Links() as links:
        state = ours.find(links, SENSOR).state
    assert found("reports") == []  # no publisher, which is said already
    with publisher():
        well("reports", "Zeek has taken no report yet")  # it is attached since a moment ago
        checkpoints = lock.DEFAULT.with_suffix(".json")
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        for age, result in ((20, OK), (590, OK), (660, WARNING)):
            checkpoint = {"id": state["id"], "since_boot": since_boot - age}
            checkpoints.write_text(json.dumps({"interfaces": {SENSOR: checkpoint}}))
            assert [each for each, _ in found("reports")] == [result]
        says("reports", WARNING, "Zeek has taken no report for 11 minutes", "journalctl -u xdp-erm-publish.service")
        # The publisher remembers programs that are gone.
        checkpoints.write_text(json.dumps({"interfaces": {SENSOR: {**checkpoint, "id": "another"}}}))
        well("reports", "no report yet")
        checkpoints.write_text("{")
        well("reports", "no report yet")
        checkpoints.write_text(json.dumps({"interfaces": {SENSOR: {**checkpoint, "since_boot": since_boot - 20}}}))
        well("reports", "Zeek has taken a report ")


def test_a_publisher_whose_reports_never_arrived(cable, monkeypatch):
    loader.attach(SENSOR, InterfaceConfig())
    with publisher():
        now = time.time()
        for later, result, words in ((40, OK, "Zeek has taken no report yet"),
                                     (150, WARNING, "Zeek has taken no report for 15"),
                                     (660, WARNING, "Zeek has taken no report for 11 minutes, since it was attached")):
            monkeypatch.setattr(time, "time", lambda: now + later)  # noqa: B023
            says("reports", result, words)
            assert not any("has taken a report" in text for _, text in found("reports"))


# The command

def state() -> list[Any]:
    """All that a doctor could change."""
    with Links() as links:
        link = links.find(SENSOR)
        carried = copy.deepcopy(ours.attachment_of(link))
    lock = journal.LOCK.stat().st_mtime_ns if journal.LOCK.exists() else None
    rest = filters.everything(SENSOR) + shell(f"ethtool -k {SENSOR}; tc qdisc; ip address")
    return [link, carried, lock, rest]


@pytest.mark.parametrize("attached", [False, True])
def test_nothing_changes(cable, attached):
    if attached:
        loader.attach(SENSOR, InterfaceConfig())
        shell(f"ethtool -K {SENSOR} rx-checksum on")
        filters.take_away(SENSOR)
    before = state(), sorted(os.listdir("/proc/self/fd"))
    list(doctor.examine([SENSOR]))
    assert (state(), sorted(os.listdir("/proc/self/fd"))) == before


def test_a_check_that_cannot_be_made_does_not_keep_the_others_from_being(cable, monkeypatch):
    def refuse(_):
        raise XdpErmError(f"{SENSOR}: its offloads cannot be read: why")
    loader.attach(SENSOR, InterfaceConfig())
    monkeypatch.setattr(nic, "harmful", refuse)
    monkeypatch.setattr(topology, "check", lambda _: importlib.import_module("no_such_module"))
    says("offloads", PROBLEM, "its offloads cannot be read: why")
    assert not found("offloads")[0][1].startswith(SENSOR)
    says("place", PROBLEM, "No module named 'no_such_module'")
    assert found("packets")


def run(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *COMMAND, "doctor", *arguments], capture_output=True, text=True, timeout=TIMEOUT,
                          check=False)


def test_the_command(cable, tmp_path, capsys):
    loader.attach(SENSOR, InterfaceConfig())
    assert cli.main(["doctor", SENSOR]) == 0  # warnings are no problems
    lines = capsys.readouterr().out.splitlines()
    assert f"ok       {SENSOR}: native mode" in lines and "ok       host: BPF can be used" in lines
    assert any(line.startswith(f"warning  {SENSOR}: `sources` is not set") for line in lines)
    assert not any(line.startswith("problem") for line in lines)
    filters.take_away(SENSOR)
    done = run(SENSOR)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"\nproblem  {SENSOR}: the filter that keeps mirrored frames from the host is gone" in done.stdout
    done = run("--json", SENSOR, "nowhere0")
    assert (done.returncode, done.stderr) == (1, "")
    checks = json.loads(done.stdout)["checks"]
    assert all(list(check) == ["interface", "check", "result", "text"] for check in checks)
    assert {check["interface"] for check in checks} == {None, SENSOR, "nowhere0"}
    assert {check["result"] for check in checks} == {OK, WARNING, PROBLEM}
    file = tmp_path / "other.yaml"
    file.write_text("interfaces: {eth7: {}}")
    assert "\nproblem  eth7: no such interface" in run("--config", str(file)).stdout


def test_a_name_that_is_none():
    done = run("a/b")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "xdp-erm: 'a/b' is not an interface name\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody needs root")
def test_without_root(cable):
    """What needs no rights is looked at."""
    loader.attach(SENSOR, InterfaceConfig())
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search",
              "--ambient-caps=+dac_read_search", "env", "PYTHONDONTWRITEBYTECODE=1")
    done = run(SENSOR, prefix=prefix)
    assert (done.returncode, done.stderr) == (1, "")
    problem, = (line for line in done.stdout.splitlines() if line.startswith("problem"))
    assert "CAP_SYS_ADMIN is missing here: run it with sudo; what needs it is not looked at" in problem
    assert f"\nok       {SENSOR}: it is up\n" in done.stdout
