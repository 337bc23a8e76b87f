"""`make demo` and `make test` install what is missing, and wait for another process that does so."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.check

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "apt-install"
TIMEOUT = 60  # seconds

# Finds a lock taken as often as there are lines in a file.
APT_GET = r"""#!/bin/sh
echo "$*" >>"$STATE/calls"
if [ -s "$STATE/locked" ]; then
    sed -i 1d "$STATE/locked"
    echo "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (unattended-upgr)" >&2
    exit 100
fi
if [ -e "$STATE/broken" ]; then
    echo "E: no network" >&2
    exit 100
fi
"""


@pytest.fixture
def state(tmp_path: Path) -> Path:
    program = tmp_path / "apt-get"
    program.write_text(APT_GET)
    program.chmod(0o755)
    know(tmp_path, one="install ok installed")
    return tmp_path


def know(state: Path, **packages: str) -> None:
    """What dpkg knows, in place of the machine's own packages."""
    (state / "info").mkdir(exist_ok=True)
    (state / "status").write_text("".join(
        f"Package: {name}\nStatus: {status}\nArchitecture: all\nVersion: 1\nMaintainer: Test\nDescription: Test\n\n"
        for name, status in packages.items()))


def install(state: Path, patience: int = TIMEOUT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, "one", "two"], capture_output=True, text=True, timeout=TIMEOUT, check=False, env={
        "PATH": f"{state}{os.pathsep}{os.environ['PATH']}", "STATE": str(state), "PATIENCE": str(patience),
        "DPKG_ADMINDIR": str(state)})


CALLS = ["-qq update", "-qq install -y --no-install-recommends one two"]


def calls(state: Path) -> list[str]:
    return (state / "calls").read_text().splitlines()


def test_nothing_is_done_where_all_is_there(state: Path) -> None:
    know(state, one="install ok installed", two="hold ok installed")
    done = install(state)
    assert (done.returncode, done.stdout, done.stderr, (state / "calls").exists()) == (0, "", "", False)


@pytest.mark.parametrize("status", ["deinstall ok config-files", "install ok half-configured"])
def test_what_left_something_behind_is_installed(state: Path, status: str) -> None:
    know(state, one="install ok installed", two=status)
    assert (install(state).returncode, calls(state)) == (0, CALLS)


def test_a_lock_is_waited_for_and_it_is_said_once(state: Path) -> None:
    (state / "locked").write_text("\n\n")
    done = install(state)
    assert (done.returncode, done.stdout, calls(state)) == (0, "installing one two\n", [CALLS[0]] * 2 + CALLS)
    assert done.stderr == ("E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (unattended-upgr)\n"
                           f"waiting for it, for up to {TIMEOUT} seconds\n")


def test_waiting_has_an_end(state: Path) -> None:
    (state / "locked").write_text("\n" * 60)
    done = install(state, 1)
    assert done.returncode == 1
    assert done.stderr.endswith("held by process 7 (unattended-upgr)\nstill so after 1 seconds\n")


def test_any_other_failure_is_none_to_wait_for(state: Path) -> None:
    (state / "broken").touch()
    done = install(state)
    assert (done.returncode, done.stderr, calls(state)) == (1, "E: no network\n", CALLS[:1])
