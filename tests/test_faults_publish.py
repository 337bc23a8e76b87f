"""What happens to the publisher, its files and whoever answers it. Nothing is lost or counted twice."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import ZEEK, needs_zeek, package_repository
from soak.soak import running
from soak.zeek import Zeek
from test_publish import ATTACHED_AT, HOST, reading

from xdp_erm_py.lab.namespace import Namespace

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 60  # seconds
LOGGED_AT = ATTACHED_AT.replace("Z", ".000")

# Publishes what stands in a file; `prelude` may change the rest.
PUBLISH = """
import json, sys
from pathlib import Path
from xdp_erm_py.interface import stats
from xdp_erm_py.cli import main
from xdp_erm_py.publish import publisher, transports
_, file, prelude, *command = sys.argv
stats.snapshot = lambda: json.loads(Path(file).read_text())
publisher.FIRST_BACKOFF_SECONDS = publisher.LONGEST_BACKOFF_SECONDS = 0.05
exec(prelude)
sys.exit(main(command))
"""

# Is killed at the nth call of a function.
KILLED = """
sys.path.append("tests")
from killer import kill_at
kill_at("publish.{module}", "{owner}", "{step}", "{when}", {number})
"""


class Publishing:
    """A place where publishers run one after the other, and what they read counts up."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self.namespace, self.directory = namespace, directory
        self.zeek = Zeek(namespace)
        self.counted = 0
        self.processes: list[Any] = []
        self.count(10)

    def count(self, packets: int) -> None:
        self.counted += packets
        new = self.directory / "readings.new"
        new.write_text(json.dumps([reading(self.counted)]))
        new.replace(self.directory / "readings")

    def start(self, prelude: str = "", pid_file: Path | None = None, wrapper: tuple[str, ...] = ()) -> Any:
        with self.namespace.entered():
            process = subprocess.Popen(
                [*wrapper, sys.executable, "-c", PUBLISH, str(self.directory / "readings"), prelude, "publish",
                 "--interval=0.1", f"--host-name={HOST}", f"--websocket=127.0.0.1:{self.zeek.port}",
                 f"--pid-file={pid_file or self.directory / 'pid'}"],
                cwd=REPOSITORY, stderr=(self.directory / "log").open("a"), text=True)
        self.processes.append(process)
        return process

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    @property
    def logged(self) -> int:
        """Packets that Zeek has been told of."""
        return self.zeek.logged[LOGGED_AT]["decapsulated", 0]

    def until(self, condition: Callable[[], Any], process: Any = None) -> None:
        """Counting on meanwhile; `process` must not end."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"waited {TIMEOUT} s in vain; {self.log}"
            assert process is None or process.poll() is None, self.log
            self.count(1)
            time.sleep(0.01)

    def finish(self, process: Any) -> None:
        """The publisher's end, and what was told then."""
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0, self.log
        assert self.logged == self.counted, self.log
        assert "Traceback" not in self.log
        assert not list(self.directory.glob("*.new"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Publishing]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    namespace = Namespace()
    try:
        with namespace.entered():
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=TIMEOUT)
        place = Publishing(namespace, tmp_path)
        with running(place.zeek):
            yield place
        for process in place.processes:
            if process.poll() is None:
                process.kill()
            process.wait(TIMEOUT)
    finally:
        namespace.close()


