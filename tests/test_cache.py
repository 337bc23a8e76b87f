"""What the compiler made is kept for root by root: used as it was made, and noticed where it is anything else."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR
from xdp_erm_py.program import cache, compiler
from xdp_erm_py.program.compiler import Variant
from xdp_erm_py.program.module import Object
from xdp_erm_py.settings import InterfaceConfig

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(REPOSITORY / "bin" / "xdp-erm")]
TIMEOUT = 60  # seconds
NOBODY = 65534
NEVER = "this must not be compiled"


@pytest.fixture
def directory(xdp, tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    place = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(place))
    return place


@pytest.fixture
def no_compiler(monkeypatch) -> Callable[[], None]:
    """From the call on there is none."""
    def refuse(_: str) -> None:
        raise XdpErmError(NEVER)
    return lambda: monkeypatch.setattr(compiler, "_clang", refuse)


def classifier() -> Object:
    return compiler.classifier()


@pytest.fixture
def entry(directory, capfd) -> Path:
    """Kept, and nothing said."""
    classifier()
    found, = directory.iterdir()
    assert capfd.readouterr() == ("", "")
    return found


def compiles_anew(entry: Path, reason: str, capfd) -> None:
    """Once, with a line about it, and what is kept then is right again."""
    fresh = Object.of(compiler._clang(compiler._request(compiler.source(compiler.CLASSIFIER_SOURCE), [])))
    assert classifier() == fresh
    assert capfd.readouterr() == ("", f"{entry} is not used: {reason}\n")
    assert (classifier(), capfd.readouterr()) == (fresh, ("", ""))


@pytest.mark.check
@pytest.mark.parametrize("variant", [Variant(), Variant((0, 1), True)], ids=["plain", "cpumap and frags"])
def test_what_is_kept_is_what_was_made(directory, no_compiler, variant):
    """Instructions, definitions of maps, relocations and licence."""
    config = InterfaceConfig(sources=tuple(f"10.0.{number}.0/24" for number in range(20)))
    texts = [(compiler.source(compiler.SOURCE), compiler.flags(config, variant)),
             (compiler.source(compiler.ARRIVAL_SOURCE), []), (compiler.source(compiler.CLASSIFIER_SOURCE), [])]
    made = [compiler.compiled(*text) for text in texts]
    assert made[0].maps["counters"] and made[0].functions["xdp_erm"].maps
    assert all(found.license == "Dual BSD/GPL" for found in made)
    no_compiler()
    assert [compiler.compiled(*text) for text in texts] == made
    for changed in ({"vlan": "strip"}, {"isolate": False}, {"port": (7933,)}):
        with pytest.raises(XdpErmError, match=NEVER):
            compiler.compiled(texts[0][0], compiler.flags(InterfaceConfig(**changed), variant))


def test_no_compiler_is_loaded(cable, directory):
    """Nor is one needed: attach and swap with nothing but what was kept."""
    for vlan in ("restore", "strip"):
        assert run("attach", SENSOR, "--vlan", vlan).returncode == 0
    assert run("detach", SENSOR).returncode == 0
    text = """
import subprocess, sys
def never(*_, **__):
    raise AssertionError("a process was started")
