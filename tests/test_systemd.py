"""The systemd units: that systemd takes them, and, in a systemd booted for it, that they do what they are for."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import ZEEK, package_repository

from xdp_erm_py import systemd
from xdp_erm_py.errors import UsageError, XdpErmError
from xdp_erm_py.lab.traffic import synthetic

pytestmark = pytest.mark.xdist_group("systemd")

REPOSITORY = Path(__file__).resolve().parents[1]
XDP_ERM = REPOSITORY / "bin" / "xdp-erm"
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT = 60  # seconds

NAMESPACES = ("--mount", "--pid", "--net", "--cgroup", "--ipc", "--uts")

#: Sends a frame COUNT times from an interface: INTERFACE COUNT HEX
SEND = """
import socket, sys
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
    sender.bind((sys.argv[1], 0))
    for _ in range(int(sys.argv[2])):
        sender.send(bytes.fromhex(sys.argv[3]))
"""
ERM_FRAME = next(iter(synthetic(flows=1, packets=1))).sent

#: Zeek as far as these units go: it wants to start at boot, and notes what it finds attached.
ZEEK_UNIT = f"""
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c '{XDP_ERM} status --json >/run/zeek-found'

[Install]
WantedBy=multi-user.target
"""


@pytest.mark.check
@pytest.mark.parametrize("unit", systemd.UNITS)
def test_systemd_understands_the_unit(unit: str, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze: install systemd")
    for name in systemd.UNITS:
        (tmp_path / name).write_text(systemd.unit_text(name, XDP_ERM))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", tmp_path / unit], capture_output=True, text=True,
                          env={"PATH": SYSTEM_PATH, "SYSTEMD_UNIT_PATH": f"{tmp_path}:/lib/systemd/system"},
                          timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.check
@pytest.mark.parametrize("unit", systemd.UNITS)
def test_units_say_whose_they_are(unit: str) -> None:
    assert systemd.unit_text(unit, XDP_ERM).startswith(systemd.MARKER)


@pytest.mark.parametrize("path", ["/opt/xdp erm/xdp-erm", "/opt/100%/xdp-erm", "/opt/$HOME/xdp-erm", '/opt/"/xdp-erm'])
def test_paths_that_units_would_misread_are_refused(path: str) -> None:
    with pytest.raises(XdpErmError, match="a path with such characters cannot stand in a unit"):
        systemd.unit_text(systemd.PUBLISHER, Path(path))


def test_without_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(systemd, "_BOOTED", tmp_path / "system")
    with pytest.raises(XdpErmError, match="systemd does not run this system"):
        systemd.run(argparse.Namespace())


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(XdpErmError, match="needs root"):
        systemd.run(argparse.Namespace())


def test_impossible_interface_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(systemd, "_BOOTED", tmp_path)
    parser = argparse.ArgumentParser()
    systemd.add_arguments(parser)
    for action in ("install", "remove"):
        with pytest.raises(UsageError, match="'eth0/1' is not an interface name"):
            systemd.run(parser.parse_args([action, "eth0/1"]))


class Booted:
    """A systemd that runs as process 1 of its own namespaces. `process` is its id out here."""

    def __init__(self, process: int) -> None:
        self.process = process

    def start(self, *command: str) -> subprocess.Popen[str]:
        enter = ["nsenter", f"--target={self.process}", "--all", "--", *command]
        return subprocess.Popen(enter, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env={"PATH": SYSTEM_PATH})

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        with self.start(*command) as running:
            try:
                output, errors = running.communicate(timeout=TIMEOUT)
            except BaseException:
                running.kill()
                raise
        return subprocess.CompletedProcess(command, running.returncode, output, errors)

    def do(self, *command: str) -> str:
        """What a command prints that must not fail."""
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}\n{self.journal()}"
        return done.stdout

    def xdp_erm(self, *arguments: str) -> str:
        return self.do(str(XDP_ERM), *arguments)

    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "--lines=50").stdout

    def log(self, unit: str) -> str:
        """What a unit said since it was last started."""
        invocation = self.state(unit, "InvocationID")
        return self.do("journalctl", "--output=cat", f"_SYSTEMD_INVOCATION_ID={invocation}")

    def write(self, path: str, text: str) -> None:
        self.do("sh", "-c", 'mkdir -p "$(dirname "$1")" && printf %s "$2" >"$1"', "sh", path, text)

    def state(self, unit: str, key: str = "ActiveState") -> str:
        return self.do("systemctl", "show", "--value", f"--property={key}", unit).strip()

    def attached(self) -> dict[str, dict[str, object]]:
        """Interfaces by name, as `xdp-erm status --json` has them."""
        interfaces = json.loads(self.xdp_erm("status", "--json"))["interfaces"]
        return {interface["name"]: interface for interface in interfaces}

    def decapsulated(self, name: str) -> int:
        """The packets that were decapsulated on an interface."""
        interfaces = json.loads(self.xdp_erm("stats", name, "--json"))["interfaces"]
        packets: int = interfaces[0]["counters"]["decapsulated"]["packets"]
        return packets

    def unit_files(self) -> set[str]:
        return set(self.do("find", "/etc/systemd/system", "-mindepth", "1", "-printf", "%P\n").splitlines())

    def add_interface(self, name: str) -> None:
        """A veth; peer() names its other end."""
        self.do("ip", "link", "add", name, "mtu", "1600", "up", "type", "veth", "peer", "name", peer(name))
        self.do("ip", "link", "set", peer(name), "up", "mtu", "1600")

    def send(self, name: str, count: int) -> None:
        """Puts ERM frames on the wire to an interface."""
        self.do("/usr/bin/python3", "-c", SEND, peer(name), str(count), ERM_FRAME.hex())

    def wait_until(self, what: str, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not in {TIMEOUT} s\n{self.journal()}"
            time.sleep(0.1)


def peer(name: str) -> str:
    return f"{name}-peer"


@pytest.fixture(scope="module")
def systemd_process(xdp: None) -> Iterator[int]:
    """Boots systemd, once for all tests, in a cgroup of its own; skips where that is not possible."""
    for program in ("/lib/systemd/systemd", "/lib/systemd/systemd-udevd"):
        if not os.access(program, os.X_OK):
            pytest.skip(f"no {program} to boot: install systemd and udev")
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    cgroup2 = next((mount[1] for mount in mounts if mount[2] == "cgroup2"), None)
    if cgroup2 is None:
        pytest.skip("no cgroup2 hierarchy is mounted, which systemd needs")
    probe = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"systemd needs namespaces of its own: {probe.stderr.strip()}")

    cgroup = Path(cgroup2, f"xdp-erm-test-{os.getpid()}")
    cgroup.mkdir()
    try:
        boot = ["sh", "-c", 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"', "sh", str(cgroup), "unshare",
                *NAMESPACES, "--fork", "--kill-child", "sh", str(REPOSITORY / "tests" / "boot_systemd.sh")]
        with subprocess.Popen(boot, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              start_new_session=True) as unshare:
            try:
                yield wait_for_boot(unshare)
            finally:
                unshare.kill()  # --kill-child: process 1 dies with it, and all others with that
    finally:
        remove_cgroup(cgroup)


def wait_for_boot(unshare: subprocess.Popen[str]) -> int:
    """Waits until systemd is up; its process id."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if unshare.poll() is not None:
            assert unshare.stderr is not None
            pytest.fail(f"systemd does not boot: {unshare.stderr.read()}")
        process = children.read_text().split()
        if process and Booted(int(process[0])).run("systemctl", "is-system-running").stdout == "running\n":
            return int(process[0])
        time.sleep(0.1)
    pytest.fail(f"systemd is not up after {TIMEOUT} s")


