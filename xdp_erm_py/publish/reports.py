"""From counters that grow while a program is attached to reports of what was counted in an interval.

An interval begins where the last report that Zeek acknowledged ended, also one of an earlier publisher: a file keeps
what was counted until then, the interface's checkpoint. So nothing is counted twice, and what passed while no publisher
ran is in the next report, whose interval is as long as that took. Where an interface has no such report, its interval
begins when XDP was attached.

A program that is gone may come back with what it has counted: its interface from another network namespace, or it
itself, when the mode is changed. So the checkpoints of programs that are gone are kept, too.

The file also has the message that is under way. Nobody can know whether a publisher that was killed has brought it to
Zeek, so the next one sends it once more, and Zeek knows it by its number.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import time
import zlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, NamedTuple

from .. import shared
from ..kernel import netlink
from ..printable import printable
from . import events

log = logging.getLogger("xdp-erm publish")

NET_DEV = Path("/proc/self/net/dev")

#: Foreign senders that a report names: those that sent most since the one before.
MOST_SENDERS = 8

#: Programs that are gone and remembered at most.
GONE = 16

Snapshot = dict[str, Any]
"""One interface as in stats.snapshot()."""


class Message(NamedTuple):
    """What is to be told of one interface, and what to remember when Zeek has it.

    Packed, because with many sessions and Zeek away some sixty large messages are kept.
    """

    interface: str
    sequence: int
    packed: bytes

    @classmethod
    def pack(cls, interface: str, sequence: int, text: str, checkpoint: dict[str, Any],
             senders: str | None = None) -> Message:
        return cls(interface, sequence, zlib.compress(json.dumps([text, checkpoint, senders]).encode()))

    def unpack(self) -> tuple[str, int, str, dict[str, Any], str | None]:
        """What it was packed from."""
        text, checkpoint, senders = json.loads(zlib.decompress(self.packed))
        return self.interface, self.sequence, text, checkpoint, senders

    @property
    def text(self) -> str:
        """The message itself."""
        return self.unpack()[2]

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What was counted until then: where the next interval begins."""
        return self.unpack()[3]

    @property
    def senders(self) -> str | None:
        """The message about foreign senders that goes before it, for Zeek packages that know such; None: nobody."""
        return self.unpack()[4]


