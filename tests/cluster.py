"""A Zeek cluster that zeekctl runs on make-believe machines, with the package, at the end of the lab's cable."""

from __future__ import annotations

import collections
import ipaddress
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from machine import ZEEK, Machine

from xdp_erm_py.lab.cable import Cable
from xdp_erm_py.lab.fanout import FlowKey, flow_key
from xdp_erm_py.lab.traffic import Packet

PATIENCE, REST = 60, 1.5  # seconds
PROTOCOLS = {"tcp": 6, "udp": 17}

LOCAL_ZEEK = """
@load packages
@load policy/tuning/json-logs
@load policy/protocols/conn/vlan-logging
redef digest_salt = "test";
@ifdef ( XDP_ERM::log_interval )
redef XDP_ERM::log_interval = 0sec;
@endif

# How many packets a worker has taken in: those that still wait for a worker when it is stopped are lost.
event taken_in()
	{
	local f = open("taken-in");
	print f, get_net_stats()$pkts_recvd;
	close(f);
	schedule 100msec { taken_in() };
	}
event zeek_init()
	{
	if ( reading_live_traffic() )
		schedule 100msec { taken_in() };
	}

redef record Conn::Info += { worker: string &log &optional; };
event connection_state_remove(c: connection)
	{
	c$conn$worker = Cluster::node;
	}
"""


def nodes(**keys: str) -> str:
    """node.cfg: four workers on the end of the cable, all on one machine; `keys` are more of the workers' keys."""
    more = "".join(f"{key.replace('xdp_erm_', 'xdp_erm.')}={value}\n" for key, value in keys.items())
    return (section("manager", "manager") + section("proxy-1", "proxy")
            + section("worker", "worker", interface="sensor0", lb_method="af_packet", lb_procs="4") + more)


def section(name: str, kind: str, host: str = "127.0.0.1", **keys: str) -> str:
    return f"\n[{name}]\ntype={kind}\nhost={host}\n" + "".join(f"{key}={value}\n" for key, value in keys.items())


class Flow(NamedTuple):
    """What conn.log says of a flow."""

    packets: int
    vlan: int | None


