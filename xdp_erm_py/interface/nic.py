"""Readies a NIC for XDP and for whole frames, and brings its old settings back.

What was changed is a plain dict, which the attached program carries: {"mtu": [1500, 1554], "features": ["rx-gro"],
"rps": {"rx-0": ["0", "3"]}}, the MTU before and after, the features that were on before, and the masks of receive
queues before and after. Undoing skips what somebody else has changed since.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from ..errors import XdpErmError
from ..kernel import ethtool, rps
from ..kernel.ethtool import Feature
from ..kernel.links import Link, Links, gone

#: A full-size mirrored frame (1514 bytes) in ERM, UDP and IPv4, as an MTU: without the outer Ethernet header.
FULL_FRAME_MTU = 1514 + 12 + 8 + 20

#: Receive features, as ethtool -k has them, that are wrong with decapsulation, and what each of them does to it.
FEATURES = {
    "rx-gro": "merges mirrored segments into frames that never were on the wire",
    "rx-gro-hw": "merges frames before XDP sees them",
    "rx-lro": "merges frames before XDP sees them",
    "rx-vlan-hw-parse": "hides the outer VLAN tag from XDP and then puts it on the mirrored frame",
    "rx-vlan-stag-hw-parse": "hides the outer VLAN tag from XDP and then puts it on the mirrored frame",
    "rx-hashing": "leaves the wrapping's hash on the mirrored frame",
    "rx-checksum": "vouches for the mirrored frame's checksum when it has seen only the wrapping's",
}


#: Told of a change before it is made, so that it can be undone even where the command ends half-way.
Intend = Callable[[dict[str, Any]], None]


def prepare(links: Links, link: Link, set_mtu: bool, intend: Intend) -> list[str]:
    """Before attaching: the MTU, and the features that keep drivers from taking XDP.

    Returns a line for each thing done or left to do.
    """
    said = []
    if link.mtu < FULL_FRAME_MTU and set_mtu:
        intend({"mtu": [link.mtu, FULL_FRAME_MTU]})
        links.set_mtu(link, FULL_FRAME_MTU)
        said.append(f"{link.name}: set MTU to {FULL_FRAME_MTU} (was {link.mtu})")
    elif link.mtu < FULL_FRAME_MTU:
        said.append(f"{link.name}: warning: MTU is {link.mtu}; full-size mirrored frames need {FULL_FRAME_MTU}: use "
                    f"--set-mtu or `ip link set dev {link.name} mtu {FULL_FRAME_MTU}`")
    turned_off, _ = _turn_off(link, intend)
    if turned_off:
        said.append(f"{link.name}: turned off {', '.join(turned_off)}")
    return said


def settle(link: Link, intend: Intend) -> list[str]:
    """Once attached: some drivers turn a feature on with XDP. Warns of what stays on. Returns a line for each."""
    turned_off, still_on = _turn_off(link, intend)
    said = [f"{link.name}: turned off {', '.join(turned_off)}, which came on with XDP"] if turned_off else []
    said += [f"{link.name}: warning: {name} is on and the driver does not let it be turned off; it {FEATURES[name]}"
             for name in still_on]
    return said


def harmful(link: Link) -> tuple[list[str], list[str]]:
    """Those of FEATURES that are on: (what may be turned off, what the driver does not let be turned off)."""
    return _harmful(_features(link))


def steer(link: Link, cpus: tuple[int, ...], earlier: dict[str, Any], intend: Intend) -> list[str]:
    """Receive packet steering over `cpus`; over none: as it was before the changes `earlier`, which forget it.

    Returns a line for what was done.
    """
    if not cpus:
        return _unsteer(link, earlier.pop("rps", {}))
    before, wanted = rps.masks(link), rps.mask_of(cpus)
    changed = [queue for queue, mask in before.items() if not rps.same(mask, wanted)]
    if not changed:
        return []
    intend({"rps": {queue: [before[queue], wanted] for queue in changed}})
    rps.write(link, dict.fromkeys(changed, wanted))
    after = rps.masks(link)  # the kernel leaves isolated CPUs out
    intend({"rps": {queue: [before[queue], after[queue]] for queue in changed}})
    return [f"{link.name}: set receive packet steering of {', '.join(changed)} to {wanted}"]


def _unsteer(link: Link, changes: dict[str, list[str]]) -> list[str]:
    now = rps.masks(link) if changes else {}
    back = {queue: before for queue, (before, after) in changes.items() if queue in now and rps.same(now[queue], after)}
    if not back:
        return []
    rps.write(link, back)
    return [f"{link.name}: receive packet steering of {', '.join(back)} is as before"]


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
    return both


def restore(links: Links, link: Link, changes: dict[str, Any]) -> list[str]:
    """Undoes the changes; returns a line for each."""
    said = []
    if "mtu" in changes:
        before, after = changes["mtu"]
        if link.mtu == after:
            links.set_mtu(link, before)
            said.append(f"{link.name}: MTU is {before} again")
    features = _features(link)
    back = sorted(name for name in changes.get("features", []) if name in features and not features[name].on)
    if back:
        _set(link, dict.fromkeys(back, True))
        said.append(f"{link.name}: turned on {', '.join(back)} again")
    return said + _unsteer(link, changes.get("rps", {}))


def _turn_off(link: Link, intend: Intend) -> tuple[list[str], list[str]]:
    """(features turned off, features that stay on all the same)"""
    before = _features(link)
    movable, fixed = _harmful(before)
    if movable:
        intend({"features": movable})
        _set(link, dict.fromkeys(movable, False))
    after, on = _features(link), sorted(movable + fixed)
    return [name for name in on if not after[name].on], [name for name in on if after[name].on]


def _harmful(features: dict[str, Feature]) -> tuple[list[str], list[str]]:
    on = sorted(name for name in FEATURES if name in features and features[name].on)
    movable = [name for name in on if features[name].movable]
    return movable, [name for name in on if name not in movable]


def _features(link: Link) -> dict[str, Feature]:
    try:
        return ethtool.features(link.name)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise gone(link.name) from None
        raise XdpErmError(f"{link.name}: its offloads cannot be read: {error.strerror}") from None


def _set(link: Link, values: dict[str, bool]) -> None:
    try:
        ethtool.set_features(link.name, values)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise gone(link.name) from None
        raise XdpErmError(f"{link.name}: its offloads cannot be set: {error.strerror}") from None
