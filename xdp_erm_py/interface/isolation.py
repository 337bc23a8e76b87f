"""Keeps decapsulated frames out of the host's own network stack, by a filter behind the interface's packet taps.

The filter (bpf/isolate.c) is attached by tcx (Linux 6.6), where it runs before whatever else there is; in older kernels
it is a filter of the interface's clsact qdisc, whose name says whether the qdisc was made for it. It is known by its
name, and the state of the XDP program that relies on it says which one that is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from typing import Any, NamedTuple

from ..errors import XdpErmError
from ..kernel import bpf, clsact
from ..kernel.links import Link, gone
from ..kernel.netlink import Refused, Rtnetlink
from ..program import compiler
from ..program.module import Module
from .nic import Intend

#: The name of the filter's program, and what its name in clsact begins with. There _QDISC follows where the qdisc was
#: made for it and goes with it.
FILTER = "xdp_erm_isolate"
_QDISC = "+clsact"

#: The map in which it counts what it takes.
TAKEN = "taken"
_TAKEN = struct.Struct("=QQ")  # struct taken in bpf/isolate.c


class _Filter(NamedTuple):
    """What sees incoming frames behind the taps."""

    name: str
    program_id: int | None
    """None: it is no BPF program."""
    clsact: clsact.Filter | None
    """Where it is a filter of clsact. None: it is attached by tcx."""

    @property
    def is_ours(self) -> bool:
        return self.program_id is not None and self.name.removesuffix(_QDISC).partition("-")[0] == FILTER

    @property
    def has_qdisc(self) -> bool:
        return self.clsact is not None and self.name.endswith(_QDISC)


class Isolation(NamedTuple):
    """What keeps an interface's decapsulated frames from the host."""

    by: str | None
    """tcx or clsact; None: nothing does."""
    before: tuple[str, ...]
    """Others' programs and filters that see decapsulated frames before it, and may keep them from it."""

    def as_dict(self) -> dict[str, Any]:
        """For a status."""
        return {"isolated": self.by is not None, "isolated_by": self.by, "isolated_after": list(self.before)}


def look(link: Link) -> Isolation:
    """OSError, XdpErmError: it cannot be seen."""
    with Rtnetlink() as rtnetlink:
        filters = _filters(rtnetlink, link)
    first = next((filter_ for filter_ in filters if filter_.is_ours), None)
    if first is None:
        return Isolation(None, ())
    return Isolation("clsact" if first.clsact else "tcx", tuple(map(_called, _before(filters))))


def counting(maps: dict[str, int]) -> bpf.Map:
    """The map in which the filter counts: that of the attached program, whose maps (ids by name) these are, or a new
    one. Raises OSError."""
    if TAKEN in maps:
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(bpf.Map.by_id(maps[TAKEN]))
            if found.info.value_size == _TAKEN.size:
                stack.pop_all()
                return found
    return bpf.Map.create_percpu_array(TAKEN, _TAKEN.size)


def taken(map_: bpf.Map) -> tuple[int, int]:
    """What the filter has counted: frames, and those of them that had the VLAN tag of their wrapping."""
    counted = [_TAKEN.unpack(value) for value in map_.lookup(bytes(4)) or []]
    return sum(frames for frames, _ in counted), sum(outer for _, outer in counted)


def isolate(link: Link, relied: dict[str, Any] | None, taken: bpf.Map,
            intend: Intend) -> tuple[list[str], dict[str, Any]]:
    """Puts the filter, which counts in the map `taken`, before the interface's others, where it is not there yet.

    `relied` is what the attached program's state says of the filter that it relies on. Returns a line for each thing
    done, and what the state of a program has to say that relies on the filter which is there now. An older one stays as
    well, for the program that relies on it: retire() removes it once that is replaced.
    """
    with Rtnetlink() as rtnetlink:
        filters = _filters(rtnetlink, link)
        ours = [filter_ for filter_ in filters if filter_.is_ours]
        digest = compiler.classifier_digest()
        if relied and relied["digest"] == digest and ours and ours[0].program_id == relied["program"] \
                and _stands_well(link, filters):
            return [], relied
        try:
            with Module(compiler.classifier()) as module:
                program = module.load_classifier(compiler.CLASSIFIER, FILTER, {TAKEN: taken.fd})
        except OSError as error:
            raise _failed(link, f"the kernel does not load the filter: {error.strerror}") from None
        try:
            if _has_tcx(link):
                _attach_first(link, program)
            else:
                _add_first(rtnetlink, link, filters, program, intend)
            relied = {"program": bpf.program_info(program).id, "digest": digest}
        finally:
            os.close(program)
        before = _before(_filters(rtnetlink, link))
    said = [f"{link.name}: decapsulated frames are kept from the host's own network stack"
            + (", by a newer filter" if ours else "")]
    if before:
        said.append(f"{link.name}: warning: {', '.join(map(_called, before))} comes before that and still sees "
                    f"decapsulated frames")
    return said, relied


