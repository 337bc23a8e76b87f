"""What the helper costs: attaching, swapping under traffic, the memory of program and maps, and the publisher."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websockets

from xdp_erm_py.interface import loader, ours
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab import generate
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, Cable
from xdp_erm_py.program import cache
from xdp_erm_py.publish import DEFAULT_INTERVAL, events
from xdp_erm_py.settings import InterfaceConfig

from .load import Load, Members, settled
from .table import Row

GROUP = "The helper"
ROOT = Path(__file__).parent.parent
XDP_ERM = ROOT / "build" / "zeekctl" / "xdp-erm.pyz"
SWAPS = 20
RATE = 100_000  # packets per second during the swaps: far from where any are lost anyway
CONFIGS = (InterfaceConfig(vlan="strip"), InterfaceConfig())


def run(directory: Path, quick: bool) -> list[Row]:
    return [*attaching(2 if quick else 9), *swapping(directory, 3 if quick else SWAPS), *memory(), *publishing(quick)]


def attaching(rounds: int) -> list[Row]:
    """The command as zeekctl and `make install` have it, with nothing kept of the compiler's and with all."""
    subprocess.run([sys.executable, ROOT / "zeekctl" / "build.py"], check=True)
    took: dict[str, list[float]] = {}
    with Cable() as cable, cable.sensor.entered():
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="xdp-erm-bench-") as directory:
                environment = {**os.environ, cache.VARIABLE: f"{directory}/cache"}
                for name, *words in (("attach, compiled", "attach"), ("swap, compiled", "attach", "--vlan=strip"),
                                     ("swap", "attach"), ("attach, nothing to do", "attach"), ("detach", "detach"),
                                     ("attach", "attach"), ("detach", "detach")):
                    milliseconds = _milliseconds(_command, [*words, SENSOR_INTERFACE], environment)
                    took.setdefault(name, []).append(milliseconds)
    return [Row(GROUP, name, "ms", values, "the whole command") for name, values in took.items()]


def _command(words: list[str], environment: dict[str, str]) -> None:
    subprocess.run([XDP_ERM, *words], env=environment, stdout=subprocess.DEVNULL, check=True)


def swapping(directory: Path, swaps: int) -> list[Row]:
    """Two configurations in turn, while packets come in."""
    with Cable() as cable, cable.sensor.entered():
        loader.attach(SENSOR_INTERFACE, CONFIGS[-1])
        cable.wait_for_carrier()
        took = []
        with Members(directory, SENSOR_INTERFACE, 1) as members:
            with Load(cable, generate.layout_of(512, 2011, False), RATE) as load:
                for config in itertools.islice(itertools.cycle(CONFIGS), swaps):
                    took.append(_milliseconds(loader.attach, SENSOR_INTERFACE, config))
            arrived, made = settled(members), load.made()
    lost = made - sum(arrived.packets) - arrived.ring_drops
    return [Row(GROUP, "swap under traffic", "ms", took, "from call to return; the swap itself is atomic"),
            Row(GROUP, f"lost in {swaps} swaps", "packets", [lost],
                f"of {made:,} at {RATE:,}/s, without {arrived.ring_drops} that the member's ring dropped"),
            Row(GROUP, f"still wrapped in {swaps} swaps", "packets", [arrived.wrapped])]


def memory() -> list[Row]:
    with Cable() as cable, cable.sensor.entered():
        loader.attach(SENSOR_INTERFACE, InterfaceConfig())
        with Links() as links:
            found = ours.find(links, SENSOR_INTERFACE)
        assert found is not None
        rows = []
        with bpf.descriptor(bpf.program_fd(found.program_id)) as program:
            for name, size in zip(("jited", "translated"), _program_sizes(program)):
                rows.append(Row(GROUP, f"program, {name}", "bytes", [size]))
        for name, map_id in sorted(found.maps.items()):
            with bpf.Map.by_id(map_id) as map_:
                rows.append(Row(GROUP, f"map {name}", "bytes", [_memlock(map_.fd)]))
    return rows


def _program_sizes(program: int) -> tuple[int, int]:
    """Bytes of machine code, and of BPF as the verifier has left it (struct bpf_prog_info)."""
    info = ctypes.create_string_buffer(24)
    bpf._info(program, info)
    jited, translated = struct.unpack_from("=II", info, 16)
    return jited, translated


def _memlock(fd: int) -> int:
    """What the kernel charges for a map, in bytes."""
    found = re.search(r"^memlock:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def publishing(quick: bool) -> list[Row]:
    """The publisher as it runs beside Zeek, whose part a server plays that acknowledges each report."""
    interval, seconds = (0.5, 2.0) if quick else (DEFAULT_INTERVAL, 3 * DEFAULT_INTERVAL)
    with Cable() as cable, cable.sensor.entered(), tempfile.TemporaryDirectory(prefix="xdp-erm-bench-") as directory:
        loader.attach(SENSOR_INTERFACE, InterfaceConfig())
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        with _zeek() as (port, reports), subprocess.Popen(
                [sys.executable, XDP_ERM, "publish", "--interval", str(interval), "--websocket", f"127.0.0.1:{port}",
                 "--pid-file", f"{directory}/pid"], stderr=subprocess.DEVNULL) as publisher:
            try:
                deadline = time.monotonic() + 30 + interval
                while not reports:
                    if publisher.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError("the publisher does not report")
                    time.sleep(0.05)
                before, count = _cpu_seconds(publisher.pid), len(reports)
                time.sleep(seconds)
                used, count = _cpu_seconds(publisher.pid) - before, len(reports) - count
                resident, proportional = _memory(publisher.pid)
            finally:
                publisher.terminate()
    if not count:
        raise RuntimeError(f"the publisher has not reported in {seconds:g} s")
    return [Row(GROUP, "publisher, resident", "MB", [resident / 1e6]),
            Row(GROUP, "publisher, proportional share", "MB", [proportional / 1e6]),
            Row(GROUP, "publisher, CPU", "% of a core", [100 * used / seconds],
                f"{count} reports in {seconds:g} s")]


@contextlib.contextmanager
def _zeek() -> Iterator[tuple[int, list[str]]]:
    """The port of a server that takes reports as a Zeek node does, and the reports so far."""
    reports: list[str] = []

    async def serve(connection: Any, *_: Any) -> None:
        await connection.recv()  # what it subscribes to
        await connection.send('{"type": "ack", "endpoint": "bench", "version": "8.0.8"}')
        async for text in connection:
            reports.append(text)
            await connection.send(_acknowledgement(text))

    async def start() -> Any:
        return await websockets.serve(serve, "127.0.0.1", 0)

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1], reports
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _acknowledgement(text: str) -> str:
    decoded = events.decode(text)
    assert decoded is not None
    _, (report, *_) = decoded
    sequence, host, interface = (report[field]["data"] for field in (1, 3, 4))
    return events.encode(events.ACKNOWLEDGEMENT_TOPIC, events.ACKNOWLEDGED, events.string(host),
                         events.string(interface), events.count(sequence))


def _cpu_seconds(pid: int) -> float:
    """What all its threads have used, of which /proc/PID/stat knows only hundredths of a second."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def _memory(pid: int) -> tuple[int, int]:
    """Bytes resident, and of them its share of what others have as well."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return int(found["Rss"]) * 1024, int(found["Pss"]) * 1024


def _milliseconds(call: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - start) * 1000
