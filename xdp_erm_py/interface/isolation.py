"""Keeps decapsulated frames out of the host's own network stack, by a filter on the interface's clsact qdisc.

The filter (bpf/isolate.c) is known by its name, which also says of which source it is and whether the qdisc was made
for it: there is no other state.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from ..errors import XdpErmError
from ..kernel import sysfs
from ..kernel.links import Link, gone
from ..kernel.netlink import CREATE, DUMP, EXCLUSIVE, NESTED, Refused, Rtnetlink, attribute, attributes, text
from ..program import compiler
from ..program.module import Module
from .nic import Intend

#: What the filter's name begins with. A digest of its source follows, and _QDISC where the qdisc was made for it and
#: goes with it.
FILTER = "xdp_erm_isolate"
_QDISC = "+clsact"

#: Drivers whose native XDP has no metadata, so that the program could not mark what it decapsulates.
DRIVERS_WITHOUT_METADATA = ("ena", "gve", "mana", "sfc")

# uapi linux/rtnetlink.h, pkt_sched.h, pkt_cls.h and if_ether.h
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS = 6, 7, 8
_DIRECT_ACTION = 1
_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_ALL_PROTOCOLS = socket.htons(3)
_TC = struct.Struct("=B3xiIII")  # family, interface, handle, parent, preference << 16 | protocol in network byte order


class _Filter(NamedTuple):
    preference: int
    handle: int
    """0: the entry that each preference has of its own"""
    kind: str
    name: str | None
    """of a BPF filter"""


def lacks_metadata(link: Link) -> str | None:
    """The interface's driver, if its native XDP is known to have no metadata. Virtual interfaces all have it."""
    name = sysfs.driver(link)
    return name if name in DRIVERS_WITHOUT_METADATA else None


def is_isolated(link: Link) -> bool:
    """Whether the filter is there."""
    with Rtnetlink() as rtnetlink:
        return any(map(_is_ours, _filters(rtnetlink, link, _INGRESS)))


def isolate(link: Link, intend: Intend) -> list[str]:
    """Puts the filter before the interface's others, where it is not there yet. Returns a line for what was done.

    One of another source stays as well, for the program that relies on it: retire() removes it once that is replaced.
    """
    with Rtnetlink() as rtnetlink:
        filters = _filters(rtnetlink, link, _INGRESS)
        ours = [filter_ for filter_ in filters if _is_ours(filter_)]
        if any(map(_is_current, ours)):
            return []
        try:
            with Module(compiler.classifier()) as module:
                program = module.load_classifier(compiler.CLASSIFIER, FILTER)
        except OSError as error:
            raise _failed(link, f"the kernel does not load the filter: {error.strerror}") from None
        try:
            made = _make_qdisc(rtnetlink, link, intend)
            preference, before = _preference(filters)
            name = _name() + (_QDISC if made or any(map(_has_qdisc, ours)) else "")
            try:
                _add_filter(rtnetlink, link, preference, program, name)
            except Refused as refused:
                if made and refused.code != errno.ENODEV:
                    _remove_qdisc(rtnetlink, link)
                raise _failed(link, f"the kernel takes no BPF filter: {_reason(link, refused)}") from None
        finally:
            os.close(program)
    said = [f"{link.name}: decapsulated frames are kept from the host's own network stack"
            + (", by a newer filter" if ours else "")]
    if before:
        said.append(f"{link.name}: warning: filters of preference {', '.join(map(str, before))} come before that and "
                    f"still see decapsulated frames")
    return said


def retire(link: Link) -> None:
    """Removes filters of other sources."""
    _remove(link, lambda filter_: not _is_current(filter_))


def withdraw(link: Link) -> None:
    """Undoes isolate()."""
    _remove(link, _is_current)


def release(link: Link) -> list[str]:
    """Removes the filter, and the qdisc if it was made for it and nobody else uses it. Returns a line for it."""
    if _remove(link, lambda _: True):
        return [f"{link.name}: the host's own network stack sees all frames again"]
    return []


def mend(link: Link) -> list[str]:
    """Removes the qdisc that isolate() has made, if it was killed before it used it. Returns a line for it."""
    with Rtnetlink() as rtnetlink:
        filters = _filters(rtnetlink, link, _INGRESS) + _filters(rtnetlink, link, _EGRESS)
        try:
            if filters or _qdisc_kind(rtnetlink, link) != "clsact":
                return []
            _remove_qdisc(rtnetlink, link)
        except Refused as refused:
            raise XdpErmError(f"{link.name}: the clsact qdisc cannot be removed: {_reason(link, refused)}; `tc qdisc "
                              f"del dev {link.name} clsact` does it") from None
    return [f"{link.name}: removed the clsact qdisc"]


def _remove(link: Link, chosen: Callable[[_Filter], bool]) -> bool:
    """Removes those of our filters; whether there were any."""
    with Rtnetlink() as rtnetlink:
        filters = _filters(rtnetlink, link, _INGRESS)
        ours = [filter_ for filter_ in filters if _is_ours(filter_) and chosen(filter_)]
        filters += _filters(rtnetlink, link, _EGRESS)
        try:
            if any(map(_has_qdisc, ours)) and not any(other.handle for other in filters if other not in ours):
                _remove_qdisc(rtnetlink, link)  # takes the filters with it
            else:
                for filter_ in ours:
                    _remove_filter(rtnetlink, link, filter_)
        except Refused as refused:
            raise XdpErmError(f"{link.name}: the filter {FILTER} cannot be removed: {_reason(link, refused)}; `tc "
                              f"filter del dev {link.name} ingress pref {ours[0].preference}` does it") from None
    return bool(ours)


