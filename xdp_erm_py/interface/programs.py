"""Compiles and loads the program that is to be attached, in the ways that the driver may take.

It goes on with the maps of the program that it replaces.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import resource
from typing import Any

from ..errors import XdpErmError
from ..kernel import bpf, btf
from ..kernel.links import Link
from ..program import compiler
from ..program.module import PULL_DATA
from ..settings import InterfaceConfig
from . import spread
from .ours import STATE_MAP, Attachment, write_state

# A later command may have more to remember than what was changed on the NIC.
_STATE_SLACK = 4096

#: The maps that a new program takes over from the one it replaces.
CARRIED_MAPS = ("counters", "own_sessions", "sessions", "numbers", "senders", "steered", "arrived")
#: Those whose keys name the encapsulation where there can be more than ERM.
KEYED_MAPS = ("own_sessions", "sessions", "numbers", "senders")
#: The queues to other CPUs, too, where nothing changes of them: what waits in old ones would be overtaken otherwise.
QUEUES_MAP = "cpus"


class Candidate:
    """A way to attach that the driver may take."""

    def __init__(self, link: Link, current: Attachment | None, config: InterfaceConfig, mode: str, frags: bool) -> None:
        self._link, self._current, self._config, self.mode, self.frags = link, current, config, mode, frags

    @functools.cached_property
    def plan(self) -> spread.Plan:
        """XdpErmError: `spread` asks for what is impossible in this mode."""
        return spread.plan(self._link, self._config, self.mode, self._current.state if self._current else None)

    @property
    def variant(self) -> compiler.Variant:
        can_pull = self.frags and btf.function_id(PULL_DATA) is not None
        return compiler.Variant(self.plan.lanes, self.frags, can_pull)

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """What of the program's state depends on it."""
        return {"digest": compiler.digest(self._config, self.variant), "frags": self.frags,
                "spread": self.plan._asdict()}


def candidates_for(link: Link, current: Attachment | None, config: InterfaceConfig, mode: str) -> list[Candidate]:
    """The best first. What is attached stays in its mode, if it may, and as it is; after a change of the MTU all is to
    be seen again."""
    outdated = current is not None and current.outdated is not None
    modes: tuple[str, ...] = (mode,)
    if mode == "auto":
        stays = link.mode == "native" or (link.mode == "generic" and not outdated)
        modes = (link.mode,) if stays and link.mode else ("native", "generic")
    candidates = []
    for each in modes:
        if current and current.mode == each and not outdated:
            ways = [current.state.get("frags", False)]
        else:
            # Drivers refuse an MTU whose frames need several pieces of memory to a program that does not take them so.
            ways = [False, True] if each == "native" else [False]
        candidates += [Candidate(link, current, config, each, frags) for frags in ways]
    return candidates


class NoFrags(Exception):
    """The kernel knows no XDP program that takes frames in several pieces of memory (Linux 5.18)."""


class Programs:
    """Compiles and loads what is to be attached, each with a state map that lives as long as it does."""

    def __init__(self, opened: contextlib.ExitStack, link: Link, current: Attachment | None, config: InterfaceConfig,
                 state: dict[str, Any], room: int, taken: bpf.Map | None) -> None:
        """`state` is a part of what a program's state map gets, as it is when the program is about to be attached, and
        `room` how many bytes that can take. `taken` is the map in which the filter counts that its frames are for."""
        self._opened, self._link, self._current, self._config, self._state = opened, link, current, config, state
        self._room, self._taken = room, taken
        self._loaded: dict[str, tuple[int, bpf.Map]] = {}
        self.said: list[str] = []
        #: What is to be remembered of a program that is attached in generic mode where native was to be tried.
        self.why_generic: str | None = state.get("why_generic")

    def load(self, candidate: Candidate) -> tuple[int, bpf.Map]:
        """The program's descriptor, and its state map, which is empty. A program is loaded once.

        XdpErmError: it does not compile, or the kernel does not take it. Raises NoFrags as well.
        """
        state = self._state_of(candidate)
        if state["digest"] not in self._loaded:
            try:
                compiled = self._opened.enter_context(compiler.Compiled(self._config, candidate.variant))
            except OSError as error:
                raise XdpErmError(f"{self._link.name}: the kernel does not make the XDP program's maps: "
                                  f"{error.strerror}") from None
            carried, self.said = _carried(self._opened, self._link, self._current, compiled, state)
            try:
                program = self._opened.enter_context(bpf.descriptor(compiled.load(carried)))
                state_map = self._opened.enter_context(bpf.Map.create_array(STATE_MAP, self._room + _STATE_SLACK))
                bpf.bind_map(program, state_map.fd)
                if self._taken:  # it is through this program that it is found
                    bpf.bind_map(program, self._taken.fd)
            except OSError as error:
                if candidate.frags and error.errno == errno.EINVAL:
                    raise NoFrags from None
                raise XdpErmError(f"{self._link.name}: the kernel does not load the XDP program: "
                                  f"{error.strerror}") from None
            self._loaded[state["digest"]] = program, state_map
        return self._loaded[state["digest"]]

    def ready(self, candidate: Candidate) -> int:
        """Its descriptor, once its state map says what is so now. Raises what load() raises."""
        program, state_map = self.load(candidate)
        write_state(state_map, self._state_of(candidate))
        return program

    def _state_of(self, candidate: Candidate) -> dict[str, Any]:
        return {**self._state, **candidate.state,
                "why_generic": self.why_generic if candidate.mode == "generic" else None}


def _carried(opened: contextlib.ExitStack, link: Link, current: Attachment | None, compiled: compiler.Compiled,
             state: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The maps of the program attached now that the new one can go on with: descriptors by name."""
    carried, said = {}, []
    if current:
        rekeyed = _is_only_erm(current.state) != _is_only_erm(state)
        if rekeyed:
            said = [f"{link.name}: sessions and foreign senders start again from zero: they are told apart otherwise "
                    "now"]
        names = [*CARRIED_MAPS, *([QUEUES_MAP] if _queues(current.state) == _queues(state) else [])]
        for name in names:
            if name in current.maps and name in compiled.maps and not (rekeyed and name in KEYED_MAPS):
                old = opened.enter_context(bpf.Map.by_id(current.maps[name]))
                if old.info._replace(id=0) != compiled.map_info(name)._replace(id=0):
                    return {}, [f"{link.name}: counters start again from zero: the attached program was of another "
                                f"version ({current.state['version']})"]
                carried[name] = old.fd
    return carried, said


def _is_only_erm(state: dict[str, Any]) -> bool:
    return bool(state["config"].get("encapsulations", ["erm"]) == ["erm"])


def _queues(state: dict[str, Any]) -> tuple[Any, ...]:
    """What the queues to other CPUs depend on, the program that runs there included."""
    return tuple(state.get(key) for key in ("version", "frags")) + (
        state["config"].get("spread_queue"), *state.get("spread", {}).get("cpus", ()))


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
