"""Attaches, swaps, detaches and finds the XDP program.

There is no state file: the interface names its program, the program its maps, and one of these, `xdp_erm_state`, holds
what later commands need to know, as JSON. It lives and dies with the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import resource
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

from . import __version__, bpf, compiler, isolation, nic, spread
from .config import InterfaceConfig
from .errors import XdpErmError
from .journal import Journal, exclusive
from .links import Link, Links
from .netlink import Refused
from .privileges import require_to_change

STATE_MAP = "xdp_erm_state"
_STATE_KEY = bytes(4)
# A later command may have more to remember, an offload that came on since.
_STATE_SLACK = 1024
_STATE_TYPES = {"version": str, "digest": str, "config": dict, "nic": dict}
_TIME = "%Y-%m-%dT%H:%M:%SZ"  # UTC

#: The maps that a new program takes over from the one it replaces.
CARRIED_MAPS = ("counters", "own_sessions", "sessions", "senders", "steered", "arrived")
#: The queues to other CPUs, too, where nothing changes of them: what waits in old ones would be overtaken otherwise.
QUEUES_MAP = "cpus"


@dataclasses.dataclass
class Attachment:
    """Our program on an interface."""

    link: Link
    state: dict[str, Any]
    """version, digest, config, attached_at, since_boot (the same moment in seconds since boot), spread (a spread.Plan),
    frags (whether it takes frames in several pieces of memory), nic (what was changed for it, see nic.py)"""
    maps: dict[str, int]
    """The program's maps: ids by name."""

    @property
    def program_id(self) -> int:
        assert self.link.program_id is not None
        return self.link.program_id

    @property
    def mode(self) -> str:
        assert self.link.mode is not None
        return self.link.mode


@contextlib.contextmanager
def descriptor(fd: int) -> Iterator[int]:
    """Closes `fd` after the with block."""
    try:
        yield fd
    finally:
        os.close(fd)


def find(links: Links, name: str) -> Attachment | None:
    """Our program on interface `name`; None where there is none or somebody else's."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # swapped or detached while we looked
            return _attachment_of(links.find(name))


def find_all(links: Links) -> list[Attachment]:
    """Our programs on the interfaces of this network namespace."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # swapped or detached while we looked
            found = [_attachment_of(link) for link in links]
            return [attachment for attachment in found if attachment is not None]


def attachment_of(link: Link) -> Attachment | None:
    """Our program on `link`, recognised by its state map."""
    try:
        return _attachment_of(link)
    except FileNotFoundError:
        return None  # detached while we looked


def _attachment_of(link: Link) -> Attachment | None:
    """FileNotFoundError: the program is gone by now."""
    if link.program_id is None:
        return None
    with descriptor(bpf.program_fd(link.program_id)) as program:
        info = bpf.program_info(program)
        if info.name != compiler.PROGRAM:
            return None
        maps = {}
        state = None
        for map_id in info.map_ids:
            with bpf.Map.by_id(map_id) as map_:
                maps[map_.info.name] = map_id
                if map_.info.name == STATE_MAP:
                    value = map_.lookup(_STATE_KEY)
                    state = _state(value[0]) if value else None
    return Attachment(link, state, maps) if state else None


def _state(value: bytes) -> dict[str, Any] | None:
    """What a state map says. None: no state of ours, as any root process can make a map of that name."""
    try:
        state = json.loads(value.rstrip(b"\0"))
        datetime.strptime(state["attached_at"], _TIME)
        plausible = all(isinstance(state[key], kind) for key, kind in _STATE_TYPES.items())
        plan = state.get("spread")  # versions before it had none
        if plan:
            plausible &= isinstance(plan["how"], str) and all(type(cpu) is int for cpu in plan["cpus"])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return state if plausible else None


