"""What one would do without xdp-erm, on the same mirrored frames: packets per second that reach two members.

A decapsulator in userspace (bench/userspace.c), and the kernel's VXLAN device, the nearest tunnel that the kernel takes
off itself: the same frames within VXLAN, which no switch sends in place of ERM.
"""

from __future__ import annotations

import contextlib
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from xdp_erm_py.lab import generate
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, Cable
from xdp_erm_py.lab.traffic import SENSOR_ADDRESS, internet_checksum
from xdp_erm_py.settings import InterfaceConfig

from .balance import SIZE, arranged
from .load import Load, Members, Reached, let_in_without_xdp, reached, started
from .table import Row

GROUP = "What one would do without it"
MEMBERS = 2
VXLAN_PORT, VXLAN_ID = 4789, 7
VXLAN, TAP = "vxlan0", "tap0"


@contextlib.contextmanager
def xdp_erm(directory: Path) -> Iterator[tuple[Cable, str, generate.Layout]]:
    with arranged(InterfaceConfig()) as cable:
        yield cable, SENSOR_INTERFACE, generate.layout_of(SIZE, 2011, False)


@contextlib.contextmanager
def userspace(directory: Path) -> Iterator[tuple[Cable, str, generate.Layout]]:
    with arranged(None) as cable, cable.sensor.entered(), started(directory / "userspace", SENSOR_INTERFACE, TAP):
        yield cable, TAP, generate.layout_of(SIZE, 2011, False)


@contextlib.contextmanager
def vxlan(directory: Path) -> Iterator[tuple[Cable, str, generate.Layout]]:
    """OSError: this kernel has no VXLAN device."""
    layout = within_vxlan(generate.layout_of(SIZE, 0, False))
    with Cable() as cable:
        with cable.sensor.entered():
            let_in_without_xdp()
            _ip("link", "set", SENSOR_INTERFACE, "address", layout.frame[:6].hex(":"))
            _ip("address", "add", f"{SENSOR_ADDRESS}/24", "dev", SENSOR_INTERFACE)
            _ip("route", "add", "default", "dev", SENSOR_INTERFACE)
            _ip("link", "add", VXLAN, "type", "vxlan", "id", str(VXLAN_ID), "dstport", str(VXLAN_PORT),
                "local", SENSOR_ADDRESS, "nolearning")
            _ip("link", "set", VXLAN, "up")
        cable.wait_for_carrier()
        yield cable, VXLAN, layout


def within_vxlan(layout: generate.Layout) -> generate.Layout:
    """The same mirrored frame within VXLAN, whose header is 8 bytes where ERM's is 12."""
    mirrored = layout.frame[generate.MIRRORED:]
    header = struct.pack("!II", 1 << 27, VXLAN_ID << 8)
    udp_length = 8 + len(header) + len(mirrored)
    ethernet, ip, udp = layout.frame[:14], layout.frame[14:34], layout.frame[34:42]
    ip = ip[:2] + struct.pack("!H", 20 + udp_length) + ip[4:10] + bytes(2) + ip[12:]
    ip = ip[:10] + struct.pack("!H", internet_checksum(ip)) + ip[12:]
    udp = udp[:2] + struct.pack("!HHH", VXLAN_PORT, udp_length, 0)
    return generate.Layout(ethernet + ip + udp + header + mirrored, layout.headers - 4, layout.flow - 4,
                           layout.checksum - 4)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


Way = Callable[[Path], "contextlib.AbstractContextManager[tuple[Cable, str, generate.Layout]]"]
WAYS: dict[str, Way] = {"xdp-erm": xdp_erm, "userspace, ring to tap": userspace, "kernel's VXLAN": vxlan}


def run(directory: Path, quick: bool) -> list[Row]:
    rounds, seconds = (1, 0.4) if quick else (5, 2.0)
    found: dict[str, list[Reached]] = {name: [] for name in WAYS}
    missing: dict[str, str] = {}
    for _ in range(rounds):
        for name, way in WAYS.items():
            with contextlib.ExitStack() as stack:
                try:
                    cable, interface, layout = stack.enter_context(way(directory))
                except OSError as error:
                    missing[name] = f"cannot be measured here: {error}"
                    continue
                stack.enter_context(cable.sensor.entered())
                members = stack.enter_context(Members(directory, interface, MEMBERS))
                load = stack.enter_context(Load(cable, layout))
                found[name].append(reached(load, members, seconds))
    return [Row(GROUP, f"{name}, {MEMBERS} members", "packets/s", [sum(result.packets) for result in results],
                results[-1].note if results else missing[name]) for name, results in found.items()]
