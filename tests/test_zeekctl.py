"""The zeekctl plugin, on real clusters: attached before workers start, mended by cron, one table for all hosts."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filters
import other_program
import pytest
from cluster import PATIENCE, Cluster, Flow, config_script, decapsulated, key_of, mirrored_flows, nodes, section, table
from machine import ZEEK, Machine, copy_of_zeek, needs_zeek, package_repository, pid_within
from program import overstate

from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import Cable
from xdp_erm_py.lab.traffic import SESSIONS, synthetic
from xdp_erm_py.settings import DEFAULTS
from xdp_erm_py.shared import COUNTERS, ENCAPSULATIONS

pytestmark = [needs_zeek, pytest.mark.usefixtures("xdp")]

WORKERS = ["worker-1", "worker-2", "worker-3", "worker-4"]
PID_FILE = "/run/xdp-erm-publish.pid"
GONE = "while pgrep -f '[x]dp-erm.pyz publish'; do sleep 0.1; done"
FLOWS, PACKETS = 2000, 12_000
TRAFFIC = list(synthetic(flows=FLOWS, packets=PACKETS))


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Not pytest's, which would keep the copies of Zeek."""
    with tempfile.TemporaryDirectory(prefix="xdp-erm-test-") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    """One for all tests, which each begin with nothing running."""
    repository = package_repository(directory)
    with copy_of_zeek(directory) as prefix, Cable() as cable:
        with cable.sensor.entered():
            machine = Machine("sensor", prefix)
        with machine:
            machine.run("zkg", "autoconfig", "--force")
            machine.run("zkg", "install", "--force", "--skiptests", str(repository))
            yield Cluster(cable, machine)


