"""What was counted, and where: by the program over all of its lives, by the interfaces, at both ends of the wire."""

from __future__ import annotations

import collections
import contextlib
import struct
import time
from typing import NamedTuple

from pyroute2 import IPRoute

from xdp_erm_py import shared
from xdp_erm_py.interface import ours
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SWITCH_INTERFACE, Cable

Counts = collections.Counter

SECONDS = 60  # to wait for what must come


class Life(NamedTuple):
    """Counters from an attach to the detach; swaps hand them on."""

    attached_at: str
    counters: bpf.Map


class Books:
    """Holds the maps of every program seen, so that what they counted last is known when it is gone."""

    def __init__(self, cable: Cable) -> None:
        self._cable = cable
        self._opened = contextlib.ExitStack()
        self.lives: dict[int, Life] = {}
        self._queues: dict[str, dict[int, bpf.Map]] = {"steered": {}, "arrived": {}}
        self.programs: set[int] = set()
        self.maps: set[int] = set()
        self._devices: Counts[str] = Counts()  # of interfaces that are gone

    def close(self) -> None:
        self._opened.close()

    def look(self) -> None:
        """To be called after each command, as it may have attached."""
        with Links() as links:
            for found in ours.find_all(links):
                self.programs.add(found.program_id)
                self.maps.update(found.maps.values())
                for name, map_id in found.maps.items():
                    known = self.lives if name == "counters" else self._queues.get(name)
                    if known is not None and map_id not in known:
                        map_ = self._opened.enter_context(bpf.Map.by_id(map_id))
                        if name == "counters":
                            self.lives[map_id] = Life(found.state["attached_at"], map_)
                        else:
                            self._queues[name][map_id] = map_

    def keep_devices(self, name: str) -> None:
        """To be called before the interfaces are deleted."""
        self._devices = self.devices(name)

    def devices(self, name: str) -> Counts[str]:
        """What the kernel says of the cable: `received` at the sensor, `dropped` before, `backlog` behind.

        A frame that is too long for the sensor is in both of the latter.
        """
        counts = Counts(self._devices)
        for namespace, interface, fields in (
                (self._cable.switch, SWITCH_INTERFACE, {"tx_dropped": "dropped"}),
                (self._cable.sensor, name, {"rx_packets": "received", "rx_dropped": "backlog"})):
            with namespace.entered(), IPRoute() as route:
                statistics = route.link("get", ifname=interface)[0].get_attr("IFLA_STATS64")
                for field, count in fields.items():
                    counts[count] += statistics[field]
        return counts

    def counted(self) -> Counts[str]:
        """Packets by counter, and `queue drops`."""
        counts: Counts[str] = Counts()
        for life in self.lives.values():
            for (counter, unit), value in _counters(life).items():
                counts[counter] += 0 if unit else value
        steered, arrived = ({map_id: _sum(map_) for map_id, map_ in self._queues[name].items()}
                            for name in ("steered", "arrived"))
        counts["queue drops"] = sum(steered.values()) - sum(arrived.values())
        return counts

    def counted_by_life(self) -> dict[str, Counts[tuple[str, int]]]:
        """By when it was attached, as reports have it."""
        lives: dict[str, Counts[tuple[str, int]]] = collections.defaultdict(Counts)
        for life in self.lives.values():
            lives[life.attached_at.replace("Z", ".000")] += _counters(life)
        return lives


def _counters(life: Life) -> Counts[tuple[str, int]]:
    """Packets (0) and bytes (1) by counter."""
    counts: Counts[tuple[str, int]] = Counts()
    for index, name in enumerate(shared.COUNTERS):
        for value in life.counters.lookup(struct.pack("=I", index)) or []:
            for unit, number in enumerate(struct.unpack("=QQ", value)):
                counts[name, unit] += number
    return counts


def _sum(map_: bpf.Map) -> int:
    return sum(struct.unpack("=Q", value)[0] for index in range(map_.info.max_entries)
               for value in map_.lookup(struct.pack("=I", index)) or [])


def settled(read: object, seconds: float = 0.3) -> None:
    """Returns when what `read()` gives has not changed for so many seconds."""
    assert callable(read)
    deadline, since, last = time.monotonic() + SECONDS, time.monotonic(), read()
    while time.monotonic() - since < seconds and time.monotonic() < deadline:
        time.sleep(0.02)
        now = read()
        if now != last:
            since, last = time.monotonic(), now
