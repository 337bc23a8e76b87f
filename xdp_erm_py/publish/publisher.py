"""Takes a reading every interval and brings it to Zeek, however long Zeek is away."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import XdpErmError
from . import events
from .reports import Message, Reporter
from .transports import ConnectionFailed, Transport

KEEP_SECONDS = 600.0
ACKNOWLEDGEMENT_SECONDS = 10.0
LAST_REPORT_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 30.0

log = logging.getLogger("xdp-erm publish")


class _Kept(NamedTuple):
    made_at: float
    message: Message


class Publisher:
    """Reads and publishes until it is told to stop.

    A message is kept until the Zeek node that logs has acknowledged it: a connection alone does not say that anyone
    listens. When a transport fails, the next one is tried.
    """

    def __init__(self, reporter: Reporter, transports: Iterable[Transport], host: str, interval: float) -> None:
        self._reporter = reporter
        self._transports = collections.deque(transports)
        self._host = host
        self._interval = interval
        self._kept: collections.deque[_Kept] = collections.deque()
        if reporter.under_way:
            self._kept.append(_Kept(time.monotonic(), reporter.under_way))
        self._something_kept = asyncio.Event()
        self._stop = asyncio.Event()
        self._all_read = False
        self._tell_senders = True
        self._reading_fails = False

    def stop(self) -> None:
        """Makes run() send a last report and return."""
        self._stop.set()

    async def run(self) -> None:
        """Returns after stop(), at most LAST_REPORT_SECONDS later."""
        delivery = asyncio.create_task(self._deliver())
        following = time.monotonic()
        while not self._stop.is_set():
            if not self._full():
                self._read()
            if delivery.done():
                await delivery  # raises what nobody has thought of
            following = max(following + self._interval, time.monotonic())
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stop.wait(), following - time.monotonic())
        self._read()
        self._all_read = True
        self._something_kept.set()
        _, unfinished = await asyncio.wait([delivery], timeout=LAST_REPORT_SECONDS)
        for task in unfinished:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await delivery
        if self._kept:
            log.warning("%d reports did not reach Zeek; the next publisher's first report has what they counted",
                        len(self._kept))

    def _full(self) -> bool:
        """Whether Zeek has been away for so long that what is counted from now on waits in the counters."""
        return bool(self._kept) and self._kept[0].made_at < time.monotonic() - KEEP_SECONDS

    def _read(self) -> None:
        try:
            messages = self._reporter.collect()
        except (OSError, XdpErmError) as error:
            if not self._reading_fails:
                log.error("cannot read the counters, will try again every %g s: %s", self._interval, error)
            self._reading_fails = True
            return
        if self._reading_fails:
            log.info("reading the counters works again")
        self._reading_fails = False
        now = time.monotonic()
        self._kept.extend(_Kept(now, message) for message in messages)
        if self._kept:
            self._something_kept.set()

    async def _deliver(self) -> None:
        """Delivers for ever, and after the last reading until all is delivered or an attempt fails."""
        failures = 0
        while not (self._all_read and not self._kept):
            transport = self._transports[0]
            try:
                await transport.open()
                self._tell_senders = True
                while await self._delivered_one(transport):
                    if failures:
                        log.info("reports reach Zeek again, over %s", transport.name)
                        failures = 0
            except ConnectionFailed as error:
                if failures == 0:
                    log.warning("reports do not reach Zeek; keeping those of the next %g minutes, then one for what "
                                "follows, and trying again: %s", KEEP_SECONDS / 60, error)
                if self._all_read:
                    return
                failures += 1
                self._transports.rotate(-1)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), _backoff(failures))
            finally:
                await transport.close()

    async def _delivered_one(self, transport: Transport) -> bool:
        """Delivers the oldest message, as soon as there is one. False: there will be none any more."""
        if not self._kept:
            self._something_kept.clear()
            if self._all_read:
                return False
            await self._something_kept.wait()
            if not self._kept:
                return False
        message = self._kept[0].message
        try:
            self._reporter.send(message)
        except OSError as error:
            raise ConnectionFailed(f"it cannot be written down that they were sent: {error}") from None
        senders = message.senders if self._tell_senders else None
        if senders:
            await transport.send(senders)
        await transport.send(message.text)
        try:
            await asyncio.wait_for(self._acknowledgement(transport, message, senders is not None),
                                   ACKNOWLEDGEMENT_SECONDS)
        except asyncio.TimeoutError:
            raise ConnectionFailed(f"{transport.name}: no acknowledgement in {ACKNOWLEDGEMENT_SECONDS:g} s: check that "
                                   "the manager runs and loads the xdp-erm package") from None
        self._kept.popleft()
        try:
            self._reporter.acknowledge(message)
        except OSError as error:
            # Should we end now, the next publisher sends it again, which Zeek does not mind.
            log.warning("it cannot be written down that Zeek has a report: %s", error)
        return True

    async def _acknowledgement(self, transport: Transport, message: Message, senders: bool) -> None:
        """Returns when it is there. `senders`: the message's senders were sent before it, and may be refused."""
        expected = events.ACKNOWLEDGED, [self._host, message.interface, message.sequence]
        while True:
            text = await transport.receive()
            try:
                complaint = events.refusal(text)
                if events.decode(text) == expected:
                    return
            except ValueError as error:
                raise ConnectionFailed(f"{transport.name}: {error}") from error
            if complaint and senders:
                # Zeek's package is older than we are. Its reports are the same.
                log.warning("Zeek does not take who sent what the allow lists keep out (%s): its xdp-erm package is "
                            "older; going on without", complaint)
                self._tell_senders = senders = False
            elif complaint:
                raise ConnectionFailed(f"{transport.name}: Zeek refuses the report: {complaint}: check that its "
                                       "xdp-erm package is of the same version")


def _backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    doublings = min(failures - 1, 16)  # a float has an end, an outage of days may not
    return min(FIRST_BACKOFF_SECONDS * 2.0 ** doublings, LONGEST_BACKOFF_SECONDS)
