"""What the groups have in common that need packets on a wire: a cable, a generator at one end, members at the other."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from pyroute2 import IPRoute

from xdp_erm_py.interface import stats
from xdp_erm_py.kernel import bpf
from xdp_erm_py.lab import generate
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, SWITCH_INTERFACE, Cable

FLOWS = 2000
GENERATOR_CPU = 0
TICKS = 20  # calls of the kernel in a second; each has some ms without packets


class Reading(NamedTuple):
    """Counted since the start, at one moment."""

    seconds: float
    packets: tuple[int, ...]
    """Taken in, by member."""
    wrapped: int
    """Of those, still ERM."""
    ring_drops: int


@contextlib.contextmanager
def programs() -> Iterator[Path]:
    """The directory of the C programs of this benchmark, compiled."""
    with tempfile.TemporaryDirectory(prefix="xdp-erm-bench-") as directory:
        for source in Path(__file__).parent.glob("*.c"):
            subprocess.run(["cc", "-O2", "-pthread", "-o", str(Path(directory) / source.stem), str(source)], check=True)
        yield Path(directory)


@contextlib.contextmanager
def started(*command: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A program that says "ready" when it is; killed after the with block."""
    with subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        try:
            if _of(process.stdout).readline() != "ready\n":
                raise RuntimeError(f"{command[0]} does not start")
            yield process
        finally:
            process.kill()


class Members:
    """Fanout members of bench/members.c on an interface of the namespace in which this is made."""

    def __init__(self, directory: Path, interface: str, count: int, work: int = 0) -> None:
        """`work`: nanoseconds that a member spends on a packet."""
        self._stack = contextlib.ExitStack()
        self._process = self._stack.enter_context(started(directory / "members", interface, str(count), str(work)))

    def __enter__(self) -> Members:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self) -> Reading:
        _of(self._process.stdin).write("\n")
        _of(self._process.stdin).flush()
        nanoseconds, *counts = map(int, _of(self._process.stdout).readline().split())
        return Reading(nanoseconds / 1e9, tuple(counts[::3]), sum(counts[1::3]), sum(counts[2::3]))