def remove_cgroup(cgroup: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while "populated 1" in (cgroup / "cgroup.events").read_text():
        assert time.monotonic() < deadline, f"{cgroup}: processes are left"
        time.sleep(0.05)
    for directory, _, _ in os.walk(cgroup, topdown=False):
        os.rmdir(directory)


@pytest.fixture
def booted(systemd_process: int) -> Iterator[Booted]:
    """The booted systemd, as it was before, with an interface mon0."""
    booted = Booted(systemd_process)
    booted.add_interface("mon0")
    yield booted
    booted.run("sh", "-c", "rm -rf /etc/systemd/system/xdp-erm*.d")
    booted.run(str(XDP_ERM), "systemd", "remove")
    booted.run("sh", "-c", "systemctl stop zeek other; rm -rf /etc/xdp-erm.yaml /etc/systemd/system/*; "
                           "systemctl daemon-reload; systemctl stop multi-user.target; systemctl reset-failed; "
                           "for peer in /sys/class/net/*-peer; do ip link delete \"${peer##*/}\"; done")


def test_attached_at_boot_before_zeek(booted: Booted) -> None:
    booted.write("/etc/xdp-erm.yaml", "interfaces: {eth0.10: {vlan: strip}, br-lan0: {depth: 2, sources: 10.0.0.0/8}}")
    booted.write("/etc/systemd/system/zeek.service", ZEEK_UNIT)
    booted.do("systemctl", "enable", "zeek")
    assert booted.xdp_erm("systemd", "install").splitlines() == [
        "wrote /etc/systemd/system/xdp-erm-publish.service",
        "wrote /etc/systemd/system/xdp-erm@.service",
        r"enabled xdp-erm@eth0.10.service, xdp-erm@br\x2dlan0.service, xdp-erm-publish.service",
        "eth0.10: there is no such interface now; its unit starts when it appears",
        "br-lan0: there is no such interface now; its unit starts when it appears",
    ]
    assert booted.attached() == {}

    booted.do("systemctl", "start", "--no-block", "multi-user.target")
    booted.add_interface("eth0.10")
    booted.wait_until("eth0.10 attached", lambda: "eth0.10" in booted.attached())
    assert booted.state("zeek", "SubState") == "dead"  # the other interface is still to come
    booted.add_interface("br-lan0")
    booted.wait_until("Zeek started", lambda: booted.state("zeek") == "active")
    found = json.loads(booted.do("cat", "/run/zeek-found"))["interfaces"]
    assert {interface["name"]: (interface["config"]["vlan"], interface["config"]["depth"]) for interface in found} == {
        "eth0.10": ("strip", 1), "br-lan0": ("restore", 2)}
    booted.wait_until("the publisher started", lambda: booted.state(systemd.PUBLISHER) == "active")


def test_units_go_by_the_kernels_own_name(booted: Booted) -> None:
    """Which is what systemd waits for; settings may stand under an alternative one."""
    booted.do("ip", "link", "property", "add", "dev", "mon0", "altname", "mirror-of-the-switch")
    booted.write("/etc/xdp-erm.yaml", "interfaces: {mirror-of-the-switch: {vlan: strip}}")
    assert "enabled xdp-erm@mon0.service, xdp-erm-publish.service" in booted.xdp_erm("systemd", "install", "--now")
    assert booted.attached()["mon0"]["config"]["vlan"] == "strip"
    done = booted.run(str(XDP_ERM), "systemd", "install", "somewhere-else-on-the-switch")
    assert (done.returncode, done.stderr) == (
        1, "xdp-erm: somewhere-else-on-the-switch: there is no such interface now, and systemd can only wait for an "
           "interface by its own name: name that, or install once it is there\n")


def test_reload_swaps_and_stop_detaches(booted: Booted) -> None:
    booted.write("/etc/xdp-erm.yaml", "interfaces: {mon0: {vlan: strip}}")
    booted.xdp_erm("systemd", "install", "--now")
    before = booted.attached()["mon0"]
    booted.send("mon0", 3)
    assert booted.decapsulated("mon0") == 3

    booted.write("/etc/xdp-erm.yaml", "interfaces: {mon0: {vlan: tagged}}")
    booted.do("systemctl", "reload", "xdp-erm@mon0")
    swapped = booted.attached()["mon0"]
    assert swapped["config"] == {**before["config"], "vlan": "tagged"}  # type: ignore[dict-item]
    assert swapped["program_id"] != before["program_id"]
    assert swapped["attached_at"] == before["attached_at"]
    booted.send("mon0", 2)
    assert booted.decapsulated("mon0") == 5

    booted.write("/etc/xdp-erm.yaml", "interfaces: {mon0: {vlan: none}}")
    assert booted.run("systemctl", "reload", "xdp-erm@mon0").returncode != 0
    assert "/etc/xdp-erm.yaml:1: vlan: 'none' is none of restore, tagged, strip" in booted.log("xdp-erm@mon0")
    assert booted.attached()["mon0"] == swapped
    assert booted.state("xdp-erm@mon0") == "active"

    booted.do("systemctl", "stop", "xdp-erm@mon0")
    assert booted.attached() == {}
    assert booted.state("xdp-erm@mon0") == "inactive"


def test_publisher_stops_before_the_counters_go(booted: Booted) -> None:
    booted.write(f"/etc/systemd/system/{systemd.PUBLISHER}.d/slow.conf", "[Service]\nExecStop=/bin/sleep 1\n")
    booted.xdp_erm("systemd", "install", "--now", "mon0")
    booted.do("systemctl", "stop", systemd.PUBLISHER, "xdp-erm@mon0")
    stopped = int(booted.state(systemd.PUBLISHER, "InactiveEnterTimestampMonotonic"))
    assert 0 < stopped <= int(booted.state("xdp-erm@mon0", "ActiveExitTimestampMonotonic"))


def test_what_else_attaches_and_the_unit_do_not_fight(booted: Booted) -> None:
    booted.write("/etc/xdp-erm.yaml", "interfaces: {mon0: {}}")
    booted.xdp_erm("attach", "mon0")
    first = booted.attached()["mon0"]
    booted.send("mon0", 1)
    booted.xdp_erm("systemd", "install", "--now")
    assert booted.attached()["mon0"] == first  # the same configuration: nothing to do
    booted.xdp_erm("attach", "mon0", "--vlan", "strip")  # another one: the last wins
    assert booted.attached()["mon0"]["config"]["vlan"] == "strip"  # type: ignore[index]
    assert booted.state("xdp-erm@mon0") == "active"
    booted.xdp_erm("detach", "mon0")
    booted.do("systemctl", "reload", "xdp-erm@mon0")
    assert booted.attached()["mon0"]["config"] == first["config"]


def test_attached_again_when_the_interface_is_back(booted: Booted) -> None:
    booted.xdp_erm("systemd", "install", "--now", "mon0")
    booted.send("mon0", 2)
    booted.do("ip", "link", "delete", "mon0")
    booted.wait_until("the unit stopped", lambda: booted.state("xdp-erm@mon0") == "inactive")
    assert booted.state("xdp-erm@mon0", "Result") == "success"
    booted.add_interface("mon0")
    booted.wait_until("the unit started", lambda: booted.state("xdp-erm@mon0") == "active")
    booted.send("mon0", 1)
    assert booted.decapsulated("mon0") == 1


def test_publisher_is_kept_running(booted: Booted) -> None:
    booted.xdp_erm("systemd", "install", "--now", "mon0")
    assert booted.state(systemd.PUBLISHER, "RestartUSec") == "30s"
    booted.write(f"/etc/systemd/system/{systemd.PUBLISHER}.d/soon.conf", "[Service]\nRestartSec=3s\n")
    booted.do("systemctl", "daemon-reload")
    # All hardening notwithstanding, it read the counters; it found nobody to tell.
    def reported() -> bool:
        return "reports do not reach Zeek" in booted.log(systemd.PUBLISHER)
    booted.wait_until("the publisher's report", reported)
    assert "cannot read the counters" not in booted.log(systemd.PUBLISHER)
    first = booted.state(systemd.PUBLISHER, "MainPID")
    booted.do("kill", "-KILL", first)
    booted.wait_until("the publisher restarted", lambda: booted.state(systemd.PUBLISHER, "NRestarts") == "1")
    booted.wait_until("the publisher's report", reported)
    assert booted.state(systemd.PUBLISHER, "MainPID") not in (first, "0")
    booted.do("systemctl", "stop", systemd.PUBLISHER)
    assert booted.state(systemd.PUBLISHER, "Result") == "success"


def publisher(booted: Booted) -> str:
    """The publisher's process id, as its pid file has it; empty: there is none."""
    return booted.run("cat", "/run/xdp-erm-publish.pid").stdout.strip()


def test_publisher_takes_over_from_another(booted: Booted) -> None:
    booted.write(f"/etc/systemd/system/{systemd.PUBLISHER}.d/soon.conf", "[Service]\nRestartSec=3s\n")
    with booted.start(str(XDP_ERM), "publish") as other:
        try:
            booted.wait_until("the other publisher's pid file", lambda: publisher(booted))
            booted.xdp_erm("systemd", "install", "--now", "mon0")
            booted.wait_until("the unit waiting", lambda: booted.state(systemd.PUBLISHER, "SubState") == "auto-restart")
            assert "another publisher runs on this host" in booted.log(systemd.PUBLISHER)
            assert other.poll() is None
        finally:
            booted.do("kill", publisher(booted))
        other.communicate(timeout=TIMEOUT)
    booted.wait_until("the unit publishing", lambda: booted.state(systemd.PUBLISHER, "SubState") == "running")
    process = booted.state(systemd.PUBLISHER, "MainPID")
    booted.wait_until("its pid file", lambda: publisher(booted) == process)


def test_publisher_with_bad_options_is_not_restarted(booted: Booted) -> None:
    booted.write(f"/etc/systemd/system/{systemd.PUBLISHER}.d/bad.conf",
                 f"[Service]\nExecStart=\nExecStart={XDP_ERM} publish --interval 0\nRestartSec=1s\n")
    booted.xdp_erm("systemd", "install", "--now", "mon0")
    booted.wait_until("the publisher failed", lambda: booted.state(systemd.PUBLISHER) == "failed")
    assert booted.state(systemd.PUBLISHER, "NRestarts") == "0"


def test_nothing_requires_it(booted: Booted) -> None:
    assert booted.xdp_erm("systemd", "install", "--require", "mon0").splitlines()[-1] == (
        "--require: none of Zeek's own units (zeek.conf) captures from mon0, so no worker waits for it")


def test_install_again(booted: Booted) -> None:
    booted.xdp_erm("systemd", "install", "mon0")
    files = booted.unit_files()
    assert booted.xdp_erm("systemd", "install", "mon0") == f"enabled xdp-erm@mon0.service, {systemd.PUBLISHER}\n"
    assert booted.unit_files() == files
    booted.xdp_erm("systemd", "remove")  # what never ran
    assert booted.unit_files() == set()


def test_install_brings_up_to_date(booted: Booted) -> None:
    booted.xdp_erm("systemd", "install", "--now", "mon0")
    files = booted.unit_files()
    path = f"/etc/systemd/system/{systemd.TEMPLATE}"
    booted.write(path, f"{systemd.MARKER} of an earlier version\n[Service]\nExecStart=/bin/true\n")
    booted.write("/etc/xdp-erm.yaml", "defaults: {vlan: strip}")
    assert booted.xdp_erm("systemd", "install", "--now", "mon0").splitlines() == [
        f"wrote {path}",
        f"enabled xdp-erm@mon0.service, {systemd.PUBLISHER}",
        f"started xdp-erm@mon0.service, {systemd.PUBLISHER}",
    ]
    assert booted.do("cat", path) == systemd.unit_text(systemd.TEMPLATE, XDP_ERM)
    assert booted.do("stat", "--format=%a", path) == "644\n"
    assert booted.unit_files() == files
    assert booted.state("xdp-erm@mon0", "NeedDaemonReload") == "no"
    assert booted.attached()["mon0"]["config"]["vlan"] == "strip"  # type: ignore[index]


def test_install_does_not_wait_for_absent_interfaces(booted: Booted) -> None:
    assert booted.xdp_erm("systemd", "install", "--now", "mon0", "mon1").splitlines()[2:] == [
        f"enabled xdp-erm@mon0.service, xdp-erm@mon1.service, {systemd.PUBLISHER}",
        "mon1: there is no such interface now; its unit starts when it appears",
        f"started xdp-erm@mon0.service, {systemd.PUBLISHER}",
    ]
    assert set(booted.attached()) == {"mon0"}


@pytest.mark.parametrize("unit", systemd.UNITS)
def test_units_of_others_stay(booted: Booted, unit: str) -> None:
    path = f"/etc/systemd/system/{unit}"
    booted.write(path, "[Service]\nExecStart=/bin/true\n")
    for action in ("install", "remove"):
        done = booted.run(str(XDP_ERM), "systemd", action, *(["mon0"] if action == "install" else []))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"xdp-erm: {path}: was not written by xdp-erm and stays as it is: move it away first\n"
        assert booted.unit_files() == {unit}
        assert booted.do("cat", path) == "[Service]\nExecStart=/bin/true\n"


def test_a_failed_start_is_told(booted: Booted) -> None:
    booted.do("ip", "link", "add", "br-peer", "type", "bridge")
    booted.write("/etc/xdp-erm.yaml", "defaults: {mode: native}")  # bridges have none
    done = booted.run(str(XDP_ERM), "systemd", "install", "--now", "br-peer", "mon0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert r"xdp-erm@br\x2dpeer.service" in done.stderr
    assert set(booted.attached()) == {"mon0"}  # one that fails does not keep the others from being done
    assert booted.state(systemd.PUBLISHER) == "active"


def test_a_bad_configuration_changes_nothing(booted: Booted) -> None:
    booted.write("/etc/xdp-erm.yaml", "defaults: {mode: fast}")
    done = booted.run(str(XDP_ERM), "systemd", "install", "--now", "mon0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "xdp-erm: /etc/xdp-erm.yaml:1: mode: 'fast' is none of auto, native, generic\n"
    assert booted.unit_files() == set()


def test_remove(booted: Booted) -> None:
    booted.add_interface("mon1")
    booted.xdp_erm("systemd", "install", "--now", "mon0", "mon1")
    booted.write("/etc/systemd/system/other.service", f"[Unit]\nAfter={systemd.PUBLISHER}\n{ZEEK_UNIT}")
    booted.do("systemctl", "start", "other")
    assert booted.xdp_erm("systemd", "remove", "mon0") == "xdp-erm@mon0.service: stopped and disabled\n"
    assert set(booted.attached()) == {"mon1"}
    assert not any("mon0" in file for file in booted.unit_files())

    # A unit that failed is not left behind either.
    booted.write("/etc/xdp-erm.yaml", "interfaces: []")
    assert booted.run("systemctl", "start", "xdp-erm@mon0").returncode != 0
    assert booted.xdp_erm("systemd", "remove").splitlines() == [
        f"stopped, disabled and removed /etc/systemd/system/{unit}" for unit in systemd.UNITS]
    assert booted.attached() == {}
    assert booted.unit_files() == {"other.service"}
    assert booted.do("systemctl", "list-units", "--all", "--no-legend", "xdp-erm@*") == ""
    assert booted.state(systemd.PUBLISHER, "LoadState") == "not-found"
    assert booted.xdp_erm("systemd", "remove") == "the units are not installed\n"


def test_from_the_pyz(booted: Booted, tmp_path: Path) -> None:
    """The helper as one file, in a directory of another user's."""
    for name in ("xdp_erm_py", "bpf", "zeekctl", "docs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["/usr/bin/python3", tmp_path / "zeekctl" / "build.py"], timeout=TIMEOUT, check=True)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    pyz = shutil.copy(tmp_path / "build" / "zeekctl" / "xdp-erm.pyz", home)
    for path in (home, pyz):
        os.chown(path, 65534, 65534)
    booted.do(str(pyz), "systemd", "install", "--now", "mon0")
    assert str(pyz) in booted.state("xdp-erm@mon0", "ExecStart")
    assert set(booted.attached()) == {"mon0"}
    assert booted.state(systemd.PUBLISHER) == "active"
    booted.wait_until("the publisher's pid file", lambda: publisher(booted))


# Zeek's own units, which zeek-systemd-generator makes of zeek.conf

GENERATOR = ZEEK / "bin" / "zeek-systemd-generator" if ZEEK else None
needs_generator = pytest.mark.skipif(not (GENERATOR and GENERATOR.is_file()),
                                     reason="no Zeek with zeek-systemd-generator, which 8.1 and later have")


class ZeekConf:
    """A Zeek whose prefix the booted system sees with changes of its own, and zeek.conf in it."""

    def __init__(self, booted: Booted) -> None:
        assert ZEEK is not None and GENERATOR is not None
        self.booted = booted
        booted.do("sh", "-c", 'mkdir -p /run/zeek/new /run/zeek/work && mount -t overlay -o '
                  '"lowerdir=$1,upperdir=/run/zeek/new,workdir=/run/zeek/work" overlay "$1" && '
                  "(id zeek || useradd --system --no-create-home zeek) >/dev/null && chown zeek: /run/zeek/new && "
                  'rm -rf "$1/etc/zeek" && ln -s "$2" /run/boot/generators/', "sh", str(ZEEK), str(GENERATOR))

    def configure(self, text: str, place: str = "zeek.conf") -> None:
        assert ZEEK is not None
        self.booted.write(f"{ZEEK}/etc/zeek/{place}", text)

    def close(self) -> None:
        self.booted.run("sh", "-c", "systemctl stop zeek.target 'zeek-*'; rm -f /run/boot/generators/*; "
                        'systemctl daemon-reload; umount -l "$1"; rm -rf /run/zeek', "sh", str(ZEEK))


@pytest.fixture
def zeek_conf(booted: Booted) -> Iterator[ZeekConf]:
    zeek_conf = ZeekConf(booted)
    yield zeek_conf
    zeek_conf.close()


SECTIONS = """
[zeek]
manager = 1
loggers = 1
[interface mon0]
interface = af_packet::${interface_section_name}
workers = 2
[interface others]
interface = af_packet::mon${worker_index}
workers = 2
[interface udp]
interface = udp::0.0.0.0:7932:skip=12
workers = 1
"""


def drop_in(unit: str) -> str:
    return f"/etc/systemd/system/{unit}.d/xdp-erm.conf"


def groups(booted: Booted) -> str:
    """What doctor says of AF_PACKET's groups."""
    checks = json.loads(booted.run(str(XDP_ERM), "doctor", "--json").stdout)["checks"]
    return "".join(check["text"] for check in checks if check["check"] == "fanout")


@needs_generator
def test_interfaces_of_zeek_conf(zeek_conf: ZeekConf) -> None:
    """Those of AF_PACKET, with all templates filled in; the workers come after what attaches."""
    booted = zeek_conf.booted
    booted.add_interface("mon1")
    zeek_conf.configure(SECTIONS)
    assert booted.xdp_erm("systemd", "install").splitlines() == [
        "mon0, mon1, mon2: as Zeek's workers capture from there",
        *(f"wrote /etc/systemd/system/{unit}" for unit in systemd.UNITS),
        *(f"wrote {drop_in(unit)}" for unit in ("zeek-worker-mon0@.service", "zeek-worker-others@1.service",
                                                "zeek-worker-others@2.service")),
        f"enabled xdp-erm@mon0.service, xdp-erm@mon1.service, xdp-erm@mon2.service, {systemd.PUBLISHER}",
        "mon2: there is no such interface now; its unit starts when it appears",
    ]
    for worker, name in (("mon0@1", "mon0"), ("mon0@2", "mon0"), ("others@1", "mon1"), ("others@2", "mon2")):
        assert f"xdp-erm@{name}.service" in booted.state(f"zeek-worker-{worker}", "After").split()
        assert systemd.PUBLISHER in booted.state(f"zeek-worker-{worker}", "Before").split()
        assert "xdp-erm" not in booted.state(f"zeek-worker-{worker}", "Requires")
    assert "zeek-setup.service" in booted.state("xdp-erm@mon0", "Before").split()
    assert "xdp-erm" not in booted.state("zeek-worker-udp@1", "After")

    assert "workers of mon0, mon1, mon2 have one AF_PACKET fanout id (23), so " in groups(booted)
    for more in ("fanout_id=42", "enable_fanout=F"):
        zeek_conf.configure(SECTIONS.replace("[interface o", f"worker_args = AF_Packet::{more}\n[interface o"))
        booted.do("systemctl", "daemon-reload")
        assert "workers of mon1, mon2 have" in groups(booted)

    # Without sections, and with other workers; what is not up to date is removed.
    zeek_conf.configure("interface = af_packet::mon1\nworkers = 1\nmanager = 1\n")
    assert booted.xdp_erm("systemd", "install", "--require").splitlines() == [
        "mon1: as Zeek's workers capture from there",
        f"wrote {drop_in('zeek-worker@.service')}",
        *(f"removed {drop_in(unit)}" for unit in ("zeek-worker-mon0@.service", "zeek-worker-others@1.service",
                                                  "zeek-worker-others@2.service")),
        f"enabled xdp-erm@mon1.service, {systemd.PUBLISHER}",
    ]
    assert "xdp-erm@mon1.service" in booted.state("zeek-worker@1", "Requires").split()
    doctor = json.loads(booted.run(str(XDP_ERM), "doctor", "--json").stdout)["checks"]
    assert {check["interface"] for check in doctor} == {None, "mon1"}
    assert groups(booted) == ""

    # A configuration of ours that names interfaces counts more.
    booted.write("/etc/xdp-erm.yaml", "interfaces: {mon0: {}}")
    assert "enabled xdp-erm@mon0.service, " in booted.xdp_erm("systemd", "install")
    booted.xdp_erm("systemd", "remove")
    assert not [file for file in booted.unit_files() if "xdp-erm" in file]


@needs_generator
def test_one_interface_of_zeek_conf_at_a_time(zeek_conf: ZeekConf) -> None:
    """What is for the workers of another stays, and of a template's workers only those of the interface wait for it."""
    booted = zeek_conf.booted
    booted.add_interface("mon1")
    zeek_conf.configure(SECTIONS)
    booted.xdp_erm("systemd", "install", "--require", "mon0")
    assert booted.xdp_erm("systemd", "install", "mon1").splitlines() == [
        f"wrote {drop_in('zeek-worker-others@1.service')}",
        f"enabled xdp-erm@mon1.service, {systemd.PUBLISHER}"]
    for worker, after, requires in (("mon0@1", {"mon0"}, {"mon0"}), ("others@1", {"mon1"}, set()),
                                    ("others@2", set(), set())):
        for key, names in (("After", after), ("Requires", requires)):
            found = booted.state(f"zeek-worker-{worker}", key).split()
            assert {unit for unit in found if "xdp-erm@" in unit} == {f"xdp-erm@{name}.service" for name in names}
    assert booted.xdp_erm("systemd", "remove", "mon0").splitlines() == [
        f"removed {drop_in('zeek-worker-mon0@.service')}", "xdp-erm@mon0.service: stopped and disabled"]
    assert booted.xdp_erm("systemd", "install", "mon1").splitlines() == [
        f"enabled xdp-erm@mon1.service, {systemd.PUBLISHER}"]


@needs_generator
def test_zeek_conf_of_one_of_several_hosts(zeek_conf: ZeekConf) -> None:
    booted = zeek_conf.booted
    name = booted.do("hostname").strip()
    zeek_conf.configure("[zeek]\nmanager = 1\n[interface eth9]\ninterface = af_packet::eth9\nworkers = 1\n",
                        "cluster/another.zeek.conf")
    zeek_conf.configure("[interface one]\ninterface = af_packet::mon0\nworkers = 2\n", f"cluster/{name}.zeek.conf")
    assert booted.xdp_erm("systemd", "install").splitlines()[0] == "mon0: as Zeek's workers capture from there"
    assert "xdp-erm@mon0.service" in booted.state("zeek-worker-one@2", "After").split()


@needs_generator
@pytest.mark.parametrize("text", ["", "interface = af_packet::mon0\nworkers = many\n", "[zeek]\nmanager = 1\n"],
                         ids=["none", "wrong", "no worker"])
def test_without_a_worker_in_zeek_conf(zeek_conf: ZeekConf, text: str) -> None:
    if text:
        zeek_conf.configure(text)
    done = zeek_conf.booted.run(str(XDP_ERM), "systemd", "install")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "xdp-erm: no interface: name one, or put it under `interfaces` in /etc/xdp-erm.yaml\n"
    assert zeek_conf.booted.unit_files() == set()


LOCAL_ZEEK = f"""
@load {REPOSITORY}/scripts
redef LogAscii::use_json = T;
redef XDP_ERM::log_interval = 0sec;
redef Log::default_rotation_interval = 0sec;
"""


@needs_generator
def test_a_sensor_with_zeek_conf(zeek_conf: ZeekConf, tmp_path: Path) -> None:
    """Brought up as the documentation says: attached before the workers, everything counted once and in the log."""
    booted = zeek_conf.booted
    booted.do("env", "HOME=/run", f"PATH={ZEEK}/bin:{SYSTEM_PATH}", "zkg", "install", "--force", "--skiptests",
              str(package_repository(tmp_path)))
    xdp_erm = f"{ZEEK}/bin/xdp-erm"
    zeek_conf.configure("[zeek]\nmanager = 1\nproxies = 1\narchiver = 0\n[interface mon0]\n"
                        "interface = af_packet::${interface_section_name}\nworkers = 2\n")
    booted.write(f"{ZEEK}/share/zeek/site/local.zeek", LOCAL_ZEEK.replace(f"{REPOSITORY}/scripts", "packages"))
    booted.write(f"/etc/systemd/system/{systemd.PUBLISHER}.d/often.conf",
                 f"[Unit]\nPartOf=zeek.target\n[Service]\nExecStart=\nExecStart={xdp_erm} publish --interval 1\n")
    booted.do(xdp_erm, "systemd", "install", "--now")
    booted.do("systemctl", "restart", "zeek.target")
    assert set(booted.attached()) == {"mon0"}
    workers = ("zeek-worker-mon0@1", "zeek-worker-mon0@2")
    attached = int(booted.state("xdp-erm@mon0", "ActiveEnterTimestampMonotonic"))
    assert all(0 < attached <= int(booted.state(worker, "ExecMainStartTimestampMonotonic")) for worker in workers)
    assert {booted.do("ps", "-o", "user=", "-p", booted.state(worker, "MainPID")).strip() for worker in workers} == {
        "zeek"}

    def counted() -> int:
        said = booted.run("sh", "-c", f"cat {ZEEK}/var/spool/zeek/*/xdp_erm.log").stdout
        return sum(json.loads(row)["decapsulated.packets"] for row in said.splitlines())

    booted.send("mon0", 50)
    booted.wait_until("the report in the log", lambda: counted() == 50)
    # Stopped together, as when the machine goes down: the publisher before the worker that takes its last report.
    booted.send("mon0", 7)
    booted.do("systemctl", "stop", "zeek.target")
    assert booted.state(systemd.PUBLISHER) == "inactive"
    booted.wait_until("the manager's end", lambda: booted.state("zeek-manager") == "inactive")
    assert "did not reach Zeek" not in booted.log(systemd.PUBLISHER)
    assert counted() == 57


@needs_generator
def test_workers_do_not_start_where_attaching_failed(zeek_conf: ZeekConf) -> None:
    booted = zeek_conf.booted
    booted.add_interface("mon1")
    zeek_conf.configure("[zeek]\nmanager = 0\narchiver = 0\n"
                        "[interface mon0]\ninterface = af_packet::mon0\nworkers = 1\n"
                        "[interface mon1]\ninterface = af_packet::mon1\nworkers = 1\n"
                        "worker_args = AF_Packet::fanout_id=24\n")
    booted.write(f"{ZEEK}/share/zeek/site/local.zeek", LOCAL_ZEEK)
    booted.write("/etc/systemd/system/xdp-erm@mon0.service.d/fails.conf",
                 "[Service]\nExecStart=\nExecStart=/bin/false\n")
    for require, state in (("", "active"), ("--require", "inactive")):
        booted.xdp_erm("systemd", "install", *filter(None, [require]))
        booted.run("systemctl", "start", "multi-user.target")
        booted.wait_until("mon1's worker", lambda: booted.state("zeek-worker-mon1@1") == "active")
        assert booted.state("xdp-erm@mon0") == "failed"
        assert booted.state("zeek-worker-mon0@1") == state
        booted.run("systemctl", "stop", "zeek.target", "multi-user.target", "xdp-erm@mon1")
        booted.run("systemctl", "reset-failed")


@needs_generator
def test_workers_come_back_with_their_interface(zeek_conf: ZeekConf) -> None:
    """Those that stopped along with what attaches to it; none where Zeek was stopped."""
    booted, worker = zeek_conf.booted, "zeek-worker-mon0@1"
    zeek_conf.configure("[zeek]\nmanager = 1\narchiver = 0\n[interface mon0]\ninterface = af_packet::mon0\n"
                        "workers = 1\n")
    booted.write(f"{ZEEK}/share/zeek/site/local.zeek", LOCAL_ZEEK)
    booted.xdp_erm("systemd", "install", "--now", "--require")
    booted.do("systemctl", "start", "zeek.target")
    assert booted.state(worker) == "active"

    def bounce() -> None:
        booted.do("ip", "link", "delete", peer("mon0"))
        booted.wait_until("both end", lambda: {booted.state(worker), booted.state("xdp-erm@mon0")} == {"inactive"})
        booted.add_interface("mon0")
        booted.wait_until("the unit", lambda: booted.state("xdp-erm@mon0") == "active")

    bounce()
    booted.wait_until("the worker", lambda: booted.state(worker) == "active")
    booted.do("systemctl", "stop", "zeek.target")
    bounce()
    assert worker not in booted.do("systemctl", "list-jobs") and booted.state(worker) == "inactive"
