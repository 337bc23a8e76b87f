"""Real Zeek workers in the sensor's namespace, in place of the counting ones.

Each is a Zeek of its own with the fanout settings of a zeekctl worker: no cluster is needed to see who gets what.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import XdpErmError
from .cable import SENSOR_INTERFACE, Cable
from .fanout import FANOUT_ID, SILENCE_TIMEOUT, FlowKey, Result, flow_key
from .traffic import Packet

PLACES = (None, "/opt/zeek/bin")  # PATH first
START_TIMEOUT = 60.0  # seconds; several at once on a small machine take a while
STOP_TIMEOUT = 60.0
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}

# How far a worker is, for us to wait for; what its packet source counts as received is what Zeek has taken in.
SCRIPT = """
redef LogAscii::use_json = T;
redef ignore_checksums = T;
event progress()
	{
	local stats = get_net_stats();
	local f = open("progress");
	print f, fmt("%d %d", stats$pkts_recvd, stats$pkts_dropped);
	close(f);
	schedule 100msec { progress() };
	}
event zeek_init() { schedule 100msec { progress() }; }
"""


class ZeekWorkers:
    """`count` Zeeks in one fanout group on the sensor's interface; to be used like FanoutWorkers.

    `scripts` are more of what each of them loads.
    """

    def __init__(self, cable: Cable, count: int, scripts: Sequence[str] = ()) -> None:
        self.result = Result([0] * count, identical=None)
        self._flows: set[FlowKey] = set()
        zeek = _zeek()
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xdp-erm-lab-")))
            self._directories = [directory / f"worker-{number + 1}" for number in range(count)]
            self._processes: list[subprocess.Popen[bytes]] = []
            stack.callback(self._stop)
            for worker in self._directories:
                worker.mkdir()
                (worker / "lab.zeek").write_text(SCRIPT)
                with cable.sensor.entered(), (worker / "output").open("wb") as output:
                    self._processes.append(subprocess.Popen(
                        [zeek, "-i", f"af_packet::{SENSOR_INTERFACE}", "lab.zeek", *scripts,
                         f"AF_Packet::fanout_id={FANOUT_ID}"],
                        cwd=worker, stdin=subprocess.DEVNULL, stdout=output, stderr=output))
            self._wait_until_started()
            self._stack = stack.pop_all()

    def __enter__(self) -> ZeekWorkers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def take(self, packets: Sequence[Packet]) -> bool:
        """Note what was just sent, and leave Zeek's share of the processors to Zeek."""
        for packet in packets:
            self.result.sent += 1
            self.result.mirrored += packet.sent != packet.mirrored
            flow = flow_key(packet.mirrored)
            if flow:
                self._flows.add(flow)
        time.sleep(0.01)
        return True

    def progress(self) -> tuple[int, int]:
        """Packets that all workers together have taken in, and those that the kernel dropped; too few at times."""
        received, dropped = zip(*map(self._progress, self._directories))
        return sum(received), sum(dropped)

    def finish(self) -> Result:
        """Wait until the workers have it all, end them, and read their conn.log."""
        last, deadline = -1, time.monotonic() + SILENCE_TIMEOUT
        while (received := self.progress()[0]) < self.result.sent:
            if received != last:
                last, deadline = received, time.monotonic() + SILENCE_TIMEOUT
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        self._stop()
        for number, worker in enumerate(self._directories):
            self.result.packets[number], dropped = self._progress(worker)
            self.result.dropped += dropped
            for flow in _logged_flows(worker / "conn.log"):
                self.result.workers_by_flow.setdefault(flow, set()).add(number)
        received = sum(self.result.packets)
        self.result.missing = max(self.result.sent - received, 0)
        self.result.unexpected = max(received - self.result.sent, 0)
        self.result.unlogged_flows = len(self._flows - self.result.workers_by_flow.keys())
        return self.result

    def _wait_until_started(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        for process, worker in zip(self._processes, self._directories):
            while not (worker / "progress").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    said = (worker / "output").read_text(errors="replace").strip().splitlines()
                    raise XdpErmError(f"Zeek does not start: {said[-1] if said else 'it says nothing'}")
                time.sleep(0.1)

    @staticmethod
    def _progress(worker: Path) -> tuple[int, int]:
        """(packets taken in, packets the kernel dropped); zeros while the file is being written anew."""
        words = (worker / "progress").read_text().split()
        return (int(words[0]), int(words[1])) if len(words) == 2 else (0, 0)

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _zeek() -> str:
    for place in PLACES:
        zeek = shutil.which("zeek", path=place)
        if zeek:
            return zeek
    raise XdpErmError("Zeek is neither on PATH nor in /opt/zeek")


def _logged_flows(log: Path) -> set[FlowKey]:
    flows = set()
    for line in log.read_text().splitlines() if log.exists() else ():
        row = json.loads(line)
        ends = []
        for side in ("orig", "resp"):
            address = ipaddress.ip_address(row[f"id.{side}_h"]).packed
            ends.append((address, struct.pack("!H", row[f"id.{side}_p"])))
        flows.add(FlowKey(PROTOCOLS[row["proto"]], *sorted(ends)))
    return flows
