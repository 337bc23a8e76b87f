"""Network interfaces and the XDP programs on them, over rtnetlink, in the caller's network namespace.

The numbers are those of uapi linux/rtnetlink.h and if_link.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import XdpErmError
from .netlink import DUMP, NESTED, Refused, Rtnetlink, attribute, attributes, each_attribute, text

_RTM_GETLINK, _RTM_SETLINK, _RTM_GETADDR = 18, 19, 22
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # family, length of the prefix, flags, scope, interface

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_XDP = 1, 3, 4, 5, 10, 43
_IFLA_LINKINFO, _IFLA_INFO_KIND = 18, 1
_IFLA_STATS64, _IFLA_LINK_NETNSID = 23, 37
_IFLA_PROP_LIST, _IFLA_ALT_IFNAME = 52, 53
_IFA_ADDRESS, _IFA_LOCAL, _HOST_SCOPE = 1, 2, 254
_IFLA_XDP_FD, _IFLA_XDP_FLAGS, _IFLA_XDP_EXPECTED_FD = 1, 3, 8
_IFLA_XDP_PROGRAM_ID = {"native": 5, "generic": 6, "offload": 7}

_UPDATE_IF_NOEXIST, _REPLACE = 1 << 0, 1 << 4
_MODE_FLAGS = {"generic": 1 << 1, "native": 1 << 2, "offload": 1 << 3}

# uapi linux/if.h and if_arp.h
_IFF_UP, _IFF_NOARP, _IFF_LOWER_UP = 1 << 0, 1 << 7, 1 << 16
ETHERNET, LOOPBACK = 1, 772

# The fields of struct rtnl_link_stats64 (uapi linux/if_link.h), as far as they tell what was received.
_STATISTICS = ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_errors", "tx_errors", "rx_dropped", "tx_dropped",
               "multicast", "collisions", "rx_length_errors", "rx_over_errors", "rx_crc_errors", "rx_frame_errors",
               "rx_fifo_errors", "rx_missed_errors")


@dataclass(frozen=True)
class Link:
    name: str
    """The kernel's own, whatever other names it has."""
    index: int
    address: str
    """Of the hardware, in hexadecimal; empty where there is none."""
    mtu: int
    """Bytes above the Ethernet header."""
    program_id: int | None
    """The XDP program, None: none."""
    mode: str | None
    """How it is attached: native, generic or offload."""
    other_names: tuple[str, ...] = ()
    """`ip link property add dev NAME altname OTHER`"""
    type: int = ETHERNET
    """Of its frames, as in uapi linux/if_arp.h."""
    kind: str | None = None
    """What virtual interfaces are: bridge, bond, vlan, tun ...; None: a device."""
    master: int | None = None
    """The interface that it is a part of: a bridge, a bond, a team."""
    lower: int | None = None
    """The interface in this network namespace that it stands on; a veth's peer as well."""
    flags: int = field(default=0, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """All that it goes by."""
        return (self.name, *self.other_names)

    @property
    def up(self) -> bool:
        return bool(self.flags & _IFF_UP)

    @property
    def carrier(self) -> bool:
        return bool(self.flags & _IFF_LOWER_UP)

    @property
    def answers_arp(self) -> bool:
        return not self.flags & _IFF_NOARP


class Links:
    """A connection to rtnetlink; use it in a with block."""

    def __init__(self) -> None:
        self._rtnetlink = Rtnetlink()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *exception: object) -> None:
        self._rtnetlink.__exit__(*exception)

    def __iter__(self) -> Iterator[Link]:
        return iter([_link(body) for body in self._bodies()])

    def find(self, name: str) -> Link:
        """The interface of that name, be it an alternative one; XdpErmError where there is none."""
        for link in self:
            if name in link.names:
                return link
        raise XdpErmError(f"{name}: no such interface in this network namespace; `ip link` lists them")

    def now(self, link: Link) -> Link:
        """The interface as it is now, whatever it is called by now. XdpErmError: it is gone."""
        for each in self:
            if each.index == link.index:
                return each
        raise gone(link)

    def statistics(self, link: Link) -> dict[str, int]:
        """What the interface has counted since it exists, by the names of /sys/class/net/*/statistics.

        XdpErmError: it is gone.
        """
        for body in self._bodies():
            if _LINK.unpack_from(body)[2] == link.index:
                counted = attributes(body[_LINK.size:])[_IFLA_STATS64]
                return dict(zip(_STATISTICS, struct.unpack_from(f"={len(_STATISTICS)}Q", counted)))
        raise gone(link)

    def addresses(self, link: Link) -> list[str]:
        """Its addresses, IPv4's first; without those that every interface has for itself in IPv6."""
        found = []
        for family, kind, most in ((socket.AF_INET, _IFA_LOCAL, _HOST_SCOPE), (socket.AF_INET6, _IFA_ADDRESS, 0)):
            for body in self._dump(_RTM_GETADDR, _ADDRESS.pack(family, 0, 0, 0, 0)):
                of, _, _, scope, index = _ADDRESS.unpack_from(body)
                # A kernel without IPv6 answers with the addresses of all families.
                if (of, index) == (family, link.index) and scope <= most:
                    found.append(socket.inet_ntop(family, attributes(body[_ADDRESS.size:])[kind]))
        return found

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Sets the MTU, in bytes above the Ethernet header. XdpErmError: the driver refuses it."""
        try:
            self._set(link, attribute(_IFLA_MTU, struct.pack("=I", mtu)))
        except Refused as refused:
            raise XdpErmError(f"{link.name}: MTU {mtu} is refused: {refused}") from None

    def attach(self, link: Link, program: int, mode: str, replaced: int | None = None) -> None:
        """Puts the program with descriptor `program` on the interface.

        `replaced` is the descriptor of the program that must be there now, for an atomic swap; without it there must be
        none. Raises Refused.
        """
        self._set_xdp(link, program, mode, replaced)

    def detach(self, link: Link, mode: str, program: int) -> None:
        """Takes the program with descriptor `program` off the interface, and no other. Raises Refused."""
        self._set_xdp(link, -1, mode, program)

    def _set_xdp(self, link: Link, program: int, mode: str, expected: int | None) -> None:
        flags = _MODE_FLAGS[mode] | (_UPDATE_IF_NOEXIST if expected is None else _REPLACE)
        nested = attribute(_IFLA_XDP_FD, struct.pack("=i", program))
        nested += attribute(_IFLA_XDP_FLAGS, struct.pack("=I", flags))
        if expected is not None:
            nested += attribute(_IFLA_XDP_EXPECTED_FD, struct.pack("=i", expected))
        self._set(link, attribute(_IFLA_XDP | NESTED, nested))

    def _set(self, link: Link, attributes: bytes) -> None:
        try:
            self._rtnetlink.request(_RTM_SETLINK, 0, _LINK.pack(socket.AF_UNSPEC, 0, link.index, 0, 0) + attributes)
        except Refused as refused:
            if refused.code == errno.ENODEV:
                raise gone(link) from None
            raise

    def _bodies(self) -> list[bytes]:
        return self._dump(_RTM_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0))

    def _dump(self, kind: int, body: bytes) -> list[bytes]:
        try:
            return self._rtnetlink.request(kind, DUMP, body)
        except Refused as refused:
            raise XdpErmError(f"the interfaces of this network namespace cannot be listed: {refused}") from None


def gone(link: Link) -> XdpErmError:
    """What is to be said where the kernel says that there is no such device, as it does while a driver resets one."""
    with Links() as links:
        if any(each.index == link.index for each in links):
            return XdpErmError(f"{link.name}: its driver does not answer: it resets the device, or that is suspended; "
                               "try again")
    return XdpErmError(f"{link.name}: the interface went away half-way; nothing of ours is left on it")


def _link(body: bytes) -> Link:
    _, frames, index, flags, _ = _LINK.unpack_from(body)
    link = attributes(body[_LINK.size:])
    kind = attributes(link.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND)
    names = each_attribute(link.get(_IFLA_PROP_LIST, b""))
    xdp = attributes(link.get(_IFLA_XDP, b""))
    mode = next((mode for mode, attribute in _IFLA_XDP_PROGRAM_ID.items() if attribute in xdp), None)
    return Link(text(link[_IFLA_IFNAME]), index, link.get(_IFLA_ADDRESS, b"").hex(), _u32(link[_IFLA_MTU]),
                _u32(xdp[_IFLA_XDP_PROGRAM_ID[mode]]) if mode else None, mode,
                tuple(text(name) for what, name in names if what == _IFLA_ALT_IFNAME), frames,
                text(kind) if kind else None, _index(link, _IFLA_MASTER),
                None if _IFLA_LINK_NETNSID in link else _index(link, _IFLA_LINK), flags)


def _index(link: dict[int, bytes], which: int) -> int | None:
    """Of another interface; 0 is none."""
    return _u32(link[which]) or None if which in link else None


def _u32(value: bytes) -> int:
    number: int = struct.unpack("=I", value)[0]
    return number
