"""xdp-erm publish: brings the counters to Zeek, which writes them to xdp_erm.log.

One process for each host. It never imports bcc, which would make it three times as large.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import TextIO

from .. import sudo
from ..errors import UsageError, XdpErmError
from ..printable import printable, say
from . import lock
from .publisher import Publisher
from .reports import Reporter
from .transports import Broker, Transport, WebSocket, broker_bindings

DEFAULT_INTERVAL = 10.0
SHORTEST_INTERVAL, LONGEST_INTERVAL = 0.1, 3600.0
DEFAULT_WEBSOCKET = "127.0.0.1:27758"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", type=float, default=DEFAULT_INTERVAL, metavar="SECONDS",
                        help="seconds between reports (default: %(default)g)")
    parser.add_argument("--transport", choices=("auto", "websocket", "broker"), default="auto",
                        help="how to reach Zeek; auto tries the WebSocket and, if --peer is given, Broker")
    parser.add_argument("--websocket", default=DEFAULT_WEBSOCKET, metavar="ADDRESS:PORT",
                        help="a Zeek node's WebSocket server on this host (default: %(default)s)")
    parser.add_argument("--peer", metavar="ADDRESS:PORT",
                        help="the manager, for clusters on the Broker backend (cluster-layout.zeek has the port)")
    parser.add_argument("--host-name", type=printable, default=socket.gethostname(), metavar="NAME",
                        help="this host's name in the logs (default: %(default)s)")
    parser.add_argument("--pid-file", type=Path, default=lock.DEFAULT, metavar="FILE",
                        help="locked as long as the publisher runs; what was reported last is remembered beside it, in "
                             "FILE with the ending .json (default: %(default)s)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--running", action="store_true",
                         help="say whether a publisher runs, whoever started it; exit status 0 or 1")
    instead.add_argument("--stop", action="store_true", help="ask the publisher that runs to end, and wait for it")


def run(arguments: argparse.Namespace) -> int:
    """Publishes until SIGTERM or SIGINT. UsageError: an argument; XdpErmError: another publisher runs.

    Or it only looks for the publisher, or stops it: see add_arguments().
    """
    if arguments.pid_file != lock.DEFAULT and sudo.caller():
        raise UsageError(f"--pid-file {arguments.pid_file}: not through sudo, since root would write to any file: take "
                         "a shell of root's")
    if arguments.running:
        say(lock.describe(arguments.pid_file))
        return int(lock.holder(arguments.pid_file) is None)
    if arguments.stop:
        say(lock.stop(arguments.pid_file))
        return 0
    from ..interface import stats
    from ..kernel import privileges

    if not SHORTEST_INTERVAL <= arguments.interval <= LONGEST_INTERVAL:
        raise UsageError(f"--interval {arguments.interval:g}: must be {SHORTEST_INTERVAL:g} to {LONGEST_INTERVAL:g} "
                         "seconds")
    if not arguments.host_name:
        raise UsageError("--host-name: must not be empty")
    transports = wanted_transports(arguments)
    log_to(sys.stderr)
    with lock.held(arguments.pid_file):
        privileges.require_to_look()
        reporter = Reporter(arguments.host_name, arguments.pid_file.with_suffix(".json"), stats.snapshot)
        asyncio.run(publish(reporter, transports, arguments))
    return 0


class _OneLine(logging.Formatter):
    """Messages quote others, Zeek's answers for instance: none of them is more than its line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to(stream: TextIO) -> None:
    """Where the log goes."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_OneLine("%(asctime)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


async def publish(reporter: Reporter, transports: list[Transport], arguments: argparse.Namespace) -> None:
    """Publishes what `reporter` collects until SIGTERM or SIGINT."""
    publisher = Publisher(reporter, transports, arguments.host_name, arguments.interval)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, publisher.stop)
    logging.getLogger("xdp-erm publish").info(
        "reporting as %s every %g s over %s", arguments.host_name, arguments.interval,
        " or ".join(transport.name for transport in transports))
    await publisher.run()


def wanted_transports(arguments: argparse.Namespace) -> list[Transport]:
    """The transports to try, in that order. Raises as run() does."""
    transports: list[Transport] = []
    if arguments.transport in ("auto", "websocket"):
        host, port = _endpoint("--websocket", arguments.websocket)
        if not _is_loopback(host):
            raise UsageError(f"--websocket {arguments.websocket}: must be a loopback address, because Zeek's WebSocket "
                             "API asks for no password")
        import websockets  # noqa: F401 (a missing one is to be known before the first report)
        transports.append(WebSocket(host, port))
    if arguments.transport == "broker" and not arguments.peer:
        raise UsageError("--transport broker: needs --peer ADDRESS:PORT, the manager's address")
    if arguments.peer and arguments.transport != "websocket":
        host, port = _endpoint("--peer", arguments.peer)
        bindings = broker_bindings()
        if bindings:
            transports.append(Broker(host, port, bindings))
        elif not transports:
            raise XdpErmError("Broker's Python bindings are not where zeek-config says, or others than root can write "
                              "there, or there is no zeek-config in PATH: use --transport websocket")
    return transports


def _endpoint(option: str, text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
        raise UsageError(f"{option} {text}: must be ADDRESS:PORT")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
