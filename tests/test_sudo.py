"""Who may run xdp-erm as root by sudo gets neither at root's files nor at other processes by it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdp_erm_py.publish import transports

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 60  # seconds
NOBODY = "65534"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="sudo gives root's rights, so this needs them")


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that anybody may look into."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


def by_sudo(*words: str, user: str = NOBODY) -> tuple[int, str, str]:
    """What a command does as root for a user."""
    done = subprocess.run([sys.executable, "-m", "xdp_erm_py", *words], cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "SUDO_UID": user, "SUDO_GID": user}, timeout=TIMEOUT, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", ["attach", "config"])
def test_a_file_of_roots_is_not_shown(directory: Path, command: str) -> None:
    """Not in the complaint about it either."""
    secret = directory / "secret"
    secret.write_text("root:password\n")
    secret.chmod(0o640)
    status, output, said = by_sudo(command, "lo", f"--config={secret}")
    assert (status, output) == (2, "")
    assert said == f"xdp-erm: {secret}: cannot be read: [Errno 13] Permission denied: '{secret}'\n"
    assert "root:password" in by_sudo(command, "lo", f"--config={secret}", user="0")[2]


def test_a_file_of_the_callers_counts(directory: Path) -> None:
    file = directory / "config"
    file.write_text("defaults: {vlan: strip}")
    file.chmod(0o400)
    os.chown(file, int(NOBODY), int(NOBODY))
    status, output, said = by_sudo("config", "lo", f"--config={file}")
    assert (status, said) == (0, "")
    assert "vlan: strip" in output


@pytest.mark.parametrize("theirs", ["zeek-config", "bindings", "directory", None])
def test_nothing_is_run_that_others_can_write(directory: Path, monkeypatch: pytest.MonkeyPatch,
                                              theirs: str | None) -> None:
    """Zeek's files belong to zeekctl's user, for instance."""
    package = directory / "python" / "broker"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    command = directory / "zeek-config"
    command.write_text(f"#!/bin/sh\n: >{directory}/was-run\necho {package.parent}\n")
    command.chmod(0o755)
    file = {"zeek-config": command, "bindings": package / "__init__.py", "directory": directory}.get(theirs or "")
    if file:
        os.chown(file, int(NOBODY), int(NOBODY))
    monkeypatch.setenv("PATH", str(directory))
    assert transports.broker_bindings() == (None if theirs else package.parent)
    assert (directory / "was-run").exists() == (theirs in (None, "bindings"))


@pytest.mark.parametrize("more", [[], ["--stop"], ["--running"]])
def test_no_file_is_written(directory: Path, more: list[str]) -> None:
    file = directory / "passwd"
    file.write_text("root:x:0:0\n")
    status, output, said = by_sudo("publish", f"--pid-file={file}", *more)
    assert (status, output) == (2, "")
    assert said == (f"xdp-erm: --pid-file {file}: not through sudo, since root would write to any file: take a shell "
                    "of root's\n")
    assert file.read_text() == "root:x:0:0\n"