class Cluster:
    """zeekctl and its configuration on a machine."""

    def __init__(self, cable: Cable, machine: Machine) -> None:
        self.cable = cable
        self.machine = machine
        self.prefix = machine.prefix
        self.spool = self.prefix / "spool"
        self._stock = (self.prefix / "etc" / "zeekctl.cfg").read_text()
        (self.prefix / "share" / "zeek" / "site" / "local.zeek").write_text(LOCAL_ZEEK)
        self.configure()

    def configure(self, node_cfg: str = nodes(), **options: str) -> None:
        """Writes node.cfg, and zeekctl.cfg with more options; xdp_erm_ stands for xdp_erm. before a name."""
        # Without statistics of its own, for which it looks at each interface for some seconds, cron is quick.
        options = {"SendMail": "", "StatsLogEnable": "0", "xdp_erm_interval": "1", **options}
        lines = [f"{name.replace('xdp_erm_', 'xdp_erm.')} = {value}" for name, value in options.items()]
        (self.prefix / "etc" / "node.cfg").write_text(node_cfg)
        (self.prefix / "etc" / "zeekctl.cfg").write_text("\n".join([self._stock, *lines, ""]))

    def zeekctl(self, *words: str, status: int | None = 0) -> str:
        """What zeekctl prints, but for what Zeek 9's says wherever websockets is older than 11."""
        said = self.machine.run("zeekctl", *words, status=status)
        return re.sub(r"^Warning: .*websockets.*\n", "", said, flags=re.MULTILINE)

    def status(self) -> list[dict[str, Any]]:
        """Where xdp-erm is attached."""
        answer = self.machine.run(f"{ZEEK}/bin/xdp-erm", "status", "--json")
        found: list[dict[str, Any]] = json.loads(answer)["interfaces"]
        return found

    def publisher(self, helper: str = "xdp-erm.pyz") -> int | None:
        """The process id of the machine's publisher, if one runs."""
        pids = self.machine.run("pgrep", "-f", f"^/usr/bin/python3.*{helper} publish", status=None).split()
        assert len(pids) < 2
        return int(pids[0]) if pids else None

    def running(self) -> list[str]:
        """The nodes that run."""
        table = self.zeekctl("status", status=None).splitlines()
        return [line.split()[0] for line in table if " running " in line]

    def mirror(self, packets: Iterable[Packet]) -> None:
        """Sends what the switch sends and waits until the workers, which must be running, have taken all of it in."""
        before = self._taken_in_at_rest()
        sent = self.send(packets)
        deadline = time.monotonic() + PATIENCE
        while (taken := self._taken_in() - before) < sent:
            assert time.monotonic() < deadline, f"the workers have taken in {taken} of {sent} packets"
            time.sleep(0.1)

    def _taken_in_at_rest(self) -> int:
        """A worker that has just started may still have to take in what it heard before its socket was bound."""
        last, since = self._taken_in(), time.monotonic()
        deadline = since + PATIENCE
        while time.monotonic() - since < REST:
            assert time.monotonic() < deadline, "the workers go on taking in packets that nobody sent"
            time.sleep(0.1)
            if (now := self._taken_in()) != last:
                last, since = now, time.monotonic()
        return last

    def send(self, packets: Iterable[Packet]) -> int:
        """Sends at a pace that four workers on a small machine keep up with; returns how many."""
        number = 0
        for number, packet in enumerate(packets, 1):
            self.cable.send(packet.sent)
            if number % 50 == 0:
                time.sleep(0.01)
        return number

    def _taken_in(self) -> int:
        """Packets that the workers have got since they started; a file that is being written anew is read again."""
        total = 0
        for file in self.spool.glob("*/taken-in"):
            while not (content := file.read_text()).endswith("\n"):
                time.sleep(0.01)
            total += int(content)
        return total

    def rows(self, log: str, node: str = "manager") -> list[dict[str, Any]]:
        """The rows of a log that is being written, as far as they are there."""
        file = self.spool / node / f"{log}.log"
        whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
        rows = [json.loads(line) for line in whole.splitlines()]
        # An AF_PACKET socket hears all interfaces until it is bound: a starting worker may see the cluster's own.
        return [row for row in rows if row.get("id.orig_h") != "127.0.0.1"]

    def wait_for_rows(self, log: str, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The rows of a log as soon as there are enough, or after PATIENCE."""
        deadline = time.monotonic() + PATIENCE
        while not enough(rows := self.rows(log)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return rows


def decapsulated(rows: list[dict[str, Any]]) -> int:
    """What xdp_erm.log has counted."""
    return sum(row["decapsulated.packets"] for row in rows)


def mirrored_flows(packets: Iterable[Packet]) -> dict[FlowKey, Flow]:
    """The flows that the switch mirrored."""
    counted: collections.Counter[tuple[FlowKey, int]] = collections.Counter()
    for packet in packets:
        flow = flow_key(packet.mirrored)
        assert flow is not None
        counted[flow, int.from_bytes(packet.mirrored[14:16], "big") & 0xFFF] += 1
    return {flow: Flow(number, vlan) for (flow, vlan), number in counted.items()}


def key_of(row: dict[str, Any]) -> FlowKey:
    """The flow of a row of conn.log."""
    endpoints = [(ipaddress.ip_address(row[f"id.{side}_h"]).packed, row[f"id.{side}_p"].to_bytes(2, "big"))
                 for side in ("orig", "resp")]
    return FlowKey(PROTOCOLS[row["proto"]], *sorted(endpoints))


def table(output: str) -> list[dict[str, str]]:
    """The rows of a table that zeekctl printed, by the heading of their columns."""
    lines = output.splitlines()
    starts = [match.start() for match in re.finditer(r"(?<=  )\S|^\S", lines[0])]
    cells = [[line[start:end].strip() for start, end in zip(starts, [*starts[1:], None])] for line in lines]
    return [dict(zip(cells[0], row)) for row in cells[1:]]


def config_script(prefix: Path) -> str:
    """What the plugin adds to the generated Zeek script."""
    text = next(prefix.glob("spool/installed-scripts-do-not-touch/auto/zeekctl-config.zeek")).read_text()
    found = re.search("# Begin code from xdp_erm plugin\n(.*)\n# End code from xdp_erm plugin", text, re.DOTALL)
    return found[1] if found else ""
