"""Attaches, swaps and detaches the XDP program."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from .. import __version__
from ..errors import XdpErmError
from ..kernel import bpf
from ..kernel.links import Link, Links
from ..kernel.netlink import Refused
from ..kernel.privileges import require_to_change
from ..program import encapsulations
from ..settings import InterfaceConfig
from . import isolation, metadata, nic, ours, running, spread, stats, topology
from .journal import Journal, exclusive
from .ours import STATE_MAP, Attachment, attachment_of, find, find_all, now, write_state
from .programs import Candidate, NoFrags, Programs, bpf_refused, candidates_for

# How long attach looks at frames that a program seems not to see.
_PATIENCE = 0.5  # seconds


def attach(name: str, config: InterfaceConfig, force: bool = False) -> list[str]:
    """Attaches xdp-erm to interface `name` (an alternative one will do), or brings what is attached to `config`.

    Returns a line for each thing that was done. Raises XdpErmError; then the interface is as it was before, unless it
    says otherwise or an offload that came on with the program cannot be turned off. `force` replaces another's program.
    """
    require_to_change()
    with exclusive() as journal, Links() as links, _others_taking_it_off(name):
        said, not_run = _attach_once(journal, links, name, config, force)
        if not_run and config.mode == "auto":  # then generic mode it is, without waiting for anybody to look
            more, not_run = _attach_once(journal, links, name, config, force, doubted=True)
            said += [line for line in more if line not in said]
        return said + not_run


def _attach_once(journal: Journal, links: Links, name: str, config: InterfaceConfig, force: bool,
                 doubted: bool = False) -> tuple[list[str], list[str]]:
    """A line for each thing that was done, and one where the driver does not run the program.

    `doubted`: the driver seems not to run the native program that is attached, so that a longer look decides.
    """
    with contextlib.ExitStack() as opened:
        link, mended, refused = _mend(journal, links, name)
        attaching = _Attaching(journal, links, opened, link, config)
        attaching.said += mended
        if refused:
            attaching.said.append(f"{link.name}: warning: what was changed before is not undone yet ({refused}); "
                                  f"`xdp-erm detach {link.name}` tries again")
        attaching.choose(force, doubted)
        with _ctrl_c_waiting():
            try:
                attaching.change()
            except BaseException as error:
                attaching.change_back()
                if isinstance(error, OSError) and not isinstance(error, bpf.Gone):
                    raise XdpErmError(f"{link.name}: not attached: {error.strerror}") from error
                raise
            return attaching.said, attaching.settle()


@contextlib.contextmanager
def _others_taking_it_off(name: str) -> Iterator[None]:
    """Says so where the program that is attached at first, and its maps, are gone at once."""
    try:
        yield
    except bpf.Gone:
        raise XdpErmError(f"{name}: somebody else took the program off just now: try again") from None


@contextlib.contextmanager
def _ctrl_c_waiting() -> Iterator[None]:
    """Ctrl-C counts after the with block: of a request that it comes into nobody knows whether it was done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Attaching:
    """An interface on its way to be attached: what is attached now, what is to be, and what was changed for it."""

    def __init__(self, journal: Journal, links: Links, opened: contextlib.ExitStack, link: Link,
                 config: InterfaceConfig) -> None:
        self._journal, self._links, self._opened, self._link, self._config = journal, links, opened, link, config
        self._current = attachment_of(link)
        self._kept: dict[str, Any] = self._current.state if self._current else {
            "id": os.urandom(8).hex(), "attached_at": now(),
            "since_boot": time.clock_gettime(time.CLOCK_BOOTTIME), "nic": {}}
        self._maps = self._current.maps if self._current else {}
        self._state: dict[str, Any] = {}
        self._candidates: list[Candidate] = []
        self._programs: Programs | None = None
        """None: what is attached does."""
        self._taken: bpf.Map | None = None
        self._changes = nic.merged({}, journal.unfinished(link))
        """What is to be undone: at first what a command before could not undo."""
        self._isolated: list[str] = []
        #: A line for each thing that was done.
        self.said: list[str] = []

    def choose(self, force: bool, doubted: bool) -> None:
        """The ways to attach that the driver may take. What fails here fails before anything is changed."""
        link, config, current = self._link, self._config, self._current
        if link.program_id is not None and current is None and not force:
            raise other_program(link)
        topology.check(link)
        if link.program_id is None:
            self.said += topology.conflicts(self._links, link)
        mode, why_generic = _mode(self._links, link, current, config, doubted)
        if why_generic:
            self.said.append(f"{link.name}: {why_generic}: using generic mode, which is slower")
        refused = bpf_refused()
        if refused:
            raise XdpErmError(f"{link.name}: {refused}")
        self._candidates = candidates_for(link, current, config, mode)
        best = self._candidates[0]
        self._state = {**{key: self._kept.get(key) for key in ("id", "attached_at", "since_boot", "nic")},
                       "version": __version__, "config": config.as_dict(),
                       "why_generic": why_generic or self._kept.get("why_generic"), **best.state}
        if config.isolate:
            self._taken = self._opened.enter_context(isolation.counting(self._maps))
        changes = nic.longest(topology.stack(self._links, link), config.spread in ("auto", "rps"))
        room = ours.room(self._state, changes)
        if not current or current.outdated or current.room < room or \
                (best.mode, best.state["digest"]) != (current.mode, current.state["digest"]):
            self._programs = Programs(self._opened, link, current, config, self._state, room, self._taken)
            self._programs.load(best)

    def change(self) -> None:
        """The NIC, the filter, the program, in this order."""
        links, link, state = self._links, self._link, self._state
        least_mtu = encapsulations.least_mtu(self._config.encapsulations, self._config.sources + self._config.targets)
        self.said += nic.prepare(links, topology.stack(links, link), least_mtu, self._config.set_mtu, self._intend)
        state["nic"] = nic.merged(state["nic"], self._changes)
        state["channels"], state["mtu"] = nic.channels(link), links.now(link).mtu
        if self._taken:  # before there is anything to keep out
            self._isolated, state["filter"] = isolation.isolate(link, self._kept.get("filter"), self._taken,
                                                                self._intend)
            self.said += self._isolated
        if self._programs:
            if self._current and self._candidates[0].mode != link.mode:
                # For a moment there is no program that remembers what was changed for the one before.
                self._journal.begin(link, {**self._changes, **state["nic"]})
            self.said += _put(self._opened, links, link, self._current, self._candidates, self._programs)
        self.said += [f"{link.name}: warning: {line}" for line in topology.diverted(
            links, link, self._config.encapsulations, self._config.sources)]
        if self._config.isolate:
            isolation.retire(link)
            self.said += [f"{link.name}: warning: {line}" for line in topology.starved(links, link)]
        else:
            self.said += isolation.release(link)

    def change_back(self) -> None:
        """What change() has done before it failed, but for what the program relies on that is attached."""
        try:
            link = self._links.now(self._link)
            attached = attachment_of(link)
            if attached is None:  # nor is the one before, and nothing else remembers what was changed for that
                self._changes = nic.merged(self._kept["nic"], self._changes)
                isolation.release(link)
            elif attached.program_id != self._link.program_id:  # the new one, which remembers it
                self._changes = {}
            elif self._isolated:
                isolation.withdraw(link)
            self._journal.begin(link, self._changes)
            nic.restore(self._links, link, self._changes)
        except nic.NotRestored:
            return  # the next command tries again
        except XdpErmError:
            pass  # the interface may be gone; the first error is the one to tell
        self._journal.finish(self._link)

    def settle(self) -> list[str]:
        """What can be done and known only now that the program is attached; a line if the driver does not run it."""
        links, name = self._links, self._link.name
        self._journal.finish(self._link)  # it is in the program's state now
        attached = find(links, name)
        if attached is None:
            raise XdpErmError(f"{name}: somebody else took the program off at once")
        state = attached.state if self._programs else self._state
        if not self._programs:
            self.said.append(f"{name}: already attached ({attached.mode}, program {attached.program_id})")
        known = None if self._programs else self._kept.get("received")
        state["received"] = known or running.baseline(links, attached)
        self._changes.clear()
        stack = topology.stack(links, attached.link)
        self.said += nic.settle(stack, self._intend)
        if attached.mode == "generic":
            self.said += [f"{name}: warning: {line}" for line in topology.untagged(links, attached.link)]
        plan = spread.Plan(**state["spread"])
        self.said += nic.set_rps(stack, plan.cpus if plan.how == "rps" else (), state["nic"], self._intend)
        state["nic"] = nic.merged(state["nic"], self._changes)
        if self._config.spread != "none":
            self.said.append(plan.line(self._link))
        counts_anew = any(self._maps.get(each) != attached.maps.get(each) for each in stats.BALANCED)
        if self._config.isolate and (counts_anew or state["filter"].get("balance") is None):
            state["filter"]["balance"] = stats.balance(attached)
        with bpf.Map.by_id(attached.maps[STATE_MAP]) as state_map:
            write_state(state_map, state)
        self._journal.finish(self._link)
        attached.state = state
        missed = running.unseen(links, attached, _PATIENCE, 1 if self._programs else running.SUSPECTED)
        return [f"{name}: warning: {running.told(attached, missed)}"] if missed else []

    def _intend(self, more: dict[str, Any]) -> None:
        """Notes what is about to be changed, for the next command in case that this one is killed."""
        self._changes.update({**more, **nic.merged(self._changes, more)})
        self._journal.begin(self._link, self._changes)


