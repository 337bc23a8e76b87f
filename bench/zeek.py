"""How many packets per second Zeek analyses without losing one: its fallback in one worker, and workers with xdp-erm.

The rate is raised in steps until packets are lost. The workers' rings are small, so that what one of them does not keep
up with is lost within the time of a step: in Zeek's own 128 MB it would only wait. Zeek's workers, the kernel and the
generator share this machine.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.lab import generate
from xdp_erm_py.lab.zeek import ZeekWorkers
from xdp_erm_py.settings import InterfaceConfig

from .balance import SIZE, arranged
from .load import Load
from .table import Row

GROUP = "Zeek"
FALLBACK = Path(__file__).parent.parent / "scripts" / "fallback.zeek"
RATES = tuple(round(10_000 * 2 ** (step / 2)) for step in range(12))  # to 450,000 packets per second
RING = "AF_Packet::buffer_size=8388608"  # bytes, each worker's: some ten thousand packets
SILENCE = 1.0  # seconds without a packet after which what is missing is lost


class Case(NamedTuple):
    name: str
    config: InterfaceConfig | None
    workers: int


CASES = (Case("Zeek's fallback, 1 worker", None, 1), Case("xdp-erm, 2 workers", InterfaceConfig(), 2),
         Case("xdp-erm, 4 workers", InterfaceConfig(), 4))


def run(directory: Path, quick: bool) -> list[Row]:
    rounds, rates, seconds = (1, RATES[:1], 0.5) if quick else (2, RATES, 1.5)
    found: dict[Case, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, values in found.items():
            try:
                values.append(without_loss(case, rates, seconds))
            except XdpErmError as error:
                return [Row(GROUP, other.name, "packets/s", note=f"cannot be measured here: {error}")
                        for other in CASES]
    return [Row(GROUP, case.name, "packets/s", values, f"the highest rate without loss, in steps to {rates[-1]:,}")
            for case, values in found.items()]


def without_loss(case: Case, rates: tuple[int, ...], seconds: float) -> float:
    """The highest of the rates, which rise, that loses nothing; 0: each does. XdpErmError: Zeek does not run."""
    highest = 0.0
    with arranged(case.config) as cable, ZeekWorkers(cable, case.workers, [str(FALLBACK), RING]) as zeek:
        for rate in rates:
            before = _settled(zeek, 0)
            with Load(cable, generate.layout_of(SIZE, 0, False), rate) as load:
                start = time.monotonic()
                time.sleep(seconds)
            sent, took = load.made(), time.monotonic() - start
            if _settled(zeek, before + sent) < before + sent:
                break
            highest = sent / took
    return highest


def _settled(zeek: ZeekWorkers, expected: int) -> int:
    """What the workers have taken in once it is as much as expected, or nothing more comes."""
    most, last = 0, time.monotonic()
    while time.monotonic() - last < SILENCE:
        received, _ = zeek.progress()
        if received > most:
            most, last = received, time.monotonic()
        if expected and most >= expected:
            break
        time.sleep(0.05)
    return most