def attach(name: str, config: InterfaceConfig, force: bool = False) -> list[str]:
    """Attaches xdp-erm to interface `name`, or brings what is attached to `config`.

    Returns a line for each thing that was done. Raises XdpErmError; then the interface is as it was before, unless it
    says otherwise or an offload that came on with the program cannot be turned off. `force` replaces another's program.
    """
    require_to_change()
    with exclusive() as journal, Links() as links:
        link, mended = _mend(journal, links, name)
        current = attachment_of(link)
        if link.program_id is not None and current is None and not force:
            raise foreign(link)
        mode, said = _mode(link, config)
        said = mended + said
        candidates = _candidates(link, current, config, mode)
        kept = current.state if current else {
            "attached_at": _now(), "since_boot": time.clock_gettime(time.CLOCK_BOOTTIME), "nic": {}}
        state = {"version": __version__, "config": config.as_dict(), "attached_at": kept["attached_at"],
                 "since_boot": kept.get("since_boot"), "nic": kept["nic"], **candidates[0].state}
        with contextlib.ExitStack() as opened:
            programs = None
            if not current or (candidates[0].mode, state["digest"]) != (current.mode, current.state["digest"]):
                programs = _Programs(opened, link, current, config, state)
                programs.load(candidates[0])  # what fails shall fail before anything is changed
            changes: dict[str, Any] = {}

            def intend(more: dict[str, Any]) -> None:
                changes.update(more)
                journal.begin(link, changes)

            isolated: list[str] = []
            try:
                said += nic.prepare(links, link, config.set_mtu, intend)
                state["nic"] = nic.merged(state["nic"], changes)
                if config.isolate:  # before there is anything to keep out
                    isolated = isolation.isolate(link, intend)
                    said += isolated
                if programs:
                    said += _put(opened, links, link, current, candidates, programs)
                if config.isolate:
                    isolation.retire(link)
                else:
                    said += isolation.release(link)
            except BaseException as error:  # Ctrl-C as well
                with contextlib.suppress(XdpErmError):  # the interface may be gone; the first error is the one to tell
                    if isolated:
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
        changes.clear()
        said += nic.settle(attached.link, intend)
        plan = spread.Plan(**state["spread"])
        said += nic.steer(attached.link, plan.cpus if plan.how == "rps" else (), state["nic"], intend)
        state["nic"] = nic.merged(state["nic"], changes)
        if config.spread != "none":
            said.append(plan.line(link))
        with bpf.Map.by_id(attached.maps[STATE_MAP]) as state_map:
            _write(state_map, state)
        journal.end(link)
        return said


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
        undone.insert(0, f"{name}: a command before was killed half-way; what it had changed is undone first")
    return link, undone


def _mode(link: Link, config: InterfaceConfig) -> tuple[str, list[str]]:
    """The mode to attach in, and what is to be said of it: isolation is impossible in native mode of some drivers."""
    driver = isolation.lacks_metadata(link) if config.isolate and config.mode != "generic" else None
    if driver is None:
        return config.mode, []
    reason = f"native XDP of its driver ({driver}) has no metadata, which isolation needs"
    if config.mode == "native":
        raise XdpErmError(f"{link.name}: {reason}: use generic mode (--mode auto), or isolate: false (--no-isolate)")
    return "generic", [f"{link.name}: {reason}: using generic mode, which is slower"]


class _Candidate:
    """A way to attach that the driver may take."""

    def __init__(self, link: Link, config: InterfaceConfig, mode: str, frags: bool) -> None:
        self._link, self._config, self.mode, self.frags = link, config, mode, frags

    @functools.cached_property
    def plan(self) -> spread.Plan:
        """XdpErmError: `spread` asks for what is impossible in this mode."""
        return spread.plan(self._link, self._config, self.mode)

    @property
    def variant(self) -> compiler.Variant:
        return compiler.Variant(self.plan.lanes, self.frags)

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """What of the program's state depends on it."""
        return {"digest": compiler.digest(self._config, self.variant), "frags": self.frags,
                "spread": self.plan._asdict()}