subprocess.Popen = never
from xdp_erm_py.cli import main
assert main(["attach", sys.argv[1]]) == 0
assert main(["attach", sys.argv[1], "--vlan", "strip"]) == 0
maps = open("/proc/self/maps").read()
assert "bcc" not in sys.modules and "libbcc" not in maps and "LLVM" not in maps
"""
    done = subprocess.run([sys.executable, "-c", text, SENSOR], cwd=REPOSITORY, capture_output=True, text=True,
                          timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "swapped the program" in done.stdout


def run(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, *COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False)


DAMAGED = "it is damaged, or of another version"


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-1], lambda content: content + b"\n", lambda content: content[:40],
    lambda content: content.replace(b"18", b"19", 1), lambda content: content.replace(b"xdp-erm 1", b"xdp-erm 0"),
    lambda content: b"\0" * len(content), lambda content: content * (cache.LONGEST // len(content) + 1),
], ids=["empty", "cut", "longer", "cut in its head", "an instruction", "another format", "zeros", "too long"])
def test_damage(entry, capfd, damage):
    content = entry.read_bytes()
    entry.write_bytes(damage(content))
    compiles_anew(entry, DAMAGED, capfd)
    assert entry.read_bytes() == content


def test_a_byte_anywhere(entry, no_compiler, capfd):
    content = entry.read_bytes()
    no_compiler()
    for place in range(0, len(content), 7):
        entry.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(XdpErmError, match=NEVER):
            classifier()
    assert capfd.readouterr().err.count(DAMAGED) == len(range(0, len(content), 7))


@pytest.mark.parametrize("change, reason", [
    (lambda entry: os.chown(entry, NOBODY, -1), "{entry} is not root's"),
    (lambda entry: entry.chmod(0o620), "others than root can write {entry}"),
    (lambda entry: entry.chmod(0o1602), "others than root can write {entry}"),
    (lambda entry: entry.rename(entry.with_name("it")).parent.joinpath(entry.name).symlink_to("it"),
     "Too many levels of symbolic links"),
    (lambda entry: (entry.unlink(), os.mkfifo(entry)), "it is no file"),
], ids=["another's", "for a group", "for others", "symbolic link", "fifo"])
def test_what_is_not_roots_alone(entry, capfd, change, reason):
    change(entry)
    compiles_anew(entry, reason.format(entry=entry), capfd)


@pytest.mark.parametrize("change, reason", [
    (lambda place: os.chown(place, NOBODY, -1), "{place} is not root's"),
    (lambda place: place.chmod(0o770), "others than root can write {place}"),
    (lambda place: os.chown(place.parent, NOBODY, -1), "{place.parent} is not root's"),
    (lambda place: place.parent.chmod(0o777), "others than root can write {place.parent}"),
    (lambda place: place.rename(place.with_name("it")).with_name("cache").symlink_to("it"), "Not a directory"),
], ids=["another's", "for a group", "in another's", "in one for others", "symbolic link"])
def test_a_directory_that_is_not_roots_alone(entry, capfd, change, reason):
    """It is neither read nor written."""
    place, content = entry.parent, entry.read_bytes()
    change(place)
    entry.write_bytes(b"theirs")
    fresh = classifier()
    assert capfd.readouterr() == ("", f"{entry} is not used: {reason.format(place=place)}\n")
    assert entry.read_bytes() == b"theirs"
    assert fresh == Object.of(json.loads(content.partition(b"\n")[2]))


def test_a_directory_that_others_can_write_but_not_rename_in(entry, no_compiler):
    """Like /tmp."""
    entry.parent.parent.chmod(0o1777)
    no_compiler()
    assert classifier()


@pytest.mark.parametrize("installed, reason", [
    ("bcc 0.0.1", "bcc 0.26.0 has made it, and there is bcc 0.0.1 now"), (None, None)], ids=["another", "none"])
def test_another_compiler(entry, monkeypatch, no_compiler, capfd, installed, reason):
    _, _, text = entry.read_bytes().partition(b"\n")
    text = json.dumps({**json.loads(text), "compiler": "bcc 0.26.0"}).encode()
    entry.write_bytes(b"xdp-erm 1 " + hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    assert (cache._installed() or "").startswith("bcc 0.")
    monkeypatch.setattr(cache, "_installed", lambda: installed)
    if reason:
        classifier()
        assert capfd.readouterr() == ("", f"{entry} is not used: {reason}\n")
    else:
        no_compiler()
        classifier()


@pytest.mark.parametrize("prepare", [
    'mount -t tmpfs -o ro,mode=755 empty "$0"', 'mount -t tmpfs -o nr_inodes=1,mode=755 full "$0"',
    'mount -t tmpfs -o size=4k,mode=755 full "$0" && head -c 4096 /dev/zero >"$0/fill"',
    'mount -t tmpfs -o ro,mode=755 empty "$(dirname "$0")"',
], ids=["read-only", "no file more", "full", "in what is read-only"])
def test_where_nothing_can_be_kept(cable, directory, prepare):
    directory.mkdir(0o700)
    prefix = ("unshare", "--mount", "sh", "-c", f'{prepare} && exec "$@"', str(directory))
    done = run("attach", SENSOR, prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert run("detach", SENSOR).returncode == 0


def test_what_is_read_only_is_read(cable, directory):
    """There is no compiler then, which would be asked."""
    assert run("attach", SENSOR).returncode == 0
    assert run("detach", SENSOR).returncode == 0
    bcc = importlib.util.find_spec("bcc").origin
    prefix = ("unshare", "--mount", "sh", "-c",
              f'mount -o bind,ro "$0" "$0" && mount --bind /dev/null {bcc} && exec "$@"', str(directory))
    done = run("attach", SENSOR, prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bcc is missing" in run("attach", SENSOR, "--vlan", "strip", prefix=prefix).stderr


def test_old_ones_are_removed(entry, monkeypatch, no_compiler):
    """Those that were not used for longest, and what a killed command has left."""
    monkeypatch.setattr(cache, "MOST_ENTRIES", 2)
    now = time.time()
    os.utime(entry, (now - 100, now - 100))
    names = ["a" * 64, "b" * 64, ".new-old", ".new-young", "another's"]
    for name, age in zip(names, (200, 50, 4000, 10, 10**6)):
        (entry.parent / name).write_text("")
        os.utime(entry.parent / name, (now - age, now - age))
    classifier()  # used
    compiler.compiled(compiler.source(compiler.ARRIVAL_SOURCE), [])
    left = {path.name for path in entry.parent.iterdir()}
    assert entry.name in left and len(left) == 4
    assert left >= {".new-young", "another's"}
    no_compiler()
    assert classifier()


def test_ctrl_c_while_it_keeps(directory, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        classifier()
    assert list(directory.iterdir()) == []
