"""Keeps decapsulated frames out of the host's own network stack, by a filter on the interface's clsact qdisc.

The filter (bpf/isolate.c) is known by its name, which also says whether the qdisc was made for it: there is no other
state. Needs pyroute2, which is imported only here where filters are looked at or changed.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from . import bpf, compiler
from .errors import XdpErmError
from .links import Link, gone

FILTER = "xdp_erm_isolate"
#: The filter's name where the qdisc was made for it and goes with it.
FILTER_AND_QDISC = "xdp_erm_isolate+clsact"

#: Drivers whose native XDP has no metadata, so that the program could not mark what it decapsulates.
DRIVERS_WITHOUT_METADATA = ("ena", "gve", "mana", "sfc")

# uapi linux/pkt_sched.h and if_ether.h
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_ETH_P_ALL = 3


def lacks_metadata(link: Link) -> str | None:
    """The interface's driver, if its native XDP is known to have no metadata. /sys must be of our network namespace."""
    try:
        driver = os.path.basename(os.readlink(Path("/sys/class/net") / link.name / "device" / "driver"))
    except OSError:
        return None  # a virtual interface, all of which have it
    return driver if driver in DRIVERS_WITHOUT_METADATA else None


def is_isolated(link: Link) -> bool:
    """Whether the filter is there."""
    with _route() as route:
        return _ours(_filters(route, link, _INGRESS)) is not None


def isolate(link: Link) -> list[str]:
    """Puts the filter before the interface's others, where it is not there yet. Returns a line for what was done."""
    with _route() as route:
        filters = _filters(route, link, _INGRESS)
        if _ours(filters):
            return []
        instructions, license = compiler.classifier()
        try:
            program = bpf.load_classifier(FILTER, instructions, license)
        except OSError as error:
            raise _failed(link, f"the kernel does not load the filter: {error.strerror}") from None
        try:
            made = _make_qdisc(route, link)
            preference, before = _preference(filters)
            try:
                route.tc("add-filter", "bpf", link.index, 0, fd=program, name=FILTER_AND_QDISC if made else FILTER,
                         parent=_INGRESS, prio=preference, protocol=_ETH_P_ALL, classid=0, direct_action=True)
            except _netlink_error() as error:
                if made and error.code != errno.ENODEV:
                    route.tc("del", "clsact", link.index)
                raise _failed(link, f"the kernel takes no BPF filter: {_reason(link, error)}") from None
        finally:
            os.close(program)
    said = [f"{link.name}: decapsulated frames are kept from the host's own network stack"]
    if before:
        said.append(f"{link.name}: warning: filters of preference {', '.join(map(str, before))} come before that and "
                    f"still see decapsulated frames")
    return said


def release(link: Link) -> list[str]:
    """Removes the filter, and the qdisc if it was made for it and nobody else uses it. Returns a line for it."""
    with _route() as route:
        ours = _ours(_filters(route, link, _INGRESS))
        if ours is None:
            return []
        name, preference, handle = ours
        try:
            route.tc("del-filter", "bpf", link.index, handle, parent=_INGRESS, prio=preference, protocol=_ETH_P_ALL)
            others = _filters(route, link, _INGRESS) + _filters(route, link, _EGRESS)
            if name == FILTER_AND_QDISC and not others:
                route.tc("del", "clsact", link.index)
        except _netlink_error() as error:
            raise XdpErmError(f"{link.name}: the filter {FILTER} cannot be removed: {_reason(link, error)}; `tc "
                              f"filter del dev {link.name} ingress pref {preference}` does it") from None
    return [f"{link.name}: the host's own network stack sees all frames again"]


def _make_qdisc(route: Any, link: Link) -> bool:
    """Whether it was made: False where there is a clsact or ingress qdisc already, which does as well."""
    try:
        route.tc("add", "clsact", link.index)
    except _netlink_error() as error:
        if error.code == errno.EEXIST:
            return False
        raise _failed(link, f"the kernel gives no clsact qdisc: {_reason(link, error)}") from None
    return True


def _failed(link: Link, reason: str) -> XdpErmError:
    return XdpErmError(f"{link.name}: decapsulated frames cannot be kept from the host's own network stack, {reason}; "
                       "isolate: false (--no-isolate) attaches without")


def _filters(route: Any, link: Link, parent: int) -> list[tuple[int, str, str | None, int]]:
    """(preference, kind, name of a BPF filter, handle) of an interface's filters, in the order in which they run.

    Each preference also has an entry of its own, with handle 0.
    """
    filters = []
    try:
        for found in route.get_filters(index=link.index, parent=parent):
            options = found.get_attr("TCA_OPTIONS")
            name = options.get_attr("TCA_BPF_NAME") if options and found.get_attr("TCA_KIND") == "bpf" else None
            filters.append((found["info"] >> 16, found.get_attr("TCA_KIND"), name, found["handle"]))
    except _netlink_error() as error:
        if error.code != errno.EINVAL:  # no qdisc that could have filters
            raise XdpErmError(f"{link.name}: its filters cannot be read: {_reason(link, error)}") from None
    return filters


def _ours(filters: list[tuple[int, str, str | None, int]]) -> tuple[str, int, int] | None:
    """(name, preference, handle) of our filter."""
    return next(((name, preference, handle) for preference, _, name, handle in filters
                 if name in (FILTER, FILTER_AND_QDISC)), None)


def _preference(filters: list[tuple[int, str, str | None, int]]) -> tuple[int, list[int]]:
    """The lowest preference that BPF filters can have, and those before it.

    All filters of a preference are of one kind; among BPF filters the newest comes first.
    """
    others = {preference for preference, kind, *_ in filters if kind != "bpf"}
    preference = 1
    while preference in others:
        preference += 1
    return preference, sorted(other for other in others if other < preference)


def _reason(link: Link, error: Any) -> str:
    if error.code == errno.ENODEV:
        raise gone(link.name) from None
    return os.strerror(error.code)


def _route() -> Any:
    from pyroute2 import IPRoute
    return IPRoute()


def _netlink_error() -> Any:
    from pyroute2.netlink.exceptions import NetlinkError
    return NetlinkError
