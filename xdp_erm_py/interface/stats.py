"""Reads counters, sessions and foreign senders out of the attached programs."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, NamedTuple

from .. import shared
from ..errors import XdpErmError
from ..kernel import bpf
from ..kernel.links import Links
from ..kernel.privileges import require_to_look
from ..program.reference import Session, address_of
from ..settings import IPV4_ONLY
from . import isolation
from .ours import Attachment, find, find_all, undisturbed


def snapshot(name: str | None = None) -> list[dict[str, Any]]:
    """What every attached interface of this network namespace has counted, or the one called `name`.

    Counters and sessions count packets and bytes of frames as they arrived, wrapping included. They only grow, over
    swaps as well, until the program is detached. Times are RFC 3339, UTC. XdpErmError: `name` has no program of ours.
    """
    require_to_look()
    with Links() as links:
        return undisturbed(lambda: [read(attachment) for attachment in _attachments(links, name)])


def _attachments(links: Links, name: str | None) -> list[Attachment]:
    if name is None:
        return find_all(links)
    found = find(links, name)
    if found is None:
        raise XdpErmError(f"{name}: xdp-erm is not attached; `xdp-erm attach {name}` does it")
    return [found]


def describe(attachment: Attachment) -> dict[str, Any]:
    """The part of an interface's report that is not counted."""
    return {
        "name": attachment.link.name, "other_names": list(attachment.link.other_names),
        "ifindex": attachment.link.index, "mode": attachment.mode, "program_id": attachment.program_id,
        "id": attachment.state["id"], "attached_at": attachment.state["attached_at"],
        "since_boot": attachment.state.get("since_boot"), "config": attachment.state["config"],
        "spread": attachment.state.get("spread"),
    }


def read(attachment: Attachment) -> dict[str, Any]:
    """What one interface has counted. bpf.Gone: it was detached or swapped meanwhile."""
    return {**describe(attachment), "counters": counters(attachment), "sessions": _sessions(attachment),
            "foreign": _foreign(attachment), "cpus": _cpus(attachment), "isolation": _isolation(attachment)}


def counters(attachment: Attachment) -> dict[str, dict[str, int]]:
    """Packets and bytes by counter. Raises as read()."""
    counted = {}
    with bpf.Map.by_id(attachment.maps["counters"]) as map_:
        for index, name in enumerate(shared.COUNTERS):
            per_cpu = map_.lookup(struct.pack("=I", index)) or []
            values = [struct.unpack("=QQ", value) for value in per_cpu]
            counted[name] = {"packets": sum(packets for packets, _ in values),
                             "bytes": sum(bytes_ for _, bytes_ in values)}
    return counted


def _isolation(attachment: Attachment) -> dict[str, int] | None:
    """What the `filter` (its program's id) that keeps frames from the host has `taken`, how many of those had the VLAN
    tag of their wrapping (`outer_tagged`), and how many decapsulated frames are `accounted` for: taken, or dropped on
    their way to it.

    None: there is none, or it came before a command that was killed. Of the frames that were decapsulated some time
    before, those that are not accounted for have reached the host.
    """
    relied = attachment.state.get("filter")
    if not relied or isolation.TAKEN not in attachment.maps or relied.get("balance") is None:
        return None
    accounted = _accounted(attachment) + relied["balance"]
    frames, outer_tagged = _taken(attachment)
    return {"filter": relied["program"], "taken": frames, "outer_tagged": outer_tagged, "accounted": accounted}


def balance(attachment: Attachment) -> int:
    """Decapsulated frames that are not to be accounted for: those from before the filter was there.

    It is not too small, whatever comes while we look. Raises as read().
    """
    accounted = _accounted(attachment, at_least=False)
    return _decapsulated(attachment) - accounted


def leaked(attachment: Attachment) -> int:
    """How many decapsulated frames have reached the host at least since the filter was put there; 0: none that shows.

    Waits for those under way, at most LEAK_SECONDS. Raises as read().
    """
    decapsulated, deadline = _decapsulated(attachment), time.monotonic() + LEAK_SECONDS
    while True:
        found = _isolation(attachment)
        missing = decapsulated - found["accounted"] if found else 0
        if missing <= 0 or time.monotonic() > deadline:
            return max(missing, 0)
        time.sleep(0.02)


def unmarked(attachment: Attachment) -> int:
    """Frames that could not be marked for isolation where `mode: auto` has chosen native mode. Raises as read()."""
    return counters(attachment)["unmarked"]["packets"] if _may_leave_native_mode(attachment) else 0


def scattered(attachment: Attachment) -> int:
    """Frames that `failed`, where the program for frames in several pieces runs in native mode, chosen by `mode: auto`,
    and most do: their headers are not in the first piece. Raises as read()."""
    if not _may_leave_native_mode(attachment) or not attachment.state.get("frags"):
        return 0
    counted = counters(attachment)
    failed = counted["failed"]["packets"]
    return failed if failed > counted["decapsulated"]["packets"] else 0


def _may_leave_native_mode(attachment: Attachment) -> bool:
    return attachment.mode == "native" and attachment.state["config"].get("mode") == "auto"


