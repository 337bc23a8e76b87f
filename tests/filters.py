"""What sees incoming frames behind the packet taps: tcx programs, then filters; ours and somebody else's."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from pyroute2 import IPRoute
from shell import shell

from xdp_erm_py.interface import isolation
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links

NEXT, PASS, DROP = -1, 0, 2  # what a program says of a frame

_TCX_INGRESS, _AFTER = 46, 1 << 4


def tcx(interface: str) -> list[str]:
    """The names of the tcx programs, in the order in which they run."""
    return [name for name, _ in _tcx(interface)]


def clsact(interface: str) -> list[str]:
    """The names of the BPF filters, likewise."""
    return re.findall(r"handle 0x\w+ (\S+) direct-action", shell(f"tc filter show dev {interface} ingress"))


def qdiscs(interface: str) -> set[str]:
    return set(re.findall(r"qdisc (\w+)", shell(f"tc qdisc show dev {interface}")))


def everything(interface: str) -> str:
    """All that there is of it, to be compared."""
    return f"{_tcx(interface)} " + shell(f"tc qdisc show dev {interface}; tc filter show dev {interface} ingress")


def take_away(interface: str) -> None:
    """Takes our filter away, as somebody else may."""
    for name, program_id in _tcx(interface):
        if name == isolation.FILTER:
            with bpf.descriptor(bpf.program_fd(program_id)) as program:
                bpf.detach_tcx(_index(interface), program)
    if any(name.startswith(isolation.FILTER) for name in clsact(interface)):
        shell(f"tc filter del dev {interface} ingress pref 1")


def add_tcx(interface: str, says: int, first: bool = True) -> None:
    """Somebody else's tcx program "theirs", before or behind all others."""
    with bpf.descriptor(_program(says)) as program:
        index = _index(interface)
        found = bpf.tcx(index)
        assert found
        if first:
            bpf.attach_tcx(index, program, found.revision)
        else:
            bpf._bpf(bpf._PROG_ATTACH, struct.pack("=IIIIIIQ", index, program, _TCX_INGRESS, _AFTER, 0, 0, 0))


def add_clsact(interface: str, preference: int, says: int = PASS, protocol: int = 3) -> None:
    """Somebody else's filter "theirs", of all protocols or one; what is not NEXT ends the matter."""
    with bpf.descriptor(_program(says)) as program, IPRoute() as route:
        route.tc("add-filter", "bpf", _index(interface), 0, fd=program, name="theirs", parent=0xFFFFFFF2,
                 prio=preference, protocol=protocol, classid=0, direct_action=True)


def _program(says: int) -> int:
    # r0 = says; exit
    return bpf.load_classifier("theirs", struct.pack("=BBhi", 0xb7, 0, 0, says) + bytes.fromhex("9500000000000000"),
                               b"GPL")


def _tcx(interface: str) -> list[tuple[str, int]]:
    found = bpf.tcx(_index(interface))
    return list(_named(found.programs)) if found else []


def _named(programs: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    for program_id in programs:
        with bpf.descriptor(bpf.program_fd(program_id)) as program:
            yield bpf.program_info(program).name, program_id


def _index(interface: str) -> int:
    with Links() as links:
        return links.find(interface).index
