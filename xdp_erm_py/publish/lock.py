"""The lock that a host's publisher holds, by which others find it and ask it to end.

It is a lock of fcntl(2), of which the kernel names the holder, by the number that it has among the processes that the
asker sees. The one of flock(2) beside it keeps out publishers of earlier versions, which hold that alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

from ..errors import XdpErmError

DEFAULT = Path("/run/xdp-erm-publish.pid")

#: The systemd unit that keeps one running.
UNIT = "xdp-erm-publish.service"

#: Its last report takes a few seconds.
STOP_SECONDS = 15.0

_QUESTION = struct.Struct("hhqqi0q")  # struct flock, with the padding at its end


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock. The file says who does, for people, and nothing afterwards. XdpErmError: it is not to be had."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _failed(path, error) from None
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path, _holder(file)) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            earlier = _of_an_earlier_version(file)
            if earlier is not None:  # else it is held by somebody who can read the file, which is no publisher
                raise _taken(path, earlier) from None
        _write(path, file, f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            _write(path, file, b"")
    finally:
        os.close(file)


def _write(path: Path, file: int, content: bytes) -> None:
    try:
        os.ftruncate(file, 0)
        if os.pwrite(file, content, 0) != len(content):
            raise XdpErmError(f"--pid-file {path}: cannot be written as a whole")
    except OSError as error:
        raise _failed(path, error) from None


def holder(path: Path) -> int | None:
    """The process that publishes; 0: one that has no number here; None: there is none. XdpErmError: nobody can say."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed(path, error) from None
    try:
        return _holder(file)
    finally:
        os.close(file)


def _holder(file: int) -> int | None:
    question = _QUESTION.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_, process = _QUESTION.unpack(fcntl.fcntl(file, fcntl.F_GETLK, question))
    return _of_an_earlier_version(file) if kind == fcntl.F_UNLCK else process


def _of_an_earlier_version(file: int) -> int | None:
    """The process whose number stands in the file, if it holds the lock of flock(2)."""
    with contextlib.suppress(OSError):  # no such process, or not for us to look at; a directory
        number = os.pread(file, 32, 0).strip().decode(errors="replace")
        for descriptor in os.scandir(f"/proc/{number}/fd") if number.isdecimal() else ():
            about = Path(f"/proc/{number}/fdinfo/{descriptor.name}")
            if os.path.samestat(os.stat(descriptor.path), os.fstat(file)) and "FLOCK" in about.read_text():
                return int(number)
    return None


def describe(path: Path) -> str:
    """Whether a publisher runs, and which."""
    process = holder(path)
    return "no publisher runs" if process is None else f"a publisher runs ({_called(process)})"


def _called(process: int | None) -> str:
    return f"process {process}" if process else "a process that is not seen from here"


def stop(path: Path) -> str:
    """Asks the publisher to end and waits for it. Returns what came of that; systemd's is left to systemd.

    XdpErmError: it may not be asked, or does not end.
    """
    process = holder(path)
    if process is None:
        return describe(path)
    if process == 0:
        raise XdpErmError("the publisher is not seen from here, as in a container: stop it there")
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return f"the publisher (process {process}) has ended"
    except OSError as error:
        raise XdpErmError(f"the publisher (process {process}) cannot be stopped: {error.strerror}") from None
    try:
        if holder(path) != process:  # else the number is another's by now
            return f"the publisher (process {process}) has ended"
        if is_the_units(process):
            return f"the publisher (process {process}) is left to systemd: `systemctl stop {UNIT}` stops it"
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        if not ended.poll(STOP_SECONDS * 1000):
            raise XdpErmError(f"the publisher (process {process}) does not end")
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise XdpErmError(f"the publisher (process {process}) cannot be stopped: {error.strerror}: run this with "
                          "sudo") from None
    finally:
        os.close(descriptor)
    return f"the publisher (process {process}) has ended"


def is_the_units(process: int) -> bool:
    """Whether it is systemd's."""
    try:
        return UNIT in Path(f"/proc/{process}/cgroup").read_text().strip().split("/")
    except (FileNotFoundError, ProcessLookupError):  # it is gone, or not seen from here
        return False


def _taken(path: Path, process: int | None) -> XdpErmError:
    return XdpErmError(f"another publisher runs on this host ({_called(process)}, {path})")


def _failed(path: Path, error: OSError) -> XdpErmError:
    return XdpErmError(f"--pid-file {path}: {error.strerror}")
