"""Keeps what the compiler has made, so that it is asked once only.

An entry is a file: a line with the format's number and the SHA-256 of the rest, then JSON. Its name is the SHA-256 of
all that the result depends on but for the compiler, which the entry names. It is loaded into the kernel by root, so it
counts only where root alone can have written it. What is wrong with an entry is said on standard error; that there is
none, or that none can be written, is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..printable import printable
from .module import Object

DIRECTORY = "/var/cache/xdp-erm"
#: Names another directory, for tests. The same is asked of it.
VARIABLE = "XDP_ERM_CACHE"

#: Those used last are kept.
MOST_ENTRIES = 256
#: Bytes; entries have some ten thousand.
LONGEST = 1 << 20

_FORMAT = b"xdp-erm 1"
_NEW = ".new-"  # what the name of an unfinished entry begins with
_UNFINISHED_SECONDS = 3600  # after which nobody writes it any more


class Untrusted(Exception):
    """What was kept is not to be used; says why."""


def place() -> Path:
    """Where entries are."""
    return Path(os.environ.get(VARIABLE, DIRECTORY)).absolute()


def find(request: str) -> Object | None:
    """What was kept for a request to the compiler. None: nothing, or nothing to be trusted."""
    name = _name(request)
    try:
        with _directory() as directory:
            return _read(directory, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        why = str(error.strerror)
    except Untrusted as untrusted:
        why = str(untrusted)
    print(printable(f"{place() / name} is not used: {why}"), file=sys.stderr)
    return None


def keep(request: str, answer: dict[str, Any]) -> None:
    """Keeps the compiler's answer to a request, where that can be."""
    text = json.dumps(answer).encode()
    content = b"%s %s\n%s" % (_FORMAT, hashlib.sha256(text).hexdigest().encode(), text)
    name = _name(request)
    new = f"{_NEW}{name}-{os.getpid()}"
    with contextlib.suppress(OSError, Untrusted), _directory(make=True) as directory:
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
            os.replace(new, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=directory)
            raise
        _prune(directory)


def _name(request: str) -> str:
    return hashlib.sha256(f"{platform.machine()} {request}".encode()).hexdigest()


@contextlib.contextmanager
def _directory(make: bool = False) -> Iterator[int]:
    """The open directory. Raises Untrusted: another than root can have put there what is there."""
    with contextlib.ExitStack() as stack:
        reached, wanted = Path("/"), place()
        fd = _opened(stack, str(reached), None)
        for part in wanted.parts[1:]:
            _check(fd, reached)
            reached /= part
            if make and reached == wanted:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
            fd = _opened(stack, part, fd)
        _check(fd, reached)
        yield fd


def _opened(stack: contextlib.ExitStack, name: str, directory: int | None) -> int:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    stack.callback(os.close, fd)
    return fd


def _check(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if found.st_uid != 0:
        raise Untrusted(f"{path} is not root's")
    # What stands in a sticky directory, such as /tmp, only its owner can replace.
    if found.st_mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        raise Untrusted(f"others than root can write {path}")


def _read(directory: int, name: str) -> Object:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Untrusted("it is no file")
        _check(fd, place() / name)
        content = file.read(LONGEST + 1)
    head, _, text = content.partition(b"\n")
    if len(content) > LONGEST or head != b"%s %s" % (_FORMAT, hashlib.sha256(text).hexdigest().encode()):
        raise Untrusted("it is damaged, or of another version")
    plain = json.loads(text)
    installed = _installed()
    if installed not in (None, plain["compiler"]):
        raise Untrusted(f"{plain['compiler']} has made it, and there is {installed} now")
    with contextlib.suppress(OSError):  # on a disk that cannot be written
        os.utime(name, dir_fd=directory, follow_symlinks=False)
    return Object.of(plain)


def _installed() -> str | None:
    """The compiler that is installed, as clang.py calls it, without the time to load it. None: there is none."""
    with contextlib.suppress(OSError, ValueError):
        spec = importlib.util.find_spec("bcc")
        if spec and spec.origin:
            text = Path(spec.origin).with_name("version.py").read_text("utf-8")
            version = re.search(r"__version__ = '([^']+)'", text)
            return f"bcc {version[1]}" if version else None
    return None


def _prune(directory: int) -> None:
    """Removes what was not used for longest, and what a killed command has left half-written."""
    def used(name: str) -> float:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime

    names = os.listdir(directory)
    entries = sorted((name for name in names if re.fullmatch("[0-9a-f]{64}", name)), key=used, reverse=True)
    unfinished = [name for name in names if name.startswith(_NEW) and used(name) < time.time() - _UNFINISHED_SECONDS]
    for name in entries[MOST_ENTRIES:] + unfinished:
        os.unlink(name, dir_fd=directory)
