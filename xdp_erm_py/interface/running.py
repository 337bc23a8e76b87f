"""Whether the driver runs the program that it took: some take one and never run it, and every counter stands still.

What the interface has received is held against what the program has counted, both since it was attached. The driver's
own number may be late by seconds, and has frames that no program sees (of a bond's inactive slave, or dropped on their
way). So a program is only said not to run that counts nothing at all while frames come.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from .. import shared
from ..kernel import sysfs
from ..kernel.links import Links
from . import stats
from .ours import Attachment

#: Packets that must have come unseen, so that it is worth a look, and that must come unseen while we look.
SUSPECTED, CERTAIN = 100, 10

#: Why frames are lost before any program, as uapi linux/if_link.h explains them, and what to do about it.
LOSSES = {
    "rx_length_errors": "longer than the interface's MTU lets in: raise it (`--set-mtu`)",
    "rx_over_errors": "longer than the NIC's buffers: raise the MTU (`--set-mtu`)",
    "rx_missed_errors": "not fetched from the NIC in time: longer rings (`ethtool -G`), or more queues",
    "rx_fifo_errors": "not fetched from the NIC in time: longer rings (`ethtool -G`), or more queues",
    "rx_crc_errors": "damaged on the wire: cable, transceiver, duplex",
    "rx_frame_errors": "damaged on the wire: cable, transceiver, duplex",
}
_REMEMBERED = ("rx_packets", "rx_errors", *LOSSES)


class Since(NamedTuple):
    """What came since the program was attached."""

    received: int
    """By the interface."""
    seen: int
    """By the program."""
    lost: dict[str, int]
    """Frames that neither got, by rx_errors and the names of LOSSES."""


def baseline(links: Links, attachment: Attachment) -> dict[str, int]:
    """What a program's state has to remember at first. Raises as stats.read()."""
    statistics = links.statistics(attachment.link)
    return {"seen": _seen(attachment), **{name: statistics[name] for name in _REMEMBERED}}


def since(links: Links, attachment: Attachment) -> Since | None:
    """None: that is not known, as an earlier version attached it, or the driver's counters began anew (a reset)."""
    first = attachment.state.get("received")
    if first is None:
        return None
    statistics = links.statistics(attachment.link)  # first, as what the program has seen grows meanwhile
    grown = {name: statistics[name] - first[name] for name in _REMEMBERED}
    seen = _seen(attachment) - first["seen"]
    if min(seen, *grown.values()) < 0:
        return None
    return Since(grown.pop("rx_packets"), seen, {name: frames for name, frames in grown.items() if frames})


def unseen(links: Links, attachment: Attachment, patience: float, suspected: int = SUSPECTED) -> int:
    """How many packets came and were not seen by the program, which the driver does not run; 0: it runs, or that cannot
    be told because nothing comes.

    Looks for at most `patience` seconds, and only where `suspected` packets are missing.
    """
    first = now = since(links, attachment)
    deadline = time.monotonic() + patience
    while True:
        if first is None or now is None or first.received - first.seen < suspected or now.seen > first.seen:
            return 0
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
        now = since(links, attachment)
    missed = now.received - (first.received if first.seen else 0)
    return missed if now.received - first.received >= CERTAIN else 0


def told(attachment: Attachment, missed: int) -> str:
    """What is so where the driver does not run the program, and what to do."""
    name = attachment.link.name
    if attachment.mode == "generic":
        return (f"the program is not run: it has seen none of the last {missed} packets: `xdp-erm detach {name}`, then "
                "attach to the interface that they come in on")
    return (f"{not_run(attachment)}: it has seen none of the last {missed} packets: `xdp-erm attach --mode generic "
            f"{name}` works with every driver")


def not_run(attachment: Attachment) -> str:
    """What is so of a driver that does not run the program."""
    driver = sysfs.driver(attachment.link)
    return f"the driver{f' ({driver})' if driver else ''} does not run the program"


def _seen(attachment: Attachment) -> int:
    counters = stats.counters(attachment)
    return sum(counters[verdict]["packets"] for verdict in shared.VERDICTS)