def _mend(journal: Journal, links: Links, name: str) -> tuple[Link, list[str], nic.NotRestored | None]:
    """The interface, once what a command before has left changed on its NIC is undone; a line for each such change;
    and what cannot be undone, which the journal keeps.
    """
    link = links.find(name)
    changes = journal.unfinished(link)
    current = attachment_of(link)
    undone = isolation.mend(link) if "clsact" in changes else []
    refused = None
    if changes and not (current and nic.merged(current.state["nic"], changes) == current.state["nic"]):
        try:
            undone += nic.restore(links, link, changes)
        except nic.NotRestored as error:
            refused = error
        link = links.now(link)
    if not refused:
        journal.finish(link)
    if undone:
        undone.insert(0, f"{link.name}: a command before was killed half-way or refused; what it had changed is undone "
                         "first")
    return link, undone, refused


def _mode(links: Links, link: Link, current: Attachment | None, config: InterfaceConfig,
          doubted: bool) -> tuple[str, str | None]:
    """The mode to attach in, and why it is generic: some drivers' native mode does not do."""
    scattered = stats.scattered(current) if current else 0
    if scattered and config.mode == "auto":
        return "generic", f"the driver has the headers of {scattered} frames in several pieces of memory"
    if current and current.mode == "native" and config.mode == "auto":
        missed = running.unseen(links, current, *((4 * _PATIENCE, 1) if doubted else (_PATIENCE, running.SUSPECTED)))
        if missed:
            return "generic", (f"{running.not_run(current)} in native mode: it has seen none of the last {missed} "
                               "packets")
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
        return _attach_best(links, link, candidates, programs)
    old = opened.enter_context(bpf.descriptor(bpf.program_fd(link.program_id)))
    if candidates[0].mode == link.mode:
        return _attach_best(links, link, candidates, programs, old,
                       "swapped the program" if current else f"replaced program {link.program_id} of somebody else")
    try:
        links.detach(link, link.mode, old)
    except Refused as refused:
        raise _not_replaced(link, refused) from None
    try:
        said = _attach_best(links, link, candidates, programs)
    except XdpErmError as error:
        try:
            links.attach(link, old, link.mode)
        except Refused as refused:
            raise XdpErmError(f"{error}; the program from before cannot be put back: {refused}; ERM is not "
                              "decapsulated now") from None
        raise
    return [f"{link.name}: the kernel allows no two programs, so there was none for a moment while the mode changed "
            f"from {link.mode}"] + said