def resident(process: Any, field: str = "VmHWM") -> int:
    """KiB, the most that it ever was."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1])  # type: ignore[index]


# Killed

STEPS = [("reports", "Reporter", "collect"), ("reports", "Reporter", "send"), ("reports", "Reporter", "_write"),
         ("reports", "os", "replace"), ("transports", "WebSocket", "send"), ("transports", "WebSocket", "receive"),
         ("reports", "Reporter", "acknowledge")]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("module, owner, step", STEPS, ids=[step for *_, step in STEPS])
def test_killed_at_any_step(place: Publishing, module: str, owner: str, step: str, when: str, number: int) -> None:
    process = place.start(KILLED.format(module=module, owner=owner, step=step, when=when, number=number))
    place.until(lambda: process.poll() is not None)
    assert process.returncode == -signal.SIGKILL, place.log
    before = place.zeek.reports
    place.count(100)
    process = place.start()
    place.until(lambda: place.zeek.reports >= before + 2, process)
    place.finish(process)


def test_killed_again_and_again(place: Publishing) -> None:
    for milliseconds in range(0, 100, 10):
        before = place.zeek.reports
        process = place.start()
        place.until(lambda: place.zeek.reports > before, process)  # noqa: B023
        time.sleep(milliseconds / 1000)
        process.kill()
        process.wait(TIMEOUT)
    before = place.zeek.reports
    process = place.start()
    place.until(lambda: place.zeek.reports > before, process)
    place.finish(process)


# What the machine has run out of

def on_a_small_disk(disk: Path, prepare: str = "true") -> tuple[str, ...]:
    """For a process that has one at `disk`, of 64 KiB."""
    disk.mkdir()
    return ("unshare", "--mount", "sh", "-c",
            f'mount -t tmpfs -o size=64k disk {disk} && (cd {disk}; {prepare}) && exec "$@"', "sh")


FILL = "dd if=/dev/zero of=fill bs=4k 2>&-; true"


def test_a_disk_that_is_full_for_a_while(place: Publishing) -> None:
    disk = place.directory / "disk"
    process = place.start(pid_file=disk / "pid", wrapper=on_a_small_disk(disk))

    def there(command: str) -> None:
        subprocess.run(["nsenter", f"--target={process.pid}", "--mount", "sh", "-c", f"cd {disk}; {command}"],
                       check=True, timeout=TIMEOUT)

    place.until(lambda: place.zeek.reports >= 2, process)
    there(FILL)
    place.until(lambda: "it cannot be written down that they were sent: [Errno 28] No space left on device" in
                place.log, process)
    told = place.zeek.reports
    place.count(1000)
    time.sleep(0.5)
    assert place.zeek.reports == told
    there("rm fill")
    place.until(lambda: place.zeek.reports >= told + 2, process)
    place.finish(process)


@pytest.mark.parametrize("prepare, reason", [
    (FILL, "No space left on device"), ("mount -o remount,ro .", "Read-only file system")], ids=["full", "read-only"])
def test_a_disk_that_takes_no_pid_file(place: Publishing, prepare: str, reason: str) -> None:
    disk = place.directory / "disk"
    process = place.start(pid_file=disk / "pid", wrapper=on_a_small_disk(disk, prepare))
    assert process.wait(TIMEOUT) == 1
    assert place.log == f"xdp-erm: --pid-file {disk / 'pid'}: {reason}\n"


def test_no_descriptors_for_a_while(place: Publishing) -> None:
    """Neither for readings nor for connections."""
    process = place.start()
    place.until(lambda: place.zeek.reports >= 2, process)
    place.zeek.mood = "frozen"
    place.until(lambda: place.zeek.unanswered, process)
    limit = ["prlimit", f"--pid={process.pid}"]
    subprocess.run([*limit, "--nofile=3:"], check=True, timeout=TIMEOUT)
    with place.zeek.away():
        place.until(lambda: "cannot read the counters" in place.log, process)
        place.until(lambda: "Zeek; keeping" in place.log, process)
        time.sleep(0.3)
    told, place.zeek.mood = place.zeek.reports, "ok"
    subprocess.run([*limit, "--nofile=1024:"], check=True, timeout=TIMEOUT)
    place.until(lambda: place.zeek.reports >= told + 3, process)
    place.finish(process)


# Who answers

HANDSHAKE = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
WELCOME = b'{"type": "ack", "endpoint": "e", "version": "8.0.8"}'


def shaken(request: bytes) -> bytes:
    """The answer to a request for a WebSocket."""
    key = re.search(rb"(?i)sec-websocket-key: (\S+)", request)[1]  # type: ignore[index]
    digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    return HANDSHAKE.encode() + base64.b64encode(digest) + b"\r\n\r\n"


def frame(code: int, payload: bytes, final: bool = True) -> bytes:
    assert len(payload) < 1 << 16
    return bytes([code | final << 7, 126]) + len(payload).to_bytes(2, "big") + payload


def welcome(request: bytes) -> bytes:
    return shaken(request) + frame(1, WELCOME)


# What each says after the request, and then again and again.
PEERS: dict[str, tuple[Callable[[bytes], bytes], bytes]] = {
    "nothing": (lambda _: b"", b""),
    "nothing after the handshake": (shaken, b""),
    "nothing after the welcome": (welcome, b""),
    "garbage": (lambda _: bytes(range(256)), b""),
    "an endless line": (lambda _: b"HTTP/1.1 101 ", b"A" * 4096),
    "endless headers": (lambda _: b"HTTP/1.1 101 Switching Protocols\r\n", b"X-Header: 1\r\n" * 100),
    "an endless message": (lambda request: shaken(request) + b"\x81\x7f" + (1 << 40).to_bytes(8, "big"), b"A" * 4096),
    "endless pieces": (lambda request: shaken(request) + frame(1, b"A", False), frame(0, b"A" * 64, False)),
    "endless pings": (shaken, frame(9, b"A" * 100) * 100),
    "endless pings after the welcome": (welcome, frame(9, b"A" * 100) * 100),
    "endless messages": (welcome, frame(1, WELCOME) * 100),
    "endless garbage": (welcome, frame(1, b"[" * 60000)),
}


class Peer(threading.Thread):
    """Somebody on Zeek's port."""

    def __init__(self, namespace: Namespace, port: int, first: Callable[[bytes], bytes], then: bytes) -> None:
        super().__init__(daemon=True)
        with namespace.entered():
            self._server = socket.create_server(("127.0.0.1", port))
        self._first, self._then = first, then
        self.connections = self.sent = 0

    def run(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            with connection, contextlib.suppress(OSError):
                connection.settimeout(TIMEOUT)
                connection.sendall(self._first(connection.recv(4096)))
                while self._then:
                    connection.sendall(self._then)
                    self.sent += len(self._then)
                while connection.recv(4096):
                    pass

    def __enter__(self) -> Peer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.join(TIMEOUT)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_says(place: Publishing, name: str) -> None:
    process = place.start("publisher.ACKNOWLEDGEMENT_SECONDS = transports.OPEN_SECONDS = 1.0\n"
                          "transports.CLOSE_SECONDS = 0.1")
    place.until(lambda: place.zeek.reports >= 2, process)
    before, told = resident(process), place.zeek.reports
    with place.zeek.away(), Peer(place.namespace, place.zeek.port, *PEERS[name]) as peer:
        place.until(lambda: peer.connections >= 4, process)
    place.until(lambda: place.zeek.reports >= told + 3, process)
    # The reports that wait are among it.
    assert resident(process) - before < 5 * 1024, f"KiB more, after {peer.sent} bytes"
    place.finish(process)


# A real Zeek

SETTINGS = """
redef exit_only_after_terminate = T;
redef Log::default_rotation_interval = 0sec;
redef LogAscii::use_json = T;
redef XDP_ERM::websocket_port = to_port(getenv("WEBSOCKET_PORT"));
redef XDP_ERM::log_interval = {log_interval};
"""


class RealZeek:
    """One that stands alone, started again and again, each time where it finds no log."""

    def __init__(self, place: Publishing, log_interval: str) -> None:
        assert ZEEK is not None
        self._place, self._runs = place, place.directory / "zeek"
        self._runs.mkdir()
        (self._runs / "settings.zeek").write_text(SETTINGS.format(log_interval=log_interval))
        with place.namespace.entered(), socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place.zeek.port = probe.getsockname()[1]
        self.start()

    def start(self) -> None:
        directory = self._runs / str(len(list(self._runs.iterdir())))
        directory.mkdir()
        with self._place.namespace.entered():
            self.process: Any = subprocess.Popen(
                [ZEEK / "bin" / "zeek", REPOSITORY / "scripts", "../settings.zeek"], cwd=directory,
                env={**os.environ, "WEBSOCKET_PORT": f"{self._place.zeek.port}/tcp"},
                stderr=(directory / "said").open("w"))
        self._place.processes.append(self.process)

    @property
    def logged(self) -> int:
        """Packets, in all logs."""
        return sum(json.loads(row)["decapsulated.packets"] for log in self._runs.glob("*/xdp_erm.log")
                   for row in log.read_text().splitlines(keepends=True) if row.endswith("\n"))


@needs_zeek
@pytest.mark.parametrize("log_interval, signals", [
    ("0sec", (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)),
    ("1hr", (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)),
], ids=["killed", "with rows that are not written yet"])
def test_a_zeek_that_is_killed_frozen_and_restarted(place: Publishing, log_interval: str,
                                                    signals: tuple[signal.Signals, ...]) -> None:
    """Between two messages, as a Zeek that is killed before it acknowledges one may have logged it."""
    zeek = RealZeek(place, log_interval)
    publisher = place.start("publisher.ACKNOWLEDGEMENT_SECONDS = 1.0")

    def told() -> dict[str, Any]:
        file = place.directory / "pid.json"
        content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return content

    def acknowledged() -> int:
        checkpoints = told().get("interfaces", {})
        return checkpoints["lo"]["counters"]["decapsulated"][0] if checkpoints else 0

    def works() -> None:
        before = place.counted
        place.until(lambda: acknowledged() > before, publisher)

    works()
    for number in signals:
        publisher.send_signal(signal.SIGSTOP)
        while told()["under_way"]:
            publisher.send_signal(signal.SIGCONT)
            time.sleep(0.01)
            publisher.send_signal(signal.SIGSTOP)
        place.until(lambda: number == signal.SIGTERM or zeek.logged == acknowledged())  # noqa: B023
        zeek.process.send_signal(number)
        zeek.process.wait(TIMEOUT)
        place.count(1000)
        publisher.send_signal(signal.SIGCONT)
        place.until(lambda: place.log.count("Zeek; keeping") == place.log.count("Zeek again") + 1, publisher)
        zeek.start()
        works()
    zeek.process.send_signal(signal.SIGSTOP)
    place.until(lambda: "no acknowledgement in 1 s" in place.log, publisher)
    zeek.process.send_signal(signal.SIGCONT)
    works()
    publisher.send_signal(signal.SIGTERM)
    assert publisher.wait(TIMEOUT) == 0, place.log
    zeek.process.terminate()
    zeek.process.wait(TIMEOUT)
    assert zeek.logged == place.counted, place.log


# Another version of the package

def test_an_upgrade_under_a_publisher(place: Publishing, tmp_path: Path, xdp: None) -> None:
    """Its file is written anew where it stands, with everything in it at another place."""
    repository = package_repository(tmp_path)
    subprocess.run([sys.executable, "zeekctl/build.py"], cwd=repository, check=True, timeout=TIMEOUT)
    old = repository / "build" / "zeekctl" / "xdp-erm.pyz"
    new = tmp_path / "new.pyz"
    with zipfile.ZipFile(old) as content, new.open("wb") as file:
        file.write(b"#!/usr/bin/python3\n")
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("first", "." * 5000)
            for name in reversed(content.namelist()):
                archive.writestr(name, content.read(name))

    def run(*words: str) -> None:
        with place.namespace.entered():
            subprocess.run(words, check=True, capture_output=True, timeout=TIMEOUT)

    run("ip", "link", "add", "erm0", "up", "mtu", "1600", "type", "veth", "peer", "name", "erm1")
    run(sys.executable, str(old), "attach", "erm0")
    with place.namespace.entered():
        publisher = subprocess.Popen(
            [sys.executable, str(old), "publish", "--interval=0.1", f"--host-name={HOST}",
             f"--websocket=127.0.0.1:{place.zeek.port}", f"--pid-file={place.directory / 'pid'}"],
            stderr=(place.directory / "log").open("w"))
    place.processes.append(publisher)

    def works() -> None:
        before = place.zeek.reports
        place.until(lambda: place.zeek.reports >= before + 2, publisher)

    works()
    old.write_bytes(new.read_bytes())
    works()
    place.zeek.restart()
    works()
    run(sys.executable, str(old), "attach", "erm0", "--vlan=tagged")
    works()
    run(sys.executable, str(old), "detach", "erm0")
    place.until(lambda: place.zeek.detached, publisher)
    publisher.send_signal(signal.SIGTERM)
    assert publisher.wait(TIMEOUT) == 0, place.log
    assert "Traceback" not in place.log
