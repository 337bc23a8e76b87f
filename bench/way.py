"""What a mirrored frame's whole way into the stack costs, with what the program leaves for the kernel to do.

Seen from outside, by the time that live frames take: from the program through skb, packet taps (there is nobody at
them) and filter to where the stack or the filter drops the frame. In interleaved rounds, on the loopback interface of a
namespace of its own: no driver's work is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyroute2 import IPRoute

from xdp_erm_py.interface import isolation
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab import generate
from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.settings import InterfaceConfig

from . import bare, cost
from .table import Row

GROUP = "A frame's whole way into the stack"
BARE, DEFAULT = "bare strip", "as by default"


class Way(NamedTuple):
    case: cost.Case
    isolated: bool
    """Whether the filter is there."""
    note: str


def ways() -> dict[str, Way]:
    plain = InterfaceConfig(sessions=False, isolate=False, vlan="strip")
    frame = generate.layout_of(512, 2011, False).frame

    def way(statement: str, config: InterfaceConfig = plain, isolated: bool = False, note: str = "") -> Way:
        counters = ("decapsulated",) if statement == call else ()
        return Way(cost.Case(statement, frame, config, counters, end="XDP_PASS"), isolated, note)

    call = "xdp_erm(ctx);"
    return {
        "no-op": way("", note="the frame stays wrapped"),
        BARE: way(bare.STATEMENT),
        "bare strip, tag put back": way("bpf_xdp_adjust_head(ctx, 50); write_tag(ctx, 2011 << 8);",
                                        note="the kernel takes it out again"),
        "bare strip, filter": way(bare.STATEMENT, isolated=True, note="which looks at the frame and lets it pass"),
        "strip": way(call),
        "strip + VLAN": way(call, dataclasses.replace(plain, vlan="restore")),
        "strip + sessions": way(call, dataclasses.replace(plain, sessions=True)),
        "strip + isolation": way(call, dataclasses.replace(plain, isolate=True), True, "the filter takes the frame"),
        "as by default but vlan: strip": way(call, InterfaceConfig(vlan="strip"), True),
        DEFAULT: way(call, InterfaceConfig(), True),
    }


@contextlib.contextmanager
def stack(isolated: bool) -> Iterator[tuple[Namespace, bpf.Map]]:
    """A namespace into whose stack passed live frames come, when it is entered, and the map in which its filter counts
    what it takes."""
    with contextlib.closing(Namespace()) as namespace, isolation.counting({}) as taken:
        with namespace.entered():
            with IPRoute() as route:
                route.link("set", index=1, state="up")
            if isolated:
                with Links() as links:
                    isolation.isolate(links.find("lo"), None, taken, lambda _: None)
        yield namespace, taken


def run(directory: Path, quick: bool) -> list[Row]:
    rounds, count = (2, 20_000) if quick else (25, 150_000)
    measured: dict[str, list[float]] = {}
    with contextlib.ExitStack() as opened:
        stacks = {isolated: opened.enter_context(stack(isolated)) for isolated in (False, True)}
        made = {name: (way, opened.enter_context(cost.loaded(way.case))) for name, way in ways().items()}
        for _ in range(rounds):
            for name, (way, loaded) in made.items():
                namespace, _ = stacks[way.isolated]
                with namespace.entered():
                    measured.setdefault(name, []).append(loaded.nanoseconds(count))
    rows = [Row(GROUP, f"the whole way, {name}", "ns", measured[name], way.note) for name, way in ways().items()]
    for name, way in ways().items():
        if way.isolated or name == "strip":
            shares = [100 * value / least for value, least in zip(measured[name], measured[BARE])]
            rows.append(Row(GROUP, f"{name}, of the bare strip's way", "%", shares))
    return rows
