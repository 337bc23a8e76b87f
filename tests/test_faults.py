"""What happens to interfaces, and what a machine runs out of, while xdp-erm is attached or about to be."""

from __future__ import annotations

import fcntl
import itertools
import operator
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import filters
import other_program
import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from xdp_erm_py import lab, shared
from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import isolation, journal, loader, stats
from xdp_erm_py.kernel import bpf
from xdp_erm_py.kernel.links import Link, Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.lab.cable import SWITCH_INTERFACE as SWITCH
from xdp_erm_py.lab.fanout import FanoutWorkers
from xdp_erm_py.lab.namespace import Namespace
from xdp_erm_py.lab.traffic import synthetic
from xdp_erm_py.program import cache
from xdp_erm_py.settings import InterfaceConfig

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(REPOSITORY / "bin" / "xdp-erm")]
TIMEOUT = 60  # seconds
DEFAULT = InterfaceConfig(mode="native")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def everything(name: str = SENSOR) -> tuple:
    """What attaching changes, and what may be left in the journal."""
    with Links() as links, journal.exclusive() as entries:
        link = links.find(name)
        unfinished = entries.unfinished(link)
    return (link.mtu, link.program_id, unfinished, run("ethtool", "-k", name).stdout.partition("\n")[2],
            filters.everything(name).replace(name, ""))


def change(name: str, **what: object) -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], **what)


def rename(name: str) -> None:
    """Gives the sensor's interface another name, for which it must be down before Linux 6.2."""
    change(SENSOR, state="down")
    change(SENSOR, ifname=name)
    change(name, state="up")


def decapsulates(cable, packets: int = 50) -> bool:
    with FanoutWorkers(cable, 2, operator.attrgetter("mirrored")) as workers:
        lab.mirror(cable, synthetic(flows=10, packets=packets), workers)
        return workers.finish().identical == packets


def counted(name: str = SENSOR) -> int:
    interface, = stats.snapshot(name)
    return interface["counters"]["decapsulated"]["packets"]


@pytest.mark.parametrize("commands", [("attach", "detach"), ("detach", "attach")])
def test_detach_during_attach(cable, commands):
    """Both wait for the lock, and the one that gets it first is done before the other begins."""
    before = everything()
    with journal.LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [subprocess.Popen([*COMMAND, command, SENSOR], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      text=True) for command in commands]
        for process in processes:
            assert process.stderr.readline() == "waiting for another xdp-erm to finish\n"
    for process in processes:
        _, said = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, said) == (0, "")
    assert {interface["name"] for interface in stats.snapshot()} in (set(), {SENSOR})
    loader.detach(SENSOR)
    assert everything() == before


@pytest.mark.check
def test_interface_down_and_up(cable):
    before = everything()
    loader.attach(SENSOR, DEFAULT)
    assert decapsulates(cable)
    change(SENSOR, state="down")
    assert counted() == 50
    loader.attach(SENSOR, InterfaceConfig(mode="native", sessions=False))  # a swap while it is down
    change(SENSOR, state="up")
    cable.wait_for_carrier()
    assert decapsulates(cable)
    assert counted() == 100
    loader.detach(SENSOR)
    assert everything() == before


def test_attach_and_detach_while_down(cable):
    before = everything()
    change(SENSOR, state="down")
    loader.attach(SENSOR, DEFAULT)
    change(SENSOR, state="up")
    cable.wait_for_carrier()
    assert decapsulates(cable)
    change(SENSOR, state="down")
    loader.detach(SENSOR)
    change(SENSOR, state="up")
    assert everything() == before


def test_an_interface_with_a_new_name(cable):
    before = everything()
    loader.attach(SENSOR, DEFAULT)
    assert decapsulates(cable)
    rename("new0")
    assert counted("new0") == 50
    assert "already attached" in loader.attach("new0", DEFAULT)[0]
    loader.detach("new0")
    assert everything("new0") == before


