"""Names and texts of others, with control characters in them, reach no terminal, log line or metric as they are."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdp_erm_py import publish
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import loader, ours, stats
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.printable import printable
from xdp_erm_py.publish import events
from xdp_erm_py.publish.reports import Reporter
from xdp_erm_py.settings import InterfaceConfig

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[1] / "bin" / "xdp-erm")]
TIMEOUT = 60  # seconds

# What Linux takes for names: turns a terminal red; rich's markup; what Python takes for the end of a line; no UTF-8.
RED, MARKUP, LINES, BYTES = "e\x1b[31mx", "[red]x", "a\x1cb", b"u\xffb"
SEEN = r"e\x1b[31mx"


@pytest.mark.check
@pytest.mark.parametrize("text, seen", [
    ("eth1, 192.0.2.1/24: é→日", "eth1, 192.0.2.1/24: é→日"), (RED, SEEN), ("a\nb\r\tc", r"a\nb\r\tc"),
    ("\x00\x7f\x9b\xad", r"\x00\x7f\x9b\xad"), ("\u202eabc\u2028", r"\u202eabc\u2028"),
    (os.fsdecode(b"\xff"), r"\udcff"),
])
def test_what_is_seen(text, seen):
    assert printable(text) == seen


@given(st.text(st.characters()))
def test_everything_is_seen(text):
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


# Interfaces

@pytest.fixture
def odd(cable):
    """The sensor's namespace, with xdp-erm on a pair of interfaces with odd names, and more of them."""
    for words in (["add", RED, "type", "veth", "peer", "name", MARKUP], ["add", LINES, "type", "bridge"],
                  ["add", BYTES, "type", "bridge"], ["set", RED, "up"], ["set", MARKUP, "up"]):
        subprocess.run(["ip", "link", *words], check=True, timeout=TIMEOUT)
    return cable


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)


def check(text: str, *seen: str) -> None:
    assert "\x1b" not in text and "\x1c" not in text
    for part in seen:
        assert part in text