class Reporter:
    """Makes the messages. `snapshot` is stats.snapshot; the file `checkpoints` outlives the publisher."""

    def __init__(self, host: str, checkpoints: Path, snapshot: Callable[[], list[Snapshot]]) -> None:
        self._host = host
        self._path = checkpoints
        self._snapshot = snapshot
        self._acknowledged: dict[str, dict[str, Any]] = {}
        # Zeek tells publishers apart by the upper half, and an old message of one by the lower: no clock, which may be
        # set back, has a part in it.
        self._sequence = secrets.randbits(31) << 32
        self._kind = [events.VERSION, host]
        #: At first the message that an earlier publisher was about to bring to Zeek, and may have brought.
        self.under_way: Message | None = None
        self._read()
        # Of the reports that were made, acknowledged or not.
        self._made = dict(self._acknowledged)
        if self.under_way:
            _remember(self._made, self.under_way.interface, self.under_way.checkpoint)

    def _read(self) -> None:
        try:
            kept = json.loads(self._path.read_text())
            # Times since boot mean nothing in another boot, and neither do counters.
            if kept["boot"] != _boot_id():
                return
            acknowledged = {name: _checked(checkpoint) for name, checkpoint in kept["interfaces"].items()}
            under_way = kept["under_way"]
            # What is for an earlier version of Zeek's scripts, or under another name, would never be acknowledged.
            if under_way and under_way["of"] == self._kind:
                self.under_way = _checked_message(*under_way["message"])
            self._acknowledged = acknowledged
        except FileNotFoundError:
            return
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            log.warning("%s is damaged: what was counted before may be reported once more", self._path)

    def _write(self, under_way: Message | None) -> None:
        # The number is for earlier versions, which go on from it.
        kept = {"boot": _boot_id(), "sequence": self._sequence, "interfaces": self._acknowledged,
                "under_way": under_way and {"of": self._kind, "message": under_way.unpack()}}
        new = self._path.with_name(self._path.name + ".new")
        new.write_text(json.dumps(kept))
        os.replace(new, self._path)

    def collect(self) -> list[Message]:
        """A message for each interface: what was counted since its last one, or that its program is gone.

        Raises what stats.snapshot raises.
        """
        attached = {printable(interface["name"]): interface for interface in self._snapshot()}
        now = time.time()
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        received = host_counters()
        earlier = {_identity(checkpoint): checkpoint
                   for checkpoint in sorted(self._made.values(), key=lambda made: made["since_boot"])}
        messages = [self._report(name, interface, earlier.get(_identity(interface)), now, since_boot,
                                 received.get(name, {}))
                    for name, interface in attached.items()]
        # In this order: where an interface has a new name, Zeek has what it counted before its old name is gone.
        gone = [name for name, checkpoint in self._made.items() if name not in attached and not checkpoint.get("gone")]
        return messages + [self._detached(name, now) for name in gone]

    def send(self, message: Message) -> None:
        """To be called before a message is sent. OSError: the file cannot be written, so it must not be sent."""
        if self.under_way != message:
            self._write(message)
            self.under_way = message

    def acknowledge(self, message: Message) -> None:
        """Remembers that Zeek has this message and will not need it again. OSError: it is remembered here only."""
        _remember(self._acknowledged, message.interface, message.checkpoint)
        self.under_way = None
        self._write(None)

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _report(self, name: str, interface: Snapshot, previous: dict[str, Any] | None, now: float, since_boot: float,
                received: dict[str, int]) -> Message:
        """`previous`: the checkpoint of the report before. `received`: what the host has counted."""
        checkpoint = {
            "ifindex": interface["ifindex"], "id": interface["id"], "attached_at": interface["attached_at"],
            "since_boot": since_boot,
            "counters": {counter: [value["packets"], value["bytes"]]
                         for counter, value in interface["counters"].items()},
            "sessions": {_key(session): _counts(session) for session in interface["sessions"]},
            "foreign": {sender["source"]: [sender["packets"], sender["bytes"]] for sender in interface["foreign"]},
            "received": received, "queue_drops": _queue_drops(interface), "isolation": interface["isolation"],
            "leaked": None, "gone": False,
        }
        attached = interface.get("since_boot")  # None: by an earlier version
        # By the clock as it is now, which may have been set since, as after boot: Zeek compares packets with this.
        attached_at = seconds(interface["attached_at"]) if attached is None else now - (since_boot - attached)
        if previous:
            duration = since_boot - previous["since_boot"]
        else:
            previous = {"counters": {}, "sessions": {}}
            duration = now - attached_at

        for key, counts in checkpoint["sessions"].items():
            told = previous["sessions"].get(key, [])
            if len(told) > 2 and counts[0] >= told[0]:
                # Frames that were missing may have come late, and in a flood the kernel may forget a session's numbers.
                counts[2:] = map(max, counts[2:], told[2:])

        counted = {counter: _grown(previous["counters"].get(counter), value)
                   for counter, value in checkpoint["counters"].items()}
        if any(min(value) < 0 for value in counted.values()):
            # The counters began anew under the same attachment: a swap to a version with other maps.
            counted = checkpoint["counters"]
            previous = {"sessions": {}, "received": previous.get("received", {})}
        # What is counted elsewhere than in the program; None: that is not known.
        others: dict[str, int | None] = {"queue_drops": None}
        others |= {what: max(count - previous["received"][what], 0) for what, count in received.items()
                   if what in previous.get("received", {})}
        if checkpoint["queue_drops"] is not None:
            told = previous.get("queue_drops") or 0
            # Frames that waited when the last report was made, and have arrived since, were in it.
            checkpoint["queue_drops"] = max(checkpoint["queue_drops"], told)
            others["queue_drops"] = checkpoint["queue_drops"] - told
        if checkpoint["isolation"]:
            others |= _isolated(previous, checkpoint)
        sequence = self._next_sequence()
        text = events.encode(events.REPORT_TOPIC, events.REPORT, events.vector([
            events.count(events.VERSION), events.count(sequence), events.timestamp(now), events.string(self._host),
            events.string(name), events.string(interface["mode"]), events.timestamp(attached_at),
            events.timespan(max(duration, 0.0)),
            events.table({verdict: _pair(counted[verdict]) for verdict in shared.VERDICTS}),
            events.table({note: _pair(counted[note]) for note in shared.NOTES}),
            events.table({name: events.count(value) for name, value in others.items() if value is not None}),
            events.vector(_sessions(interface["sessions"], previous["sessions"], checkpoint["sessions"])),
            events.vector(events.string(printable(other)) for other in interface["other_names"]),
        ]))
        _remember(self._made, name, checkpoint)
        return Message.pack(name, sequence, text, checkpoint,
                            self._senders(name, sequence, interface["foreign"], previous.get("foreign", {})))

    def _senders(self, name: str, sequence: int, foreign: list[Snapshot], previous: dict[str, list[int]]) -> str | None:
        """Names those of `foreign` that sent most in the interval; None: nobody sent anything."""
        sent = {sender["source"]: _sent(previous.get(sender["source"]), [sender["packets"], sender["bytes"]])
                for sender in foreign}
        sent = {source: counted for source, counted in sent.items() if counted[0]}
        if not sent:
            return None
        most = sorted(sent, key=lambda source: -sent[source][0])[:MOST_SENDERS]
        return events.encode(
            events.REPORT_TOPIC, events.FOREIGN_SENDERS, events.count(events.VERSION), events.count(sequence),
            events.string(self._host), events.string(name),
            events.vector(events.vector([events.address(source), *map(events.count, sent[source])]) for source in most),
            events.count(len(sent) - len(most)))

    def _detached(self, name: str, now: float) -> Message:
        checkpoint = {**self._made[name], "gone": True}
        _remember(self._made, name, checkpoint)
        sequence = self._next_sequence()
        text = events.encode(
            events.REPORT_TOPIC, events.DETACHED, events.count(events.VERSION), events.count(sequence),
            events.timestamp(now), events.string(self._host), events.string(name),
            events.boolean(name in host_counters()))
        return Message.pack(name, sequence, text, checkpoint)