def test_a_new_name_between_a_killed_attach_and_the_next(cable, monkeypatch):
    before = everything()
    monkeypatch.setattr(loader, "_put", lambda *_: sys.exit("killed"))
    monkeypatch.setattr(loader.nic, "restore", lambda *_: [])
    monkeypatch.setattr(isolation, "release", lambda *_: [])
    monkeypatch.setattr(journal.Journal, "finish", lambda *_: None)
    with pytest.raises(SystemExit):
        loader.attach(SENSOR, DEFAULT)
    monkeypatch.undo()
    assert everything() != before
    rename("new0")
    assert "killed half-way" in loader.detach("new0")[0]
    assert everything("new0") == before


def test_an_interface_that_is_created_anew(cable):
    before = everything()
    loader.attach(SENSOR, DEFAULT)
    assert decapsulates(cable)
    with IPRoute() as route:
        route.link("del", index=route.link_lookup(ifname=SENSOR)[0])
    cable.plug()
    assert everything() == before
    loader.attach(SENSOR, DEFAULT)
    cable.wait_for_carrier()
    assert decapsulates(cable)
    assert counted() == 50
    loader.detach(SENSOR)
    assert everything() == before


def test_an_interface_in_another_network_namespace(cable):
    """Program and filter go with it, and are detached there; a filter of clsact does not, but is put there again."""
    before = everything()
    loader.attach(SENSOR, DEFAULT)
    assert decapsulates(cable)
    elsewhere = Namespace()
    try:
        change(SENSOR, net_ns_fd=elsewhere.fd)
        assert stats.snapshot() == []
        with elsewhere.entered():
            assert counted() == 50
            with Links() as links:
                assert isolation.look(links.find(SENSOR)).by == ("tcx" if bpf.tcx(1) else None)
            loader.attach(SENSOR, DEFAULT)
            with Links() as links:
                assert isolation.look(links.find(SENSOR)).by
            loader.detach(SENSOR)
            change(SENSOR, state="up")  # as it was; moved interfaces are down
            assert everything() == before
            change(SENSOR, net_ns_fd=cable.sensor.fd)
    finally:
        elsewhere.close()


def test_an_mtu_that_shrinks_and_one_that_the_program_does_not_take(cable):
    before = everything()
    loader.attach(SENSOR, DEFAULT)
    change(SENSOR, mtu=1000)
    assert "warning: MTU is 1000" in loader.attach(SENSOR, DEFAULT)[0]
    with cable.switch.entered(), pytest.raises(NetlinkError):
        change(SWITCH, mtu=9000)
    change(SENSOR, mtu=3500)
    assert decapsulates(cable)
    loader.detach(SENSOR)
    assert everything() == before


def test_somebody_else_replaces_our_program(cable):
    loader.attach(SENSOR, DEFAULT)
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=SENSOR)[0], xdp_fd=-1)
    program_id = other_program.attach(SENSOR, "native")
    assert stats.snapshot() == []
    with pytest.raises(XdpErmError, match=rf"another XDP program is attached \(program {program_id}, somebody\)"):
        loader.attach(SENSOR, DEFAULT)
    assert loader.detach(SENSOR) == [f"{SENSOR}: program {program_id} (somebody) is not ours and stays",
                                         f"{SENSOR}: the host's own network stack sees all frames again"]
    with Links() as links:
        assert links.find(SENSOR).program_id == program_id
    loader.attach(SENSOR, DEFAULT, force=True)
    assert decapsulates(cable)