def _of(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


class Reached(NamedTuple):
    """What a time under load came to, per second."""

    packets: tuple[float, ...]
    """By member."""
    wrapped: float
    """Of those, still ERM."""
    offered: float
    """That the generator made."""
    dropped_at_veth: float
    """The receiver's end was full, or took none; up to 256 frames on their way look so."""
    dropped_at_backlogs: float
    """The queues of received packets that CPUs have for each other, as by RPS."""
    dropped_at_queues: float
    """Those that XDP has for other CPUs, as by cpumap."""
    dropped_at_rings: float
    busy: tuple[float, ...]
    """The part of the time that each CPU was not idle, 0 to 1."""

    @property
    def note(self) -> str:
        """Who got how much, what the CPUs did, and where the rest was lost."""
        total = sum(self.packets) or 1
        shares = "/".join(f"{100 * packets / total:.0f}" for packets in self.packets)
        busy = "/".join(f"{100 * part:.0f}" for part in self.busy)
        # Packets on their way when the time began or ended make a difference of some thousand, which is no loss.
        named = self.dropped_at_veth + self.dropped_at_backlogs + self.dropped_at_queues + self.dropped_at_rings
        elsewhere = max(0.0, self.offered - named - sum(self.packets))
        return (f"offered {self.offered:,.0f}/s, members {shares} %, CPUs {busy} %, dropped at veth "
                f"{self.dropped_at_veth:,.0f}/s, backlogs {self.dropped_at_backlogs:,.0f}/s, queues "
                f"{self.dropped_at_queues:,.0f}/s, rings {self.dropped_at_rings:,.0f}/s, elsewhere {elsewhere:,.0f}/s")


def reached(load: Load, members: Members, seconds: float) -> Reached:
    """Measures for `seconds`, of which the first quarter fills rings and counts for nothing."""
    time.sleep(seconds / 4)
    cpus_before, backlogs_before, queues_before, before = _cpu_times(), _backlog_drops(), _queue_drops(), members.read()
    made_before, sent_before = load.made(), load.sent()
    time.sleep(seconds * 3 / 4)
    cpus, backlogs, queues, after = _cpu_times(), _backlog_drops(), _queue_drops(), members.read()
    made, sent = load.made(), load.sent()
    length = after.seconds - before.seconds
    busy = tuple(1 - (idle - idle_before) / max(1, total - total_before)
                 for (idle_before, total_before), (idle, total) in zip(cpus_before, cpus))
    packets = tuple((now - then) / length for then, now in zip(before.packets, after.packets))
    offered = (made - made_before) / length
    return Reached(packets, (after.wrapped - before.wrapped) / length, offered,
                   max(0.0, offered - (sent - sent_before) / length), (backlogs - backlogs_before) / length,
                   (queues - queues_before) / length, (after.ring_drops - before.ring_drops) / length, busy)


def _backlog_drops() -> int:
    """Of all CPUs and network namespaces."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


def _queue_drops() -> int:
    """Of the interfaces of this network namespace."""
    return sum(cpu["dropped"] for interface in stats.snapshot() for cpu in interface["cpus"].values())


def _cpu_times() -> list[tuple[int, int]]:
    """Idle and all ticks of each CPU."""
    found = []
    for line in Path("/proc/stat").read_text().splitlines():
        name, *words = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = list(map(int, words[:8]))  # guests' are in user's
            found.append((ticks[3] + ticks[4], sum(ticks)))
    return found


class Load:
    """Sends a layout's frames from the cable's switch, in a thread of one CPU, for the length of a with block."""

    def __init__(self, cable: Cable, layout: generate.Layout, rate: int | None = None) -> None:
        """`rate`: packets per second; None: as many as the kernel makes."""
        self._cable, self._layout, self._rate = cable, layout, rate
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._made = 0
        self._map: bpf.Map | None = None

    def __enter__(self) -> Load:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join()
        if self._failed:
            raise self._failed

    def made(self) -> int:
        """Frames that the generator has made so far, sent or not."""
        if self._map:
            self._made, = struct.unpack_from("=Q", (self._map.lookup(bytes(4)) or [bytes(8)])[0])
        return self._made

    def sent(self) -> int:
        """Frames that the sensor's end has taken since the cable was made."""
        return sent(self._cable)

    def _send(self) -> None:
        try:
            with self._cable.switch.entered():
                os.sched_setaffinity(0, {GENERATOR_CPU})
                with IPRoute() as route:
                    ifindex = route.link_lookup(ifname=SWITCH_INTERFACE)[0]
                with generate.loaded(ifindex, self._layout, FLOWS, 1) as program, \
                        bpf.Map.by_id(bpf.program_info(program).map_ids[0]) as self._map:
                    self._ready.set()
                    self._send_chunks(program)
                    self.made()
                    self._map = None
        except BaseException as error:
            self._failed = error
        finally:
            self._ready.set()

    def _send_chunks(self, program: int) -> None:
        chunk = max(1, self._rate // TICKS) if self._rate else generate.CHUNK * 4
        start, handed = time.monotonic(), 0
        while not self._ending.is_set():
            bpf.run_live(program, self._layout.frame, chunk)
            handed += chunk
            if self._rate:
                time.sleep(max(0.0, start + handed / self._rate - time.monotonic()))


def settled(members: Members) -> Reading:
    """What has been counted once nothing more comes."""
    before, after = None, members.read()
    while before is None or after.packets != before.packets:
        time.sleep(0.1)
        before, after = after, members.read()
    return after


def sent(cable: Cable) -> int:
    """Frames from the switch that the sensor's end has taken."""
    with cable.switch.entered(), IPRoute() as route:
        packets: int = route.link("get", ifname=SWITCH_INTERFACE)[0].get_attr("IFLA_STATS64")["tx_packets"]
    return packets


def let_in_without_xdp() -> None:
    """Makes the sensor's end take redirected frames though it has no XDP program."""
    subprocess.run(["ethtool", "-K", SENSOR_INTERFACE, "gro", "on"], check=True)
