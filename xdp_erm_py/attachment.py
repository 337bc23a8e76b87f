"""Attaches, swaps, detaches and finds the XDP program.

There is no state file: the interface names its program, the program its maps, and one of these, `xdp_erm_state`, holds
what later commands need to know, as JSON. It lives and dies with the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

from . import __version__, bpf, compiler, isolation, nic
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

#: The maps that a new program takes over from the one it replaces.
CARRIED_MAPS = ("counters", "own_sessions", "sessions")


@dataclasses.dataclass
class Attachment:
    """Our program on an interface."""

    link: Link
    state: dict[str, Any]
    """version, digest, config, attached_at, nic (what was changed for it, see nic.py)"""
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
    return attachment_of(links.find(name))


def find_all(links: Links) -> list[Attachment]:
    """Our programs on the interfaces of this network namespace."""
    found = (attachment_of(link) for link in links)
    return [attachment for attachment in found if attachment is not None]


def attachment_of(link: Link) -> Attachment | None:
    """Our program on `link`, recognised by its state map."""
    if link.program_id is None:
        return None
    try:
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
                        state = json.loads(value[0].rstrip(b"\0")) if value else None
    except FileNotFoundError:
        return None  # detached while we looked
    return Attachment(link, state, maps) if state else None


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
            raise _foreign(link)
        digest = compiler.digest(config)
        state = {
            "version": __version__, "digest": digest, "config": config.as_dict(),
            "attached_at": current.state["attached_at"] if current else _now(),
            "nic": current.state["nic"] if current else {},
        }
        with contextlib.ExitStack() as opened:
            loaded = None
            mode, said = _mode(link, config)
            said = mended + said
            if not current or current.state["digest"] != digest or mode not in ("auto", current.mode):
                loaded = _load(opened, link, current, config, state)
            changes: dict[str, Any] = {}

            def intend(more: dict[str, Any]) -> None:
                changes.update(more)
                journal.begin(link, changes)

            isolated: list[str] = []
            try:
                said += nic.prepare(links, link, config.set_mtu, intend)
                state["nic"] = nic.merged(state["nic"], changes)
                if config.isolate:  # before there is anything to keep out
                    isolated = isolation.isolate(link)
                    said += isolated
                if loaded:
                    said += loaded.said
                    _write(loaded.state_map, state)
                    said += _put(opened, links, link, current, loaded.program, mode)
                if not config.isolate:
                    said += isolation.release(link)
            except BaseException as error:  # Ctrl-C as well
                with contextlib.suppress(XdpErmError):  # the interface may be gone; the first error is the one to tell
                    if isolated:
                        isolation.release(link)
                    nic.restore(links, links.find(name), changes)
                journal.end(link)
                if isinstance(error, OSError):
                    raise XdpErmError(f"{name}: not attached: {error.strerror}") from error
                raise
        journal.end(link)  # it is in the program's state now
        attached = find(links, name)
        if attached is None:
            raise XdpErmError(f"{name}: somebody else took the program off at once")
        if not loaded:
            said.append(f"{name}: already attached ({attached.mode}, program {attached.program_id})")
        changes.clear()
        said += nic.settle(attached.link, intend)
        state["nic"] = nic.merged(state["nic"], changes)
        with bpf.Map.by_id(attached.maps[STATE_MAP]) as state_map:
            _write(state_map, state)
        journal.end(link)
        return said


def _mend(journal: Journal, links: Links, name: str) -> tuple[Link, list[str]]:
    """The interface, once what a killed command has changed on its NIC is undone; and a line for each such change."""
    link = links.find(name)
    changes = journal.unfinished(link)
    current = attachment_of(link)
    said = []
    if changes and not (current and nic.merged(current.state["nic"], changes) == current.state["nic"]):
        said = [f"{name}: a command before was killed half-way; what it had changed is undone first"]
        said += nic.restore(links, link, changes)
        link = links.find(name)
    journal.end(link)
    return link, said


def _mode(link: Link, config: InterfaceConfig) -> tuple[str, list[str]]:
    """The mode to attach in, and what is to be said of it: isolation is impossible in native mode of some drivers."""
    driver = isolation.lacks_metadata(link) if config.isolate and config.mode != "generic" else None
    if driver is None:
        return config.mode, []
    reason = f"native XDP of its driver ({driver}) has no metadata, which isolation needs"
    if config.mode == "native":
        raise XdpErmError(f"{link.name}: {reason}: use generic mode (--mode auto), or isolate: false (--no-isolate)")
    return "generic", [f"{link.name}: {reason}: using generic mode, which is slower"]


class _Loaded(NamedTuple):
    program: int
    state_map: bpf.Map
    said: list[str]


def _load(opened: contextlib.ExitStack, link: Link, current: Attachment | None, config: InterfaceConfig,
          state: dict[str, Any]) -> _Loaded:
    """Compiles and loads a program, with a state map that lives as long as it does."""
    _require_bpf(link)
    compiled = opened.enter_context(compiler.Compiled(config))
    carried, said = _carried(opened, link, current, compiled)
    try:
        program = opened.enter_context(descriptor(compiled.load(carried)))
        state_map = opened.enter_context(bpf.Map.create_array(STATE_MAP, len(json.dumps(state)) + _STATE_SLACK))
        bpf.bind_map(program, state_map.fd)
    except OSError as error:
        raise XdpErmError(f"{link.name}: the kernel does not load the XDP program: {error.strerror}") from None
    return _Loaded(program, state_map, said)


def _put(opened: contextlib.ExitStack, links: Links, link: Link, current: Attachment | None, program: int,
         mode: str) -> list[str]:
    """The moment itself. In the same mode the swap is atomic."""
    program_id = bpf.program_info(program).id
    if link.program_id is None or link.mode is None:
        return _attach_anew(links, link, program, program_id, mode)
    old = opened.enter_context(descriptor(bpf.program_fd(link.program_id)))
    try:
        if mode in ("auto", link.mode) and link.mode != "offload":
            links.attach(link, program, link.mode, replaced=old)
            verb = "swapped the program" if current else f"replaced program {link.program_id} of somebody else"
            return [f"{link.name}: {verb} ({link.mode}, program {program_id})"]
        links.detach(link, link.mode, old)
    except Refused as refused:
        if refused.code == errno.EBUSY:
            raise _linked(link) from None
        raise XdpErmError(f"{link.name}: program {link.program_id} cannot be replaced: {refused}") from None
    try:
        said = _attach_anew(links, link, program, program_id, mode)
    except XdpErmError as error:
        try:
            links.attach(link, old, link.mode)
        except Refused as refused:
            raise XdpErmError(f"{error}; the program from before cannot be put back: {refused}; ERM is not "
                              "decapsulated now") from None
        raise
    return [f"{link.name}: the kernel allows no two programs, so there was none for a moment while the mode changed "
            f"from {link.mode}"] + said


def _attach_anew(links: Links, link: Link, program: int, program_id: int, mode: str) -> list[str]:
    said: list[str] = []
    for attempt in ("native", "generic") if mode == "auto" else (mode,):
        try:
            links.attach(link, program, attempt)
            return said + [f"{link.name}: attached ({attempt}, program {program_id})"]
        except Refused as refused:
            if refused.code in (errno.EBUSY, errno.EEXIST):
                raise XdpErmError(f"{link.name}: somebody else attached an XDP program just now: try again") from None
            if attempt == "generic" or mode == "native":
                hint = "; --mode generic works with every driver" if mode == "native" else ""
                raise XdpErmError(f"{link.name}: XDP is refused in {attempt} mode: {refused}{hint}") from None
            said.append(f"{link.name}: the driver refuses native XDP ({refused}): using generic mode, which is slower")
    raise AssertionError("the last attempt either attached or raised")


def _carried(opened: contextlib.ExitStack, link: Link, current: Attachment | None,
             compiled: compiler.Compiled) -> tuple[dict[str, int], list[str]]:
    """The maps of the program attached now that the new one can go on with: descriptors by name."""
    carried = {}
    if current:
        for name in CARRIED_MAPS:
            if name in current.maps and name in compiled.maps:
                old = opened.enter_context(bpf.Map.by_id(current.maps[name]))
                if old.info._replace(id=0) != compiled.map_info(name)._replace(id=0):
                    return {}, [f"{link.name}: counters start again from zero: the attached program was of another "
                                f"version ({current.state['version']})"]
                carried[name] = old.fd
    return carried, []


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
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _require_bpf(link: Link) -> None:
    """Fails where the kernel gives us no BPF at all, in clearer words than bcc's."""
    # Before Linux 5.11 maps are charged to the limit on locked memory, often 64 KiB; without CAP_SYS_RESOURCE it stays.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        with bpf.Map.create_array("xdp_erm_probe", 8):
            pass
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise XdpErmError(f"{link.name}: this kernel has no BPF and so no XDP (CONFIG_BPF_SYSCALL)") from None
        raise XdpErmError(f"{link.name}: this kernel refuses BPF to root: {error.strerror} (kernel lockdown, or a "
                          "container without CAP_BPF and CAP_NET_ADMIN)") from None


def _program_name(program_id: int) -> str:
    try:
        with descriptor(bpf.program_fd(program_id)) as program:
            return bpf.program_info(program).name or "without a name"
    except FileNotFoundError:
        return "gone by now"


def _foreign(link: Link) -> XdpErmError:
    assert link.program_id is not None
    name = _program_name(link.program_id)
    if name == "xdp_dispatcher":
        return XdpErmError(f"{link.name}: libxdp's dispatcher (program {link.program_id}, {name}) holds the interface; "
                           f"free it with `xdp-loader unload {link.name} --all`, or replace it with --force")
    keyword = {"native": "xdpdrv", "generic": "xdpgeneric", "offload": "xdpoffload"}[link.mode or "native"]
    return XdpErmError(f"{link.name}: another XDP program is attached (program {link.program_id}, {name}); free the "
                       f"interface with `ip link set dev {link.name} {keyword} off`, or replace it with --force")


def _linked(link: Link) -> XdpErmError:
    return XdpErmError(f"{link.name}: program {link.program_id} is held by a BPF link, which only its owner can "
                       "release: stop that process (`bpftool link` names it)")