def wait_for_queues(attachment: Attachment) -> None:
    """Once nothing more is decapsulated: until nothing waits in other CPUs' queues any more. Raises as read()."""
    if "steered" not in attachment.maps:
        return
    deadline, arrived, since = time.monotonic() + QUEUE_SECONDS, -1, 0.0
    while time.monotonic() < deadline:
        before, arrived = arrived, _summed(attachment, "arrived")
        if arrived != before:
            since = time.monotonic()
        # What a queue had no room for never arrives.
        elif arrived >= _summed(attachment, "steered") or time.monotonic() - since > QUEUE_REST_SECONDS:
            return
        time.sleep(0.01)


QUEUE_SECONDS, QUEUE_REST_SECONDS = 5.0, 0.3

#: The maps whose sum is balanced.
BALANCED = ("counters", "arrived", "steered", isolation.TAKEN)

LEAK_SECONDS = 1.0


def _accounted(attachment: Attachment, at_least: bool = True) -> int:
    """Decapsulated frames of which is known what became of them, whether they are still counted or were at first.

    What is looked at later has grown meanwhile, so that the order makes it no less, or no more, than it is.
    """
    def dropped() -> int:
        with Links() as links:
            return links.statistics(attachment.link)["rx_dropped"]

    counted: list[tuple[int, Callable[[], int]]] = [
        (-1, lambda: _summed(attachment, "arrived")), (1, lambda: _summed(attachment, "steered")), (1, dropped),
        (1, lambda: _taken(attachment)[0])]
    return sum(sign * count() for sign, count in (counted if at_least else reversed(counted)))


def _taken(attachment: Attachment) -> tuple[int, int]:
    """As isolation.taken()."""
    with bpf.Map.by_id(attachment.maps[isolation.TAKEN]) as map_:
        return isolation.taken(map_)


def _summed(attachment: Attachment, name: str) -> int:
    """What a per-CPU map of numbers comes to; 0 where there is none."""
    if name not in attachment.maps:
        return 0
    with bpf.Map.by_id(attachment.maps[name]) as map_:
        return sum(sum(_numbers(map_, index)) for index in range(map_.info.max_entries))


def _decapsulated(attachment: Attachment) -> int:
    return counters(attachment)["decapsulated"]["packets"]


def _cpus(attachment: Attachment) -> dict[str, dict[str, int]]:
    """By CPU that frames were handed to: how many, and how many of those its queue had no room for.

    A frame that waits in the queue while we look is taken for one of those.
    """
    if "steered" not in attachment.maps:
        return {}
    # In this order: what has arrived was steered before.
    with bpf.Map.by_id(attachment.maps["arrived"]) as map_:
        arrived = dict(zip(bpf.possible_cpus(), _numbers(map_, 0)))
    with bpf.Map.by_id(attachment.maps["steered"]) as map_:
        steered = {cpu: sum(_numbers(map_, cpu)) for cpu in arrived}
    return _dropped(steered, arrived)


def _numbers(map_: bpf.Map, index: int) -> list[int]:
    """The values of a per-CPU array of numbers."""
    return [struct.unpack("=Q", value)[0] for value in map_.lookup(struct.pack("=I", index)) or []]


def _dropped(steered: dict[int, int], arrived: dict[int, int]) -> dict[str, dict[str, int]]:
    """_cpus(), from the frames that were handed to each CPU, and those that were counted there.

    The queue of a CPU that goes offline is worked off by others: what these counted beyond their own is from there.
    """
    missing = {cpu: steered[cpu] - arrived[cpu] for cpu in steered}
    elsewhere = sum(-frames for frames in missing.values() if frames < 0)
    found = {}
    for cpu in sorted(steered, key=lambda cpu: -missing[cpu]):
        dropped = max(missing[cpu] - elsewhere, 0)
        elsewhere -= max(missing[cpu], 0) - dropped
        if steered[cpu]:
            found[cpu] = {"steered": steered[cpu], "dropped": dropped}
    return {str(cpu): found[cpu] for cpu in sorted(found)}


def _sessions(attachment: Attachment) -> list[dict[str, Any]]:
    """Busiest first."""
    if "sessions" not in attachment.maps:
        return []
    with bpf.Map.by_id(attachment.maps["own_sessions"]) as own, bpf.Map.by_id(attachment.maps["sessions"]) as shared_:
        counted = read_sessions(own, shared_)
    order: dict[Session, Order] = {}
    if "numbers" in attachment.maps:
        with bpf.Map.by_id(attachment.maps["numbers"]) as numbers:
            order = read_order(numbers)
    sessions = [{**session._asdict(), "packets": packets, "bytes": bytes_, "last_seen": _rfc3339(last_seen),
                 **(order[session]._asdict() if session in order else {"gaps": None, "reordered": None})}
                for session, (packets, bytes_, last_seen) in counted.items()]
    return sorted(sessions, key=lambda each: (-each["packets"], each["encapsulation"], each["source"], each["id"]))