def retire(link: Link) -> None:
    """Removes older filters than the one that isolate() has put there last."""
    _remove(link, slice(1, None))


def withdraw(link: Link) -> None:
    """Undoes isolate(), which has put a filter there."""
    _remove(link, slice(1))


def release(link: Link) -> list[str]:
    """Removes the filter, and the qdisc if it was made for it and nobody else uses it. Returns a line for it."""
    if _remove(link, slice(None)):
        return [f"{link.name}: the host's own network stack sees all frames again"]
    return []


def mend(link: Link) -> list[str]:
    """Removes the qdisc that isolate() has made, if it was killed before it used it. Returns a line for it."""
    with Rtnetlink() as rtnetlink:
        try:
            if clsact.ingress(rtnetlink, link) or clsact.egress(rtnetlink, link) \
                    or clsact.qdisc_kind(rtnetlink, link) != "clsact":
                return []
            clsact.remove_qdisc(rtnetlink, link)
        except Refused as refused:
            raise XdpErmError(f"{link.name}: the clsact qdisc cannot be removed: {_reason(link, refused)}; `tc qdisc "
                              f"del dev {link.name} clsact` does it") from None
    return [f"{link.name}: removed the clsact qdisc"]


def _filters(rtnetlink: Rtnetlink, link: Link) -> list[_Filter]:
    """All, in the order in which they run."""
    try:
        tcx = bpf.tcx(link.index)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise gone(link) from None
        raise XdpErmError(f"{link.name}: its tcx programs cannot be read: {error.strerror}") from None
    found = []
    for program_id in tcx.programs if tcx else ():
        with contextlib.suppress(bpf.Gone), bpf.descriptor(bpf.program_fd(program_id)) as program:
            found.append(_Filter(bpf.program_info(program).name, program_id, None))  # or it is gone meanwhile
    try:
        others = clsact.ingress(rtnetlink, link)
    except Refused as refused:
        raise XdpErmError(f"{link.name}: its filters cannot be read: {_reason(link, refused)}") from None
    return found + [_Filter(other.name or other.kind, other.program_id, other) for other in others]


def _before(filters: list[_Filter]) -> list[_Filter]:
    """Those that run before the first of ours."""
    found: list[_Filter] = []
    for filter_ in filters:
        if filter_.is_ours:
            return found
        if not filter_.clsact or filter_.clsact.handle:  # or it is the entry that each preference has of its own
            found.append(filter_)
    return []


def _called(filter_: _Filter) -> str:
    if filter_.clsact:
        return f"the filter {filter_.name} of preference {filter_.clsact.preference}"
    return f"the tcx program {filter_.program_id} ({filter_.name})"


def _stands_well(link: Link, filters: list[_Filter]) -> bool:
    """Whether isolate() could put no filter further in front than the first of ours."""
    first = next(filter_ for filter_ in filters if filter_.is_ours)
    if _has_tcx(link):
        return first is filters[0] and first.clsact is None
    return not any(other.clsact and other.clsact.preference >= _preference(filters) for other in _before(filters))


def _preference(filters: list[_Filter]) -> int:
    """The lowest that our filter can have: all of a preference are of one kind and protocol; among those like ours the
    newest comes first."""
    others = {filter_.clsact.preference for filter_ in filters
              if filter_.clsact and not (filter_.clsact.kind == "bpf" and filter_.clsact.all_protocols)}
    preference = 1
    while preference in others:
        preference += 1
    return preference


