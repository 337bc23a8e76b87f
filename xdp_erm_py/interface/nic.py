"""Readies a NIC for XDP and for whole frames, and brings its old settings back.

Frames pass the interfaces below it first (see topology.py), so that the same is done to those. What was changed is a
plain dict, which the attached program carries: {"mtu": [1500, 1554], "features": ["rx-gro"], "rps": {"rx-0": ["0",
"3"]}, "below": {"7": {...}}}, the MTU before and after, the features that were on before, the masks of receive queues
before and after, and the same of interfaces below by their numbers. Undoing skips what somebody else has changed since.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import XdpErmError
from ..kernel import bpf, ethtool, rps, sysfs
from ..kernel.ethtool import Feature
from ..kernel.links import Link, Links, gone

#: Receive features, as ethtool -k has them, that are wrong with decapsulation, and what each of them does to it.
FEATURES = {
    "rx-gro": "merges mirrored segments into frames that never were on the wire",
    "rx-gro-hw": "merges frames before XDP sees them",
    "rx-lro": "merges frames before XDP sees them",
    "rx-vlan-hw-parse": "hides the outer VLAN tag from XDP and then puts it on the mirrored frame",
    "rx-vlan-stag-hw-parse": "hides the outer VLAN tag from XDP and then puts it on the mirrored frame",
    "rx-checksum": "vouches for the mirrored frame's checksum when it has seen only the wrapping's",
}

#: Leaves the wrapping's hash on the mirrored frame, which receive packet steering goes by, and nothing else.
HASHING = "rx-hashing"
#: Drivers that spread nothing over their queues without it: they clear the table that says which hash goes where.
ONE_QUEUE_WITHOUT_HASHING = ("i40e", "ice")

#: What does no harm where it cannot be turned off: Zeek believes the verdict only with AF_Packet::CHECKSUM_KERNEL.
TOLERATED = ("rx-checksum",)

_ETHERNET_HEADER = 14  # bytes
_LARGEST_MTU = (1 << 31) - 1  # that Linux knows

#: Told of a change before it is made, so that it can be undone even where the command ends half-way.
Intend = Callable[[dict[str, Any]], None]


def prepare(links: Links, stack: list[Link], least_mtu: int, set_mtu: bool, intend: Intend) -> list[str]:
    """Before attaching to the first of `stack`, which the others are below: the MTU, which is to be `least_mtu` or
    more, and the features that keep drivers from taking XDP.

    Returns a line for each thing done or left to do.
    """
    said = []
    for link, intend_here in reversed(_each(stack, intend)):  # a VLAN's MTU is no larger than that of what it stands on
        said += [f"{link.name}: warning: {line}" for line in short_buffers(link, least_mtu)]
        if link.mtu < least_mtu and set_mtu:
            intend_here({"mtu": [link.mtu, least_mtu]})
            links.set_mtu(link, least_mtu)
            said.append(f"{link.name}: set MTU to {least_mtu} (was {link.mtu})")
        elif link.mtu < least_mtu:
            said.append(f"{link.name}: warning: MTU is {link.mtu}; full-size mirrored frames need {least_mtu}: use "
                        f"--set-mtu or `ip link set dev {link.name} mtu {least_mtu}`")
        turned_off, _ = _turn_off(link, FEATURES, intend_here)
        if turned_off:
            said.append(f"{link.name}: turned off {', '.join(turned_off)}")
    return said


def short_buffers(link: Link, least_mtu: int) -> list[str]:
    """What is to be said of a NIC that cannot receive full-size mirrored frames, whatever its MTU."""
    longest = sysfs.longest_frame(link)
    wanted = least_mtu + _ETHERNET_HEADER
    if longest is None or longest >= wanted:
        return []
    return [f"the hypervisor drops frames for it of more than {longest} bytes, whatever the MTU, and full-size "
            f"mirrored ones have {wanted}: let it offer mergeable receive buffers (QEMU: mrg_rxbuf=on)"]


def settle(stack: list[Link], intend: Intend) -> list[str]:
    """Once attached: some drivers turn a feature on with XDP. Warns of what stays on and does harm.

    Returns a line for each.
    """
    said = []
    for link, intend_here in _each(stack, intend):
        turned_off, still_on = _turn_off(link, FEATURES, intend_here)
        if turned_off:
            said.append(f"{link.name}: turned off {', '.join(turned_off)}, which came on with XDP")
        said += [f"{link.name}: warning: {name} is on and the driver does not let it be turned off; it {FEATURES[name]}"
                 for name in still_on if name not in TOLERATED]
    return said


def harmful(link: Link) -> tuple[list[str], list[str]]:
    """Those of FEATURES that are on: (what may be turned off, what the driver does not let be turned off)."""
    return _active(_features(link), FEATURES)


def set_rps(stack: list[Link], cpus: tuple[int, ...], earlier: dict[str, Any], intend: Intend) -> list[str]:
    """Receive packet steering over `cpus`, by the mirrored frames' hash; over none: as it was before the changes
    `earlier`, which forget it.

    Returns a line for each thing done.
    """
    said = []
    for link, intend_here in _each(stack, intend):
        if cpus:
            said += _set_rps(link, cpus, intend_here)
        else:
            here = earlier if link is stack[0] else earlier.get("below", {}).get(str(link.index), {})
            said += _restore_rps(link, here.pop("rps", {}))
            if HASHING in here.get("features", []):
                here["features"].remove(HASHING)
                said += _turn_on(link, [HASHING])
    return said


def _set_rps(link: Link, cpus: tuple[int, ...], intend: Intend) -> list[str]:
    said = []
    turned_off, _ = _turn_off(link, (HASHING,), intend)
    if turned_off:
        said.append(f"{link.name}: turned off {HASHING}, which is the wrapping's hash")
        driver = sysfs.driver(link)
        if driver in ONE_QUEUE_WITHOUT_HASHING:
            said.append(f"{link.name}: warning: without it {driver} receives everything in one queue: `spread: cpumap` "
                        "needs no such thing")
    before, wanted = rps.masks(link), rps.mask_of(cpus)
    changed = [queue for queue, mask in before.items() if not rps.same(mask, wanted)]
    if not changed:
        return said
    intend({"rps": {queue: [before[queue], wanted] for queue in changed}})
    rps.write(link, dict.fromkeys(changed, wanted))
    after = rps.masks(link)  # the kernel leaves isolated CPUs out
    intend({"rps": {queue: [before[queue], after[queue]] for queue in changed}})
    return [*said, f"{link.name}: set receive packet steering of {', '.join(changed)} to {wanted}"]


def _restore_rps(link: Link, changes: dict[str, list[str]]) -> list[str]:
    now = rps.masks(link) if changes else {}
    back = {queue: before for queue, (before, after) in changes.items() if queue in now and rps.same(now[queue], after)}
    if not back:
        return []
    rps.write(link, back)
    return [f"{link.name}: receive packet steering of {', '.join(back)} is as before"]


def _each(stack: list[Link], intend: Intend) -> list[tuple[Link, Intend]]:
    """The interfaces, each with how its changes are told of."""
    def below(index: int) -> Intend:
        return lambda changes: intend({"below": {str(index): changes}})

    return [(link, below(link.index) if place else intend) for place, link in enumerate(stack)]


def merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Two changes as one: from the state before the earlier to the state after the later."""
    both: dict[str, Any] = {}
    mtus = [change["mtu"] for change in (earlier, later) if "mtu" in change]
    if mtus:
        both["mtu"] = [mtus[0][0], mtus[-1][1]]
    features = earlier.get("features", []) + later.get("features", [])
    if features:
        both["features"] = list(dict.fromkeys(features))
    masks = {**earlier.get("rps", {})}
    for queue, (before, after) in later.get("rps", {}).items():
        masks[queue] = [masks.get(queue, [before])[0], after]
    if masks:
        both["rps"] = masks
    below = [change.get("below", {}) for change in (earlier, later)]
    if any(below):
        both["below"] = {index: merged(below[0].get(index, {}), below[1].get(index, {}))
                         for index in {**below[0], **below[1]}}
    return both


