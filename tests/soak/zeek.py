"""What stands in for Zeek: a WebSocket server that logs each report once, as scripts/main.zeek does, and misbehaves."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import websockets

from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.publish import events

#: Twice what the publisher takes of a message.
LARGE = "." * (1 << 17)


class Zeek(threading.Thread):
    """Serves on 127.0.0.1 of a network namespace."""

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(name="zeek", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._namespace = namespace
        self._ready = threading.Event()
        self.port = 0
        self._server: Any = None
        self._last: dict[tuple[str, str, int], int] = {}
        #: ok, frozen (nothing comes back), garbage, large
        self.mood = "ok"
        self.reports = 0
        self.detached = 0
        #: Messages that came while it was frozen.
        self.unanswered = 0
        #: By when the program was attached and counter: packets and bytes.
        self.logged: dict[str, collections.Counter[tuple[str, int]]] = collections.defaultdict(collections.Counter)

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with self._namespace.entered():
            self._loop.run_until_complete(self._open())
            self._ready.set()
            self._loop.run_forever()

    def start(self) -> None:
        super().start()
        self._ready.wait()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Connections break, and nobody is there."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(60)
        yield
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(60)

    def restart(self) -> None:
        with self.away():
            pass

    def end(self) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()
        self._loop.close()

    async def _open(self) -> None:
        self._server = await websockets.serve(self._serve, "127.0.0.1", self.port, max_size=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, connection: Any, *_: Any) -> None:
        await connection.recv()
        await connection.send('{"type": "ack", "endpoint": "e", "version": "8.0.8"}')
        with contextlib.suppress(websockets.ConnectionClosed):
            async for text in connection:
                if self.mood == "frozen":
                    self.unanswered += 1
                    continue
                if self.mood != "ok":
                    await connection.send(LARGE if self.mood == "large" else "\0[")
                    continue
                acknowledgement = self._log(text)
                if acknowledgement:
                    await connection.send(acknowledgement)

    def _log(self, text: str) -> str | None:
        """The acknowledgement; foreign senders come along with a report and have none of their own."""
        name, arguments = events.decode(text) or ("", [])
        if name == events.FOREIGN_SENDERS:
            return None
        if name == events.REPORT:
            _, sequence, _, host, interface, _, attached_at, _, verdicts, notes, *_ = (
                field["data"] for field in arguments[0])
        else:
            assert name == events.DETACHED
            _, sequence, _, host, interface, _ = arguments
        if sequence > self._last.get((host, interface, sequence >> 32), 0):
            self._last[host, interface, sequence >> 32] = sequence
            if name == events.REPORT:
                self.reports += 1
                for entry in verdicts + notes:
                    for unit, value in enumerate(entry["value"]["data"]):
                        self.logged[attached_at][entry["key"]["data"], unit] += value["data"]
            else:
                self.detached += 1
        return events.encode(events.ACKNOWLEDGEMENT_TOPIC, events.ACKNOWLEDGED, events.string(host),
                             events.string(interface), events.count(sequence))
