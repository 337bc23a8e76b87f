"""The counters of the XDP program: what they are called and mean stands in bpf/shared.h, what to do about them here."""

from __future__ import annotations

from typing import NamedTuple

from .. import shared


class Counter(NamedTuple):
    """One counter, by which stats, doctor, reports, metrics and documentation go."""

    name: str
    is_note: bool
    """Whether it stands beside the verdict `decapsulated`; else it is a verdict, and every packet has exactly one."""
    meaning: str
    cure: str | None
    """What to do where it grows; None: nothing, that is as it should be."""
    tolerated: float
    """As a share (0 to 1) of what could be counted so: up to it, it is not worth a word."""


_CURES = {
    "fragment": "it comes in fragments, which XDP cannot reassemble: raise the MTU on its way (ERM: 1554 or more)",
    "truncated": "it is cut: raise the MTU on its way, and the interface's (ERM: 1554 or more)",
    "malformed": "its headers contradict each other: find out who sends it, and whether it is a mirror's",
    "extension": "it comes in IPv6 with an extension header, into which nobody looks: find out what sends it so",
    "foreign_source": "its source is not in `sources`: add the switch, or find out who sends it",
    "foreign_target": "its target is not in `targets`: add the address, or find out who sends it",
    "failed": "a kernel helper refused, as for jumbo frames in several pieces with padding behind them; where the "
              "headers are in several, `mode: auto` changes to generic mode at the next attach",
    "unmarked": "the driver has no room for the mark that keeps it out of the host, so that it stays wrapped: set "
                "`mode: generic`, or `isolate: false`",
    "nested_refused": "they are wrapped themselves and stay so: if a switch of yours sends them, add it to `sources` "
                      "and set `depth`; else a mirrored host does, and may hide its traffic so",
    "inner_truncated": "they are cut: take `truncation` off the mirror session, and raise the MTU on its way (ERM: "
                       "1554 or more)",
}

# A single frame may be somebody who tries; of all else there is a little in every network.
_TOLERATED = {"nested_refused": 0.0}

#: All of them, by their index in the kernel's map.
COUNTERS = tuple(Counter(name, name in shared.NOTES, shared.MEANINGS[name], _CURES.get(name),
                         _TOLERATED.get(name, 0.01))
                 for name in shared.COUNTERS)
BY_NAME = {counter.name: counter for counter in COUNTERS}