def longest(stack: list[Link], with_rps: bool) -> dict[str, Any]:
    """Changes to these interfaces as long as they can be, for what is to have room for any; `with_rps`: set_rps() may
    be told of CPUs."""
    mask = rps.mask_of(bpf.possible_cpus())

    def here(link: Link) -> dict[str, Any]:
        return {"mtu": [_LARGEST_MTU] * 2, "features": [*FEATURES, HASHING],
                "rps": {queue: [mask] * 2 for queue in rps.masks(link)} if with_rps else {}}

    return {**here(stack[0]), "below": {str(link.index): here(link) for link in stack[1:]}}


def are_changes(value: dict[str, Any]) -> bool:
    """Whether a dict could be changes, as they are described above; it may come from a file that anything can be in."""
    mtu, features = value.get("mtu", [1, 1]), value.get("features", [])
    masks, below = value.get("rps", {}), value.get("below", {})
    return (value.keys() <= {"mtu", "features", "rps", "below"}
            and isinstance(mtu, list) and len(mtu) == 2
            and all(type(each) is int and 0 < each <= _LARGEST_MTU for each in mtu)
            and isinstance(features, list)
            and all(isinstance(name, str) and name in {*FEATURES, HASHING} for name in features)
            and isinstance(masks, dict) and all(
                isinstance(pair, list) and len(pair) == 2 and re.fullmatch(r"rx-\d+", queue)
                and all(isinstance(mask, str) and re.fullmatch("[0-9a-f]+(,[0-9a-f]+)*", mask) for mask in pair)
                for queue, pair in masks.items())
            and isinstance(below, dict) and all(
                re.fullmatch("[0-9]{1,9}", index) and isinstance(changes, dict) and are_changes(changes)
                for index, changes in below.items()))


