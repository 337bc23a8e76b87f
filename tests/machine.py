"""Make-believe machines for tests: namespaces with a Zeek of their own, gone with their processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ZEEK = next((path.parent.parent for path in map(Path, (shutil.which("zeekctl") or "", "/opt/zeek/bin/zeekctl"))
             if path.is_file()), None)
TIMEOUT = 240  # seconds

# Most of the tools are told where things are at build time, so a machine sees its own copy of Zeek at the same path.
_SETUP = """
set -e
mount --bind "$1" "$2"
mount -t tmpfs tmpfs /run
mkdir /run/bin
hostname "$3"
ip link set lo up
echo ready
sleep infinity &
wait
"""


class Machine:
    """A machine with network, files, host name and processes of its own.

    It is in the network namespace in which it is made. Its `prefix` is where others find its copy of Zeek. The
    processes of a machine `inside` another have ids there as well.
    """

    def __init__(self, name: str, prefix: Path, inside: Machine | None = None) -> None:
        assert ZEEK is not None
        self.prefix = prefix
        self._holder = subprocess.Popen(
            [*(["nsenter", f"--target={inside.pid}", "--pid", "--"] if inside else []),
             "setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child",
             "--mount-proc", "--propagation=private", "--", "sh", "-c", _SETUP, "sh", str(prefix), str(ZEEK), name],
            stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError("the kernel does not give the namespaces")
        self.pid = _youngest(self._holder.pid)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.kill()
        self._holder.communicate()

    def command(self, *words: str) -> list[str]:
        """A command line that runs `words` on the machine."""
        path = f"PATH=/run/bin:{ZEEK}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--pid", "--", "env", "-i", path,
                "HOME=/run", "USER=root", "LC_ALL=C.UTF-8", *words]

    def run(self, *words: str, status: int | None = 0, **options: Any) -> str:
        """What a command prints, on either stream. It must end with `status`, unless that is None."""
        done = subprocess.run(self.command(*words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT, check=False, **options)
        assert status in (None, done.returncode), f"{' '.join(words)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def shell(self, script: str, status: int | None = 0) -> str:
        return self.run("sh", "-c", script, status=status)


def _youngest(pid: int) -> int:
    """The last of a line of processes with one child each."""
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            return pid
        pid = int(children[0])


def pid_within(machine: Machine, pid: int) -> str:
    """What a process is called on a machine whose processes include it."""
    depth = len(_pids(machine.pid)) - 1
    return _pids(pid)[depth]


def _pids(pid: int) -> list[str]:
    """A process's ids, from the outermost PID namespace to its own."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1:] for line in status if line.startswith("NSpid:"))


# What is changed is kept in memory.
_OVERLAY = """
set -e
mount -t tmpfs changes "$2"
mkdir "$2/upper" "$2/work"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" zeek "$3"
"""


@contextlib.contextmanager
def copy_of_zeek(directory: Path) -> Iterator[Path]:
    """Where it is, for as long as the block: laid over the original, or copied where the kernel cannot do that.

    It is as if it had just been installed: without packages, and zeekctl remembers nothing.
    """
    assert ZEEK is not None
    prefix, changes = directory / "zeek", directory / "changes"
    prefix.mkdir()
    changes.mkdir()
    overlay = ["sh", "-c", _OVERLAY, "sh", ZEEK, changes, prefix]
    try:
        if subprocess.run(overlay, stderr=subprocess.DEVNULL, timeout=TIMEOUT, check=False).returncode != 0:
            subprocess.run(["cp", "-a", f"{ZEEK}/.", prefix], check=True, timeout=TIMEOUT)
        _forget(prefix)
        yield prefix
    finally:
        for mounted in (prefix, changes):
            subprocess.run(["umount", "--lazy", mounted], stderr=subprocess.DEVNULL, timeout=TIMEOUT, check=False)


def _forget(prefix: Path) -> None:
    """What zkg has installed, and what zeekctl has kept."""
    for name in ("var/lib/zkg", "lib/zeek/plugins/packages", "share/zeek/site/packages", "spool", "logs"):
        shutil.rmtree(prefix / name, ignore_errors=True)
    for name in ("spool", "logs"):
        (prefix / name).mkdir()
    for command in (prefix / "bin").iterdir():
        if command.is_symlink() and "/zkg/" in os.readlink(command):
            command.unlink()


def package_repository(directory: Path) -> Path:
    """A git repository with the package as it stands here, committed or not."""
    repository = directory / "xdp-erm"
    names = _git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).exists():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, repository / name)
    _git(repository, "init", "--quiet", "--initial-branch=main")
    commit(repository, "The package")
    return repository


def commit(repository: Path, message: str) -> None:
    _git(repository, "add", "--all")
    _git(repository, "-c", "user.name=Test", "-c", "user.email=test@example.org", "commit", "--quiet", "-m", message)


def _git(repository: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(repository), *words], stdout=subprocess.PIPE, text=True, check=True,
                          timeout=TIMEOUT).stdout


needs_zeek = pytest.mark.skipif(ZEEK is None, reason="no Zeek on PATH or in /opt/zeek")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making namespaces needs root")