def _candidates(link: Link, current: Attachment | None, config: InterfaceConfig, mode: str) -> list[_Candidate]:
    """The best first. What is attached stays in its mode, if it may."""
    modes: tuple[str, ...] = (mode,)
    if mode == "auto":
        modes = (link.mode,) if link.mode in ("native", "generic") else ("native", "generic")
    candidates = []
    for each in modes:
        if current and current.mode == each:
            ways = [current.state.get("frags", False)]
        else:
            # Drivers refuse an MTU whose frames need several pieces of memory to a program that does not take them so.
            ways = [False, True] if each == "native" else [False]
        candidates += [_Candidate(link, config, each, frags) for frags in ways]
    return candidates


class _NoFrags(Exception):
    """The kernel knows no XDP program that takes frames in several pieces of memory (Linux 5.18)."""


class _Programs:
    """Compiles and loads what is to be attached, each with a state map that lives as long as it does."""

    def __init__(self, opened: contextlib.ExitStack, link: Link, current: Attachment | None, config: InterfaceConfig,
                 state: dict[str, Any]) -> None:
        """`state` is a part of what a program's state map gets, as it is when the program is about to be attached."""
        self._opened, self._link, self._current, self._config, self._state = opened, link, current, config, state
        self._loaded: dict[str, tuple[int, bpf.Map]] = {}
        self.said: list[str] = []
        refused = bpf_refused()
        if refused:
            raise XdpErmError(f"{link.name}: {refused}")

    def load(self, candidate: _Candidate) -> tuple[int, bpf.Map]:
        """The program's descriptor, and its state map, which is empty. A program is loaded once.

        XdpErmError: it does not compile, or the kernel does not take it. Raises _NoFrags as well.
        """
        state = self._state_of(candidate)
        if state["digest"] not in self._loaded:
            compiled = self._opened.enter_context(compiler.Compiled(self._config, candidate.variant))
            carried, self.said = _carried(self._opened, self._link, self._current, compiled, state)
            try:
                program = self._opened.enter_context(descriptor(compiled.load(carried)))
                size = len(json.dumps(state)) + _STATE_SLACK
                state_map = self._opened.enter_context(bpf.Map.create_array(STATE_MAP, size))
                bpf.bind_map(program, state_map.fd)
            except OSError as error:
                if candidate.frags and error.errno == errno.EINVAL:
                    raise _NoFrags from None
                raise XdpErmError(f"{self._link.name}: the kernel does not load the XDP program: "
                                  f"{error.strerror}") from None
            self._loaded[state["digest"]] = program, state_map
        return self._loaded[state["digest"]]

    def ready(self, candidate: _Candidate) -> int:
        """Its descriptor, once its state map says what is so now. Raises what load() raises."""
        program, state_map = self.load(candidate)
        _write(state_map, self._state_of(candidate))
        return program

    def _state_of(self, candidate: _Candidate) -> dict[str, Any]:
        return {**self._state, **candidate.state}


def _put(opened: contextlib.ExitStack, links: Links, link: Link, current: Attachment | None,
         candidates: list[_Candidate], programs: _Programs) -> list[str]:
    """The moment itself. In the same mode the swap is atomic."""
    if link.program_id is None or link.mode is None:
        return _attach(links, link, candidates, programs)
    old = opened.enter_context(descriptor(bpf.program_fd(link.program_id)))
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


