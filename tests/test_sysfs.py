"""sysfs of the network namespace, mounted or found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xdp_erm_py.errors import XdpErmError
from xdp_erm_py.kernel import sysfs
from xdp_erm_py.kernel.links import Links
from xdp_erm_py.lab.cable import SENSOR_INTERFACE as SENSOR

TIMEOUT = 60  # seconds
ROOT = Path(__file__).resolve().parents[1]

#: As under seccomp, or in a container.
REFUSED = """
from xdp_erm_py.kernel import rps, sysfs
from xdp_erm_py.kernel.links import Links
def refuse(*_): raise PermissionError(1, "Operation not permitted")
sysfs._system_call = refuse
with Links() as links:
    link = links.find("sensor0")
print(sysfs.driver(link), rps.masks(link))
"""


def run(*prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=TIMEOUT,
                          check=False, cwd=ROOT)


def test_what_is_mounted_at_sys_will_do(cable):
    """Where it is of the same network namespace, as in a container."""
    done = run("unshare", "--mount", "sh", "-c", 'mount -t sysfs none /sys && exec "$@"', "sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("None {'rx-0': '")


def test_another_namespaces_will_not(cable):
    done = run()
    assert done.returncode == 1
    assert ("no sysfs of this network namespace can be mounted (Operation not permitted), and /sys is of another"
            in done.stderr)


def test_none_at_all(monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(sysfs, "_system_call", refuse)
    monkeypatch.setattr(sysfs, "_SYS", str(tmp_path / "sys"))
    with Links() as links, pytest.raises(XdpErmError, match=r"no sysfs can be mounted \(Operation not permitted\), "):
        sysfs.driver(links.find("lo"))


def test_names_alone_do_not_tell_namespaces_apart(cable, tmp_path, monkeypatch):
    """The same interfaces with the same numbers, but for a hardware address."""
    with Links() as links:
        told = {link.name: link for link in links}
    for name, link in told.items():
        directory = tmp_path / "class" / "net" / name
        directory.mkdir(parents=True)
        (directory / "ifindex").write_text(f"{link.index}\n")
        (directory / "address").write_text(":".join(link.address[place:place + 2] for place in range(0, 12, 2)) + "\n")
    (tmp_path / "class" / "net" / "bonding_masters").write_text("")

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(sysfs, "_system_call", refuse)
    monkeypatch.setattr(sysfs, "_SYS", str(tmp_path))
    assert sysfs.driver(told[SENSOR]) is None
    (tmp_path / "class" / "net" / SENSOR / "address").write_text("02:00:00:00:00:99\n")
    with pytest.raises(XdpErmError, match="is of another"):
        sysfs.driver(told[SENSOR])
