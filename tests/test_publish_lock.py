"""The publisher is who holds the lock: found and stopped by that, and nobody else ever is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.publish import lock

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 60  # seconds

HOLD = """
import sys, time
from pathlib import Path
from xdp_erm_py.publish import lock
with lock.held(Path(sys.argv[1])):
    print("holds it", flush=True)
    time.sleep(60)
"""
#: As versions before this lock did.
HOLD_EARLIER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.truncate(0)
os.write(file.fileno(), f"{os.getpid()}\\n".encode())
print("holds it", flush=True)
time.sleep(60)
"""
#: Somebody else, for whom the file says what it said before the number was used again.
LOOK = """
import os, sys, time
file = open(sys.argv[1], "w")
print(os.getpid(), file=file, flush=True)
print("looks at it", flush=True)
time.sleep(60)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="PID namespaces need root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pid"


@contextlib.contextmanager
def running(script: str, path: Path, *wrapper: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([*wrapper, sys.executable, "-c", script, str(path), "publish"], cwd=REPOSITORY,
                          stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield process
        finally:
            process.kill()


def command(*words: str, path: Path, wrapper: tuple[str, ...] = ()) -> tuple[int, str, str]:
    done = subprocess.run([*wrapper, sys.executable, "-m", "xdp_erm_py", "publish", f"--pid-file={path}", *words],
                          cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", [HOLD, HOLD_EARLIER], ids=["this version", "an earlier version"])
def test_only_one_publishes(path: Path, script: str) -> None:
    assert command("--running", path=path) == (1, "no publisher runs\n", "")
    with running(script, path) as holder:
        assert path.read_text() == f"{holder.pid}\n"
        assert command("--running", path=path) == (0, f"a publisher runs (process {holder.pid})\n", "")
        said = f"xdp-erm: another publisher runs on this host (process {holder.pid}, {path})\n"
        assert command(path=path) == (1, "", said)
        assert command("--stop", path=path) == (0, f"the publisher (process {holder.pid}) has ended\n", "")
        assert holder.wait(TIMEOUT) == -signal.SIGTERM
    for option, status in (("--running", 1), ("--stop", 0)):
        assert command(option, path=path) == (status, "no publisher runs\n", "")
    with running(HOLD, path):
        pass


def test_an_earlier_version_is_kept_out(path: Path) -> None:
    with running(HOLD, path), path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


#: As anybody can who may read it, with flock(1).
LOCK = """
import fcntl, sys, time
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("holds it", flush=True)
time.sleep(60)
"""


def test_users_cannot_keep_it_from_publishing(path: Path) -> None:
    for text in ("", "1\n"):
        path.write_text(text)
        with running(LOCK, path):
            assert command("--running", path=path) == (1, "no publisher runs\n", "")
            with lock.held(path):
                assert command("--running", path=path)[0] == 0


def test_the_file_is_empty_afterwards(path: Path) -> None:
    with lock.held(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert path.read_text() == ""


@pytest.mark.parametrize("where", ["file", "command line"])
def test_nobody_is_taken_for_the_publisher_by_a_number(path: Path, where: str) -> None:
    """The number in the file is somebody else's by now: who has the file open, or is called as publishers are."""
    with running(LOOK, path if where == "file" else path.with_name("other")) as other:
        path.write_text(f"{other.pid}\n")
        assert lock.holder(path) is None
        assert lock.stop(path) == "no publisher runs"
        assert other.poll() is None


@pytest.mark.parametrize("junk", [b"\xff", b"-1", b"0", b"1/../1", b"9" * 20, b"junk\n" * 100])
def test_junk_in_the_file(path: Path, junk: bytes) -> None:
    path.write_bytes(junk)
    assert command("--running", path=path) == (1, "no publisher runs\n", "")
    assert lock.stop(path) == "no publisher runs"
    with running(HOLD, path) as holder:
        assert lock.holder(path) == holder.pid
        path.write_bytes(junk)
        assert lock.holder(path) == holder.pid


def test_a_number_that_is_used_again_is_not_stopped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher ends, and another process gets its number, after we asked for it."""
    with running(LOOK, path) as other:
        answers = iter([other.pid, None])
        monkeypatch.setattr(lock, "holder", lambda _: next(answers))
        assert lock.stop(path) == f"the publisher (process {other.pid}) has ended"
        assert other.poll() is None


def test_one_that_does_not_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STOP_SECONDS", 0.2)
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{HOLD}"
    with running(deaf, path) as holder, pytest.raises(XdpErmError, match=f"process {holder.pid}. does not end$"):
        lock.stop(path)


NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@needs_root
def test_from_another_pid_namespace(path: Path) -> None:
    with running(HOLD, path):
        for option, *expected in (
                ("--running", 0, "a publisher runs (a process that is not seen from here)\n", ""),
                ("--stop", 1, "", "xdp-erm: the publisher is not seen from here, as in a container: stop it there\n")):
            assert command(option, path=path, wrapper=NAMESPACE) == tuple(expected)


@needs_root
def test_in_another_pid_namespace(path: Path) -> None:
    """It is found by its number out here, not by the one that it calls itself."""
    with running(HOLD, path, *NAMESPACE) as unshare:
        inside = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())
        assert path.read_text() == "1\n"
        assert lock.holder(path) == inside
        # Process 1 of a namespace does not end by a signal that it does not wait for.
        os.kill(inside, signal.SIGKILL)
        unshare.wait(TIMEOUT)
        assert lock.holder(path) is None


@needs_root
def test_who_may_not_stop_it() -> None:
    anybody = ("setpriv", "--reuid=65534", "--clear-groups")
    with tempfile.NamedTemporaryFile() as file, running(HOLD, Path(file.name)) as holder:
        path = Path(file.name)
        path.chmod(0o644)
        assert command("--running", path=path, wrapper=anybody) == (0, f"a publisher runs (process {holder.pid})\n", "")
        assert command("--stop", path=path, wrapper=anybody) == (
            1, "", f"xdp-erm: the publisher (process {holder.pid}) cannot be stopped: Operation not permitted: run "
                   "this with sudo\n")
        assert holder.poll() is None


def test_a_file_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert command(path=tmp_path / "link") == (
        1, "", f"xdp-erm: --pid-file {tmp_path / 'link'}: Too many levels of symbolic links\n")
    assert not (tmp_path / "target").exists()
    assert command(path=tmp_path) == (1, "", f"xdp-erm: --pid-file {tmp_path}: Is a directory\n")
    assert command("--running", path=tmp_path) == (1, "no publisher runs\n", "")


def test_a_number_that_is_written_in_part(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 1)
    with pytest.raises(XdpErmError, match="cannot be written as a whole"), lock.held(path):
        pass