def _checked(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint that was kept. The file may say anything: raises whatever a wrong type or a missing key raises."""
    pairs = [pair for key in ("counters", "sessions", "foreign") for pair in checkpoint[key].values()]
    if not all(2 <= len(pair) <= 4 for pair in pairs):
        raise ValueError("not packets, bytes, and what else is counted of a session")
    numbers = [checkpoint["ifindex"], *(number for pair in pairs for number in pair)]
    numbers += [checkpoint[key] for key in ("queue_drops", "leaked") if checkpoint.get(key) is not None]
    numbers += checkpoint.get("received", {}).values()
    numbers += [(checkpoint.get("isolation") or {"outer_tagged": 0})["outer_tagged"]]
    if not all(type(number) is int and number >= 0 for number in numbers) or \
            not math.isfinite(checkpoint["since_boot"]):
        raise ValueError("not a count, or not a time")
    seconds(checkpoint["attached_at"])
    if type(checkpoint.setdefault("id", checkpoint["attached_at"])) is not str:  # earlier versions had none
        raise TypeError("not an id")
    return checkpoint


def _checked_message(interface: str, sequence: int, text: str, checkpoint: dict[str, Any],
                     senders: str | None) -> Message:
    """A message that was kept, likewise."""
    if (type(interface), type(sequence)) != (str, int):
        raise TypeError("neither a name nor a number")
    for part in (text, senders or text):
        events.decode(part)
    return Message.pack(interface, sequence, text, _checked(checkpoint), senders)


def _remember(checkpoints: dict[str, dict[str, Any]], name: str, checkpoint: dict[str, Any]) -> None:
    checkpoints.pop(name, None)  # the latest come last
    checkpoints[name] = checkpoint
    for name in [name for name, checkpoint in checkpoints.items() if checkpoint.get("gone")][:-GONE]:
        del checkpoints[name]


def _identity(interface: Snapshot) -> tuple[int, str]:
    """What an interface's program stays the same by, over swaps and under another name.

    The interface's number as well, since the id of one that an earlier version has attached is the time of that.
    """
    return interface["ifindex"], interface["id"]


def _isolated(previous: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, int | None]:
    """How many decapsulated frames have reached the host, at least, and how many had the VLAN tag of their wrapping."""
    before, now = previous.get("isolation") or {"outer_tagged": 0, "filter": None}, checkpoint["isolation"]
    told = (previous.get("leaked") or 0) if before["filter"] == now["filter"] else 0
    # Those of the interval may be under way.
    missing = previous["counters"].get("decapsulated", [0])[0] - now["accounted"] if "counters" in previous else 0
    checkpoint["leaked"] = max(missing, told)
    return {"leaked": checkpoint["leaked"] - told,
            "outer_tagged": max(now["outer_tagged"] - before["outer_tagged"], 0)}


def _queue_drops(interface: Snapshot) -> int | None:
    """Frames that the queues to other CPUs had no room for; None: there are no such queues."""
    cpus = interface["cpus"].values()
    return sum(cpu["dropped"] for cpu in cpus) if cpus else None


def _key(session: Snapshot) -> str:
    return f"{session['encapsulation']} {session['source']} {session['id']}"


def _counts(session: Snapshot) -> list[int]:
    """What is counted of a session."""
    return [session["packets"], session["bytes"], session["gaps"] or 0, session["reordered"] or 0]


def _sessions(sessions: list[Snapshot], previous: dict[str, list[int]],
              checkpoint: dict[str, list[int]]) -> list[events.Value]:
    """The sessions that sent something."""
    values = []
    for session in sessions:
        sent = _sent(previous.get(_key(session)), checkpoint[_key(session)])
        if sent[0]:
            values.append(events.vector([
                events.string(session["encapsulation"]), events.address(session["source"]), events.count(session["id"]),
                events.count(sent[0]), events.count(sent[1]), events.timestamp(seconds(session["last_seen"])),
                *(events.NONE if session["gaps"] is None else events.count(number) for number in sent[2:])]))
    return values


def _pair(packets_and_bytes: list[int]) -> events.Value:
    return events.vector(map(events.count, packets_and_bytes))


def _sent(before: list[int] | None, after: list[int]) -> list[int]:
    """What somebody sent. Who was forgotten and came back counts from zero."""
    sent = _grown(before, after)
    return after if min(sent[:2]) < 0 else sent


def _grown(before: list[int] | None, after: list[int]) -> list[int]:
    return [now - then for then, now in zip((before or []) + [0] * len(after), after)]


def host_counters() -> dict[str, dict[str, int]]:
    """What the host has counted on each interface of this network namespace since it exists: packets that it
    `received`, `host_drops`, which kernel or NIC dropped, and `receive_errors`, which were too long or damaged.

    By their printable names; there they stand as they are, with whatever bytes.
    """
    counters = {}
    for line in NET_DEV.read_bytes().splitlines()[2:]:
        name, _, columns = line.partition(b":")
        packets, errors, drops = map(int, columns.split()[1:4])
        counters[printable(netlink.text(name.lstrip(b" ")))] = {
            "received": packets, "receive_errors": errors, "host_drops": drops}
    return counters


def seconds(rfc3339: str) -> float:
    """Since 1970, of a time as stats.snapshot() gives it."""
    return datetime.fromisoformat(rfc3339.replace("Z", "+00:00")).astimezone(timezone.utc).timestamp()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