def _attach_best(links: Links, link: Link, candidates: list[Candidate], programs: Programs,
                 replaced: int | None = None, verb: str = "attached") -> list[str]:
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
                if links.now(link).program_id is not None:
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
    with exclusive() as journal, Links() as links, _others_taking_it_off(name), _ctrl_c_waiting():
        link, mended, refused = _mend(journal, links, name)
        name = link.name
        current = attachment_of(link)
        if current is None:
            # Somebody else took the program off, or a command was killed half-way: the filter may be left.
            released = mended + isolation.release(link)
            if refused:
                raise _not_restored(name, refused)
            if link.program_id is None:
                return released or [f"{name}: xdp-erm is not attached"]
            return [f"{name}: program {link.program_id} ({_program_name(link.program_id)}) is not ours and stays",
                    *released]
        left = journal.unfinished(link)
        changes = nic.merged(current.state["nic"], left)
        journal.begin(link, changes)
        try:
            with bpf.descriptor(bpf.program_fd(current.program_id)) as program:
                links.detach(link, current.mode, program)
                stats.wait_for_queues(current)  # the filter stays for what waits in them
        except Refused as error:
            journal.begin(link, left)
            why = str(error)
            for other in topology.above(links, link):
                if other.program_id is not None:
                    why = f"{other.name}, which gets its frames, has one, too: `xdp-erm detach {other.name}` first"
            raise XdpErmError(f"{name}: program {current.program_id} cannot be taken off: {why}") from None
        changes = _unshared(links, changes)
        journal.begin(link, changes)
        said = [*mended, f"{name}: detached (program {current.program_id})"]
        try:
            said += nic.restore(links, links.now(link), changes)
            journal.finish(link)
            refused = None
        except nic.NotRestored as error:
            refused = error
        said += isolation.release(link)
        if refused:
            raise _not_restored(name, refused)
        return said


def _not_restored(name: str, refused: nic.NotRestored) -> XdpErmError:
    return XdpErmError(f"{name}: detached, but {refused}; run `xdp-erm detach {name}` again once that is possible")


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


def other_program(link: Link) -> XdpErmError:
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