def test_a_link_that_flaps_under_traffic(cable):
    loader.attach(SENSOR, DEFAULT)
    cable.wait_for_carrier()
    done = threading.Event()
    sent = refused = 0

    def send() -> None:
        nonlocal sent, refused
        for packet in itertools.chain.from_iterable(itertools.repeat(list(synthetic(flows=50, packets=500)))):
            if done.is_set():
                return
            try:
                cable.send(packet.sent)
                sent += 1
            except OSError:
                refused += 1

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for state in ("down", "up") * 5:
            with cable.switch.entered():
                change(SWITCH, state=state)
            if state == "up":
                cable.wait_for_carrier()
            time.sleep(0.02)
    finally:
        done.set()
        sender.join(TIMEOUT)
    with cable.switch.entered(), IPRoute() as route:
        dropped = route.link("get", ifname=SWITCH)[0].get_attr("IFLA_STATS64")["tx_dropped"]
    assert refused > 0
    # What waits to be received when the link goes is in no counter of the kernel: a ring's worth each time.
    assert sent - dropped - 5 * 320 <= counted() <= sent - dropped
    assert decapsulates(cable)


# What the machine has run out of

def in_a_mount_namespace(prepare: str, *words: str) -> subprocess.CompletedProcess[str]:
    return run("unshare", "--mount", "sh", "-c", f'{prepare} && exec "$@"', "sh", *COMMAND, *words)


FULL = "mount -t tmpfs -o size=4k full /run && { dd if=/dev/zero of=/run/fill bs=4k 2>&-; true; }"


LOCK_REFUSED = "the lock /run/xdp-erm.lock cannot be opened: Read-only file system"


def refusing_to_shrink(monkeypatch) -> None:
    """A driver, for as long as this lasts, that takes no smaller MTU."""
    setting = Links.set_mtu

    def set_mtu(links: Links, link: Link, mtu: int) -> None:
        if mtu < link.mtu:
            raise XdpErmError(f"{link.name}: MTU {mtu} is refused: Device or resource busy")
        setting(links, link, mtu)

    monkeypatch.setattr(Links, "set_mtu", set_mtu)


@pytest.mark.parametrize("between", ["nothing", "attach", "their own MTU"])
def test_an_mtu_that_cannot_be_brought_back(cable, monkeypatch, between):
    """Everything else is, and the MTU later, unless somebody has set another since."""
    change(SENSOR, mtu=1500)
    before = everything()
    loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    refusal = f"{SENSOR}: MTU 1500 is refused: Device or resource busy"
    not_all = f"{SENSOR}: detached, but {refusal}; run `xdp-erm detach {SENSOR}` again once that is possible"
    with monkeypatch.context() as patched:
        refusing_to_shrink(patched)
        for _ in range(2):
            with pytest.raises(XdpErmError, match=f"^{re.escape(not_all)}$"):
                loader.detach(SENSOR)
            after = everything()
            assert after == (1554, None, after[2], *before[3:])
        if between == "attach":
            said = loader.attach(SENSOR, InterfaceConfig())
            assert said[0].startswith(f"{SENSOR}: warning: what was changed before is not undone yet ({refusal})")
            assert decapsulates(cable)
            assert everything()[2] == {}
    if between == "their own MTU":
        change(SENSOR, mtu=4000)
        before = (4000, *before[1:])
    loader.detach(SENSOR)
    assert everything() == before


JOURNAL_REFUSED = "/run/xdp-erm.journal cannot be written: No space left on device"


@pytest.mark.parametrize("kept, prepare, attaching, reason", [
    (True, "mount -t tmpfs -o ro empty /run", LOCK_REFUSED, LOCK_REFUSED),
    (True, FULL, JOURNAL_REFUSED, JOURNAL_REFUSED),
    (False, FULL, "the headers cannot be written to /run: No space left on device", JOURNAL_REFUSED),
], ids=["read-only", "full", "full and nothing compiled before"])
def test_a_run_that_takes_nothing(cable, monkeypatch, kept, prepare, attaching, reason):
    before = everything()
    if kept:
        loader.attach(SENSOR, InterfaceConfig())
        loader.detach(SENSOR)
    else:
        monkeypatch.setenv(cache.VARIABLE, "/proc/nowhere")
    done = in_a_mount_namespace(prepare, "attach", SENSOR)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"xdp-erm: {attaching}\n")
    assert everything() == before
    loader.attach(SENSOR, DEFAULT)
    attached = everything()
    done = in_a_mount_namespace(prepare, "detach", SENSOR)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"xdp-erm: {reason}\n")
    assert everything() == attached
    assert in_a_mount_namespace(prepare, "stats", "--json").returncode == 0