class NotRestored(XdpErmError):
    """Some settings are not as before, and why; the others are."""


def restore(links: Links, link: Link, changes: dict[str, Any]) -> list[str]:
    """Undoes the changes; returns a line for each. NotRestored: once what can be undone is."""
    said: list[str] = []
    refused: list[str] = []
    _restore(links, link, changes, said, refused)
    if refused:
        raise NotRestored("; ".join(dict.fromkeys(refused)))
    return said


def _restore(links: Links, link: Link, changes: dict[str, Any], said: list[str], refused: list[str]) -> None:
    for undo in (functools.partial(_restore_mtu, links, link, changes.get("mtu")),
                 functools.partial(_turn_on, link, changes.get("features", [])),
                 functools.partial(_restore_rps, link, changes.get("rps", {}))):
        try:
            said += undo()
        except XdpErmError as error:
            refused.append(str(error))
    if "below" in changes:
        now = {str(other.index): other for other in links}  # an MTU may have gone along with that above
        for index, here in changes["below"].items():
            if index in now:
                _restore(links, now[index], here, said, refused)


def _restore_mtu(links: Links, link: Link, change: list[int] | None) -> list[str]:
    if change is None or link.mtu != change[1]:
        return []
    links.set_mtu(link, change[0])
    return [f"{link.name}: MTU is {change[0]} again"]


def _turn_off(link: Link, names: Iterable[str], intend: Intend) -> tuple[list[str], list[str]]:
    """(features turned off, features that stay on all the same), of those named"""
    before = _features(link)
    movable, fixed = _active(before, names)
    if movable:
        intend({"features": movable})
        _set(link, dict.fromkeys(movable, False))
    after, on = _features(link), sorted(movable + fixed)
    return [name for name in on if not after[name].on], [name for name in on if after[name].on]


def _turn_on(link: Link, names: list[str]) -> list[str]:
    """Those of the features that are off; a line for it."""
    features = _features(link)
    back = sorted(name for name in names if name in features and not features[name].on)
    if not back:
        return []
    _set(link, dict.fromkeys(back, True))
    return [f"{link.name}: turned on {', '.join(back)} again"]


def _active(features: dict[str, Feature], names: Iterable[str]) -> tuple[list[str], list[str]]:
    on = sorted(name for name in names if name in features and features[name].on)
    movable = [name for name in on if features[name].movable]
    return movable, [name for name in on if name not in movable]


def channels(link: Link) -> list[int] | None:
    """How many queues it has, see ethtool.py; None: the driver does not tell."""
    with _explained(link, "its queues cannot be counted"):
        return ethtool.channels(link.name)


def _features(link: Link) -> dict[str, Feature]:
    with _explained(link, "its offloads cannot be read"):
        return ethtool.features(link.name)


def _set(link: Link, values: dict[str, bool]) -> None:
    with _explained(link, "its offloads cannot be set"):
        ethtool.set_features(link.name, values)


@contextlib.contextmanager
def _explained(link: Link, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise gone(link) from None
        raise XdpErmError(f"{link.name}: {what}: {error.strerror}") from None