def _failed(link: Link, reason: str) -> XdpErmError:
    return XdpErmError(f"{link.name}: decapsulated frames cannot be kept from the host's own network stack, {reason}; "
                       "isolate: false (--no-isolate) attaches without")


def _reason(link: Link, refused: Refused) -> str:
    if refused.code == errno.ENODEV:
        raise gone(link.name) from None
    return str(refused)


def _name() -> str:
    return f"{FILTER}-{compiler.classifier_digest()}"


def _is_ours(filter_: _Filter) -> bool:
    return filter_.name is not None and filter_.name.removesuffix(_QDISC).partition("-")[0] == FILTER


def _is_current(filter_: _Filter) -> bool:
    """Of ours: whether it is of the same source as what isolate() puts there."""
    return filter_.name is not None and filter_.name.removesuffix(_QDISC) == _name()


def _has_qdisc(filter_: _Filter) -> bool:
    return filter_.name is not None and filter_.name.endswith(_QDISC)


def _preference(filters: list[_Filter]) -> tuple[int, list[int]]:
    """The lowest preference that BPF filters can have, and those before it.

    All filters of a preference are of one kind; among BPF filters the newest comes first.
    """
    others = {filter_.preference for filter_ in filters if filter_.kind != "bpf"}
    preference = 1
    while preference in others:
        preference += 1
    return preference, sorted(other for other in others if other < preference)


# Requests; all of them raise Refused, if not said otherwise.

def _make_qdisc(rtnetlink: Rtnetlink, link: Link, intend: Intend) -> bool:
    """Whether it was made: False where there is a clsact or ingress qdisc already, which does as well.

    XdpErmError: the kernel has none.
    """
    try:
        if _qdisc_kind(rtnetlink, link) is not None:
            return False
        intend({"clsact": True})
        rtnetlink.request(_RTM_NEWQDISC, CREATE | EXCLUSIVE, _qdisc(link))
    except Refused as refused:
        if refused.code == errno.EEXIST:
            return False  # somebody made it just now
        raise _failed(link, f"the kernel gives no clsact qdisc: {_reason(link, refused)}") from None
    return True


def _qdisc_kind(rtnetlink: Rtnetlink, link: Link) -> str | None:
    """clsact or ingress; None where there is neither."""
    for body in rtnetlink.request(_RTM_GETQDISC, DUMP, _TC.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, index, _, parent, _ = _TC.unpack_from(body)
        if (index, parent) == (link.index, _CLSACT_PARENT):
            return text(attributes(body[_TC.size:])[_TCA_KIND])
    return None


def _remove_qdisc(rtnetlink: Rtnetlink, link: Link) -> None:
    rtnetlink.request(_RTM_DELQDISC, 0, _qdisc(link))


def _qdisc(link: Link) -> bytes:
    return _TC.pack(socket.AF_UNSPEC, link.index, _CLSACT_HANDLE, _CLSACT_PARENT, 0) + attribute(_TCA_KIND, b"clsact\0")


def _add_filter(rtnetlink: Rtnetlink, link: Link, preference: int, program: int, name: str) -> None:
    options = attribute(_TCA_BPF_FD, struct.pack("=i", program)) + attribute(_TCA_BPF_NAME, name.encode() + b"\0")
    options += attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    rtnetlink.request(_RTM_NEWTFILTER, CREATE | EXCLUSIVE,
                      _filter(link, 0, preference) + attribute(_TCA_OPTIONS | NESTED, options))


def _remove_filter(rtnetlink: Rtnetlink, link: Link, filter_: _Filter) -> None:
    rtnetlink.request(_RTM_DELTFILTER, 0, _filter(link, filter_.handle, filter_.preference))


def _filter(link: Link, handle: int, preference: int) -> bytes:
    head = _TC.pack(socket.AF_UNSPEC, link.index, handle, _INGRESS, preference << 16 | _ALL_PROTOCOLS)
    return head + attribute(_TCA_KIND, b"bpf\0")


def _filters(rtnetlink: Rtnetlink, link: Link, parent: int) -> list[_Filter]:
    """An interface's filters, in the order in which they run. XdpErmError: they cannot be read."""
    try:
        answers = rtnetlink.request(_RTM_GETTFILTER, DUMP, _TC.pack(socket.AF_UNSPEC, link.index, 0, parent, 0))
    except Refused as refused:
        if refused.code == errno.EINVAL:
            return []  # no qdisc that could have any
        raise XdpErmError(f"{link.name}: its filters cannot be read: {_reason(link, refused)}") from None
    filters = []
    for body in answers:
        _, _, handle, _, info = _TC.unpack_from(body)
        found = attributes(body[_TC.size:])
        kind, name = text(found[_TCA_KIND]), None
        if kind == "bpf":
            name = text(attributes(found.get(_TCA_OPTIONS, b"")).get(_TCA_BPF_NAME, b""))
        filters.append(_Filter(info >> 16, handle, kind, name))
    return filters
