"""A soak: steady traffic, one fault after another, and after each the books must balance."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from xdp_erm_py import shared
from xdp_erm_py.interface import journal, ours, stats
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.bpf import descriptor
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE, Cable
from xdp_erm_py.settings import InterfaceConfig

from .books import SECONDS, Books, Counts, settled
from .faults import FAULTS, Fault
from .wire import Wire
from .zeek import Zeek

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[2] / "bin" / "xdp-erm")]
INTERVAL = 0.2  # seconds between reports
RING = 256 + 64  # frames that a veth's receiver holds at most, and has in hand
GROWTH = 6 << 10  # KiB that a publisher may grow, reports that wait for Zeek included


class Publisher:
    """`xdp-erm publish` in the network namespace in which it is started."""

    def __init__(self, soak: Soak, directory: Path) -> None:
        self._soak, self._directory = soak, directory
        self._first: tuple[int, int] = 0, 0
        #: The most that one grew: KiB resident, and descriptors.
        self.growth = 0, 0
        self.started = 0

    def start(self, wait: bool = True) -> None:
        """`wait`: until it has reported a few times, as it costs what it will cost then."""
        self._log = (self._directory / "log").open("a")
        self._process = subprocess.Popen(
            [*COMMAND, "publish", f"--interval={INTERVAL}", "--transport=websocket", "--host-name=soak",
             f"--websocket=127.0.0.1:{self._soak.zeek.port}", f"--pid-file={self._directory / 'pid'}"],
            stderr=self._log)
        self._first = 0, 0
        self.started += 1
        if wait:
            self._soak.until(self._soak.reported(3), "the publisher reports")
            self._first = self._costs()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    @contextlib.contextmanager
    def limited(self, limit: int) -> Iterator[None]:
        """It gets no more of something: RLIMIT_NOFILE, RLIMIT_FSIZE (as if the disk were full)."""
        soft, hard = resource.prlimit(self._process.pid, limit)
        resource.prlimit(self._process.pid, limit, (0, hard))
        try:
            yield
        finally:
            resource.prlimit(self._process.pid, limit, (soft, hard))

    def stop(self, number: signal.Signals) -> None:
        self.measure()
        self._process.send_signal(number)
        # SIGTERM may come before it listens.
        if self._process.wait(SECONDS) not in (0, -number):
            self._soak.wrong.append(f"the publisher ended with status {self._process.returncode}: {self.log()}")
        self._log.close()

    def measure(self) -> None:
        if self._first != (0, 0):
            grown = (now - first for now, first in zip(self._costs(), self._first))
            self.growth = tuple(map(max, zip(self.growth, grown)))  # type: ignore[assignment]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def log(self) -> str:
        return (self._directory / "log").read_text()

    def _costs(self) -> tuple[int, int]:
        """KiB resident, and descriptors between two readings of the counters."""
        status = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        looks = []
        for _ in range(20):
            looks.append(len(os.listdir(f"/proc/{self._process.pid}/fd")))
            time.sleep(0.01)
        return resident, min(looks)


class Soak:
    """To be made and run in the sensor's network namespace."""

    def __init__(self, cable: Cable, zeek: Zeek, wire: Wire, directory: Path, seed: int, cpus: tuple[int, ...]) -> None:
        self.cable, self.zeek, self.wire = cable, zeek, wire
        self.random = random.Random(seed)
        self.name = SENSOR_INTERFACE
        self.config = InterfaceConfig(mode="native")
        self.wrong: list[str] = wire.wrong
        self.publisher = Publisher(self, directory)
        self.books = Books(cable)
        self.done: Counts[str] = collections.Counter()
        self._directory, self._cpus = directory, cpus

    # What faults are made of

    @property
    def index(self) -> int:
        with Links() as links:
            return links.find(self.name).index

    def spreading(self) -> dict[str, object]:
        """Settings that differ over time."""
        how = self.random.choice(("none", "cpumap", "cpumap", "rps") if len(self._cpus) > 1 else ("none",))
        return {"spread": how, "spread_cpus": self._cpus, "spread_queue": self.random.choice((1, 64, 2048))} \
            if how != "none" else {}

    def nap(self, about: float) -> None:
        time.sleep(self.random.uniform(0.5, 1.5) * about)

    def attach(self, config: InterfaceConfig, *options: str) -> None:
        self.command("attach", config, *options)
        self.config = config

    def command(self, name: str, config: InterfaceConfig | None = None, *options: str, status: int = 0) -> None:
        self.finish(self.start(name, config, *options), status)

    def start(self, name: str, config: InterfaceConfig | None = None, *options: str,
              under: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        words = [name, self.name, *options]
        if config:
            self.wire.configs.add(config)
            file = self._directory / f"{len(os.listdir(self._directory))}.yaml"
            file.write_text(json.dumps({"defaults": config.as_dict()}))
            words += ["--config", str(file)]
        return subprocess.Popen([*under, *COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, process: subprocess.Popen[str], status: int = 0) -> None:
        while process.poll() is None:
            self.books.look()  # another command may detach what this one has attached
            time.sleep(0.005)
        said, _ = process.communicate(timeout=SECONDS)
        self.books.look()
        if process.returncode != status or "Traceback" in said:
            self.wrong.append(f"{' '.join(process.args)}: status {process.returncode}, {said}")  # type: ignore[arg-type]

    def kill(self, name: str, config: InterfaceConfig | None = None) -> None:
        """Somewhere on its way, which takes about a second."""
        process = self.start(name, config)
        time.sleep(self.random.uniform(0, 1.2))
        process.kill()
        process.communicate()
        self.books.look()

    def hold(self) -> None:
        """Nothing is under way until go_on()."""
        self.wire.pause()
        settled(lambda: self.wire.counted["taken"])
        self.books.keep_devices(self.name)

    def replug(self) -> None:
        self.wire.plug(self.cable, self.name)

    def go_on(self) -> None:
        self.wire.resume()

    def until(self, condition: object, what: str) -> None:
        assert callable(condition)
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited {SECONDS} s in vain until {what}; its log:\n{self.publisher.log()}")
            time.sleep(0.02)

    def reported(self, count: int) -> object:
        before = self.zeek.reports
        return lambda: self.zeek.reports >= before + count

    # What is checked

    def step(self, fault: Fault) -> None:
        """One fault, from one moment without a frame under way to the next."""
        self.wire.configs, self.wire.bare = {self.config}, fault.bare
        before = self._read()
        self.wire.resume()
        self.nap(0.1)
        fault.act(self)
        self.nap(0.1)
        self.wire.pause()
        settled(lambda: (self.wire.counted["taken"], self.books.counted()["queue drops"]))
        moved = self._read()
        moved.subtract(before)
        self._balance(fault, moved)
        self._look_for_leaks(fault)
        self._compare_reports(f"after {fault.name!r}: ")
        self.wire.forget()
        self.done[fault.name] += 1

    def _read(self) -> Counts[str]:
        """Everything that is counted anywhere: `program ...`, `kernel ...` and, at the ends of the wire, `wire ...`."""
        everything: Counts[str] = collections.Counter()
        for who, counts in (("program", self.books.counted()), ("kernel", self.books.devices(self.name)),
                            ("wire", self.wire.counted)):
            everything.update({f"{who} {name}": value for name, value in counts.items()})
        return everything

    def _balance(self, fault: Fault, moved: Counts[str]) -> None:
        verdicts = sum(moved[f"program {verdict}"] for verdict in shared.VERDICTS)
        handed_over = moved["wire sent"] - moved["wire refused"]
        emptied = handed_over - moved["kernel dropped"] - moved["kernel received"]
        backlog = moved["kernel received"] - moved["wire taken"] - moved["program queue drops"]
        bare = moved["kernel received"] - verdicts
        self.done.update({"dropped": moved["kernel dropped"], "emptied": emptied, "bare": bare, "backlog": backlog,
                          **{name: moved[f"program {name}"] for name in (*shared.VERDICTS, "queue drops")}})
        # Counted, but not taken in at the tap; below 0: taken in as what was not counted so.
        missing = {verdict: moved[f"program {verdict}"] - moved[f"wire {verdict}"] for verdict in shared.VERDICTS}
        missing["decapsulated"] -= moved["program queue drops"]
        claims = {
            "frames vanished before the program": 0 <= emptied <= fault.downs * RING,
            "frames were dropped before the program": fault.downs or not moved["kernel dropped"],
            "frames vanished behind the program": 0 <= backlog <= moved["kernel backlog"],
            "frames have no verdict": bare >= 0 if fault.bare else bare == 0,
            "decapsulated are other frames than those counted so": 0 <= missing["decapsulated"] <= backlog,
            "with each verdict came others than those counted so": fault.bare or (
                min(missing.values()) >= 0 and sum(missing.values()) == backlog),
            "with a verdict came fewer than counted so": max(missing.values()) <= backlog,
            "the tap lost frames": not moved["wire lost by the tap"],
            "a helper of the kernel refused": not moved["program failed"],
        }
        false = [claim for claim, holds in claims.items() if not holds]
        if false:
            self.wrong.append(f"after {fault.name!r}: {'; '.join(false)}: {dict(sorted(moved.items()))}")

    def _look_for_leaks(self, fault: Fault) -> None:
        with Links() as links:
            leaked = [stats.leaked(found) for found in ours.find_all(links)]
        if any(leaked):
            self.wrong.append(f"after {fault.name!r}: {sum(leaked)} decapsulated frames have reached the host")

    def _compare_reports(self, when: str) -> None:
        for attached_at, counted in self.books.counted_by_life().items():
            logged = self.zeek.logged[attached_at]
            if any(logged[counter] > counted[counter] for counter in logged):
                self.wrong.append(f"{when}Zeek was told {dict(logged)} of no more than {dict(counted)}")

    def begin(self) -> None:
        self.command("attach", self.config)
        self.cable.wait_for_carrier()
        self.publisher.start()

    def finish_reports(self) -> None:
        """What Zeek was told in the end against what was counted, and what the publisher costs."""
        self.until(self.reported(2), "reports reach Zeek")
        self.publisher.stop(signal.SIGTERM)
        self._compare_reports("")
        lives = self.books.counted_by_life()
        for attached_at, counted in lives.items():
            logged = self.zeek.logged[attached_at]
            self.done["unreported"] += sum(counted[verdict, 0] - logged[verdict, 0] for verdict in shared.VERDICTS)
        # Lives before it may have counted more after their last report.
        logged, counted = self.zeek.logged[max(lives)], lives[max(lives)]
        if +logged != +counted:
            self.wrong.append(f"Zeek was told {dict(logged)} of {dict(counted)}")
        if "Traceback" in self.publisher.log():
            self.wrong.append(f"the publisher fails: {self.publisher.log()}")
        memory, descriptors = self.publisher.growth
        if memory > GROWTH or descriptors > 0:
            self.wrong.append(f"a publisher has grown by {memory} KiB and {descriptors} descriptors")

    def leave(self, before: tuple[str, ...]) -> None:
        """Detaches, and looks at what is left behind."""
        self.command("detach")
        with Links() as links, journal.exclusive() as entries:
            unfinished = entries.unfinished(links.find(self.name))
        if unfinished:
            self.wrong.append(f"in the journal is left {unfinished}")
        for old, new in zip(before, interface(self.name)):
            if old != new:
                self.wrong.append(f"the interface was {old} and is {new}")
        self.books.close()
        for what, open_by_id, numbers in (("program", bpf.program_fd, self.books.programs),
                                          ("map", lambda number: bpf.Map.by_id(number).fd, self.books.maps)):
            for number in numbers:
                self.until(lambda: _is_gone(open_by_id, number), f"{what} {number} is gone")  # noqa: B023


def _is_gone(open_by_id: object, number: int) -> bool:
    assert callable(open_by_id)
    try:
        with descriptor(open_by_id(number)):
            return False
    except FileNotFoundError:
        return True


def interface(name: str) -> tuple[str, ...]:
    """What attaching changes, in words."""
    with Links() as links:
        link = links.find(name)
    tcx = bpf.tcx(link.index)
    commands = (["ethtool", "-k", name], ["tc", "qdisc", "show", "dev", name],
                ["tc", "filter", "show", "dev", name, "ingress"])
    return f"MTU {link.mtu}, program {link.program_id}, tcx {tcx and tcx.programs}", *(
        subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
        for command in commands)


@contextlib.contextmanager
def running(part: Wire | Zeek) -> Iterator[None]:
    part.start()
    try:
        yield
    finally:
        part.end()


@contextlib.contextmanager
def soaking(seed: int) -> Iterator[Soak]:
    cpus = tuple(sorted(os.sched_getaffinity(0)))[:2]
    with tempfile.TemporaryDirectory(prefix="xdp-erm-soak-") as directory, Cable() as cable, cable.sensor.entered():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=SECONDS)
        wire, zeek = Wire(seed), Zeek(cable.sensor)
        wire.plug(cable, SENSOR_INTERFACE)
        with running(zeek), running(wire):
            yield Soak(cable, zeek, wire, Path(directory), seed, cpus)


def soak(seconds: float, seed: int, say: object = print) -> Soak:
    """Every fault at least once, then on until the time is over or something is wrong."""
    assert callable(say)
    with soaking(seed) as run:
        before = interface(run.name)
        end = time.monotonic() + seconds
        run.begin()
        try:
            first = True
            while first or time.monotonic() < end:
                for fault in run.random.sample(FAULTS, len(FAULTS)):
                    run.step(fault)
                    say(fault.name)
                    if run.wrong or not (first or time.monotonic() < end):
                        break
                if run.wrong:
                    break
                first = False
            run.finish_reports()
        finally:
            run.publisher.close()
        run.leave(before)
        return run


def show(run: Soak) -> None:
    """One table: where every frame went, what Zeek was told, which faults there were."""
    wire, done = run.wire.counted, run.done
    rows = {"sent": wire["sent"], "": None, "refused by the switch's end, which was down": wire["refused"],
            "dropped at the cable: the sensor's end was down, full or its MTU too small": done["dropped"],
            "gone with the sensor's receive ring when it went down": done["emptied"],
            "passed while no program was there": done["bare"],
            **{verdict: done[verdict] for verdict in shared.VERDICTS}}
    print()
    for name, value in rows.items():
        print(f"{value:10}  {name}" if value is not None else "")
    difference = wire["sent"] - sum(value or 0 for value in list(rows.values())[1:])
    print(f"{difference:10}  unaccounted for\n")
    print(f"of the decapsulated, {done['queue drops']} were dropped by CPUs' full queues and {done['backlog']} by "
          f"backlogs behind the program")
    print(f"Zeek was told of {run.zeek.reports} reports, by {run.publisher.started} publishers; "
          f"{done['unreported']} packets were counted after the last report of what was then detached")
    memory, descriptors = run.publisher.growth
    print(f"a publisher grew by {memory} KiB and {descriptors} descriptors at most\n")
    for fault in FAULTS:
        print(f"{done[fault.name]:10}  {fault.name}")
    for wrong in run.wrong:
        print(f"\nWRONG {wrong}")
