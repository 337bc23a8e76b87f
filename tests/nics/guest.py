"""In the guest: what is checked of each NIC. Frames come from a switch in a network namespace, over QEMU's bridge."""

from __future__ import annotations

import collections
import contextlib
import json
import platform
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xdp_erm_py import shared
from xdp_erm_py.kernel import ethtool
from xdp_erm_py.lab.fanout import (
    AUXDATA,
    PACKET_ADD_MEMBERSHIP,
    PACKET_AUXDATA,
    PACKET_MR_PROMISC,
    SO_RCVBUFFORCE,
    SOL_PACKET,
    with_vlan_tag,
)
from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.lab.traffic import encapsulate, internet_checksum, ipv4_header
from xdp_erm_py.program.reference import Session, insert_vlan_tag

COMMAND = ("/xdp-erm/bin/xdp-erm",)
PATIENCE = 20  # seconds for a link to come up and for a command, of which the emulated CPU takes its time
SWITCH, SENSOR = "198.51.100.1", "198.51.100.2"
STATION = bytes.fromhex("02aa00000077")  # on the switch's own network; a bridge takes no frames from none
MIRRORED_SOURCE = bytes.fromhex("02aa00000001")  # of every mirrored frame, by which the tap knows them
SIZES = (16, 20, 41, 42, 59, 60, 61, 64, 100, 128, 400, 511, 777, 1000, 1280, 1446)
FULL, JUMBO = (1464, 1500, 1510, 1514), (1515, 2000, 2940, 3500, 4096, 6000, 8900)
WINDOW = 16  # frames on their way
ERM_OVERHEAD = 14 + 20 + 8 + 12  # bytes
TAG_STAYS = "a VLAN tag of the wrapping stays on the mirrored frame"  # what attach says of a bridge, for example
SHORT_BUFFERS = "drops frames for it of more than 1518 bytes"  # likewise, of virtio-big
SHORTEST = 60  # bytes, without FCS: some drivers fill frames up to this after XDP


class Stack(NamedTuple):
    """What is attached to where that is made of a NIC, by the words of ip."""

    name: str
    nic: str
    make: tuple[str, ...] = ()
    remove: str | None = None


#: By what the table calls them.
STACKS = {
    "bond": Stack("bond0", "igb", ("link add bond0 type bond mode active-backup miimon 100", "link set igb down",
                                   "link set igb master bond0"), "link del bond0"),
    "bond-vmxnet3": Stack("bond0", "vmxnet3", ("link add bond0 type bond mode active-backup miimon 100",
                                               "link set vmxnet3 down", "link set vmxnet3 master bond0"),
                          "link del bond0"),
    "vlan": Stack("igb.77", "igb", ("link set igb up", "link add link igb name igb.77 type vlan id 77"),
                  "link del igb.77"),
    "bridge": Stack("bridge0", "igb", ("link add bridge0 type bridge mcast_snooping 0 forward_delay 0",
                                       "link set igb master bridge0", "link set igb up"), "link del bridge0"),
    "bridge-port": Stack("igb", "igb", ("link add bridge0 type bridge mcast_snooping 0 forward_delay 0",
                                        "link set bridge0 up", "link set igb master bridge0"), "link del bridge0"),
}


class Wire:
    """The switch's sending socket, and a tap on the sensor's interface."""

    def __init__(self, namespace: Namespace, name: str, address: bytes) -> None:
        self._name, self._address = name, address
        with namespace.entered():
            self.switch = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            self.switch.bind(("switch", 0))
            _promiscuous(self.switch, "switch")  # the stations that its frames come from are no interface's own
        self._tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._tap.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._tap.bind((name, 3))
        _promiscuous(self._tap, name)

    def close(self) -> None:
        self.switch.close()
        self._tap.close()

    def to_sensor(self, frame: bytes, outer_tag: int | None = None) -> bytes:
        """A wrapped frame as it comes over the bridge, addressed to the sensor's interface."""
        frame = self._address + frame[6:]
        return frame if outer_tag is None else insert_vlan_tag(frame, outer_tag)

    def send(self, frame: bytes) -> None:
        self.switch.send(frame)

    def seen(self, seconds: float) -> Iterator[bytes]:
        """Mirrored frames, and such as are wrapped still, until none has come for so long."""
        while True:
            self._tap.settimeout(seconds)
            try:
                frame, control, _, address = self._tap.recvmsg(1 << 16, socket.CMSG_SPACE(AUXDATA.size))
            except TimeoutError:
                return
            if address[2] != socket.PACKET_OUTGOING:
                yield with_vlan_tag(frame, control[0][2])


