"""The publisher: what it reports, and that every report reaches Zeek once, whatever happens in between.

A WebSocket server stands in for Zeek here; the btests have the real one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import websockets

from xdp_erm_py import publish, shared
from xdp_erm_py.errors import UsageError, XdpErmError
from xdp_erm_py.publish import events, reports, transports
from xdp_erm_py.publish import publisher as publisher_module
from xdp_erm_py.publish.publisher import Publisher
from xdp_erm_py.publish.reports import Message, Reporter, host_counters
from xdp_erm_py.publish.transports import Broker, ConnectionFailed, WebSocket

ATTACHED_AT = "2023-11-14T22:13:20Z"
HOST = "sensor"
TIMEOUT = 60  # seconds


def reading(packets: int = 0, attached_at: str = ATTACHED_AT, ifindex: int = 7, session: int | None = None,
            queue_drops: tuple[int, ...] = (), foreign: dict[str, int] | None = None,
            isolation: dict[str, int] | None = None, id_: str = "1",
            **counters: int) -> dict[str, Any]:
    """One interface as stats.snapshot() describes it; bytes are 100 times packets."""
    counted = {name: {"packets": 0, "bytes": 0} for name in shared.COUNTERS}
    for name, value in {"decapsulated": packets, **counters}.items():
        counted[name] = {"packets": value, "bytes": 100 * value}
    sessions = [] if session is None else [
        {"encapsulation": "erm", "source": "198.51.100.1", "id": 5, "packets": session, "bytes": 100 * session,
         "gaps": None, "reordered": None,
         "last_seen": "2023-11-14T22:13:21.500Z"}]
    return {"name": "lo", "other_names": ["loop\x1b"], "ifindex": ifindex, "mode": "native", "program_id": 1, "id": id_,
            "attached_at": attached_at, "config": {}, "counters": counted, "sessions": sessions,
            "foreign": [{"source": source, "packets": count, "bytes": 100 * count, "last_seen": ATTACHED_AT}
                        for source, count in (foreign or {}).items()],
            "cpus": {str(cpu): {"steered": 1000, "dropped": dropped} for cpu, dropped in enumerate(queue_drops)},
            "isolation": isolation}


class Report:
    """The report in a message, taken apart by the field order of XDP_ERM::Report."""

    FIELDS = ("version", "sequence", "ts", "host", "interface", "mode", "attached_at", "ts_delta", "verdicts", "notes",
              "others", "sessions", "other_names")

    def __init__(self, text: str) -> None:
        decoded = events.decode(text)
        assert decoded is not None
        self.event, arguments = decoded
        assert self.event == events.REPORT
        self.fields = dict(zip(self.FIELDS, arguments[0]))
        assert len(arguments[0]) == len(self.FIELDS)
        self.types = [value["@data-type"] for value in arguments[0]]

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]["data"]

    @property
    def packets(self) -> dict[str, int]:
        """The counters that are not 0."""
        assert [entry["key"]["data"] for entry in self["verdicts"]] == list(shared.VERDICTS)
        assert [entry["key"]["data"] for entry in self["notes"]] == list(shared.NOTES)
        pairs = {entry["key"]["data"]: [part["data"] for part in entry["value"]["data"]]
                 for entry in self["verdicts"] + self["notes"]}
        assert all(counted_bytes == 100 * packets for packets, counted_bytes in pairs.values())
        return {name: pair[0] for name, pair in pairs.items() if pair[0]}

    def other(self, name: str) -> int | None:
        """What is counted elsewhere than in the program; None: that is not known."""
        return {entry["key"]["data"]: entry["value"]["data"] for entry in self["others"]}.get(name)

    @property
    def sessions(self) -> list[list[Any]]:
        return [[part["data"] for part in session["data"]] for session in self["sessions"]]

    @property
    def seconds(self) -> float:
        return int(self["ts_delta"][:-len("ms")]) / 1000


class Readings:
    """stats.snapshot() with what the test says."""

    def __init__(self, *interfaces: dict[str, Any]) -> None:
        self.now: Any = list(interfaces)

    def __call__(self) -> list[dict[str, Any]]:
        if isinstance(self.now, Exception):
            raise self.now
        return copy.deepcopy(self.now)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "publish.json"


# What a report says


def test_first_report_counts_since_the_attachment(checkpoints: Path) -> None:
    message, = Reporter(HOST, checkpoints, Readings(reading(10, other=3, session=9))).collect()
    report = Report(message.text)
    assert report.types == ["count", "count", "timestamp", "string", "string", "string", "timestamp", "timespan",
                            "table", "table", "table", "vector", "vector"]
    assert [name["data"] for name in report["other_names"]] == [r"loop\x1b"]
    assert report.packets == {"decapsulated": 10, "other": 3}
    assert report.sessions == [["erm", "198.51.100.1", 5, 9, 900, "2023-11-14T22:13:21.500", {}, {}]]
    assert (report["host"], report["interface"], report["mode"]) == (HOST, "lo", "native")
    assert report["attached_at"] == "2023-11-14T22:13:20.000"
    assert report.seconds == pytest.approx(time.time() - 1_700_000_000, abs=10)


@pytest.mark.check
def test_later_reports_count_since_the_one_before(checkpoints: Path) -> None:
    readings = Readings(reading(10, session=9))
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.collect()
    readings.now = [reading(25, fragment=1, session=9)]
    report = Report(reporter.collect()[0].text)
    assert report.packets == {"decapsulated": 15, "fragment": 1}
    assert report.sessions == []
    assert report.seconds < 10
    assert report.other("host_drops") == 0


def test_a_new_publisher_goes_on_where_zeek_was_told_last(checkpoints: Path) -> None:
    readings = Readings(reading(10, session=10))
    first = Reporter(HOST, checkpoints, readings)
    first.acknowledge(first.collect()[0])
    readings.now = [reading(30, session=30)]
    unacknowledged, = first.collect()
    readings.now = [reading(70, session=70)]
    second = Reporter(HOST, checkpoints, readings)
    assert second.under_way is None
    message, = second.collect()
    assert Report(message.text).packets == {"decapsulated": 60}
    assert Report(message.text).sessions[0][3] == 60
    assert Report(message.text).seconds < 10
    assert message.sequence >> 32 != unacknowledged.sequence >> 32  # by which Zeek tells them apart


@pytest.mark.parametrize("acknowledged", [False, True])
def test_a_new_publisher_sends_again_what_may_have_arrived(checkpoints: Path, acknowledged: bool) -> None:
    """And goes on behind it."""
    readings = Readings(reading(10, session=10))
    first = Reporter(HOST, checkpoints, readings)
    if acknowledged:
        message, = first.collect()
        first.send(message)
        first.acknowledge(message)
        readings.now = [reading(20, session=20)]
    message, = first.collect()
    first.send(message)
    readings.now = [reading(70, session=70)]
    second = Reporter(HOST, checkpoints, readings)
    assert second.under_way == message
    following, = second.collect()
    assert Report(following.text).packets == {"decapsulated": 60 - 10 * acknowledged}
    assert following.sequence >> 32 != message.sequence >> 32
    second.acknowledge(message)
    assert Reporter(HOST, checkpoints, readings).under_way is None


def test_that_a_program_is_gone_is_sent_again(checkpoints: Path) -> None:
    readings = Readings(reading(10))
    first = Reporter(HOST, checkpoints, readings)
    first.acknowledge(first.collect()[0])
    readings.now = []
    gone, = first.collect()
    first.send(gone)
    second = Reporter(HOST, checkpoints, readings)
    assert (second.under_way, second.collect()) == (gone, [])


@pytest.mark.parametrize("what, value", [("HOST", "another"), ("VERSION", 0)])
def test_what_zeek_would_not_acknowledge_is_not_sent_again(checkpoints: Path, monkeypatch: pytest.MonkeyPatch,
                                                           what: str, value: Any) -> None:
    with monkeypatch.context() as earlier:
        if what == "VERSION":
            earlier.setattr(events, "VERSION", value)
        first = Reporter(value if what == "HOST" else HOST, checkpoints, Readings(reading(10)))
        first.send(first.collect()[0])
    second = Reporter(HOST, checkpoints, Readings(reading(10)))
    assert second.under_way is None
    assert Report(second.collect()[0].text).packets == {"decapsulated": 10}


def test_checkpoints_of_another_boot_count_for_nothing(checkpoints: Path) -> None:
    readings = Readings(reading(10))
    first = Reporter(HOST, checkpoints, readings)
    first.acknowledge(first.collect()[0])
    first.send(first.collect()[0])
    kept = json.loads(checkpoints.read_text())
    checkpoints.write_text(json.dumps({**kept, "boot": "another"}))
    second = Reporter(HOST, checkpoints, readings)
    assert second.under_way is None
    assert Report(second.collect()[0].text).packets == {"decapsulated": 10}


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b"[" * 100_000])
def test_a_broken_file_of_checkpoints_is_as_none(checkpoints: Path, caplog: pytest.LogCaptureFixture,
                                                   content: bytes) -> None:
    checkpoints.write_bytes(content)
    assert Report(Reporter(HOST, checkpoints, Readings(reading(10))).collect()[0].text).packets == {"decapsulated": 10}
    assert [record.message for record in caplog.records] == [
        f"{checkpoints} is damaged: what was counted before may be reported once more"]


JUNK = (None, True, -1, float("nan"), "junk", [], ["junk"], {"junk": 1})


def paths(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to everything within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *path) for path in paths(inner))


def test_any_junk_in_the_file_of_checkpoints_is_survived(checkpoints: Path) -> None:
    """What is used of it is what was written, or nothing of it is."""
    readings = Readings(reading(10, session=10, foreign={"10.0.0.1": 1}, queue_drops=(1,)))
    first = Reporter(HOST, checkpoints, readings)
    first.acknowledge(first.collect()[0])
    first.send(first.collect()[0])
    sound = json.loads(checkpoints.read_text())
    readings.now = [reading(30, session=30, foreign={"10.0.0.1": 2}, queue_drops=(2,))]
    for path in paths(sound):
        for junk in JUNK:
            kept = copy.deepcopy(sound)
            place = kept
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = junk
            checkpoints.write_text(json.dumps(kept))
            reporter = Reporter(HOST, checkpoints, readings)
            if reporter.under_way:
                assert events.decode(reporter.under_way.text)
                reporter.send(reporter.under_way)
            for message in reporter.collect():
                reporter.acknowledge(message)


@pytest.mark.parametrize("again", [
    {"id_": "2"}, {"id_": "2", "attached_at": "2023-11-14T23:13:20Z"}, {"ifindex": 8}],
    ids=["attached anew in the same second", "attached anew", "interface created anew"])
def test_a_new_attachment_counts_from_zero_even_if_it_counted_more(checkpoints: Path, again: dict[str, Any]) -> None:
    readings = Readings(reading(10, session=10))
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.collect()
    readings.now = [reading(15, session=15, **again)]
    report = Report(reporter.collect()[0].text)
    assert report.packets == {"decapsulated": 15}
    assert report.sessions[0][3] == 15
    assert report.seconds > 3600


def test_an_attachment_by_an_earlier_version_goes_on(checkpoints: Path) -> None:
    """It has no id, nor has what was kept of it: the time of it stands for that."""
    readings = Readings(reading(10, id_=ATTACHED_AT))
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.acknowledge(reporter.collect()[0])
    kept = json.loads(checkpoints.read_text())
    del kept["interfaces"]["lo"]["id"]
    checkpoints.write_text(json.dumps(kept))
    readings.now = [reading(15, id_=ATTACHED_AT)]
    assert Report(Reporter(HOST, checkpoints, readings).collect()[0].text).packets == {"decapsulated": 5}


def test_an_interface_with_a_new_name_is_not_counted_twice(checkpoints: Path) -> None:
    """Nor by a publisher that starts later, whichever of the messages Zeek had before."""
    readings = Readings(reading(10, session=10))
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.acknowledge(reporter.collect()[0])
    readings.now = [{**reading(15, session=15), "name": "new"}]
    for publisher in (reporter, Reporter(HOST, checkpoints, readings)):
        report, gone = publisher.collect()
        assert (Report(report.text)["interface"], Report(report.text).packets) == ("new", {"decapsulated": 5})
        assert Report(report.text).sessions[0][3] == 5
        assert gone.interface == "lo" and events.DETACHED in gone.text
    publisher.acknowledge(report)
    readings.now = [{**reading(18, session=18), "name": "new"}]
    report, gone = Reporter(HOST, checkpoints, readings).collect()
    assert Report(report.text).packets == {"decapsulated": 3}
    assert gone.interface == "lo"


def test_interfaces_may_change_names_with_each_other(checkpoints: Path) -> None:
    readings = Readings(reading(10), {**reading(100, ifindex=8), "name": "other"})
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.collect()
    readings.now = [{**reading(11), "name": "other"}, {**reading(102, ifindex=8), "name": "lo"}]
    reports = [Report(message.text) for message in reporter.collect()]
    assert {report["interface"]: report.packets for report in reports} == {
        "other": {"decapsulated": 1}, "lo": {"decapsulated": 2}}


def test_counters_that_begin_anew_under_one_attachment_never_go_backwards(checkpoints: Path) -> None:
    readings = Readings(reading(10, other=1, session=10))
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.collect()
    readings.now = [reading(2, other=5, session=2)]
    report = Report(reporter.collect()[0].text)
    assert report.packets == {"decapsulated": 2, "other": 5}
    assert report.sessions[0][3] == 2
    assert report.seconds < 10


def numbered(packets: int, gaps: int, reordered: int) -> dict[str, Any]:
    """A reading with a session whose frames are numbered."""
    found = reading(packets, session=packets)
    found["sessions"][0].update(encapsulation="erspan", gaps=gaps, reordered=reordered)
    return found


def test_numbers_that_begin_anew_in_a_session_never_go_backwards(checkpoints: Path) -> None:
    """The kernel may forget them in a flood, and the session not: Zeek takes no count below 0."""
    readings = Readings(numbered(10, gaps=7, reordered=5))
    reporter = Reporter(HOST, checkpoints, readings)
    assert Report(reporter.collect()[0].text).sessions[0][-2:] == [7, 5]
    readings.now = [numbered(20, gaps=0, reordered=0)]
    assert Report(reporter.collect()[0].text).sessions[0][-2:] == [0, 0]
    readings.now = [numbered(30, gaps=9, reordered=6)]
    assert Report(reporter.collect()[0].text).sessions[0][-2:] == [2, 1]


def test_a_forgotten_session_that_comes_back_counts_from_zero(checkpoints: Path) -> None:
    readings = Readings(reading(10, session=10))
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.collect()
    readings.now = [reading(20, session=4)]
    assert Report(reporter.collect()[0].text).sessions[0][3] == 4


@pytest.mark.parametrize("name, present", [("lo", True), ("gone7", False)])
def test_a_program_that_is_gone_is_told_once(checkpoints: Path, name: str, present: bool) -> None:
    readings = Readings({**reading(10), "name": name})
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.acknowledge(reporter.collect()[0])
    readings.now = []
    message, = reporter.collect()
    event, arguments = events.decode(message.text) or ("", [])
    assert event == events.DETACHED
    assert arguments[0] == events.VERSION
    assert arguments[1] == message.sequence
    assert arguments[3:] == [HOST, name, present]
    assert reporter.collect() == []
    # A publisher that starts before Zeek was told tells it.
    assert [events.DETACHED in m.text for m in Reporter(HOST, checkpoints, readings).collect()] == [True]
    reporter.acknowledge(message)
    assert Reporter(HOST, checkpoints, readings).collect() == []


@pytest.mark.parametrize("acknowledged", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_program_that_comes_back_counts_on(checkpoints: Path, acknowledged: bool, restarted: bool) -> None:
    """From another network namespace, or after a change of its mode."""
    readings = Readings(reading(10, session=10))
    reporter = Reporter(HOST, checkpoints, readings)
    reporter.acknowledge(reporter.collect()[0])
    readings.now = []
    message, = reporter.collect()
    if acknowledged:
        reporter.acknowledge(message)
    readings.now = [reading(15, session=15)]
    if restarted:
        reporter = Reporter(HOST, checkpoints, readings)
    report, = reporter.collect()
    assert Report(report.text).packets == {"decapsulated": 5}
    assert Report(report.text).sessions[0][3] == 5
    readings.now = []
    gone, = reporter.collect()
    assert events.DETACHED in gone.text


def test_programs_that_are_gone_do_not_pile_up(checkpoints: Path) -> None:
    readings = Readings()
    reporter = Reporter(HOST, checkpoints, readings)
    for number in range(40):
        readings.now = [reading(), {**reading(ifindex=100 + number), "name": f"veth{number}"}]
        for message in reporter.collect():
            reporter.acknowledge(message)
    kept = json.loads(checkpoints.read_text())["interfaces"]
    assert set(kept) == {"lo", *(f"veth{number}" for number in range(40 - 1 - reports.GONE, 40))}


def test_sequence_grows_when_the_clock_goes_back(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter(HOST, checkpoints, Readings(reading(1)))
    first, = reporter.collect()
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    second, = reporter.collect()
    assert second.sequence > first.sequence
    assert Report(second.text)["ts"] == "2023-11-14T22:13:20.000"


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_changes_no_interval(checkpoints: Path, monkeypatch: pytest.MonkeyPatch,
                                                   restarted: bool) -> None:
    """Back, far ahead, and back again; first of all between the attachment and its first report. When it was
    attached is by the clock as it is now, as are the packets that Zeek compares it with."""
    wall, boot = 1_700_000_000.0, 1000.0
    monkeypatch.setattr(publish.reports, "time", types.SimpleNamespace(
        time=lambda: wall, clock_gettime=lambda _: boot, CLOCK_BOOTTIME=time.CLOCK_BOOTTIME))
    readings = Readings()
    reporter, messages, attached = Reporter(HOST, checkpoints, readings), [], []
    for number, step in enumerate((-7200, 0, 3600, -3600, 10 * 365 * 86400, -10 * 365 * 86400, 0), 1):
        boot += 10
        wall += 10 + step
        readings.now = [{**reading(7 * number, session=7 * number), "since_boot": 1000.0}]
        if restarted:
            reporter = Reporter(HOST, checkpoints, readings)
        message, = reporter.collect()
        reporter.acknowledge(message)
        messages.append(message)
        attached.append(events.timestamp(wall - 10 * number)["data"])
    for message, attached_at in zip(messages, attached):
        report = Report(message.text)
        assert (report.seconds, report.packets, report.sessions[0][3]) == (10, {"decapsulated": 7}, 7)
        assert report["attached_at"] == attached_at
    assert restarted or all(after.sequence == before.sequence + 1 for before, after in zip(messages, messages[1:]))


def test_what_the_host_counts_is_that_of_the_interval(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("received", "receive_errors", "host_drops")
    counters = iter([dict.fromkeys(names, 100), {"received": 150, "receive_errors": 101, "host_drops": 107}, {}])
    monkeypatch.setattr(publish.reports, "host_counters", lambda: {"lo": next(counters)})
    reporter = Reporter(HOST, checkpoints, Readings(reading(1)))
    reports = [Report(reporter.collect()[0].text) for _ in range(3)]
    assert [[report.other(name) for name in names] for report in reports] == [[None] * 3, [50, 1, 7], [None] * 3]


def test_frames_that_reached_the_host_are_told_once_they_cannot_be_under_way(checkpoints: Path) -> None:
    """What a report before has counted, and is not accounted for. With another filter it begins anew."""
    reported = []
    readings = Readings()
    reporter = Reporter("sensor1", checkpoints, readings)
    for packets, accounted, filter_, outer_tagged in (
            (100, 90, 1, 0), (100, 100, 1, 2), (200, 100, 1, 2), (200, 130, 1, 3), (300, 130, 1, 3), (300, 300, 2, 3),
            (300, 295, 2, 3)):
        readings.now = [reading(packets, isolation={"filter": filter_, "taken": accounted, "accounted": accounted,
                                                    "outer_tagged": outer_tagged})]
        message, = reporter.collect()
        report = Report(message.text)
        reported.append((report.other("leaked"), report.other("outer_tagged")))
    assert reported == [(0, 0), (0, 2), (0, 0), (70, 1), (0, 0), (0, 0), (5, 0)]


def test_queue_drops_are_those_of_the_interval(checkpoints: Path) -> None:
    """Also where what waited at a reading has arrived by the next one, and where the queues are gone."""
    readings = Readings()
    reporter = Reporter(HOST, checkpoints, readings)
    reported = []
    for dropped in ((100, 20), (90, 30), (91, 30), (91, 38), (), (5,)):
        readings.now = [reading(1, queue_drops=dropped)]
        report = Report(reporter.collect()[0].text)
        reported.append(report.other("queue_drops"))
    assert reported == [120, 0, 1, 8, None, 5]


def senders(message: Message) -> tuple[list[list[Any]], int] | None:
    """The foreign senders that go with a report: source, packets and bytes of each, and how many others there were."""
    if message.senders is None:
        return None
    event, arguments = events.decode(message.senders) or ("", [])
    assert event == events.FOREIGN_SENDERS
    assert arguments[:4] == [events.VERSION, message.sequence, HOST, message.interface]
    named, others = arguments[4:]
    return [[part["data"] for part in sender["data"]] for sender in named], others


def test_foreign_senders_are_those_of_the_interval(checkpoints: Path) -> None:
    """The ones that sent most in it; one that was forgotten and came back counts from zero."""
    readings = Readings()
    reporter = Reporter(HOST, checkpoints, readings)
    told = []
    for foreign in ({}, {"10.0.0.1": 7, "10.0.0.2": 5}, {"10.0.0.1": 8, "10.0.0.2": 15}, {"10.0.0.1": 8, "10.0.0.2": 3},
                    {"10.0.0.1": 8, "10.0.0.2": 3}):
        readings.now = [reading(1, foreign=foreign)]
        told.append(senders(reporter.collect()[0]))
    assert told == [None, ([["10.0.0.1", 7, 700], ["10.0.0.2", 5, 500]], 0),
                    ([["10.0.0.2", 10, 1000], ["10.0.0.1", 1, 100]], 0), ([["10.0.0.2", 3, 300]], 0), None]


def test_foreign_senders_of_a_flood_are_few(checkpoints: Path) -> None:
    flood = {f"10.0.{number >> 8}.{number & 255}": number for number in range(1, shared.MAX_SENDERS + 1)}
    reporter = Reporter(HOST, checkpoints, Readings(reading(1, foreign=flood)))
    message, = reporter.collect()
    named, others = senders(message) or ([], 0)
    assert [packets for _, packets, _ in named] == list(range(1024, 1016, -1))
    assert others == 1016
    assert len(message.senders or "") < 3000
    # A new publisher goes on from there, as with the counters.
    reporter.acknowledge(message)
    assert senders(Reporter(HOST, checkpoints, Readings(reading(1, foreign={**flood, "10.0.0.1": 3}))).collect()[0]) \
        == ([["10.0.0.1", 2, 200]], 0)


def test_what_the_host_counts_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "dev"
    table.write_text("Inter-|   Receive                            |  Transmit\n face |bytes\n"
                     "  eth0: 5000 50 1 42 2 3 4 5 6000 60 7 8 9 10 11 12\n")
    monkeypatch.setattr(publish.reports, "NET_DEV", table)
    assert host_counters() == {"eth0": {"received": 50, "receive_errors": 1, "host_drops": 42}}


# How reports reach Zeek


class Zeek:
    """Accepts publishers as a node does, and acknowledges what `accepts` says."""

    def __init__(self, port: int = 0) -> None:
        self.received: list[str] = []
        self.subscriptions: list[Any] = []
        self.welcome = '{"type": "ack", "endpoint": "e", "version": "8.0.8"}'
        self.answers: Callable[[str], str | None] = acknowledgement
        self.port = port
        self._server: Any = None

    async def __aenter__(self) -> Zeek:
        self._server = await websockets.serve(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, connection: Any, *_: Any) -> None:
        self.subscriptions.append(json.loads(await connection.recv()))
        await connection.send(self.welcome)
        async for text in connection:
            self.received.append(text)
            answer = self.answers(text)
            if answer:
                await connection.send(answer)

    @property
    def packets(self) -> list[dict[str, int]]:
        return [Report(text).packets for text in self.received]


def acknowledgement(text: str) -> str:
    report = Report(text)
    return events.encode(events.ACKNOWLEDGEMENT_TOPIC, events.ACKNOWLEDGED, events.string(report["host"]),
                         events.string(report["interface"]), events.count(report["sequence"]))


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"waited {TIMEOUT} s in vain"
        await asyncio.sleep(0.01)


class Growing(Reporter):
    """Each reading has one packet more."""

    def __init__(self, checkpoints: Path) -> None:
        self.made: list[Message] = []
        self.acknowledged: list[Message] = []
        self.at_acknowledgement: Callable[[], None] = lambda: None
        super().__init__(HOST, checkpoints, lambda: [reading(len(self.made) + 1)])

    def collect(self) -> list[Message]:
        messages = super().collect()
        self.made += messages
        return messages

    def acknowledge(self, message: Message) -> None:
        super().acknowledge(message)
        self.acknowledged.append(message)
        self.at_acknowledgement()


@contextlib.asynccontextmanager
async def publishing(reporter: Reporter, *transports: Any, interval: float = 0.05) -> Any:
    """A publisher that runs until the end of the block."""
    publisher = Publisher(reporter, transports, HOST, interval)
    running = asyncio.create_task(publisher.run())
    try:
        yield publisher
    finally:
        publisher.stop()
        await asyncio.wait_for(running, TIMEOUT)


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_BACKOFF_SECONDS", "LONGEST_BACKOFF_SECONDS"):
        monkeypatch.setattr(publisher_module, name, 0.02)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the publisher has logged so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.name == publisher_module.log.name]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.check
def test_every_report_arrives_once_and_a_last_one_at_the_end(checkpoints: Path) -> None:
    async def scenario() -> None:
        reporter = Growing(checkpoints)
        async with Zeek() as zeek:
            async with publishing(reporter, WebSocket("127.0.0.1", zeek.port)):
                await until(lambda: len(zeek.received) >= 3)
                before = len(reporter.made)
            assert zeek.received == [message.text for message in reporter.made]
            assert len(reporter.made) == before + 1
            assert reporter.acknowledged == reporter.made
            assert zeek.subscriptions == [[events.ACKNOWLEDGEMENT_TOPIC]]
    asyncio.run(scenario())


def test_the_last_report_goes_over_the_same_connection(checkpoints: Path) -> None:
    """Also where it is told to stop at the moment in which nothing waits to be delivered."""
    async def scenario() -> None:
        reporter = Growing(checkpoints)
        async with Zeek() as zeek:
            async with publishing(reporter, WebSocket("127.0.0.1", zeek.port), interval=3600) as publisher:
                reporter.at_acknowledgement = publisher.stop
                await until(lambda: reporter.acknowledged)
            assert zeek.received == [message.text for message in reporter.made]
            assert len(reporter.acknowledged) == 2
            assert len(zeek.subscriptions) == 1
    asyncio.run(scenario())


def test_reports_wait_for_zeek_and_it_is_said_once(checkpoints: Path, said: Callable[[], list[str]]) -> None:

    async def scenario() -> None:
        reporter = Growing(checkpoints)
        port = free_port()
        async with publishing(reporter, WebSocket("127.0.0.1", port)):
            await until(lambda: len(reporter.made) >= 5)
            kept = reporter.made[:5]
            async with Zeek(port) as zeek:
                await until(lambda: len(zeek.received) >= 5)
                assert zeek.received[:5] == [message.text for message in kept]
            await until(lambda: len(said()) >= 3)
            async with Zeek(port) as zeek:
                await until(lambda: zeek.received)
            assert [message.text for message in reporter.made if message.text in zeek.received]
    asyncio.run(scenario())
    assert [message.split(" Zeek")[0] for message in said()[:4]] == ["reports do not reach", "reports reach"] * 2
    assert "Connect call failed" in said()[0]


def test_what_nobody_acknowledges_is_sent_again(checkpoints: Path, monkeypatch: pytest.MonkeyPatch,
                                                said: Callable[[], list[str]]) -> None:
    monkeypatch.setattr(publisher_module, "ACKNOWLEDGEMENT_SECONDS", 0.1)

    async def scenario() -> None:
        reporter = Growing(checkpoints)
        async with Zeek() as zeek:
            zeek.answers = lambda text: acknowledgement(text) if zeek.received.count(text) == 2 else None
            async with publishing(reporter, WebSocket("127.0.0.1", zeek.port), interval=3600):
                await until(lambda: reporter.acknowledged)
            assert zeek.received[:2] == [reporter.made[0].text] * 2
    asyncio.run(scenario())
    assert "no acknowledgement in 0.1 s" in said()[0]


def test_another_hosts_acknowledgement_is_none(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "ACKNOWLEDGEMENT_SECONDS", 0.1)

    async def scenario() -> None:
        reporter = Growing(checkpoints)
        async with Zeek() as zeek:
            zeek.answers = lambda text: acknowledgement(text.replace(HOST, HOST + "2"))
            async with publishing(reporter, WebSocket("127.0.0.1", zeek.port), interval=3600):
                await until(lambda: len(zeek.received) >= 2)
        assert not reporter.acknowledged
    asyncio.run(scenario())


@pytest.mark.parametrize("answer, complaint", [
    ('{"type": "error", "code": "deserialization_failed", "context": "why"}', "deserialization_failed: why"),
    ("[", "Expecting value"), ('{"type": "data-message"}', "not a message")])
def test_a_refusal_is_told(checkpoints: Path, said: Callable[[], list[str]], answer: str, complaint: str) -> None:
    async def scenario() -> None:
        async with Zeek() as zeek:
            zeek.answers = lambda text: answer
            async with publishing(Growing(checkpoints), WebSocket("127.0.0.1", zeek.port), interval=3600):
                await until(lambda: said())
    asyncio.run(scenario())
    assert complaint in said()[0]


REFUSAL = '{"type": "error", "code": "deserialization_failed", "context": "failed to create Zeek event"}'


def reports_only(other: str | None) -> Callable[[str], str | None]:
    """Zeek's answers: each report is acknowledged; anything else gets `other`."""
    return lambda text: acknowledgement(text) if events.REPORT in text else other