def _attach(links: Links, link: Link, candidates: list[_Candidate], programs: _Programs, replaced: int | None = None,
            verb: str = "attached") -> list[str]:
    """Attaches the first candidate that the driver takes."""
    said: list[str] = []
    refusal: Refused | None = None
    for candidate in candidates:
        try:
            program = programs.ready(candidate)
        except _NoFrags:
            continue
        except XdpErmError as error:
            refused_before = f"; the driver refuses native XDP ({refusal})" if refusal else ""
            raise XdpErmError(f"{error}{refused_before}") from None
        if refusal and candidate.mode == "generic":
            said.append(f"{link.name}: the driver refuses native XDP ({refusal}): using generic mode, which is slower")
        try:
            links.attach(link, program, candidate.mode, replaced)
            frags = ", multi-buffer" if candidate.frags else ""
            return [*programs.said, *said,
                    f"{link.name}: {verb} ({candidate.mode}{frags}, program {bpf.program_info(program).id})"]
        except Refused as refused:
            if replaced is not None:
                raise _not_replaced(link, refused) from None
            if refused.code in (errno.EBUSY, errno.EEXIST):
                raise XdpErmError(f"{link.name}: somebody else attached an XDP program just now: try again") from None
            if not candidate.frags:  # why without them is what there is to tell
                refusal = refused
    mode = candidates[-1].mode
    hint = "; --mode generic works with every driver" if mode == "native" else ""
    raise XdpErmError(f"{link.name}: XDP is refused in {mode} mode: {refusal}{hint}")


def _carried(opened: contextlib.ExitStack, link: Link, current: Attachment | None, compiled: compiler.Compiled,
             state: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The maps of the program attached now that the new one can go on with: descriptors by name."""
    carried = {}
    if current:
        names = [*CARRIED_MAPS, *([QUEUES_MAP] if _queues(current.state) == _queues(state) else [])]
        for name in names:
            if name in current.maps and name in compiled.maps:
                old = opened.enter_context(bpf.Map.by_id(current.maps[name]))
                if old.info._replace(id=0) != compiled.map_info(name)._replace(id=0):
                    return {}, [f"{link.name}: counters start again from zero: the attached program was of another "
                                f"version ({current.state['version']})"]
                carried[name] = old.fd
    return carried, []


def _queues(state: dict[str, Any]) -> tuple[Any, ...]:
    """What the queues to other CPUs depend on, the program that runs there included."""
    return tuple(state.get(key) for key in ("version", "frags")) + (
        state["config"].get("spread_queue"), *state.get("spread", {}).get("cpus", ()))


def _write(state_map: bpf.Map, state: dict[str, Any]) -> None:
    """Puts the state into its map, padded with NUL bytes."""
    state_map.update(_STATE_KEY, json.dumps(state).encode().ljust(state_map.info.value_size, b"\0"))


def detach(name: str) -> list[str]:
    """Takes xdp-erm off interface `name` and brings the NIC's old settings back; nothing where it is not attached."""
    require_to_change()
    with exclusive() as journal, Links() as links:
        link, mended = _mend(journal, links, name)
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
            with descriptor(bpf.program_fd(current.program_id)) as program:
                links.detach(link, current.mode, program)
        except Refused as refused:
            journal.end(link)
            raise XdpErmError(f"{name}: program {current.program_id} cannot be taken off: {refused}") from None
        said = [*mended, f"{name}: detached (program {current.program_id})"]
        said += nic.restore(links, links.find(name), current.state["nic"])
        journal.end(link)
        return said + isolation.release(link)


def _now() -> str:
    return datetime.now(timezone.utc).strftime(_TIME)


def bpf_refused() -> str | None:
    """Why the kernel gives us no BPF at all, in clearer words than bcc's; None: it does."""
    # Before Linux 5.11 maps are charged to the limit on locked memory, often 64 KiB; without CAP_SYS_RESOURCE it stays.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        with bpf.Map.create_array("xdp_erm_probe", 8):
            pass
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return "this kernel has no BPF and so no XDP (CONFIG_BPF_SYSCALL)"
        return (f"this kernel refuses BPF to root: {error.strerror} (kernel lockdown, or a container without CAP_BPF "
                "and CAP_NET_ADMIN)")
    return None


def _program_name(program_id: int) -> str:
    try:
        with descriptor(bpf.program_fd(program_id)) as program:
            return bpf.program_info(program).name or "without a name"
    except FileNotFoundError:
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
