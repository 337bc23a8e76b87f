"""Two ways to Zeek: its WebSocket API, and Broker's Python bindings in a process that may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from . import events

OPEN_SECONDS = 10.0
CLOSE_SECONDS = 2.0

#: More than any message that Zeek sends us, and as many as we leave unread.
_MESSAGE_BYTES, _UNREAD_MESSAGES = 1 << 16, 4
_READ_BYTES = 1 << 16
#: Codes of the frames that have parts of messages: continuation, text, binary (RFC 6455).
_DATA = (0, 1, 2)


class ConnectionFailed(Exception):
    """Zeek cannot be reached this way now; the text says why."""


class Transport(Protocol):
    """A connection that publishes messages and receives the acknowledgements. Every failure is a ConnectionFailed."""

    name: str

    async def open(self) -> None:
        """Connects and subscribes; ends within a few OPEN_SECONDS."""

    async def send(self, message: str) -> None:
        """Publishes one message."""

    async def receive(self) -> str:
        """Waits for the next message."""

    async def close(self) -> None:
        """Gives the connection up; harmless where there is none."""


class WebSocket:
    """The WebSocket API of a Zeek node at a loopback address.

    Of the library it takes the protocol alone: what is read and written, and how much at most, is decided here.
    """

    def __init__(self, host: str, port: int) -> None:
        self.name = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
        self._address = host, port
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        with self._failures():
            connected = await _connect(*self._address)
            self._reader, self._writer = await asyncio.open_connection(sock=connected)
            self._writing = asyncio.Lock()
            self._messages: asyncio.Queue[str | Exception] = asyncio.Queue(_UNREAD_MESSAGES)
            self._part = b""
            self._refused: Exception | None = None
            self._protocol = _client(f"{self.name}/v1/messages/json")
            self._protocol.send_request(self._protocol.connect())
            await asyncio.wait_for(self._shake_hands(), OPEN_SECONDS)
            self._reading = asyncio.create_task(self._read())
            await self.send(json.dumps([events.ACKNOWLEDGEMENT_TOPIC]))
            complaint = events.refusal(await asyncio.wait_for(self.receive(), OPEN_SECONDS))
        if complaint:
            raise ConnectionFailed(f"{self.name}: {complaint}")

    async def send(self, message: str) -> None:
        with self._failures():
            self._protocol.send_text(message.encode())
            await asyncio.wait_for(self._write(), OPEN_SECONDS)

    async def receive(self) -> str:
        with self._failures():
            message = await self._messages.get()
            if isinstance(message, Exception):
                raise message
        return message

    async def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(ConnectionFailed, AttributeError), self._failures():  # it was never opened
                self._reading.cancel()
                await asyncio.wait([self._reading])  # two at a time may not read
                self._protocol.send_close(1000)
                await asyncio.wait_for(self._write(), CLOSE_SECONDS)
                await asyncio.wait_for(self._end(), CLOSE_SECONDS)
            self._writer.transport.abort()
            self._writer = None

    async def _end(self) -> None:
        """Waits until the other side closes, too."""
        while await self._reader.read(_READ_BYTES):
            pass

    async def _shake_hands(self) -> None:
        await self._write()
        while self._protocol.state.name == "CONNECTING" and not self._refused:
            await self._take_in()
        if self._refused:
            raise self._refused

    async def _read(self) -> None:
        """Reads, also while nobody waits for a message, because pings want answers."""
        try:
            while True:
                await self._take_in()
        except Exception as error:  # for whom it is, receive() has to say
            await self._messages.put(error)

    async def _take_in(self) -> None:
        """Reads what has come, and no more before it is dealt with and answered."""
        data = await self._reader.read(_READ_BYTES)
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if getattr(event, "opcode", None) in _DATA:
                self._part += event.data
                if event.fin:
                    message, self._part = self._part, b""
                    await self._messages.put(message.decode())
            # Before version 10 it is Zeek's answer that knows.
            elif not hasattr(self._protocol, "handshake_exc"):
                self._refused = getattr(event, "exception", None)
        self._refused = getattr(self._protocol, "handshake_exc", self._refused)
        await self._write()
        if self._protocol.parser_exc:
            raise self._protocol.parser_exc
        if not data:
            raise EOFError("the connection has ended")

    async def _write(self) -> None:
        """Writes what the protocol wants to say; waits until the other side has read so much of it."""
        assert self._writer is not None
        async with self._writing:
            for data in self._protocol.data_to_send():
                if data:
                    self._writer.write(data)
                else:
                    self._writer.write_eof()
            await self._writer.drain()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        from websockets.exceptions import WebSocketException
        try:
            yield
        except (OSError, EOFError, asyncio.TimeoutError, ValueError, WebSocketException) as error:
            raise ConnectionFailed(f"{self.name}: {str(error) or 'no answer in time'}") from error


def _client(uri: str) -> Any:
    """The library's client without input and output, which versions before 11 call a connection."""
    client: Any = importlib.import_module("websockets.client")
    kind = getattr(client, "ClientProtocol", None) or client.ClientConnection
    is_old = int(importlib.import_module("websockets.version").version.partition(".")[0]) < 10
    return kind(uri if is_old else importlib.import_module("websockets.uri").parse_uri(uri), max_size=_MESSAGE_BYTES)


