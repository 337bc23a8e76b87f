"""What interfaces are made of and are a part of: which others frames pass before, and which get them afterwards."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import XdpErmError
from ..kernel.links import ETHERNET, LOOPBACK, Link
from .ours import attachment_of

#: Kinds that take their frames from the interface which they stand on.
_STANDING = ("ipvlan", "ipvtap", "macvlan", "macvtap", "vlan")
#: Its driver runs a program on its parts, and takes none where one of these has its own.
_BOND = "bond"

#: Kinds of tunnels, by the encapsulation that they come in.
_TUNNELS = {"vxlan": ("vxlan",), "geneve": ("geneve",), "gre": ("gre", "gretap", "ip6gre", "ip6gretap"),
            "erspan": ("erspan", "ip6erspan")}

#: Kinds that have an Ethernet header, and receive nothing that XDP could see; and why.
_NOTHING_RECEIVED = {
    "dummy": "receives no frames; what is sent into it goes to taps only",
    "ifb": "receives no frames; those redirected to it go on as frames of the interface that they came from",
    "vrf": "receives no frames; they stay those of the interfaces in it",
}


def check(link: Link) -> None:
    """XdpErmError: no XDP program sees mirrored frames on such an interface."""
    what = f"this {link.kind} interface" if link.kind else "this interface"
    if link.type not in (ETHERNET, LOOPBACK):
        reason = f"has no Ethernet header (link type {link.type}), and mirrored frames come in one"
    elif link.kind in _NOTHING_RECEIVED:
        reason = _NOTHING_RECEIVED[link.kind]
    else:
        return
    raise XdpErmError(f"{link.name}: {what} {reason}: attach to the interface that the switch's frames come in on")


def below(links: Iterable[Link], link: Link) -> list[Link]:
    """The interfaces that its frames come from: a bond's, a team's or a bridge's, what a VLAN stands on, and theirs."""
    everything = list(links)
    found: list[Link] = []
    upper = [link]
    while upper:
        each = upper.pop()
        for other in everything:
            stood_on = each.kind in _STANDING and each.lower == other.index
            if (stood_on or other.master == each.index) and other not in (link, *found):
                found.append(other)
                upper.append(other)
    return found


def stack(links: Iterable[Link], link: Link) -> list[Link]:
    """The interface, and those below it."""
    return [link, *below(links, link)]


def above(links: Iterable[Link], link: Link) -> list[Link]:
    """The interfaces that get frames from it: the bond, team or bridge it is a part of, and VLANs that stand on it."""
    return [other for other in links
            if other.index == link.master or (other.kind in _STANDING and other.lower == link.index)]


def conflicts(links: Iterable[Link], link: Link) -> list[str]:
    """Before attaching: a line for each program of others below it, which comes before ours.

    XdpErmError: with the programs that are there ours would be of no use here, or the kernel does not allow it.
    """
    for other in above(links, link):
        if other.program_id is not None:
            raise XdpErmError(f"{link.name}: {_called(other)}, which gets its frames, has an XDP program, and the "
                              "kernel allows one of the two: use that, or free it first (`xdp-erm detach "
                              f"{other.name}`)")
    said = []
    for other in below(links, link):
        if other.program_id is None:
            continue
        if attachment_of(other):
            raise XdpErmError(f"{link.name}: xdp-erm is attached to {_called(other)} below it, and decapsulates there: "
                              f"capture from {other.name}, or free it first (`xdp-erm detach {other.name}`)")
        if link.kind == _BOND:
            raise XdpErmError(f"{link.name}: {_called(other)}, a part of it, has an XDP program, and the kernel allows "
                              f"one of the two: free it first (`ip link set dev {other.name} xdp off`)")
        said.append(f"{link.name}: warning: {_called(other)} below it has an XDP program, which sees frames first")
    return said


def downwards(links: Iterable[Link], names: Iterable[str]) -> list[str]:
    """The names of interfaces, those above before those below: in this order programs can be taken off."""
    everything = list(links)
    known = {name: len(below(everything, link)) for link in everything for name in link.names}
    return sorted(names, key=lambda name: -known.get(name, 0))


def starved(links: Iterable[Link], link: Link) -> list[str]:
    """What is to be said of each interface that gets no decapsulated frames, as this one keeps them to its own taps."""
    return [f"{_called(other)}, which gets its frames, gets no decapsulated ones: attach to {other.name} if Zeek "
            "captures there" for other in above(links, link)]


def diverted(links: Iterable[Link], link: Link, encapsulations: Iterable[str], sources: Iterable[str]) -> list[str]:
    """What is to be said of each tunnel that ends at the host and comes in an encapsulation that is taken off, whoever
    sends it: `encapsulations` and `sources` are those configured."""
    if sources:
        return []
    everything = list(links)
    kinds = [kind for each in encapsulations for kind in _TUNNELS.get(each, ())]
    carriers = [None, *(each.index for each in stack(everything, link))]
    return [f"what comes here for the host's own tunnel {other.name} ({other.kind}) is taken for mirrored frames, and "
            "does not get there: set `sources` to the switches' addresses"
            for other in everything if other.kind in kinds and other.up and other.lower in carriers]


def untagged(links: Iterable[Link], link: Link) -> list[str]:
    """What is to be said of an interface whose frames have lost their VLAN tag before generic XDP sees them: the kernel
    takes it off when they come to the interface below, and it travels beside them."""
    parts = below(links, link) if link.kind not in (None, "vlan") else []
    if not parts:
        return []
    return ["in generic mode a VLAN tag of the wrapping stays on the mirrored frame here: if the switches' ERM comes "
            f"tagged, attach to {' or '.join(part.name for part in parts)}, and capture from there"]


def _called(link: Link) -> str:
    return f"{link.kind} {link.name}" if link.kind else link.name
