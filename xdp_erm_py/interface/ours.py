"""Finds our program on an interface, and what it knows of itself.

There is no state file: the interface names its program, the program its maps, and one of these, `xdp_erm_state`, holds
what later commands need to know, as JSON. It lives and dies with the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, TypeVar

from ..errors import XdpErmError
from ..kernel import bpf
from ..kernel.links import Link, Links
from ..program import compiler
from . import nic

STATE_MAP = "xdp_erm_state"
_STATE_KEY = bytes(4)
_STATE_TYPES = {"version": str, "digest": str, "config": dict, "nic": dict}
Seen = TypeVar("Seen")
_TIME = "%Y-%m-%dT%H:%M:%SZ"  # UTC


@dataclasses.dataclass
class Attachment:
    """Our program on an interface."""

    link: Link
    state: dict[str, Any]
    """id (of the attachment: swaps keep it), version, digest, config, attached_at, since_boot (the same moment in
    seconds since boot), spread (a spread.Plan), frags (whether it takes frames in several pieces of memory), filter
    (that it relies on, see isolation.py), why_generic (the mode, where native was to be tried; None: it was not),
    mtu (the interface's, in bytes above the Ethernet header), channels (its queues, see nic.py), received (what
    interface and program had counted at first, see running.py), nic (what was changed for it, see nic.py)"""
    maps: dict[str, int]
    """The program's maps: ids by name."""
    room: int
    """Bytes that its state can have, see room()."""

    @property
    def program_id(self) -> int:
        assert self.link.program_id is not None
        return self.link.program_id

    @property
    def mode(self) -> str:
        assert self.link.mode is not None
        return self.link.mode

    @property
    def outdated(self) -> str | None:
        """What has changed on the interface since, so that another way to attach may be due; None: nothing.

        After a change of the MTU or of queues some drivers do not run the program any more, and say nothing.
        """
        then = self.state.get("mtu")  # None: put there by an earlier version
        if then not in (None, self.link.mtu):
            return f"its MTU was changed from {then} to {self.link.mtu}"
        queues = self.state.get("channels")  # None: likewise, or the driver does not tell
        return None if queues in (None, nic.channels(self.link)) else "its numbers of queues were changed"


def undisturbed(look: Callable[[], Seen]) -> Seen:
    """What `look` returns once no program or map is swapped or detached under it (bpf.Gone)."""
    while True:
        with contextlib.suppress(bpf.Gone):
            return look()


def find(links: Links, name: str) -> Attachment | None:
    """Our program on interface `name`; None where there is none or somebody else's."""
    return undisturbed(lambda: _attachment_of(links.find(name)))


def find_all(links: Links) -> list[Attachment]:
    """Our programs on the interfaces of this network namespace."""
    found = undisturbed(lambda: [_attachment_of(link) for link in links])
    return [attachment for attachment in found if attachment is not None]


def attachment_of(link: Link) -> Attachment | None:
    """Our program on `link`, recognised by its state map."""
    try:
        return _attachment_of(link)
    except bpf.Gone:
        return None  # detached while we looked


def _attachment_of(link: Link) -> Attachment | None:
    """bpf.Gone: the program is gone by now."""
    if link.program_id is None:
        return None
    with bpf.descriptor(bpf.program_fd(link.program_id)) as program:
        info = bpf.program_info(program)
        if info.name != compiler.PROGRAM:
            return None
        maps = {}
        state, room = None, 0
        for map_id in info.map_ids:
            with bpf.Map.by_id(map_id) as map_:
                maps[map_.info.name] = map_id
                if map_.info.name == STATE_MAP:
                    value, room = map_.lookup(_STATE_KEY), map_.info.value_size
                    state = _state(value[0]) if value else None
    return Attachment(link, state, maps, room) if state else None


def _state(value: bytes) -> dict[str, Any] | None:
    """What a state map says. None: no state of ours, as any root process can make a map of that name."""
    try:
        state = json.loads(value.rstrip(b"\0"))
        datetime.strptime(state["attached_at"], _TIME)
        plausible = all(isinstance(state[key], kind) for key, kind in _STATE_TYPES.items())
        plausible &= isinstance(state.setdefault("id", state["attached_at"]), str)  # versions before it had none
        plan = state.get("spread")  # likewise
        if plan:
            plausible &= isinstance(plan["how"], str) and all(type(cpu) is int for cpu in plan["cpus"])
        relied = state.get("filter")
        if relied:
            plausible &= type(relied["program"]) is int and isinstance(relied["digest"], str)
            plausible &= type(relied.get("balance")) in (int, type(None))
        plausible &= type(state.get("why_generic")) in (str, type(None))
        plausible &= type(state.get("mtu")) in (int, type(None))
        plausible &= type(state.get("channels")) in (list, type(None))
        received = state.get("received")
        if received:
            plausible &= all(type(number) is int for number in received.values())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return state if plausible else None


def room(state: dict[str, Any], changes: dict[str, Any]) -> int:
    """Bytes of a state, once these changes to the NIC are a part of it."""
    return len(json.dumps({**state, "nic": nic.merged(state["nic"], changes)}))


def write_state(state_map: bpf.Map, state: dict[str, Any]) -> None:
    """Puts the state into its map, padded with NUL bytes. XdpErmError: there is no room for it."""
    value, size = json.dumps(state).encode(), state_map.info.value_size
    if len(value) > size:
        raise XdpErmError(f"the program has no room for {len(value)} bytes of state, only for {size}")
    state_map.update(_STATE_KEY, value.ljust(size, b"\0"))


def now() -> str:
    """The time, as a state has it."""
    return datetime.now(timezone.utc).strftime(_TIME)
