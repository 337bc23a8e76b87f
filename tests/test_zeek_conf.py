"""Several hosts with zeek.conf, as zeek-systemd-generator sets Zeek up there: the way of a report to the log."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import ZEEK, Machine, copy_of_zeek, pid_within

from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import Cable
from xdp_erm_py.lab.traffic import synthetic

REPOSITORY = Path(__file__).resolve().parents[1]
XDP_ERM = REPOSITORY / "bin" / "xdp-erm"
GENERATOR = ZEEK / "bin" / "zeek-systemd-generator" if ZEEK else None
PATIENCE = 90  # seconds

pytestmark = [
    pytest.mark.skipif(not (GENERATOR and GENERATOR.is_file()),
                       reason="no Zeek with zeek-systemd-generator, which 8.1 and later have"),
    pytest.mark.usefixtures("xdp")]

COMMON = "user = root\ngroup = root\narchiver = 0\n"
CONFIGURATIONS = {
    "one": f"[zeek]\nmanager = 1\nproxies = 1\naddress = 10.9.0.1\n{COMMON}",
    "two": f"[zeek]\naddress = 10.9.0.2\n{COMMON}"
           f"[interface {SENSOR}]\ninterface = af_packet::${{interface_section_name}}\nworkers = 2\n",
}
LOCAL_ZEEK = f"""
@load policy/misc/zeromq-multi-host-auto-setup
@load {REPOSITORY}/scripts
redef LogAscii::use_json = T;
redef XDP_ERM::log_interval = 0sec;
redef Log::default_rotation_interval = 0sec;
"""


class Host:
    """A machine whose units are run without systemd."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.processes: list[subprocess.Popen[bytes]] = []
        for name, text in CONFIGURATIONS.items():
            file = machine.prefix / "etc" / "zeek" / "cluster" / f"{name}.zeek.conf"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (machine.prefix / "share" / "zeek" / "site" / "local.zeek").write_text(LOCAL_ZEEK)

    def start(self) -> list[str]:
        """Zeek's nodes of this host; their names."""
        self.machine.shell(f"mkdir /run/units && {GENERATOR} /run/units")
        names = []
        wanted = self.machine.shell("ls /run/units/zeek.target.wants").split()
        for name in sorted(wanted, key=lambda name: name != "zeek-setup.service"):
            instance = re.search("@(.*)[.]", name)
            template = re.sub("@.*[.]", "@.", name)
            unit = self.machine.shell(f"cat /run/units/{template}; cat /run/units/{name}.d/*.conf 2>&-; true")
            unit = unit.replace("%i", instance[1] if instance else "")
            environment = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
            commands = re.findall("^ExecStart=(.*)$", unit, re.MULTILINE)
            if name == "zeek-setup.service":
                self.machine.shell("set -e; " + "; ".join(commands))
                continue
            where = re.search("^WorkingDirectory=(.*)$", unit, re.MULTILINE)
            assert where
            self.spawn("env", *(f"{key}={value}" for key, value in environment.items()), "sh", "-c",
                       f"cd {where[1]} && exec {commands[0]} >said 2>&1")
            names.append(environment["CLUSTER_NODE"])
        return names

    def spawn(self, *words: str) -> None:
        self.processes.append(subprocess.Popen(self.machine.command(*words)))

    def rows(self, log: str) -> list[dict[str, Any]]:
        said = self.machine.shell(f"cat {ZEEK}/var/spool/zeek/*/{log}.log 2>&-; true")
        return [json.loads(row) for row in said.splitlines()]


def until(what: Callable[[], Any], *hosts: Host) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline, "\n".join(
            host.machine.shell(f"tail -n 20 {ZEEK}/var/spool/zeek/*/said /run/publish.log 2>&1; true")
            for host in hosts)
        time.sleep(0.3)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host, Cable]]:
    """Two, which reach each other, and the cable that ends at the second."""
    places = [tmp_path / name for name in CONFIGURATIONS]
    for place in places:
        place.mkdir()
    with copy_of_zeek(places[0]) as first, copy_of_zeek(places[1]) as second, Cable() as near, Cable() as far:
        with near.sensor.entered():
            one = Machine("one", first)
        with one:
            with far.sensor.entered():
                two = Machine("two", second, inside=one)
            with two:
                one.shell(f"ip link add between type veth peer name between netns {pid_within(one, two.pid)}")
                for number, machine in enumerate((one, two), 1):
                    machine.shell(f"ip address add 10.9.0.{number}/24 dev between; ip link set between up")
                yield Host(one), Host(two), far


def test_reports_of_another_host_reach_the_log(hosts: tuple[Host, Host, Cable]) -> None:
    one, two, cable = hosts
    two.machine.run(str(XDP_ERM), "attach", SENSOR)
    assert sorted(one.start()) == ["manager", "one-proxy-1"]
    assert sorted(two.start()) == [f"two-worker-{SENSOR}-1", f"two-worker-{SENSOR}-2"]
    two.spawn("sh", "-c", f"exec {XDP_ERM} publish --interval=1 >/run/publish.log 2>&1")
    for packet in synthetic(flows=10, packets=100):
        cable.send(packet.sent)
    until(lambda: sum(row["decapsulated.packets"] for row in one.rows("xdp_erm")) >= 100, one, two)
    rows = one.rows("xdp_erm")
    assert sum(row["decapsulated.packets"] for row in rows) == 100
    assert {(row["host"], row["interface"]) for row in rows} == {("two", SENSOR)}
    assert two.rows("xdp_erm") == []
