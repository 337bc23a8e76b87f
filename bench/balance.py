"""Packets per second that reach AF_PACKET members, by arrangement, number of members and what a packet costs them.

The generator sends as many packets as its CPU makes. A veth's receiver runs on the CPU that sends: what is measured on
one CPU is the generator and the receiving together, so that the generator alone stands in the table as well. A NIC in
its place would cost that CPU less, and all arrangements that CPU has the work in would reach more.

What spreading can gain is bounded by what the CPUs together do of one's work, which for two threads of one core is far
from twice: that stands in the table, too.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from xdp_erm_py.interface import loader, nic
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab import generate
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, SWITCH_INTERFACE, Cable
from xdp_erm_py.program import compiler
from xdp_erm_py.program.module import Module
from xdp_erm_py.settings import InterfaceConfig

from . import bare
from .load import FLOWS, GENERATOR_CPU, Load, Members, Reached, let_in_without_xdp, reached, sent
from .table import Row

GROUP = "Packets that reach members"
MEMBERS = (1, 2, 4)


class Demand(NamedTuple):
    """What a packet costs a member, and how many are sent."""

    work: int
    """Nanoseconds."""
    rate: int | None
    """Packets per second; None: as many as the generator makes."""


# Members that only count show what the kernel's part takes. Those that work, as Zeek does, show what balancing gains:
# there the generator must leave its CPU to them for most of the time, which a sensor's NIC does by itself.
DEMANDS = {"no work": Demand(0, None), "5 µs at 250,000/s": Demand(5000, 250_000)}
SIZE = 512  # bytes of the mirrored frame

SPREAD = (1, 2, 4)  # CPUs


#: An arrangement: a program that does the least there is to do.
BARE = "bare"


def arrangements() -> dict[str, InterfaceConfig | str | None]:
    """By name; None: without XDP."""
    # The generator's CPU comes last, as it has work already.
    cpus = sorted(os.sched_getaffinity(0), key=lambda cpu: (cpu == GENERATOR_CPU, cpu))
    found: dict[str, InterfaceConfig | str | None] = {
        "no XDP": None, "bare strip": BARE, "xdp-erm none": InterfaceConfig()}
    for how in ("rps", "cpumap"):
        for count in SPREAD:
            if count <= len(cpus):
                name = f"xdp-erm {how}, {count} CPU{'s' if count > 1 else ''}"
                found[name] = InterfaceConfig(spread=how, spread_cpus=tuple(cpus[:count]))
    return found


ARRANGEMENTS = arrangements()

DROP = "int drop_all(struct xdp_md *ctx) { return XDP_DROP; }"


class Case(NamedTuple):
    arrangement: str
    demand: str
    members: int

    @property
    def name(self) -> str:
        return f"{self.arrangement}, {self.demand}, {self.members} member{'s' if self.members > 1 else ''}"


def cases() -> list[Case]:
    return [Case(arrangement, demand, members)
            for demand in DEMANDS for arrangement in ARRANGEMENTS for members in MEMBERS]


@contextlib.contextmanager
def arranged(config: InterfaceConfig | str | None) -> Iterator[Cable]:
    """A cable whose sensor's end is ready for the load: xdp-erm attached, the bare strip, or nothing."""
    with Cable() as cable:
        with cable.sensor.entered():
            if config == BARE:
                with bare.loaded() as program, Links() as links:
                    nic.prepare(links, [links.find(SENSOR_INTERFACE)], 0, False, lambda _: None)
                    links.attach(links.find(SENSOR_INTERFACE), program, "native")
            elif isinstance(config, InterfaceConfig):
                loader.attach(SENSOR_INTERFACE, config)
            else:
                let_in_without_xdp()
        cable.wait_for_carrier()
        yield cable


def measure(cable: Cable, directory: Path, case: Case, seconds: float) -> Reached:
    layout, demand = generate.layout_of(SIZE, 2011, False), DEMANDS[case.demand]
    with cable.sensor.entered(), Members(directory, SENSOR_INTERFACE, case.members, demand.work) as members, \
            Load(cable, layout, demand.rate) as load:
        return reached(load, members, seconds)


@contextlib.contextmanager
def dropping() -> Iterator[int]:
    """A program that drops all, loaded: its descriptor."""
    with Module(compiler.compiled(DROP, [])) as module, bpf.descriptor(module.load_xdp("drop_all")) as program:
        yield program


def generator_alone(count: int) -> float:
    """Packets per second that the generator makes for a receiver that drops them at once."""
    layout = generate.layout_of(SIZE, 2011, False)
    with Cable() as cable, dropping() as program:
        with cable.sensor.entered(), Links() as links:
            links.attach(links.find(SENSOR_INTERFACE), program, "native")
        cable.wait_for_carrier()
        with cable.switch.entered(), Links() as links, \
                generate.loaded(links.find(SWITCH_INTERFACE).index, layout, FLOWS, 1) as generator:
            nanoseconds = bpf.run_live(generator, layout.frame, count)
        if sent(cable) < count:
            raise RuntimeError(f"of {count} frames of the generator the receiver has seen {sent(cable)}")
        return 1e9 / nanoseconds


def together(count: int) -> float:
    """How many times the packets of one CPU all CPUs drop at once."""
    cpus = sorted(os.sched_getaffinity(0))
    with dropping() as program:
        return sum(_dropped(program, cpus, count)) / sum(_dropped(program, cpus[:1], count))


def _dropped(program: int, cpus: list[int], count: int) -> list[float]:
    """Packets per nanosecond, by CPU, of threads that begin at once."""
    frame, beginning = bytes(SIZE), threading.Barrier(len(cpus))

    def drop(cpu: int) -> float:
        os.sched_setaffinity(0, {cpu})  # this thread's
        beginning.wait()
        return 1 / bpf.run_live(program, frame, count)

    with ThreadPoolExecutor(len(cpus)) as threads:
        return list(threads.map(drop, cpus))


def run(directory: Path, quick: bool) -> list[Row]:
    rounds, seconds = (1, 0.4) if quick else (5, 1.6)
    alone: list[float] = []
    ratios: list[float] = []
    found: dict[Case, list[Reached]] = {case: [] for case in cases()}
    with contextlib.ExitStack() as stack:
        cables = {name: stack.enter_context(arranged(config)) for name, config in ARRANGEMENTS.items()}
        for _ in range(rounds):
            ratios.append(together(20_000 if quick else 2_000_000))
            alone.append(generator_alone(20_000 if quick else 1_000_000))
            for case, results in found.items():
                results.append(measure(cables[case.arrangement], directory, case, seconds))
    rows = [Row(GROUP, "all CPUs at once", "times one's", ratios, "packets that XDP drops"),
            Row(GROUP, "the generator alone", "packets/s", alone, "the receiver drops at once, same CPU")]
    for case, results in found.items():
        values = [sum(result.packets) for result in results]
        rows.append(Row(GROUP, case.name, "packets/s", values, results[-1].note))
        rows.append(Row(GROUP, f"{case.name}, per CPU", "packets/s",
                        [value / sum(result.busy) for value, result in zip(values, results)]))
    return rows

