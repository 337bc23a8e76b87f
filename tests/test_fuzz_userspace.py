"""What is read from others, with anything in it: the configuration, the command line, Zeek's answers, zeekctl's files.

Whatever it is, nobody gets to see a Python exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import types
from pathlib import Path
from unittest import mock

import websockets
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from machine import needs_zeek

from xdp_erm_py import cli, config, publish
from xdp_erm_py.errors import UsageError
from xdp_erm_py.publish import events, publisher
from xdp_erm_py.publish.publisher import Publisher
from xdp_erm_py.publish.reports import Message
from xdp_erm_py.publish.transports import ConnectionFailed, WebSocket
from xdp_erm_py.settings import SETTINGS, check

SECONDS = 60  # for one connection
DEEP = 20_000  # more levels than Python's own stack has


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large])


def nested(leaves: st.SearchStrategy, keys: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4)
                        | st.dictionaries(keys, inner, max_size=4), max_leaves=12)


# The configuration file

KEYS = ("defaults", "interfaces", "eth1", *SETTINGS)
VALUES = (7932, 0, 65536, -1, 1.5, True, None, "restore", "auto", "192.0.2.0/24", "192.0.2.1", "192.0.2.1/24", [], {})
scalars = st.one_of(st.sampled_from(VALUES), st.none(), st.booleans(), st.integers(), st.floats(), st.dates(),
                    st.binary(max_size=8), st.text(max_size=20))
structures = nested(scalars, st.sampled_from(KEYS) | st.text(max_size=10) | st.integers() | st.none())

# Nearly a configuration: YAML's own signs and tags between words that mean something.
TOKENS = (
    *KEYS, "1", "7932", "restore", "192.0.2.0/24", "true", "null", "0x", "1e999", "2001-99-99", "1:99", "<<", "=",
    ".nan", ": ", ":\n  ", "\n", "\n    ", "- ", ", ", "{", "}", "[", "]", "? ", "|\n", ">\n", "&a ", "*a", "#", "\t",
    "'", '"', "\\", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ",
    "!!null ", "!x ", "---\n", "...\n", "%YAML 9.9\n", "\0", "\x85", "\u2028", "9" * 5000)
nearly = st.lists(st.sampled_from(TOKENS), max_size=20).map("".join)
settings_text = st.builds("interfaces: {{eth1: {{{}: {}}}}}".format, st.sampled_from(tuple(SETTINGS)), nearly)


def check_configuration(file: Path) -> None:
    try:
        loaded = config.load(file)
    except UsageError as error:
        message = str(error)
        assert message.startswith(str(file)), message
        assert len(message.splitlines()) == 1, message
    else:
        assert isinstance(loaded, config.Configuration)
        for name, settings_ in loaded.interfaces.items():
            assert "\0" not in name
            assert {key: check(key, value) for key, value in settings_.as_dict().items()
                    if value != []} == {key: value for key, value in vars(settings_).items() if value != ()}


@given(content=st.one_of(
    st.binary(max_size=200), (st.text(max_size=200) | nearly | settings_text).map(str.encode),
    structures.map(lambda structure: yaml.safe_dump(structure, encoding="utf-8"))))
@example(content=b"[" * DEEP)
@example(content=b"2001-99-99: x")
@example(content=b"!!bool x: y")
@example(content=b'defaults: {depth: !!int "1\\u2028"}')
@example(content=b"defaults: {depth: !!bool x}")
@example(content=b"interfaces: {'eth1': {depth: !!timestamp x}}")
@example(content=b"defaults: 0x" + b"f" * 5000)
@example(content=b'interfaces: {"eth1\\0": {}}')
@examples(1500)
def test_configuration_file(tmp_path, content):
    file = tmp_path / "erm.yaml"
    file.write_bytes(content)
    check_configuration(file)


# The command line

OPTIONS = ("--config", "--port", "--vlan", "--depth", "--mode", "--source", "--target", "--no-sessions", "--set-mtu",
           "--no-isolate", "--help", "--", "-", "-h", "--vl")
# As Python takes a process's arguments: no zero bytes, and what is no UTF-8 as surrogates.
arbitrary = st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=20)).map(
    lambda argument: os.fsdecode(argument.replace(b"\0", b"")))
words = st.one_of(
    st.sampled_from((*OPTIONS, "eth1", "7932,7933", "2", "tagged", "192.0.2.0/24", "", "9" * 5000)), arbitrary,
    st.builds("{}={}".format, st.sampled_from(OPTIONS), arbitrary | st.sampled_from(("1", "strip", "10.0.0.0/8", ","))))


def run_command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = cli.main(arguments)
        except SystemExit as ended:  # argparse
            status = ended.code
    return status, out.getvalue(), err.getvalue()


@given(arguments=st.lists(words, max_size=6))
@examples(800)
def test_config_command(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(config, "DEFAULT_PATH", tmp_path / "missing.yaml"):
        status, out, err = run_command("config", *arguments)
    if status == 0:
        assert out and not err
    else:
        assert status == 2
        assert not out
        assert err.startswith(("xdp-erm: ", "usage: xdp-erm "))


endpoints = st.one_of(arbitrary, st.builds("{}:{}".format, st.sampled_from(("127.0.0.1", "[::1]", "::1%lo", "")),
                                           arbitrary | st.sampled_from(("1", "0", "65536", "\u0663", "9" * 5000))))


@given(websocket=endpoints, peer=endpoints | st.none(), transport=st.sampled_from(("auto", "websocket", "broker")))
@examples(300)
def test_endpoints_of_the_publisher(websocket, peer, transport):
    with mock.patch.object(publish, "broker_bindings", lambda: Path("/nonexistent")), \
            contextlib.suppress(UsageError):
        assert publish.wanted_transports(types.SimpleNamespace(websocket=websocket, peer=peer, transport=transport))


# What Zeek answers

names = st.sampled_from(("type", "data", "topic", "code", "context", "@data-type"))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10),
                   st.sampled_from(("data-message", "error", "ack", events.ACKNOWLEDGED)))
documents = nested(leaves, names | st.text(max_size=5))
# Messages with the fields that messages have, and anything in them.
shaped = st.builds(lambda kind, data: {"type": kind, "topic": events.ACKNOWLEDGEMENT_TOPIC, "data": data},
                   st.sampled_from(("data-message", "error", "ack")), documents)
shaped_events = st.builds(lambda event: {"type": "data-message", "data": [1, 1, {"data": event}]}, documents)
answers = st.one_of((documents | shaped | shaped_events).map(json.dumps), st.text(max_size=50), st.binary(max_size=50))
DEEP_ANSWERS = ("[" * DEEP, '{"data":' * DEEP)


class Scripted:
    """A transport that receives one answer on its first connection, and Zeek's acknowledgement on the next."""

    name = "scripted"

    def __init__(self, answer: str | bytes) -> None:
        self._answers = [[answer], [ACKNOWLEDGEMENT]]
        self._now: list[str | bytes] = []

    async def open(self) -> None:
        self._now = self._answers.pop(0)

    async def send(self, message: str) -> None:
        pass

    async def receive(self) -> str | bytes:
        if not self._now:
            raise ConnectionFailed("closed")
        return self._now.pop(0)

    async def close(self) -> None:
        pass


