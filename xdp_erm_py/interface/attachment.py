"""Attaches, swaps and detaches the XDP program."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import Any

from .. import __version__
from ..errors import XdpErmError
from ..kernel import bpf
from ..kernel.links import Link, Links
from ..kernel.netlink import Refused
from ..kernel.privileges import require_to_change
from ..settings import InterfaceConfig
from . import isolation, metadata, nic, running, spread, stats, topology
from .attached import STATE_MAP, Attachment, attachment_of, find, find_all, now, write_state
from .journal import Journal, exclusive
from .programs import Candidate, NoFrags, Programs, bpf_refused, candidates_for

# How long attach looks at frames that a program seems not to see.
_PATIENCE = 0.5  # seconds


def attach(name: str, config: InterfaceConfig, force: bool = False) -> list[str]:
    """Attaches xdp-erm to interface `name` (an alternative one will do), or brings what is attached to `config`.

    Returns a line for each thing that was done. Raises XdpErmError; then the interface is as it was before, unless it
    says otherwise or an offload that came on with the program cannot be turned off. `force` replaces another's program.
    """
    require_to_change()
    with exclusive() as journal, Links() as links:
        link, mended = _mend(journal, links, name)
        name = link.name
        current = attachment_of(link)
        if link.program_id is not None and current is None and not force:
            raise foreign(link)
        topology.check(link)
        said = mended if link.program_id is not None else [*mended, *topology.conflicts(links, link)]
        mode, why_generic = _mode(links, link, current, config)
        if why_generic:
            said.append(f"{name}: {why_generic}: using generic mode, which is slower")
        refused = bpf_refused()
        if refused:
            raise XdpErmError(f"{name}: {refused}")
        candidates = candidates_for(link, current, config, mode)
        kept: dict[str, Any] = current.state if current else {
            "id": os.urandom(8).hex(), "attached_at": now(),
            "since_boot": time.clock_gettime(time.CLOCK_BOOTTIME), "nic": {}}
        before = current.maps if current else {}
        state = {"id": kept["id"], "version": __version__, "config": config.as_dict(),
                 "attached_at": kept["attached_at"], "since_boot": kept.get("since_boot"), "nic": kept["nic"],
                 "why_generic": why_generic or kept.get("why_generic"), **candidates[0].state}
        with contextlib.ExitStack() as opened:
            programs = taken = None
            if config.isolate:
                taken = opened.enter_context(isolation.counting(before))
            if not current or current.outdated or \
                    (candidates[0].mode, state["digest"]) != (current.mode, current.state["digest"]):
                programs = Programs(opened, link, current, config, state, taken)
                programs.load(candidates[0])  # what fails shall fail before anything is changed
            changes: dict[str, Any] = {}

            def intend(more: dict[str, Any]) -> None:
                changes.update({**more, **nic.merged(changes, more)})
                journal.begin(link, changes)

            isolated: list[str] = []
            put = False
            try:
                said += nic.prepare(links, topology.stack(links, link), config.set_mtu, intend)
                state["nic"], state["mtu"] = nic.merged(state["nic"], changes), links.find(name).mtu
                state["channels"] = nic.channels(link)
                if taken:  # before there is anything to keep out
                    isolated, state["filter"] = isolation.isolate(link, kept.get("filter"), taken, intend)
                    said += isolated
                if programs:
                    said += _put(opened, links, link, current, candidates, programs)
                    put = True
                if config.isolate:
                    isolation.retire(link)
                    said += [f"{name}: warning: {line}" for line in topology.starved(links, link)]
                else:
                    said += isolation.release(link)
            except BaseException as error:  # Ctrl-C as well
                with contextlib.suppress(XdpErmError):  # the interface may be gone; the first error is the one to tell
                    if isolated and not put:  # else it is what the attached program relies on
                        isolation.withdraw(link)
                    nic.restore(links, links.find(name), changes)
                journal.end(link)
                if isinstance(error, OSError):
                    raise XdpErmError(f"{name}: not attached: {error.strerror}") from error
                raise
        journal.end(link)  # it is in the program's state now
        attached = find(links, name)
        if attached is None:
            raise XdpErmError(f"{name}: somebody else took the program off at once")
        if programs:
            state = attached.state
        else:
            said.append(f"{name}: already attached ({attached.mode}, program {attached.program_id})")
        known = None if programs else kept.get("received")
        state["received"] = known or running.baseline(links, attached)
        changes.clear()
        stack = topology.stack(links, attached.link)
        said += nic.settle(stack, intend)
        if attached.mode == "generic":
            said += [f"{name}: warning: {line}" for line in topology.untagged(links, attached.link)]
        plan = spread.Plan(**state["spread"])
        said += nic.steer(stack, plan.cpus if plan.how == "rps" else (), state["nic"], intend)
        state["nic"] = nic.merged(state["nic"], changes)
        if config.spread != "none":
            said.append(plan.line(link))
        if config.isolate and (isolated or any(before.get(name) != attached.maps.get(name) for name in stats.BALANCED)):
            state["filter"]["balance"] = stats.balance(attached)
        with bpf.Map.by_id(attached.maps[STATE_MAP]) as state_map:
            write_state(state_map, state)
        journal.end(link)
        attached.state = state
        missed = running.unseen(links, attached, _PATIENCE, 1 if programs else running.SUSPECTED)
        return [*said, f"{name}: warning: {running.told(attached, missed)}"] if missed else said


def _mend(journal: Journal, links: Links, name: str) -> tuple[Link, list[str]]:
    """The interface, once what a killed command has changed on its NIC is undone; and a line for each such change."""
    link = links.find(name)
    changes = journal.unfinished(link)
    current = attachment_of(link)
    undone = isolation.mend(link) if "clsact" in changes else []
    if changes and not (current and nic.merged(current.state["nic"], changes) == current.state["nic"]):
        undone += nic.restore(links, link, changes)
        link = links.find(name)
    journal.end(link)
    if undone:
        undone.insert(0, f"{link.name}: a command before was killed half-way; what it had changed is undone first")
    return link, undone


def _mode(links: Links, link: Link, current: Attachment | None, config: InterfaceConfig) -> tuple[str, str | None]:
    """The mode to attach in, and why it is generic: in native mode of some drivers isolation is impossible."""
    if not config.isolate or config.mode == "generic":
        return config.mode, None
    lacking = metadata.lacking(links, link)
    if lacking:
        reason = f"native XDP of its driver ({lacking}) is not known to carry the mark that isolation needs"
        if config.mode == "native":
            raise XdpErmError(f"{link.name}: {reason}: use generic mode (--mode auto), or isolate: false "
                              "(--no-isolate)")
        return "generic", reason
    unmarked = stats.unmarked(current) if current else 0
    if unmarked and config.mode == "auto":
        return "generic", f"{unmarked} frames could not be marked for isolation in native mode, and stayed wrapped"
    return config.mode, None


def _put(opened: contextlib.ExitStack, links: Links, link: Link, current: Attachment | None,
         candidates: list[Candidate], programs: Programs) -> list[str]:
    """The moment itself. In the same mode the swap is atomic."""
    if link.program_id is None or link.mode is None:
        return _attach(links, link, candidates, programs)
    old = opened.enter_context(bpf.descriptor(bpf.program_fd(link.program_id)))
    if candidates[0].mode == link.mode:
        return _attach(links, link, candidates, programs, old,
                       "swapped the program" if current else f"replaced program {link.program_id} of somebody else")
    try:
        links.detach(link, link.mode, old)
    except Refused as refused:
        raise _not_replaced(link, refused) from None
    try:
        said = _attach(links, link, candidates, programs)
    except XdpErmError as error:
        try:
            links.attach(link, old, link.mode)
        except Refused as refused:
            raise XdpErmError(f"{error}; the program from before cannot be put back: {refused}; ERM is not "
                              "decapsulated now") from None
        raise
    return [f"{link.name}: the kernel allows no two programs, so there was none for a moment while the mode changed "
            f"from {link.mode}"] + said


def _attach(links: Links, link: Link, candidates: list[Candidate], programs: Programs, replaced: int | None = None,
            verb: str = "attached") -> list[str]:
    """Attaches the first candidate that the driver takes."""
    said: list[str] = []
    refusal: Refused | None = None
    for candidate in candidates:
        try:
            program = programs.ready(candidate)
        except NoFrags:
            continue
        except XdpErmError as error:
            refused_before = f"; the driver refuses native XDP ({refusal})" if refusal else ""
            raise XdpErmError(f"{error}{refused_before}") from None
        if refusal and candidate.mode == "generic":
            said.append(f"{link.name}: {programs.why_generic}: using generic mode, which is slower")
        try:
            links.attach(link, program, candidate.mode, replaced)
            frags = ", multi-buffer" if candidate.frags else ""
            return [*programs.said, *said,
                    f"{link.name}: {verb} ({candidate.mode}{frags}, program {bpf.program_info(program).id})"]
        except Refused as refused:
            held = refused.code in (errno.EBUSY, errno.EEXIST)
            if replaced is not None and (held or candidate is candidates[-1]):
                raise _not_replaced(link, refused) from None
            if held:
                if links.find(link.name).program_id is not None:
                    raise XdpErmError(f"{link.name}: somebody else attached an XDP program just now: try "
                                      "again") from None
                raise XdpErmError(f"{link.name}: XDP is refused: {refused}") from None
            if not candidate.frags:  # why without them is what there is to tell
                refusal = refused
                programs.why_generic = f"the driver refuses native XDP ({refusal})"
    mode = candidates[-1].mode
    hint = "; --mode generic works with every driver" if mode == "native" else ""
    raise XdpErmError(f"{link.name}: XDP is refused in {mode} mode: {refusal}{hint}")


def detach(name: str) -> list[str]:
    """Takes xdp-erm off interface `name` and brings the NIC's old settings back; nothing where it is not attached."""
    require_to_change()
    with exclusive() as journal, Links() as links:
        link, mended = _mend(journal, links, name)
        name = link.name
        current = attachment_of(link)
        if current is None:
            # Somebody else took the program off, or a command was killed half-way: the filter may be left.
            released = mended + isolation.release(link)
            if link.program_id is None:
                return released or [f"{name}: xdp-erm is not attached"]
            return [f"{name}: program {link.program_id} ({_program_name(link.program_id)}) is not ours and stays",
                    *released]
        journal.begin(link, current.state["nic"])
        try:
            with bpf.descriptor(bpf.program_fd(current.program_id)) as program:
                links.detach(link, current.mode, program)
                stats.wait_for_queues(current)  # the filter stays for what waits in them
        except Refused as refused:
            journal.end(link)
            raise XdpErmError(f"{name}: program {current.program_id} cannot be taken off: {refused}") from None
        said = [*mended, f"{name}: detached (program {current.program_id})"]
        said += nic.restore(links, links.find(name), _unshared(links, current.state["nic"]))
        journal.end(link)
        return said + isolation.release(link)