async def _connect(host: str, port: int) -> socket.socket:
    connecting = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        connecting.setblocking(False)
        await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connecting, (host, port)), OPEN_SECONDS)
    except BaseException:
        connecting.close()
        raise
    return connecting


class Broker:
    """Broker's Python bindings, peering with the manager of a cluster on the Broker backend.

    Calls into the bindings can hang for ever, so they are made by broker_bridge.py in a process that is killed when
    we are done with it. It reads a message a line and writes a message a line, the first one when it has peered.
    """

    def __init__(self, host: str, port: int, bindings: Path) -> None:
        self.name = f"broker {host}:{port}"
        self._arguments = [host, str(port)]
        self._bindings = bindings
        self._process: asyncio.subprocess.Process | None = None

    async def open(self) -> None:
        package = Path(__file__).resolve().parents[2]  # a directory, or the .pyz we run from
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(package), str(self._bindings)]))
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "xdp_erm_py.publish.broker_bridge", *self._arguments, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            raise ConnectionFailed(f"{self.name}: {error}") from error
        try:
            await asyncio.wait_for(self.receive(), OPEN_SECONDS)
        except asyncio.TimeoutError:
            raise ConnectionFailed(f"{self.name}: no peering in {OPEN_SECONDS:.0f} s: check the address, and that "
                                   "Broker's TLS is not switched off in Zeek") from None

    async def send(self, message: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(message.encode() + b"\n")
            await self._process.stdin.drain()
        except OSError as error:
            raise ConnectionFailed(f"{self.name}: {error}") from error

    async def receive(self) -> str:
        assert self._process is not None and self._process.stdout is not None and self._process.stderr is not None
        try:
            line = await self._process.stdout.readline()
        except ValueError as error:  # longer than asyncio's limit
            raise ConnectionFailed(f"{self.name}: {error}") from error
        if not line:
            said = (await self._process.stderr.read()).decode(errors="replace").strip().splitlines()
            raise ConnectionFailed(f"{self.name}: {said[-1] if said else 'the process with the bindings ended'}")
        return line.decode()

    async def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.communicate()  # wait() alone never returns where reading is paused
            self._process = None


def broker_bindings() -> Path | None:
    """Where Zeek's `broker` package for Python is, says zeek-config.

    None: no Zeek here, or one without it, or one whose files others than root can write, which root does not run.
    """
    places = os.environ.get("PATH", "").split(os.pathsep) + ["/opt/zeek/bin", "/usr/local/zeek/bin"]
    for place in places:
        command = Path(place, "zeek-config")
        if command.is_file():
            if not _trusted(command):
                return None
            try:
                said = subprocess.run([command, "--python_dir"], capture_output=True, timeout=OPEN_SECONDS, check=True)
            except (OSError, subprocess.SubprocessError):
                return None
            directory = Path(said.stdout.decode().strip())
            package = directory / "broker"
            return directory if package.is_dir() and all(map(_trusted, [package, *package.rglob("*")])) else None
    return None


def _trusted(file: Path) -> bool:
    """Whether nobody but who we are can change what a file is."""
    return os.geteuid() != 0 or all(_is_roots(place) for place in [file.resolve(), *file.resolve().parents])


def _is_roots(place: Path) -> bool:
    found = place.stat()
    by_group = found.st_mode & stat.S_IWGRP and found.st_gid != 0
    by_others = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    return found.st_uid == 0 and not by_group and not by_others