def _promiscuous(tap: socket.socket, name: str) -> None:
    membership = struct.pack("=iHH8x", socket.if_nametoindex(name), PACKET_MR_PROMISC, 0)
    tap.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, membership)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs a command; what it said is in the log."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(f"$ {' '.join(words)} -> {done.returncode}\n{done.stdout}", end="", flush=True)
    return done


def xdp_erm(*words: str) -> subprocess.CompletedProcess[str]:
    return run(*COMMAND, *words)


def attach(name: str, *options: str) -> str:
    """What attaching says; until it has a carrier again."""
    said = xdp_erm("attach", name, *options)
    wait_for_carrier(name)
    return said.stdout if said.returncode == 0 else f"refused: {said.stdout.strip().splitlines()[-1]}"


def mode_of(said: str) -> str:
    """Where attaching says that XDP runs."""
    return next((mode for mode in ("native", "generic") if f"attached ({mode}" in said), f"WRONG: {said}")


def wait_for_carrier(name: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while Path(f"/sys/class/net/{name}/carrier").read_text().strip() != "1" and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # a bridge's port forwards a moment later


def counted(name: str) -> dict[str, int]:
    counters = json.loads(xdp_erm("stats", name, "--json").stdout)["interfaces"][0]["counters"]
    return {counter: value["packets"] for counter, value in counters.items()}


def settings(name: str) -> dict[str, Any]:
    """What attaching may change of an interface."""
    return {"features": {feature: value.on for feature, value in ethtool.features(name).items()},
            "mtu": Path(f"/sys/class/net/{name}/mtu").read_text(),
            "qdisc": subprocess.run(["tc", "qdisc", "show", "dev", name], stdout=subprocess.PIPE, text=True).stdout,
            "xdp": "xdp" in subprocess.run(["ip", "link", "show", name], stdout=subprocess.PIPE, text=True).stdout}


def frames(sizes: tuple[int, ...], repeat: int = 5) -> Iterator[tuple[bytes, bytes]]:
    """(wrapped, as mirrored): of each size, with different VLANs."""
    random.seed(7932)
    for number, size in enumerate(size for _ in range(repeat) for size in sizes):
        tci = (0, 1, 10, 2011, 4094)[number % 5] | number % 8 << 13
        body = random.randbytes(max(size, 64))
        transport = struct.pack("!HHHH", 1024 + number, 53, max(size, 42) - 34, 0) + body
        network = ipv4_header(bytes([10, 1, number >> 8, number & 255]), bytes([10, 2, 0, 1]), 17, max(size, 42) - 34)
        mirrored = (bytes([2, 0xBB, 0, 0, number >> 8, number & 255]) + MIRRORED_SOURCE + b"\x08\x00" + network
                    + transport)[:size]
        yield encapsulate(mirrored, tci, number % 2 == 1, Session(SWITCH, 1 + number % 4)), \
            insert_vlan_tag(mirrored, tci) if tci & 0xFFF else mirrored


class Books:
    """What was sent and what arrived, frame by frame."""

    def __init__(self) -> None:
        self.sent = 0
        self._wanted: collections.Counter[bytes] = collections.Counter()
        self._short: dict[bytes, bytes] = {}
        self.exact = self.filled = self.other = self.wrapped = 0

    def send(self, wire: Wire, wrapped: bytes, mirrored: bytes) -> None:
        self._wanted[mirrored] += 1
        self._short[mirrored.ljust(SHORTEST, b"\0")] = mirrored
        self.sent += 1
        wire.send(wrapped)

    def take(self, frame: bytes) -> None:
        if self._wanted[frame] > 0:
            self._wanted[frame] -= 1
            self.exact += 1
        elif len(frame) == SHORTEST and self._wanted[self._short.get(frame, b"")] > 0:
            self._wanted[self._short[frame]] -= 1
            self.filled += 1
        elif frame[6:12] == MIRRORED_SOURCE:
            self.other += 1
        elif b"\x1e\xfc" in (frame[36:38], frame[40:42]):
            self.wrapped += 1

    @property
    def right(self) -> bool:
        return self.exact + self.filled == self.sent and not self.other and not self.wrapped

    def __str__(self) -> str:
        parts = [f"{self.exact}/{self.sent}"]
        parts += [f"{number} {what}" for number, what in (
            (self.filled, "filled up to 60"), (self.other, "altered"), (self.wrapped, "wrapped")) if number]
        return ", ".join(parts)


def exchange(wire: Wire, sizes: tuple[int, ...], outer_tags: tuple[int | None, ...] = (None,)) -> Books:
    books = Books()
    for outer_tag in outer_tags:
        for number, (wrapped, mirrored) in enumerate(frames(sizes)):
            padding = bytes(number % 23 if len(wrapped) < 1400 else 0)
            books.send(wire, wire.to_sensor(wrapped, outer_tag) + padding, mirrored)
            if number % WINDOW == WINDOW - 1:
                for frame in wire.seen(0.1):
                    books.take(frame)
    for frame in wire.seen(2):
        books.take(frame)
    return books


def answers(wire: Wire, address: bytes, wrapped: bool) -> int:
    """To ARP, echo requests and UDP for the sensor's own addresses, from a station that only is in mirrored traffic."""
    station, ip = bytes.fromhex("02aa00000066"), bytes([198, 51, 100, 66])
    own = bytes(map(int, SENSOR.split(".")))
    arp = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + station + ip + bytes(6) + own
    echo = struct.pack("!BBHHH", 8, 0, 0, 7, 1) + bytes(32)
    echo = echo[:2] + struct.pack("!H", internet_checksum(echo)) + echo[4:]
    inner = [address + station + b"\x08\x06" + arp, bytes([255] * 6) + station + b"\x08\x06" + arp,
             address + station + b"\x08\x00" + ipv4_header(ip, own, 1, len(echo)) + echo,
             address + station + b"\x08\x00" + ipv4_header(ip, own, 17, 12) + struct.pack("!HHHH4x", 9, 9999, 12, 0)]
    for _ in range(10):
        for frame in inner:
            wire.send(wire.to_sensor(encapsulate(frame, 0, False, Session(SWITCH, 9))) if wrapped else frame)
    found = 0
    wire.switch.settimeout(2)
    with contextlib.suppress(TimeoutError):
        while True:
            frame, where = wire.switch.recvfrom(1 << 16)
            found += where[2] != socket.PACKET_OUTGOING and (frame[:6] == station or frame[38:42] == ip)
    return found


def swaps(wire: Wire, name: str) -> str:
    """Frames under which the program is swapped: each is to arrive once, with or without its tag."""
    over, sent, seen = threading.Event(), [], collections.Counter()

    def send() -> None:
        while not over.is_set():
            for wrapped, _ in frames(SIZES[6:], 1):
                number = struct.pack("!I", len(sent))
                sent.append(number)
                # The number stands at the mirrored frame's end, whatever becomes of its tag.
                wire.send(wire.to_sensor(wrapped[:-4] + number))
                time.sleep(0.02)

    def receive() -> None:
        while not over.is_set():
            for frame in wire.seen(0.5):
                if frame[6:12] == MIRRORED_SOURCE:
                    seen[frame[-4:]] += 1
    threads = [threading.Thread(target=work) for work in (send, receive)]
    for thread in threads:
        thread.start()
    for vlan in ("strip", "restore"):
        xdp_erm("attach", name, "--vlan", vlan)
    over.set()
    for thread in threads:
        thread.join()
    for frame in wire.seen(2):
        if frame[6:12] == MIRRORED_SOURCE:
            seen[frame[-4:]] += 1
    lost, doubled = sum(number not in seen for number in sent), sum(times > 1 for times in seen.values())
    wrong = f"WRONG: {doubled} doubled, {lost} of " if lost or doubled else "0 of "
    return f"{wrong}{len(sent)} lost"


@contextlib.contextmanager
def trickle(wire: Wire) -> Iterator[None]:
    """Meanwhile frames come that are no mirrored ones, as there are some on every interface in use."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.01):
            wire.send(wire.to_sensor(bytes(6) + STATION + b"\x88\xb5" + bytes(46)))
    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def status(wire: Wire, name: str) -> tuple[dict[str, Any], list[str]]:
    """What status and doctor say of the interface while frames come; of the latter the problems."""
    with trickle(wire):
        shown = json.loads(xdp_erm("status", "--json").stdout)["interfaces"][0]
        checks = json.loads(xdp_erm("doctor", name, "--json").stdout)["checks"]
    return shown, [f"{found['check']}: {found['text']}" for found in checks
                   if found["interface"] == name and found["result"] == "problem"]


def tried(wire: Wire, name: str, sizes: tuple[int, ...], outer_tags: tuple[int | None, ...] = (None,)) -> \
        tuple[Books, str]:
    """Frames of these sizes. Where the driver does not run the program, that is said, and the next attach mends it."""
    books = exchange(wire, sizes, outer_tags)
    if books.right:
        return books, str(books)
    if not status(wire, name)[0]["unseen"]:
        return books, f"WRONG: {books}"
    with trickle(wire):
        said = attach(name)
    books = exchange(wire, sizes, outer_tags)
    return books, f"not run, said; then {mode_of(said)} {'' if books.right else 'WRONG: '}{books}"


def spreads(wire: Wire, name: str) -> str:
    """Both ways to spread frames over CPUs: each frame is to arrive exact, too."""
    said = {}
    for way in ("cpumap", "rps"):
        attached = attach(name, "--spread", way)
        if attached.startswith("refused") and "generic" in attached:
            said[way] = "refused in generic mode"
        else:
            said[way] = attached if attached.startswith("refused") else tried(wire, name, SIZES)[1]
    return "; ".join(f"{way}: {text}" for way, text in said.items())


def check(wire: Wire, stack: Stack, address: bytes, cells: dict[str, str]) -> None:
    """Fills the cells of one interface."""
    name = stack.name
    before = settings(name)
    said = attach(name)
    if said.startswith("refused"):
        cells.update(dict.fromkeys(("exact", "counted", "hostile", "swap", "spread", "jumbo", "detach", "told"), "-"))
        cells["attach"] = said
        return
    cells["attach"] = mode_of(said)
    outer_tags = (None,) if TAG_STAYS in said else (None, 77)
    books, cells["exact"] = tried(wire, name, SIZES, outer_tags)
    start = counted(name)["decapsulated"]
    again = exchange(wire, SIZES, outer_tags)
    decapsulated = counted(name)["decapsulated"] - start
    cells["counted"] = "ok" if decapsulated == again.sent == again.exact + again.filled else \
        f"WRONG: {decapsulated} of {again}"
    problems = status(wire, name)[1]
    true = [problem for problem in problems if SHORT_BUFFERS in problem]
    if books.right and problems == true:
        cells["told"] = "short buffers" if true else "ok"
    else:
        cells["told"] = f"WRONG: {'; '.join(problems) or 'nothing'}"
    if TAG_STAYS in said:  # so that tagged ones cannot be right, which has to be noticed as well
        exchange(wire, SIZES, (77,))
        noticed = [problem for problem in status(wire, name)[1] if "with the VLAN tag of their wrapping" in problem]
        cells["exact"] += ", tagged outside not, said" if noticed else "; WRONG: tagged outside not"
    control = answers(wire, address, wrapped=False)
    found = answers(wire, address, wrapped=True)
    cells["hostile"] = f"0 of {control}" if control and not found else f"WRONG: {found} of {control}"
    cells["swap"] = swaps(wire, name)
    cells["spread"] = spreads(wire, name)
    xdp_erm("detach", name)
    wait_for_carrier(name)
    left = settings(name)
    changed = [f"{key}: {before[key]} {left[key]}" for key in before if before[key] != left[key]]
    cells["detach"] = f"WRONG: {'; '.join(changed)}" if changed else "ok"
    jumbo = []
    for mtu, sizes in ((1554, FULL), (9000, FULL + JUMBO)):
        for each in (stack.nic, name):  # a VLAN's is no larger than that of what it stands on
            run("ip", "link", "set", "dev", each, "mtu", str(mtu))
        wait_for_carrier(name)
        said = attach(name)
        if SHORT_BUFFERS in said:
            fit = tuple(size for size in sizes if size + ERM_OVERHEAD <= 1518)
            jumbo.append(f"{mtu}: {tried(wire, name, fit)[1]}, said that longer ones are dropped")
        else:
            jumbo.append(f"{mtu}: {said if said.startswith('refused') else tried(wire, name, sizes)[1]}")
        xdp_erm("detach", name)
    for each in (name, stack.nic):
        run("ip", "link", "set", "dev", each, "mtu", "1500")
    cells["jumbo"] = "; ".join(jumbo)


def everything() -> str:
    """Whether the kernel's verifier takes the program with every setting that makes it longer, in all its variants."""
    options = ("--encapsulation", ",".join(shared.ENCAPSULATIONS), "--depth", str(shared.MAX_DEPTH), "--spread-ports",
               "--source", f"{SWITCH}/32,2001:db8::/32", "--target", f"{SENSOR},2001:db8::9", "--mode", "native")
    run("ip", "link", "add", "veth", "type", "veth", "peer", "name", "peer")
    for end in ("peer", "veth"):
        run("ip", "link", "set", "dev", end, "up")
    said = {}
    for mtu in ("1500", "9000"):
        run("ip", "link", "set", "dev", "veth", "mtu", mtu)
        for spread in ("none", "cpumap"):
            said[f"MTU {mtu}, spread {spread}"] = attach("veth", *options, "--spread", spread)
            xdp_erm("detach", "veth")
    run("ip", "link", "del", "veth")
    return "; ".join(f"{what}: {mode_of(text)}" for what, text in said.items())


def named(names: dict[str, str]) -> None:
    """Gives the interfaces the names that go with their hardware addresses."""
    for directory in [file.parent for file in Path("/sys/class/net").glob("*/address")]:
        address = (directory / "address").read_text().strip()
        for name, wanted in names.items():
            if address == wanted and directory.name != name:
                run("ip", "link", "set", "dev", directory.name, "down")
                run("ip", "link", "set", "dev", directory.name, "name", name)


def main() -> None:
    share = Path(sys.argv[1])
    wanted = json.loads((share / "wanted.json").read_text())
    run("ip", "link", "set", "dev", "lo", "up")
    for setting in Path("/proc/sys/net/ipv6/conf").glob("*/disable_ipv6"):
        setting.write_text("1")
    named(wanted["nics"])
    switch = Namespace()
    subprocess.run(["ip", "link", "set", "dev", "switch", "netns", f"/proc/self/fd/{switch.fd}"], check=True,
                   pass_fds=[switch.fd])
    with switch.entered():
        run("ip", "link", "set", "dev", "switch", "mtu", "9400", "up")
        run("ip", "address", "add", f"{SWITCH}/24", "dev", "switch")
    found: dict[str, Any] = {"system": f"Linux {platform.release()}", "nics": {}, "everything": everything()}
    for nic in wanted["wanted"]:
        cells = found["nics"].setdefault(nic, {})
        stack = STACKS.get(nic, Stack(nic, nic))
        name = stack.name
        print(f"== {nic}", flush=True)
        wire = None
        try:
            for words in stack.make:
                run("ip", *words.split())
            run("ip", "link", "set", "dev", name, "up")
            run("ip", "address", "add", f"{SENSOR}/24", "dev", name)
            wait_for_carrier(name)
            address = bytes.fromhex(Path(f"/sys/class/net/{name}/address").read_text().strip().replace(":", ""))
            wire = (TaggedWire if nic == "vlan" else Wire)(switch, name, address)
            check(wire, stack, address, cells)
        except Exception as error:
            traceback.print_exc()
            cells.setdefault("attach", f"WRONG: {error!r}")
        finally:
            if wire:
                wire.close()
            xdp_erm("detach")
            if stack.remove:
                run("ip", *stack.remove.split())
            run("ip", "address", "flush", "dev", stack.nic)
            run("ip", "link", "set", "dev", stack.nic, "down")
        (share / "results.json").write_text(json.dumps(found))


class TaggedWire(Wire):
    """To a VLAN device, which takes the frames of its VLAN only."""

    def send(self, frame: bytes) -> None:
        super().send(insert_vlan_tag(frame, 77))


if __name__ == "__main__":
    main()
