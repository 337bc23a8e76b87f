"""Somebody else's XDP program, which does nothing."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.bpf import descriptor
from xdp_erm_py.kernel.links import Links

# r0 = XDP_PASS; exit
INSTRUCTIONS = bytes.fromhex("b700000002000000 9500000000000000")

# uapi linux/bpf.h and linux/if_link.h
_BPF_LINK_CREATE = 28
_BPF_XDP = 37
_XDP_FLAGS_DRV_MODE = 1 << 2


def attach(interface: str, mode: str, name: str = "somebody") -> int:
    """Puts a program of that name on the interface as `ip link` would; returns its id."""
    with Links() as links, _loaded(name) as program:
        links.attach(links.find(interface), program, mode)
        return bpf.program_info(program).id


@contextlib.contextmanager
def linked(interface: str) -> Iterator[int]:
    """The same in native mode by a BPF link, which holds the interface until the with block ends; gives its id."""
    with Links() as links, _loaded("somebody") as program:
        request = struct.pack("=IIII", program, links.find(interface).index, _BPF_XDP, _XDP_FLAGS_DRV_MODE)
        with descriptor(bpf._bpf(_BPF_LINK_CREATE, request)):
            yield bpf.program_info(program).id


@contextlib.contextmanager
def _loaded(name: str) -> Iterator[int]:
    with descriptor(bpf.load_xdp(name, INSTRUCTIONS, b"GPL")) as program:
        yield program