def _has_tcx(link: Link) -> bool:
    return bpf.tcx(link.index) is not None


def _attach_first(link: Link, program: int) -> None:
    while True:
        try:
            tcx = bpf.tcx(link.index)
            assert tcx is not None
            bpf.attach_tcx(link.index, program, tcx.revision)
            return
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise gone(link) from None
            if error.errno != errno.ESTALE:  # somebody attached or detached just now
                raise _failed(link, f"the kernel takes no tcx program: {error.strerror}") from None


def _add_first(rtnetlink: Rtnetlink, link: Link, filters: list[_Filter], program: int, intend: Intend) -> None:
    """To the clsact or ingress qdisc that is there, or else to one that is made for it."""
    try:
        made = _make_qdisc(rtnetlink, link, intend)
    except Refused as refused:
        raise _failed(link, f"the kernel gives no clsact qdisc: {_reason(link, refused)}") from None
    name = f"{FILTER}-{compiler.classifier_digest()}"
    if made or any(filter_.has_qdisc for filter_ in filters if filter_.is_ours):
        name += _QDISC
    try:
        clsact.add_filter(rtnetlink, link, _preference(filters), program, name)
    except Refused as refused:
        if made and refused.code != errno.ENODEV:
            clsact.remove_qdisc(rtnetlink, link)
        raise _failed(link, f"the kernel takes no BPF filter: {_reason(link, refused)}") from None


def _make_qdisc(rtnetlink: Rtnetlink, link: Link, intend: Intend) -> bool:
    """Whether it was made: False where there is one already. Raises Refused."""
    if clsact.qdisc_kind(rtnetlink, link) is not None:
        return False
    intend({"clsact": True})
    try:
        clsact.make_qdisc(rtnetlink, link)
    except Refused as refused:
        if refused.code == errno.EEXIST:
            return False  # somebody made it just now
        raise
    return True


def _remove(link: Link, chosen: slice) -> bool:
    """Removes those of our filters, in the order in which they run; whether there were any."""
    with Rtnetlink() as rtnetlink:
        filters = _filters(rtnetlink, link)
        removed = [filter_ for filter_ in filters if filter_.is_ours][chosen]
        for filter_ in removed:
            if filter_.clsact is None:
                _detach_tcx(link, filter_)
        ours = [filter_ for filter_ in removed if filter_.clsact]
        try:
            others = [filter_.clsact for filter_ in filters if filter_.clsact and filter_ not in ours]
            if any(filter_.has_qdisc for filter_ in ours) and not any(
                    other.handle for other in others + clsact.egress(rtnetlink, link)):
                clsact.remove_qdisc(rtnetlink, link)  # takes the filters with it
                return True
            for filter_ in ours:
                assert filter_.clsact is not None
                clsact.remove_filter(rtnetlink, link, filter_.clsact)
        except Refused as refused:
            assert ours[0].clsact is not None
            raise XdpErmError(f"{link.name}: the filter {FILTER} cannot be removed: {_reason(link, refused)}; `tc "
                              f"filter del dev {link.name} ingress pref {ours[0].clsact.preference}` does it") from None
    return bool(removed)


def _detach_tcx(link: Link, filter_: _Filter) -> None:
    assert filter_.program_id is not None
    try:
        with bpf.descriptor(bpf.program_fd(filter_.program_id)) as program:
            bpf.detach_tcx(link.index, program)
    except bpf.Gone:
        pass  # somebody else did it
    except OSError as error:
        raise XdpErmError(f"{link.name}: the tcx program {filter_.program_id} ({FILTER}) cannot be taken off: "
                          f"{error.strerror}") from None


def _failed(link: Link, reason: str) -> XdpErmError:
    return XdpErmError(f"{link.name}: decapsulated frames cannot be kept from the host's own network stack, {reason}; "
                       "isolate: false (--no-isolate) attaches without")


def _reason(link: Link, refused: Refused) -> str:
    if refused.code == errno.ENODEV:
        raise gone(link) from None
    return str(refused)