def _unshared(links: Links, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes without those of interfaces that are below another attached one as well, which has them to keep."""
    below = dict(changes.get("below", {}))
    for other in find_all(links):
        shared = {index: below.pop(index) for each in topology.below(links, other.link)
                  for index in [str(each.index)] if index in below}
        if shared:
            other.state["nic"] = nic.merged({"below": shared}, other.state["nic"])
            with bpf.Map.by_id(other.maps[STATE_MAP]) as state_map:
                write_state(state_map, other.state)
    return {**changes, "below": below}


def _program_name(program_id: int) -> str:
    try:
        with bpf.descriptor(bpf.program_fd(program_id)) as program:
            return bpf.program_info(program).name or "without a name"
    except bpf.Gone:
        return "gone by now"


def foreign(link: Link) -> XdpErmError:
    """What is to be said of somebody else's program on the interface."""
    assert link.program_id is not None
    name = _program_name(link.program_id)
    if name == "xdp_dispatcher":
        return XdpErmError(f"{link.name}: libxdp's dispatcher (program {link.program_id}, {name}) holds the interface; "
                           f"free it with `xdp-loader unload {link.name} --all`, or replace it with --force")
    keyword = {"native": "xdpdrv", "generic": "xdpgeneric", "offload": "xdpoffload"}[link.mode or "native"]
    return XdpErmError(f"{link.name}: another XDP program is attached (program {link.program_id}, {name}); free the "
                       f"interface with `ip link set dev {link.name} {keyword} off`, or replace it with --force")


def _not_replaced(link: Link, refused: Refused) -> XdpErmError:
    if refused.code == errno.EBUSY:
        return XdpErmError(f"{link.name}: program {link.program_id} is held by a BPF link, which only its owner can "
                           "release: stop that process (`bpftool link` names it)")
    return XdpErmError(f"{link.name}: program {link.program_id} cannot be replaced: {refused}")
