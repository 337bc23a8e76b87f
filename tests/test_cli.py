"""The command as its users meet it: exit status, what it prints, and one line for whatever goes wrong."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import operator
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shell import shell

from xdp_erm_py import __version__, lab, shared
from xdp_erm_py.interface import loader, stats
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.fanout import FanoutWorkers
from xdp_erm_py.lab.traffic import SESSIONS, synthetic
from xdp_erm_py.program import cache
from xdp_erm_py.publish.reports import seconds
from xdp_erm_py.settings import InterfaceConfig

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(REPOSITORY / "bin" / "xdp-erm")]
TIMEOUT = 60  # seconds

UTC_SECONDS = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
NOT_ATTACHED = "xdp-erm is not attached to any interface of this network namespace\n"


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Runs the command. That it waits, for another xdp-erm on the machine, is no part of what it has to say."""
    done = subprocess.run([*options.pop("prefix", []), *COMMAND, *arguments], capture_output=True, text=True,
                          timeout=TIMEOUT, check=False, **options)
    done.stderr = done.stderr.replace("waiting for another xdp-erm to finish\n", "")
    return done


def outcome(*arguments: str, **options) -> tuple[int, str, str]:
    done = run(*arguments, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def attached(cable):
    """The cable, with xdp-erm at its sensor's end; gives the program's id."""
    loader.attach(SENSOR, InterfaceConfig())
    cable.wait_for_carrier()
    with Links() as links:
        return links.find(SENSOR).program_id


def mirror(cable, count: int) -> int:
    """Sends that many ERM packets; returns their bytes."""
    packets = list(synthetic(flows=20, packets=count))
    with FanoutWorkers(cable, 1, operator.attrgetter("mirrored")) as workers:
        lab.mirror(cable, packets, workers)
        assert workers.finish().identical == count
    return sum(len(packet.sent) for packet in packets)


# Doing what it should

@pytest.mark.check
def test_attach_and_detach(cable):
    done = run("attach", SENSOR)
    assert (done.returncode, done.stderr) == (0, "")
    with Links() as links:
        link = links.find(SENSOR)
    assert done.stdout.splitlines()[-1] == f"{SENSOR}: attached (native, program {link.program_id})"
    done = run("detach")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{SENSOR}: detached (program {link.program_id})"
    assert outcome("detach") == (0, NOT_ATTACHED, "")
    assert outcome("detach", SENSOR) == (0, f"{SENSOR}: xdp-erm is not attached\n", "")


def test_attach_takes_interfaces_and_settings_from_the_file(cable, tmp_path):
    file = tmp_path / "erm.yaml"
    file.write_text(f"interfaces: {{{SENSOR}: {{vlan: strip, mode: generic, depth: 1}}}}")
    assert run("attach", "--config", str(file), "--depth", "2", "--source", "10.0.0.0/8").returncode == 0
    interface, = json.loads(run("status", "--json").stdout)["interfaces"]
    assert (interface["name"], interface["mode"]) == (SENSOR, "generic")
    assert interface["config"] == InterfaceConfig(vlan="strip", mode="generic", depth=2,
                                                  sources=("10.0.0.0/8",)).as_dict()


def test_one_that_fails_does_not_keep_the_others_from_being_done(cable):
    status, output, errors = outcome("attach", "nowhere0", SENSOR)
    assert (status, errors) == (
        1, "xdp-erm: nowhere0: no such interface in this network namespace; `ip link` lists them\n")
    assert f"{SENSOR}: attached (native" in output


def test_json(cable, attached):
    octets = mirror(cable, 100)
    interface, = json.loads(run("stats", "--json").stdout)["interfaces"]
    assert list(interface) == [
        "name", "other_names", "ifindex", "mode", "program_id", "id", "attached_at", "since_boot", "config", "spread",
        "counters", "sessions", "foreign", "cpus", "isolation"]
    with Links() as links:
        assert interface["ifindex"] == links.find(SENSOR).index
    assert (interface["name"], interface["mode"], interface["program_id"]) == (SENSOR, "native", attached)
    assert re.fullmatch(UTC_SECONDS, interface["attached_at"])
    # The same moment; that of day is cut to seconds.
    attached_at = time.clock_gettime(time.CLOCK_BOOTTIME) - time.time() + seconds(interface["attached_at"])
    assert 0 <= interface["since_boot"] - attached_at < 1.1
    assert interface["config"] == InterfaceConfig().as_dict()
    assert interface["spread"] == {"how": "none", "cpus": [], "reason": "as configured"}
    assert (interface["cpus"], interface["foreign"]) == ({}, [])
    zero = {"packets": 0, "bytes": 0}
    assert interface["counters"] == {**dict.fromkeys(shared.COUNTERS, zero),
                                     "decapsulated": {"packets": 100, "bytes": octets}}
    assert list(interface["counters"]) == list(shared.COUNTERS)
    assert {(session["source"], session["id"], "erm") for session in interface["sessions"]} == set(SESSIONS)
    for session in interface["sessions"]:
        assert list(session) == ["source", "id", "encapsulation", "packets", "bytes", "last_seen", "gaps", "reordered"]
        assert re.fullmatch(UTC_SECONDS.replace("Z", r"\.\d{3}Z"), session["last_seen"])
    assert sum(session["bytes"] for session in interface["sessions"]) == octets
    assert json.loads(run("stats", SENSOR, "--json").stdout)["interfaces"] == [interface]
    # Status is the same without what is counted, but looks at the filter.
    for key in ("counters", "sessions", "foreign", "cpus", "isolation"):
        del interface[key]
    assert json.loads(run("status", "--json").stdout) == {"interfaces": [{
        **interface, "isolated": True, "isolated_by": "tcx" if bpf.tcx(1) else "clsact", "isolated_after": [],
        "leaked": 0, "unmarked": 0, "scattered": 0, "unseen": 0, "outdated": None}]}


@pytest.fixture
def foreign(cable):
    """The cable, and at its end xdp-erm with an allow list, after 25 senders that are not on it: 10.0.0.N sent N."""
    loader.attach(SENSOR, InterfaceConfig(sources=("192.0.2.0/24",)))
    cable.wait_for_carrier()
    packet = next(iter(synthetic(flows=1, packets=1))).sent
    for number in range(1, 26):
        for _ in range(number):
            cable.send(packet[:26] + bytes([10, 0, 0, number]) + packet[30:])
    deadline = time.monotonic() + TIMEOUT
    while stats.snapshot(SENSOR)[0]["counters"]["foreign_source"]["packets"] < 25 * 26 // 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return len(packet)


def test_json_of_foreign_senders(foreign):
    """All of them, the one with most packets first; a swap does not forget them."""
    def senders():
        return json.loads(run("stats", "--json").stdout)["interfaces"][0]["foreign"]

    found = senders()
    assert [(sender["source"], sender["packets"], sender["bytes"]) for sender in found] == [
        (f"10.0.0.{number}", number, number * foreign) for number in range(25, 0, -1)]
    for sender in found:
        assert list(sender) == ["source", "packets", "bytes", "last_seen"]
        assert re.fullmatch(UTC_SECONDS.replace("Z", r"\.\d{3}Z"), sender["last_seen"])
    loader.attach(SENSOR, InterfaceConfig(sources=("192.0.2.0/25",), targets=("192.0.2.1",)))
    assert [sender["packets"] for sender in senders()] == list(range(25, 0, -1))
    loader.attach(SENSOR, InterfaceConfig())
    assert senders() == []


def test_table_of_foreign_senders(foreign):
    """Ten of them: a flood of made-up ones must not hide everything else."""
    lines = run("stats").stdout.splitlines()
    heading = next(number for number, line in enumerate(lines) if line.startswith("foreign sender"))
    assert [line.split()[:3] for line in lines[heading + 1:heading + 11]] == [
        [f"10.0.0.{number}", str(number), f"{number * foreign:,}"] for number in range(25, 15, -1)]
    assert lines[heading + 11:] == [f"and 15 more: xdp-erm stats {SENSOR} --json", ""]
    with watching() as process:
        assert process.stdout.readline().endswith(" 0 sessions 25 foreign senders\n")


def test_json_of_nothing(cable):
    assert outcome("status", "--json") == (0, '{"interfaces": []}\n', "")
    assert outcome("stats", "--json") == (0, '{"interfaces": []}\n', "")


@pytest.mark.check
def test_tables(cable, attached):
    octets = mirror(cable, 1000)
    heading, row = run("status").stdout.splitlines()
    assert heading.split() == ["interface", "mode", "program", "isolated", "spread", "since", "configuration"]
    assert re.fullmatch(rf"{SENSOR} +native +{attached} +yes +none +{UTC_SECONDS} +encapsulations=erm port=7932 "
                        "vlan=restore depth=1 mode=auto sessions=on isolate=on", row.rstrip())
    rows = {line.split()[0]: line.split()[1:] for line in run("stats").stdout.splitlines() if line.strip()}
    assert rows["verdict"] == ["packets", "bytes", "share"]
    assert rows["decapsulated"] == ["1,000", f"{octets:,}", "100.0%"]
    assert rows["other"] == ["0", "0", "0.0%"]
    assert {f"{session.source}:{session.id}" for session in SESSIONS} <= set(rows)


def test_tables_of_nothing(cable):
    assert outcome("status") == (0, NOT_ATTACHED, "")
    assert outcome("stats") == (0, NOT_ATTACHED, "")


def test_version():
    assert outcome("--version") == (0, f"xdp-erm {__version__}\n", "")


# Watching

@contextlib.contextmanager
def watching(*arguments: str, output: int = subprocess.PIPE):
    """`xdp-erm stats --watch` as it runs; it must end well on Ctrl-C."""
    command = [*COMMAND, "stats", *arguments, "--watch", "0.2"]
    with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == ""
            assert process.wait(TIMEOUT) == 130
        finally:
            process.kill()


def test_watch_gives_a_line_a_reading_where_there_is_no_terminal(cable, attached):
    with watching() as process:
        line = process.stdout.readline()
        assert re.fullmatch(rf"{UTC_SECONDS} {SENSOR} decapsulated=0/s 0\.00 Mbit/s 0 sessions\n", line)
        mirror(cable, 100)
        deadline = time.monotonic() + TIMEOUT
        while "decapsulated=0/s" in line and time.monotonic() < deadline:
            line = process.stdout.readline()
        assert re.fullmatch(rf"{UTC_SECONDS} {SENSOR} decapsulated=[1-9]\d*/s \d+\.\d\d Mbit/s 4 sessions\n", line)


def test_watch_json(cable, attached):
    with watching("--json") as process:
        readings = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [reading["interfaces"][0]["program_id"] for reading in readings] == [attached] * 2


def test_watch_nothing(cable):
    with watching() as process:
        assert [process.stdout.readline() for _ in range(2)] == [NOT_ATTACHED] * 2


def test_watch_on_a_terminal(cable, attached, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    ours, theirs = pty.openpty()
    with watching(output=theirs):
        assert "packets/s" in read_screen(ours, "Ctrl-C ends", "decapsulated", "inner_truncated", "switch session")
        mirror(cable, 100)
        read_screen(ours, "━" * 20, "198.51.100.1:2")
    os.close(theirs)
    os.close(ours)


def read_screen(terminal: int, *wanted: str) -> str:
    """What comes until all that is wanted has been on the screen."""
    screen = b""
    deadline = time.monotonic() + TIMEOUT
    while not all(text in screen.decode(errors="replace") for text in wanted):
        assert time.monotonic() < deadline, screen.decode(errors="replace")
        if select.select([terminal], [], [], 1)[0]:
            screen += os.read(terminal, 1 << 16)
    return screen.decode(errors="replace")


def test_watch_ends_when_the_interface_goes(cable, attached):
    command = [*COMMAND, "stats", SENSOR, "--watch", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            loader.detach(SENSOR)
            _, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert (process.returncode, errors) == (
        1, f"xdp-erm: {SENSOR}: xdp-erm is not attached; `xdp-erm attach {SENSOR}` does it\n")


def test_watch_gives_the_screen_back_when_it_is_terminated(cable, attached, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "stats", "--watch", "0.2"], stdout=theirs)
    os.close(theirs)
    screen = b""
    try:
        while b"decapsulated" not in screen:
            assert select.select([ours], [], [], TIMEOUT)[0], screen
            screen += os.read(ours, 1 << 16)
        process.terminate()
        with contextlib.suppress(OSError):  # as a terminal says that nobody is at its other end any more
            while read := os.read(ours, 1 << 16):
                screen += read
        assert process.wait(TIMEOUT) == 128 + signal.SIGTERM
    finally:
        process.kill()
        os.close(ours)
    assert screen.count(b"\x1b[?1049h") == screen.count(b"\x1b[?1049l") == 1


@pytest.mark.parametrize("arguments", [("attach", SENSOR), ("status",), ("stats",), ("config", SENSOR), ("doctor",),
                                       ("detach", SENSOR), ("--version",)], ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(cable, attached, arguments, closed):
    """Nobody wants to hear of it: it is done all the same, and says so by its status."""
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *COMMAND, *arguments], capture_output=True, text=True,
                          timeout=TIMEOUT, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr
    with Links() as links:
        assert (links.find(SENSOR).program_id is None) == (arguments[0] == "detach")


@pytest.mark.parametrize("arguments", [("stats", "--watch", "0.1"), ("stats", "--json"), ("status",)])
def test_a_reader_that_goes_away(cable, attached, arguments):
    """As in `xdp-erm stats --watch | head -1`: it ends and says nothing."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT,
                              check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# What goes wrong

@pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody needs root")
@pytest.mark.parametrize("missing, arguments", [
    ("CAP_NET_ADMIN and CAP_SYS_ADMIN", ("attach", "lo")),
    ("CAP_NET_ADMIN and CAP_SYS_ADMIN", ("detach",)),
    ("CAP_NET_ADMIN and CAP_SYS_ADMIN", ("detach", "lo")),
    ("CAP_SYS_ADMIN", ("status",)),
    ("CAP_SYS_ADMIN", ("stats",)),
    ("CAP_SYS_ADMIN", ("stats", "lo", "--json")),
    ("CAP_SYS_ADMIN", ("stats", "--watch")),
])
def test_without_root(missing, arguments):
    # It may read the repository wherever that is, /root included.
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search",
              "--ambient-caps=+dac_read_search"]
    assert outcome(*arguments, prefix=prefix, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}) == (
        1, "", f"xdp-erm: XDP programs need root; {missing} is missing here: run it with sudo\n")


def capable(*names: str) -> list[str]:
    """A prefix that leaves root these capabilities."""
    return ["setpriv", "--bounding-set=" + ",".join(["-all", *(f"+{name}" for name in names)])]


def test_with_no_more_than_it_needs(cable):
    prefix = capable("net_admin", "sys_admin")
    assert outcome("attach", SENSOR, prefix=prefix)[0] == 0
    mirror(cable, 10)
    stats = run("stats", SENSOR, "--json", prefix=capable("sys_admin"))
    assert json.loads(stats.stdout)["interfaces"][0]["counters"]["decapsulated"]["packets"] == 10
    assert outcome("detach", SENSOR, prefix=prefix)[0] == 0


@pytest.mark.parametrize("left, missing", [
    (("net_admin", "bpf", "perfmon"), "CAP_SYS_ADMIN"), (("sys_admin",), "CAP_NET_ADMIN")])
def test_with_less_than_it_needs_nothing_is_changed(cable, left, missing):
    assert outcome("attach", SENSOR, prefix=capable(*left)) == (
        1, "", f"xdp-erm: XDP programs need root; {missing} is missing here: run it with sudo\n")
    assert outcome("status") == (0, NOT_ATTACHED, "")


@pytest.mark.parametrize("arguments", [("attach", SENSOR), ("detach",), ("detach", SENSOR), ("status",), ("stats",),
                                       ("stats", SENSOR), ("stats", "--watch")], ids=" ".join)
def test_in_a_container_whose_root_is_not_the_hosts(cable, attached, arguments):
    """To it the kernel shows the interface's program by its number only."""
    command = ["unshare", "--map-root-user", "--net", "sh", "-c", 'read moved && exec "$@"', "sh", *COMMAND, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        here, deadline = os.readlink("/proc/thread-self/ns/net"), time.monotonic() + TIMEOUT
        while os.readlink(f"/proc/{process.pid}/ns/net") == here:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        shell(f"ip link set dev {SENSOR} netns {process.pid}")
        output, said = process.communicate("\n", timeout=TIMEOUT)
    assert (process.returncode, output) == (1, "")
    assert said == ("xdp-erm: this kernel does not show which BPF programs are there: Operation not permitted (kernel "
                    "lockdown, or the root of a container who is not the host's: run it on the host)\n")


MISSING = ("bcc is missing for this Python: install python3-bpfcc (Debian, Ubuntu) or python3-bcc (RHEL, Fedora)")


@pytest.mark.parametrize("stub, message", [
    ("raise ImportError('hidden')", MISSING),
    ("VERSION = 'not the BPF compiler'", MISSING),
    ("raise OSError('libLLVM.so: cannot open shared object file')",
     "bcc does not import: libLLVM.so: cannot open shared object file"),
    ("raise MemoryError", "bcc does not import: MemoryError"),
    ("import os; os.write(2, b'LLVM ERROR: out of memory\\n'); os.abort()",
     "the compiler ended with signal 6: LLVM ERROR: out of memory"),
    ("import os; os.abort()", "the compiler ended with signal 6"),
    ("import sys; sys.exit(5)", "the compiler ended with status 5"),
], ids=["missing", "another", "does not load", "memory", "no more memory", "aborts", "exits"])
def test_without_bcc(cable, tmp_path, monkeypatch, stub, message):
    monkeypatch.setenv(cache.VARIABLE, "/proc/nowhere")
    (tmp_path / "bcc.py").write_text(stub)
    installed = importlib.util.find_spec("bcc").origin
    hidden = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"',
              str(tmp_path / "bcc.py"), installed)
    assert outcome("attach", SENSOR, prefix=hidden) == (1, "", f"xdp-erm: {message}\n")
    status, said, errors = outcome("doctor", SENSOR, prefix=hidden)
    assert (status, errors) == (1, "")
    assert message in " ".join(said.split())
    assert "no publisher runs" in said, "doctor does not go on"


@pytest.mark.parametrize("module, package, arguments", [
    ("yaml", "python3-yaml (Debian, Ubuntu) or python3-pyyaml (RHEL, Fedora)", ("config", "eth1")),
    ("pyroute2", "python3-pyroute2", ("generate", SENSOR)),
    ("rich", "python3-rich", ("stats",)),
])
def test_without_a_module(cable, tmp_path, module, package, arguments):
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('hidden', name={module!r})")
    assert outcome(*arguments, env={**os.environ, "PYTHONPATH": str(tmp_path)}) == (
        1, "", f"xdp-erm: the Python module {module} is missing: install {package}\n")


@pytest.mark.parametrize("command", ["attach", "detach", "stats"])
def test_an_interface_that_is_not_there(cable, command):
    assert outcome(command, "nowhere0") == (
        1, "", "xdp-erm: nowhere0: no such interface in this network namespace; `ip link` lists them\n")


def test_stats_where_it_is_not_attached(cable):
    assert outcome("stats", SENSOR) == (
        1, "", f"xdp-erm: {SENSOR}: xdp-erm is not attached; `xdp-erm attach {SENSOR}` does it\n")


def test_attach_without_an_interface(tmp_path):
    file = tmp_path / "erm.yaml"
    file.write_text("defaults: {depth: 1}")
    assert outcome("attach", "--config", str(file)) == (
        2, "", f"xdp-erm: no interface: name one, or put it under `interfaces` in {file}\n")


@pytest.mark.check
@pytest.mark.parametrize("arguments, problem", [
    ([], "xdp-erm: error: the following arguments are required: COMMAND"),
    (["attach", "eth1", "--vlan", "keep"],
     "xdp-erm attach: error: argument --vlan: 'keep' is none of restore, tagged, strip"),
    (["attach", "eth1", "--force=yes"], "xdp-erm attach: error: argument --force: ignored explicit argument 'yes'"),
    (["stats", "eth1", "eth2"], "xdp-erm: error: unrecognized arguments: eth2"),
    (["stats", "--watch", "0"], "xdp-erm stats: error: argument --watch: '0' is not between 0.1 and 3600 seconds"),
    (["stats", "--watch", "nan"], "xdp-erm stats: error: argument --watch: 'nan' is not between 0.1 and 3600 seconds"),
    (["stats", "--watch", "ten"], "xdp-erm stats: error: argument --watch: 'ten' is not between 0.1 and 3600 seconds"),
])
def test_usage(arguments, problem):
    status, output, errors = outcome(*arguments)
    assert (status, output) == (2, "")
    assert errors.startswith("usage: xdp-erm")
    assert errors.splitlines()[-1] == problem


def test_an_unknown_command():
    status, output, errors = outcome("enable")
    assert (status, output) == (2, "")
    assert errors.splitlines()[-1].startswith("xdp-erm: error: argument COMMAND: invalid choice: 'enable' (choose from")


def test_an_attach_that_is_interrupted(cable):
    """Ctrl-C while it waits for another: nothing has changed, and no traceback."""
    with loader.exclusive(), subprocess.Popen([*COMMAND, "attach", SENSOR], stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr.readline() == b"waiting for another xdp-erm to finish\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == b""
            assert process.wait(TIMEOUT) == 130
        finally:
            process.kill()
    with Links() as links:
        assert links.find(SENSOR).program_id is None