class WithSenders(Growing):
    """Each reading has one foreign packet more as well."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__(checkpoints)
        self._snapshot = lambda: [reading(len(self.made) + 1, foreign={"10.0.0.1": len(self.made) + 1})]


def test_foreign_senders_come_before_their_report(checkpoints: Path) -> None:
    async def scenario() -> None:
        reporter = WithSenders(checkpoints)
        async with Zeek() as zeek:
            zeek.answers = reports_only(None)
            async with publishing(reporter, WebSocket("127.0.0.1", zeek.port)):
                await until(lambda: len(reporter.acknowledged) >= 3)
            assert zeek.received == [text for message in reporter.made for text in (message.senders, message.text)]
    asyncio.run(scenario())


def test_a_zeek_that_knows_no_foreign_senders_gets_every_report(checkpoints: Path,
                                                                said: Callable[[], list[str]]) -> None:
    """It is told of them once in a connection, and so is the log."""
    async def scenario() -> None:
        reporter = WithSenders(checkpoints)
        async with Zeek() as zeek:
            zeek.answers = reports_only(REFUSAL)
            async with publishing(reporter, WebSocket("127.0.0.1", zeek.port)):
                await until(lambda: len(reporter.acknowledged) >= 3)
                assert zeek.received == [reporter.made[0].senders, *(message.text for message in reporter.acknowledged)]
                assert len(said()) == 1
                assert "its xdp-erm package is older; going on without" in said()[0]
                # The next one may be newer.
                await zeek.__aexit__()
                async with Zeek(zeek.port) as newer:
                    newer.answers = reports_only(None)
                    await until(lambda: events.FOREIGN_SENDERS in "".join(newer.received))
    asyncio.run(scenario())


def test_a_report_that_is_refused_behind_its_senders_is_told(checkpoints: Path, said: Callable[[], list[str]]) -> None:
    async def scenario() -> None:
        reporter = WithSenders(checkpoints)
        async with Zeek() as zeek:
            zeek.answers = lambda text: REFUSAL
            async with publishing(reporter, WebSocket("127.0.0.1", zeek.port), interval=3600):
                await until(lambda: len(said()) >= 2)
        assert reporter.acknowledged == []
    asyncio.run(scenario())
    assert "going on without" in said()[0]
    assert "Zeek refuses the report: deserialization_failed" in said()[1]


def test_a_refused_connection_is_told(checkpoints: Path, said: Callable[[], list[str]]) -> None:
    async def scenario() -> None:
        async with Zeek() as zeek:
            zeek.welcome = '{"type": "error", "code": "invalid_uri", "context": "why"}'
            async with publishing(Growing(checkpoints), WebSocket("127.0.0.1", zeek.port), interval=3600):
                await until(said)
        assert not zeek.received
    asyncio.run(scenario())
    assert "invalid_uri: why" in said()[0]


def test_what_is_counted_while_zeek_is_away_for_long_is_in_one_report(
        checkpoints: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    monkeypatch.setattr(publisher_module, "KEEP_SECONDS", 0.3)

    async def scenario() -> None:
        counted = 0

        def readings() -> list[dict[str, Any]]:
            return [reading(counted)]

        reporter = Reporter(HOST, checkpoints, readings)
        port = free_port()
        async with publishing(reporter, WebSocket("127.0.0.1", port), interval=0.02) as publisher:
            while not publisher._full():
                counted += 1
                await asyncio.sleep(0.01)
            kept = len(publisher._kept)
            for _ in range(20):
                counted += 1000
                await asyncio.sleep(0.02)
            assert len(publisher._kept) == kept, "it is to grow no more"
            async with Zeek(port) as zeek:
                await until(lambda: sum(packets.get("decapsulated", 0) for packets in zeek.packets) == counted)
                assert max(packets.get("decapsulated", 0) for packets in zeek.packets) > 19_000
    asyncio.run(scenario())
    assert ["keeping those of the next 0.005 minutes" in said()[0], "again" in said()[1]] == [True, True]


BINDINGS = """
import os