@pytest.fixture
def stopped(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster
    cluster.zeekctl("stop", status=None)
    cluster.configure()
    cluster.zeekctl("xdp_erm.detach")
    assert (cluster.machine.shell("pgrep -x zeek || true"), cluster.status(), cluster.publisher()) == ("", [], None)


# A whole day

@pytest.mark.parametrize("backend", ["Broker", "ZeroMQ"])
def test_each_inner_flow_is_on_one_worker_and_everything_is_counted_once(stopped, backend):
    cluster = stopped
    cluster.configure(ClusterBackend=backend)
    said = cluster.zeekctl("deploy")
    assert re.search(rf"^starting \.\.\.\n127.0.0.1: {SENSOR}: turned off .*\n127.0.0.1: {SENSOR}: decapsulated "
                     rf"frames are kept .*\n127.0.0.1: {SENSOR}: attached \(native, program \d+\)\nstarting manager",
                     said, re.MULTILINE), said
    assert cluster.running() == ["manager", "proxy-1", *WORKERS]
    assert cluster.publisher()

    cluster.mirror(TRAFFIC)
    cluster.zeekctl("stop", "workers")
    assert cluster.publisher() is None
    connections = cluster.wait_for_rows("conn", lambda rows: len(rows) >= FLOWS)
    assert {key_of(row): Flow(row["orig_pkts"] + row["resp_pkts"], row["vlan"]) for row in connections} \
        == mirrored_flows(TRAFFIC)
    assert len(connections) == FLOWS  # a flow split over workers would have a row from each
    packets: collections.Counter[str] = collections.Counter()
    for row in connections:
        packets[row["worker"]] += row["orig_pkts"] + row["resp_pkts"]
    assert sorted(packets) == WORKERS
    assert all(0.2 * PACKETS <= number <= 0.3 * PACKETS for number in packets.values()), packets

    reports = cluster.wait_for_rows("xdp_erm", lambda rows: decapsulated(rows) >= PACKETS)
    assert decapsulated(reports) == PACKETS
    assert sum(row["decapsulated.bytes"] for row in reports) == sum(len(packet.sent) for packet in TRAFFIC)
    assert {(row["host"], row["interface"], row["mode"]) for row in reports} == {("sensor", SENSOR, "native")}
    assert len(reports) > 3
    for earlier, later in zip(reports, reports[1:]):
        assert later["ts"] - later["ts_delta"] == pytest.approx(earlier["ts"], abs=0.01)
    sessions = cluster.wait_for_rows("xdp_erm_sessions", lambda rows: sum(row["packets"] for row in rows) >= PACKETS)
    assert sum(row["packets"] for row in sessions) == PACKETS

    # Without it the fallback sees the same flows.
    cluster.configure(ClusterBackend=backend, xdp_erm_attach="0")
    said = cluster.zeekctl("deploy")
    assert f"127.0.0.1: {SENSOR}: detached" in said
    assert (cluster.status(), cluster.publisher()) == ([], None)
    cluster.mirror(TRAFFIC)
    cluster.zeekctl("stop", "workers")
    connections = cluster.wait_for_rows(
        "conn", lambda rows: sum(row["orig_pkts"] + row["resp_pkts"] for row in rows) >= PACKETS)
    seen: collections.Counter[Any] = collections.Counter()
    for row in connections:
        seen[key_of(row)] += row["orig_pkts"] + row["resp_pkts"]
    assert seen == {flow: counted.packets for flow, counted in mirrored_flows(TRAFFIC).items()}
    assert cluster.rows("xdp_erm") == []


def test_one_session_of_each_encapsulation(stopped):
    """Of each, as of any: all flows, once, on all workers, with their VLANs; none of the wrapping's."""
    cluster, flows, packets = stopped, 100, 400
    mirrors = {name: list(synthetic(flows, packets, 1, name, first=flows * number))
               for number, name in enumerate(ENCAPSULATIONS)}
    cluster.configure(xdp_erm_encapsulations=" ".join(mirrors))
    cluster.zeekctl("deploy")
    cluster.mirror(itertools.chain.from_iterable(zip(*mirrors.values())))
    cluster.zeekctl("stop", "workers")

    rows = collections.defaultdict(list)
    for row in cluster.wait_for_rows("conn", lambda rows: len(rows) >= flows * len(mirrors)):
        rows[key_of(row)].append(row)
    for name, traffic in mirrors.items():
        expected = mirrored_flows(traffic)
        found = {flow: rows.pop(flow, []) for flow in expected}
        assert {flow: [Flow(row["orig_pkts"] + row["resp_pkts"], row.get("vlan")) for row in seen]
                for flow, seen in found.items()} == {flow: [each] for flow, each in expected.items()}, name
        assert sorted({row["worker"] for row, in found.values()}) == WORKERS, name
    assert not rows

    reports = cluster.wait_for_rows("xdp_erm", lambda rows: decapsulated(rows) >= packets * len(mirrors))
    assert decapsulated(reports) == packets * len(mirrors)
    assert sum(row["decapsulated.bytes"] for row in reports) == sum(
        len(packet.sent) for traffic in mirrors.values() for packet in traffic)
    counted: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for row in cluster.wait_for_rows("xdp_erm_sessions", lambda rows: sum(row["packets"] for row in rows)
                                     >= packets * len(mirrors)):
        counted[row["encapsulation"], row["source"], row["id"]] += row["packets"]
    (session,) = SESSIONS[:1]
    assert counted == {(name, session.source, session.id): packets for name in mirrors}


def test_a_zeek_that_stands_alone(stopped):
    cluster = stopped
    cluster.configure(section("zeek", "standalone", interface=f"af_packet::{SENSOR}"))
    cluster.zeekctl("deploy")
    cluster.mirror(TRAFFIC[:500])
    reports = cluster.spool / "zeek" / "xdp_erm.log"
    deadline = time.monotonic() + PATIENCE
    while decapsulated(cluster.rows("xdp_erm", "zeek")) < 500 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert decapsulated(cluster.rows("xdp_erm", "zeek")) == 500, reports.read_text()
    assert f" {SENSOR}: sockets that capture from it: 1\n" in cluster.zeekctl("xdp_erm.doctor")


def test_rows_that_are_not_written_when_zeek_stops(stopped):
    """The reports of an hour are one row, which Zeek writes when it ends."""
    cluster = stopped
    cluster.configure(ZeekArgs="XDP_ERM::log_interval=1hr")

    def archived():
        logs = (cluster.prefix / "logs").glob("*/xdp_erm.*.log.gz")
        return [json.loads(row) for log in logs for row in gzip.decompress(log.read_bytes()).splitlines()]

    before = archived()
    for _ in range(2):
        cluster.zeekctl("deploy")
        cluster.mirror(TRAFFIC[:500])
        cluster.zeekctl("stop")
        deadline = time.monotonic() + PATIENCE
        while cluster.machine.run("pgrep", "-f", "post-terminate|archive-log|gzip", status=None):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    rows = archived()
    assert decapsulated(rows) == decapsulated(before) + 1000
    # Of each life the first report, which has a row at once, and all others.
    assert len(rows) <= len(before) + 4


# Starting, stopping and mending

def test_one_of_several_workers_stops_and_starts(stopped):
    cluster = stopped
    cluster.configure(xdp_erm_detach_on_stop="1")
    features = cluster.machine.shell(f"ethtool -k {SENSOR}")
    cluster.zeekctl("deploy")
    attached, publisher = cluster.status(), cluster.publisher()
    assert (len(attached), publisher is not None) == (1, True)
    cluster.zeekctl("stop", "worker-2")
    assert (cluster.status(), cluster.publisher()) == (attached, publisher)
    assert f"already attached (native, program {attached[0]['program_id']})" in cluster.zeekctl("start")
    assert (cluster.status(), cluster.publisher()) == (attached, publisher)
    said = cluster.zeekctl("stop", "workers")
    assert f"127.0.0.1: {SENSOR}: detached (program {attached[0]['program_id']})" in said
    assert (cluster.status(), cluster.publisher()) == ([], None)
    assert cluster.machine.shell(f"ethtool -k {SENSOR}") == features


def test_a_crashed_worker_is_not_the_last_to_stop(stopped):
    """cron starts it again, without the hooks that attach and start a publisher."""
    cluster = stopped
    cluster.configure(xdp_erm_detach_on_stop="1")
    cluster.zeekctl("deploy")
    attached, publisher = cluster.status(), cluster.publisher()
    cluster.machine.run("pkill", "-KILL", "-f", "zeek .*worker-1 ")
    assert re.search("^worker-1 .* crashed", cluster.zeekctl("status", status=None), re.MULTILINE)
    cluster.zeekctl("stop", "worker-2", "worker-3", "worker-4")
    assert (cluster.status(), cluster.publisher()) == (attached, publisher)
    cluster.zeekctl("cron")
    assert cluster.running() == ["manager", "proxy-1", "worker-1"]
    assert f"{SENSOR}: detached" in cluster.zeekctl("stop", "worker-1")
    assert (cluster.status(), cluster.publisher()) == ([], None)


def test_a_start_of_what_runs_brings_the_publisher_back(stopped):
    cluster = stopped
    cluster.zeekctl("deploy")
    before = cluster.publisher()
    cluster.machine.run("kill", "-KILL", str(before))
    cluster.zeekctl("start")
    assert cluster.publisher() not in (None, before)


def test_cron_mends_and_reports(stopped):
    cluster = stopped
    cluster.zeekctl("deploy")
    assert cluster.zeekctl("cron") == ""

    cluster.machine.run("ip", "link", "set", "dev", SENSOR, "xdp", "off")
    said = cluster.zeekctl("cron").splitlines()
    assert said[0] == f"127.0.0.1: {SENSOR}: xdp-erm was no longer attached, and is again:"
    assert f"127.0.0.1: {SENSOR}: attached (native, program {cluster.status()[0]['program_id']})" in said[1:]
    assert cluster.zeekctl("cron") == ""

    with cluster.cable.sensor.entered():
        filters.take_away(SENSOR)
    assert cluster.zeekctl("cron").splitlines() == [
        f"127.0.0.1: {SENSOR}: xdp-erm was no longer isolated, and is again:",
        f"127.0.0.1: {SENSOR}: decapsulated frames are kept from the host's own network stack",
        f"127.0.0.1: {SENSOR}: already attached (native, program {cluster.status()[0]['program_id']})"]
    assert (cluster.status()[0]["isolated"], cluster.zeekctl("cron")) == (True, "")

    for before, after in (("3500", "3000"), ("3000", "3500")):
        cluster.machine.run("ip", "link", "set", "dev", SENSOR, "mtu", after)
        assert cluster.zeekctl("cron").splitlines() == [
            f"127.0.0.1: {SENSOR}: xdp-erm was no longer attached as it has to be (its MTU was changed from {before} "
            f"to {after}), and is again:",
            f"127.0.0.1: {SENSOR}: swapped the program (native, program {cluster.status()[0]['program_id']})"]
    assert cluster.zeekctl("cron") == ""

    with cluster.cable.sensor.entered():
        overstate(SENSOR, "unmarked", 12)
    said = cluster.zeekctl("cron").splitlines()
    assert said[0] == f"127.0.0.1: {SENSOR}: xdp-erm was no longer decapsulating, and is again:"
    assert f"127.0.0.1: {SENSOR}: 12 frames could not be marked for isolation in native mode, and stayed wrapped: " \
        "using generic mode, which is slower" in said[1:]
    assert (cluster.status()[0]["mode"], cluster.zeekctl("cron")) == ("generic", "")

    before = cluster.publisher()
    cluster.machine.run("kill", "-KILL", str(before))
    assert cluster.zeekctl("cron") == "127.0.0.1: xdp-erm's publisher was no longer running, and is again\n"
    assert cluster.publisher() not in (None, before)
    cluster.mirror(TRAFFIC[:100])
    reports = cluster.wait_for_rows("xdp_erm", lambda rows: decapsulated(rows) >= 100)
    assert decapsulated(reports) == 100


def test_cron_reports_what_it_cannot_mend_once(stopped):
    cluster = stopped
    cluster.zeekctl("deploy")
    cluster.machine.run("ip", "link", "set", "dev", SENSOR, "xdp", "off")
    with cluster.cable.sensor.entered():
        program = other_program.attach(SENSOR, "native")
    said = cluster.zeekctl("cron")
    assert said.startswith(f"error: 127.0.0.1: {SENSOR}: xdp-erm is no longer attached: xdp-erm: {SENSOR}: another XDP "
                           f"program is attached (program {program}, ")
    assert cluster.zeekctl("cron") == ""
    cluster.machine.run("ip", "link", "set", "dev", SENSOR, "xdp", "off")
    assert "and is again" in cluster.zeekctl("cron")

    cluster.machine.shell(f"kill -KILL {cluster.publisher()}; rm {PID_FILE}; mkdir {PID_FILE}")
    assert cluster.zeekctl("cron") == (f"error: 127.0.0.1: xdp-erm's publisher does not start: xdp-erm: --pid-file "
                                       f"{PID_FILE}: Is a directory\n")
    assert cluster.zeekctl("cron") == ""
    cluster.machine.run("rmdir", PID_FILE)
    assert "publisher was no longer running, and is again" in cluster.zeekctl("cron")


def test_cron_leaves_alone_what_was_detached_or_is_not_to_be_watched(stopped):
    cluster = stopped
    cluster.zeekctl("deploy")
    cluster.zeekctl("xdp_erm.detach")
    assert (cluster.zeekctl("cron"), cluster.status()) == ("", [])
    cluster.zeekctl("xdp_erm.attach")
    cluster.machine.run("ip", "link", "set", "dev", SENSOR, "xdp", "off")
    cluster.zeekctl("cron", "--no-watch")
    assert cluster.status() == []
    cluster.zeekctl("cron", "disable")
    try:
        cluster.zeekctl("cron")
        assert cluster.status() == []
    finally:
        cluster.zeekctl("cron", "enable")
    cluster.zeekctl("cron")
    assert len(cluster.status()) == 1


def test_cron_attaches_before_it_starts_crashed_workers(stopped):
    """As after a reboot: neither workers nor programs are left."""
    cluster = stopped
    cluster.zeekctl("deploy")
    cluster.machine.shell("pkill -KILL -x zeek; pkill -KILL -f '[x]dp-erm.pyz'; sleep 0.5")
    cluster.machine.run("ip", "link", "set", "dev", SENSOR, "xdp", "off")
    said = cluster.zeekctl("cron")
    assert said.index("and is again:") < said.index("starting workers")
    assert cluster.running() == ["manager", "proxy-1", *WORKERS]
    cluster.mirror(TRAFFIC[:100])
    reports = cluster.wait_for_rows("xdp_erm", lambda rows: decapsulated(rows) >= 100)
    assert decapsulated(reports) == 100


# Failures

def test_workers_start_without_it_or_not_at_all(stopped):
    cluster = stopped
    with cluster.cable.sensor.entered():
        program = other_program.attach(SENSOR, "native")
    try:
        said = cluster.zeekctl("deploy")
        assert f"error: 127.0.0.1: xdp-erm: {SENSOR}: another XDP program is attached (program {program}, " in said
        assert (f"error: 127.0.0.1: {SENSOR}: xdp-erm is NOT attached: {', '.join(WORKERS)} start without it, "
                "and one of them gets the whole of each mirror session\n") in said
        assert cluster.running() == ["manager", "proxy-1", *WORKERS]

        cluster.configure(xdp_erm_on_failure="veto")
        cluster.zeekctl("install")
        cluster.zeekctl("stop", "worker-2")
        said = cluster.zeekctl("start")
        assert (f"error: 127.0.0.1: {SENSOR}: xdp-erm is NOT attached, so {', '.join(WORKERS)} must not start "
                "(xdp_erm.on_failure)\n") in said
        assert cluster.running() == ["manager", "proxy-1", "worker-1", "worker-3", "worker-4"]
    finally:
        cluster.machine.run("ip", "link", "set", "dev", SENSOR, "xdp", "off")
    cluster.zeekctl("start")
    assert cluster.running() == ["manager", "proxy-1", *WORKERS]
    assert len(cluster.status()) == 1


def test_no_failure_of_ours_stops_zeekctl(stopped):
    cluster = stopped
    plugin = next((cluster.prefix / "lib").glob("zeek/plugins/packages/xdp-erm/xdp_erm_zeekctl.py"))
    sound = plugin.read_text()
    try:
        line = "        outcomes = {node.name: Outcome(success"
        assert line in sound
        plugin.write_text(sound.replace(line, f"        raise RuntimeError('broken')\n{line}"))
        for words in (["deploy"], ["cron"], ["status"], ["stop"]):
            said = cluster.zeekctl(*words)
            assert "Traceback" not in said
            assert ("xdp_erm" in said) == (words != ["status"])
            if words == ["deploy"]:
                assert ("error: xdp_erm: cmd_start_pre failed, zeekctl goes on without it: RuntimeError('broken')\n"
                        "starting manager") in said
                assert cluster.running() == ["manager", "proxy-1", *WORKERS]
        said = cluster.zeekctl("xdp_erm.status", status=1)
        assert said == "error: xdp_erm: _custom failed, zeekctl goes on without it: RuntimeError('broken')\n"
    finally:
        plugin.write_text(sound)


# Configuration

@pytest.mark.parametrize("options, keys, message", [
    ({"attach": "maybe"}, {}, "zeekctl.cfg: xdp_erm.attach = maybe: is neither 0 nor 1"),
    ({}, {"attach": "2"}, "worker-1: xdp_erm.attach = 2: is neither 0 nor 1"),
    ({"on_failure": "panic"}, {}, "zeekctl.cfg: xdp_erm.on_failure = panic: is none of fallback, veto"),
    ({"transport": "pigeon"}, {}, "zeekctl.cfg: xdp_erm.transport = pigeon: is none of auto, websocket, broker"),
    ({"interval": "0"}, {}, "zeekctl.cfg: xdp_erm.interval = 0: is not a number of seconds from 1 to 3600"),
    ({"interval": "1.5"}, {}, "zeekctl.cfg: xdp_erm.interval = 1.5: is not a whole number"),
    ({"spread_queue": "many"}, {}, "zeekctl.cfg: xdp_erm.spread_queue = many: is not a whole number"),
    ({}, {"depth": "one"}, "worker-1: xdp_erm.depth = one: is not a whole number"),
    ({}, {"sessions": "off"}, "worker-1: xdp_erm.sessions = off: is neither 0 nor 1"),
    ({"helper": "xdp-erm"}, {}, "zeekctl.cfg: xdp_erm.helper = xdp-erm: is not an absolute path"),
    ({"websocket_port": "0"}, {}, "zeekctl.cfg: xdp_erm.websocket_port = 0: is not a TCP port (1 to 65535)"),
    ({"config": "xdp-erm.yaml"}, {}, "zeekctl.cfg: xdp_erm.config = xdp-erm.yaml: is not an absolute path"),
    ({"vlan": "keep"}, {}, "worker-1: xdp_erm.vlan: 'keep' is none of restore, tagged, strip"),
    ({}, {"port": "7932, 0"}, "worker-1: xdp_erm.port: 0 is not a UDP port (1 to 65535)"),
    ({}, {"depth": "4"}, "worker-1: xdp_erm.depth: 4 is not a depth (1 to 3)"),
    ({"mode": "fast"}, {}, "worker-1: xdp_erm.mode: 'fast' is none of auto, native, generic"),
    ({"sources": "192.0.2.1/24"}, {}, "worker-1: xdp_erm.sources: '192.0.2.1/24' is not a prefix like "
                                      "192.0.2.0/24 or 2001:db8::/32: 192.0.2.1/24 has host bits set"),
    ({"targets": "192.0.2.7; touch /run/owned"}, {}, "worker-1: xdp_erm.targets: '192.0.2.7;' is not an address "
                                                     "like 192.0.2.7 or 2001:db8::7"),
])
def test_wrong_values_are_refused_before_anything_changes(cluster, options, keys, message):
    installed = f"find {ZEEK}/spool/installed-scripts-do-not-touch -printf '%p %T@\\n'"
    before = cluster.machine.shell(installed, status=None)
    try:
        cluster.configure(nodes(**{f"xdp_erm_{name}": value for name, value in keys.items()}),
                          **{f"xdp_erm_{name}": value for name, value in options.items()})
        said = cluster.zeekctl("install", status=1)
        assert f"error: {message}\n" in said
        assert said.endswith("error: xdp_erm: not installed: correct this in zeekctl.cfg or node.cfg first\n")
        assert cluster.machine.shell(installed, status=None) == before
        cluster.machine.run("test", "!", "-e", "/run/owned")
    finally:
        cluster.configure()


def test_a_wrong_value_stops_a_deploy_before_zeek_is_stopped(stopped):
    cluster = stopped
    cluster.zeekctl("deploy")
    running = cluster.machine.run("pgrep", "-x", "zeek")
    cluster.configure(xdp_erm_depth="4")
    said = cluster.zeekctl("deploy", status=1)
    assert "stopping" not in said
    assert said.endswith("error: worker-1: xdp_erm.depth: 4 is not a depth (1 to 3)\n"
                         "error: xdp_erm: not installed: correct this in zeekctl.cfg or node.cfg first\n")
    assert cluster.machine.run("pgrep", "-x", "zeek") == running

    # Nor is it taken for an order to detach.
    attached = cluster.status()
    cluster.configure(xdp_erm_attach="maybe")
    assert ("error: xdp_erm: neither attached nor detached anything: correct zeekctl.cfg or node.cfg first\n"
            in cluster.zeekctl("start"))
    assert cluster.status() == attached


@pytest.mark.parametrize("helper, reason", [
    ("#!/bin/sh\necho xdp-erm: a module is missing >&2; exit 1\n", "xdp-erm: a module is missing"),
    ("#!/nowhere/python3\n", "xdp-erm.pyz, which needs /usr/bin/python3, does not run here: No such file or directory"),
])
def test_a_manager_that_cannot_check_the_settings_says_so_once(cluster, helper, reason):
    """Only workers' hosts need what the helper needs."""
    file = next((cluster.prefix / "lib").glob("zeek/plugins/packages/xdp-erm/xdp-erm.pyz"))
    sound = file.read_bytes()
    cluster.configure(nodes() + section("more", "worker", interface="af_packet::mon9"))
    try:
        file.write_text(helper)
        said = cluster.zeekctl("install")
        line, = (line for line in said.splitlines() if "xdp" in line)
        assert line.startswith("error: xdp_erm: settings are not checked here, only where they are used: ")
        assert line.endswith(reason)
    finally:
        file.write_bytes(sound)
        cluster.configure()


def test_an_unknown_option_is_named(cluster):
    cluster.configure(xdp_erm_atach="0")
    assert cluster.zeekctl("install", status=1).startswith(
        "error: xdp_erm.atach: there is no such option (there are: attach, config, on_failure, ")


def test_the_port_of_zeekctls_own_server_is_left_to_it(cluster):
    cluster.configure(UseWebSocket="1", xdp_erm_websocket_port="27759")
    assert ("error: zeekctl.cfg: xdp_erm.websocket_port = 27759: is the port of zeekctl's own server (WebSocketPort)\n"
            in cluster.zeekctl("install", status=1))


def test_workers_of_one_interface_agree(cluster):
    one = {"interface": f"af_packet::{SENSOR}"}
    cluster.configure(section("manager", "manager") + section("proxy-1", "proxy") + section("a", "worker", **one)
                      + section("b", "worker", **one, **{"xdp_erm.vlan": "strip"}))
    assert (f"error: b: xdp_erm.vlan = strip: differs from a's, which captures from the same 127.0.0.1: {SENSOR}\n"
            in cluster.zeekctl("install", status=1))


def test_only_af_packet(stopped):
    cluster = stopped
    workers = section("manager", "manager") + section("proxy-1", "proxy") + section("a", "worker", interface=SENSOR)
    cluster.configure(workers)
    assert "attached" not in cluster.zeekctl("deploy")
    assert cluster.status() == []
    assert cluster.zeekctl("xdp_erm.status", status=1) == (
        "Error: none of these nodes captures with AF_PACKET (interface=af_packet::...)\n")
    cluster.configure(workers + "xdp_erm.attach=1\n")
    assert (f"error: a: xdp_erm.attach = 1: its interface {SENSOR} is not captured from with AF_PACKET "
            "(af_packet::...)\n" in cluster.zeekctl("install", status=1))


def test_an_alternative_name_of_the_interface(stopped):
    cluster = stopped
    cluster.machine.run("ip", "link", "property", "add", "dev", SENSOR, "altname", "mirror0")
    try:
        cluster.configure(nodes().replace(f"interface={SENSOR}", "interface=mirror0"))
        assert f"127.0.0.1: {SENSOR}: attached (native, program " in cluster.zeekctl("deploy")
        assert [found["name"] for found in cluster.status()] == [SENSOR]
        assert re.search(r"^\s*127\.0\.0\.1 +mirror0 +native +\d+ ", cluster.zeekctl("xdp_erm.status"), re.MULTILINE)
        assert "mirror0" in cluster.zeekctl("xdp_erm.stats")
        assert cluster.zeekctl("cron") == ""
        assert f"127.0.0.1: {SENSOR}: detached (" in cluster.zeekctl("xdp_erm.detach")
    finally:
        cluster.zeekctl("stop")
        cluster.machine.run("ip", "link", "property", "del", "dev", SENSOR, "altname", "mirror0")


def test_two_interfaces_need_two_fanout_ids(stopped):
    cluster = stopped
    cluster.machine.shell("ip link add mon9 up type veth peer name peer9; ip link set peer9 up")
    try:
        more = nodes() + section("more", "worker", interface="mon9", lb_method="af_packet", lb_procs="1")
        warning = f"127.0.0.1: warning  host: workers of {SENSOR}, mon9 have one AF_PACKET fanout id (23), so that "
        cluster.configure(more)
        cluster.zeekctl("deploy", status=None)
        running = cluster.running()  # whichever interface came first
        assert running in (["manager", "proxy-1", *WORKERS], ["manager", "proxy-1", "more-1"])
        refused = WORKERS[0] if "more-1" in running else "more-1"
        assert "Invalid argument" in cluster.zeekctl("diag", refused, status=None)
        assert cluster.zeekctl("xdp_erm.doctor", status=None).count(warning) == 1

        cluster.configure(more + "af_packet_fanout_id=24\n")
        cluster.zeekctl("deploy")
        assert cluster.running() == ["manager", "proxy-1", *WORKERS, "more-1"]
        assert "fanout id" not in cluster.zeekctl("xdp_erm.doctor", status=None)
    finally:
        cluster.zeekctl("stop", status=None)
        cluster.machine.run("ip", "link", "delete", "mon9")


def test_settings_get_to_the_program_and_to_the_scripts(stopped):
    """Those of a node before those for all, those of a file on the host below both; quoted, whatever is in them."""
    cluster = stopped
    cluster.machine.shell("printf 'defaults: {depth: 2, vlan: tagged}\\n' >\"/run/it's here; touch x.yaml\"")
    cluster.configure(nodes(xdp_erm_vlan="strip", xdp_erm_sessions="0", xdp_erm_isolate="0", pin_cpus="0"),
                      xdp_erm_spread="auto", xdp_erm_spread_queue="64", xdp_erm_spread_ports="1",
                      xdp_erm_port="7933, 7932 7934", xdp_erm_vlan="restore",
                      xdp_erm_encapsulations="vxlan, erspan erm", xdp_erm_vxlan_port="8472 4789",
                      xdp_erm_sources="198.51.100.0/24", xdp_erm_interval="60",
                      xdp_erm_config="/run/it's here; touch x.yaml", xdp_erm_publish="0")
    cluster.zeekctl("deploy")
    assert cluster.status()[0]["config"] == {
        **DEFAULTS, "encapsulations": ["erm", "erspan", "vxlan"], "port": [7932, 7933, 7934],
        "vxlan_port": [4789, 8472], "vlan": "strip", "depth": 2, "sources": ["198.51.100.0/24"], "sessions": False,
        "isolate": False, "spread": "auto", "spread_avoid": [0], "spread_queue": 64, "spread_ports": True}
    assert 0 not in cluster.status()[0]["spread"]["cpus"]
    assert cluster.publisher() is None
    assert config_script(cluster.prefix) == (
        "@ifdef ( XDP_ERM::ports )\n"
        "redef XDP_ERM::ports = { 7932/udp, 7933/udp, 7934/udp };\n"
        "redef XDP_ERM::vxlan_ports = { 4789/udp, 8472/udp };\n"
        "redef XDP_ERM::gre = T;\n"
        "redef XDP_ERM::websocket_port = 27758/tcp;\n"
        "redef XDP_ERM::publisher_silence = 180 secs;\n"
        "@endif")
    # A swap, at the next start.
    cluster.configure(nodes(xdp_erm_attach="1"), xdp_erm_attach="0")
    cluster.zeekctl("deploy")
    assert cluster.status()[0]["config"]["port"] == [7932]


def test_everything_that_needs_root_has_the_prefix(stopped):
    cluster = stopped
    cluster.machine.shell("printf '#!/bin/sh\\necho \"$@\" >>/run/log\\nexec \"$@\"\\n' >/run/bin/as-root && "
                          "chmod +x /run/bin/as-root")
    cluster.configure(xdp_erm_command_prefix="as-root -n", ClusterBackend="Broker")
    cluster.machine.shell("sed -i '2i [ \"$1\" = -n ] && shift' /run/bin/as-root")
    cluster.zeekctl("deploy")
    cluster.zeekctl("xdp_erm.status")
    cluster.zeekctl("xdp_erm.stats")
    publisher = cluster.publisher()
    said = cluster.zeekctl("stop")
    cluster.zeekctl("xdp_erm.detach")
    done = [re.sub(r"\S*/xdp-erm.pyz", "xdp-erm", line) for line in cluster.machine.shell("cat /run/log").splitlines()]
    looks = done.count("xdp-erm publish --running")
    assert looks >= 3
    assert [line for line in done if line != "xdp-erm publish --running"] == [
        f"xdp-erm attach -- {SENSOR}",
        "xdp-erm publish --interval=1 --transport=auto --websocket=127.0.0.1:27758 --peer=127.0.0.1:27761",
        "xdp-erm status --json",
        f"xdp-erm stats --json -- {SENSOR}",
        "xdp-erm publish --stop",
        f"xdp-erm detach -- {SENSOR}",
    ]
    assert f"the publisher (process {publisher}) has ended" in said


def test_a_helper_that_is_roots_own(stopped):
    """Nothing but it is run as root, and what does not go with the package is said."""
    cluster, helper = stopped, "/run/root's/xdp-erm"
    package = f"{ZEEK}/lib/zeek/plugins/packages/xdp-erm/xdp-erm.pyz"
    cluster.machine.shell("mkdir \"/run/root's\"; printf '#!/bin/sh\\necho \"$@\" >>/run/log2\\nexec \"$@\"\\n' "
                          ">/run/bin/as-root && chmod +x /run/bin/as-root")
    cluster.configure(xdp_erm_command_prefix="as-root", xdp_erm_helper=helper)
    said = cluster.zeekctl("start")
    assert re.search(rf"error: 127.0.0.1: {helper} should be xdp-erm [\d.]+, as this package is \(.*not found\): run "
                     rf"there, as root, `install -m 755 {re.escape(package)} .*`\n", said), said
    cure = re.search("as root, `(.*)`\n", said)[1]
    cluster.zeekctl("stop")

    cluster.machine.shell(cure)
    said = cluster.zeekctl("start")
    assert "should be" not in said and "attached (native" in said
    assert cluster.machine.shell(f'stat -c %U:%a "{helper}"') == "root:755\n"
    assert cluster.publisher(helper)
    cluster.zeekctl("stop")
    assert {line.partition("xdp-erm ")[0] for line in cluster.machine.shell("cat /run/log2").splitlines()} == {
        "/run/root's/"}

    # The package goes on, the copy stays.
    cluster.machine.shell(f'mv "{helper}" "{helper}.new" && printf \'#!/bin/sh\\n[ "$1" = --version ] && '
                          f'echo xdp-erm 0.0.1 || exec "$0.new" "$@"\\n\' >"{helper}" && chmod +x "{helper}"')
    said = cluster.zeekctl("xdp_erm.doctor", status=None)
    assert f"Error: 127.0.0.1: {helper} should be xdp-erm " in said
    assert "as this package is (xdp-erm 0.0.1): run" in said


def test_what_is_complained_of_beside_an_answer(stopped):
    """As by sudo on a host that cannot resolve its own name, or by a shell for which there is no such locale."""
    cluster = stopped
    cluster.machine.shell("printf '#!/bin/sh\\necho unable to resolve host >&2\\n"
                          f"exec {ZEEK}/lib/zeek/plugins/packages/xdp-erm/xdp-erm.pyz \"$@\"\\n' >/run/complains && "
                          "chmod +x /run/complains")
    cluster.configure(xdp_erm_helper="/run/complains")
    assert "should be" not in cluster.zeekctl("deploy")
    assert cluster.publisher()
    assert [row["Publisher"] for row in table(cluster.zeekctl("xdp_erm.status"))] == ["running"]
    assert [row["decapsulated"] for row in table(cluster.zeekctl("xdp_erm.stats"))] == ["0"]
    cluster.machine.run("ip", "link", "set", "dev", SENSOR, "xdp", "off")
    assert f"{SENSOR}: xdp-erm was no longer attached, and is again:" in cluster.zeekctl("cron")
    cluster.zeekctl("stop")
    assert cluster.publisher() is None


def test_an_interface_that_is_gone_is_forgotten(stopped):
    cluster = stopped
    cluster.machine.shell("ip link add mon9 up type veth peer name peer9")
    cluster.configure(nodes() + section("more", "worker", interface="af_packet::mon9"))
    cluster.zeekctl("xdp_erm.attach")
    assert {interface["name"] for interface in cluster.status()} == {SENSOR, "mon9"}
    cluster.machine.run("ip", "link", "delete", "mon9")
    cluster.configure()
    said = cluster.zeekctl("deploy")
    assert said.count("mon9") == 2 and (
        "127.0.0.1: mon9: nothing is left to detach: xdp-erm: mon9: no such interface") in said
    assert "mon9" not in cluster.zeekctl("deploy")


def test_somebody_elses_publisher_is_left_alone(stopped):
    cluster = stopped
    helper = f"{ZEEK}/lib/zeek/plugins/packages/xdp-erm/xdp-erm.pyz"
    cluster.machine.shell(f"setsid {helper} publish --interval=1 </dev/null >/run/publish.log 2>&1 & sleep 1")
    theirs = cluster.publisher()
    assert theirs
    cluster.zeekctl("deploy")
    assert cluster.publisher() == theirs
    cluster.zeekctl("stop")
    assert cluster.publisher() == theirs
    cluster.machine.shell(f"kill {theirs}; {GONE}")
    # Ours ended, and that of the systemd unit took its place.
    cluster.zeekctl("start")
    units = cluster.publisher()
    cluster.machine.shell("echo 0::/system.slice/xdp-erm-publish.service >/run/cgroup; "
                          f"mount --bind /run/cgroup /proc/{units}/cgroup")
    assert (f"127.0.0.1: the publisher (process {units}) is left to systemd: `systemctl stop xdp-erm-publish.service` "
            "stops it\n") in cluster.zeekctl("stop")
    assert cluster.publisher() == units
    cluster.machine.shell(f"umount /proc/{units}/cgroup; kill {units}; {GONE}")


# Commands, and a second host

def test_commands_by_node(stopped):
    cluster = stopped
    cluster.zeekctl("install")
    assert cluster.zeekctl("xdp_erm.status", "worker-9", status=1) == "Error: unknown node: worker-9\n"
    assert table(cluster.zeekctl("xdp_erm.status", status=1)) == [
        {"Host": "127.0.0.1", "Interface": SENSOR, "XDP": "off", "Program": "-", "Attached since": "-",
         "Publisher": "off", "Workers": " ".join(WORKERS)}]
    assert cluster.zeekctl("xdp_erm.stats", status=1) == (
        f"Error: 127.0.0.1: xdp-erm: {SENSOR}: xdp-erm is not attached; `xdp-erm attach {SENSOR}` does it\n")
    said = cluster.zeekctl("xdp_erm.doctor", status=1)
    assert f"\n127.0.0.1: problem  {SENSOR}: xdp-erm is not attached: `xdp-erm attach {SENSOR}`\n" in said
    assert said.splitlines()[-1].startswith("Attach by `zeekctl xdp_erm.attach` (")
    cluster.zeekctl("xdp_erm.attach", "worker-1")
    said = cluster.zeekctl("xdp_erm.doctor")
    assert "Attach by" not in said
    assert said.startswith("127.0.0.1: ok       host: Linux ")
    assert said.count(f" {SENSOR}: xdp-erm is attached (native, program ") == 1  # for all its workers
    cluster.send(TRAFFIC[:100])
    row, = table(cluster.zeekctl("xdp_erm.stats", "worker-3"))
    assert (row["Host"], row["Interface"], row["decapsulated"]) == ("127.0.0.1", SENSOR, "100")
    assert set(row) == {"Host", "Interface", *COUNTERS}
    row, = table(cluster.zeekctl("xdp_erm.status"))
    attached, = cluster.status()
    assert (row["XDP"], row["Program"], row["Attached since"]) == (
        "native", str(attached["program_id"]), attached["attached_at"])


def test_doctor_reads_the_files_that_count(stopped):
    cluster = stopped
    cluster.machine.shell("echo 'defaults: {depth: 9}' >/run/more.yaml; "
                          "ip link add mon9 up type veth peer name peer9; ip link set peer9 up")
    try:
        cluster.configure(nodes() + section("more", "worker", interface="af_packet::mon9",
                                            **{"xdp_erm.config": "/run/more.yaml"}), xdp_erm_config="/run/none.yaml")
        said = cluster.zeekctl("xdp_erm.doctor", status=1)
        assert [line for line in said.splitlines() if ".yaml" in line] == [
            "127.0.0.1: problem  host: /run/none.yaml: no such file",
            "127.0.0.1: problem  host: /run/more.yaml:1: depth: 9 is not a depth (1 to 3)"]
        assert [said.count(f"{name}: xdp-erm is not attached") for name in (SENSOR, "mon9")] == [1, 1]
    finally:
        cluster.machine.run("ip", "link", "delete", "mon9")


SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
[ "$1" = 10.9.0.2 ] && shift
exec nsenter --target={pid} --mount --net --uts --pid -- sh -c "$*"
"""


def test_second_host(stopped, directory):
    """It has only what zeekctl's rsync brings, over a stand-in for ssh that enters its namespaces."""
    if not shutil.which("rsync"):
        pytest.skip("no rsync, with which zeekctl copies to other hosts")
    cluster, first = stopped, stopped.machine
    prefix = directory / "second"
    prefix.mkdir()
    with Cable() as cable:
        with cable.sensor.entered():
            second = Machine("second", prefix, inside=first)
        with second:
            pid = pid_within(first, second.pid)
            first.shell(f"cat >/run/bin/ssh <<'END'\n{SSH.format(pid=pid)}END\nchmod +x /run/bin/ssh\n"
                        f"ip link add between type veth peer name between netns {pid}\n"
                        "ip address add 10.9.0.1/24 dev between; ip link set between up")
            second.shell("ip address add 10.9.0.2/24 dev between; ip link set between up")
            workers = {"interface": SENSOR, "lb_method": "af_packet", "lb_procs": "2"}
            cluster.configure(
                section("manager", "manager", "10.9.0.1") + section("proxy-1", "proxy", "10.9.0.1")
                + section("near", "worker", "10.9.0.1", **workers) + section("far", "worker", "10.9.0.2", **workers),
                ClusterBackend="Broker", xdp_erm_transport="broker")
            said = cluster.zeekctl("deploy")
            assert all(f"10.9.0.{host}: {SENSOR}: attached (native, program " in said for host in (1, 2))
            assert cluster.running() == ["manager", "proxy-1", "near-1", "near-2", "far-1", "far-2"]
            assert [(row["Host"], row["Interface"], row["XDP"], row["Publisher"], row["Workers"])
                    for row in table(cluster.zeekctl("xdp_erm.status"))] == [
                ("10.9.0.1", SENSOR, "native", "running", "near-1 near-2"),
                ("10.9.0.2", SENSOR, "native", "running", "far-1 far-2")]

            for packet in TRAFFIC[:200]:
                cable.send(packet.sent)
            cluster.mirror(TRAFFIC[:100])
            assert [(row["Host"], row["decapsulated"]) for row in table(cluster.zeekctl("xdp_erm.stats"))] == [
                ("10.9.0.1", "100"), ("10.9.0.2", "200")]
            reports = cluster.wait_for_rows("xdp_erm", lambda rows: decapsulated(rows) >= 300)
            assert {host: decapsulated([row for row in reports if row["host"] == host])
                    for host in ("sensor", "second")} == {"sensor": 100, "second": 200}

            second.shell(f"ip link set dev {SENSOR} xdp off")
            assert cluster.zeekctl("cron").startswith(
                f"10.9.0.2: {SENSOR}: xdp-erm was no longer attached, and is again:\n")
            cluster.zeekctl("stop", "far-1", "far-2")
            assert [row["Publisher"] for row in table(cluster.zeekctl("xdp_erm.status"))] == ["running", "off"]
            cluster.zeekctl("stop")
            cluster.zeekctl("xdp_erm.detach")

        # The second host is down.
        said = cluster.zeekctl("xdp_erm.status", status=1)
        complaint, _, shown = said.partition("Host ")
        assert "Error: 10.9.0.2: Failed to establish ssh connection to host 10.9.0.2" in complaint
        assert [(row["Host"], row["XDP"]) for row in table("Host " + shown)] == [
            ("10.9.0.1", "off"), ("10.9.0.2", "unknown")]