def test_a_read_only_etc(cable):
    """Nothing is written there."""
    assert in_a_mount_namespace("mount -o bind,ro /etc /etc", "attach", SENSOR).returncode == 0
    assert in_a_mount_namespace("mount -o bind,ro /etc /etc", "detach", SENSOR).returncode == 0


def test_no_room_for_temporary_files(cable):
    """The project is reached at another place, as it may itself lie where the room is taken."""
    full = f"mount --bind {REPOSITORY} /mnt && cd /mnt && {FULL.replace('/run', '/tmp')}"
    command = [word.replace(str(REPOSITORY), "/mnt") for word in COMMAND]
    done = run("unshare", "--mount", "sh", "-c", f'{full} && exec "$@"', "sh", *command, "attach", SENSOR)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["attach", "detach"])
def test_few_descriptors(cable, command):
    """One more each time, until it does: before that, one line and nothing changed."""
    without = everything()
    if command == "detach":
        loader.attach(SENSOR, DEFAULT)
    before = everything()
    for descriptors in range(5, 40):  # Python does not start with fewer
        done = run("prlimit", f"--nofile={descriptors}", *COMMAND, command, SENSOR)
        said = done.stderr.replace("waiting for another xdp-erm to finish\n", "")
        if done.returncode == 0:
            break
        assert everything() == before, f"{descriptors}: {done.stdout}{said}"
        assert done.returncode == 1
        assert "Traceback" not in said
        assert re.search(r"^xdp-erm: .*", said.splitlines()[-1])
    assert descriptors > 6, "the limit does not count"
    assert done.returncode == 0
    if command == "attach":
        loader.detach(SENSOR)
    assert everything() == without


def test_no_locked_memory(cable):
    done = run("prlimit", "--memlock=0", *COMMAND, "attach", SENSOR)
    assert (done.returncode, done.stderr.replace("waiting for another xdp-erm to finish\n", "")) == (0, "")


def test_output_that_nothing_takes(cable):
    done = run("sh", "-c", '"$@" >/dev/full', "sh", *COMMAND, "status")
    assert (done.returncode, done.stderr) == (1, "xdp-erm: No space left on device: run it again once there is more\n")


# Another version of the package

def test_an_upgrade_under_traffic(cable, tmp_path, monkeypatch):
    """Of program and filter. All the while every packet arrives as mirrored, and is counted."""
    other = tmp_path / "bpf"
    shutil.copytree(shared.BPF_DIRECTORY, other)
    header = other / "shared.h"
    header.write_text(re.sub(r"(#define MARK) \S+", r"\1 0x12345678", header.read_text()))
    versions = itertools.cycle((other, shared.BPF_DIRECTORY))
    loader.attach(SENSOR, DEFAULT)
    cable.wait_for_carrier()
    done = threading.Event()
    with FanoutWorkers(cable, 2, operator.attrgetter("mirrored")) as workers:
        packets = itertools.takewhile(lambda _: not done.is_set(), synthetic(flows=100, packets=10**9))
        sender = threading.Thread(target=lab.mirror, args=(cable, packets, workers))
        sender.start()
        try:
            for _ in range(4):
                monkeypatch.setattr(shared, "BPF_DIRECTORY", next(versions))
                before = counted()
                said = loader.attach(SENSOR, DEFAULT)
                assert "by a newer filter" in said[0]
                assert "swapped the program" in said[1]
                assert counted() > before, "no traffic during the upgrade"
        finally:
            done.set()
            sender.join(TIMEOUT)
        result = workers.finish()
    assert (result.missing, result.unexpected, result.dropped) == (0, 0, 0)
    assert counted() == result.sent
