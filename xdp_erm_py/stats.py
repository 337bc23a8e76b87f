"""Reads counters and sessions out of the attached programs."""

from __future__ import annotations

import ipaddress
import struct
import time
from datetime import datetime, timezone
from typing import Any

from . import bpf, shared
from .attachment import Attachment, find, find_all
from .errors import XdpErmError
from .links import Links
from .privileges import require_to_look


def snapshot(name: str | None = None) -> list[dict[str, Any]]:
    """What every attached interface of this network namespace has counted, or the one called `name`.

    Counters and sessions count packets and bytes of frames as they arrived, wrapping included. They only grow, over
    swaps as well, until the program is detached. Times are RFC 3339, UTC. XdpErmError: `name` has no program of ours.
    """
    require_to_look()
    with Links() as links:
        if name is None:
            attachments = find_all(links)
        else:
            found = find(links, name)
            if found is None:
                raise XdpErmError(f"{name}: xdp-erm is not attached; `xdp-erm attach {name}` does it")
            attachments = [found]
    interfaces = []
    for attachment in attachments:
        try:
            interfaces.append(_interface(attachment))
        except FileNotFoundError:
            continue  # detached or swapped while we read: the next reading has it
    return interfaces


def describe(attachment: Attachment) -> dict[str, Any]:
    """The part of an interface's report that is not counted."""
    return {
        "name": attachment.link.name, "ifindex": attachment.link.index, "mode": attachment.mode,
        "program_id": attachment.program_id, "attached_at": attachment.state["attached_at"],
        "config": attachment.state["config"],
    }


def _interface(attachment: Attachment) -> dict[str, Any]:
    return {**describe(attachment), "counters": _counters(attachment), "sessions": _sessions(attachment)}


def _counters(attachment: Attachment) -> dict[str, dict[str, int]]:
    counters = {}
    with bpf.Map.by_id(attachment.maps["counters"]) as map_:
        for index, name in enumerate(shared.COUNTERS):
            per_cpu = map_.lookup(struct.pack("=I", index)) or []
            values = [struct.unpack("=QQ", value) for value in per_cpu]
            counters[name] = {"packets": sum(packets for packets, _ in values),
                              "bytes": sum(bytes_ for _, bytes_ in values)}
    return counters


def _sessions(attachment: Attachment) -> list[dict[str, Any]]:
    """Busiest first. Keys are in network byte order; last seen is CLOCK_MONOTONIC, in ns."""
    if "sessions" not in attachment.maps:
        return []
    sessions = []
    boot = time.time() - time.monotonic()
    with bpf.Map.by_id(attachment.maps["sessions"]) as map_:
        for key in map_:
            value = map_.lookup(key)
            if value is None:
                continue  # replaced by another session meanwhile
            source, port, _ = struct.unpack("!4sHH", key)
            packets, bytes_, last_seen = struct.unpack("=QQQ", value[0])
            seen = datetime.fromtimestamp(boot + last_seen / 1e9, timezone.utc)
            sessions.append({
                "source": str(ipaddress.IPv4Address(source)), "source_port": port, "packets": packets,
                "bytes": bytes_, "last_seen": seen.strftime("%Y-%m-%dT%H:%M:%S.") + f"{seen.microsecond // 1000:03}Z",
            })
    return sorted(sessions, key=lambda session: (-session["packets"], session["source"], session["source_port"]))
