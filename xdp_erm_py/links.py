"""Network interfaces and the XDP programs on them, over rtnetlink (pyroute2), in the caller's network namespace."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, nla, nlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_SETLINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfbase

from .errors import XdpErmError

# uapi linux/if_link.h
_UPDATE_IF_NOEXIST = 1 << 0
_MODE_FLAGS = {"generic": 1 << 1, "native": 1 << 2, "offload": 1 << 3}
_REPLACE = 1 << 4

_PROGRAM_ID_ATTRIBUTES = {
    "native": "IFLA_XDP_DRV_PROG_ID", "generic": "IFLA_XDP_SKB_PROG_ID", "offload": "IFLA_XDP_HW_PROG_ID"}


@dataclass(frozen=True)
class Link:
    name: str
    index: int
    mtu: int
    """Bytes above the Ethernet header."""
    program_id: int | None
    """The XDP program, None: none."""
    mode: str | None
    """How it is attached: native, generic or offload."""


class _XdpRequest(ifinfbase, nlmsg):
    """A link message that sets an XDP program. pyroute2's own has the flags as 16 bit, where the kernel wants 32."""

    prefix = "IFLA_"
    nla_map = ((43, "IFLA_XDP", "xdp"),)

    class xdp(nla):
        nla_flags = 0x8000  # NLA_F_NESTED
        prefix = "IFLA_"
        nla_map = ((1, "IFLA_XDP_FD", "int32"), (3, "IFLA_XDP_FLAGS", "uint32"), (8, "IFLA_XDP_EXPECTED_FD", "int32"))


class Refused(Exception):
    """The kernel or the driver refused a program; `code` is the errno, the text is theirs."""

    def __init__(self, error: NetlinkError) -> None:
        super().__init__(str(error.args[1]) if len(error.args) > 1 else os.strerror(error.code))
        self.code: int = error.code


class Links:
    """A connection to rtnetlink; use it in a with block."""

    def __init__(self) -> None:
        self._ip = IPRoute()

    def __enter__(self) -> Links:
        return self

    def __exit__(self, *_: object) -> None:
        self._ip.close()

    def __iter__(self) -> Iterator[Link]:
        for message in self._ip.get_links():
            yield self._link(message)

    def find(self, name: str) -> Link:
        """The interface of that name; XdpErmError where there is none."""
        for link in self:
            if link.name == name:
                return link
        raise XdpErmError(f"{name}: no such interface in this network namespace; `ip link` lists them")

    @staticmethod
    def _link(message: nlmsg) -> Link:
        xdp = message.get_attr("IFLA_XDP")
        programs = {mode: xdp.get_attr(attribute) for mode, attribute in _PROGRAM_ID_ATTRIBUTES.items()} if xdp else {}
        mode = next((mode for mode, program_id in programs.items() if program_id), None)
        return Link(message.get_attr("IFLA_IFNAME"), message["index"], message.get_attr("IFLA_MTU"),
                    programs[mode] if mode else None, mode)

    def set_mtu(self, link: Link, mtu: int) -> None:
        """Sets the MTU, in bytes above the Ethernet header. XdpErmError: the driver refuses it."""
        try:
            self._ip.link("set", index=link.index, mtu=mtu)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                raise gone(link.name) from None
            raise XdpErmError(f"{link.name}: MTU {mtu} is refused: {Refused(error)}") from None

    def attach(self, link: Link, program: int, mode: str, replaced: int | None = None) -> None:
        """Puts the program with descriptor `program` on the interface.

        `replaced` is the descriptor of the program that must be there now, for an atomic swap; without it there must be
        none. Raises Refused.
        """
        self._xdp(link, program, mode, replaced)

    def detach(self, link: Link, mode: str, program: int) -> None:
        """Takes the program with descriptor `program` off the interface, and no other. Raises Refused."""
        self._xdp(link, -1, mode, program)

    def _xdp(self, link: Link, program: int, mode: str, expected: int | None) -> None:
        attributes = [("IFLA_XDP_FD", program)]
        if expected is None:
            attributes.append(("IFLA_XDP_FLAGS", _MODE_FLAGS[mode] | _UPDATE_IF_NOEXIST))
        else:
            attributes += [("IFLA_XDP_FLAGS", _MODE_FLAGS[mode] | _REPLACE), ("IFLA_XDP_EXPECTED_FD", expected)]
        request = _XdpRequest()
        request["index"] = link.index
        request["attrs"] = [("IFLA_XDP", {"attrs": attributes})]
        try:
            self._ip.nlm_request(request, msg_type=RTM_SETLINK, msg_flags=NLM_F_REQUEST | NLM_F_ACK)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                raise gone(link.name) from None
            raise Refused(error) from None


def gone(name: str) -> XdpErmError:
    return XdpErmError(f"{name}: the interface went away half-way; nothing of ours is left on it")