ACKNOWLEDGEMENT = events.encode(events.ACKNOWLEDGEMENT_TOPIC, events.ACKNOWLEDGED, events.string("sensor"),
                                events.string("eth1"), events.count(1))


class OneReport:
    """A reporter with one report, that stops the publisher when it has arrived."""

    def __init__(self) -> None:
        self._reports = [Message.pack("eth1", 1, "{}", {})]
        self.under_way = None
        self.arrived = asyncio.Event()

    def collect(self) -> list[Message]:
        return [self._reports.pop()] if self._reports else []

    def send(self, message: Message) -> None:
        pass

    def acknowledge(self, message: Message) -> None:
        self.arrived.set()


@given(answer=answers)
@example(answer=DEEP_ANSWERS[0])
@example(answer=DEEP_ANSWERS[1])
@examples(600)
def test_no_answer_ends_the_publisher(answer):
    """It takes another connection, over which the report then arrives."""
    async def deliver() -> None:
        reporter = OneReport()
        publishing = Publisher(reporter, [Scripted(answer)], "sensor", 3600.0)
        task = asyncio.create_task(publishing.run())
        await asyncio.wait_for(reporter.arrived.wait(), SECONDS)
        publishing.stop()
        await asyncio.wait_for(task, SECONDS)

    with mock.patch.object(publisher, "FIRST_BACKOFF_SECONDS", 0.0):
        asyncio.run(deliver())


@given(answer=answers)
@example(answer=DEEP_ANSWERS[0])
@examples(100)
def test_any_welcome(answer):
    """A server of WebSockets, but not of Zeek's, at the other end."""
    async def serve(connection, *_) -> None:
        await connection.recv()
        await connection.send(answer)
        await connection.wait_closed()

    async def connect() -> None:
        async with websockets.serve(serve, "127.0.0.1", 0) as server:
            transport = WebSocket("127.0.0.1", server.sockets[0].getsockname()[1])
            try:
                await transport.open()
            except ConnectionFailed as failure:
                assert str(failure).startswith(transport.name)
            await transport.close()

    asyncio.run(asyncio.wait_for(connect(), SECONDS))


# zeekctl.cfg and node.cfg

option_values = arbitrary | st.sampled_from((
    "", "0", "1", "true", "7932 7933", "restore", "auto", "veto", "broker", "10.0.0.0/8, x", "0.1", "1e3", "nan", "-1",
    "/etc/x", "27759", "\u0663", "9" * 5000))


@needs_zeek
@given(data=st.data())
@examples(300)
def test_zeekctl_settings(zeekctl, data):
    """What the plugin lets pass, the helper's command line takes or refuses, and Zeek's script has its numbers."""
    options = {name: data.draw(option_values, name) if data.draw(st.booleans(), f"{name} is set") else default
               for name, _, default, _ in zeekctl.XdpErm().options()}
    keys = {f"xdp_erm_{name}": data.draw(option_values, name) if data.draw(st.booleans(), f"{name} is set") else ""
            for name in zeekctl.NODE_KEYS}
    node = types.SimpleNamespace(name="worker-1", type="worker", addr="127.0.0.1", host="localhost",
                                 interface="af_packet::eth1", lb_method="", pin_cpus="", **keys)
    plugin = zeekctl.XdpErm()
    errors: list[str] = []
    with mock.patch.multiple(plugin, getOption=options.__getitem__, getGlobalOption=lambda name: 0,
                             nodes=lambda: [node], error=errors.append, debug=errors.append), \
            mock.patch.object(zeekctl.ZeekControl.config, "Config") as zeekctl_config:
        zeekctl_config.options.return_value = []
        plugin.init()
        if errors:
            assert all("xdp_erm." in mistake for mistake in errors)
            return
        capture, = plugin._captures()
        status, *_ = run_command("config", *capture.arguments, "--config=/dev/null", "--", capture.interface)
        assert status in (0, 2)
        if status == 0:
            script = plugin.zeekctl_config()
            assert script.startswith("@ifdef") and script.isascii()
            assert errors == []