Topic = Count = str
NOTHING, _ = os.pipe()

class Endpoint:
    def make_subscriber(self, topic): return self
    def peer(self, *address): return True
    def fd(self): return NOTHING
    def poll(self): return []
    def publish(self, topic, event): print(topic, event, flush=True)
"""


def test_the_process_with_the_bindings_takes_messages_as_they_come(tmp_path: Path) -> None:
    """Several at a time, or one in pieces; a stand-in prints what it is given to publish."""
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "__init__.py").write_text(BINDINGS)
    (tmp_path / "broker" / "zeek.py").write_text("def Event(*words): return ' '.join(words)")
    lines = "".join(events.encode("topic", name, events.string("é")) + "\n" for name in "abcd").encode()
    command = [sys.executable, "-m", "xdp_erm_py.publish.broker_bridge", "127.0.0.1", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin and process.stdout
        impatience = threading.Timer(TIMEOUT, process.kill)
        impatience.start()
        try:
            assert process.stdout.readline() == b"{}\n"
            for piece, published in ((lines[:len(lines) // 2 + 9], "ab"), (lines[len(lines) // 2 + 9:], "cd")):
                process.stdin.write(piece)
                process.stdin.flush()
                for name in published:
                    assert process.stdout.readline() == f"topic {name} é\n".encode()
            process.stdin.close()
            assert process.wait() == 0
        finally:
            impatience.cancel()
            process.kill()


class Dead:
    """A transport that never connects."""

    name = "dead"

    def __init__(self) -> None:
        self.attempts = 0

    async def open(self) -> None:
        self.attempts += 1
        raise ConnectionFailed("dead")

    async def close(self) -> None:
        pass


def test_another_transport_takes_over(checkpoints: Path) -> None:
    async def scenario() -> None:
        dead = Dead()
        async with Zeek() as zeek, publishing(Growing(checkpoints), dead, WebSocket("127.0.0.1", zeek.port)):
            await until(lambda: len(zeek.received) >= 3)
        assert dead.attempts == 1
    asyncio.run(scenario())


def test_an_old_library_of_websockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 9.1, as Ubuntu 22.04 has it: its client takes a text, and only Zeek's answer says that it has refused."""
    class Connection:
        state, parser_exc = types.SimpleNamespace(name="CONNECTING"), None

        def __init__(self, uri: str, max_size: int) -> None:
            assert uri.startswith("ws://127.0.0.1:")

        def connect(self) -> None:
            pass

        send_request = receive_data = lambda self, what: None
        data_to_send = list

        def events_received(self) -> list[Any]:
            return [types.SimpleNamespace(exception=ValueError("rejected: HTTP 404"))]

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\n\r\n")
        writer.close()

    async def connect() -> None:
        async with await asyncio.start_server(refuse, "127.0.0.1") as server:
            transport = WebSocket("127.0.0.1", server.sockets[0].getsockname()[1])
            try:
                await transport.open()
            finally:
                await transport.close()

    modules = {"websockets.client": types.SimpleNamespace(ClientConnection=Connection),
               "websockets.version": types.SimpleNamespace(version="9.1")}
    monkeypatch.setattr(transports.importlib, "import_module", modules.__getitem__)
    with pytest.raises(ConnectionFailed, match=r"^ws://127.0.0.1:\d+: rejected: HTTP 404$"):
        asyncio.run(connect())


