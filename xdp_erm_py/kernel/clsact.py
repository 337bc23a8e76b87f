"""An interface's clsact qdisc and the filters on it, over rtnetlink, in the caller's network namespace.

All requests raise Refused. The numbers are those of uapi linux/rtnetlink.h, pkt_sched.h, pkt_cls.h and if_ether.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from .links import Link
from .netlink import CREATE, DUMP, EXCLUSIVE, NESTED, Refused, Rtnetlink, attribute, attributes, text

_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_CLSACT_PARENT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3
_ALL_PROTOCOLS = socket.htons(3)
_TC = struct.Struct("=B3xiIII")  # family, interface, handle, parent, preference << 16 | protocol in network byte order


class Filter(NamedTuple):
    preference: int
    all_protocols: bool
    """Whether it sees frames of all protocols, as ours do."""
    handle: int
    """0: the entry that each preference has of its own"""
    kind: str
    name: str | None
    """of a BPF filter, as whoever made it calls it"""
    program_id: int | None
    """of a BPF filter"""


def ingress(rtnetlink: Rtnetlink, link: Link) -> list[Filter]:
    """The filters of frames that come in, in the order in which they run."""
    return _filters(rtnetlink, link, _INGRESS)


def egress(rtnetlink: Rtnetlink, link: Link) -> list[Filter]:
    """Those of frames that go out."""
    return _filters(rtnetlink, link, _EGRESS)


def qdisc_kind(rtnetlink: Rtnetlink, link: Link) -> str | None:
    """clsact or ingress; None where there is neither."""
    for body in rtnetlink.request(_RTM_GETQDISC, DUMP, _TC.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, index, _, parent, _ = _TC.unpack_from(body)
        if (index, parent) == (link.index, _CLSACT_PARENT):
            return text(attributes(body[_TC.size:])[_TCA_KIND])
    return None


def make_qdisc(rtnetlink: Rtnetlink, link: Link) -> None:
    """EEXIST: there is one."""
    rtnetlink.request(_RTM_NEWQDISC, CREATE | EXCLUSIVE, _qdisc(link))


def remove_qdisc(rtnetlink: Rtnetlink, link: Link) -> None:
    """Its filters go with it."""
    rtnetlink.request(_RTM_DELQDISC, 0, _qdisc(link))


def add_filter(rtnetlink: Rtnetlink, link: Link, preference: int, program: int, name: str) -> None:
    """Adds the program with descriptor `program` to those of frames that come in, before others of its preference."""
    options = attribute(_TCA_BPF_FD, struct.pack("=i", program)) + attribute(_TCA_BPF_NAME, name.encode() + b"\0")
    options += attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    rtnetlink.request(_RTM_NEWTFILTER, CREATE | EXCLUSIVE,
                      _filter(link, 0, preference) + attribute(_TCA_OPTIONS | NESTED, options))


def remove_filter(rtnetlink: Rtnetlink, link: Link, filter_: Filter) -> None:
    rtnetlink.request(_RTM_DELTFILTER, 0, _filter(link, filter_.handle, filter_.preference))


def _qdisc(link: Link) -> bytes:
    return _TC.pack(socket.AF_UNSPEC, link.index, _CLSACT_HANDLE, _CLSACT_PARENT, 0) + attribute(_TCA_KIND, b"clsact\0")


def _filter(link: Link, handle: int, preference: int) -> bytes:
    head = _TC.pack(socket.AF_UNSPEC, link.index, handle, _INGRESS, preference << 16 | _ALL_PROTOCOLS)
    return head + attribute(_TCA_KIND, b"bpf\0")


def _filters(rtnetlink: Rtnetlink, link: Link, parent: int) -> list[Filter]:
    try:
        answers = rtnetlink.request(_RTM_GETTFILTER, DUMP, _TC.pack(socket.AF_UNSPEC, link.index, 0, parent, 0))
    except Refused as refused:
        if refused.code == errno.EINVAL:
            return []  # no qdisc that could have any
        raise
    filters = []
    for body in answers:
        _, _, handle, _, info = _TC.unpack_from(body)
        found = attributes(body[_TC.size:])
        kind, name, program_id = text(found[_TCA_KIND]), None, None
        if kind == "bpf":
            options = attributes(found.get(_TCA_OPTIONS, b""))
            name = text(options.get(_TCA_BPF_NAME, b""))
            if _TCA_BPF_ID in options:
                program_id, = struct.unpack("=I", options[_TCA_BPF_ID])
        filters.append(Filter(info >> 16, info & 0xFFFF == _ALL_PROTOCOLS, handle, kind, name, program_id))
    return filters
