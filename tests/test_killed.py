"""A command that is killed at any step leaves nothing that the next one does not mend."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import filters
import killer
import pytest

from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.interface import isolation, journal, loader, stats
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.settings import InterfaceConfig

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 60  # seconds

ATTACH = [  # module, class, function, which call of it
    ("interface.journal", "os", "replace", 1),
    ("kernel.links", "Links", "set_mtu", 1), ("interface.nic", "", "_set", 1),
    ("program.compiler", "", "classifier", 1), ("kernel.bpf", "", "attach_tcx", 1),
    ("interface.programs", "", "write_state", 1), ("kernel.links", "Links", "attach", 1),
    ("interface.nic", "", "settle", 1), ("interface.loader", "", "write_state", 1),
]
ATTACH_CLSACT = [("kernel.clsact", "", "make_qdisc", 1), ("kernel.clsact", "", "add_filter", 1)]
DETACH = [
    ("kernel.links", "Links", "detach", 1), ("kernel.links", "Links", "set_mtu", 1), ("interface.nic", "", "_set", 1),
    ("kernel.bpf", "", "detach_tcx", 1),
]
DETACH_CLSACT = [("kernel.clsact", "", "remove_qdisc", 1)]
SWAP = [("interface.programs", "", "write_state", 1), ("kernel.links", "Links", "attach", 1),
        ("interface.loader", "", "write_state", 1)]
# To generic mode, for which the program before is taken off first.
MODE = [("kernel.links", "Links", "detach", 1), ("interface.programs", "", "write_state", 1),
        ("kernel.links", "Links", "attach", 1), ("interface.loader", "", "write_state", 1)]
# From clsact to tcx, as by an upgrade.
MOVE = [("kernel.bpf", "", "attach_tcx", 1), ("kernel.clsact", "", "remove_qdisc", 1),
        ("interface.loader", "", "write_state", 1)]


def steps(tcx, clsact=()):
    """Of a kernel with tcx, and those of one without."""
    return pytest.mark.parametrize("hook, module, owner, step, number, when", [
        pytest.param(hook, *row, when, id=f"{when}-{row[0]}.{row[2]}-{row[3]}")
        for hook, table in (("tcx", tcx), ("clsact", clsact)) for row in table for when in ("before", "after")])


@pytest.fixture(autouse=True)
def kernel(request, monkeypatch):
    """Makes it one without tcx, for the steps of that."""
    if "hook" in request.fixturenames and request.getfixturevalue("hook") == "clsact":
        monkeypatch.setattr(isolation, "_has_tcx", lambda link: False)


def killed(*command: str, at: tuple[str, str, str, int, str]) -> None:
    module, owner, step, number, when = at
    status = killer.run(*command, module=module, owner=owner, step=step, when=when, number=number)
    assert status == -signal.SIGKILL


def everything() -> tuple:
    """What attaching changes: the interface, its features, what sees frames behind the taps."""
    with Links() as links:
        link = links.find(SENSOR)
    features = subprocess.run(["ethtool", "-k", SENSOR], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return link, features.stdout, filters.everything(SENSOR)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def unfinished() -> dict:
    """What the journal says is under way on the interface."""
    with Links() as links, journal.exclusive() as entries:
        return entries.unfinished(links.find(SENSOR))


@pytest.fixture
def small(cable):
    """The cable, with an MTU that attaching raises."""
    with Links() as links:
        links.set_mtu(links.find(SENSOR), 1500)
    yield cable


@steps(ATTACH, ATTACH_CLSACT)
@pytest.mark.parametrize("again", [True, False])
def test_attach(small, hook, module, owner, step, number, when, again):
    """Then attached once more, or detached at once."""
    before = everything()
    killed("attach", SENSOR, "--set-mtu", at=(module, owner, step, number, when))
    if again:
        loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
        assert stats.snapshot(SENSOR)[0]["isolation"]
        with Links() as links:
            assert (isolation.look(links.find(SENSOR)).by, links.find(SENSOR).mtu) == (hook, 1554)
    loader.detach(SENSOR)
    assert everything() == before
    assert unfinished() == {}


@steps(DETACH, DETACH_CLSACT)
def test_detach(small, hook, module, owner, step, number, when):
    before = everything()
    loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    killed("detach", SENSOR, at=(module, owner, step, number, when))
    loader.detach(SENSOR)
    assert everything() == before
    assert unfinished() == {}


@steps(SWAP)
def test_swap(cable, hook, module, owner, step, number, when):
    before = everything()
    loader.attach(SENSOR, InterfaceConfig())
    killed("attach", SENSOR, "--vlan=tagged", at=(module, owner, step, number, when))
    interface, = stats.snapshot(SENSOR)  # one program or the other, and it works
    assert interface["config"]["vlan"] in ("restore", "tagged")
    loader.attach(SENSOR, InterfaceConfig(vlan="tagged"))
    assert stats.snapshot(SENSOR)[0]["config"]["vlan"] == "tagged"
    loader.detach(SENSOR)
    assert everything() == before


@steps(MODE)
@pytest.mark.parametrize("again", [True, False])
def test_a_change_of_mode(small, hook, module, owner, step, number, when, again):
    """Between the programs there is none that remembers what was changed."""
    before = everything()
    loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    killed("attach", SENSOR, "--mode=generic", at=(module, owner, step, number, when))
    if again:
        loader.attach(SENSOR, InterfaceConfig(mode="generic", set_mtu=True))
        assert stats.snapshot(SENSOR)[0]["mode"] == "generic"
    loader.detach(SENSOR)
    assert everything() == before
    assert unfinished() == {}


@steps(MOVE)
@pytest.mark.parametrize("again", [True, False])
def test_an_upgrade_from_a_version_that_used_clsact(cable, monkeypatch, hook, module, owner, step, number, when, again):
    before = everything()
    with monkeypatch.context() as patched:
        patched.setattr(isolation, "_has_tcx", lambda link: False)
        loader.attach(SENSOR, InterfaceConfig())
    killed("attach", SENSOR, at=(module, owner, step, number, when))
    with Links() as links:
        assert isolation.look(links.find(SENSOR)).by  # at each step
    if again:
        loader.attach(SENSOR, InterfaceConfig())
        assert (filters.tcx(SENSOR), filters.clsact(SENSOR)) == ([isolation.FILTER], [])
    loader.detach(SENSOR)
    assert everything() == before


@pytest.mark.check
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_temporary_is_left(cable, how, monkeypatch):
    """By a command that is killed, or ended by Ctrl-C, while it compiles."""
    monkeypatch.setenv("XDP_ERM_CACHE", "/proc/nowhere")

    def temporary() -> list[Path]:
        return list(Path("/run").glob("xdp-erm-compile-*"))

    command = subprocess.Popen([sys.executable, str(REPOSITORY / "bin" / "xdp-erm"), "attach", SENSOR],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(temporary)
    (os.kill if how == signal.SIGKILL else os.killpg)(command.pid, how)
    _, said = command.communicate(timeout=TIMEOUT)
    assert (command.returncode, said) == ({signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how], "")
    wait_for(lambda: not temporary())


SOUND = {"mtu": [1500, 1554], "features": ["rx-gro"], "rps": {"rx-0": ["0", "00000001,00000003"]}, "clsact": True,
         "below": {"7": {"features": ["rx-hashing"]}}}


@pytest.mark.parametrize("junk", [
    b"junk", b"\xff", b"[]", b'{"a": {}', b"[" * 100_000, b"null",
    *(json.dumps(entry).encode() for entry in (
        None, [], {"mtu": 1500}, {"mtu": [1500]}, {"mtu": [1500, "1554"]}, {"mtu": [-1, 1554]},
        {"mtu": [1 << 40, 1554]},
        {"features": "rx-gro"}, {"features": [["rx-gro"]]}, {"features": ["rx-all"]}, {"clsact": 1}, {"else": 1},
        {"rps": []}, {"rps": {"rx-0": ["0"]}}, {"rps": {"../rx-0": ["0", "3"]}}, {"rps": {"rx-0": ["0", "junk"]}},
        {"rps": {"rx-0": [0, 3]}}, {"rps": {"rx-0": [",", "3"]}}, {"below": {"eth0": {}}},
        {"below": {"7": {"else": 1}}}))])
def test_junk_in_the_journal(cable, tmp_path, monkeypatch, capsys, junk):
    """It is said in one line, once; nothing is brought back by it, and what else stands there counts."""
    monkeypatch.setattr(journal, "LOCK", tmp_path / "lock")
    (tmp_path / "lock").write_bytes(junk)  # where the journal was before
    with Links() as links, journal.exclusive() as entries:
        link = links.find(SENSOR)
        entries.begin(link, SOUND)
    file, = tmp_path.glob("*.journal")
    key, = json.loads(file.read_text())
    try:
        entry = json.loads(junk)
        whole = {key: entry} if isinstance(entry, dict) else entry
    except (ValueError, RecursionError):
        whole = None
    file.write_bytes(junk if whole is None else json.dumps(whole).encode())
    before = everything()
    loader.attach(SENSOR, InterfaceConfig())
    loader.detach(SENSOR)
    assert everything() == before
    assert capsys.readouterr().err.splitlines() == [
        f"xdp-erm: {file} is damaged, and only what is sound in it is gone by: if a command was killed half-way, "
        "compare MTU and offloads of its interface yourself (`ip link`, `ethtool -k`)"]

    file.write_text(json.dumps({"1/1/": {"else": 1}, key: SOUND}))
    with journal.exclusive() as entries:
        assert entries.unfinished(link) == SOUND
    assert json.loads(file.read_text()) == {key: SOUND}


def test_a_journal_that_cannot_be_written(cable, tmp_path, monkeypatch):
    """In part, for instance."""
    monkeypatch.setattr(journal, "LOCK", tmp_path / "lock")
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    before = everything()
    with pytest.raises(XdpErmError, match=r"lock\.journal cannot be written: No space left on device$"):
        loader.attach(SENSOR, InterfaceConfig(set_mtu=True))
    assert everything() == before


def test_a_lock_that_cannot_be_had(cable, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "LOCK", tmp_path / "missing" / "lock")
    for act in (lambda: loader.attach(SENSOR, InterfaceConfig()), lambda: loader.detach(SENSOR)):
        with pytest.raises(XdpErmError, match=r"^the lock .*/lock cannot be opened: No such file or directory$"):
            act()
    assert stats.snapshot() == []


def test_a_lock_that_is_a_symbolic_link_is_not_followed(cable, tmp_path, monkeypatch):
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    monkeypatch.setattr(journal, "LOCK", tmp_path / "lock")
    with pytest.raises(XdpErmError, match="cannot be opened: Too many levels of symbolic links"):
        loader.attach(SENSOR, InterfaceConfig())
    assert not (tmp_path / "target").exists()