def test_a_broker_that_cannot_be_started_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(ConnectionFailed, match="No such file or directory"):
        asyncio.run(Broker("127.0.0.1", 1, Path("/nonexistent")).open())


def test_an_endless_line_of_broker_has_failed() -> None:
    async def receive() -> None:
        broker = Broker("127.0.0.1", 1, Path("/nonexistent"))
        broker._process = await asyncio.create_subprocess_exec("cat", "/dev/zero", stdout=subprocess.PIPE,
                                                               stderr=subprocess.PIPE)
        try:
            with pytest.raises(ConnectionFailed, match="limit"):
                await broker.receive()
        finally:
            await broker.close()
    asyncio.run(asyncio.wait_for(receive(), TIMEOUT))


@pytest.mark.parametrize("to", ["", ">&2"], ids=["output", "errors"])
def test_a_broker_that_says_more_than_is_read_is_closed(to: str) -> None:
    async def close() -> None:
        broker = Broker("127.0.0.1", 1, Path("/nonexistent"))
        broker._process = await asyncio.create_subprocess_exec("sh", "-c", f"exec cat /dev/zero {to}",
                                                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        await asyncio.sleep(0.5)  # by then asyncio has paused reading
        await broker.close()
    asyncio.run(asyncio.wait_for(close(), TIMEOUT))


def test_what_nobody_has_thought_of_ends_the_publisher(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is seen and restarted; one that reads and never delivers is worse."""
    def fails(message: Message) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        reporter = Growing(checkpoints)
        monkeypatch.setattr(reporter, "acknowledge", fails)
        async with Zeek() as zeek:
            await asyncio.wait_for(Publisher(reporter, [WebSocket("127.0.0.1", zeek.port)], HOST, 0.02).run(), TIMEOUT)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(scenario())


def test_an_hour_without_zeek(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report every 10 s, with as many sessions as there can be at one CPU. Memory is bounded, nothing is lost."""
    clock = types.SimpleNamespace(now=1e6, monotonic=lambda: clock.now)
    monkeypatch.setattr(publisher_module, "time", clock)
    packets = 0

    def readings() -> list[dict[str, Any]]:
        interface = reading(packets)
        interface["sessions"] = [
            {"encapsulation": "erm", "source": f"198.51.{number >> 8}.{number & 255}", "id": number, "gaps": None,
             "reordered": None, "packets": packets + number,
             "bytes": 100 * packets, "last_seen": "2023-11-14T22:13:21.500Z"} for number in range(1280)]
        return [interface]

    async def scenario() -> None:
        nonlocal packets
        reporter = Reporter(HOST, checkpoints, readings)
        port = free_port()
        publisher = Publisher(reporter, [WebSocket("127.0.0.1", port)], HOST, 10)
        for _ in range(360):
            packets += 7
            clock.now += 10
            if not publisher._full():
                publisher._read()
        assert len(publisher._kept) == 61
        assert sum(len(kept.message.packed) for kept in publisher._kept) < 5 << 20, "bytes"
        async with Zeek(port) as zeek:
            running = asyncio.create_task(publisher.run())
            await until(lambda: len(zeek.received) >= 61)
            await until(lambda: not publisher._kept)
            publisher.stop()
            await asyncio.wait_for(running, TIMEOUT)
            assert sum(counted.get("decapsulated", 0) for counted in zeek.packets) == 360 * 7
            last = Report(zeek.received[-1])
            assert last.packets == {"decapsulated": (360 - 61) * 7}
            assert [session[3] for session in last.sessions] == [(360 - 61) * 7] * 1280
    asyncio.run(scenario())


def test_waits_between_attempts_grow_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "FIRST_BACKOFF_SECONDS", 1.0)
    monkeypatch.setattr(publisher_module, "LONGEST_BACKOFF_SECONDS", 30.0)
    assert [publisher_module._backoff(failures) for failures in (1, 2, 3, 5, 6, 10_000)] == [1, 2, 4, 16, 30, 30]


def test_a_reading_that_fails_is_told_once_and_tried_again(checkpoints: Path, said: Callable[[], list[str]]) -> None:
    readings = Readings()

    async def scenario() -> None:
        async with Zeek() as zeek:
            async with publishing(Reporter(HOST, checkpoints, readings), WebSocket("127.0.0.1", zeek.port),
                                  interval=0.02):
                readings.now = XdpErmError("no counters")
                await until(lambda: said())
                await asyncio.sleep(0.2)
                readings.now = [reading(4)]
                await until(lambda: zeek.received)
            assert zeek.packets[0] == {"decapsulated": 4}
    asyncio.run(scenario())
    assert [("cannot" in message, "works again" in message) for message in said()] == [(True, False),
                                                                                               (False, True)]


# The command


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    publish.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.check
@pytest.mark.parametrize("words, said", [
    (["--websocket", "192.0.2.1:27758"], "--websocket 192.0.2.1:27758: must be a loopback address"),
    (["--websocket", "localhost:27758"], "--websocket localhost:27758: must be a loopback address"),
    (["--websocket", "127.0.0.1"], "--websocket 127.0.0.1: must be ADDRESS:PORT"),
    (["--websocket", "127.0.0.1:0"], "--websocket 127.0.0.1:0: must be ADDRESS:PORT"),
    (["--transport", "broker"], "--transport broker: needs --peer"),
    (["--transport", "broker", "--peer", "x:99999"], "--peer x:99999: must be ADDRESS:PORT"),
    (["--interval", "0"], "--interval 0: must be 0.1 to 3600 seconds"),
    (["--interval", "nan"], "--interval nan: must be"),
    (["--host-name", ""], "--host-name: must not be empty"),
])
def test_bad_options(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said.replace("[", r"\[")):
        publish.run(arguments(*words, "--pid-file", str(tmp_path / "pid")))
    assert not list(tmp_path.iterdir())


def test_an_ipv6_loopback_address_is_one() -> None:
    transport, = publish.wanted_transports(arguments("--websocket", "[::1]:27758"))
    assert transport.name == "ws://[::1]:27758"


@contextlib.contextmanager
def attached_interface() -> Iterator[tuple[Any, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A namespace with a veth pair, erm0 and erm1, and xdp-erm on erm0; and how to run `xdp-erm` there."""
    from xdp_erm_py.lab.namespace import Namespace
    if os.geteuid() != 0:
        pytest.skip("needs root")
    namespace = Namespace()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        with namespace.entered():
            return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)

    try:
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "erm0", "type", "veth", "peer", "name", "erm1")
        for name in ("erm0", "erm1"):
            run("ip", "link", "set", name, "up", "mtu", "1600")
        run(sys.executable, "-m", "xdp_erm_py", "attach", "erm0")
        yield namespace, run
    finally:
        namespace.close()


def test_the_command_on_an_interface(tmp_path: Path) -> None:
    """Attach, publish, attach anew, delete the interface, SIGTERM; and what the process costs."""
    with attached_interface() as (namespace, run):
        async def scenario() -> tuple[Zeek, str, int]:
            # The server's socket is made in the namespace, so the publisher there reaches it.
            with namespace.entered():
                zeek = await Zeek().__aenter__()
            zeek.answers = lambda text: acknowledgement(text) if events.REPORT in text else detached(text)
            with namespace.entered():
                process = subprocess.Popen(
                    [sys.executable, "-m", "xdp_erm_py", "publish", "--interval", "0.2", "--host-name", HOST,
                     "--websocket", f"127.0.0.1:{zeek.port}", "--pid-file", str(tmp_path / "pid")],
                    stderr=subprocess.PIPE, text=True)
            try:
                await until(lambda: len(zeek.received) >= 2)
                resident = next(int(line.split()[1]) for line in Path(f"/proc/{process.pid}/status").read_text()
                                .splitlines() if line.startswith("VmRSS"))
                await asyncio.to_thread(run, sys.executable, "-m", "xdp_erm_py", "detach", "erm0")
                await until(lambda: events.DETACHED in zeek.received[-1])
                await asyncio.to_thread(run, sys.executable, "-m", "xdp_erm_py", "attach", "erm0")
                await until(lambda: events.REPORT in zeek.received[-1])
                await asyncio.to_thread(run, "ip", "link", "delete", "erm0")
                await until(lambda: events.DETACHED in zeek.received[-1])
                process.send_signal(signal.SIGTERM)
                _, said = await asyncio.to_thread(process.communicate, timeout=TIMEOUT)
                assert process.returncode == 0, said
                return zeek, said, resident
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                await zeek.__aexit__()

        zeek, said, resident = asyncio.run(scenario())
    gone = [events.decode(text) for text in zeek.received if events.DETACHED in text]
    assert [arguments[3:] for _, arguments in gone if arguments] == [[HOST, "erm0", True], [HOST, "erm0", False]]
    assert all(Report(text)["interface"] == "erm0" for text in zeek.received if events.REPORT in text)
    assert said.count("\n") == 1, said
    assert resident < 50_000, "KiB"
    kept = json.loads((tmp_path / "pid").with_suffix(".json").read_text())
    assert [checkpoint["gone"] for checkpoint in kept["interfaces"].values()] == [True]
    assert kept["under_way"] is None


def detached(text: str) -> str:
    _, arguments = events.decode(text) or ("", [])
    return events.encode(events.ACKNOWLEDGEMENT_TOPIC, events.ACKNOWLEDGED, events.string(arguments[3]),
                         events.string(arguments[4]), events.count(arguments[1]))