def test_names_of_interfaces(odd):
    check(run("attach", RED, MARKUP).stdout, f"{SEEN}: attached (", f"dev {SEEN} mtu 1554", "[red]x: attached (")
    check(run("status").stdout, f"\n{SEEN} ", "\n[red]x ")
    check(run("stats").stdout, f"\n{SEEN}: native", "[red]x: native")
    names = [interface["name"] for interface in json.loads(run("status", "--json").stdout)["interfaces"]]
    assert names == [MARKUP, RED]  # programs get what there is
    check(run("stats", RED + "y").stderr, f"xdp-erm: {SEEN}y: no such interface")
    with subprocess.Popen([*COMMAND, "stats", RED, "--watch"], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        process.kill()
    check(line, f" {SEEN} decapsulated=0/s ")
    check(run("detach", RED).stdout, f"{SEEN}: detached (")


def watched(name: str) -> bytes:
    """What a terminal gets of `stats --watch`, up to the last counter."""
    ours, theirs = pty.openpty()
    screen = b""
    command = [*COMMAND, "stats", name, "--watch"]
    with subprocess.Popen(command, stdout=theirs, env={**os.environ, "TERM": "xterm"}) as process:
        try:
            deadline = time.monotonic() + TIMEOUT
            while b"inner_truncated" not in screen:
                assert time.monotonic() < deadline, screen
                if select.select([ours], [], [], 1)[0]:
                    screen += os.read(ours, 1 << 16)
        finally:
            process.kill()
    os.close(ours)
    os.close(theirs)
    return screen


def test_names_of_interfaces_on_a_terminal(odd):
    loader.attach(RED, InterfaceConfig())
    screen = watched(RED)
    assert SEEN.encode() in screen and RED.encode() not in screen


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_where_not_every_character_can_be_written(cable, monkeypatch, encoding):
    """What cannot, is escaped, as of a name in another alphabet. The command goes on."""
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    subprocess.run(["ip", "link", "add", "日", "type", "veth", "peer", "name", "end"], check=True, timeout=TIMEOUT)
    done = run("attach", "日", SENSOR)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{SENSOR}: attached (" in done.stdout and r"\u65e5: attached (" in done.stdout
    for command in ("status", "stats", "doctor"):
        done = run(command)
        assert (r"\u65e5" in done.stdout, done.stderr) == (True, "")
    assert rb"\u65e5: native" in watched("日")


def test_the_publisher_among_odd_names(odd, tmp_path):
    """They stand in /proc/net/dev for it to find its own."""
    loader.attach(RED, InterfaceConfig())
    reporter = Reporter("sensor", tmp_path / "checkpoints.json", stats.snapshot)
    reporter.collect()
    message, = reporter.collect()
    assert message.interface == SEEN
    name, others = (json.loads(message.text)["data"][2]["data"][1]["data"][0]["data"][place] for place in (4, 10))
    assert name["data"] == SEEN
    assert {other["key"]["data"]: other["value"]["data"] for other in others["data"]} == {
        "received": 0, "receive_errors": 0, "host_drops": 0, "leaked": 0, "outer_tagged": 0}
    subprocess.run(["ip", "link", "delete", RED], check=True, timeout=TIMEOUT)
    message, = reporter.collect()
    assert (message.interface, events.DETACHED in message.text) == (SEEN, True)


def test_words_of_the_command_line():
    for arguments in (["stats", "eth1", RED], ["attach", "--vlan", RED, "eth1"], ["attach", "--config", RED],
                      ["systemd", "install", os.fsdecode(BYTES) + "/"]):
        done = run(*arguments)
        assert done.returncode != 0
        check(done.stdout + done.stderr)


# The state of a program, which any root process can write

def write_state(state: bytes) -> None:
    with Links() as links, bpf.descriptor(bpf.program_fd(links.find(SENSOR).program_id)) as program:
        for number in bpf.program_info(program).map_ids:
            with bpf.Map.by_id(number) as map_:
                if map_.info.name == ours.STATE_MAP:
                    map_.update(bytes(4), state.ljust(map_.info.value_size, b"\0"))


def state() -> dict:
    with Links() as links:
        return ours.find(links, SENSOR).state


def test_texts_of_a_state(cable):
    loader.attach(SENSOR, InterfaceConfig())
    hostile = state()
    hostile["config"] = {**hostile["config"], "vlan": RED + "[blink]", RED: [RED]}
    hostile["version"], hostile["digest"] = RED, "another"
    hostile["spread"] = {"how": RED, "cpus": [1], "reason": RED}
    write_state(json.dumps(hostile).encode())
    check(run("status").stdout, f"vlan={SEEN}[blink]", f"{SEEN}={SEEN}", f" {SEEN} 1 ")
    check(run("stats").stdout, SENSOR)
    check(run("attach", SENSOR).stdout, "swapped the program")


NO_STATES = (b"", b"{", b"[]", b"1", b"\xff", b"[" * 400)
NO_VALUES = ({"attached_at": "yesterday\x1b"}, {"attached_at": 5}, {"config": []}, {"version": None}, {"nic": "x"},
             {"spread": {"how": "rps"}}, {"spread": {"how": "rps", "cpus": ["\x1b"]}}, {"spread": 1})


def test_a_state_that_is_none_is_somebody_elses(cable):
    """Nothing is taken off or replaced that may not be ours, and nothing crashes."""
    loader.attach(SENSOR, InterfaceConfig())
    valid = state()
    for text in (*NO_STATES, *(json.dumps({**valid, **change}).encode() for change in NO_VALUES)):
        write_state(json.dumps(valid).encode())
        assert len(stats.snapshot()) == 1
        write_state(text)
        assert stats.snapshot() == [], text
    with pytest.raises(XdpErmError, match=f"{SENSOR}: another XDP program is attached .* --force"):
        loader.attach(SENSOR, InterfaceConfig())
    assert "is not ours and stays" in loader.detach(SENSOR)[0]
    loader.attach(SENSOR, InterfaceConfig(), force=True)
    assert len(stats.snapshot()) == 1


# The publisher's log

def test_a_log_line_is_one_line():
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        publish.log_to(stream)
        logging.getLogger("xdp-erm publish").warning("Zeek says: %s", f"{RED}\n2026-01-01 00:00:00 root: all is well\r")
    finally:
        root.handlers = handlers
        root.setLevel(level)
    line, = stream.getvalue().splitlines()
    assert line.endswith(rf" xdp-erm publish: Zeek says: {SEEN}\n2026-01-01 00:00:00 root: all is well\r")


def test_a_host_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: RED)
    parser = argparse.ArgumentParser()
    publish.add_arguments(parser)
    assert parser.parse_args([]).host_name == SEEN
    assert parser.parse_args(["--host-name", "a\n"]).host_name == r"a\n"