def _foreign(attachment: Attachment) -> list[dict[str, Any]]:
    """Who sent what the allow lists keep out, the one with most packets first."""
    if "senders" not in attachment.maps:
        return []
    with bpf.Map.by_id(attachment.maps["senders"]) as map_:
        counted = read_senders(map_)
    senders = [{"source": source, "packets": packets, "bytes": bytes_, "last_seen": _rfc3339(last_seen)}
               for source, (packets, bytes_, last_seen) in counted.items()]
    return sorted(senders, key=lambda sender: (-sender["packets"], sender["source"]))


def read_senders(senders: bpf.Map) -> dict[str, tuple[int, int, float]]:
    """Packets, bytes and when the last packet came (seconds of CLOCK_MONOTONIC) by source address."""
    counted = {}
    for key, value in senders.contents().items():
        packets, bytes_, jiffies = _COUNTED.unpack(value)
        counted[address_of(key)] = packets, bytes_, _monotonic(jiffies)
    return counted


class Order(NamedTuple):
    """What the numbers of a session's frames tell. Both can be too many by those that are under way."""

    gaps: int
    """Frames missing; fewer again where they come late."""
    reordered: int
    """Frames that came behind one with a higher number."""


def read_order(numbers: bpf.Map) -> dict[Session, Order]:
    """By session, of those whose frames are numbered."""
    found = {}
    for key, value in numbers.contents().items():
        highest, start, frames, late, leapt, missing = struct.unpack("=6Q", value)
        if (frames - leapt) % (1 << 64) >= shared.LEAP:  # else that is what is known
            missing = (highest - start + 1 - frames) % (1 << 64)
        found[_session(key)] = Order(missing if missing < 1 << 63 else 0, late)  # below 0: some came twice
    return found


def read_sessions(own: bpf.Map, shared_: bpf.Map) -> dict[Session, tuple[int, int, float]]:
    """Packets, bytes and when the last packet came (seconds of CLOCK_MONOTONIC) by session.

    `own` are the places that each CPU has for itself, `shared_` is where all others are counted.
    """
    places = _own_sessions(own)
    # With many CPUs a flood of made-up sources may never rest. Then a session that was silent for long can be missing.
    for _ in range(_MOST_LOOKS):
        found = shared_.contents()
        again = _own_sessions(own)
        # Where a place has passed to another session, what the one before had moved while we looked.
        if all(new[0] == old[0] for place, old in places.items() for new in [again[place]]):
            break
        places = again
    sessions: dict[Session, tuple[int, int, float]] = {}
    for key, value in [*found.items(), *again.values()]:
        packets, bytes_, jiffies = _COUNTED.unpack(value)
        name = _session(key)
        others = sessions.get(name, (0, 0, 0.0))
        sessions[name] = others[0] + packets, others[1] + bytes_, max(others[2], _monotonic(jiffies))
    return sessions


def _session(key: bytes) -> Session:
    """Of ERM alone it is an IPv4 address and the id, else an IPv6 address, the id and the encapsulation."""
    kind = 0
    if len(key) > _ERM_KEY_LEN:
        key, (kind,) = key[:-4], struct.unpack("=I", key[-4:])
    (number,) = struct.unpack("=I", key[-4:])
    encapsulation = shared.ENCAPSULATIONS[kind]
    # A UDP port is as it stands in the packet.
    return Session(address_of(key[:-4]), socket.ntohs(number) if encapsulation in IPV4_ONLY else number,
                   encapsulation)


_MOST_LOOKS = 10
_ERM_KEY_LEN = 8
_COUNTED = struct.Struct("=QQQ")  # packets, bytes, jiffies


def _own_sessions(own: bpf.Map) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    """Key and value by CPU and place, of the places that are taken."""
    size = own.info.value_size // shared.OWN_SESSIONS
    key = size - _COUNTED.size
    nobody = bytes(size)
    places = {}
    for cpu, values in enumerate(own.lookup(bytes(4)) or []):
        if values.count(0) == len(values):
            continue  # many CPUs never see a mirrored frame
        for start in range(0, len(values), size):
            place = values[start:start + size]
            if place != nobody:
                places[cpu, start] = place[:key], place[key:]
    return places


def _rfc3339(monotonic: float) -> str:
    """Seconds of CLOCK_MONOTONIC as the time of day, UTC, to the millisecond."""
    seen = datetime.fromtimestamp(time.time() - time.monotonic() + monotonic, timezone.utc)
    return seen.strftime("%Y-%m-%dT%H:%M:%S.") + f"{seen.microsecond // 1000:03}Z"


def _monotonic(jiffies: int) -> float:
    """The kernel's jiffies as seconds of CLOCK_MONOTONIC, to about a second.

    They start together, but jiffies at five minutes before 2^32 (INITIAL_JIFFIES in the kernel's linux/jiffies.h). How
    long one is the coarse clocks tell, which tick with them.
    """
    return (jiffies - (1 << 32)) * time.clock_getres(_CLOCK_MONOTONIC_COARSE) + 300


_CLOCK_MONOTONIC_COARSE = 6  # uapi linux/time.h; Python has no name for it
